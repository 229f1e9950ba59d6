"""A channel's record as a hostile peer stores it: words of the memory, with a CRC that is right.

Knows: what stands where in a record (ivshmem_channel/records.h). Written without the package's own.
"""

from __future__ import annotations

import struct
import zlib

from ivshmem import Region
from ivshmem.native.areas import find_area

NAME, FROZEN, CRC = 16, 80, 392  # bytes from a record's start
FIELDS = {  # of the geometry: where it begins, and how many bits it has
    "kind": (0, 8),
    "overflow": (8, 8),
    "writers": (64, 32),
    "readers": (96, 32),
    "slots": (128, 32),
    "loans": (160, 16),
    "views": (224, 32),
    "limit": (256, 64),
    "units": (352, 32),
}


class Record:
    """The record of the channel of that name, in a region that has one of it."""

    def __init__(self, region: Region, name: str) -> None:
        area = find_area(region)
        assert area is not None
        data = region.read(area.offset, area.size)
        self.region = region
        self.at = area.offset + data.index(name.encode().ljust(64, b"\0"), 4096) - NAME

    def flip(self, at: int) -> None:
        """Change one bit, so that the CRC does not fit any more."""
        byte = self.region.read(self.at + at, 1)[0]
        self.region.write(self.at + at, bytes([byte ^ 1]))

    def begin_again(self) -> None:
        """Let the creator be at the point where it has not yet ended to make the channel."""
        state = int.from_bytes(self.region.read(self.at, 8), "little")
        making = state & ~(0xF << 20) | 1 << 20
        self.region.write(self.at, making.to_bytes(8, "little"))

    def tell(self, **fields: int) -> None:
        """Store another geometry, and the CRC that fits."""
        covered = bytearray(self.region.read(self.at + NAME, CRC - NAME))
        number = int.from_bytes(covered[FROZEN - NAME : FROZEN - NAME + 56], "little")
        for field, value in fields.items():
            begin, bits = FIELDS[field]
            number &= ~(((1 << bits) - 1) << begin)
            number |= value << begin
        covered[FROZEN - NAME : FROZEN - NAME + 56] = number.to_bytes(56, "little")
        self.region.write(self.at + NAME, covered + struct.pack("<Q", zlib.crc32(covered)))
