"""Internal: the facts about the channels of a region.

Knows: the records that a program gets. Does not know: where the facts come from (records.pyx).
"""

from __future__ import annotations

from ..system.named_tuple import NamedTuple

POSITIONS = 1 << 40  # positions of messages are counted modulo this


class WriterInfo(NamedTuple):
    """A slot of a writer.

    Attributes:
        slot: its number.
        place: of the process, as in PlaceInfo.
        state: "open"; "closing": it writes no more, and readers still have messages of it;
            "silent": no sign of life for the lease; "gone".
        written: messages that this slot has published since the channel was made, modulo 2**40.
    """

    slot: int
    place: int
    state: str
    written: int


class ReaderInfo(NamedTuple):
    """A slot of a reader.

    Attributes:
        slot, place, state: as in WriterInfo.
        overflow: what a full channel does to it; "" in a queue or a value.
        waiting: messages that it has yet to take.
        lost: messages that were overwritten before it took them, as of its last beat.
    """

    slot: int
    place: int
    state: str
    overflow: str
    waiting: int
    lost: int


class ChannelInfo(NamedTuple):
    """A channel as its record describes it, at one moment. All of it is other processes' word.

    Attributes:
        name, kind: printable; "messages", "queue", "value", "calls" or "bytes".
        type: what `dtype` and `shape`, or `schema`, made; "": none.
        limit: bytes of the longest message.
        slots: messages of each writer that are kept; of bytes: how many bytes each direction holds.
        max_writers, max_readers, loans, views: how many at once.
        overflow: the ways to overflow that readers may choose.
        times: each message has the time of its publication.
        size: bytes that it takes in memory.
        created: seconds since 1970.
        writers, readers: those that are there; of bytes: readers are listeners.
        connections: of bytes.
        unfinished: messages of a queue that no reader is done with, or calls without a reply.
        published: messages or requests of all writers, also of those that ended, since the channel
            was made (each slot counts modulo 2**40); of bytes: 0.
    """

    name: str
    kind: str
    type: str
    limit: int
    slots: int
    max_writers: int
    max_readers: int
    loans: int
    views: int
    overflow: tuple[str, ...]
    times: bool
    size: int
    created: float
    writers: tuple[WriterInfo, ...]
    readers: tuple[ReaderInfo, ...]
    connections: int
    unfinished: int
    published: int


class SpoiledInfo(NamedTuple):
    """A channel whose record some process has spoiled. Its memory is set aside, its name taken.

    Attributes:
        record: its number, for `Channels.remove_spoiled`.
        name: printable; perhaps not what its creator called it.
        maker: who made it, as text.
    """

    record: int
    name: str
    maker: str


class PlaceInfo(NamedTuple):
    """A process that uses channels of the region, as it describes itself.

    Attributes:
        place: its number in the area's table.
        state: "at work", or "silent": no sign of life for the lease: stopped, paused or dead.
        id: of its endpoint; several processes can have one id.
        vector: at which it is rung; None: it cannot be rung, and polls.
        process: its PID, in its own namespace.
        name: printable.
    """

    place: int
    state: str
    id: int
    vector: int | None
    process: int
    name: str
