"""A server's side of protocol version 0: which client must be sent which message next.

Does not know: sockets, processes, clocks; a descriptor is an opaque value, passed on, never closed.

Invariants:
1. The roster never drops and never reorders messages: what a client must still be sent is the
   difference between what it was told and what is true now.
2. A client is sent one leave for each id that was announced to it, and none for others. An id that
   a connected client was ever told of is not given out again while that client stays: QEMU would
   use memory after it freed it, or free it twice.

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
    """What a member was told; members that were told the same share one object."""

    __slots__ = (
        "current",
        "cut_short",
        "greeted",
        "leaves_due",
        "leaves_held",
        "leaves_sent",
        "partial",
        "up_to",
    )

    def __init__(self, greeted: int = 0) -> None:
        self.greeted = greeted  # messages of the greeting (version, id, memory) that were sent
        self.up_to = -1  # the serial of the last member that was announced wholly
        self.current: Member | None = None  # the member that is being announced,
        self.partial = 0  # and how many of its vectors were sent
        self.cut_short: int | None = (
            None  # the id of a member that left before it was announced wholly
        )
        self.leaves_due: deque[int] = (
            deque()
        )  # ids that were announced, and whose members left since
        self.leaves_sent = 0  # how many of those leaves were sent,
        self.leaves_held = 0  # and how many will never be sent

    def knows(self, other: Member) -> bool:
        """Whether any message about `other` was sent."""
        return not other.unannounced and (other.serial <= self.up_to or self.current is other)

    def copy(self) -> Told:
        """Return a copy, which another member can change."""
        other = Told(self.greeted)
        other.up_to, other.current, other.partial = self.up_to, self.current, self.partial
        other.cut_short = self.cut_short
        other.leaves_due = self.leaves_due.copy()
        other.leaves_sent, other.leaves_held = self.leaves_sent, self.leaves_held
        return other


class Member:
    """A connected client: its id, its vectors, and what it was told."""

    __slots__ = (
        "announcement",
        "id",
        "leaves_before",
        "memory",
        "no_leaves",
        "paused",
        "serial",
        "told",
        "unannounced",
        "vectors",
    )

    def __init__(
        self,
        peer_id: int,
        serial: int,
        vectors: Sized,
        memory: Sized,
        *,
        unannounced: bool = False,
        no_leaves: bool = False,
    ) -> None:
        self.id = peer_id
        self.serial = serial  # its place in the order of joins
        self.memory = memory
        self.unannounced = unannounced  # the other members are not told of it
        self.no_leaves = no_leaves  # it is never told that a member left
        self.paused = False  # it is sent nothing for now
        self.leaves_before = 0  # leaves that it was sent, less those in `told`
        self.told = Told()
        self.give_vectors(vectors)

    def give_vectors(self, vectors: Sized) -> None:
        """Replace the vectors, after a replay, when the real descriptors are known."""
        self.vectors = vectors
        self.announcement = Run(self.id, vectors, 0, len(vectors), self)


class Roster:
    """The members of a server, and what each must be sent next.

    Each member was told of all members up to a position in the order of joins. So it must be sent:
    the rest of its greeting, the rest of the announcement that was begun, the leaves of members
    that it knows, and the members behind its position. The roster needs memory only for leaves that
    a member has not read yet. Their number is bounded by the number of members it was told of.

    The members that were told everything are `caught_up`. They share one Told object, and the next
    messages are the same for all of them, so that the sender computes these once:
    `messages_to_all`. A member that takes only a part of them is told singly (`tell_singly`), until
    it has caught up again.

    Two kinds of members are always told singly, both because of faults of QEMU. A member with
    `no_leaves` is never told that another one left: QEMU can crash when a device that was told of
    a leave is unplugged. If a member leaves after such a member was told of some of its vectors
    only, the other vectors follow with descriptors that reach no peer, because a client learns from
    an announcement how many vectors each peer has. A member that is `paused` is sent nothing once
    it is set up, until `resume`: QEMU can crash if a message comes while the device is being
    unplugged. Then it is told the difference, as any member that has not read for a while.

    The state depends only on the calls and their order: from a record of these, a successor makes
    the same roster again.

    Args:
        vectors: of each member, 0..2048.
        memory: the region's descriptor, as a collection of one.
        nobody: a descriptor that reaches no peer, as a collection of one.
        shared_id: to other peers the clients are one peer. They all have this id, and are told
            only of the peers that `announce_remote` adds, not of one another.
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
        self._order: list[Member] = []  # the members, in the order of joins
        self._told_to_all = Told(_GREETED)
        self.caught_up: dict[int, Member] = {}  # by serial, in the order of catching up
        self.told_singly: dict[int, Member] = {}  # the other members, by serial
        self._serial = 0  # of the next member
        self._unused = 0  # ids from here on were never given out
        self._free: list[int] = []  # ids that no member was told of, as a heap
        self._known: deque[tuple[int, int]] = deque()  # (serial at the leave, id) of other free ids

    @property
    def members(self) -> Sequence[Member]:
        """The members, in the order of joins."""
        return self._order

    @property
    def full(self) -> bool:
        """Whether all ids are in use or known to a member."""
        return self.ids_left == 0

    @property
    def ids_left(self) -> int:
        """How many ids can be given out before a member has to leave."""
        return len(self._free) + MAX_ID + 1 - self._unused

    # -- joining and leaving ----------------------------------------------------------------------

    def join(
        self, vectors: Sized, memory: Sized | None = None, *, no_leaves: bool = False
    ) -> Member:
        """Add a client with these vectors under the lowest id that is safe.

        Args:
            memory: the region's descriptor for this client, if it differs from the others'.
            no_leaves: never tell it that a member left.

        Raises:
            NoFreeId: there is none; nothing has changed.
        """
        if len(vectors) != self.vectors:
            raise ValueError(f"{counted(len(vectors), 'vector')} given, {self.vectors} wanted")
        if self._shared_id is not None:
            return self._append(
                self._shared_id, vectors, memory, unannounced=True, no_leaves=no_leaves
            )
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
        return self._append(peer_id, vectors, memory, no_leaves=no_leaves)

    def change_shared_id(self, shared_id: int) -> None:
        """Give another shared id to clients that join from now on; no client has the old one."""
        assert self._shared_id is not None
        assert not any(member.unannounced for member in self._order)
        self._shared_id = shared_id

    def announce_remote(self, peer_id: int, vectors: Sized) -> Member:
        """With a shared id: announce a peer of another machine to all clients, until it leaves.

        The caller makes sure that QEMU is not a client, or that it uses no id twice.
        """
        if self._shared_id is None or peer_id == self._shared_id or len(vectors) != self.vectors:
            raise ValueError(
                f"peer {peer_id} with {counted(len(vectors), 'vector')} cannot be admitted"
            )
        member = self._append(peer_id, vectors, None)
        del self.told_singly[member.serial]  # it has no connection here
        return member

    def _append(
        self,
        peer_id: int,
        vectors: Sized,
        memory: Sized | None,
        *,
        unannounced: bool = False,
        no_leaves: bool = False,
    ) -> Member:
        memory = self._memory if memory is None else memory
        member = Member(
            peer_id, self._serial, vectors, memory, unannounced=unannounced, no_leaves=no_leaves
        )
        self._serial += 1
        self._order.append(member)
        self.told_singly[member.serial] = member
        return member

    @property
    def next_serial(self) -> int:
        """The serial of the next member."""
        return self._serial

    def leave(self, member: Member) -> bool:
        """Remove a member; return whether another one must be told, now or when it reads again."""
        index = bisect_left(self._order, member.serial, key=lambda m: m.serial)
        if index == len(self._order) or self._order[index] is not member:
            raise ValueError(f"peer {member.id} is not connected")
        del self._order[index]
        self.told_singly.pop(member.serial, None)
        self._leave_caught_up(member)
        all_told = [(other.told, other.no_leaves) for other in self.told_singly.values()]
        if self.caught_up:
            all_told.append((self._told_to_all, False))
        known = due = False
        for told, no_leaves in all_told:
            if told.knows(member):
                if told.current is member:
                    told.current, told.cut_short = None, member.id
                if self.vectors:
                    known = True
                    if no_leaves:
                        told.leaves_held += 1
                    else:
                        told.leaves_due.append(member.id)
                        due = True
        if self._shared_id is not None:
            return due  # no ids are given out
        if known:
            self._known.append((self._serial, member.id))
        else:
            heapq.heappush(self._free, member.id)
        # All members that were told of an id were connected when its owner left. If the oldest
        # member joined later than that, all of them have left.
        eldest = self._order[0].serial if self._order else self._serial
        while self._known and self._known[0][0] <= eldest:
            heapq.heappush(self._free, self._known.popleft()[1])
        return due

    def stop_leaves(self, member: Member) -> None:
        """Send a member no more leaves, not even those that are due."""
        self.tell_singly(member)
        member.no_leaves = True
        told = member.told
        told.leaves_held += len(told.leaves_due)
        told.leaves_due.clear()

    def pause(self, member: Member) -> None:
        """Send a member nothing once it is set up, until `resume`. Can be repeated."""
        self.tell_singly(member)
        member.paused = True

    def resume(self, member: Member) -> None:
        """End `pause`: the member must be sent the difference to what it was told."""
        if member.paused:
            member.paused = False
            self._catch_up(member)

    @staticmethod
    def leaves_told(member: Member) -> int:
        """Return how many leaves a member was sent."""
        return member.leaves_before + member.told.leaves_sent

    # -- telling ----------------------------------------------------------------------------------

    def pending(self, member: Member, limit: int = 1024) -> list[Run]:
        """Return what to send to `member` next, about `limit` messages; []: it was told all."""
        told = member.told
        runs: list[Run] = []
        if member.paused and self.is_set_up(member):
            return runs
        if told.greeted < _GREETED:
            greeting: list[Run] = [
                Run(VERSION, None, 0, 1),
                Run(member.id, None, 0, 1),
                Run(MEMORY, member.memory, 0, 1),
            ]
            runs = greeting[told.greeted :]
        return runs + self._messages(told, member, limit - len(runs))

    def messages_to_all(self, limit: int = 1024) -> list[Run]:
        """Return the same for all members that have caught up."""
        return self._messages(self._told_to_all, None, limit) if self.caught_up else []

    def _messages(self, told: Told, member: Member | None, limit: int) -> list[Run]:
        runs: list[Run] = []
        current = told.current
        if current is not None:
            first = told.partial
            runs.append(current.announcement._replace(first=first, length=self.vectors - first))
        if told.cut_short is not None and member is not None and member.no_leaves:
            rest = self.vectors - told.partial
            runs += [Run(told.cut_short, self._nobody, 0, 1)] * rest
        runs += [Run(peer, None, 0, 1) for peer in told.leaves_due]
        if not self.vectors:
            return runs  # protocol version 0 announces peers by their vectors
        position = told.up_to if current is None else current.serial
        start = bisect_right(self._order, position, key=lambda m: m.serial)
        room = max(limit - len(runs), 0) // self.vectors + 1
        if self._shared_id is None:
            newcomers: Iterable[Member] = self._order[start : start + room]
        else:
            announced = (m for m in self._order[start:] if not m.unannounced or m is member)
            newcomers = islice(announced, room)
        if member is not None and member.paused:  # only what is part of its set-up
            newcomers = (m for m in newcomers if m.serial <= member.serial)
        runs += [m.announcement for m in newcomers]
        return runs

    def sent(self, member: Member, runs: Sequence[Run], count: int) -> None:
        """Note that the first `count` messages of pending()'s `runs` were sent.

        No member may join or leave between the two calls.
        """
        self.tell_singly(member)
        self._advance(member.told, runs, count)
        self._catch_up(member)

    def _catch_up(self, member: Member) -> None:
        """Move a member to those that have caught up, if it was told everything."""
        apart = member.no_leaves or member.paused
        if not apart and not self.pending(member, 1) and not self.messages_to_all(1):
            if not self.caught_up:
                self._told_to_all = member.told
            member.leaves_before += member.told.leaves_sent - self._told_to_all.leaves_sent
            # The two differ only in members at the end that have left, or are not announced.
            self._told_to_all.up_to = max(self._told_to_all.up_to, member.told.up_to)
            member.told = self._told_to_all
            self.caught_up[member.serial] = self.told_singly.pop(member.serial)

    def sent_to_all(self, runs: Sequence[Run], count: int) -> None:
        """Note that all that had caught up were sent `count` messages of `messages_to_all`.

        Members that were not are told singly by now; these may be all members.
        """
        if self.caught_up:
            self._advance(self._told_to_all, runs, count)

    def tell_singly(self, member: Member) -> None:
        """Track what a member is told by itself from now on, if it had caught up."""
        if member.serial in self.caught_up:
            member.told = self._told_to_all.copy()
            self.told_singly[member.serial] = member
            self._leave_caught_up(member)

    def _leave_caught_up(self, member: Member) -> None:
        self.caught_up.pop(member.serial, None)
        if not self.caught_up:
            self._told_to_all = Told(_GREETED)

    def _advance(self, told: Told, runs: Sequence[Run], count: int) -> None:
        if not count:
            return
        whole = count == sum(run.length for run in runs)
        if whole and told.greeted == _GREETED and runs[-1].member is not None:
            # The usual case: all messages, of which the last ones announce a member.
            told.leaves_sent += len(told.leaves_due)
            told.leaves_due.clear()
            told.current = told.cut_short = None
            told.partial = runs[-1].first + runs[-1].length
            told.up_to = runs[-1].member.serial
            return
        for run in runs:
            if count <= 0:
                break
            done = min(count, run.length)
            count -= done
            if run.member is not None:
                told.partial = run.first + done
                whole = done == run.length
                told.current = None if whole else run.member
                if whole:
                    told.up_to = run.member.serial
            elif told.greeted < _GREETED:
                told.greeted += 1
            elif run.fds is None:
                if told.leaves_due.popleft() == told.cut_short:
                    told.cut_short = None
                told.leaves_sent += 1
            else:  # of a member whose announcement was cut short
                told.partial += done
                if told.partial == self.vectors:
                    told.cut_short = None

    def is_set_up(self, member: Member) -> bool:
        """Whether a member was sent all of its set-up, its own vectors included."""
        told = member.told
        return told.greeted == _GREETED and (not self.vectors or told.up_to >= member.serial)

    def backlog(self, member: Member) -> int:
        """Return how many messages `member` must still be sent, without making them.

        Of a paused member this includes those that it is sent after `resume`.
        """
        told = member.told
        current = told.current
        count = _GREETED - told.greeted + len(told.leaves_due)
        if not self.vectors:
            return count
        if current is not None or (told.cut_short is not None and member.no_leaves):
            count += self.vectors - told.partial
        position = told.up_to if current is None else current.serial
        start = bisect_right(self._order, position, key=lambda m: m.serial)
        others = len(self._order) - start
        if self._shared_id is not None:
            others = sum(not m.unannounced or m is member for m in self._order[start:])
        return count + others * self.vectors

    # -- for a successor --------------------------------------------------------------------------

    def dump(self) -> dict[str, Any]:
        """Return the state, except descriptors, in types that JSON has."""
        muted = [member.serial for member in self._order if member.paused]
        return {
            **({"muted": muted} if muted else {}),
            "serial": self._serial,
            "unused": self._unused,
            "free": self._free,
            "known": list(self._known),
            "crowd": list(self.caught_up),
            "crowd_standing": _dump(self._told_to_all),
            "members": [
                [
                    *(m.id, m.serial, None if m.serial in self.caught_up else _dump(m.told)),
                    *(m.no_leaves, m.leaves_before),
                ]
                for m in self._order
            ],
        }

    def load(self, state: Mapping[str, Any], vectors: Sized) -> None:
        """Take over the state that `dump` returned; each member has `vectors` until replaced."""
        self._serial, self._unused = state["serial"], state["unused"]
        self._free = list(state["free"])
        self._known = deque((serial, peer) for serial, peer in state["known"])
        self._order = [
            Member(i, serial, vectors, self._memory, no_leaves=no_leaves)
            for i, serial, _, no_leaves, _ in state["members"]
        ]
        members = {member.serial: member for member in self._order}
        self._told_to_all = _load(state["crowd_standing"], members)
        self.caught_up = {serial: members[serial] for serial in state["crowd"]}
        self.told_singly = {s: m for s, m in members.items() if s not in self.caught_up}
        for _, serial, told, _, leaves in state["members"]:
            members[serial].told = self._told_to_all if told is None else _load(told, members)
            members[serial].leaves_before = leaves
        for serial in state.get("muted", ()):
            members[serial].paused = True


def _dump(told: Told) -> list[Any]:
    current = told.current
    serial = None if current is None else current.serial
    return [
        *(told.greeted, told.up_to, serial, told.partial, list(told.leaves_due)),
        *(told.leaves_sent, told.leaves_held),
        *(() if told.cut_short is None else (told.cut_short,)),
    ]


def _load(state: Sequence[Any], members: Mapping[int, Member]) -> Told:
    told = Told(state[0])
    told.up_to, told.partial = state[1], state[3]
    told.current = None if state[2] is None else members[state[2]]
    told.leaves_due = deque(state[4])
    told.leaves_sent, told.leaves_held = state[5:7]
    told.cut_short = int(state[7]) if len(state) > 7 else None
    return told
