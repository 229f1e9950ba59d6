"""Places in an area for channels that earlier processes left, of a saved region for instance.

Knows: how to look for an area without taking memory for it. Does not know: when places may be
freed.
"""

from __future__ import annotations

from ..native import areas
from .blocks import read_into
from .region import Region

_TRAILER = 128  # bytes, at the region's end


def has_area(region: Region) -> bool:
    """Whether a region has an area for channels that this process can change."""
    return _found(region) is not None


def free_places(region: Region) -> int:
    """Free all places of a region's area, if it has one that this process can change; how many.

    The caller knows that none of their processes is left.
    """
    area = _found(region)
    return 0 if area is None else areas.sweep(region, area.offset)


def _found(region: Region) -> areas.Area | None:
    if region.readonly:
        return None
    # The first word of the directory's trailer. It is read from the file: a look at memory that was
    # never written takes a page for it, which can be a huge one.
    word = memoryview(bytearray(8))
    read_into(region, region.size - _TRAILER, word)
    return areas.find_area(region) if any(word) else None
