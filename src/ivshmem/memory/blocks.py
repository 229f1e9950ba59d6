"""A region's bytes, copied in blocks to files and back: what both forms of an image share.

Knows: sparse memory, files that are replaced whole. Does not know: either form.

Invariants:
1. Each block is copied once, and only the copy is looked at: other peers may write to the region.
2. What is a hole stays one: neither reading nor clearing takes memory for it.
3. A file that was there stays until another one is whole and on the disk.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from typing import BinaryIO

from ..errors import ImageError
from ..system import new_files, safe_files
from ..system.named_tuple import NamedTuple
from .pages import PAGE
from .region import Region
from .sizes import format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..system.safe_files import Users

BLOCK = 1 << 20  # bytes that are copied at once

# Called with how many bytes of the region, or of the file, are done, and of how many.
OnProgress = Callable[[int, int], object]


class ImageInfo(NamedTuple):
    """Facts about a saved region.

    Attributes:
        id: 32 hexadecimal digits, another for each save; "" of a raw image without checksums.
        size: of the region, bytes.
        compressed: whether zlib compressed it.
        source, name: where the memory came from, as in RegionInfo.
        saved: when, in seconds since the epoch.
    """

    id: str
    size: int
    compressed: bool
    source: str
    name: str | None
    saved: float


def no_progress(_done: int, _total: int) -> None:
    pass


# -- the region -----------------------------------------------------------------------------------


def check_fits(region: Region, info: ImageInfo, path: str) -> None:
    """Refuse to load an image into a region that it does not fit, or that may only be read.

    Raises:
        ImageError: why.
    """
    if info.size != region.size:
        raise ImageError(
            f"{path} holds {format_size(info.size)}, and the region has"
            f" {format_size(region.size)}: they must be the same"
        )
    if region.readonly:
        raise ImageError(f"{path}: the region may only be read here")


def check_whole(region: Region) -> None:
    """Refuse a region whose file was truncated: what is beyond its end looks like a hole.

    Raises:
        OSError: ENODATA.
    """
    end = region.offset + region.size
    if is_file(region) and os.fstat(region.fileno()).st_size < end:
        raise truncated()


def truncated() -> OSError:
    return OSError(errno.ENODATA, "somebody has truncated the region's memory")


# Both use the descriptor if it is a file's. Through the mapping, reading a hole would take a page,
# and if somebody has truncated the file, or its file system is full, this process would die of
# SIGBUS. A device's descriptor is never read or written: 4 bytes written to UIO's switch its
# interrupt.


def read_into(region: Region, offset: int, block: memoryview) -> None:
    """Fill `block` with the region's bytes from `offset` on."""
    done, more = 0, 1
    try:
        while is_file(region) and more and done < len(block):
            more = os.preadv(region.fileno(), [block[done:]], region.offset + offset + done)
            done += more
    except OSError:
        pass  # a file of sysfs can only be mapped
    if not more:
        raise truncated()
    if done < len(block):
        region.read_into(offset + done, block[done:])


def write_to(region: Region, offset: int, data: bytes | memoryview) -> None:
    """Write `data` to the region at `offset`."""
    done = 0
    try:
        while is_file(region) and done < len(data):
            done += os.pwrite(region.fileno(), data[done:], region.offset + offset + done)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(error.errno, error.strerror, region.name) from None
    if done < len(data):  # hugetlbfs has no write(2)
        region.write(offset + done, data[done:])


def is_file(region: Region) -> bool:
    return stat.S_ISREG(os.fstat(region.fileno()).st_mode)


def nonzero_runs(block: memoryview, zeros: bytes) -> Iterator[tuple[int, int]]:
    """Yield the runs of pages that are not all zeros, as (first, last) in bytes of the block."""
    first = -1
    for at in range(0, len(block), PAGE):
        page = block[at : at + PAGE]
        if page == memoryview(zeros)[: len(page)]:
            if first >= 0:
                yield first, at
            first = -1
        elif first < 0:
            first = at
    if first >= 0:
        yield first, len(block)


@contextlib.contextmanager
def replacing(target: str, region: os.stat_result, accept: Users) -> Iterator[BinaryIO]:
    """A file that takes the place of `target`, not of `region`, when the block has succeeded."""
    with (
        safe_files.find(target, accept=accept) as place,
        new_files.NewFile(place, os.O_WRONLY) as draft,
    ):
        if (there := place.status()) is not None:
            if not stat.S_ISREG(there.st_mode):
                what = place.wrong_kind(there.st_mode).strerror
                raise FileExistsError(errno.EEXIST, what)
            if safe_files.same_file(there, region):
                raise FileExistsError(errno.EEXIST, "it is the region itself: choose another path")
        with open(draft.file[0], "wb", closefd=False) as file:
            yield file
            file.flush()
            os.fsync(draft.file[0])
        draft.publish(replace=True)
        place.sync()
        draft.file.close()


def clear(region: Region, start: int, end: int) -> None:
    """Set the region's bytes from `start` to `end` to zero; holes stay holes."""
    buffer = bytearray(BLOCK)
    zeros = memoryview(bytes(BLOCK))
    for first, last in region.extents(start, end):
        for offset in range(first, last, BLOCK):
            length = min(BLOCK, last - offset)
            block = memoryview(buffer)[:length]
            read_into(region, offset, block)
            if block != zeros[:length]:
                write_to(region, offset, zeros[:length])
