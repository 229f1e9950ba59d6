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

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path


class Undo:
    """One entry of the record, to be taken back.

    Attributes:
        name: of what was made.
        kind: of the entry; the kinds are setup_system's KINDS.
    """

    kind = ""

    def __init__(self, system: System, entry: dict[str, Any]) -> None:
        self.system, self.entry = system, entry
        self.name: str = entry["name"]

    @property
    def title(self) -> str:
        """What is done, in the imperative; "": nothing is left to do."""
        raise NotImplementedError

    @property
    def kept(self) -> str:
        """Why it stays; "": it does not."""
        return ""

    def make(self) -> None:
        """Take it back; idempotent."""
        raise NotImplementedError


class _RemoveFile(Undo):
    kind = "file"

    @property
    def title(self) -> str:
        data = self.system.read(self.name)
        return f"remove {self.system.place(self.name)}" if data is not None else ""

    @property
    def kept(self) -> str:
        data = self.system.read(self.name)
        if data is None or is_ours(data, self.entry):
            return ""
        return f"{self.system.place(self.name)} stays: it was replaced since, by another file"

    def make(self) -> None:
        data = self.system.read(self.name)
        if data is not None and is_ours(data, self.entry):
            self.system.remove(self.name)


class _RemoveLink(Undo):
    kind = "link"

    @property
    def title(self) -> str:
        return f"remove {self.system.place(self.name)}" if self._is_ours() else ""

    def _is_ours(self) -> bool:
        place = self.system.place(self.name)
        return place.is_symlink() and os.readlink(place) == self.entry["target"]

    def make(self) -> None:
        if self._is_ours():
            self.system.place(self.name).unlink()


class _RemoveFolder(Undo):
    kind = "folder"

    @property
    def title(self) -> str:
        place = self.system.place(self.name)
        return f"remove {place}, if it is empty" if place.is_dir() else ""

    def make(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            try:
                self.system.place(self.name).rmdir()
            except OSError as error:
                if error.errno != errno.ENOTEMPTY:
                    raise


class _RemoveGroup(Undo):
    kind = "group"

    @property
    def title(self) -> str:
        there = self.system.members(self.name) is not None
        return f"remove the group: groupdel {self.name}" if there else ""

    def make(self) -> None:
        if self.system.members(self.name) is not None:
            prefix = () if self.system.live else ("--prefix", self.system.root)
            self.system.run("groupdel", *prefix, self.name)


class _RemoveMember(Undo):
    kind = "member"

    def __init__(self, system: System, entry: dict[str, Any]) -> None:
        super().__init__(system, entry)
        self._group, self._user = self.name.split(":")

    @property
    def title(self) -> str:
        if not self._is_there():
            return ""
        return f"take {self._user} out of the group: gpasswd --delete {self._user} {self._group}"

    def _is_there(self) -> bool:
        return self._user in (self.system.members(self._group) or ())

    def make(self) -> None:
        if self._is_there():
            root = () if self.system.live else ("--root", self.system.root)
            self.system.run("gpasswd", *root, "--delete", self._user, self._group)


class _DisableUnit(Undo):
    kind = "unit"

    @property
    def title(self) -> str:
        if self._is_there() or os.path.lexists(self._wants()):
            return f"systemctl disable{' --now' * self.system.live} {self.name}"
        return ""

    def _is_there(self) -> bool:
        return self.system.read(f"/etc/systemd/system/{self.name}") is not None

    def _wants(self) -> Path:
        return self.system.place(f"/etc/systemd/system/{target_of(self.name)}.wants/{self.name}")

    def make(self) -> None:
        if self._is_there():
            now = ("--now",) if self.system.live else ()
            if self.system.live:
                self.system.run("systemctl", "daemon-reload")
            self.system.run("systemctl", "disable", "--quiet", *now, self.name, rooted=True)
        with contextlib.suppress(FileNotFoundError):  # somebody removed the unit alone
            self._wants().unlink()


class _UnloadModule(Undo):
    kind = "module"

    @property
    def title(self) -> str:
        return f"unload the module, if nothing uses it: {self.name}" if self._is_there() else ""

    def _is_there(self) -> bool:
        return self.system.live and is_loaded(self.name)

    def make(self) -> None:
        if self._is_there():
            self.system.tried("modprobe", "--remove", self.name)


class _SwitchOffNoIommu(Undo):
    kind = "no-iommu mode"

    @property
    def title(self) -> str:
        return "switch off vfio's no-IOMMU mode" if self._is_on() else ""

    def _is_on(self) -> bool:
        return self.system.live and vfio.noiommu_enabled()

    def make(self) -> None:
        if self._is_on():
            vfio.NOIOMMU.write_text("N")


class _GiveDeviceBack(Undo):
    kind = "device"

    @property
    def title(self) -> str:
        device = self._now()
        if device is None or self._is_as_before(device):
            return ""
        driver = self.entry["driver"]
        return f"give {self.name} back {f'to {driver}' if driver else 'without a driver'}"

    def _now(self) -> pci.Device | None:
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

    def make(self) -> None:
        device = self._now()
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


UNDO: dict[str, type[Undo]] = {
    each.kind: each
    for each in (
        _RemoveFile,
        _RemoveLink,
        _RemoveFolder,
        _RemoveGroup,
        _RemoveMember,
        _DisableUnit,
        _UnloadModule,
        _SwitchOffNoIommu,
        _GiveDeviceBack,
    )
}


def undo_of(system: System, entry: dict[str, Any]) -> Undo:
    """Return what takes an entry of the record back."""
    return UNDO[entry["kind"]](system, entry)
