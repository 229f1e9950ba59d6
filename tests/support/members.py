"""A model client for each member of a Roster: the real Session, beside what QEMU would do.

Descriptors are numbers that say whose vector they are, so that a mix-up shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from ivshmem.protocol.framing import MEMORY, VERSION, Message
from ivshmem.protocol.roster import Member, Roster, Run
from ivshmem.protocol.session import GotLeave, GotMemory, GotVector, Session, SessionState
from ivshmem.server.replay import BATCH, UnfinishedBatch

MEMORY_FD = -77
NOBODY_FD = -88


def token(key: int, vector: int) -> int:
    """The descriptor of a vector of the client that joined as number `key`."""
    return key * 4096 + vector


class Qemu:
    """What hw/misc/ivshmem-pci.c does with messages, and where it would die."""

    def __init__(self) -> None:
        self.id = -1
        self.greeted = 0
        self.alive: dict[int, list[int]] = {}  # descriptors by peer id
        self.left: set[int] = set()
        self.last: int | None = None  # the id in the last message with a descriptor of a peer's

    def receive(self, message: Message) -> None:
        value, fds = message
        if self.greeted == 0:
            assert message == (VERSION, ())
        elif self.greeted == 1:
            assert not fds
            self.id = value
        elif self.greeted == 2:
            assert message == (MEMORY, (MEMORY_FD,))
        elif fds:
            assert value not in self.left, f"use after free: id {value} announced again"
            (fd,) = fds
            known = self.alive.setdefault(value, [])
            if fd == NOBODY_FD:
                assert known, "it was announced when it was gone"
                assert value != self.id
            else:
                assert fd % 4096 == len(known), "a vector is missing or out of order"
                assert not known or fd // 4096 == known[0] // 4096, "the vectors are two peers'"
                assert NOBODY_FD not in known, "it was taken for one that is gone"
            known.append(fd)
            self.last = value
        else:
            assert value in self.alive, f"double free: {value} leaves, and is not there"
            assert value != self.id
            del self.alive[value]
            self.left.add(value)
        self.greeted = min(self.greeted + 1, 3)


class Client:
    """A member, and everything it was sent."""

    def __init__(self, roster: Roster, key: int, *, holds: bool = False) -> None:
        self.key = key
        self.roster = roster
        vectors = [token(key, v) for v in range(roster.vectors)]
        self.member: Member = roster.join(vectors, no_leaves=holds)
        self.id = self.member.id
        self.qemu = Qemu()
        self.session = Session()
        self.received = 0
        self.note: Callable[..., object] = lambda *_: None  # for a journal

    def send(self, count: int, limit: int = 1024) -> int:
        """Let up to `count` messages through; returns how many there were."""
        runs = self.roster.pending(self.member, limit)
        taken = 0
        for message in _messages(runs):
            if taken == count:
                break
            taken += 1
            self._receive(message)
        if taken:
            self.roster.sent(self.member, runs, taken)
            self.note("sent", self.member.serial, taken)
        assert self.roster.is_set_up(self.member) == self.is_set_up
        if self.is_set_up:
            self.session.end_setup()
        return taken

    def take(self, runs: list[Run], count: int) -> None:
        """Get the first `count` messages of what the whole crowd is sent."""
        for message in islice(_messages(runs), count):
            self._receive(message)

    def send_all(self) -> None:
        """Until there is nothing left to tell."""
        while self.send(1 << 30):
            pass
        assert self.roster.pending(self.member) == []

    @property
    def is_set_up(self) -> bool:
        """Greeted, and all own vectors are there."""
        own = len(self.qemu.alive.get(self.qemu.id, ()))
        return self.qemu.greeted == 3 and own == self.roster.vectors

    def _receive(self, message: Message) -> None:
        self.received += 1
        assert not (self.member.paused and self.is_set_up), "it was to be sent nothing"
        assert NOBODY_FD not in message.fds or self.member.no_leaves, "its leave would do"
        before = self.qemu.alive.get(message.value, [])
        self.qemu.receive(message)
        event = self.session.receive(message)
        value, fds = message
        if isinstance(event, GotMemory):
            assert (value, fds) == (MEMORY, (event.fd,))
        elif isinstance(event, GotVector):
            assert event[:3] == (value, len(self.qemu.alive[value]) - 1, fds[0])
            if event.whole:
                assert len(self.qemu.alive[value]) == self.roster.vectors
        elif isinstance(event, GotLeave):
            assert event.peer == value
            assert not fds
            if event.whole:
                assert len(before) == self.roster.vectors
        else:
            assert self.qemu.greeted < 3

    def check_knows(self, everyone: list[Client]) -> None:
        """At rest this client knows exactly those who are there, with all their vectors.

        If it is not told of leaves, also some who were; with as many vectors, or it would take
        that for the number that everybody has.
        """
        expected = {
            client.id: [token(client.key, v) for v in range(self.roster.vectors)]
            for client in everyone
            if self.roster.vectors
        }
        known = self.qemu.alive
        if self.roster.vectors:
            assert {len(fds) for fds in known.values()} == {self.roster.vectors}
        if self.member.no_leaves:
            known = {peer: known[peer] for peer in known if peer in expected}
        assert known == expected
        assert self.session.state is SessionState.READY
        assert self.session.id == self.id
        assert self.session.vectors == self.roster.vectors
        peers = [
            peer for peer in self.session.peers if peer in expected or not self.member.no_leaves
        ]
        assert peers == sorted(set(expected) - {self.id})


def _messages(runs: list[Run]) -> Iterator[Message]:
    for value, fds, first, length, _ in runs:
        for index in range(first, first + length):
            if fds is None:
                yield Message(value)
            else:
                assert isinstance(fds, list)
                yield Message(value, (fds[index],))


def send_to_crowd(
    clients: Sequence[Client],
    takes: Callable[[Client], int],
    limit: int = 1024,
    killed: Callable[[int], bool] = lambda _: False,
    note: Callable[..., object] = lambda *_: None,
) -> UnfinishedBatch | None:
    """Send the roster's news to its crowd, of whom each `takes` so many messages, as a server does.

    It notes what it does, as a server does, or is `killed` when so many have got theirs: before the
    last one's is noted. Returns what is unfinished then.
    """
    roster = clients[0].roster
    by_serial = {client.member.serial: client for client in clients}
    runs = roster.messages_to_all(limit)
    if not runs:
        return None
    total = min(sum(run.length for run in runs), BATCH)
    done = 0
    for serial in list(roster.caught_up):
        client = by_serial[serial]
        count = min(takes(client), total)
        client.take(runs, count)
        if killed(done):
            return -1, done, count, total
        if count < total:
            roster.tell_singly(client.member)
            roster.sent(client.member, runs, count)
            note("split", serial, count, done, total)
        else:
            done += 1
    roster.sent_to_all(runs, total)
    note("crowd", total, len(roster.caught_up))
    return None


def make_roster(vectors: int) -> Roster:
    return Roster(vectors, [MEMORY_FD], [NOBODY_FD])
