"""The server that guests and clients connect to, as an object with a life of its own.

Knows: running (in the foreground, in a thread, a step at a time), stopping, closing, forking.
Does not know: peers and messages; the engine does.

Invariants:
1. The engine is used by one thread at a time; closing waits for the step that is under way.
2. A server that cannot go on closes itself: nobody waits for one that is dead.
3. A forked child closes its copies, and does nothing else.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import operator
import os
import socket
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, SupportsIndex, TypeVar

from . import _fds, sockets
from .engine import Engine, Gate, Peer, PeerReport
from .errors import ClosedError
from .journal import Chapter
from .loop import woken_by_signals
from .pages import PAGE
from .protocol import MAX_VECTORS, VERSION
from .region import Region
from .replay import Unfinished
from .sizes import check_size

_log = logging.getLogger("ivshmem.server")

_S = TypeVar("_S", bound="Server")  # typing.Self comes with Python 3.11


class Server:
    """An ivshmem server on a Unix socket.

    Args:
        path: of the socket. A stale one is replaced, a live server's never. Or a `sockets.Listener`
            that holds it already; the server closes it, unless it cannot be made.
        memory: a Region, which stays the caller's; or the size of an anonymous one that the server
            makes and closes ("4M").
        vectors: of each peer, 0..2048.
        on_join, on_leave: called with a Peer, by the thread that runs the server.
        gate: called with the credentials of each who connects, and how many of its user are peers,
            before it is sent anything; returns an access.Verdict (see access.Rules). Who is refused
            is disconnected, which QEMU does not take well: it spins until it is stopped.
        journal: where a successor of this process finds what it needs to go on (`resume`).
        listen: False: nobody can connect yet; the caller lets them by `Listener.listen`.

    It listens from the start; peers are served while one of these runs: `serve_forever()` in the
    calling thread until `stop()`, `start()` in a thread of its own, or `step()` from another loop,
    which watches `fileno()`. `close()` ends all and removes the socket; peers keep their memory and
    doorbells.

    Raises:
        ValueError: a number of vectors that is not allowed; RegionError for a size.
        OSError: EADDRINUSE where a live server listens, or as of bind(2). Nothing is left behind.
    """

    _shared_id: int | None = None  # see Engine

    def __init__(
        self,
        path: str | os.PathLike[str] | sockets.Listener,
        memory: Region | SupportsIndex | str = "4M",
        vectors: int = 1,
        *,
        on_join: Callable[[Peer], object] | None = None,
        on_leave: Callable[[Peer], object] | None = None,
        gate: Gate | None = None,
        journal: Chapter | None = None,
        listen: bool = True,
    ) -> None:
        self._pid = os.getpid()
        self._closed = True  # until there is something to close
        self.vectors = operator.index(vectors)
        if not 0 <= self.vectors <= MAX_VECTORS:
            raise ValueError(f"{vectors} vectors: allowed are 0 to {MAX_VECTORS}")
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._turn = threading.RLock()  # held during a step
        self._door = threading.Lock()  # held by who waits for its turn: no step begins meanwhile
        self._in_step = False
        self._stepper = 0  # the thread that makes it
        self._close_wanted = False
        with contextlib.ExitStack() as undo:
            if isinstance(memory, Region):
                self.region = memory
            else:
                self.region = undo.enter_context(Region.create(memory))
            # QEMU aborts on what is no power of two.
            check_size(self.region.size, PAGE, what="memory that guests share")
            shared = _fds.FdArray()
            undo.callback(shared.close)
            shared.take(os.dup(self.region.fileno()))
            readonly = _fds.FdArray()
            undo.callback(readonly.close)
            if isinstance(path, sockets.Listener):
                listener = path
            else:
                listener = undo.enter_context(sockets.Listener(path))
            self.path = listener.path
            answer = {
                "protocol": VERSION,
                "vectors": self.vectors,
                "size": self.region.size,
                "page_size": self.region.page_size,
            }
            self._engine = Engine(
                listener.socket,
                shared,
                partial(_made_readonly, self.region, readonly),
                self.vectors,
                answer,
                on_join,
                on_leave,
                gate,
                journal,
                self._shared_id,
            )
            if listen:
                listener.listen()
            self._resources = undo.pop_all()
        if isinstance(path, sockets.Listener):
            self._resources.callback(listener.close)
        self._closed = False

    # -- running ----------------------------------------------------------------------------------

    def fileno(self) -> int:
        """A descriptor, for any event loop, that is readable when `step(0)` has something to do."""
        self._check()
        return self._engine.fileno()

    def step(self, timeout: float | None = None) -> None:
        """Wait at most `timeout` seconds (None: as long as it takes) and do what there is to do.

        Raises:
            ClosedError: the server is closed.
            RuntimeError: called by a callback, or in a forked child.
        """
        self._check()
        with self._door:
            pass
        with self._turn:
            if self._in_step:
                raise RuntimeError("a callback of a step cannot begin another")
            self._in_step = True
            self._stepper = threading.get_ident()
            try:
                if not self._closed:
                    self._engine.step(timeout)
            finally:
                self._in_step = False
                self._stepper = 0
                if self._close_wanted:
                    self._close()

    def serve_forever(self) -> None:
        """Serve in this thread until `stop()` or `close()`, also by a signal handler."""
        self._check()
        try:
            with woken_by_signals(self._engine.watch, self._unwatch):
                while not (self._stopping or self._closed):
                    self.step()
        finally:
            self._stopping = False

    def start(self: _S) -> _S:
        """Serve in a thread of its own, until `close()`; returns self."""
        self._check()
        if self._thread is not None:
            raise RuntimeError("the server runs in a thread already")
        atexit.register(self._forgotten)
        self._thread = threading.Thread(target=self._run, name="ivshmem-server", daemon=True)
        self._thread.start()
        return self

    def _run(self) -> None:
        try:
            self.serve_forever()
        except BaseException:
            _log.exception("the server at %s failed, and closes", self.path)
            self.close()

    def stop(self) -> None:
        """Make `serve_forever` return; may be called from a signal handler or any thread."""
        if not self._closed and os.getpid() == self._pid:
            self._stopping = True
            self._engine.wake()

    def _unwatch(self, fd: int) -> None:
        if not self._closed:
            self._engine.unwatch(fd)

    @property
    def peers(self) -> list[Peer]:
        """Who is connected, by id."""
        return self._engine.peers

    @property
    def paused(self) -> str:
        """Why newcomers wait in the queue at the moment; "" when they do not."""
        return self._engine.paused

    @property
    def counts(self) -> Counter[str]:
        """How many joins, leaves and messages there were, how many were refused, and so on."""
        return Counter(self._engine.counts)

    def report(self, *, interrupts: bool = True) -> list[PeerReport]:
        """How each peer stands, by id; also from another thread.

        Args:
            interrupts: count also the rings that peers have not taken, which takes a look at each
                of their eventfds.
        """
        self._check()
        with self._between_steps():
            return self._engine.report(interrupts=interrupts)

    def evict(self, peer_id: int) -> None:
        """Hang up on a peer; the others are told that it left. Also from another thread.

        It keeps its memory and its doorbells, and can ring those that it knows, as anybody can who
        was ever a peer.

        Raises:
            NoSuchPeer: there is none with this id.
        """
        self._check()
        with self._between_steps():
            self._engine.evict(peer_id)

    @contextlib.contextmanager
    def _between_steps(self) -> Iterator[None]:
        """No step is made meanwhile, but for one whose callback this is."""
        if self._stepper == threading.get_ident():
            yield
            return
        with self._door:
            self._engine.wake()
            with self._turn:
                yield

    @property
    def holds_leaves(self) -> bool:
        """Whether a QEMU that connects now is never told of leaves: see `hold_leaves`."""
        return self._engine.holds_leaves

    def hold_leaves(self, holds: bool) -> None:
        """Never tell QEMU that a peer left, so that its device can be unplugged. From any thread.

        It holds for QEMUs that are connected, too, but cannot undo what they were told before:
        `report` says how often that was. False: it ends for those who connect from now on.
        """
        self._check()
        with self._between_steps():
            self._engine.hold_leaves(holds)

    def admit_by(self, gate: Gate | None) -> None:
        """Have another gate from now on; who is connected stays."""
        self._engine.gate = gate

    # -- a successor ------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        """What `resume` takes instead of what the journal has said up to now."""
        return self._engine.snapshot()

    def resume(
        self,
        state: Mapping[str, Any] | None,
        records: Iterable[list[Any]] = (),
        unfinished: Unfinished | None = None,
        find: Callable[[int], int | None] = lambda fd: fd,
    ) -> None:
        """Go on where a server was whose process has ended: before anything else.

        Args:
            state, records, unfinished: of its journal; see replay.
            find: what descriptor has here the number that it had there; None: it is gone.
        """
        self._engine.resume(state, records, unfinished, find)

    def adopt(self, sock: socket.socket) -> None:
        """Take a connection that the other had accepted, and had not noted down yet."""
        self._engine.adopt(sock)

    @property
    def descriptors(self) -> set[int]:
        """The numbers of those that belong to peers."""
        return self._engine.descriptors

    # -- the end ----------------------------------------------------------------------------------

    def abandon(self) -> None:
        """Close this process's copies, without a sign to anybody: a successor has them, too."""
        self._close(abandoned=True)

    def close(self) -> None:
        """Stop, disconnect all peers, remove the socket; may be called twice, from any thread.

        Called by a callback or signal handler during a step, it takes effect when the step ends.

        Raises:
            BufferError: the server made the region, and a view of it is alive; all else is closed.
        """
        if os.getpid() != self._pid:
            self._close()  # without the lock, which a thread of the parent may have held
            return
        self.stop()
        with self._turn:
            if self._in_step:
                self._close_wanted = True
                return
            self._close()
        if self._thread not in (None, threading.current_thread()):
            self._thread.join()

    def _close(self, *, abandoned: bool = False) -> None:
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self._forgotten)
        self._engine.close(forked=abandoned or os.getpid() != self._pid)
        self._resources.close()

    def _forgotten(self) -> None:
        """At the end of the program: the thread has the server, so it was never collected."""
        if os.getpid() == self._pid:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=1)
            self.close()

    def _check(self) -> None:
        if self._closed:
            raise ClosedError("the server is closed")
        if os.getpid() != self._pid:
            raise RuntimeError(
                "a forked child shares this server's epoll object: it may only close"
            )

    def __enter__(self: _S) -> _S:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self.peers)} peers"
        return f"<ivshmem.Server at {self.path}, {state}>"

    def __del__(self, _warn: Any = warnings.warn) -> None:
        if not self._closed:
            _warn(f"unclosed {self!r}", ResourceWarning, source=self)
            self.close()


def _made_readonly(region: Region, memory: _fds.FdArray) -> _fds.FdArray:
    """`memory`, which holds a descriptor for reading only from the first call on."""
    if not len(memory):
        memory.take(region.readonly_fd())
    return memory
