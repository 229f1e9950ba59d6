"""A client's side of protocol version 0: which message may follow which.

Knows: set-up, peers, vectors. Does not know: sockets; a descriptor is an opaque value.

Invariants:
1. An object that raised ProtocolError cannot be used any more.
"""

from __future__ import annotations

import enum

from ..errors import ProtocolError
from ..system.named_tuple import NamedTuple
from ..text import counted
from .framing import MEMORY, VERSION, Message
from .limits import MAX_ID, MAX_VECTORS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_GREETED = 3  # messages in a greeting


# -- the client's side ----------------------------------------------------------------------------


class SessionState(enum.Enum):
    """The state of a session; each member says what must come next."""

    VERSION = enum.auto()  # the server's protocol version
    ID = enum.auto()  # this client's own id
    MEMORY = enum.auto()  # the region's descriptor
    SETUP = enum.auto()  # vectors of the peers that are connected, then this client's own
    READY = enum.auto()  # peers that join and leave
    FAILED = enum.auto()  # nothing: a ProtocolError was raised


_AFTER = {
    SessionState.VERSION: SessionState.ID,
    SessionState.ID: SessionState.MEMORY,
    SessionState.MEMORY: SessionState.SETUP,
}


class GotMemory(NamedTuple):
    """The region's descriptor arrived; the receiver of this owns it."""

    fd: Any


class GotVector(NamedTuple):
    """The next vector of `peer`, which may be this client's own id; the receiver owns `fd`.

    `whole`: this is the peer's last vector, so that the peer counts as joined.
    """

    peer: int
    vector: int
    fd: Any
    whole: bool


class GotLeave(NamedTuple):
    """A peer left. `whole`: it had counted as joined."""

    peer: int
    whole: bool


class Session:
    """What a client knows from the messages of its server.

    Args:
        vectors: how many vectors each peer must have, if that is known beforehand.

    The protocol tells neither the number of vectors nor the end of the set-up. Both are known once
    another peer was announced completely, because all peers have the same number of vectors. An
    only client learns them from end_setup(), which its owner calls when nothing more will come.
    """

    def __init__(self, vectors: int | None = None) -> None:
        self.state = SessionState.VERSION
        self.id = -1
        self._expected = vectors
        self._vectors = vectors
        self._guessed = False  # the number of vectors was guessed from the server's silence
        self._counts: dict[int, int] = {}  # vectors that each peer was announced with so far
        self._last = -1  # the id in the last message of the set-up
        # The last message, and the state before it: see `before_receive`.
        self._before: tuple[Any, ...] = (None,)

    @property
    def vectors(self) -> int | None:
        """How many vectors each peer has; None: that is not known yet."""
        return self._vectors

    @property
    def peers(self) -> list[int]:
        """The ids of the other peers that have joined, ascending."""
        # A copy: another thread may take in a message at the same time.
        counts = list(self._counts.items())
        return sorted(p for p, n in counts if p != self.id and n == self._vectors)

    def receive(self, message: Message) -> GotMemory | GotVector | GotLeave | None:
        """Take one message, and return what it means; None: nothing.

        Raises:
            ProtocolError: the message must not come here. The state is FAILED then, and the
                descriptors of the message still belong to the caller.
        """
        if self.state is SessionState.FAILED:
            raise ProtocolError("the session has failed before")
        before = self.state
        count = self._counts.get(message.value)
        self._before = (message, before, self.id, self._vectors, self._last, count)
        self.state = SessionState.FAILED
        event = self._receive(before, message)
        if self.state is SessionState.FAILED:
            self.state = _AFTER.get(before, before)
        return event

    def before_receive(self, message: Message) -> None:
        """Prepare to receive this message, perhaps a second time.

        A signal handler can raise in the middle of `receive`, or before its caller has used the
        result. If this message was received last, the state before it is restored.
        """
        if self._before[0] is message:
            _, self.state, self.id, self._vectors, self._last, count = self._before
            if count is None:
                self._counts.pop(message.value, None)
            else:
                self._counts[message.value] = count

    def _receive(
        self, state: SessionState, message: Message
    ) -> GotMemory | GotVector | GotLeave | None:
        value, fds = message
        if len(fds) > 1:
            raise ProtocolError(f"message {value} came with {len(fds)} descriptors, not 0 or 1")
        if state is SessionState.VERSION:
            if fds or value != VERSION:
                raise ProtocolError(
                    f"the server speaks protocol version {value}, this client only {VERSION}"
                    if not fds
                    else "the server began with a descriptor instead of its protocol version"
                )
        elif state is SessionState.ID:
            if fds or not 0 <= value <= MAX_ID:
                raise ProtocolError(f"the server gave id {value}, allowed are 0 to {MAX_ID}")
            self.id = value
        elif state is SessionState.MEMORY:
            if value != MEMORY or not fds:
                raise ProtocolError(
                    f"expected the memory (message {MEMORY} with a descriptor), got message {value}"
                    f" with {len(fds)}"
                )
            return GotMemory(fds[0])
        elif not 0 <= value <= MAX_ID:
            raise ProtocolError(f"message {value} is not a peer id (0 to {MAX_ID})")
        elif fds:
            return self._vector(state, value, fds[0])
        else:
            return self._leave(value)
        return None

    def _vector(self, state: SessionState, peer: int, fd: Any) -> GotVector:
        self._close_group(peer)
        number = self._counts.get(peer, 0)
        if self._guessed and peer == self.id and self._counts.keys() <= {peer}:
            self._vectors = max(self._vectors or 0, number + 1)
        if self._vectors is not None and number >= self._vectors:
            raise ProtocolError(
                f"peer {peer} was announced with more than {counted(self._vectors, 'vector')}"
            )
        if number >= MAX_VECTORS:
            raise ProtocolError(f"peer {peer} was announced with more than {MAX_VECTORS} vectors")
        self._counts[peer] = number + 1
        whole = number + 1 == self._vectors
        self.state = SessionState.READY if whole and peer == self.id else state
        return GotVector(peer, number, fd, whole)

    def refuse(self, peer: int) -> None:
        """Take back the last GotVector, one of `peer`: its descriptor cannot be used.

        The vector does not count, so that `peers` does not list a peer that was never reported. The
        state is FAILED then.
        """
        self.state = SessionState.FAILED
        self._counts[peer] -= 1

    def _leave(self, peer: int) -> GotLeave | None:
        if peer == self.id:
            raise ProtocolError(f"the server says that this client itself ({peer}) has left")
        if self._last == peer:
            self._last = -1  # cut short: it does not tell the number of vectors
        count = self._counts.pop(peer, 0)
        if not count:
            return None  # the example server does this if there are no vectors
        return GotLeave(peer, count == self._vectors)

    def _close_group(self, peer: int) -> None:
        """Learn the number of vectors when the first group of messages has ended."""
        if self._vectors is None and self._last not in (-1, peer):
            self._vectors = self._counts[self._last]
        self._last = peer

    def end_setup(self, *, guessed: bool = False) -> None:
        """End the set-up: in state SETUP this client has all its vectors.

        `guessed`: this follows only from the server's silence. If more vectors of this client come
        later, they count until another peer is announced, which must have as many as were known
        then. In states after SETUP nothing changes.

        Raises:
            ProtocolError: there are not as many as were expected. The state is FAILED then.
        """
        if self.state is not SessionState.SETUP:
            return
        own = self._counts.get(self.id, 0)
        if self._expected not in (None, own):
            self.state = SessionState.FAILED
            raise ProtocolError(
                f"the server gave {counted(own, 'vector')}, {self._expected} were expected"
            )
        if not guessed:
            self._vectors = own
        elif self._vectors is None:
            self._vectors = self._counts.get(self._last, 0)  # of the only one announced so far
        self._guessed = guessed
        self.state = SessionState.READY
