"""Internal: what the files of a set-up guest say: for udev, kmod, sysusers and systemd.

Knows: the formats of these files, and which lines a way to open the device needs. Does not know:
where a file is written, or whether it is there.

Each text begins with MARK: so a file is known as ours, also after an administrator changed it.

*Rejected:* driverctl, which binds a device by its address alone and is not on a minimal system. A
rule that starts a shell to bind the driver: udev writes attributes by itself.
"""

from __future__ import annotations

import re

from ..system.systemd import unit_words
from .device import VFIO_PCI, Access
from .pci import DEVICE_ID, VENDOR_ID

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

MARK = "# made by `ivshmem guest setup`; `ivshmem guest setup --undo` removes it\n"

# vfio asks for the second one when it is loaded itself, but not on each kernel.
MODULES = ("vfio-pci", "vfio_iommu_type1")

_MATCH = f'ATTR{{vendor}}=="{VENDOR_ID:#06x}", ATTR{{device}}=="{DEVICE_ID:#06x}"'
_MODALIAS = f"pci:v{VENDOR_ID:08X}d{DEVICE_ID:08X}"

# Names that useradd(8) of Debian takes; udev and systemd expand % and $.
_NAME = re.compile(r"[a-z_][a-z0-9_-]{0,30}")
_ADDRESS = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]")


def check_name(name: str) -> str:
    """Return the name of a group or user, if these files can have it.

    Raises:
        ValueError: they cannot.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"not a name for a user or group: {name!r} (small letters, digits, _ and -, at most 31)"
        )
    return name


def check_address(address: str) -> str:
    """Return a PCI address, in the form that sysfs has, if it is one.

    Raises:
        ValueError: it is none.
    """
    if not _ADDRESS.fullmatch(address):
        raise ValueError(f"not a PCI address: {address!r} (for example 0000:00:04.0)")
    return address


def modules_load() -> str:
    """For modules-load.d(5): what vfio needs, because its users may not load modules."""
    return MARK + "".join(f"{name}\n" for name in MODULES)


def no_iommu_mode() -> str:
    """For modprobe.d(5): vfio works without an IOMMU."""
    return (
        f"{MARK}# The device can write to all of this machine's memory. The kernel is tainted.\n"
        "options vfio enable_unsafe_noiommu_mode=1\n"
    )


def sysusers(group: str, users: Sequence[str]) -> str:
    """For sysusers.d(5): the group, and who is in it."""
    return MARK + f"g {group} -\n" + "".join(f"m {user} {group}\n" for user in users)


def rules(access: Access, group: str, addresses: Sequence[str]) -> str:
    """For udev(7): the driver, and what the group may open.

    Args:
        addresses: of the devices that are meant; none: all, also those that are plugged in later.
    """
    lines = ['ACTION=="remove|unbind", GOTO="ivshmem_end"', ""]
    named = f', KERNEL=="{"|".join(addresses)}"' if addresses else ""
    device = f'ACTION=="add", SUBSYSTEM=="pci", {_MATCH}{named}'
    files = ["resource2", "resource2_wc"]
    if access == "uio":
        parent = f', KERNELS=="{"|".join(addresses)}"' if addresses else ""
        match = _MATCH.replace("ATTR{", "ATTRS{")
        lines += [
            "# What the UIO driver has.",
            f'SUBSYSTEM=="uio", {match}{parent}, GROUP="{group}", MODE="0660"',
        ]
    elif access == "sysfs":
        lines += [
            "# No driver. Only root may enable a device, and users may map what is enabled.",
            f'{device}, ATTR{{enable}}="1"',
        ]
        files.insert(0, "resource0")
    else:
        lines += [
            "# The driver, whether it is loaded already or not.",
            f'{device}, ATTR{{driver_override}}="{VFIO_PCI}",'
            f' ATTR{{[subsystem/pci]drivers_probe}}="$kernel",'
            f' RUN{{builtin}}+="kmod load {VFIO_PCI}"',
            "",
            "# Its IOMMU group, and no other one: that may be a disk's.",
            *_vfio_rules(access, group, addresses),
        ]
    lines += [
        "",
        "# Its memory as files, which `ivshmem guest serve` hands on, for instance.",
        *(
            f'{device}, TEST=="{file}", RUN+="/bin/chgrp {group} /sys%p/{file}",'
            f' RUN+="/bin/chmod g+rw /sys%p/{file}"'
            for file in files
        ),
        "",
        'LABEL="ivshmem_end"',
    ]
    return MARK + "\n".join(lines) + "\n"


def _vfio_rules(access: Access, group: str, addresses: Sequence[str]) -> list[str]:
    # A name that is nothing but a number has no %n.
    name, number = ("noiommu-[0-9]*", "%n") if access == "noiommu" else ("[0-9]*", "%k")
    match = f'SUBSYSTEM=="vfio", KERNEL=="{name}"'
    give = f'GROUP="{group}", MODE="0660"'
    folder = f"/sys/kernel/iommu_groups/{number}/devices"
    if addresses:
        return [f'{match}, TEST=="{folder}/{address}", {give}' for address in addresses]
    program = f"/bin/sh -c 'grep -qs ^{_MODALIAS} {folder}/*/modalias'"
    return [f'{match}, PROGRAM=="{program}", {give}']


def socket_unit(path: str, group: str) -> str:
    """For systemd.socket(5): where clients connect, who are in the group."""
    return f"""{MARK}
[Unit]
Description=Socket of the ivshmem device of this virtual machine
Documentation=man:ivshmem(1)

[Socket]
ListenStream={path}
SocketMode=0660
SocketGroup={group}
RemoveOnStop=yes
# A device that cannot be opened is not tried for ever.
TriggerLimitIntervalSec=10s
TriggerLimitBurst=5

[Install]
WantedBy=sockets.target
"""


def service_unit(
    program: Sequence[str],
    access: Access,
    group: str,
    *,
    socket: str,
    address: str = "",
    peers: str = "",
) -> str:
    """For systemd.service(5): `guest serve`, as a user of its own who is in the group.

    Args:
        program: what runs `ivshmem`, by absolute paths.
        socket: the name of its socket unit.
        address: of the device; "": the only one.
        peers: as --peers of `guest serve`.
    """
    words = [*program, "guest", "serve", *(("--address", address) if address else ())]
    rawio = "CAP_SYS_RAWIO" if access == "noiommu" else ""
    return f"""{MARK}# Options: systemctl edit, with a line Environment="OPTIONS=--peers 0,2"

[Unit]
Description=The ivshmem device of this virtual machine, for several processes
Documentation=man:ivshmem(1)
Requires={socket}
After={socket} systemd-modules-load.service systemd-udev-trigger.service
StartLimitIntervalSec=30s
StartLimitBurst=10

[Service]
Type=notify
# Until udev has bound the driver. The sign "+": as root.
ExecStartPre=+udevadm settle --timeout=60
Environment="OPTIONS={f"--peers {peers}" if peers else ""}"
ExecStart={unit_words(words)} --access {access} $OPTIONS
# 78: the device cannot be opened, and `systemctl status` says why; 2: wrong options. The others are
# systemd's: no command, group, user, or sandbox. None of these is tried again.
Restart=on-failure
RestartSec=1s
RestartPreventExitStatus=2 78 203 216 217 226
LimitNOFILE=12288

DynamicUser=yes
SupplementaryGroups={group}
AmbientCapabilities={rawio}
CapabilityBoundingSet={rawio}
DevicePolicy=closed
DeviceAllow=/dev/vfio/vfio rw
DeviceAllow=char-vfio rw
DeviceAllow=char-uio rw
LockPersonality=yes
MemoryDenyWriteExecute=yes
NoNewPrivileges=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHome=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
RestrictAddressFamilies=AF_UNIX
RestrictNamespaces=yes
RestrictRealtime=yes
SystemCallArchitectures=native
SystemCallErrorNumber=EPERM
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources
IPAddressDeny=any
UMask=0077

[Install]
WantedBy=multi-user.target
"""
