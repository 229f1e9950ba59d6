"""Internal: what a set-up of a guest consists of, in the order in which it is made.

Knows: which files, groups and units a guest needs for each way to open its device. Does not know:
how a step is made (setup_steps.py) and taken back (setup_undo.py), what the files say
(setup_files.py).
"""

from __future__ import annotations

from ..errors import IvshmemError
from . import pci, setup_files, uio
from .setup_files import MODULES
from .setup_steps import (
    LoadModules,
    MakeGroup,
    MakeLink,
    Permit,
    SetupStep,
    StartUnits,
    SwitchOnNoIommu,
    WriteFile,
    WriteFiles,
)
from .setup_system import SetupRecord, System
from .setup_undo import Undo, undo_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .device import Access

GROUP = "ivshmem"
LIBRARY = "/usr/local/lib/ivshmem"
COMMAND = "/usr/local/bin/ivshmem"

_MODULES_LOAD = "/etc/modules-load.d/ivshmem.conf"
_MODPROBE = "/etc/modprobe.d/ivshmem.conf"
_SYSUSERS = "/etc/sysusers.d/ivshmem-guest.conf"
_RULES = "/etc/udev/rules.d/70-ivshmem.rules"
_UNITS = "/etc/systemd/system"
_UNIT = "ivshmem-guest"
_SOCKET = "/run/ivshmem"


class Settings:
    """What is to be set up.

    Args:
        access: the way to open the devices.
        addresses: of the devices that are meant; none: all.
        devices: those that are there now; none where another machine is set up.
        program: what runs `ivshmem` there, by absolute paths.
        files: of that program, to be copied: data and mode by paths below LIBRARY; none: it stays
            where it is.
        serve: whether `guest serve` runs there.
        peers: its option.
    """

    def __init__(
        self,
        *,
        access: Access,
        group: str,
        users: Sequence[str],
        addresses: Sequence[str],
        devices: Sequence[pci.Device],
        program: Sequence[str],
        files: Mapping[str, tuple[bytes, int]],
        serve: bool,
        peers: str,
    ) -> None:
        self.access = access
        self.group = setup_files.check_name(group)
        self.users = [setup_files.check_name(user) for user in users]
        self.addresses = list(map(setup_files.check_address, addresses))
        self.devices = devices
        self.program = program
        self.files = files
        self.serve = serve
        self.peers = peers


def way_of(devices: Sequence[pci.Device]) -> Access:
    """Return the best way to open devices that users may have; without an IOMMU not noiommu.

    Raises:
        IvshmemError: each of them needs another one.
    """
    ways = {device.address: _way_of(device) for device in devices}
    if len({*ways.values()}) > 1:
        listed = ", ".join(f"{address} by {way}" for address, way in ways.items())
        raise IvshmemError(f"the devices need several ways ({listed}): choose with --address")
    return next(iter(ways.values()))


def _way_of(device: pci.Device) -> Access:
    if uio.name(device) is not None:
        return "uio"
    return "vfio" if device.iommu_group is not None else "sysfs"


def is_usable_now(device: pci.Device, access: Access) -> bool:
    """Whether a device can be opened in a way since this boot."""
    if access == "vfio":
        return device.iommu_group is not None
    if access == "noiommu":
        return device.iommu_group is None
    return access == "sysfs" or uio.name(device) is not None


def why_not_served(devices: Sequence[pci.Device], access: Access) -> str:
    """Say why `guest serve` cannot work with these devices; "": it can."""
    if access == "sysfs" and any(device.variant == "doorbell" for device in devices):
        return "without an IOMMU there are no interrupts to pass on"
    if mode := pci.locked_down():
        return f"the kernel is locked down ({mode})"
    return ""


def steps(system: System, settings: Settings) -> list[SetupStep]:
    """All steps, in the order in which they are made; those that are done already as well."""
    access = settings.access
    found: list[SetupStep] = []

    def write(path: str, text: str) -> None:
        found.append(WriteFile(system, path, text.encode()))

    if settings.files:
        files = [
            WriteFile(system, f"{LIBRARY}/{name}", data, mode)
            for name, (data, mode) in settings.files.items()
        ]
        found.append(WriteFiles(f"copy this program to {system.place(LIBRARY)}", files))
        found.append(MakeLink(system, COMMAND, settings.program[-1]))
    write(_SYSUSERS, setup_files.sysusers(settings.group, settings.users))
    found.append(MakeGroup(system, _SYSUSERS, settings.group, settings.users))
    devices = [device for device in settings.devices if is_usable_now(device, access)]
    now = system.live and bool(devices)
    if access == "noiommu":
        write(_MODPROBE, setup_files.no_iommu_mode())
    if access in ("vfio", "noiommu"):
        write(_MODULES_LOAD, setup_files.modules_load())
        if now:
            found.append(LoadModules(system, MODULES))
            if access == "noiommu":
                found.append(SwitchOnNoIommu(system))
    write(_RULES, setup_files.rules(access, settings.group, settings.addresses))
    if now:
        found += [Permit(system, each.address, access, settings.group) for each in devices]
    if settings.serve:
        found += _units(system, settings, now=now)
    return found


def _units(system: System, settings: Settings, *, now: bool) -> list[SetupStep]:
    several = len(settings.addresses) > 1
    found: list[SetupStep] = []
    starts = []
    for address in settings.addresses or [""]:
        unit = f"{_UNIT}@{address}" if several else _UNIT
        path = f"{_SOCKET}-{address}.sock" if several else f"{_SOCKET}.sock"
        texts = {
            "socket": setup_files.socket_unit(path, settings.group),
            "service": setup_files.service_unit(
                settings.program,
                settings.access,
                settings.group,
                socket=f"{unit}.socket",
                address=address,
                peers=settings.peers,
            ),
        }
        for kind, text in texts.items():
            found.append(WriteFile(system, f"{_UNITS}/{unit}.{kind}", text.encode()))
        starts.append(StartUnits(system, [f"{unit}.{kind}" for kind in texts], now=now))
    return [*found, *starts]


def check(record: SetupRecord, planned: Sequence[SetupStep]) -> None:
    """Raise before anything is made, if a step cannot be made, or leaves things of another set-up.

    Raises:
        IvshmemError, OSError: with what to do.
    """
    for step in planned:
        step.check(record)
    keys = {key for step in planned for key in step.stands_for()}
    for entry in record.entries:
        if entry["kind"] in ("file", "link", "group", "member", "unit"):
            key = entry["kind"], entry["name"]
            if key not in keys and undo_of(record.system, entry).title:
                raise IvshmemError(
                    f"this system was set up with other options ({entry['kind']} {entry['name']}):"
                    " first `ivshmem guest setup --undo`"
                )


def undoing(record: SetupRecord) -> list[Undo]:
    """What is to be taken back, in order."""
    return [undo_of(record.system, entry) for entry in reversed(record.entries)]


def finish_undo(record: SetupRecord) -> None:
    """Have systemd and udev forget what was removed; then the record goes."""
    system = record.system
    if system.live:
        system.tried("systemctl", "daemon-reload")
        system.tried("udevadm", "control", "--reload")
    record.remove()


def note_on_access(access: Access) -> str:
    """Return what a user must know about a way; "": nothing."""
    if access == "noiommu":
        return (
            "warning: without an IOMMU the device can write to all of this machine's memory, and"
            " the kernel is tainted; only processes with CAP_SYS_RAWIO can open it, others connect"
            " to `guest serve`"
        )
    if access == "sysfs":
        return (
            "without an IOMMU there is memory, and peers can be rung, but interrupts do not come:"
            " `ivshmem doctor` says what is missing"
        )
    return ""
