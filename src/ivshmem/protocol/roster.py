"""Protocol version 0 between an ivshmem server and its clients, without I/O.

Knows: framing, what may follow what (Session), who must be told what next (Roster).
Does not know: sockets, processes, clocks; a descriptor is an opaque value, passed on, never closed.

Invariants:
1. An object that raised ProtocolError is of no further use.
2. The roster never drops and never reorders: what a client must still be told is the difference
   between what it was told and what is true now.
3. One leave for each announced id, none for another; an id that a connected client was ever told
   of is not given out again while that client stays (QEMU's use-after-free and double free).

Source: QEMU, docs/specs/ivshmem-spec.rst, "Client-Server protocol".
"""

from __future__ import annotations

import enum
import heapq
import struct
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable, Mapping, Sequence, Sized
from itertools import islice

from .counting import counted
from .errors import NoFreeId, ProtocolError
from .limits import MAX_ID as MAX_ID
from .limits import MAX_VECTORS as MAX_VECTORS
from .named import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

VERSION = 0
MEMORY = -1  # the message value that brings the region's descriptor

_MESSAGE = struct.Struct("<q")
_GREETED = 3  # messages in a greeting


# -- framing --------------------------------------------------------------------------------------


class Message(NamedTuple):
    """One message: a value, and the descriptors that came with it (none or one, if all is well)."""

    value: int
    fds: tuple[Any, ...] = ()


def encode(value: int) -> bytes:
    """The 8 bytes of a message: a signed little-endian integer."""
    return _MESSAGE.pack(value)


class Framer:
    """Puts messages together from chunks as they come off the socket, however they were cut."""

    def __init__(self) -> None:
        self._data = b""
        self._fds: tuple[Any, ...] = ()

    @property
    def partial(self) -> bool:
        """Whether a message has begun and not ended."""
        return bool(self._data)

    @property
    def held(self) -> tuple[Any, ...]:
        """Descriptors that came with the message that has not ended."""
        return self._fds

    def after(self, data: bytes, fds: tuple[Any, ...]) -> tuple[Framer, Iterable[Message]]:
        """What `feed` does, but this stays as it is: the framer that it would be, and messages."""
        if not self._data and len(data) == _MESSAGE.size:
            return self, [Message(_MESSAGE.unpack(data)[0], fds)]
        framer = Framer()
        framer._data, framer._fds = self._data, self._fds
        return framer, framer.feed(data, fds)

    def feed(self, data: bytes, fds: tuple[Any, ...] = ()) -> Iterable[Message]:
        """Take a chunk and yield the messages that it ends.

        `fds` belong to the message that holds the chunk's last byte: the kernel never reads past a
        byte that carried descriptors.
        """
        if not self._data and len(data) == _MESSAGE.size:
            return [Message(_MESSAGE.unpack(data)[0], fds)]
        if not data:
            return []
        data = self._data + data
        whole = len(data) // _MESSAGE.size
        messages = [Message(value) for (value,) in _MESSAGE.iter_unpack(data[: whole * 8])]
        self._data = data[whole * 8 :]
        if self._data:
            earlier, self._fds = self._fds, fds if messages else self._fds + fds
        else:
            earlier, self._fds = self._fds, ()
            messages[-1] = Message(messages[-1].value, fds)
        if messages and earlier:
            messages[0] = Message(messages[0].value, earlier + messages[0].fds)
        return messages


# -- the client's side ----------------------------------------------------------------------------


class State(enum.Enum):
    """Where a session stands; each member says what must come next."""

    VERSION = enum.auto()  # the server's protocol version
    ID = enum.auto()  # this client's own id
    MEMORY = enum.auto()  # the region's descriptor
    SETUP = enum.auto()  # vectors of the peers that are there, then this client's own
    READY = enum.auto()  # peers that join and leave
    FAILED = enum.auto()  # nothing: a ProtocolError was raised


_AFTER = {State.VERSION: State.ID, State.ID: State.MEMORY, State.MEMORY: State.SETUP}


class GotMemory(NamedTuple):
    """The region's descriptor arrived; the receiver of this owns it."""

    fd: Any


class GotVector(NamedTuple):
    """The next vector of `peer`, which may be this client's own id; the receiver owns `fd`.

    `whole` says that the peer's last vector came with it, so that it counts as joined.
    """

    peer: int
    vector: int
    fd: Any
    whole: bool


class GotLeave(NamedTuple):
    """A peer left. `whole` says whether it had counted as joined."""

    peer: int
    whole: bool


class Session:
    """What a client knows from the messages of its server.

    Args:
        vectors: how many vectors each peer must have, where that is known beforehand.

    The protocol tells neither the number of vectors nor the end of set-up. Both are known once
    somebody else was announced completely: everyone has as many vectors as that peer. An only
    client learns them from end_setup(), which its owner calls when nothing more is to come.
    """

    def __init__(self, vectors: int | None = None) -> None:
        self.state = State.VERSION
        self.id = -1
        self._expected = vectors
        self._vectors = vectors
        self._guessed = False  # the number of vectors follows from silence
        self._counts: dict[int, int] = {}  # vectors that each peer was announced with so far
        self._last = -1  # the id in the last message of the set-up
        # The last message, and what it was received in: see `again`.
        self._before: tuple[Any, ...] = (None,)

    @property
    def vectors(self) -> int | None:
        """How many vectors each peer has; None while that is not known."""
        return self._vectors

    @property
    def peers(self) -> list[int]:
        """Ids of the other peers that have joined, in ascending order."""
        # A copy, since another thread may take in a message at the same time.
        counts = list(self._counts.items())
        return sorted(p for p, n in counts if p != self.id and n == self._vectors)

    def receive(self, message: Message) -> GotMemory | GotVector | GotLeave | None:
        """Take one message and say what it means.

        Raises:
            ProtocolError: it must not stand here. The state is FAILED then, and the descriptors of
                the message still belong to the caller.
        """
        if self.state is State.FAILED:
            raise ProtocolError("the session has failed before")
        before = self.state
        count = self._counts.get(message.value)
        self._before = (message, before, self.id, self._vectors, self._last, count)
        self.state = State.FAILED
        event = self._receive(before, message)
        if self.state is State.FAILED:
            self.state = _AFTER.get(before, before)
        return event

    def again(self, message: Message) -> None:
        """Be told that this message is received next, perhaps once more.

        The handler of a signal can raise in the middle of `receive`, or before its caller has done
        what follows. If this message was the last one, all is as it was before it.
        """
        if self._before[0] is message:
            _, self.state, self.id, self._vectors, self._last, count = self._before
            if count is None:
                self._counts.pop(message.value, None)
            else:
                self._counts[message.value] = count

    def _receive(self, state: State, message: Message) -> GotMemory | GotVector | GotLeave | None:
        value, fds = message
        if len(fds) > 1:
            raise ProtocolError(f"message {value} came with {len(fds)} descriptors, not 0 or 1")
        if state is State.VERSION:
            if fds or value != VERSION:
                raise ProtocolError(
                    f"the server speaks protocol version {value}, this client only {VERSION}"
                    if not fds
                    else "the server began with a descriptor instead of its protocol version"
                )
        elif state is State.ID:
            if fds or not 0 <= value <= MAX_ID:
                raise ProtocolError(f"the server gave id {value}, allowed are 0 to {MAX_ID}")
            self.id = value
        elif state is State.MEMORY:
            if value != MEMORY or not fds:
                raise ProtocolError(
                    f"expected the memory (message {MEMORY} with a descriptor), got message {value}"
                    f" with {len(fds)}"
                )
            return GotMemory(fds[0])
        elif not 0 <= value <= MAX_ID:
            raise ProtocolError(f"message {value} is no peer id, allowed are 0 to {MAX_ID}")
        elif fds:
            return self._vector(state, value, fds[0])
        else:
            return self._leave(value)
        return None

    def _vector(self, state: State, peer: int, fd: Any) -> GotVector:
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
        self.state = State.READY if whole and peer == self.id else state
        return GotVector(peer, number, fd, whole)

    def refuse(self, peer: int) -> None:
        """Be told that the descriptor of the last GotVector, one of `peer`, cannot be used.

        The vector does not count, so that `peers` lacks a peer of which nobody is told. The state
        is FAILED then.
        """
        self.state = State.FAILED
        self._counts[peer] -= 1

    def _leave(self, peer: int) -> GotLeave | None:
        if peer == self.id:
            raise ProtocolError(f"the server says that this client itself ({peer}) has left")
        if self._last == peer:
            self._last = -1  # cut short: its group says nothing about the number of vectors
        count = self._counts.pop(peer, 0)
        if not count:
            return None  # the example server does that when there are no vectors
        return GotLeave(peer, count == self._vectors)

    def _close_group(self, peer: int) -> None:
        """Learn the number of vectors when the first group of messages has ended."""
        if self._vectors is None and self._last not in (-1, peer):
            self._vectors = self._counts[self._last]
        self._last = peer

    def end_setup(self, *, guessed: bool = False) -> None:
        """Be told that set-up is over: in state SETUP this client has all its vectors.

        `guessed`: this follows only from the server's silence; should more vectors of this client
        come after all, they count until somebody else is announced, who has as many as were known
        then. In states after SETUP nothing changes.

        Raises:
            ProtocolError: they are not as many as were expected. The state is FAILED then.
        """
        if self.state is not State.SETUP:
            return
        own = self._counts.get(self.id, 0)
        if self._expected not in (None, own):
            self.state = State.FAILED
            raise ProtocolError(
                f"the server gave {counted(own, 'vector')}, {self._expected} were expected"
            )
        if not guessed:
            self._vectors = own
        elif self._vectors is None:
            self._vectors = self._counts.get(self._last, 0)  # of the only one announced so far
        self._guessed = guessed
        self.state = State.READY


# -- the server's side ----------------------------------------------------------------------------


class Run(NamedTuple):
    """`length` messages of one value, carrying fds[first], fds[first + 1].. (None: nothing)."""

    value: int
    fds: Sized | None
    first: int
    length: int
    member: Member | None = None  # whose vectors these are, if they are any


class Standing:
    """What somebody was told; one object for all who were told the same."""

    __slots__ = ("current", "cut", "greeted", "held", "leaves", "owed", "partial", "told")

    def __init__(self, greeted: int = 0) -> None:
        self.greeted = greeted  # messages of the greeting (version, id, memory) that were sent
        self.told = -1  # everyone in the order of joins up to here was announced
        self.current: Member | None = None  # the one that is being announced,
        self.partial = 0  # with so many vectors so far;
        self.cut: int | None = None  # the id of one that left before it was announced wholly
        self.owed: deque[int] = deque()  # ids that were announced and have left since
        self.leaves = 0  # how many of those were sent,
        self.held = 0  # and how many never will be

    def knows(self, other: Member) -> bool:
        """Whether any message about `other` was sent."""
        return not other.secret and (other.serial <= self.told or self.current is other)

    def copy(self) -> Standing:
        """The same, to become another's."""
        other = Standing(self.greeted)
        other.told, other.current, other.partial = self.told, self.current, self.partial
        other.cut = self.cut
        other.owed = self.owed.copy()
        other.leaves, other.held = self.leaves, self.held
        return other


class Member:
    """A client as the roster sees it: who it is, and what it was told."""

    __slots__ = (
        "announcement",
        "holds",
        "id",
        "leaves_before",
        "memory",
        "muted",
        "secret",
        "serial",
        "standing",
        "vectors",
    )

    def __init__(
        self,
        peer_id: int,
        serial: int,
        vectors: Sized,
        memory: Sized,
        *,
        secret: bool = False,
        holds: bool = False,
    ) -> None:
        self.id = peer_id
        self.serial = serial  # its place in the order of joins
        self.memory = memory
        self.secret = secret  # the others are not told of it
        self.holds = holds  # it is never told that anybody left
        self.muted = False  # it is sent nothing for now
        self.leaves_before = 0  # leaves that it was sent, less those of its standing
        self.standing = Standing()
        self.give_vectors(vectors)

    def give_vectors(self, vectors: Sized) -> None:
        """Have others than before."""
        self.vectors = vectors
        self.announcement = Run(self.id, vectors, 0, len(vectors), self)


class Roster:
    """Who is connected to a server, and what each must be sent next.

    A member was told of everyone up to a position in the order of joins. What it must be sent is
    therefore: the rest of its greeting, the rest of the announcement it is in the middle of, leaves
    of those it knows, and whoever stands after its position. It needs memory only for leaves that
    it has not read yet, and those are of members it was told of: bounded by their number.

    Those who were told everything are the crowd. They share one standing, and what is new is the
    same for all of them, so that who sends can work it out once: `news`. Who takes only a part of
    it is `split` off, and comes back when it was told everything again.

    Two kinds of members are never in the crowd, both for QEMU's sake. A member that `holds` is
    never told that another one left: QEMU can crash when a device is unplugged that was told of a
    leave. If another one leaves when such a member was told of some of its vectors only, the rest
    follows with descriptors that are nobody's, since a client learns from an announcement how many
    vectors everybody has. A member that is `muted` is sent nothing once it is set up, until
    `unmute`: QEMU can crash if a message comes while the device is being unplugged. Then it is
    told the difference, as any member is that did not read for so long.

    All this depends on nothing but what the roster was told, in the same order: who keeps a record
    of that can have the same roster again.

    Args:
        vectors: of every member, 0..2048.
        memory: the region's descriptor, as a collection of one.
        nobody: a descriptor by which nobody is reached, as a collection of one.
        shared_id: the clients are one peer to the world: they all have this id, and are not told
            of one another but only of those who are announced by `admit`.
    """

    def __init__(
        self, vectors: int, memory: Sized, nobody: Sized, *, shared_id: int | None = None
    ) -> None:
        if not 0 <= vectors <= MAX_VECTORS:
            raise ValueError(f"{vectors} vectors: allowed are 0 to {MAX_VECTORS}")
        self.vectors = vectors
        self._memory = memory
        self._nobody = nobody
        self._shared_id = shared_id
        self._order: list[Member] = []  # who is connected, in the order of joins
        self._crowd = Standing(_GREETED)
        self.crowd: dict[int, Member] = {}  # by serial, in the order in which they came to it
        self.others: dict[int, Member] = {}  # those who are not in the crowd
        self._serial = 0  # of the next to join
        self._unused = 0  # ids from here on were never given out
        self._free: list[int] = []  # ids that nobody connected was told of, as a heap
        self._known: deque[tuple[int, int]] = deque()  # (serial at the leave, id) of the others

    @property
    def members(self) -> Sequence[Member]:
        """Everyone connected, in the order of joins."""
        return self._order

    @property
    def full(self) -> bool:
        """Whether no id is left to give out."""
        return self.ids_left == 0

    @property
    def ids_left(self) -> int:
        """How many ids can be given out before somebody who stays has left."""
        return len(self._free) + MAX_ID + 1 - self._unused

    # -- joining and leaving ----------------------------------------------------------------------

    def join(self, vectors: Sized, memory: Sized | None = None, *, holds: bool = False) -> Member:
        """Admit a client with these vectors under the lowest id that is safe.

        Args:
            memory: the region's descriptor for this one, if it is another than the others'.
            holds: it is never to be told that somebody left.

        Raises:
            NoFreeId: there is none; nothing has changed.
        """
        if len(vectors) != self.vectors:
            raise ValueError(f"{counted(len(vectors), 'vector')} given, {self.vectors} wanted")
        if self._shared_id is not None:
            return self._append(self._shared_id, vectors, memory, secret=True, holds=holds)
        if self.full:
            raise NoFreeId(
                f"all {MAX_ID + 1} ids are taken or known to a connected peer"
                " (an id is free again when everyone who was told of it has left)"
            )
        if self._free:
            peer_id = heapq.heappop(self._free)
        else:
            peer_id = self._unused
            self._unused += 1
        return self._append(peer_id, vectors, memory, holds=holds)

    def become(self, shared_id: int) -> None:
        """Give another shared id to all who join from now on; nobody is here who has the old."""
        assert self._shared_id is not None
        assert not any(member.secret for member in self._order)
        self._shared_id = shared_id

    def admit(self, peer_id: int, vectors: Sized) -> Member:
        """With a shared id: let all clients ring a peer that is elsewhere, until it leaves.

        Whoever chooses the id sees to it that QEMU is no client, or that no id comes twice.
        """
        if self._shared_id is None or peer_id == self._shared_id or len(vectors) != self.vectors:
            raise ValueError(
                f"peer {peer_id} with {counted(len(vectors), 'vector')} cannot be admitted"
            )
        member = self._append(peer_id, vectors, None)
        del self.others[member.serial]  # nobody here sends to it
        return member

    def _append(
        self,
        peer_id: int,
        vectors: Sized,
        memory: Sized | None,
        *,
        secret: bool = False,
        holds: bool = False,
    ) -> Member:
        memory = self._memory if memory is None else memory
        member = Member(peer_id, self._serial, vectors, memory, secret=secret, holds=holds)
        self._serial += 1
        self._order.append(member)
        self.others[member.serial] = member
        return member

    @property
    def next_serial(self) -> int:
        """The number of who will be the next to join."""
        return self._serial

    def leave(self, member: Member) -> bool:
        """Remove a member; whether anybody must be told, now or when it reads again."""
        index = bisect_left(self._order, member.serial, key=lambda m: m.serial)
        if index == len(self._order) or self._order[index] is not member:
            raise ValueError(f"peer {member.id} is not connected")
        del self._order[index]
        self.others.pop(member.serial, None)
        self._out_of_crowd(member)
        standings = [(other.standing, other.holds) for other in self.others.values()]
        if self.crowd:
            standings.append((self._crowd, False))
        known = owed = False
        for standing, holds in standings:
            if standing.knows(member):
                if standing.current is member:
                    standing.current, standing.cut = None, member.id
                if self.vectors:
                    known = True
                    if holds:
                        standing.held += 1
                    else:
                        standing.owed.append(member.id)
                        owed = True
        if self._shared_id is not None:
            return owed  # no ids are given out
        if known:
            self._known.append((self._serial, member.id))
        else:
            heapq.heappush(self._free, member.id)
        # Whoever was told of an id was connected when its owner left. When the eldest joined later
        # than that, they have all gone.
        eldest = self._order[0].serial if self._order else self._serial
        while self._known and self._known[0][0] <= eldest:
            heapq.heappush(self._free, self._known.popleft()[1])
        return owed

    def hold(self, member: Member) -> None:
        """Tell a member from now on of nobody who has left, not even of those that it is owed."""
        self.split(member)
        member.holds = True
        standing = member.standing
        standing.held += len(standing.owed)
        standing.owed.clear()

    def mute(self, member: Member) -> None:
        """Send a member nothing, from the end of its set-up on; twice is as once."""
        self.split(member)
        member.muted = True

    def unmute(self, member: Member) -> None:
        """Send it again what it must be told: all that is different from what it knows."""
        if member.muted:
            member.muted = False
            self._to_crowd(member)

    @staticmethod
    def leaves_told(member: Member) -> int:
        """How many leaves a member was sent."""
        return member.leaves_before + member.standing.leaves

    # -- telling ----------------------------------------------------------------------------------

    def pending(self, member: Member, limit: int = 1024) -> list[Run]:
        """What to send to `member` next, in order: about `limit` messages, [] when it knows all."""
        standing = member.standing
        runs: list[Run] = []
        if member.muted and self.is_set_up(member):
            return runs
        if standing.greeted < _GREETED:
            greeting: list[Run] = [
                Run(VERSION, None, 0, 1),
                Run(member.id, None, 0, 1),
                Run(MEMORY, member.memory, 0, 1),
            ]
            runs = greeting[standing.greeted :]
        return runs + self._news(standing, member, limit - len(runs))

    def news(self, limit: int = 1024) -> list[Run]:
        """The same for all of the crowd."""
        return self._news(self._crowd, None, limit) if self.crowd else []

    def _news(self, standing: Standing, member: Member | None, limit: int) -> list[Run]:
        runs: list[Run] = []
        current = standing.current
        if current is not None:
            first = standing.partial
            runs.append(current.announcement._replace(first=first, length=self.vectors - first))
        if standing.cut is not None and member is not None and member.holds:
            rest = self.vectors - standing.partial
            runs += [Run(standing.cut, self._nobody, 0, 1)] * rest
        runs += [Run(peer, None, 0, 1) for peer in standing.owed]
        if not self.vectors:
            return runs  # nobody can be announced
        position = standing.told if current is None else current.serial
        start = bisect_right(self._order, position, key=lambda m: m.serial)
        room = max(limit - len(runs), 0) // self.vectors + 1
        if self._shared_id is None:
            news: Iterable[Member] = self._order[start : start + room]
        else:
            told = (m for m in self._order[start:] if not m.secret or m is member)
            news = islice(told, room)
        if member is not None and member.muted:  # only what belongs to its set-up
            news = (m for m in news if m.serial <= member.serial)
        runs += [m.announcement for m in news]
        return runs

    def sent(self, member: Member, runs: Sequence[Run], count: int) -> None:
        """Note that the first `count` messages of pending()'s `runs` went out.

        Nobody may have joined or left in between.
        """
        self.split(member)
        self._advance(member.standing, runs, count)
        self._to_crowd(member)

    def _to_crowd(self, member: Member) -> None:
        """Put a member into the crowd if it was told everything, as the crowd was."""
        apart = member.holds or member.muted
        if not apart and not self.pending(member, 1) and not self.news(1):
            if not self.crowd:
                self._crowd = member.standing
            member.leaves_before += member.standing.leaves - self._crowd.leaves
            # Equal but for some at the end who have left since, or are no business of theirs.
            self._crowd.told = max(self._crowd.told, member.standing.told)
            member.standing = self._crowd
            self.crowd[member.serial] = self.others.pop(member.serial)

    def sent_to_crowd(self, runs: Sequence[Run], count: int) -> None:
        """Note that each of the crowd was sent the first `count` messages of news()'s `runs`.

        Those who were not have been `split` off, which may have been everybody.
        """
        if self.crowd:
            self._advance(self._crowd, runs, count)

    def split(self, member: Member) -> None:
        """Take a member out of the crowd, if it is in it: it is told for itself from now on."""
        if member.serial in self.crowd:
            member.standing = self._crowd.copy()
            self.others[member.serial] = member
            self._out_of_crowd(member)

    def _out_of_crowd(self, member: Member) -> None:
        self.crowd.pop(member.serial, None)
        if not self.crowd:
            self._crowd = Standing(_GREETED)

    def _advance(self, standing: Standing, runs: Sequence[Run], count: int) -> None:
        if not count:
            return
        whole = count == sum(run.length for run in runs)
        if whole and standing.greeted == _GREETED and runs[-1].member is not None:
            # The usual case: all of it, which ends with somebody.
            standing.leaves += len(standing.owed)
            standing.owed.clear()
            standing.current = standing.cut = None
            standing.partial = runs[-1].first + runs[-1].length
            standing.told = runs[-1].member.serial
            return
        for run in runs:
            if count <= 0:
                break
            done = min(count, run.length)
            count -= done
            if run.member is not None:
                standing.partial = run.first + done
                whole = done == run.length
                standing.current = None if whole else run.member
                if whole:
                    standing.told = run.member.serial
            elif standing.greeted < _GREETED:
                standing.greeted += 1
            elif run.fds is None:
                if standing.owed.popleft() == standing.cut:
                    standing.cut = None
                standing.leaves += 1
            else:  # of one that was cut short
                standing.partial += done
                if standing.partial == self.vectors:
                    standing.cut = None

    def is_set_up(self, member: Member) -> bool:
        """Whether a member was sent all of its set-up, its own vectors included."""
        standing = member.standing
        return standing.greeted == _GREETED and (not self.vectors or standing.told >= member.serial)

    def backlog(self, member: Member) -> int:
        """How many messages `member` has still to be sent: `pending`'s, without making them.

        Of a muted one, those that it is sent after `unmute`, too.
        """
        standing = member.standing
        current = standing.current
        count = _GREETED - standing.greeted + len(standing.owed)
        if not self.vectors:
            return count
        if current is not None or (standing.cut is not None and member.holds):
            count += self.vectors - standing.partial
        position = standing.told if current is None else current.serial
        start = bisect_right(self._order, position, key=lambda m: m.serial)
        others = len(self._order) - start
        if self._shared_id is not None:
            others = sum(not m.secret or m is member for m in self._order[start:])
        return count + others * self.vectors

    # -- for a successor --------------------------------------------------------------------------

    def dump(self) -> dict[str, Any]:
        """All that the roster knows, but for descriptors, in what JSON can hold."""
        muted = [member.serial for member in self._order if member.muted]
        return {
            **({"muted": muted} if muted else {}),
            "serial": self._serial,
            "unused": self._unused,
            "free": self._free,
            "known": list(self._known),
            "crowd": list(self.crowd),
            "crowd_standing": _dump(self._crowd),
            "members": [
                [
                    *(m.id, m.serial, None if m.serial in self.crowd else _dump(m.standing)),
                    *(m.holds, m.leaves_before),
                ]
                for m in self._order
            ],
        }

    def load(self, state: Mapping[str, Any], vectors: Sized) -> None:
        """Become what `dump` said, with `vectors` for each member's, to be replaced later."""
        self._serial, self._unused = state["serial"], state["unused"]
        self._free = list(state["free"])
        self._known = deque((serial, peer) for serial, peer in state["known"])
        self._order = [
            Member(i, serial, vectors, self._memory, holds=holds)
            for i, serial, _, holds, _ in state["members"]
        ]
        members = {member.serial: member for member in self._order}
        self._crowd = _load(state["crowd_standing"], members)
        self.crowd = {serial: members[serial] for serial in state["crowd"]}
        self.others = {s: m for s, m in members.items() if s not in self.crowd}
        for _, serial, standing, _, leaves in state["members"]:
            members[serial].standing = self._crowd if standing is None else _load(standing, members)
            members[serial].leaves_before = leaves
        for serial in state.get("muted", ()):
            members[serial].muted = True


def _dump(standing: Standing) -> list[Any]:
    current = standing.current
    serial = None if current is None else current.serial
    return [
        *(standing.greeted, standing.told, serial, standing.partial, list(standing.owed)),
        *(standing.leaves, standing.held),
        *(() if standing.cut is None else (standing.cut,)),
    ]


def _load(state: Sequence[Any], members: Mapping[int, Member]) -> Standing:
    standing = Standing(state[0])
    standing.told, standing.partial = state[1], state[3]
    standing.current = None if state[2] is None else members[state[2]]
    standing.owed = deque(state[4])
    standing.leaves, standing.held = state[5:7]
    standing.cut = int(state[7]) if len(state) > 7 else None
    return standing
