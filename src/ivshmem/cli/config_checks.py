"""Checks of a valid configuration that depend on this machine: groups and huge pages.

Knows: what the process may give to whom, what the machine has. Does not know: how a configuration
is read, whether something is served already.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from ..errors import RegionError
from ..memory import pages
from ..memory.sizes import format_size, parse_size
from ..qemu.accounts import LIBVIRT_GROUP
from ..service.config import RegionConfig, ServiceConfig
from ..service.limits import DEFAULT_SIZE
from ..system.accounts import group_id, user_id

# The unit ivshmem.service reads this file, as a user who is in one group besides its own.
_OF_THE_UNIT = "/etc/ivshmem.toml"


def obstacles(config: ServiceConfig) -> Iterator[str]:
    """Yield for each setting that does not work here why, and what changes that."""
    for name, region in config.regions.items():
        for problem in (*_of_owners(region), *_of_the_unit(region, config.source)):
            yield f"region.{name}.{problem}"
    yield from _of_huge_pages(config)


def _of_owners(region: RegionConfig) -> Iterator[str]:
    if os.geteuid() == 0:
        return
    mine = {os.getegid(), *os.getgroups()}
    if region.group is not None and group_id(region.group) not in mine:
        yield (
            f'group = "{region.group}": only a member of the group can give the socket to it:'
            f" `usermod -aG {region.group} {os.geteuid()}` as root and log in again, or in a unit"
            f" SupplementaryGroups={region.group}"
        )
    if region.owner is not None and user_id(region.owner) != os.geteuid():
        yield f'owner = "{region.owner}": only root can give the socket to another user'


def _of_the_unit(region: RegionConfig, source: str | None) -> Iterator[str]:
    if os.geteuid() or source != _OF_THE_UNIT or region.group in (None, LIBVIRT_GROUP):
        return
    yield (
        f'group = "{region.group}": ivshmem.service is in the group {LIBVIRT_GROUP} only:'
        f" `systemctl edit ivshmem`, [Service], SupplementaryGroups={region.group}"
    )


def _of_huge_pages(config: ServiceConfig) -> Iterator[str]:
    """Of all regions together, since each one's pages are taken from the same pool."""
    wanted: dict[int, int] = {}
    for name, region in config.regions.items():
        if not region.hugepages:
            continue
        try:
            page = pages.huge_page_size(region.hugepages)
        except RegionError as error:
            yield f"region.{name}.hugepages: {error}"
            continue
        size = parse_size(region.size if region.size is not None else DEFAULT_SIZE)
        wanted[page] = wanted.get(page, 0) + max(size, page)
    for page, size in wanted.items():
        numbers, fix = pages.huge_pages_for(size, page)
        if fix:
            yield f"hugepages, {format_size(size)} in all: {numbers}; run as root: {fix}"
