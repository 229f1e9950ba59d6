"""A region's bytes in a plain sparse file, and their checksums in a second one.

Knows: the form of the checksums. Does not know: the form with records, which image.py has.

FILE has the region's bytes, and holes where these are zero, so that dd, hexdump and QEMU's
memory-backend-file read it. FILE.ivshmem.json is a JSON object:

    format          "ivshmem raw image"
    version         1
    id, size, compressed, source, name, saved    as in ImageInfo
    block           1048576, the bytes of a block
    crc32           {number of a block: zlib's CRC-32 of it}; the blocks left out are zero

Invariants:
1. No byte of a region changes before the whole file was found to be good.
2. FILE never stands beside the checksums of another FILE: those are removed first, and written
   last. A process that is killed in between leaves a FILE without checksums, which can be loaded.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
import uuid
import zlib
from collections.abc import Iterator

from ..errors import ImageError, WrongKind
from ..system import json_shapes, safe_files
from ..system.uncopied import Uncopied
from ..text import plain
from .blocks import (
    BLOCK,
    ImageInfo,
    OnProgress,
    check_fits,
    check_whole,
    clear,
    nonzero_runs,
    read_into,
    replacing,
    write_to,
)
from .region import Region
from .sizes import format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..system.safe_files import Users

SUFFIX = ".ivshmem.json"
_FORMAT, _VERSION = "ivshmem raw image", 1
_MOST_REASON = 100  # characters of what is wrong in the checksums
_ENTRY_BYTES, _HEAD_BYTES = 40, 1 << 16  # of the JSON text, at most


def save(
    region: Region, path: str | os.PathLike[str], progress: OnProgress, accept: Users
) -> ImageInfo:
    """Write the file and its checksums; what it raises is what `image.save` documents."""
    target = os.fsdecode(path)
    written = target  # of the two files, for an error
    info = ImageInfo(uuid.uuid4().hex, region.size, False, region.source, region.name, time.time())
    status = os.fstat(region.fileno())
    sums: dict[int, int] = {}
    try:
        with replacing(target, status, accept) as file:
            for offset, block in _blocks_of(region, progress):
                sums[offset // BLOCK] = zlib.crc32(block)
                for first, last in nonzero_runs(block, _ZEROS):
                    file.seek(offset + first)
                    file.write(block[first:last])
            file.truncate(region.size)
            check_whole(region)
            written = target + SUFFIX
            _remove(written, accept)
            written = target
        written = target + SUFFIX
        with replacing(written, status, accept) as file:
            document = {
                "format": _FORMAT,
                "version": _VERSION,
                **info._asdict(),
                "block": BLOCK,
                "crc32": {str(number): crc for number, crc in sums.items()},
            }
            file.write(json.dumps(document, indent=1).encode() + b"\n")
    except OSError as error:
        raise OSError(error.errno, error.strerror, written) from error
    return info


_ZEROS = bytes(BLOCK)


def _blocks_of(region: Region, progress: OnProgress) -> Iterator[tuple[int, memoryview]]:
    """Yield copies of the blocks that are not zero, with their offsets, in ascending order."""
    buffer = bytearray(BLOCK)
    done = 0
    for start, end in region.extents():
        for offset in range(max(start - start % BLOCK, done), end, BLOCK):
            length = min(BLOCK, region.size - offset)
            block = memoryview(buffer)[:length]
            read_into(region, offset, block)
            if block != memoryview(_ZEROS)[:length]:
                yield offset, block
            done = offset + length
            progress(done, region.size)
    progress(region.size, region.size)


def _remove(path: str, accept: Users) -> None:
    with safe_files.find(path, accept=accept) as place, contextlib.suppress(FileNotFoundError):
        os.unlink(place.name, dir_fd=place.fd)


# -- loading --------------------------------------------------------------------------------------


def check(path: str | os.PathLike[str], progress: OnProgress, accept: Users) -> ImageInfo:
    """Read the whole file; what it raises is what `image.check_image` documents."""
    with _RawReader(os.fsdecode(path), accept) as reader:
        if reader.sums is None:
            raise ImageError(
                f"{reader.path} cannot be checked: its checksums, {reader.path}{SUFFIX}, are not"
                " there"
            )
        for _ in reader.blocks(progress):
            pass
        return reader.info


def load(
    region: Region, path: str | os.PathLike[str], progress: OnProgress, accept: Users
) -> ImageInfo:
    """Load the file; what it raises is what `image.load` documents."""
    with _RawReader(os.fsdecode(path), accept) as reader:
        info = reader.info
        check_fits(region, info, reader.path)
        for _ in reader.blocks(lambda done, total: progress(done, 2 * total)):
            pass
        reader.effect = "somebody changed it during the load; the region has a part of it"
        at = 0
        for offset, block in reader.blocks(lambda d, total: progress(total + d, 2 * total)):
            for first, last in nonzero_runs(block, _ZEROS):
                clear(region, at, offset + first)
                write_to(region, offset + first, block[first:last])
                at = offset + last
        clear(region, at, region.size)
    return info


class _RawReader(Uncopied):
    """An open raw image.

    Attributes:
        info: what it is; its `id` is "" if there are no checksums.
        sums: the checksums by block; None: there are none.
        effect: what a fault found from now on means for the region.
    """

    def __init__(self, path: str, accept: Users) -> None:
        self.path = path
        self.effect = "nothing was loaded"  # of what goes wrong from now on
        with contextlib.ExitStack() as undo:
            try:
                file = undo.enter_context(safe_files.reading(path, accept=accept))
            except WrongKind as error:
                raise ImageError(f"{path}: {error.strerror}") from None
            self._fd = file.fileno()
            status = os.fstat(self._fd)
            self.sums: dict[int, int] | None = None
            self.info = ImageInfo("", status.st_size, False, "file", path, status.st_mtime)
            if (data := _read(path + SUFFIX, status.st_size, accept)) is not None:
                self.info, self.sums = self._understood(data)
                if self.info.size != status.st_size:
                    raise self._damaged(status.st_size, f"it should have {self.info.size} bytes")
            self._undo = undo.pop_all()

    def _understood(self, data: bytes) -> tuple[ImageInfo, dict[int, int]]:
        try:
            found = json_shapes.loads(data)
            _DOCUMENT(found, "checksums")
            if found["format"] != _FORMAT or found["version"] != _VERSION:
                raise ValueError(f"format {found['format']!r}, version {found['version']}")
            if found["block"] != BLOCK:
                raise ValueError(f"blocks of {found['block']} bytes")
            sums = {int(number): crc for number, crc in found["crc32"].items()}
            if any(not 0 <= number * BLOCK < found["size"] for number in sums):
                raise ValueError("a block outside of the region")
            return ImageInfo(**{name: found[name] for name in ImageInfo._fields}), sums
        except (ValueError, TypeError) as error:
            reason = plain(str(error), most=_MOST_REASON)
            raise ImageError(
                f"{self.path}{SUFFIX} does not have the checksums of a raw image ({reason}):"
                f" remove it to load {self.path} unchecked; {self.effect}"
            ) from None

    def blocks(self, progress: OnProgress) -> Iterator[tuple[int, memoryview]]:
        """Yield the blocks that are not zero, in ascending order, checked one by one.

        Raises:
            ImageError: where the next is not as it was written.
        """
        size = self.info.size
        seen: set[int] = set()
        for offset in self._offsets(size):
            data = os.pread(self._fd, min(BLOCK, size - offset), offset)
            if len(data) < min(BLOCK, size - offset):
                raise self._damaged(offset + len(data), "it ends too early")
            number = offset // BLOCK
            zero = data == _ZEROS[: len(data)]
            if self.sums is not None:
                wanted = self.sums.get(number)
                if zero != (wanted is None) or (wanted not in (None, zlib.crc32(data))):
                    raise self._damaged(offset, "the block has another checksum")
            seen.add(number)
            if not zero:
                yield offset, memoryview(data)
            progress(min(offset + BLOCK, size), size)
        if self.sums is not None and (lost := self.sums.keys() - seen):
            raise self._damaged(min(lost) * BLOCK, "the block has another checksum")
        progress(size, size)

    def _offsets(self, size: int) -> Iterator[int]:
        """Yield where blocks begin that are not wholly in a hole of the file."""
        offset = 0
        while offset < size:
            try:
                data = os.lseek(self._fd, offset, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return
                data = offset  # this file system knows no holes
            offset = max(offset, data - data % BLOCK)
            if offset < size:
                yield offset
            offset += BLOCK

    def _damaged(self, where: int, what: str) -> ImageError:
        return ImageError(
            f"{self.path} is damaged at byte {where}: {what}; {self.effect} (if a program has"
            f" changed it on purpose, remove {self.path}{SUFFIX} to load it unchecked)"
        )

    def __enter__(self) -> _RawReader:
        return self

    def __exit__(self, *error: object) -> None:
        self._undo.close()


def _read(path: str, size: int, accept: Users) -> bytes | None:
    """The text of the checksums of a file of `size` bytes; None: there are none."""
    try:
        with safe_files.reading(path, accept=accept) as file:
            most = _HEAD_BYTES + _ENTRY_BYTES * (size // BLOCK + 1)
            data = file.read(most + 1)
    except FileNotFoundError:
        return None
    except WrongKind as error:
        raise ImageError(f"{path}: {error.strerror}") from None
    if len(data) > most:
        raise ImageError(f"{path} is larger than the checksums of {format_size(size)} can be")
    return data


_DOCUMENT = json_shapes.record(
    format=json_shapes.text(),
    version=json_shapes.integer(1),
    id=json_shapes.text(),
    size=json_shapes.integer(0, 1 << 62),
    compressed=json_shapes.flag(),
    source=json_shapes.text(),
    name=json_shapes.optional(json_shapes.text()),
    saved=json_shapes.moment(),
    block=json_shapes.integer(1),
    crc32=json_shapes.table(json_shapes.integer(0, (1 << 32) - 1)),
)
