"""Internal: a peer that sees the interrupts of all other peers, and takes none of them.

Knows: what epoll(7) tells of an eventfd that others write and read. Does not know: files, clocks of
other processes, names.

The server gives each peer the eventfds of all others, so that it can ring them. Who watches such an
eventfd edge-triggered is woken by each write, and by each read (there is room again then), and
changes nothing. So a watcher sees when a peer is rung, and when its process has taken that. It does
not see who rang: the kernel does not tell. Where only one other peer is there, it was that one.

What it cannot see: a ring and the next one, or a ring and its taking, if both come before it looks;
interrupts that KVM takes by itself, on kernels whose irqfd keeps the wakeup from other waiters;
rings of a guest to itself.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Iterator

from ..native import wire
from ..native.descriptors import EPOLLIN, EPOLLOUT, Epoll, Fd
from ..peer import connecting
from ..protocol.framing import Framer, Message
from ..protocol.session import GotLeave, GotVector, Session, SessionState
from ..system.named_tuple import NamedTuple
from ..system.uncopied import Uncopied

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeAlias

_BATCH = 512  # messages taken from the socket at once
_SOCKET = 0  # the token of the server's socket; vectors have the following ones


class Joined(NamedTuple):
    """A peer is there; `at`: nanoseconds of CLOCK_MONOTONIC, as in all of these."""

    at: int
    peer: int


class Left(NamedTuple):
    """A peer has left."""

    at: int
    peer: int


class Rung(NamedTuple):
    """A vector of a peer was rung.

    Attributes:
        taken: its process has taken it already.
        by: the peer that rang, if only one can have done it; else -1.
    """

    at: int
    peer: int
    vector: int
    taken: bool
    by: int


class InterruptTaken(NamedTuple):
    """A peer's process has taken an interrupt."""

    at: int
    peer: int
    vector: int


Sight: TypeAlias = "Joined | Left | Rung | InterruptTaken"


class _Bell:
    """A vector of a peer, and whether an interrupt was pending at the last look."""

    def __init__(self, token: int, peer: int, vector: int, fd: Fd) -> None:
        self.token = token
        self.peer = peer
        self.vector = vector
        self.fd = fd
        poll = select.poll()
        poll.register(fd.fileno(), select.POLLIN)
        self.pending = bool(poll.poll(0))
        self.first = True  # epoll has said nothing of it


class RingWatcher(Uncopied):
    """A peer of a server that watches; a context manager.

    Args:
        path: of the server's socket.

    Attributes:
        id: of the watcher itself; -1: the server has not said yet.
        peers: the others that are there.
        over: why the server's connection has ended; "": it has not.

    Raises:
        OSError: nobody listens there, no permission, out of descriptors.
    """

    def __init__(self, path: str) -> None:
        self.over = ""
        self.peers: set[int] = set()
        self._path = path
        self._framer = Framer()
        self._session = Session()
        self._bells: dict[int, _Bell] = {}  # by token
        self._of: dict[int, list[int]] = {}  # tokens by peer
        self._token = _SOCKET
        with contextlib.ExitStack() as undo:
            self._socket = undo.enter_context(connecting.connect(path, 10))
            self._socket.setblocking(False)
            self._epoll = undo.enter_context(contextlib.closing(Epoll()))
            self._epoll.add(self._socket.fileno(), _SOCKET, EPOLLIN)
            self._undo = undo.pop_all()

    @property
    def id(self) -> int:
        return self._session.id

    @property
    def ready(self) -> bool:
        """Whether all peers are known; with other servers than this package's that is not told."""
        return self._session.state is SessionState.READY

    def watch(self, timeout: float) -> Iterator[Sight]:
        """Wait at most so many seconds, once; yield what was seen.

        Raises:
            ProtocolError: what listens there is not a server of protocol version 0.
            OSError: EMFILE: more descriptors are needed than this process may have.
        """
        newest = self._token
        yield from self._take(self._epoll.wait(timeout))
        if self._token != newest:  # what epoll says of an eventfd that was added is no ring
            yield from self._take(self._epoll.wait(0))

    def _take(self, ready: list[tuple[int, int]]) -> Iterator[Sight]:
        now = time.monotonic_ns()
        for token, events in ready:
            if token == _SOCKET:
                yield from self._hear(now)
            elif token in self._bells:  # else the peer left a moment ago
                yield from self._look(self._bells[token], events, now)

    def _look(self, bell: _Bell, events: int, now: int) -> Iterator[Rung | InterruptTaken]:
        """Compare what epoll says of a vector with what it said before."""
        pending, before = bool(events & EPOLLIN), bell.pending
        own = bell.peer == self.id
        if own and pending:
            os.read(bell.fd.fileno(), 8)
        bell.pending = pending and not own
        first, bell.first = bell.first, False
        if first and pending == before:
            return  # what epoll says when an eventfd is added
        if before and not pending:
            yield InterruptTaken(now, bell.peer, bell.vector)
            return
        if not bell.pending:
            # A process that takes an interrupt sets the eventfd to 0, and then wakes its watchers.
            # If this watcher looked in between, it will be woken again, though nobody rings. To
            # remove the eventfd from the epoll waits for that wakeup, and drops it.
            self._epoll.remove(bell.fd.fileno())
            self._register(bell)
        yield Rung(now, bell.peer, bell.vector, not bell.pending, self._only_one(bell.peer))

    def _only_one(self, rung: int) -> int:
        """Return the peer that must have rung this one: the only other one, besides the watcher."""
        others = self.peers - {rung}
        return others.pop() if len(others) == 1 else -1

    # -- the server -------------------------------------------------------------------------------

    def _hear(self, now: int) -> Iterator[Joined | Left | Rung]:
        chunks, ended = wire.receive(self._socket.fileno(), _BATCH)
        for data, fds in chunks:  # a descriptor that nobody keeps is closed
            for message in self._framer.feed(data, fds):
                yield from self._take_in(message, now)
        if (
            not ended
            and self._session.state is SessionState.SETUP
            and connecting.server_sent_all(self._socket)
        ):
            self._session.end_setup()
        if ended:
            self._epoll.remove(self._socket.fileno())
            self.over = f"{self._path}: the server has ended the connection"

    def _take_in(self, message: Message, now: int) -> Iterator[Joined | Left | Rung]:
        event = self._session.receive(message)
        if isinstance(event, GotVector):
            if event.vector == 0 and event.peer != self.id:
                self.peers.add(event.peer)
                yield Joined(now, event.peer)
            if self._add(event).pending:  # since before this watcher came
                yield Rung(now, event.peer, event.vector, False, -1)
        elif isinstance(event, GotLeave):
            for token in self._of.pop(event.peer, ()):
                bell = self._bells.pop(token)
                self._epoll.remove(bell.fd.fileno())
                bell.fd.close()
            self.peers.discard(event.peer)
            yield Left(now, event.peer)

    def _add(self, got: GotVector) -> _Bell:
        self._token += 1
        bell = _Bell(self._token, got.peer, got.vector, got.fd)
        self._register(bell)
        self._bells[self._token] = bell
        self._of.setdefault(got.peer, []).append(self._token)
        return bell

    def _register(self, bell: _Bell) -> None:
        bell.first = True
        events = EPOLLIN | EPOLLOUT | select.EPOLLET
        self._epoll.add(bell.fd.fileno(), bell.token, events)

    def close(self) -> None:
        """Leave; may be called twice."""
        self._undo.close()
        for bell in self._bells.values():
            bell.fd.close()
        self._bells.clear()

    def __enter__(self) -> RingWatcher:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
