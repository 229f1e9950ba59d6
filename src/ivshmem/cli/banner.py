"""Regions as text: the arguments for QEMU, the XML for libvirt, and a table of several regions.

Knows: words and columns. Does not know: how anything is served.
"""

from __future__ import annotations

import os
import pwd
import sys
from collections.abc import Iterable, Mapping

from ..memory.sizes import format_size, parse_size
from ..peer.limits import SLOT_BYTES
from ..qemu import cmdline
from ..qemu.accounts import LIBVIRT_GROUP, LIBVIRT_USERS
from ..service.config import RegionConfig, ServiceConfig
from ..service.limits import DEFAULT_SIZE
from ..service.service import Served, Service
from ..text import command, counted, plain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..peer.directory import Directory

_INDENT = " " * len("  libvirt: ")
_BUNDLE = getattr(getattr(__spec__, "loader", None), "archive", None)  # a .pyz
_IVSHMEM = [sys.executable, *([_BUNDLE] if _BUNDLE else ["-m", "ivshmem"])]


def banner(service: Service, pid: int) -> str:
    """What a person needs next of what is being served by process `pid`."""
    regions = service.regions
    if len(regions) == 1 or service.config.source is None:
        return "\n".join(_whole(served, len(regions) > 1, pid) for served in regions.values())
    rows = {
        name: [
            format_size(served.region.size),
            served.region.source + (f" {served.region.name}" if served.region.name else ""),
            counted(served.server.vectors, "vector"),
            served.listener.path,
        ]
        for name, served in regions.items()
    }
    arguments = command([*_IVSHMEM, "qemu", "--config", service.config.source])
    return (
        f"serving {counted(len(regions), 'region')}, pid {pid}\n{_table(rows)}\n"
        f"  QEMU:    {arguments} --region NAME\n"
        f"  libvirt: {arguments} --region NAME --libvirt"
    )


def _whole(served: Served, several: bool, pid: int) -> str:
    region, server = served.region, served.server
    where = plain(region.source + (f" {region.name}" if region.name else ""))
    connect = [*_IVSHMEM, "connect", "-S", server.path]
    qemu = cmdline.doorbell(server.path, server.vectors)
    xml = cmdline.libvirt_doorbell(server.path, server.vectors)
    return (
        f"{f'{served.name}: ' if several else ''}serving {format_size(region.size)}"
        f" ({where}, in pages of {format_size(region.page_size)})"
        f" with {counted(server.vectors, 'vector')} on {plain(server.path)}, pid {pid}\n"
        f"  QEMU:    {cmdline.shell_lines(qemu, _INDENT)}\n"
        f"  libvirt: {xml.replace('><', f'>{chr(10)}{_INDENT}<')}\n"
        f"{_for_libvirt(served)}"
        f"  host:    {cmdline.shell(connect)}"
        + ("" if served.directory is None else f"\n  names:   {room(served.directory)}")
        + _channels(served.directory)
    )


def _for_libvirt(served: Served) -> str:
    """How libvirt's QEMU gets in, which is not our user's, as long as it cannot."""
    try:
        status = os.stat(served.server.path)
    except OSError:
        return ""
    for user in LIBVIRT_USERS:
        try:
            entry = pwd.getpwnam(user)
        except KeyError:
            continue
        groups = os.getgrouplist(user, entry.pw_gid)
        who = (
            0o200 if status.st_uid == entry.pw_uid else 0o020 if status.st_gid in groups else 0o002
        )
        if not status.st_mode & who:
            return (
                f"{_INDENT}(libvirt runs QEMU as {user}, who may not connect: serve with --group"
                f" {LIBVIRT_GROUP} --mode 0660)\n"
            )
    return ""


def planned(config: ServiceConfig) -> str:
    """What would be served."""
    rows = {
        name: [
            _size(region),
            _memory(region),
            counted(region.vectors, "vector"),
            region.socket,
            ", ".join(_access(region)) or "every user who may open the socket",
        ]
        for name, region in config.regions.items()
    }
    about = {"control socket": config.control, "metrics": config.metrics}
    return "\n".join(
        [
            f"{plain(config.source or '')}: {counted(len(rows), 'region')}",
            _table(rows),
            *(f"  {what}: {plain(where)}" for what, where in about.items() if where is not None),
        ]
    )


def _table(rows: Mapping[str, Iterable[str]]) -> str:
    from .tables import table  # here: most servers have one region

    lines = [[plain(cell) for cell in (name, *cells)] for name, cells in rows.items()]
    return "\n".join(f"  {line}" for line in table(lines))


def _size(region: RegionConfig) -> str:
    if region.size is not None:
        return format_size(parse_size(region.size))
    lasting = region.name is not None or region.file is not None
    return f"existing size, or {DEFAULT_SIZE}" if lasting else DEFAULT_SIZE


def _memory(region: RegionConfig) -> str:
    place = "anonymous"
    if region.name is not None:
        place = f"posix {region.name}"
    elif region.file is not None:
        place = f"file {region.file}"
    elif region.directory is not None:
        place = f"directory {region.directory}"
    if region.hugepages is True:
        return f"{place} in huge pages"
    return f"{place} in pages of {region.hugepages}" if region.hugepages else place


def _access(region: RegionConfig) -> list[str]:
    """The access settings of a region that are given."""
    said = {
        "mode": None if region.mode is None else f"{region.mode:04o}",
        "owner": region.owner,
        "group": region.group,
        "allow": " ".join(region.allow) or None,
        "deny": " ".join(region.deny) or None,
        "readonly for": " ".join(region.readonly_for) or None,
        "peers per uid": region.peers_per_uid,
        "joins per minute": region.joins_per_minute,
    }
    return [f"{what} {value}" for what, value in said.items() if value is not None]


def _channels(directory: Directory | None) -> str:
    area = None if directory is None else directory.channels
    return "" if area is None else f"\n  channels: {format_size(len(area))} from {area.start:#x} on"


def room(directory: Directory) -> str:
    """What a directory of names takes, and has to offer."""
    taken = format_size(directory.slots * SLOT_BYTES + SLOT_BYTES)
    return f"{counted(directory.slots, 'slot')} in the last {taken}, from {directory.start:#x} on"
