"""The server that guests and clients connect to: accepts them and moves what the roster decides.

Knows: sockets, eventfds, readiness. Does not know: what the messages are (protocol.Roster does).

Invariants:
1. Nothing here blocks, but for the wait in `step`; a peer that does not read delays nobody else.
2. A connection is accepted only when all that its set-up needs is at hand, for QEMU spins for ever
   on one that ends early; until then newcomers wait in the listening socket's queue.
3. What a peer sends is never read, and after its set-up cannot be sent (SHUT_RD); the server
   notices only that it goes.
4. All state is changed by the thread that runs `step`.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from . import _core, sockets
from .errors import ClosedError
from .protocol import MAX_VECTORS, Member, Roster
from .pages import PAGE
from .region import Region
from .sizes import check_size

_log = logging.getLogger("ivshmem.server")

# Tokens of the epoll object: a peer's is its serial number after these.
_LISTENER, _STOP, _SIGNAL, _FIRST_PEER = range(4)

_NEWCOMERS = 64  # accepted in one step, so that a flood of them does not keep peers waiting
_RETRY_SECONDS = 0.1  # until what failed for want of memory or descriptors is tried again
_COMPLAIN_SECONDS = 60.0

# What passes: memory, descriptors in the process or the system, descriptors in flight (unix(7)).
_SHORTAGES = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ETOOMANYREFS}
)


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


class _Turn:
    """A lock that one thread holds during a step, and that it can find itself to hold."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holder = 0

    def mine(self) -> bool:
        return self._holder == threading.get_ident()

    def __enter__(self) -> None:
        if self.mine():
            raise RuntimeError("a step of the server is under way: a callback cannot begin another")
        self._lock.acquire()
        self._holder = threading.get_ident()

    def __exit__(self, *error: object) -> None:
        self._holder = 0
        self._lock.release()


class _Connection:
    """One peer's socket, and where it stands."""

    __slots__ = ("announced", "events", "member", "peer", "socket", "vectors")

    def __init__(
        self, sock: socket.socket, vectors: _core.FdArray, member: Member, peer: Peer
    ) -> None:
        self.socket = sock
        self.vectors = vectors
        self.member = member
        self.peer = peer
        self.events = 0  # watched for beside EPOLLHUP: EPOLLOUT while its buffer is full
        self.announced = False  # its set-up is complete, and it was told so


class Server:
    """An ivshmem server on a Unix socket.

    Args:
        path: of the socket. A stale one is replaced, a live server's never. Or a `sockets.Listener`
            that holds it already; the server closes it.
        memory: a Region, which stays the caller's; or the size of an anonymous one that the server
            makes and closes ("4M").
        vectors: of each peer, 0..2048.
        on_join, on_leave: called with a Peer, by the thread that runs the server.

    It listens from the start; peers are served while one of these runs: `serve_forever()` in the
    calling thread until `stop()`, `start()` in a thread of its own, or `step()` from another loop,
    which watches `fileno()`. `close()` ends all and removes the socket; peers keep their memory and
    doorbells.

    Raises:
        ValueError: a number of vectors that is not allowed; RegionError for a size.
        OSError: EADDRINUSE where a live server listens, or as of bind(2). Nothing is left behind.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | sockets.Listener,
        memory: Region | int | str = "4M",
        vectors: int = 1,
        *,
        on_join: Callable[[Peer], object] | None = None,
        on_leave: Callable[[Peer], object] | None = None,
    ) -> None:
        self._pid = os.getpid()
        self._closed = True  # until there is something to close
        if not 0 <= vectors <= MAX_VECTORS:
            raise ValueError(f"{vectors} vectors: allowed are 0 to {MAX_VECTORS}")
        self.vectors = vectors
        self._on_join = on_join
        self._on_leave = on_leave
        self._connections: dict[int, _Connection] = {}
        self._dirty: dict[int, _Connection] = {}  # by token: something may have to be sent
        self._starved: dict[int, _Connection] = {}  # by token: sending failed for a shortage
        self._spare: _core.FdArray | None = None  # eventfds for the next newcomer
        self._paused = ""  # why nobody is accepted
        self._complaint = ("", 0.0)  # the last one, and when it was logged
        self._retry_at: float | None = None
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._signals: socket.socket | None = None
        self._stepping = _Turn()
        self._close_wanted = False
        with contextlib.ExitStack() as undo:
            if isinstance(memory, Region):
                self.region = memory
            else:
                self.region = undo.enter_context(Region.create(memory))
            check_size(self.region.size, PAGE, what="memory that guests share")
            self._owns_region = not isinstance(memory, Region)
            shared = _core.FdArray()
            undo.callback(shared.close)
            shared.take(os.dup(self.region.fileno()))
            self._memory = shared
            self._roster = Roster(vectors, shared)
            self._epoll = _core.Epoll()
            undo.callback(self._epoll.close)
            self._wake = _core.FdArray.eventfds(1)
            undo.callback(self._wake.close)
            self._epoll.add(self._wake[0], _STOP, _core.EPOLLIN)
            listener = path if isinstance(path, sockets.Listener) else sockets.Listener(path)
            undo.callback(listener.close)
            listener.listen()
            self.path = listener.path
            self._listener = listener.socket
            self._epoll.add(self._listener.fileno(), _LISTENER, _core.EPOLLIN)
            self._undo = undo.pop_all()
        self._closed = False

    # -- running ----------------------------------------------------------------------------------

    def fileno(self) -> int:
        """A descriptor that is readable when `step(0)` has something to do."""
        return self._epoll.fileno()

    def serve_forever(self) -> None:
        """Serve in this thread until `stop()`, from a signal handler or another thread."""
        with self._woken_by_signals():
            while not self._stopping:
                self.step()

    @contextlib.contextmanager
    def _woken_by_signals(self) -> Iterator[None]:
        """Let Python's signal handlers run also if the signal comes just before epoll_wait.

        The kernel has nothing to interrupt then, and Python runs handlers only between system calls.
        Only the main thread runs them. A wake-up descriptor that somebody else has set stays.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        near, far = socket.socketpair()
        with near, far:
            near.setblocking(False)
            far.setblocking(False)
            before = signal.set_wakeup_fd(far.fileno(), warn_on_full_buffer=False)
            try:
                if before == -1:
                    self._signals = near
                    self._epoll.add(near.fileno(), _SIGNAL, _core.EPOLLIN)
                else:
                    signal.set_wakeup_fd(before)
                yield
            finally:
                self._signals = None
                signal.set_wakeup_fd(before)
                if before == -1 and not self._closed:
                    self._epoll.remove(near.fileno())

    def start(self) -> Server:
        """Serve in a thread of its own, until `close()`; returns self."""
        self._check()
        if self._thread is not None:
            raise RuntimeError("the server runs in a thread already")
        self._thread = threading.Thread(target=self.serve_forever, name="ivshmem-server")
        self._thread.start()
        return self

    def step(self, timeout: float | None = None) -> None:
        """Wait at most `timeout` seconds (None: as long as it takes) and do what there is to do."""
        self._check()
        with self._stepping:
            if not self._closed:
                self._step(timeout)
            if self._close_wanted:
                self._close()

    def _step(self, timeout: float | None) -> None:
        for token, events in self._epoll.wait(self._until_retry(timeout)):
            if token == _LISTENER:
                self._accept()
            elif token == _STOP:
                self._stopping = True
            elif token == _SIGNAL and self._signals is not None:
                self._signals.recv(4096)  # the handler has run, or runs now
            elif token in self._connections:  # not gone by an event before this one
                if events & (_core.EPOLLHUP | _core.EPOLLERR):
                    self._leave(token)
                else:
                    self._dirty[token] = self._connections[token]
        if self._retry_at is not None and time.monotonic() >= self._retry_at:
            self._retry()
        while self._dirty:
            due, self._dirty = self._dirty, {}
            # Elders first: when a newcomer's set-up is complete, those who read were told of it.
            for token in sorted(due):
                if token in self._connections:
                    self._flush(token, due[token])

    def stop(self) -> None:
        """Make `serve_forever` return; may be called from a signal handler or any thread."""
        self._stopping = True
        if not self._closed and os.getpid() == self._pid:
            os.eventfd_write(self._wake[0], 1)

    @property
    def peers(self) -> list[Peer]:
        """Who is connected, by id."""
        return sorted((c.peer for c in list(self._connections.values())), key=lambda peer: peer.id)

    @property
    def paused(self) -> str:
        """Why newcomers wait in the queue at the moment; "" when they do not."""
        return self._paused

    # -- joining and leaving ----------------------------------------------------------------------

    def _accept(self) -> None:
        for _ in range(_NEWCOMERS):
            if self._roster.full:
                self._pause("every id is taken, or known to a connected peer")
                return
            try:
                if self._spare is None:
                    self._spare = _core.FdArray.eventfds(self.vectors)
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            except ConnectionAbortedError:
                continue
            except OSError as error:
                if error.errno not in _SHORTAGES:
                    raise
                self._pause(os.strerror(error.errno or 0))
                self._retry_at = time.monotonic() + _RETRY_SECONDS
                return
            vectors, self._spare = self._spare, None
            self._join(sock, vectors)

    def _join(self, sock: socket.socket, vectors: _core.FdArray) -> None:
        sock.setblocking(False)
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
        who = sockets.credentials(sock)
        peer = Peer(member.id, who.pid, who.uid, who.gid, who.process, self.vectors, time.time())
        self._connections[token] = _Connection(sock, vectors, member, peer)
        self._report(self._on_join, peer)
        # Those who wait for room in their buffer are told when they have it.
        self._dirty.update(
            (token, c) for token, c in self._connections.items() if not c.events & _core.EPOLLOUT
        )

    def _leave(self, token: int) -> None:
        connection = self._connections.pop(token)
        self._dirty.pop(token, None)
        self._starved.pop(token, None)
        for member in self._roster.leave(connection.member):
            other = _FIRST_PEER + member.serial
            if not self._connections[other].events & _core.EPOLLOUT:
                self._dirty[other] = self._connections[other]
        self._epoll.remove(connection.socket.fileno())
        self._hang_up(connection)
        self._report(self._on_leave, connection.peer)
        self._resume()

    def _hang_up(self, connection: _Connection) -> None:
        if os.getpid() == self._pid:
            # Children that were forked for something else keep copies of the socket.
            with contextlib.suppress(OSError):  # ENOTCONN: the peer did the same
                connection.socket.shutdown(socket.SHUT_RDWR)
        connection.socket.close()
        connection.vectors.close()

    @staticmethod
    def _report(callback: Callable[[Peer], object] | None, peer: Peer) -> None:
        if callback is None:
            return
        try:
            callback(peer)
        except Exception:
            # The peers do not suffer for a mistake in an embedding program.
            _log.exception("callback for peer %d failed", peer.id)

    # -- sending ----------------------------------------------------------------------------------

    def _flush(self, token: int, connection: _Connection) -> None:
        """Send what a peer has still to be told, as far as its buffer takes it."""
        member = connection.member
        full = False
        while runs := self._roster.pending(member):
            try:
                count = _core.send_runs(connection.socket.fileno(), runs)
            except OSError as error:
                if error.errno in _SHORTAGES:
                    self._starve(token, connection, error)
                else:  # EPIPE or ECONNRESET: it is gone, or has stopped listening
                    self._leave(token)
                return
            self._roster.sent(member, runs, count)
            if count < sum(run.length for run in runs):
                full = True
                break
        self._watch(token, connection, _core.EPOLLOUT if full else 0)
        if not connection.announced and self._roster.is_set_up(member):
            # Protocol version 0 cannot say that a set-up is complete. Shutting down this side's
            # receiving says it to a client that asks, and changes nothing for one that does not.
            connection.announced = True
            with contextlib.suppress(OSError):  # ENOTCONN: it is gone, and the next event says so
                connection.socket.shutdown(socket.SHUT_RD)

    def _watch(self, token: int, connection: _Connection, events: int) -> None:
        if events != connection.events:
            self._epoll.modify(connection.socket.fileno(), token, events)
            connection.events = events

    # -- shortages --------------------------------------------------------------------------------

    def _starve(self, token: int, connection: _Connection, error: OSError) -> None:
        """Sending failed though the buffer has room: no event will come, so a clock must do."""
        self._complain(f"sending has to wait: {error.strerror}")
        self._watch(token, connection, 0)
        self._starved[token] = connection
        self._retry_at = time.monotonic() + _RETRY_SECONDS

    def _pause(self, reason: str) -> None:
        """Leave newcomers in the queue of the listening socket."""
        self._complain(f"newcomers have to wait: {reason}")
        self._epoll.modify(self._listener.fileno(), _LISTENER, 0)
        self._paused = reason

    def _complain(self, text: str) -> None:
        """Log what may come ten times a second only when it is new, or a minute old."""
        now = time.monotonic()
        if text != self._complaint[0] or now > self._complaint[1] + _COMPLAIN_SECONDS:
            self._complaint = (text, now)
            _log.warning(text)

    def _resume(self) -> None:
        if self._paused:
            self._paused = ""
            self._epoll.modify(self._listener.fileno(), _LISTENER, _core.EPOLLIN)

    def _retry(self) -> None:
        self._retry_at = None
        self._dirty.update(self._starved)
        self._starved.clear()
        self._resume()

    def _until_retry(self, timeout: float | None) -> float | None:
        if self._retry_at is None:
            return timeout
        left = max(self._retry_at - time.monotonic(), 0)
        return left if timeout is None else min(left, timeout)

    # -- the end ----------------------------------------------------------------------------------

    def _check(self) -> None:
        if self._closed:
            raise ClosedError("the server is closed")
        if os.getpid() != self._pid:
            raise RuntimeError(
                "a forked child shares this server's epoll object: it may only close"
            )

    def close(self) -> None:
        """Stop, disconnect all peers, remove the socket; may be called twice, from any thread.

        Called by a callback or signal handler during a step, it takes effect when the step ends.

        Raises:
            BufferError: the server made the region, and a view of it is alive; all else is closed.
        """
        if self._closed:
            return
        if os.getpid() != self._pid:
            self._close()  # a forked child has no thread to wait for
            return
        self.stop()
        if self._stepping.mine():
            self._close_wanted = True
            return
        with self._stepping:
            self._close()
        if self._thread not in (None, threading.current_thread()):
            self._thread.join()

    def _close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for connection in self._connections.values():
            self._hang_up(connection)
        self._connections.clear()
        self._dirty.clear()
        self._starved.clear()
        if self._spare is not None:
            self._spare.close()
        self._undo.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._connections)} peers"
        return f"<ivshmem.Server at {self.path}, {state}>"

    def __del__(self, _warn: Any = warnings.warn) -> None:
        if not self._closed:
            _warn(f"unclosed {self!r}", ResourceWarning, source=self)
            self.close()
