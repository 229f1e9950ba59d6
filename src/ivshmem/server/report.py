"""What a server says of its peers, and what it counts."""

from __future__ import annotations

from ..system.named_tuple import NamedTuple


class Peer(NamedTuple):
    """A peer as the server sees it.

    Attributes:
        id: 0..65535.
        pid, uid, gid: of the process that connected, at that time.
        process: its name; "?" where that cannot be known.
        vectors: how many it has.
        since: when it connected, seconds since the epoch.
    """

    id: int
    pid: int
    uid: int
    gid: int
    process: str
    vectors: int
    since: float


class PeerReport(NamedTuple):
    """How a peer stands at the moment.

    Attributes:
        peer: who it is.
        readonly: whether it was given memory that it can only read.
        set_up: whether it was sent its whole set-up.
        pending: messages that it must still be sent.
        stalled_since: if its socket is full: when the server could last put a message into it, in
            seconds since the epoch. None: its socket has room.
        interrupts: rings that it has not taken yet, for each vector; () if that was not asked for.
        leaves_told: how often it was told that a peer left.
        leaves_held: how often it was not, and never will be: see Server.hold_leaves.
        held: whether it is sent nothing for now: see Server.hold.
        held_until: seconds since the epoch, if that ends by itself.
    """

    peer: Peer
    readonly: bool
    set_up: bool
    pending: int
    stalled_since: float | None
    interrupts: tuple[int, ...]
    leaves_told: int = 0
    leaves_held: int = 0
    held: bool = False
    held_until: float | None = None


class ServerCounts(NamedTuple):
    """How often something has happened since the server began; a successor continues the counts.

    Attributes:
        joins, leaves: of peers.
        messages: of the ivshmem protocol that were sent, over all peers.
        refused: connections that the gate refused.
        starved: times that sending had to wait for memory or for descriptors.
    """

    joins: int = 0
    leaves: int = 0
    messages: int = 0
    refused: int = 0
    starved: int = 0
