# cython: language_level=3, binding=False, freethreading_compatible=True
# cython: embedsignature=True, embedsignature.format=clinic
"""Areas: the parts of regions that hold channels; made, found, and swept.

Knows: ivshmem_channel.h's functions for areas. Does not know: channels, or what decides where an
area is.

It stands below the directory of names, which places an area, and below images, after whose loading
an area is swept. So it cannot be a part of the room `channel`, which stands above them.

All memory is treated as write-combining: that is right for every mapping, and these calls are rare.
"""

from libc.stdint cimport uint32_t, uint64_t

from .mapping cimport Mapping

from collections import namedtuple

from ..errors import RegionError


cdef extern from "ivshmem_channel/directory.h" nogil:
    pass


cdef extern from "ivshmem_channel/places.h" nogil:
    pass


cdef extern from "ivshmem_channel/records.h" nogil:
    enum: IVSHMEM_WRITE_COMBINING, IVSHMEM_NO_ROOM, IVSHMEM_MOST_PLACES, IVSHMEM_MOST_RECORDS
    uint64_t IVSHMEM_PEER_MUTE

    struct ivshmem_memory:
        unsigned char *start
        uint64_t size
        int mapping
        int readonly

    struct ivshmem_area:
        uint64_t at, size, unit
        uint32_t places, records, units

    int ivshmem_area_make(ivshmem_area *, const ivshmem_memory *, uint64_t, uint64_t, unsigned,
                          unsigned)
    int ivshmem_area_open(ivshmem_area *, const ivshmem_memory *, uint64_t)
    unsigned ivshmem_area_sweep(const ivshmem_area *)
    uint64_t ivshmem_place_at(const ivshmem_area *, unsigned)
    uint64_t ivshmem_peer_at(const ivshmem_area *, unsigned)
    uint64_t ivshmem_load(const ivshmem_memory *, uint64_t)
    uint64_t ivshmem_value(uint64_t)
    int ivshmem_place_free(const ivshmem_area *, unsigned, uint64_t)
    int ivshmem_find_area(const ivshmem_memory *, uint64_t *)


Area = namedtuple("Area", "offset size places records unit units")
Area.__doc__ = """An area, as its header says: bytes, numbers of table entries, units of data."""

cdef enum:
    # Bytes of an area for each place and each record, if the caller does not say how many.
    FOR_A_PLACE = 1 << 14
    FOR_A_RECORD = 1 << 16

cdef int memory_of(Mapping mapping, ivshmem_memory *memory) except -1:
    """Pin a mapping, and describe it for the header."""
    mapping.pin()
    memory.start = <unsigned char *>mapping.start
    memory.size = mapping.length
    memory.mapping = IVSHMEM_WRITE_COMBINING
    memory.readonly = mapping.fixed
    return 0


cdef object described(const ivshmem_area *area):
    return Area(area.at, area.size, area.places, area.records, area.unit, area.units)


def make_area(Mapping mapping not None, uint64_t offset, uint64_t size, unsigned places=0,
              unsigned records=0):
    """Make an area of `size` bytes at an offset, a multiple of 4096 from 8192 on.

    Args:
        places: how many processes can take part, up to 1024; 0: 16 to 256, by the size.
        records: how many channels there can be, up to 1024; 0: 8 to 256, by the size.

    Raises:
        RegionError: the tables and one unit of data do not fit, or the mapping is read-only.
    """
    cdef ivshmem_memory memory
    cdef ivshmem_area area
    cdef int code
    if places == 0:
        places = min(max(size // FOR_A_PLACE, 16), 256)
    if records == 0:
        records = min(max(size // FOR_A_RECORD, 8), 256)
    memory_of(mapping, &memory)
    try:
        with nogil:
            code = ivshmem_area_make(&area, &memory, offset, size, places, records)
    finally:
        mapping.unpin()
    if code == 0:
        return described(&area)
    if code == IVSHMEM_NO_ROOM:
        raise RegionError(
            f"no area of {size} bytes can be made at {offset:#x} of {memory.size} bytes, for"
            f" {places} processes and {records} channels"
        )
    raise RegionError("the memory is mapped for reading only: no area can be made in it")


def area_of(Mapping mapping not None, uint64_t offset):
    """Return the Area whose header is at an offset; None: there is none, or of another version."""
    cdef ivshmem_memory memory
    cdef ivshmem_area area
    memory_of(mapping, &memory)
    try:
        return described(&area) if ivshmem_area_open(&area, &memory, offset) == 0 else None
    finally:
        mapping.unpin()


def find_area(Mapping mapping not None):
    """Return the Area that the region's directory of names tells of; None: there is none."""
    cdef ivshmem_memory memory
    cdef ivshmem_area area
    cdef uint64_t offset
    memory_of(mapping, &memory)
    try:
        if ivshmem_find_area(&memory, &offset) != 0:
            return None
        return described(&area) if ivshmem_area_open(&area, &memory, offset) == 0 else None
    finally:
        mapping.unpin()


def peers_of(Mapping mapping not None):
    """Return the ids of those that use channels and can be rung, without repetition.

    Any peer can write there, so an id need not be one of a peer. There is at most one for each
    place of the area.
    """
    cdef ivshmem_memory memory
    cdef ivshmem_area area
    cdef uint64_t offset, peer
    cdef unsigned i
    found = {}
    memory_of(mapping, &memory)
    try:
        if ivshmem_find_area(&memory, &offset) != 0:
            return []
        if ivshmem_area_open(&area, &memory, offset) != 0:
            return []
        for i in range(area.places):
            peer = ivshmem_peer_at(&area, i)
            if not peer & IVSHMEM_PEER_MUTE:
                found[peer & 0xffff] = None
    finally:
        mapping.unpin()
    return list(found)


def sweep(Mapping mapping not None, uint64_t offset):
    """Free all places of an area, and return how many there were; 0 if there is no area.

    The caller knows that none of their processes is left: no other process has the memory, or its
    contents came from a file or from another machine.
    """
    cdef ivshmem_memory memory
    cdef ivshmem_area area
    cdef unsigned freed = 0
    memory_of(mapping, &memory)
    try:
        if not memory.readonly and ivshmem_area_open(&area, &memory, offset) == 0:
            with nogil:
                freed = ivshmem_area_sweep(&area)
    finally:
        mapping.unpin()
    return freed


def free_place(Mapping mapping not None, uint64_t offset, unsigned index):
    """Free one place of an area, at a user's word, and say whether it had an owner.

    For a process that has no place: a user frees one if all are taken.

    Raises:
        ValueError: there is no such place, or no area.
        RegionError: the region is mapped for reading only.
    """
    cdef ivshmem_memory memory
    cdef ivshmem_area area
    cdef uint64_t number
    memory_of(mapping, &memory)
    try:
        if memory.readonly:
            raise RegionError("the region is mapped for reading only: no place can be freed")
        if ivshmem_area_open(&area, &memory, offset) != 0:
            raise ValueError(f"there is no area at {offset:#x}")
        if index >= area.places:
            raise ValueError(f"place {index}: the area has {area.places}")
        number = ivshmem_load(&memory, ivshmem_place_at(&area, index))
        return ivshmem_value(number) != 0 and bool(ivshmem_place_free(&area, index, number))
    finally:
        mapping.unpin()
