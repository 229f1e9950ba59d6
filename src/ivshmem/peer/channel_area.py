"""Where in a region the area for channels is.

Knows: what fits, and in which order an area is made. Does not know: what stands in it.

Invariant: the trailer names an area only when the area is whole. If a process is killed before
that, the next one finds no area, and makes it again at the same place.
"""

from __future__ import annotations

import struct
import zlib

from ..errors import NoDirectory, RegionError
from ..memory.region import Region
from ..memory.sizes import format_size
from ..native import areas
from .limits import AREA_PAGE, AREA_START, LEAST_AREA
from .names_table import Trailer, start_of, trailer_of, write_trailer

VERSION = 1  # IVSHMEM_AREA_VERSION of channel/ivshmem_channel/area.h
_MAGIC = b"SVMHCHNL"
_HEADER = struct.Struct("<8sI 28x Q")  # magic, version, CRC-32 of the 40 bytes before it


def place_of(size: int, slots: int, wanted: int) -> range:
    """Return where `wanted` bytes are set aside in a region of `size` bytes: before its names.

    Raises:
        RegionError: they do not fit.
    """
    end = start_of(size, slots)
    most = (end - AREA_START) // AREA_PAGE * AREA_PAGE
    if most < LEAST_AREA:
        raise RegionError(
            f"no room for channels in a region of {format_size(size)}: they take at least"
            f" {format_size(LEAST_AREA)}, between its first {format_size(AREA_START)} and its"
            " directory of names"
        )
    if not LEAST_AREA <= wanted <= most:
        raise RegionError(
            f"{format_size(wanted)} for channels: a region of {format_size(size)} has room for"
            f" {format_size(LEAST_AREA)} to {format_size(most)}"
        )
    start = (end - wanted) // AREA_PAGE * AREA_PAGE
    return range(start, start + wanted)


def set_aside(region: Region, trailer: Trailer, wanted: int) -> Trailer:
    """Make the area of a region that has this trailer, and return the new one.

    An area of that size which is there stays as it is.

    Raises:
        RegionError: it does not fit; one of another size or version is there; the region is
            read-only.
    """
    there = trailer.area
    if there is None:
        there = place_of(region.size, trailer.slots, wanted)
    elif len(there) != wanted:
        raise RegionError(
            f"the region has {format_size(len(there))} for channels already, not"
            f" {format_size(wanted)}"
        )
    else:
        area = areas.area_of(region, there.start)
        if area is not None and area.size == wanted:
            return trailer
        if area is None and (unknown := _unknown_version(region, there)):
            raise RegionError(unknown)  # channels of other processes, perhaps: do not destroy them
    areas.make_area(region, there.start, wanted)
    trailer = trailer._replace(area=there)
    write_trailer(region, trailer)
    return trailer


def obstacle(region: Region) -> str:
    """Say what keeps this version from the channels of a region; "": it has no room for any."""
    try:
        trailer = trailer_of(region)
    except NoDirectory as error:
        return str(error)
    return "" if trailer is None or trailer.area is None else _unknown_version(region, trailer.area)


def _unknown_version(region: Region, there: range) -> str:
    """Say that there is an area of a version that is not known here; "": there is none."""
    if there.start + _HEADER.size > region.size:
        return ""
    raw = region.read(there.start, _HEADER.size)
    magic, version, crc = _HEADER.unpack(raw)
    if magic != _MAGIC or crc != zlib.crc32(raw[:40]) or version == VERSION:
        return ""
    return (
        f"the region's channels are of version {version}, which is not known here (version"
        f" {VERSION} is): let all peers have one version of ivshmem, or make new memory"
    )
