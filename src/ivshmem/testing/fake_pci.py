"""Internal: a sysfs of files that answers writes as the kernel does: PCI devices and their drivers.

Knows: what the kernel does with a driver. Does not know: vfio.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from ..guest import pci
from .patches import Patcher

MIB = 1 << 20


MSIX = 0x11


def config_space(
    *capabilities: tuple[int, int, int], first: int | None = None, size: int = 256
) -> bytes:
    """A configuration space with such capabilities: (where, what, where the next one is).

    That of MSI-X has two vectors.
    """
    config = bytearray(size)
    config[0:4] = b"\xf4\x1a\x10\x11"
    config[0x34] = first if first is not None else capabilities[0][0] if capabilities else 0
    for at, kind, following in capabilities:
        config[at : at + 4] = bytes([kind, following, 1, 0x80])  # enabled, too
    return bytes(config[:size])


class FakePci:
    """Takes the place of /sys/bus/pci until the patcher undoes it.

    Attributes:
        writes: what was written, as (path below the root, text).
        takes: for each driver, which addresses it takes when asked to; a test may change it.
        refuse: paths (below the root) that answer a write with this error number.
        bound, unbound: called with address and driver after a driver got a device, or lost it.
    """

    def __init__(self, root: Path, patcher: Patcher) -> None:
        self.root = root
        self.writes: list[tuple[str, str]] = []
        self.takes: dict[str, Callable[[str], bool]] = {}
        self.refuse: dict[str, int] = {}
        self.bound: Callable[[str, str], object] = lambda *_: None
        self.unbound: Callable[[str, str], object] = lambda *_: None
        for folder in ("devices", "drivers"):
            (root / folder).mkdir(parents=True)
        patcher.setattr(pci, "SYSFS", root)
        patcher.setattr(pci, "LOCKDOWN", root / "lockdown")
        patcher.setattr(pci, "_write", self.write)

    # -- making it --------------------------------------------------------------------------------

    def add_driver(self, name: str, takes: Callable[[str], bool] = lambda _: False) -> None:
        """One that takes devices by itself; with driver_override it takes any."""
        (self.root / "drivers" / name).mkdir()
        self.takes[name] = takes

    def add(
        self,
        address: str = "0000:00:04.0",
        *,
        size: int = MIB,
        vectors: int = 2,
        driver: str = "",
        group: int | None = None,
        start: int = 0xFEBF1000,
        ids: tuple[int, int] = (pci.VENDOR_ID, pci.DEVICE_ID),
        override: str = "(null)",
    ) -> Path:
        """A device, with interrupts if it has vectors. Returns its directory."""
        path = self.root / "devices" / address
        path.mkdir()
        (path / "vendor").write_text(f"{ids[0]:#06x}\n")
        (path / "device").write_text(f"{ids[1]:#06x}\n")
        ends = [(start, 256), (start + 0x10000, 4096 if vectors else 0), (0x100000000, size)]
        lines = [f"{at:#018x} {at + length - 1:#018x} 0x40200" for at, length in ends if length]
        nothing = f"{0:#018x} {0:#018x} {0:#018x}"
        if not vectors:
            lines.insert(1, nothing)
        (path / "resource").write_text("\n".join([*lines, *[nothing] * 10]) + "\n")
        config = bytearray(config_space((0x40, MSIX, 0)) if vectors else config_space())
        if vectors:
            config[0x42:0x44] = (vectors - 1).to_bytes(2, "little")
        (path / "config").write_bytes(config)
        (path / "driver_override").write_text(f"{override}\n")
        (path / "enable").write_text("0\n")
        for number, length in ((0, 4096), (2, size)):
            with (path / f"resource{number}").open("wb") as file:
                file.truncate(length)
        (path / "resource2_wc").symlink_to("resource2")
        if group is not None:
            self.set_group(address, group)
        if driver:
            self._bind(address, driver)
        return path

    def set_group(self, address: str, group: int, *, made_by_vfio: bool = False) -> None:
        members = self.root / "groups" / str(group) / "devices"
        members.mkdir(parents=True, exist_ok=True)
        if made_by_vfio:  # only such a group has a name
            (members.parent / "name").write_text("vfio-noiommu\n")
        (members / address).symlink_to(self.root / "devices" / address)
        (self.root / "devices" / address / "iommu_group").symlink_to(members.parent)

    def end_group(self, address: str) -> None:
        link = self.root / "devices" / address / "iommu_group"
        (link / "devices" / address).unlink()
        link.unlink()

    def unplug(self, address: str) -> None:
        shutil.rmtree(self.root / "devices" / address)

    def driver(self, address: str) -> str:
        link = self.root / "devices" / address / "driver"
        return link.readlink().name if link.is_symlink() else ""

    def override(self, address: str) -> str:
        return (self.root / "devices" / address / "driver_override").read_text().strip()

    # -- being it ---------------------------------------------------------------------------------

    def write(self, path: Path, text: str) -> None:
        """What pci._write does, with the consequences."""
        asked = str(path.relative_to(self.root))
        if asked in self.refuse:
            raise OSError(self.refuse[asked], os.strerror(self.refuse[asked]), str(path))
        if path.name in ("unbind", "bind", "drivers_probe"):
            if not path.parent.is_dir():
                raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))
        elif not path.exists():
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))
        self.writes.append((asked, text))
        if path.name == "driver_override":
            path.write_text("(null)\n" if text == "\n" else text.rstrip("\n") + "\n")
        elif path.name == "enable":
            path.write_text(f"{max(int(path.read_text()) + (1 if text == '1' else -1), 0)}\n")
        elif path.name == "unbind":
            name = path.parent.resolve().name
            if self.driver(text) != name:
                raise OSError(errno.ENODEV, "No such device", str(path))
            (self.root / "devices" / text / "driver").unlink()
            self.unbound(text, name)
        elif path.name == "bind":
            name = path.parent.name
            if not self._may_take(name, text):
                raise OSError(errno.ENODEV, "No such device", str(path))
            self._bind(text, name)
        elif path.name == "drivers_probe":
            for name in self.takes:
                if self._may_take(name, text):
                    self._bind(text, name)
                    return

    def _may_take(self, name: str, address: str) -> bool:
        if self.driver(address):
            return False
        override = self.override(address)
        return override == name if override != "(null)" else self.takes[name](address)

    def _bind(self, address: str, name: str) -> None:
        if name not in self.takes:
            self.add_driver(name, lambda _: True)
        link = self.root / "devices" / address / "driver"
        link.symlink_to(self.root / "drivers" / name)
        self.bound(address, name)
