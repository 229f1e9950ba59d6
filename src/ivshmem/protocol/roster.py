"""A server's side of protocol version 0: who must be told what next.

Does not know: sockets, processes, clocks; a descriptor is an opaque value, passed on, never closed.

Invariants:
1. The roster never drops and never reorders: what a client must still be told is the difference
   between what it was told and what is true now.
2. One leave for each announced id, none for another; an id that a connected client was ever told
   of is not given out again while that client stays (QEMU's use-after-free and double free).

Source: QEMU, docs/specs/ivshmem-spec.rst, "Client-Server protocol".
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable, Mapping, Sequence, Sized
from itertools import islice

from ..errors import NoFreeId
from ..system.named_tuple import NamedTuple
from ..text import counted
from .framing import MEMORY, VERSION
from .limits import MAX_ID, MAX_VECTORS
from .session import _GREETED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# -- the server's side ----------------------------------------------------------------------------


class Run(NamedTuple):
    """`length` messages of one value, carrying fds[first], fds[first + 1].. (None: nothing)."""

    value: int
    fds: Sized | None
    first: int
    length: int
    member: Member | None = None  # whose vectors these are, if they are any


class Told:
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

    def copy(self) -> Told:
        """The same, to become another's."""
        other = Told(self.greeted)
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
        self.standing = Told()
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
        self._crowd = Told(_GREETED)
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

    def _news(self, standing: Told, member: Member | None, limit: int) -> list[Run]:
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
            self._crowd = Told(_GREETED)

    def _advance(self, standing: Told, runs: Sequence[Run], count: int) -> None:
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


def _dump(standing: Told) -> list[Any]:
    current = standing.current
    serial = None if current is None else current.serial
    return [
        *(standing.greeted, standing.told, serial, standing.partial, list(standing.owed)),
        *(standing.leaves, standing.held),
        *(() if standing.cut is None else (standing.cut,)),
    ]


def _load(state: Sequence[Any], members: Mapping[int, Member]) -> Told:
    standing = Told(state[0])
    standing.told, standing.partial = state[1], state[3]
    standing.current = None if state[2] is None else members[state[2]]
    standing.owed = deque(state[4])
    standing.leaves, standing.held = state[5:7]
    standing.cut = int(state[7]) if len(state) > 7 else None
    return standing
