# cython: language_level=3, binding=True, freethreading_compatible=True
# cython: embedsignature=True, embedsignature.format=clinic
"""Internal: the table of channels of an area: create, find, list, remove.

Knows: records. Does not know: what passes through a channel; what a type means.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy, memset

from .header cimport *
from .membership cimport Membership

import time

from ..errors import ChannelCorrupt, ChannelError, ChannelExists, NoSuchChannel, RegionError
from ..memory.sizes import format_size
from ..text import plain, quoted

KINDS = {
    "messages": IVSHMEM_MESSAGES,
    "queue": IVSHMEM_QUEUE,
    "value": IVSHMEM_VALUE,
    "calls": IVSHMEM_CALLS,
    "bytes": IVSHMEM_BYTES,
}
_NAMES = {number: name for name, number in KINDS.items()}
OPTIONS = {"times": IVSHMEM_TIMES, "ring_always": IVSHMEM_RING_ALWAYS}
OVERFLOW = {
    "overwrite": IVSHMEM_OVERWRITE,
    "block": IVSHMEM_BLOCK,
    "discard": IVSHMEM_DISCARD,
}
# The least and the most of each number of a geometry; and of one of bytes.
NUMBERS = {
    "writers": (1, IVSHMEM_MOST_WRITERS),
    "readers": (0, IVSHMEM_MOST_READERS),
    "slots": (1, IVSHMEM_MOST_SLOTS),
    "loans": (1, IVSHMEM_MOST_LOANS),
}
NUMBERS_OF_BYTES = {
    "writers": (1, IVSHMEM_MOST_CONNECTIONS),
    "readers": (1, IVSHMEM_MOST_READERS),
    "slots": (64, IVSHMEM_MOST_BUFFER),
}
NAME_BYTES = IVSHMEM_CHANNEL_NAME - 1
TYPE_BYTES = IVSHMEM_CHANNEL_TYPE - 1

cdef enum:
    TRIES = 200  # of a creation beside another process's


cdef ivshmem_geometry geometry_of(dict wanted):
    cdef ivshmem_geometry g
    g.kind = wanted["kind"]
    g.overflow = wanted["overflow"]
    g.options = wanted["options"]
    g.writers = wanted["writers"]
    g.readers = wanted["readers"]
    g.slots = wanted["slots"]
    g.loans = wanted["loans"]
    g.views = wanted["views"]
    g.limit = wanted["limit"]
    return g


def size_of(dict geometry):
    """Return how many bytes a channel of this geometry takes; None: it is not allowed."""
    cdef ivshmem_geometry g = geometry_of(geometry)
    cdef ivshmem_layout layout
    return None if ivshmem_lay_out(&g, &layout) else layout.size


def room(Membership membership not None):
    """Return (bytes of a unit, units, free ones, the most free ones in a row) of the area."""
    cdef ivshmem_area *area = &membership.member.area
    cdef uint32_t unit, free = 0, most = 0, total = 0
    membership.check()
    for unit in range(area.units):
        if ivshmem_unit_is_free(area, ivshmem_load(&area.memory, area.units_at + 8 * unit)):
            free += 1
            total += 1
            most = max(most, free)
        else:
            free = 0
    return area.unit, area.units, total, most


def create(Membership membership not None, str name, dict geometry, bytes text):
    """Create a channel; return the facts of its record.

    Raises:
        ChannelExists: there is one of that name; the message says whose it is.
        ChannelCorrupt: as of `find`.
        ChannelError: no record is free, or not so much room in one piece.
        RegionError: the region is mapped for reading only.
        ValueError: a geometry that is not allowed: too many cells, if its numbers were checked.
    """
    cdef ivshmem_record record
    cdef int code = IVSHMEM_AGAIN
    cdef bytes encoded = name.encode()
    membership.check()
    memset(&record, 0, sizeof(record))
    memcpy(record.name, <const char *>encoded, len(encoded))
    memcpy(record.type, <const char *>text, len(text))
    record.geometry = geometry_of(geometry)
    record.created = time.time_ns()
    for tries in range(TRIES):
        code = ivshmem_create(&membership.member, &record)
        if code != IVSHMEM_AGAIN:
            break
        time.sleep(0.0005 * (1 + (membership.member.process + tries) % 7))
    if code == 0:
        return facts_of(&record)
    if code == IVSHMEM_TAKEN or code == IVSHMEM_AGAIN:
        raise exists(membership, name)
    if code == IVSHMEM_NO_ROOM:
        unit, units, _, most = room(membership)
        size = size_of(geometry)
        taken = (size + unit - 1) // unit * unit
        raise ChannelError(
            f"no room for channel {name!r}: it takes {format_size(taken)}, and of the area's"
            f" {format_size(unit * units)} at most {format_size(most * unit)} are free in one piece"
            f" (or all {membership.member.area.records} channels exist that it can have);"
            " `ivshmem channel ls` lists what is there"
        )
    if code == IVSHMEM_BAD:
        raise ValueError(
            f"channel {name!r}: for each writer it would need more than the {IVSHMEM_MOST_CELLS}"
            " cells that are possible: slots + loans + 1, with overflow 'discard' slots * readers"
            " more; of calls twice as many"
        )
    raise membership.fail(code, NULL, name)


cdef object exists(Membership membership, str name):
    """Return the exception for a name that another process has taken."""
    cdef ivshmem_record record
    cdef int code = find_record(membership, name, &record)
    if code == IVSHMEM_CORRUPT:
        return is_spoiled(&record)
    about = whose(membership, &record) if code == 0 else who_makes(membership, name)
    return ChannelExists(f"there is a channel {name!r} already{about}")


cdef tuple maker_of(Membership membership, uint64_t state):
    """Return who made, or makes, a record, and the names of all places by number."""
    cdef ivshmem_place maker = ivshmem_place_of(state)
    names = {}
    by = "a process that has left"
    for index, epoch, _, _, _, process, words in membership.places():
        names[index] = f"place {index} (process {process}, {plain(words)!r})"
        if index == maker.index and epoch == maker.epoch:
            by = names[index]
    return by, names


cdef str who_makes(Membership membership, str name):
    """Say which process is making a channel, and whether it is at work."""
    cdef char padded[IVSHMEM_CHANNEL_NAME]
    cdef ivshmem_place maker
    cdef uint64_t state
    cdef unsigned i
    pad(name, padded)
    for i in range(membership.member.area.records):
        state = ivshmem_record_holds(&membership.member.area, i, padded)
        if ivshmem_flags(state) != IVSHMEM_MAKING:
            continue
        maker = ivshmem_place_of(state)
        found = f", which {maker_of(membership, state)[0]} is just making"
        if membership.is_silent(maker):
            found += (
                "; it shows no sign of life: if it will never run again, `ivshmem channel rm"
                f" --place {maker.index}` ends that"
            )
        return found
    return ", which another process was just making"


cdef str whose(Membership membership, ivshmem_record *record):
    """Say who made a channel and who uses it, as far as the memory tells."""
    by, names = maker_of(membership, record.state)
    name = (<bytes>record.name).decode(errors="replace")
    found = f", made by {by}"
    ends = usage(membership, record)
    users = {
        names[end[1]]
        for end in ends["writing"] + ends["reading"]
        if end[2] != "gone" and end[1] in names
    }
    users.discard(by)
    if users:
        return f"{found}, used by {', '.join(sorted(users))}"
    if by not in names.values() and not ends["connections"]:
        return f"{found}, used by nobody: `ivshmem channel rm {quoted(name)}` removes it"
    return found


cdef dict facts_of(ivshmem_record *record):
    """Return what a record says, by which it is compared later, too."""
    g = record.geometry
    return {
        "index": record.index,
        "state": record.state,
        "name": (<bytes>record.name).decode(errors="replace"),
        "kind": _NAMES.get(g.kind, "?"),
        "overflow": tuple(name for name, bit in OVERFLOW.items() if g.overflow & bit),
        **{name: bool(g.options & bit) for name, bit in OPTIONS.items()},
        "writers": g.writers,
        "readers": g.readers,
        "slots": g.slots,
        "loans": g.loans,
        "views": g.views,
        "limit": g.limit,
        "created": record.created / 1e9,
        "type": (<bytes>record.type).decode(errors="replace"),
    }


def find(Membership membership not None, str name):
    """Return the facts of the channel of that name.

    Raises:
        NoSuchChannel: there is none.
        ChannelCorrupt: its record is spoiled.
    """
    cdef ivshmem_record record
    cdef int code
    membership.check()
    code = find_record(membership, name, &record)
    if code == 0:
        return facts_of(&record)
    if code == IVSHMEM_CORRUPT:
        raise is_spoiled(&record)
    raise NoSuchChannel(name)


cdef bint pad(str name, char *padded) except -1:
    """Write a name as records have it; whether a channel can have it."""
    cdef bytes encoded = name.encode(errors="backslashreplace")  # no channel has such a name
    memset(padded, 0, IVSHMEM_CHANNEL_NAME)
    if len(encoded) >= IVSHMEM_CHANNEL_NAME or b"\0" in encoded:
        return False
    memcpy(padded, <const char *>encoded, len(encoded))
    return True


cdef int find_record(Membership membership, str name, ivshmem_record *record) except? -1:
    cdef char padded[IVSHMEM_CHANNEL_NAME]
    if not pad(name, padded):
        return IVSHMEM_NOT_FOUND
    return ivshmem_find(&membership.member.area, padded, record)


cdef object is_spoiled(ivshmem_record *record):
    name = (<bytes>record.name).decode(errors="replace")
    return ChannelCorrupt(
        f"channel {plain(name)!r}: its record, number {record.index}, is spoiled by some process"
        " that can write to the memory. Its memory stays set aside until `ivshmem channel rm"
        f" --record {record.index} --force` removes it"
    )


def spoiled(Membership membership not None):
    """Return what is known of channels whose records are spoiled."""
    cdef ivshmem_record record
    cdef unsigned i
    membership.check()
    return [
        {
            "index": record.index,
            "state": record.state,
            "name": (<bytes>record.name).decode(errors="replace"),
            "maker": maker_of(membership, record.state)[0],
        }
        for i in range(membership.member.area.records)
        if ivshmem_record_read(&membership.member.area, i, &record) == IVSHMEM_CORRUPT
    ]


def listing(Membership membership not None):
    """Return the facts of all channels."""
    cdef ivshmem_record record
    cdef unsigned i
    membership.check()
    found = []
    for i in range(membership.member.area.records):
        if ivshmem_record_read(&membership.member.area, i, &record) == 0:
            channel = facts_of(&record)
            channel.update(usage(membership, &record))
            found.append(channel)
    return found


cdef dict usage(Membership membership, ivshmem_record *record):
    """Who writes and who reads, as (slot, place, state, ..)."""
    cdef ivshmem_channel channel
    cdef ivshmem_geometry *g = &record.geometry
    cdef uint64_t owner, tail, head, policy, claim
    cdef unsigned i, j
    cdef ivshmem_place place
    ivshmem_channel_open(&channel, &membership.member.area, record)
    ends = {
        "writing": [], "reading": [], "connections": 0, "unfinished": 0, "published": 0,
        "bytes": channel.layout.size,
    }
    if g.kind == IVSHMEM_BYTES:
        for i in range(g.writers):
            for j in range(2):
                owner = ivshmem_get(&channel, ivshmem_end_owner_at(&channel, i, j))
                if ivshmem_flags(owner) == IVSHMEM_SLOT_OPEN and not ivshmem_is_gone(
                    &channel.area, ivshmem_place_of(owner)
                ):
                    ends["connections"] += 1
                    break
    else:
        for i in range(g.writers):
            owner = ivshmem_get(&channel, channel.layout.writer_owners + 8 * i)
            head = ivshmem_value(ivshmem_head(&channel, i))
            ends["published"] += head  # also of a writer that has ended
            if ivshmem_flags(owner) == IVSHMEM_SLOT_FREE:
                continue
            place = ivshmem_place_of(owner)
            ends["writing"].append((
                i, place.index, state_of(membership, owner), head,
            ))
            if ivshmem_has_claims(&channel):
                for j in range(g.slots):
                    claim = ivshmem_get(&channel, ivshmem_claim_at(&channel, i, j))
                    if IVSHMEM_CLAIM_OPEN <= ivshmem_flags(claim) <= IVSHMEM_CLAIM_ONCE:
                        ends["unfinished"] += ivshmem_claim_is_published(head, claim)
    for i in range(g.readers):
        owner = ivshmem_get(&channel, channel.layout.reader_owners + 8 * i)
        if ivshmem_flags(owner) != IVSHMEM_SLOT_OPEN:
            continue
        place = ivshmem_place_of(owner)
        if ivshmem_is_gone(&channel.area, place):
            continue
        waiting = 0
        lost = 0
        overflow = ""
        if g.kind == IVSHMEM_MESSAGES:
            policy = ivshmem_get(&channel, channel.layout.rows + channel.layout.row_bytes * i)
            lost = ivshmem_value(policy) >> 8
            overflow = next(
                (n for n, bit in OVERFLOW.items() if bit == ivshmem_policy(policy)), "?"
            )
            for j in range(g.writers):
                tail = ivshmem_get(&channel, ivshmem_row_at(&channel, i, j))
                if ivshmem_epoch(tail) == ivshmem_epoch(owner):
                    waiting += min(
                        ivshmem_ahead(
                            ivshmem_value(ivshmem_head(&channel, j)), ivshmem_value(tail)
                        ),
                        g.slots,
                    )
        ends["reading"].append((
            i, place.index, state_of(membership, owner), overflow, waiting, lost,
        ))
    return ends


cdef str state_of(Membership membership, uint64_t owner):
    cdef ivshmem_place place = ivshmem_place_of(owner)
    if ivshmem_is_gone(&membership.member.area, place):
        return "gone"
    if membership.is_silent(place):
        return "silent"
    return "open" if ivshmem_flags(owner) == IVSHMEM_SLOT_OPEN else "closing"


def remove(Membership membership not None, dict found not None, bint force):
    """Remove the channel that was found, and free its memory.

    Raises:
        NoSuchChannel: it was removed before.
        ChannelError: it is in use, and `force` is false.
        ChannelCorrupt: its record is spoiled, and `force` is false.
    """
    cdef ivshmem_record record
    cdef ivshmem_channel channel
    cdef int code
    cdef str name = found["name"]
    membership.check()
    if membership.mapping.fixed:
        raise RegionError("the region is mapped for reading only: no channel can be removed")
    code = ivshmem_record_read(&membership.member.area, found["index"], &record)
    if code not in (0, IVSHMEM_CORRUPT) or record.state != found["state"]:
        raise NoSuchChannel(name)
    if code == IVSHMEM_CORRUPT:
        if not force:
            raise is_spoiled(&record)  # who uses it cannot be known
        channel.area = membership.member.area
        channel.record = record
    else:
        ivshmem_channel_open(&channel, &membership.member.area, &record)
    code = ivshmem_remove(&membership.member, &channel, force)
    if code == IVSHMEM_NOT_FOUND:
        raise NoSuchChannel(name)
    if code == IVSHMEM_TAKEN:
        raise ChannelError(
            f"channel {name!r} is in use: `ivshmem channel info` says by which processes (force:"
            " only if you know that none of them stores into its memory any more)"
        )
    if code:
        raise membership.fail(code, NULL, name)
    membership.look_after_ends()  # those of this process that are removed know it now
    membership.kick_all()
