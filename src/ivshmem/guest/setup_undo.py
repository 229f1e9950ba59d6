"""Internal: how each step of a set-up is taken back.

Knows: how what was there before comes back. Does not know: how a step is made (setup_steps.py), in
which order steps are taken back (setup_plan.py), how they are printed.

Invariants:
1. What was not made by a set-up is not removed.
2. To take back can be repeated: a kill in the middle loses nothing.
"""

from __future__ import annotations

import contextlib
import errno
import os
from typing import Any

from . import pci, vfio
from .device import VFIO_PCI
from .setup_steps import check_free, is_loaded, is_ours, owner, target_of
from .setup_system import System


class Undo:
    """How an entry of the record is taken back.

    Attributes:
        title: what is done, in the imperative; "": nothing is left to do.
    """

    def __init__(self, system: System, entry: dict[str, Any]) -> None:
        self.system, self.entry = system, entry
        self.name: str = entry["name"]
        self.kind: str = entry["kind"]

    @property
    def title(self) -> str:
        return str(getattr(self, f"_{self._method()}_title")())

    def make(self) -> None:
        """Take it back; idempotent."""
        getattr(self, f"_{self._method()}")()

    def _method(self) -> str:
        return self.kind.replace(" ", "_").replace("-", "_")

    # -- files

    def _file_title(self) -> str:
        data = self.system.read(self.name)
        return f"remove {self.system.place(self.name)}" if data is not None else ""

    def _file(self) -> None:
        data = self.system.read(self.name)
        if data is not None and is_ours(data, self.entry):
            self.system.remove(self.name)

    @property
    def kept(self) -> str:
        """Why it stays; "": it does not."""
        if self.kind != "file":
            return ""
        data = self.system.read(self.name)
        if data is None or is_ours(data, self.entry):
            return ""
        return f"{self.system.place(self.name)} stays: it was replaced since, by another file"

    def _link_title(self) -> str:
        return f"remove {self.system.place(self.name)}" if self._is_our_link() else ""

    def _is_our_link(self) -> bool:
        place = self.system.place(self.name)
        return place.is_symlink() and os.readlink(place) == self.entry["target"]

    def _link(self) -> None:
        if self._is_our_link():
            self.system.place(self.name).unlink()

    def _folder_title(self) -> str:
        place = self.system.place(self.name)
        return f"remove {place}, if it is empty" if place.is_dir() else ""

    def _folder(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            try:
                self.system.place(self.name).rmdir()
            except OSError as error:
                if error.errno != errno.ENOTEMPTY:
                    raise

    # -- users

    def _group_title(self) -> str:
        there = self.system.members(self.name) is not None
        return f"remove the group: groupdel {self.name}" if there else ""

    def _group(self) -> None:
        if self.system.members(self.name) is not None:
            self.system.run("groupdel", *self._prefix(), self.name)

    def _member_title(self) -> str:
        group, user = self.name.split(":")
        there = user in (self.system.members(group) or ())
        return f"take {user} out of the group: gpasswd --delete {user} {group}" if there else ""

    def _member(self) -> None:
        group, user = self.name.split(":")
        if user in (self.system.members(group) or ()):
            root = () if self.system.live else ("--root", self.system.root)
            self.system.run("gpasswd", *root, "--delete", user, group)

    def _prefix(self) -> tuple[str, ...]:
        return () if self.system.live else ("--prefix", self.system.root)

    # -- what runs

    def _unit_title(self) -> str:
        there = self.system.read(f"/etc/systemd/system/{self.name}") is not None
        if there or os.path.lexists(self._wants()):
            return f"systemctl disable{' --now' * self.system.live} {self.name}"
        return ""

    def _wants(self) -> Any:
        return self.system.place(f"/etc/systemd/system/{target_of(self.name)}.wants/{self.name}")

    def _unit(self) -> None:
        if self.system.read(f"/etc/systemd/system/{self.name}") is not None:
            now = ("--now",) if self.system.live else ()
            if self.system.live:
                self.system.run("systemctl", "daemon-reload")
            self.system.run("systemctl", "disable", "--quiet", *now, self.name, rooted=True)
        with contextlib.suppress(FileNotFoundError):  # somebody removed the unit alone
            self._wants().unlink()

    def _module_title(self) -> str:
        return f"unload the module, if nothing uses it: {self.name}" if self._is_ours_now() else ""

    def _is_ours_now(self) -> bool:
        return self.system.live and is_loaded(self.name)

    def _module(self) -> None:
        if self._is_ours_now():
            self.system.tried("modprobe", "--remove", self.name)

    def _no_iommu_mode_title(self) -> str:
        on = self.system.live and vfio.noiommu_enabled()
        return "switch off vfio's no-IOMMU mode" if on else ""

    def _no_iommu_mode(self) -> None:
        if self.system.live and vfio.noiommu_enabled():
            vfio.NOIOMMU.write_text("N")

    def _device_title(self) -> str:
        device = self._device_now()
        if device is None or self._is_as_before(device):
            return ""
        driver = self.entry["driver"]
        return f"give {self.name} back {f'to {driver}' if driver else 'without a driver'}"

    def _device_now(self) -> pci.Device | None:
        if not self.system.live:
            return None
        try:
            return pci.look(self.name)
        except FileNotFoundError:
            return None

    def _is_as_before(self, device: pci.Device) -> bool:
        entry = self.entry
        return (
            (device.driver, pci.driver_override(device)) == (entry["driver"], entry["override"])
            and (device.driver or pci.is_enabled(device) == entry["enabled"])
            and all(
                list(owner(str(path))) == before
                for name, *before in entry["files"]
                if (path := device.path / name).exists()
            )
        )

    def _device(self) -> None:
        device = self._device_now()
        if device is None or self._is_as_before(device):
            return
        entry = self.entry
        with pci.locked(device), pci.unless_unplugged():
            check_free(device)
            if device.driver != entry["driver"] or pci.driver_override(device) != entry["override"]:
                former = "" if device.driver == entry["driver"] else entry["driver"]
                pci.unbind(device, VFIO_PCI, former, entry["override"])
            device = pci.look(self.name)
            if not device.driver and not entry["enabled"] and pci.is_enabled(device):
                pci.enable(device, False)
            for name, uid, gid, mode in entry["files"]:
                if (path := device.path / name).exists():
                    os.chown(path, uid, gid)
                    os.chmod(path, mode)
