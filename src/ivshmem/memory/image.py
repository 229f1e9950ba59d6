"""A region's bytes in a file: saved whole or not at all, checked before they are loaded.

Knows: the file's form, sparse memory, checksums. Does not know: who shares a region, or how to stop
them: what somebody writes during that is saved or not, and read by others while it is loaded.

The form, numbers little-endian:

    8 bytes     "IVSHSAVE"
    4           length of the header
    n           the header, JSON: version, id, size, compressed, source, name, saved
    4           CRC-32 of all that, zlib's
    records, in ascending order: what is in none of them is zero
        8       offset in the region
        4, 4    length in the region, and here: less only if the data is compressed (zlib)
        4       CRC-32 of these 16 bytes and the data, begun with that of the record (header) before
        n       the data
    a last record, whose offset is the region's size, without data

Invariants:
1. A file that was there stays until another one is whole and on the disk.
2. No byte of a region changes before the whole file was found to be good.
3. What stands in a file is believed only after its checksum; no length in it takes more memory than
   a block.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import stat
import struct
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from ..errors import ImageError, WrongKind
from ..system import new_files, safe_files
from ..system.uncopied import Uncopied
from ..text import counted, plain
from .pages import PAGE
from .region import Region
from .sizes import format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import SupportsIndex

    from ..system.safe_files import Users

_MAGIC = b"IVSHSAVE"
_VERSION = 1
_LENGTH = struct.Struct("<I")
_RECORD = struct.Struct("<QII")
_BLOCK = 1 << 20  # bytes of a region in a record, at most
_MOST_HEADER = 1 << 16
_YEAR_9999 = 253370764800  # its beginning, in seconds since the epoch: later has no date
_MOST_REASON = 100  # characters of what is wrong in a header
_LEVEL = 1  # of zlib: higher ones gain little and take long

# Called with how many bytes of the region, or of the file, are done, and of how many.
OnProgress = Callable[[int, int], object]


@dataclass(frozen=True)
class ImageInfo:
    """What a saved region is.

    Attributes:
        id: of this saving, 32 hexadecimal digits.
        size: of the region, bytes.
        compressed: whether zlib has been at it.
        source, name: where the memory came from, as in RegionInfo.
        saved: when, in seconds since the epoch.
    """

    id: str
    size: int
    compressed: bool
    source: str
    name: str | None
    saved: float


# -- saving ---------------------------------------------------------------------------------------


def save(
    region: Region,
    path: str | os.PathLike[str],
    *,
    compress: bool = False,
    progress: Callable[[int, int], object] | None = None,
    accept_owner: Iterable[SupportsIndex | str] = (),
) -> ImageInfo:
    """Write a region's bytes to a file, which only its owner can read.

    Pages of zeros take no space. A file that is there is replaced when the new one is whole and on
    the disk; whatever happens before, it stays as it was.

    Args:
        accept_owner: other users, by name or uid, whose symbolic links are followed to the file.

    Raises:
        PermissionError: a link on the way is of a user who is not accepted.
        OSError: as of open(2), write(2), fsync(2) or rename(2), with the path; or somebody has
            truncated the region's memory (ENODATA).
        ClosedError: the region is closed.
    """
    target = os.fspath(path)
    info = ImageInfo(
        uuid.uuid4().hex, region.size, compress, region.source, region.name, time.time()
    )
    try:
        with _replacing(target, os.fstat(region.fileno()), accept_owner) as file:
            _write(file, region, info, progress or _nobody)
    except OSError as error:
        raise OSError(error.errno, error.strerror, target) from error
    return info


def _write(file: BinaryIO, region: Region, info: ImageInfo, progress: OnProgress) -> None:
    header = json.dumps({"version": _VERSION, **dataclasses.asdict(info)}).encode()
    head = _MAGIC + _LENGTH.pack(len(header)) + header
    crc = zlib.crc32(head)
    file.write(head + _LENGTH.pack(crc))
    for offset, data in _pieces(region, progress):
        stored: bytes | memoryview = zlib.compress(data, _LEVEL) if info.compressed else data
        if len(stored) >= len(data):
            stored = data
        crc = _put(file, crc, offset, len(data), stored)
    # What is beyond a file's end looks like a hole.
    end = region.offset + region.size
    if _is_file(region) and os.fstat(region.fileno()).st_size < end:
        raise _truncated()
    _put(file, crc, info.size, 0, b"")


def _truncated() -> OSError:
    return OSError(errno.ENODATA, "somebody has truncated the region's memory")


def _put(file: BinaryIO, crc: int, offset: int, length: int, stored: bytes | memoryview) -> int:
    record = _RECORD.pack(offset, length, len(stored))
    crc = zlib.crc32(stored, zlib.crc32(record, crc))
    file.write(record + _LENGTH.pack(crc))
    file.write(stored)
    return crc


def _pieces(region: Region, progress: OnProgress) -> Iterator[tuple[int, memoryview]]:
    """Yield the parts that are not zero, each as a copy: other peers may write to the region."""
    buffer = bytearray(_BLOCK)
    zeros = bytes(_BLOCK)
    for start, end in region.extents():
        for offset in range(start, end, _BLOCK):
            length = min(_BLOCK, end - offset)
            block = memoryview(buffer)[:length]
            _read_into(region, offset, block)
            if block != memoryview(zeros)[:length]:
                for first, last in _runs(block, zeros):
                    yield offset + first, block[first:last]
            progress(offset + length, region.size)
    progress(region.size, region.size)


# Both by the descriptor where it is a file's: through a mapping, a hole would take a page, and we
# would die of SIGBUS where somebody has truncated the file, or its file system is full. To a device
# it may mean anything: 4 bytes written to UIO's switch its interrupt.


def _read_into(region: Region, offset: int, block: memoryview) -> None:
    done, more = 0, 1
    try:
        while _is_file(region) and more and done < len(block):
            more = os.preadv(region.fileno(), [block[done:]], region.offset + offset + done)
            done += more
    except OSError:
        pass  # sysfs lets its files only be mapped
    if not more:
        raise _truncated()
    if done < len(block):
        region.read_into(offset + done, block[done:])


def _write_to(region: Region, offset: int, data: bytes | memoryview) -> None:
    done = 0
    try:
        while _is_file(region) and done < len(data):
            done += os.pwrite(region.fileno(), data[done:], region.offset + offset + done)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(error.errno, error.strerror, region.name) from None
    if done < len(data):  # hugetlbfs has no write(2)
        region.write(offset + done, data[done:])


def _is_file(region: Region) -> bool:
    return stat.S_ISREG(os.fstat(region.fileno()).st_mode)


def _runs(block: memoryview, zeros: bytes) -> Iterator[tuple[int, int]]:
    """Where there are pages that are not all zeros, as runs of them."""
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
def _replacing(target: str, region: os.stat_result, accept: Users) -> Iterator[BinaryIO]:
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


def _nobody(_done: int, _total: int) -> None:
    pass


# -- loading --------------------------------------------------------------------------------------


def read_info(
    path: str | os.PathLike[str], *, accept_owner: Iterable[SupportsIndex | str] = ()
) -> ImageInfo:
    """What is saved in a file, by its header alone.

    Args:
        accept_owner: as of `load`.

    Raises:
        ImageError: it is no saved region, or one of a version that is not known here.
        OSError: as of open(2) and read(2).
    """
    with _Reader(os.fspath(path), accept_owner) as reader:
        return reader.info


def check(
    path: str | os.PathLike[str],
    *,
    progress: Callable[[int, int], object] | None = None,
    accept_owner: Iterable[SupportsIndex | str] = (),
) -> ImageInfo:
    """Read a whole file, and see whether it is as it was written.

    Args:
        accept_owner: as of `load`.

    Raises:
        ImageError: it is not: with the offset of the damage.
        OSError: as of open(2) and read(2).
    """
    with _Reader(os.fspath(path), accept_owner) as reader:
        for _ in reader.pieces(progress or _nobody):
            pass
        return reader.info


def load(
    path: str | os.PathLike[str],
    region: Region,
    *,
    progress: Callable[[int, int], object] | None = None,
    accept_owner: Iterable[SupportsIndex | str] = (),
) -> ImageInfo:
    """Make a region what was saved.

    The file is read twice: it is checked to its end before the region changes.

    Args:
        accept_owner: other users, by name or uid, whose symbolic links are followed, and whose
            files are read in directories that they can write.

    Raises:
        ImageError: it is damaged (with the offset), or of another size than the region; the region
            has not changed, unless somebody changed the file after it was found good.
        OSError: as of open(2) and read(2); or there is no room for what is loaded (ENOSPC), or
            somebody truncates the region's memory, which has a part of it then.
        ClosedError: the region is closed.
    """
    note = progress or _nobody
    with _Reader(os.fspath(path), accept_owner) as reader:
        info = reader.info
        if info.size != region.size:
            raise ImageError(
                f"{reader.path} holds {format_size(info.size)}, and the region has"
                f" {format_size(region.size)}: they must be the same"
            )
        if region.readonly:
            raise ImageError(f"{reader.path}: the region may only be read here")
        for _ in reader.pieces(lambda done, total: note(done, 2 * total)):
            pass
        reader.rewind()
        reader.effect = "somebody changed it during the load; the region has a part of it"
        at = 0
        for offset, data in reader.pieces(lambda done, total: note(total + done, 2 * total)):
            _clear(region, at, offset)
            _write_to(region, offset, data)
            at = offset + len(data)
        _clear(region, at, region.size)
    return info


def _clear(region: Region, start: int, end: int) -> None:
    """Make it zeros, where it is not: what is untouched takes no memory."""
    buffer = bytearray(_BLOCK)
    zeros = memoryview(bytes(_BLOCK))
    for first, last in region.extents(start, end):
        for offset in range(first, last, _BLOCK):
            length = min(_BLOCK, last - offset)
            block = memoryview(buffer)[:length]
            _read_into(region, offset, block)
            if block != zeros[:length]:
                _write_to(region, offset, zeros[:length])


def _check_values(info: ImageInfo) -> None:
    """Refuse what `save` never wrote, though anybody can make a checksum.

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


class _Reader(Uncopied):
    """A file with a saved region; a context manager."""

    def __init__(self, path: str, accept: Users) -> None:
        self.path = path
        self.effect = "nothing was loaded"  # of what goes wrong from now on
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
            # What a newer version says beyond that, this one cannot judge.
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
            ImageError: where the next is not as it was written.
        """
        at = 0
        while True:
            where = self._file.tell()
            record = self._file.read(_RECORD.size + _LENGTH.size)
            if len(record) < _RECORD.size + _LENGTH.size:
                raise self._damaged(where, "it ends too early")
            offset, length, stored = _RECORD.unpack_from(record)
            if stored > _BLOCK:
                raise self._damaged(where, f"a record of {counted(stored, 'byte')}")
            data = self._file.read(stored)
            if len(data) < stored:
                raise self._damaged(where, "it ends too early")
            self._crc = zlib.crc32(data, zlib.crc32(record[: _RECORD.size], self._crc))
            if record[_RECORD.size :] != _LENGTH.pack(self._crc):
                raise self._damaged(where, "the record has another checksum")
            # Nothing that `save` wrote comes so far, but anybody can make a checksum.
            room = self.info.size - offset
            if not stored <= length <= _BLOCK or offset < at or length > room:
                raise self._damaged(where, "a record that cannot be")
            if not length:
                break
            yield offset, self._whole(where, data, length)
            at = offset + length
            progress(self._file.tell(), self._size)
        end = self._file.tell()
        if offset != self.info.size or self._file.read(1):
            raise self._damaged(end, "it goes on after its end")
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

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *error: object) -> None:
        self._undo.close()
