"""A region's bytes in a file: saved whole or not at all, checked before they are loaded.

Knows: the form with records, checksums. Does not know: which peers share a region, or how to stop
them. What a peer writes during a save is saved or not; during a load, peers read a mixture.

The form, numbers little-endian:

    8 bytes     "IVSHSAVE"
    4           length of the header
    n           the header, JSON: version, id, size, compressed, source, name, saved
    4           CRC-32 of all that, zlib's
    records, in ascending order; bytes in none of them are zero
        8       offset in the region
        4, 4    length in the region, and here: less only if the data is compressed (zlib)
        4       CRC-32 of these 16 bytes and the data, continued from the record (header) before
        n       the data
    a last record, whose offset is the region's size, without data

Invariants:
1. A file that exists stays until the new one is complete and on the disk.
2. No byte of a region changes before the whole file was found to be good.
3. Data of a file is used only after its checksum was compared; no length in a file makes this take
   more memory than a block.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO

from ..errors import ImageError, WrongKind
from ..system import safe_files
from ..system.uncopied import Uncopied
from ..text import counted, plain
from . import left_places, raw_image
from .blocks import (
    BLOCK,
    ImageInfo,
    OnProgress,
    check_fits,
    check_whole,
    clear,
    no_progress,
    nonzero_runs,
    read_into,
    replacing,
    write_to,
)
from .region import Region

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import SupportsIndex

    from ..system.safe_files import Users

_MAGIC = b"IVSHSAVE"
_VERSION = 1
_LENGTH = struct.Struct("<I")
_RECORD = struct.Struct("<QII")
_MOST_HEADER = 1 << 16
_YEAR_9999 = 253370764800  # its beginning, in seconds since the epoch: later has no date
_MOST_REASON = 100  # characters of what is wrong in a header
_LEVEL = 1  # of zlib: higher ones gain little and take long

# -- saving ---------------------------------------------------------------------------------------


def save(
    region: Region,
    path: str | os.PathLike[str],
    *,
    compress: bool = False,
    raw: bool = False,
    progress: Callable[[int, int], object] | None = None,
    accept_owner: Iterable[SupportsIndex | str] = (),
) -> ImageInfo:
    """Write a region's bytes to a file, which only its owner can read.

    Pages of zeros take no space. A file that exists is replaced only when the new one is complete
    and on the disk. The call does not pause writers: what they write during the call may or may not
    be saved.

    Args:
        compress: by zlib; not with `raw`.
        raw: write the bytes as they are, into a sparse file as large as the region, which dd,
            hexdump and QEMU's memory-backend-file read. Checksums go to `path` + ".ivshmem.json".
        progress: called with the bytes of the region that are done, and their number.
        accept_owner: other users, by name or uid, whose symbolic links are followed to the file.

    Raises:
        PermissionError: a symbolic link in the path belongs to a user who is not accepted.
        OSError: as of open(2), write(2), fsync(2) or rename(2), with the path; or a process has
            truncated the region's memory (ENODATA).
        ClosedError: the region is closed.
    """
    if raw and compress:
        raise ValueError("a raw image is not compressed: omit raw=True or compress=True")
    if raw:
        return raw_image.save(region, path, progress or no_progress, accept_owner)
    target = os.fspath(path)
    info = ImageInfo(
        uuid.uuid4().hex, region.size, compress, region.source, region.name, time.time()
    )
    try:
        with replacing(target, os.fstat(region.fileno()), accept_owner) as file:
            _write(file, region, info, progress or no_progress)
    except OSError as error:
        raise OSError(error.errno, error.strerror, target) from error
    return info


def _write(file: BinaryIO, region: Region, info: ImageInfo, progress: OnProgress) -> None:
    header = json.dumps({"version": _VERSION, **info._asdict()}).encode()
    head = _MAGIC + _LENGTH.pack(len(header)) + header
    crc = zlib.crc32(head)
    file.write(head + _LENGTH.pack(crc))
    for offset, data in _pieces(region, progress):
        stored: bytes | memoryview = zlib.compress(data, _LEVEL) if info.compressed else data
        if len(stored) >= len(data):
            stored = data
        crc = _put(file, crc, offset, len(data), stored)
    check_whole(region)
    _put(file, crc, info.size, 0, b"")


def _put(file: BinaryIO, crc: int, offset: int, length: int, stored: bytes | memoryview) -> int:
    record = _RECORD.pack(offset, length, len(stored))
    crc = zlib.crc32(stored, zlib.crc32(record, crc))
    file.write(record + _LENGTH.pack(crc))
    file.write(stored)
    return crc


def _pieces(region: Region, progress: OnProgress) -> Iterator[tuple[int, memoryview]]:
    """Yield copies of the parts that are not zero, with their offsets."""
    buffer = bytearray(BLOCK)
    zeros = bytes(BLOCK)
    for start, end in region.extents():
        for offset in range(start, end, BLOCK):
            length = min(BLOCK, end - offset)
            block = memoryview(buffer)[:length]
            read_into(region, offset, block)
            if block != memoryview(zeros)[:length]:
                for first, last in nonzero_runs(block, zeros):
                    yield offset + first, block[first:last]
            progress(offset + length, region.size)
    progress(region.size, region.size)


# -- loading --------------------------------------------------------------------------------------


def read_info(
    path: str | os.PathLike[str], *, accept_owner: Iterable[SupportsIndex | str] = ()
) -> ImageInfo:
    """Read the header of a saved file.

    Args:
        accept_owner: as of `load`.

    Raises:
        ImageError: it is not a saved region, or of a version that is not known here.
        OSError: as of open(2) and read(2).
    """
    with _ImageReader(os.fspath(path), accept_owner) as reader:
        return reader.info


def check_image(
    path: str | os.PathLike[str],
    *,
    raw: bool = False,
    progress: Callable[[int, int], object] | None = None,
    accept_owner: Iterable[SupportsIndex | str] = (),
) -> ImageInfo:
    """Read a whole file that `save` wrote, and check that it is as it was written.

    Args:
        raw: it was saved with `raw`.
        progress: called with the bytes of the file that are done, and their number.
        accept_owner: as of `load`.

    Raises:
        ImageError: it is damaged, with the offset; or it is not an image of that form.
        OSError: as of open(2) and read(2).
    """
    if raw:
        return raw_image.check(path, progress or no_progress, accept_owner)
    with _ImageReader(os.fspath(path), accept_owner) as reader:
        for _ in reader.pieces(progress or no_progress):
            pass
        return reader.info


def load(
    region: Region,
    path: str | os.PathLike[str],
    *,
    raw: bool = False,
    progress: Callable[[int, int], object] | None = None,
    accept_owner: Iterable[SupportsIndex | str] = (),
) -> ImageInfo:
    """Set a region's bytes to what `save` wrote to a file.

    The file is read twice: it is checked to its end before the region changes. If the region then
    has an area for channels, all places in it are freed: messages that were saved can be read, and
    processes that take part join again.

    Args:
        raw: the file was saved with `raw`, or is any file of the region's size. It is checked if
            its checksums are there: `path` + ".ivshmem.json". Without them nothing can be checked
            except the size, and the `id` that is returned is "".
        progress: called with the bytes that are done, and their number.
        accept_owner: other users, by name or uid, whose symbolic links are followed, and whose
            files are read in directories that they can write.

    Raises:
        ImageError: it is damaged (with the offset), or of another size than the region. The region
            has not changed, unless a process changed the file after it was found good.
        OSError: as of open(2) and read(2); or there is no room for what is loaded (ENOSPC), or a
            process truncated the region's memory during the load. The region then has a part.
        ClosedError: the region is closed.
    """
    note = progress or no_progress
    if raw:
        info = raw_image.load(region, path, note, accept_owner)
    else:
        info = _load(region, os.fspath(path), note, accept_owner)
    left_places.free_places(region)
    return info


def _load(region: Region, path: str, note: OnProgress, accept: Users) -> ImageInfo:
    with _ImageReader(path, accept) as reader:
        info = reader.info
        check_fits(region, info, reader.path)
        for _ in reader.pieces(lambda done, total: note(done, 2 * total)):
            pass
        reader.rewind()
        reader.effect = "somebody changed it during the load; the region has a part of it"
        at = 0
        for offset, data in reader.pieces(lambda done, total: note(total + done, 2 * total)):
            clear(region, at, offset)
            write_to(region, offset, data)
            at = offset + len(data)
        clear(region, at, region.size)
    return info


def _check_values(info: ImageInfo) -> None:
    """Refuse values that `save` never writes; a checksum proves nothing against an attacker.

    Raises:
        ValueError: which it is.
    """
    if type(info.size) is not int or not 0 <= info.size < 1 << 63:
        raise ValueError(f"a size of {info.size!r}")
    if not isinstance(info.saved, int | float) or not 0 <= info.saved < _YEAR_9999:
        raise ValueError(f"saved at {info.saved!r}")
    texts = (info.id, info.source, "" if info.name is None else info.name)
    if not all(isinstance(text, str) for text in texts) or type(info.compressed) is not bool:
        raise ValueError("values of other types")


class _ImageReader(Uncopied):
    """A file with a saved region; a context manager."""

    def __init__(self, path: str, accept: Users) -> None:
        self.path = path
        self.effect = "nothing was loaded"  # what a fault found from now on means
        with contextlib.ExitStack() as undo:
            try:
                self._file = undo.enter_context(safe_files.reading(path, accept=accept))
            except WrongKind as error:
                raise ImageError(f"{path}: {error.strerror}") from None
            self._size = os.fstat(self._file.fileno()).st_size
            self.info, self._crc = self._read_header()
            self._start = self._file.tell()
            self._seed = self._crc
            self._undo = undo.pop_all()

    def _read_header(self) -> tuple[ImageInfo, int]:
        head = self._file.read(len(_MAGIC) + _LENGTH.size)
        if not head.startswith(_MAGIC):
            raise ImageError(
                f"{self.path} is not a saved region: give a file that `ivshmem save FILE` wrote"
                " (--raw, raw=True: one that was saved raw)"
            )
        if len(head) < len(_MAGIC) + _LENGTH.size:
            raise self._damaged(0, "it ends in the header")
        (length,) = _LENGTH.unpack_from(head, len(_MAGIC))
        if length > _MOST_HEADER:
            raise self._damaged(len(_MAGIC), f"a header of {counted(length, 'byte')}")
        header = self._file.read(length)
        end = self._file.read(_LENGTH.size)
        if len(end) < _LENGTH.size:
            raise self._damaged(0, "it ends in the header")
        crc = zlib.crc32(head + header)
        if end != _LENGTH.pack(crc):
            raise self._damaged(0, "the header has another checksum")
        return self._understood(header), crc

    def _understood(self, header: bytes) -> ImageInfo:
        try:
            values = json.loads(header)
            version = values.pop("version")
            if type(version) is not int or version < 1:
                raise ValueError("it has no version")
            # This version cannot judge the other values of a newer one.
            if version == _VERSION:
                info = ImageInfo(**values)
                _check_values(info)
                return info
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            reason = plain(str(error), most=_MOST_REASON)
            raise self._damaged(0, f"no header: {reason}") from None
        raise ImageError(
            f"{self.path} was saved in version {version} of the format, which is newer than this"
            f" ivshmem knows ({_VERSION}): load it with a newer one; {self.effect}"
        )

    def rewind(self) -> None:
        """Go back to the first record."""
        self._file.seek(self._start)
        self._crc = self._seed

    def pieces(self, progress: OnProgress) -> Iterator[tuple[int, bytes]]:
        """Yield the parts that are not zero, in ascending order, checked one by one.

        Raises:
            ImageError: the next part is not as it was written.
        """
        at = 0
        while True:
            where = self._file.tell()
            record = self._file.read(_RECORD.size + _LENGTH.size)
            if len(record) < _RECORD.size + _LENGTH.size:
                raise self._damaged(where, "it ends too early")
            offset, length, stored = _RECORD.unpack_from(record)
            if stored > BLOCK:
                raise self._damaged(where, f"a record of {counted(stored, 'byte')}")
            data = self._file.read(stored)
            if len(data) < stored:
                raise self._damaged(where, "it ends too early")
            self._crc = zlib.crc32(data, zlib.crc32(record[: _RECORD.size], self._crc))
            if record[_RECORD.size :] != _LENGTH.pack(self._crc):
                raise self._damaged(where, "the record has another checksum")
            # `save` never writes such a record, but an attacker can make its checksum.
            room = self.info.size - offset
            if not stored <= length <= BLOCK or offset < at or length > room:
                raise self._damaged(where, "a record that cannot be")
            if not length:
                break
            yield offset, self._whole(where, data, length)
            at = offset + length
            progress(self._file.tell(), self._size)
        end = self._file.tell()
        if offset != self.info.size or self._file.read(1):
            raise self._damaged(end, "more bytes follow its end")
        progress(self._size, self._size)

    def _whole(self, where: int, data: bytes, length: int) -> bytes:
        if len(data) == length:
            return data
        try:
            stream = zlib.decompressobj()
            whole = stream.decompress(data, length + 1)
        except zlib.error as error:
            raise self._damaged(where, str(error)) from None
        if len(whole) != length or not stream.eof or stream.unused_data:
            raise self._damaged(where, "data of another length")
        return whole

    def _damaged(self, where: int, what: str) -> ImageError:
        return ImageError(f"{self.path} is damaged at byte {where}: {what}; {self.effect}")

    def __enter__(self) -> _ImageReader:
        return self

    def __exit__(self, *error: object) -> None:
        self._undo.close()
