"""Internal: the steps of a set-up: how each is shown, made, and taken back.

Knows: what a step changes, and how what was there before comes back. Does not know: in which order
steps are made (setup_plan.py), how they are printed.

Invariants:
1. What was not made here is neither replaced nor removed.
2. Each step can be repeated, and so can what takes it back: a kill in the middle loses nothing.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import hashlib
import os
import stat
import time
from typing import Any

from ..errors import IvshmemError
from ..system import processes
from ..text import counted
from . import pci, uio, vfio
from .device import VFIO_PCI, Access
from .setup_files import MARK
from .setup_system import SetupRecord, System

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_FILES = ("resource0", "resource2", "resource2_wc")
_MODULES = "/sys/module"
_PATIENCE = 10.0  # seconds for udev


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class SetupStep:
    """One change of a machine.

    Attributes:
        title: what it does, in the imperative.
        undo: the same for taking it back.
    """

    title = ""

    def __init__(self, system: System) -> None:
        self.system = system

    def check(self, record: SetupRecord) -> None:
        """Raise if it cannot be made, before anything is."""

    def is_done(self) -> bool:
        """Whether all is as it would be after this step."""
        raise NotImplementedError

    def shown(self) -> list[str]:
        """What changes, in lines."""
        return []

    def stands_for(self) -> list[tuple[str, str]]:
        """What it stands for in the record, also if nothing of it is made now."""
        return []

    def entries(self) -> list[dict[str, Any]]:
        """For the record: what is made now, and what was before."""
        return []

    def make(self) -> None:
        """Make it. It is in the record already."""
        raise NotImplementedError


class WriteFile(SetupStep):
    """A file. A text is ours by its first line, other files by their digests in the record."""

    def __init__(self, system: System, path: str, data: bytes, mode: int = 0o644) -> None:
        super().__init__(system)
        self.path, self.data, self.mode = path, data, mode
        self.title = f"write {system.place(path)}"

    def check(self, record: SetupRecord) -> None:
        there = self.system.read(self.path)
        if there is None or there == self.data or is_ours(there, record.find("file", self.path)):
            return
        raise _foreign(self.system, self.path)

    def is_done(self) -> bool:
        if self.system.read(self.path) != self.data:
            return False
        return stat.S_IMODE(self.system.place(self.path).stat().st_mode) == self.mode

    def shown(self) -> list[str]:
        if not self.data.startswith(MARK.encode()):
            return [f"{-(-len(self.data) // 1024)} KiB, mode {self.mode:04o}"]
        before = (self.system.read(self.path) or b"").decode(errors="backslashreplace")
        lines = difflib.unified_diff(before.splitlines(), self.data.decode().splitlines(), n=1)
        return [line for line in lines if not line.startswith(("---", "+++", "@@"))]

    def stands_for(self) -> list[tuple[str, str]]:
        return [("file", self.path)]

    def entries(self) -> list[dict[str, Any]]:
        entries = _folders(self.system.missing_folders(self.path))
        entry = {"kind": "file", "name": self.path, "digests": [_digest(self.data)]}
        return [*entries, entry]

    def make(self) -> None:
        self.system.make_folders_of(self.path)
        self.system.write(self.path, self.data, self.mode)


def _foreign(system: System, path: str) -> FileExistsError:
    text = "it exists, and `ivshmem guest setup` did not make it: move it away first"
    return FileExistsError(errno.EEXIST, text, str(system.place(path)))


def _folders(names: Sequence[str]) -> list[dict[str, Any]]:
    return [{"kind": "folder", "name": name} for name in dict.fromkeys(names)]


class WriteFiles(SetupStep):
    """Several files, which are one step to a person."""

    def __init__(self, title: str, files: Sequence[WriteFile]) -> None:
        super().__init__(files[0].system)
        self.title, self.files = title, files

    def check(self, record: SetupRecord) -> None:
        for file in self.files:
            file.check(record)

    def is_done(self) -> bool:
        return all(file.is_done() for file in self.files)

    def shown(self) -> list[str]:
        size = sum(len(file.data) for file in self.files)
        return [f"{counted(len(self.files), 'file')}, {-(-size // 1024)} KiB"]

    def stands_for(self) -> list[tuple[str, str]]:
        return [key for file in self.files for key in file.stands_for()]

    def entries(self) -> list[dict[str, Any]]:
        return [entry for file in self.files for entry in file.entries()]

    def make(self) -> None:
        for file in self.files:
            if not file.is_done():
                file.make()


def is_ours(data: bytes, entry: dict[str, Any] | None) -> bool:
    digests = entry["digests"] if entry else ()
    return data.startswith(MARK.encode()) or _digest(data) in digests


class MakeLink(SetupStep):
    """A symbolic link."""

    def __init__(self, system: System, path: str, target: str) -> None:
        super().__init__(system)
        self.path, self.target = path, target
        self.title = f"link {system.place(path)} to {target}"

    def check(self, record: SetupRecord) -> None:
        if os.path.lexists(self.system.place(self.path)) and not self.is_done():
            raise _foreign(self.system, self.path)

    def is_done(self) -> bool:
        place = self.system.place(self.path)
        return place.is_symlink() and os.readlink(place) == self.target

    def stands_for(self) -> list[tuple[str, str]]:
        return [("link", self.path)]

    def entries(self) -> list[dict[str, Any]]:
        entries = _folders(self.system.missing_folders(self.path))
        return [*entries, {"kind": "link", "name": self.path, "target": self.target}]

    def make(self) -> None:
        self.system.make_folders_of(self.path)
        self.system.place(self.path).symlink_to(self.target)


class MakeGroup(SetupStep):
    """The group and its members, by a file for systemd-sysusers that is written before."""

    def __init__(self, system: System, file: str, group: str, users: Sequence[str]) -> None:
        super().__init__(system)
        self.file, self.group, self.users = file, group, users
        who = f", with {', '.join(users)}" if users else ""
        self.title = f"make the group {group}{who}: systemd-sysusers {os.path.basename(file)}"

    def check(self, record: SetupRecord) -> None:
        for user in self.users:
            if not self.system.has_user(user):
                raise IvshmemError(f"no user {user!r} here: useradd {user}, or omit --user")

    def is_done(self) -> bool:
        members = self.system.members(self.group)
        return members is not None and {*self.users} <= {*members}

    def stands_for(self) -> list[tuple[str, str]]:
        members = [("member", f"{self.group}:{user}") for user in self.users]
        return [("group", self.group), *members]

    def entries(self) -> list[dict[str, Any]]:
        members = self.system.members(self.group)
        if members is None:
            return [{"kind": "group", "name": self.group}]
        return [
            {"kind": "member", "name": f"{self.group}:{user}"}
            for user in self.users
            if user not in members
        ]

    def make(self) -> None:
        self.system.run("systemd-sysusers", os.path.basename(self.file), rooted=True)
        if not self.is_done():
            raise IvshmemError(f"systemd-sysusers did not make the group {self.group}")


class LoadModules(SetupStep):
    """Modules of the kernel, now."""

    def __init__(self, system: System, names: Sequence[str]) -> None:
        super().__init__(system)
        self.names = names
        self.title = f"load now: modprobe {' '.join(names)}"

    def _missing(self) -> list[str]:
        return [name for name in self.names if not is_loaded(name)]

    def is_done(self) -> bool:
        return not self._missing()

    def entries(self) -> list[dict[str, Any]]:
        return [{"kind": "module", "name": name} for name in self._missing()]

    def make(self) -> None:
        for name in self._missing():
            self.system.run("modprobe", name)


def is_loaded(name: str) -> bool:
    return os.path.isdir(f"{_MODULES}/{name.replace('-', '_')}")


class SwitchOnNoIommu(SetupStep):
    """vfio's no-IOMMU mode, now."""

    title = f"switch on vfio's no-IOMMU mode now: {vfio.ENABLE_NOIOMMU}"

    def check(self, record: SetupRecord) -> None:
        if is_loaded("vfio") and not vfio.has_noiommu():
            raise IvshmemError(
                "this kernel's vfio has no no-IOMMU mode: give QEMU a virtual IOMMU"
                " (`ivshmem qemu --iommu`), or the guest a kernel with VFIO_NOIOMMU"
            )

    def is_done(self) -> bool:
        return vfio.noiommu_enabled()

    def entries(self) -> list[dict[str, Any]]:
        return [{"kind": "no-iommu mode", "name": str(vfio.NOIOMMU)}]

    def make(self) -> None:
        self.check(SetupRecord(self.system))  # only now vfio is loaded for certain
        vfio.NOIOMMU.write_text("Y")


class Permit(SetupStep):
    """A device for its driver and its group, now: by the rules that are written before."""

    def __init__(self, system: System, address: str, access: Access, group: str) -> None:
        super().__init__(system)
        self.address, self.access, self.group = address, access, group
        self.title = f"apply the rules to {address} now: udevadm trigger"

    def is_done(self) -> bool:
        device = pci.look(self.address)
        if self.access in ("vfio", "noiommu") and device.driver != VFIO_PCI:
            return False
        if self.access == "sysfs" and not pci.is_enabled(device):
            return False
        return all(map(self._is_permitted, self._nodes(device)))

    def _nodes(self, device: pci.Device) -> list[str]:
        """What the group may open."""
        nodes = [str(device.path / name) for name in _FILES[self.access != "sysfs" :]]
        if (path := group_path(device)) is not None:
            nodes.append(str(path))
        if (name := uio.name(device)) is not None:
            nodes.append(str(uio.DEV / name))
        return [node for node in nodes if os.path.exists(node)]

    def _is_permitted(self, path: str) -> bool:
        found = os.stat(path)
        members = self.system.members(self.group)
        return members is not None and (found.st_gid, found.st_mode & 0o660) == (
            _gid(self.group),
            0o660,
        )

    def entries(self) -> list[dict[str, Any]]:
        device = pci.look(self.address)
        files = [name for name in _FILES if (device.path / name).exists()]
        if (name := uio.name(device)) is not None:
            files.append(str(uio.DEV / name))
        return [
            {
                "kind": "device",
                "name": self.address,
                "driver": device.driver,
                "override": pci.driver_override(device),
                "enabled": pci.is_enabled(device),
                "files": [[name, *owner(str(device.path / name))] for name in files],
            }
        ]

    def make(self) -> None:
        system = self.system
        system.run("udevadm", "control", "--reload")
        device = pci.look(self.address)
        trigger = ("udevadm", "trigger", "--action=add", "--settle")
        if self.access in ("vfio", "noiommu"):
            with pci.locked(device):
                check_free(device)
                system.run(*trigger, str(device.path.resolve()))
                pci.bind(device, VFIO_PCI)
            system.run("udevadm", "settle")
            group = group_path(pci.look(self.address))
            if group is not None:
                system.run(*trigger, os.path.realpath(f"/sys/class/vfio/{group.name}"))
        else:
            system.run(*trigger, str(device.path.resolve()))
            if self.access == "uio":
                system.run(*trigger, "--subsystem-match=uio")
        give_up = time.monotonic() + _PATIENCE
        while not self.is_done():
            if time.monotonic() > give_up:
                raise IvshmemError(
                    f"udev did not give {self.address} to the group {self.group}: see"
                    " `journalctl -u systemd-udevd`"
                )
            time.sleep(0.05)


def group_path(device: pci.Device) -> Any:
    """The file that stands for the device's group in vfio; None: it has none, or no driver."""
    if device.driver != VFIO_PCI:
        return None
    if device.iommu_group is not None:
        return vfio.group_path(device.iommu_group)
    if device.noiommu_group is not None:
        return vfio.group_path(device.noiommu_group, iommu=False)
    return None


def check_free(device: pci.Device) -> None:
    path = group_path(device)
    if path is not None and vfio.is_held(path):
        pids = processes.pids_with_open(path)
        raise OSError(
            errno.EBUSY,
            f"{processes.described(pids)} has the device open: stop that first",
            device.address,
        )


def owner(path: str) -> tuple[int, int, int]:
    found = os.stat(path)
    return found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)


def _gid(group: str) -> int:
    import grp  # here: only on the machine itself

    return grp.getgrnam(group).gr_gid


class StartUnits(SetupStep):
    """Units, from the next boot on, and now."""

    def __init__(self, system: System, names: Sequence[str], *, now: bool) -> None:
        super().__init__(system)
        self.names, self.now = names, now and system.live
        option = " --now" if self.now else ""
        self.title = f"systemctl enable{option} {' '.join(names)}"
        self.changed = False  # whether a file of theirs is another than when they started

    def is_done(self) -> bool:
        if self.changed or not all(map(self._is_enabled, self.names)):
            return False
        if not self.now:
            return True
        old = ("systemctl", "show", "--value", "--property", "NeedDaemonReload", *self.names)
        return (
            self.system.tried("systemctl", "is-active", "--quiet", *self.names)
            and "yes" not in self.system.run(*old).split()
        )

    def _is_enabled(self, name: str) -> bool:
        folder = f"/etc/systemd/system/{target_of(name)}.wants/{name}"
        return os.path.islink(self.system.place(folder))

    def stands_for(self) -> list[tuple[str, str]]:
        return [("unit", name) for name in self.names]

    def entries(self) -> list[dict[str, Any]]:
        folders = [f"/etc/systemd/system/{target_of(name)}.wants" for name in self.names]
        missing = [
            each for folder in folders for each in self.system.missing_folders(f"{folder}/x")
        ]
        units = [{"kind": "unit", "name": name} for name in self.names]
        return [*_folders(missing), *units]

    def make(self) -> None:
        if self.system.live:
            self.system.run("systemctl", "daemon-reload")
        self.system.run("systemctl", "enable", "--quiet", *self.names, rooted=True)
        if self.now:
            self._start()
        self.changed = False

    def _start(self) -> None:
        service = self.names[-1]
        self.system.tried("systemctl", "reset-failed", *self.names)
        try:
            self.system.run("systemctl", "restart", *self.names)
        except IvshmemError as error:
            show = ("systemctl", "show", "--value", "--property", "StatusText", service)
            reason = ""
            with contextlib.suppress(IvshmemError):
                reason = self.system.run(*show).strip()
            raise IvshmemError(
                f"{service} does not start: {reason or error} (see `systemctl status {service}`)"
            ) from None


def target_of(unit: str) -> str:
    return "sockets.target" if unit.endswith(".socket") else "multi-user.target"
