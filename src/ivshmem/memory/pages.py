"""Pages and what there is of them: page sizes, huge pages, memory, space.

Knows: /proc, /sys and statvfs, and how to say in numbers what is short and what fixes it.
Does not know: regions.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import resource
from collections.abc import Iterator

from ..errors import RegionError
from .sizes import format_size, parse_size, roughly

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import SupportsIndex

PAGE = mmap.PAGESIZE

HUGE_PAGES = "/sys/kernel/mm/hugepages"


# -- page sizes -----------------------------------------------------------------------------------


def page_size_of(place: str | int) -> int:
    """The page size of a file, or of files in a directory: more than PAGE on hugetlbfs only."""
    return os.statvfs(place).f_bsize if file_system(place) == "hugetlbfs" else PAGE


def file_system(place: str | int) -> str:
    """The type of the file system that a file or directory is on: "tmpfs", "ext4".

    Python's statvfs lacks f_type, so the mount table is asked, by device number. A memfd is on one
    that is mounted nowhere: a tmpfs, or, if its blocks are larger than a page, a hugetlbfs.
    """
    status = os.fstat(place) if isinstance(place, int) else os.stat(place)
    device = f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"
    for line in _lines_of("/proc/self/mountinfo"):
        fields = line.split()
        if fields[2] == device:
            return fields[fields.index("-") + 1]
    huge = isinstance(place, int) and status.st_blksize in huge_page_sizes()
    return "hugetlbfs" if huge else "tmpfs" if isinstance(place, int) else ""


def huge_page_sizes() -> list[int]:
    """The sizes of huge pages, in bytes, that this kernel offers."""
    try:
        names = os.listdir(HUGE_PAGES)
    except OSError:  # this kernel has none
        return []
    sizes = (name.removeprefix("hugepages-").removesuffix("kB") for name in names)
    return sorted(int(size) * 1024 for size in sizes if size.isdecimal())


def huge_page_size(wanted: bool | SupportsIndex | str | None) -> int:
    """Return the bytes of a huge page: False: none (0); True: the default size; else that size.

    Raises:
        RegionError: this machine has no huge pages of that size.
    """
    if wanted is not True and not wanted:
        return 0
    offered = huge_page_sizes()
    # A kernel without hugetlbfs does not name a default size.
    size = _meminfo().get("Hugepagesize", 0) if wanted is True else parse_size(wanted)
    if not size:
        raise RegionError(
            "this kernel has no huge pages (it was built without CONFIG_HUGETLBFS): omit"
            " hugepages=True, or --hugepages"
        )
    if size not in offered:
        raise RegionError(
            f"this machine has no huge pages of {format_size(size)}; it offers "
            + (", ".join(map(format_size, offered)) or "none")
        )
    return size


# -- what is in memory ----------------------------------------------------------------------------


def transparent_huge_bytes(start: int, size: int) -> int:
    """Return how many bytes of a mapping are in transparent huge pages (proc(5), smaps)."""
    inside = False
    total = 0
    for line in _lines_of("/proc/self/smaps"):
        field, _, rest = line.partition(" ")
        if not field.endswith(":"):
            inside = start <= int(field.partition("-")[0], 16) < start + size
        elif inside and field in ("ShmemPmdMapped:", "FilePmdMapped:"):
            total += int(rest.split()[0]) * 1024
    return total


# -- what is missing ------------------------------------------------------------------------------


def check_memory(size: int, *, now: bool) -> None:
    """Refuse anonymous memory that this machine can never hold, or, with `now`, cannot hold now.

    Raises:
        OSError: ENOMEM.
    """
    fields = _meminfo()
    total = fields["MemTotal"] + fields.get("SwapTotal", 0)  # a kernel without swap has none
    free = fields["MemAvailable"] + fields.get("SwapFree", 0)
    if size > total or (now and size > free):
        raise OSError(
            errno.ENOMEM,
            f"{format_size(size)} of memory do not fit: this machine has {roughly(total)} with"
            f" swap, {roughly(free)} of it available; choose a smaller size",
        )


@contextlib.contextmanager
def explained(size: int, page: int, place: str | None) -> Iterator[None]:
    """Turn the kernel's bare ENOSPC or ENOMEM into numbers and the command that fixes it."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOMEM and (limit := _address_space_short(size)):
            raise OSError(errno.ENOMEM, limit, place) from error
        if page > PAGE and error.errno in (errno.ENOMEM, errno.ENOSPC, errno.EFAULT):
            raise _huge_pages_short(size, page) from error
        if error.errno == errno.ENOSPC and place is not None:
            raise _space_short(size, place) from error
        if error.errno in (errno.ENOMEM, errno.EFBIG, errno.EFAULT):
            raise OSError(
                errno.ENOMEM,
                f"{format_size(size)} do not fit ({error.strerror}): choose a smaller size",
                place,
            ) from error
        if error.filename is None and place is not None:
            raise OSError(
                error.errno,
                f"no {format_size(size)} of shared memory can be made here ({error.strerror}):"
                " choose a path on another file system",
                place,
            ) from error
        raise


def huge_pages_for(size: int, page: int) -> tuple[str, str]:
    """Return how many huge pages a region needs and finds, and root's command for the missing."""
    knobs = f"{HUGE_PAGES}/hugepages-{page // 1024}kB"
    total, free, reserved = (
        int(_lines_of(f"{knobs}/{name}")[0])
        for name in ("nr_hugepages", "free_hugepages", "resv_hugepages")
    )
    needed = size // page
    available = max(free - reserved, 0)
    fix = f"echo {total + needed - available} > {knobs}/nr_hugepages" if needed > available else ""
    return (
        f"{needed} huge pages of {format_size(page)} are needed, {available} of {total} are free",
        fix,
    )


def _address_space_short(size: int) -> str:
    """Return what to do if a limit forbids this process to map `size` bytes more; "": none does."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    mapped = int(_lines_of("/proc/self/statm")[0].split()[0]) * PAGE
    if limit == resource.RLIM_INFINITY or mapped + size <= limit:
        return ""
    return (
        f"{format_size(size)} cannot be mapped: this process may map {roughly(limit)} in all"
        f" (RLIMIT_AS), and has mapped {roughly(mapped)}: raise that with ulimit -v unlimited, or"
        " for a service LimitAS=infinity"
    )


def _huge_pages_short(size: int, page: int) -> OSError:
    numbers, fix = huge_pages_for(size, page)
    return OSError(errno.ENOMEM, f"{numbers}; as root: {fix}" if fix else numbers)


def _space_short(size: int, place: str) -> OSError:
    directory = place if os.path.isdir(place) else os.path.dirname(place)
    status = os.statvfs(directory)
    free, total = (blocks * status.f_frsize for blocks in (status.f_bavail, status.f_blocks))
    room = format_size(_room(size, total, free))
    return OSError(
        errno.ENOSPC,
        f"{format_size(size)} are needed, {roughly(free)} of {roughly(total)} are free: make room,"
        f" or if it is a tmpfs, as root: mount -o remount,size={room} {directory}",
        place,
    )


def _room(size: int, total: int, free: int) -> int:
    """Return the size, in whole MiB, that a file system needs so that `size` more bytes fit."""
    mebibyte = 1 << 20
    return -(-(total - free + size) // mebibyte) * mebibyte


def _meminfo() -> dict[str, int]:
    """Read /proc/meminfo; return bytes."""
    lines = (line.partition(":") for line in _lines_of("/proc/meminfo"))
    return {
        key: int(rest.split()[0]) * (1024 if rest.endswith("kB") else 1) for key, _, rest in lines
    }


def _lines_of(path: str) -> list[str]:
    with open(path, errors="surrogateescape") as file:
        return file.read().splitlines()
