"""What a server does, a step at a time: accepts peers, and sends them what the roster decides.

Knows: sockets, eventfds, readiness, shortages. Does not know: what the messages are (the roster
does), threads, signals (the server does).

Invariants:
1. Nothing here blocks, but for the wait in `step`; a peer that does not read delays nobody else.
2. A connection is accepted only when all that its set-up needs is at hand, for QEMU spins for ever
   on one that ends early; until then newcomers wait in the listening socket's queue.
3. What a peer sends is never read, and after its set-up cannot be sent (SHUT_RD); the server
   notices only that it goes.
4. Whatever is to be done later makes `fileno()` readable when its time has come.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

from . import _fds, _wire, sockets
from .protocol import Member, Roster

_log = logging.getLogger("ivshmem.server")

# Tokens of the epoll object: a peer's is its serial number after these; those of other descriptors
# that somebody wants watched are beyond all peers'.
_LISTENER, _WAKE, _RETRY, _FIRST_PEER = range(4)
_FIRST_WATCHED = 1 << 62

_NEWCOMERS = 64  # accepted in one step, so that a flood of them does not keep peers waiting
_RETRY_SECONDS = 0.1  # until what failed for want of memory or descriptors is tried again
_COMPLAIN_SECONDS = 60.0

# What passes: memory, descriptors in the process or the system, descriptors in flight (unix(7)).
_SHORTAGES = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ETOOMANYREFS}
)

# The kernel's least. A default buffer holds 278 messages, and each has a descriptor in flight: of
# these an unprivileged server can have RLIMIT_NOFILE, over all of its user's sockets. Four peers
# that do not read would stop it from sending anything to anybody.
_SMALLEST_BUFFER = 4608
_CAP_SYS_ADMIN, _CAP_SYS_RESOURCE = 21, 24  # capabilities(7): either lifts that limit


@dataclass(frozen=True)
class Peer:
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


class _Connection:
    """One peer's socket, and where it stands."""

    __slots__ = ("announced", "events", "member", "peer", "socket", "vectors")

    def __init__(
        self, sock: socket.socket, vectors: _fds.FdArray, member: Member, peer: Peer
    ) -> None:
        self.socket = sock
        self.vectors = vectors
        self.member = member
        self.peer = peer
        self.events = 0  # watched for beside EPOLLHUP: EPOLLOUT while its buffer is full
        self.announced = False  # its set-up is complete, and it was told so

    @property
    def stalled(self) -> bool:
        """It does not read; when it does, an event will say so."""
        return bool(self.events & _fds.EPOLLOUT)


class Engine:
    """Serves one region on one listening socket.

    Args:
        listener: listening; borrowed, like `memory`.
        memory: the region's descriptor, as an array of one.
        answer: what is told to those who only ask (`sockets.ask`), beside the number of peers.
        on_join, on_leave: called at the end of a step. What they raise is logged, and harms nobody.
        shared_id: all who connect have this id, and are told only of peers that `admit` announces.
    """

    def __init__(
        self,
        listener: socket.socket,
        memory: _fds.FdArray,
        vectors: int,
        answer: dict[str, int],
        on_join: Callable[[Peer], object] | None,
        on_leave: Callable[[Peer], object] | None,
        shared_id: int | None = None,
    ) -> None:
        self._listener = listener
        self._vectors = vectors
        self._answer = answer
        self._on_join, self._on_leave = on_join, on_leave
        self._roster = Roster(vectors, memory, shared_id=shared_id)
        self._connections: dict[int, _Connection] = {}
        self._dirty: set[int] = set()  # tokens of those to whom something may have to be sent
        self._starved: set[int] = set()  # tokens of those for whom sending failed for a shortage
        self._reports: list[tuple[Callable[[Peer], object], Peer]] = []
        self._spare: _fds.FdArray | None = None  # eventfds for the next newcomer
        self.paused = ""  # why newcomers wait in the queue at the moment
        self._complaint = ("", 0.0)  # the last one, and when it was logged
        self._watched: dict[int, Callable[[], object]] = {}  # by token
        self._tokens: dict[int, int] = {}  # of what is watched, by descriptor
        self._next_token = _FIRST_WATCHED
        self._small_buffers = not _is_privileged()
        with contextlib.ExitStack() as undo:
            self._epoll = _fds.Epoll()
            undo.callback(self._epoll.close)
            self._wake = _fds.FdArray.eventfds(1)
            undo.callback(self._wake.close)
            self._timer = _fds.Timer()
            undo.callback(self._timer.close)
            self._epoll.add(self._wake[0], _WAKE, _fds.EPOLLIN)
            self._epoll.add(self._timer.fileno(), _RETRY, _fds.EPOLLIN)
            self._epoll.add(listener.fileno(), _LISTENER, _fds.EPOLLIN)
            self._undo = undo.pop_all()

    def fileno(self) -> int:
        """Readable when `step(0)` has something to do."""
        return self._epoll.fileno()

    def wake(self) -> None:
        """Let a step that waits return; from any thread or a signal handler."""
        self._wake.signal(0)

    def watch(self, fd: int, act: Callable[[], object]) -> None:
        """Let a step do this when `fd` is readable; what it raises ends the step."""
        self._epoll.add(fd, self._next_token, _fds.EPOLLIN)
        self._watched[self._next_token] = act
        self._tokens[fd] = self._next_token
        self._next_token += 1

    def unwatch(self, fd: int) -> None:
        """Undo `watch`, before `fd` is closed; nothing if it was not watched."""
        if fd in self._tokens:
            del self._watched[self._tokens.pop(fd)]
            self._epoll.remove(fd)

    @property
    def peers(self) -> list[Peer]:
        """Who is connected, by id; from any thread."""
        return sorted((c.peer for c in list(self._connections.values())), key=lambda peer: peer.id)

    def step(self, timeout: float | None) -> None:
        """Wait at most `timeout` seconds and do what there is to do."""
        for token, events in self._epoll.wait(timeout):
            if token == _LISTENER:
                self._accept()
            elif token == _WAKE:
                os.eventfd_read(self._wake[0])
            elif token == _RETRY:
                self._retry()
            elif token in self._watched:
                self._watched[token]()
            elif token in self._connections:  # not gone by an event before this one
                if events & (_fds.EPOLLHUP | _fds.EPOLLERR):
                    self._leave(token)
                else:
                    self._dirty.add(token)
        while self._dirty:
            due, self._dirty = self._dirty, set()
            # Elders first: when a newcomer's set-up is complete, those who read were told of it.
            for token in sorted(due):
                if token in self._connections:
                    self._flush(token)
        while self._reports:
            callback, peer = self._reports.pop(0)
            try:
                callback(peer)
            except Exception:
                _log.exception("the callback for peer %d failed", peer.id)

    # -- joining and leaving ----------------------------------------------------------------------

    def _accept(self) -> None:
        for _ in range(_NEWCOMERS):
            if self._roster.full:
                self._pause("every id is taken, or known to a connected peer")
                return
            if self._starved:
                self._pause("others are still waiting for what cannot be sent")
                return
            try:
                if self._spare is None:
                    self._spare = _fds.FdArray.eventfds(self._vectors)
                sock, address = self._listener.accept()
            except BlockingIOError:
                self.paused = ""
                return
            except ConnectionAbortedError:
                continue
            except OSError as error:
                if error.errno not in _SHORTAGES:
                    raise
                self._pause(os.strerror(error.errno or 0))
                self._timer.set(_RETRY_SECONDS)
                return
            sock.setblocking(False)
            if sockets.only_asks(address):
                self._tell(sock)
            else:
                vectors, self._spare = self._spare, None
                self._join(sock, vectors)

    def _tell(self, sock: socket.socket) -> None:
        """Answer somebody who does not want to be a peer."""
        with sock, contextlib.suppress(OSError):
            sock.send(json.dumps({**self._answer, "peers": len(self._connections)}).encode())

    def _join(self, sock: socket.socket, vectors: _fds.FdArray) -> None:
        member = self._roster.join(vectors)
        token = _FIRST_PEER + member.serial
        try:
            self._epoll.add(sock.fileno(), token, 0)
        except OSError as error:  # ENOSPC or ENOMEM: the one thing that cannot be had beforehand
            self._complain(f"a newcomer had to be turned away: {error.strerror}")
            self._roster.leave(member)
            sock.close()
            vectors.close()
            return
        if self._small_buffers:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SMALLEST_BUFFER)
        who = sockets.credentials(sock)
        peer = Peer(member.id, who.pid, who.uid, who.gid, who.process, self._vectors, time.time())
        self._connections[token] = _Connection(sock, vectors, member, peer)
        if self._on_join is not None:
            self._reports.append((self._on_join, peer))
        # Those who wait for room in their buffer are told when they have it.
        self._dirty.update(t for t, c in self._connections.items() if not c.stalled)

    def _leave(self, token: int) -> None:
        connection = self._connections.pop(token)
        self._dirty.discard(token)
        self._starved.discard(token)
        self._tell_of_leave(connection.member)
        self._epoll.remove(connection.socket.fileno())
        _hang_up(connection)
        if self._on_leave is not None:
            self._reports.append((self._on_leave, connection.peer))
        self._listen_again()

    def _tell_of_leave(self, left: Member) -> None:
        for member in self._roster.leave(left):
            token = _FIRST_PEER + member.serial
            if token in self._connections and not self._connections[token].stalled:
                self._dirty.add(token)

    # -- peers that are elsewhere -----------------------------------------------------------------

    def admit(self, peer_id: int, vectors: _fds.FdArray) -> Member:
        """Announce a peer that does not connect here; `vectors` stay the caller's."""
        member = self._roster.admit(peer_id, vectors)
        self._dirty.update(t for t, c in self._connections.items() if not c.stalled)
        return member

    def dismiss(self, member: Member) -> None:
        """Say that an admitted peer is gone; its vectors are not used any more."""
        self._tell_of_leave(member)

    def bells(self, vector: int) -> list[int]:
        """The eventfds of this vector, one for each client; they belong to the connections."""
        return [connection.vectors[vector] for connection in self._connections.values()]

    # -- sending ----------------------------------------------------------------------------------

    def _flush(self, token: int) -> None:
        """Send what a peer has still to be told, as far as its buffer takes it."""
        connection = self._connections[token]
        member = connection.member
        full = False
        while not full and (runs := self._roster.pending(member)):
            try:
                count = _wire.send_runs(connection.socket.fileno(), runs)
            except OSError as error:
                if error.errno in _SHORTAGES:
                    self._starve(token, error)
                else:  # EPIPE or ECONNRESET: it is gone, or has stopped listening
                    self._leave(token)
                return
            self._roster.sent(member, runs, count)
            full = count < sum(run.length for run in runs)
        self._watch(token, _fds.EPOLLOUT if full else 0)
        if not connection.announced and self._roster.is_set_up(member):
            # Protocol version 0 cannot say that a set-up is complete. Shutting down this side's
            # receiving says it to a client that asks, and changes nothing for one that does not.
            connection.announced = True
            with contextlib.suppress(OSError):  # ENOTCONN: it is gone, and the next event says so
                connection.socket.shutdown(socket.SHUT_RD)

    def _watch(self, token: int, events: int) -> None:
        connection = self._connections[token]
        if events != connection.events:
            self._epoll.modify(connection.socket.fileno(), token, events)
            connection.events = events

    # -- shortages --------------------------------------------------------------------------------

    def _starve(self, token: int, error: OSError) -> None:
        """Sending failed though the buffer has room: no event will come, so a clock must do."""
        self._complain(f"sending has to wait: {error.strerror}")
        self._watch(token, 0)
        self._starved.add(token)
        self._timer.set(_RETRY_SECONDS)

    def _pause(self, reason: str) -> None:
        """Leave newcomers in the queue of the listening socket."""
        self._complain(f"newcomers have to wait: {reason}")
        self._epoll.modify(self._listener.fileno(), _LISTENER, 0)
        self.paused = reason

    def _listen_again(self) -> None:
        if self.paused:
            self._epoll.modify(self._listener.fileno(), _LISTENER, _fds.EPOLLIN)

    def _retry(self) -> None:
        self._timer.set(0)
        self._dirty |= self._starved
        self._starved.clear()
        self._listen_again()

    def _complain(self, text: str) -> None:
        """Log what may come ten times a second only when it is new, or a minute old."""
        now = time.monotonic()
        if text != self._complaint[0] or now > self._complaint[1] + _COMPLAIN_SECONDS:
            self._complaint = (text, now)
            _log.warning(text)

    # -- the end ----------------------------------------------------------------------------------

    def close(self, *, forked: bool = False) -> None:
        """Disconnect all peers and close everything; `forked`: only this process's copies."""
        for connection in self._connections.values():
            _hang_up(connection, forked=forked)
        self._connections.clear()
        self._dirty.clear()
        self._starved.clear()
        if self._spare is not None:
            self._spare.close()
        self._undo.close()


def _hang_up(connection: _Connection, *, forked: bool = False) -> None:
    if not forked:
        # Children that were forked for something else keep copies of the socket.
        with contextlib.suppress(OSError):  # ENOTCONN: the peer did the same
            connection.socket.shutdown(socket.SHUT_RDWR)
    connection.socket.close()
    connection.vectors.close()


def _is_privileged() -> bool:
    """Whether RLIMIT_NOFILE limits the descriptors that this process has in flight."""
    try:
        with open("/proc/self/status") as status:
            for line in status:
                if line.startswith("CapEff:"):
                    capabilities = int(line.split()[1], 16)
                    wanted = 1 << _CAP_SYS_ADMIN | 1 << _CAP_SYS_RESOURCE
                    return bool(capabilities & wanted)
    except OSError:
        pass
    return False
