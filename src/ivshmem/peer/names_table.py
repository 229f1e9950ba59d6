"""The form of a region's table of names: slots, and a trailer at the end.

Knows: bytes, checksums, which entries are valid. Does not know: which entries are alive, which
process may have a slot.

Shared bytes are copied once, and only the copy is looked at.
"""

from __future__ import annotations

import struct
import zlib

from ..errors import NoDirectory, RegionError
from ..memory.region import Region
from ..memory.sizes import format_size
from ..protocol.limits import MAX_VECTORS
from ..system.named_tuple import NamedTuple
from ..text import counted
from .limits import AREA_PAGE, AREA_START, MAGIC, MAX_SLOTS, SLOT_BYTES

# The format, which docs/reference/file-formats.md draws. All of it is little-endian, as the
# machines are that this package is for, so that the atomics of native/mapping, which have the
# machine's order, need no conversion.
NAME_BYTES, ROLE_BYTES = 47, 31  # one less than the fields, so that C finds a terminator
DEFAULT_SLOTS = 63
VERSION = 1

SLOT = struct.Struct("<QQ I HHH6x 48s 32s 16x")  # owner, beat, crc, id, vectors, name, role
TRAILER = struct.Struct("<8s8x I II 4x QQ 80x")  # magic, crc, version, slots, area: offset, size
OWNER, BEAT_OFFSET = 0, 8  # offsets in a slot


class Entry(NamedTuple):
    """An entry that a peer has published. It is a claim, not a proof: any peer can write any byte.

    Attributes:
        id: the peer to ring, 0..65535. Several processes of a guest have the same id.
        name, role: printable text; the role may be empty.
        vector_range: the numbers of the vectors that this name listens on.
        alive: True: it showed a sign of life within the last seconds. None: it was not watched long
            enough to tell. (Entries that are known to be dead are not listed.)
    """

    id: int
    name: str
    role: str
    vector_range: range
    alive: bool | None


class Trailer(NamedTuple):
    """What the trailer says.

    Attributes:
        slots: of the table.
        area: the bytes that are set aside for channels; None: none are.
    """

    slots: int
    area: range | None = None


# -- the format -----------------------------------------------------------------------------------


def default_slots(size: int) -> int:
    """Return how many slots a region of `size` bytes gets by default: at most half of it."""
    return max(1, min(DEFAULT_SLOTS, size // 2 // SLOT_BYTES - 1))


def pack(owner: int, peer: int, name: str, role: str, vectors: range) -> bytes:
    """Return a slot's 128 bytes, with a beat of 0."""
    fields = peer, vectors.start, len(vectors), name.encode(), role.encode()
    crc = checksum(SLOT.pack(owner, 0, 0, *fields))
    return SLOT.pack(owner, 0, crc, *fields)


def parse(raw: bytes) -> Entry | None:
    """Return the entry in a slot's 128 bytes, with `alive` None; None: it is not valid."""
    owner, _, crc, peer, first, count, name, role = SLOT.unpack(raw)
    if not owner or crc != checksum(raw) or first + count > MAX_VECTORS:
        return None
    name, role = _text(name), _text(role)
    if not name or role is None:
        return None
    return Entry(peer, name, role, range(first, first + count), None)


def checksum(raw: bytes) -> int:
    """Return the checksum of a slot or the trailer, without its bytes 8 to 19: beat, checksum."""
    return zlib.crc32(raw[:8] + raw[20:])


def _text(field: bytes) -> str | None:
    """Return the text of a field that is padded with zeros; None if it is not allowed."""
    data, end, rest = field.partition(b"\0")
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return None
    return text if end and not any(rest) and _is_plain(text) else None


def _is_plain(text: str) -> bool:
    """Whether no character is invisible, controls a terminal or reverses its text."""
    return text.isprintable() and text == text.strip(" ")


def check_text(what: str, text: str, least: int, most: int) -> None:
    if not isinstance(text, str):
        raise TypeError(f"{what}: expected text, not {text!r}")
    if not _is_plain(text):
        raise ValueError(f"{what} {text!r}: printable characters only, no space at either end")
    if not least <= len(text.encode()) <= most:
        raise ValueError(f"{what} {text!r}: {least} to {most} bytes of UTF-8 are allowed")


def trailer_of(region: Region) -> Trailer | None:
    """Return what the trailer of a region's directory says; None: there is no valid one.

    Raises:
        NoDirectory: it has another version.
    """
    if region.size < 2 * SLOT_BYTES:
        return None
    raw = copy_slot(region, region.size - SLOT_BYTES)
    magic, crc, version, slots, area, area_size = TRAILER.unpack(raw)
    if magic != MAGIC or crc != checksum(raw):
        return None
    if version != VERSION:
        raise NoDirectory(
            f"the region has a directory of version {version}, which is not known here (version"
            f" {VERSION} is): let all peers have one version of ivshmem, or make new memory"
        )
    if not 1 <= slots <= MAX_SLOTS or not _fits(region.size, slots):
        return None
    # An area that cannot be there is as none: the names can be used nevertheless.
    fits = area >= AREA_START and area + area_size <= start_of(region.size, slots)
    if not fits or area % AREA_PAGE or not area_size:
        return Trailer(slots)
    return Trailer(slots, range(area, area + area_size))


def make_table(region: Region, slots: int) -> None:
    """Make a directory where there is none. Valid entries that lost their trailer stay."""
    if not _fits(region.size, slots):
        raise RegionError(
            f"a directory of {counted(slots, 'slot')} takes {(slots + 1) * SLOT_BYTES} bytes at a"
            f" multiple of {SLOT_BYTES}, and the region has {format_size(region.size)}"
        )
    if region.readonly:
        raise RegionError("the region is mapped for reading only: no directory can be made in it")
    start = start_of(region.size, slots)
    for offset in range(start, start + slots * SLOT_BYTES, SLOT_BYTES):
        raw = copy_slot(region, offset)
        if any(raw[:8]) and parse(raw) is None:
            region.atomic_u64(offset + OWNER).store(0)
    write_trailer(region, Trailer(slots))


def write_trailer(region: Region, trailer: Trailer) -> None:
    area = trailer.area or range(0)
    fields = VERSION, trailer.slots, area.start, len(area)
    data = TRAILER.pack(MAGIC, checksum(TRAILER.pack(MAGIC, 0, *fields)), *fields)
    start = region.size - SLOT_BYTES
    for offset in range(0, SLOT_BYTES, 8):
        word = int.from_bytes(data[offset : offset + 8], "little")
        region.atomic_u64(start + offset).store(word)


def start_of(size: int, slots: int) -> int:
    return size - (slots + 1) * SLOT_BYTES


def _fits(size: int, slots: int) -> bool:
    return size % SLOT_BYTES == 0 and start_of(size, slots) >= 0


def copy_slot(region: Region, offset: int) -> bytes:
    """Return a copy of 128 bytes. They begin at a multiple of 128, so that memcpy makes only
    aligned accesses, as device memory needs.
    """
    return region.read(offset, SLOT_BYTES)
