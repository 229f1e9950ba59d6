"""The server that guests and clients connect to, as an object with a life of its own.

Knows: running (in the foreground, in a thread, a step at a time), stopping, closing, forking, what
may be called when. Does not know: peers and messages; the engine does.

Invariants:
1. One frame at a time changes the engine, which is closed when no step is under way; see
   system/work_lock.py.
2. No call waits for a frame that it interrupts, or holds anything that a callback could wait for.
3. A server that fails closes itself and says so: no caller waits for a dead server.
4. A forked child closes its copies, and does nothing else.
"""

from __future__ import annotations

import atexit
import contextlib
import operator
import os
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable
from functools import partial

from ..errors import ClosedError, ServerFailed
from ..memory.pages import PAGE
from ..memory.region import Region
from ..memory.sizes import check_size
from ..native import descriptors
from ..protocol.framing import VERSION
from ..protocol.limits import MAX_VECTORS
from ..system import late_logging
from ..system.listener import Listener
from ..system.loop import woken_by_signals
from ..system.time_limits import left_until, seconds_of
from ..system.uncopied import Uncopied
from ..system.work_lock import WorkLock
from ..text import counted
from .engine import Engine, Gate, import_the_rest
from .limits import LINGER
from .report import Peer, PeerReport, ServerCounts

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, SupportsIndex, TypeVar

    from ..lasting.journal import Section
    from ..peer.directory import Directory

    _S = TypeVar("_S", bound="Server")  # typing.Self comes with Python 3.11
    _T = TypeVar("_T")

_log = late_logging.log_of("ivshmem.server")


class Server(Uncopied):
    """An ivshmem server on a Unix socket.

    Args:
        path: of the socket. A stale one is replaced, a live server's never. Or a `Listener`
            that holds it already; the server closes it, unless it cannot be made.
        memory: a Region, which stays the caller's; or the size of an anonymous one that the server
            makes and closes ("4M").
        vectors: of each peer, 0..2048.
        names: make a directory of names at the end of the memory, as `ivshmem serve --names` does:
            True, with the usual number of slots; or that number. One that is there is used.
        channels: bytes, or a text such as "64M", to set aside for channels, as `ivshmem serve
            --channels` does; see Directory.create. There is a directory of names then, too.
        on_join, on_leave: called with a Peer, by the thread that runs the server. `on_leave` is not
            called for peers that `close()` disconnects. What they raise is logged.
        gate: called with the credentials of each process that connects, and the number of peers
            that its user has, before the process is sent anything. It returns a Verdict
            (see Rules). If it raises an Exception, that is logged, and the newcomer is
            refused. A newcomer that is refused is disconnected; QEMU then spins until it is
            stopped.

    It listens from the start. It serves peers while one of these runs: `serve_forever()` in the
    calling thread until `stop()`, `start()` in a thread of its own, or `step()` from another loop,
    which watches `fileno()` (asyncio: `loop.add_reader(server.fileno(), server.step, 0)`).
    `close()` disconnects all peers and removes the socket. Peers keep their memory and doorbells.

    If the socket's file is removed or replaced while it runs, its peers stay, but no newcomer finds
    it. A Server does not watch for that: it has no timer, and a program that embeds it may have
    moved the file itself. Pass a `Listener`, whose `astray()` tells; `relisten` with
    `Listener.bind_again` binds the path again. `ivshmem serve` does that every two seconds.

    Each call may be made in any thread, in a callback (`on_join`, `on_leave`, `gate`) and in a
    signal handler. None can deadlock. Each takes effect at once, except:

    - A signal handler can interrupt a change, which is some microseconds of each step. Then
      `evict`, `hold_leaves`, `hold` and `release` return at once, and take effect when that change
      is complete. `report` may or may not include a peer that is joining or leaving.
    - `close` in a callback, or in a signal handler that interrupts a step, takes effect when that
      step ends. Elsewhere it waits for the step that is under way.
    - `step` and `serve_forever` raise RuntimeError in a callback, and in a signal handler that
      interrupts a call of this server.
    - `start` and `relisten` are not for signal handlers.
    - In a forked child `close` closes the child's copies, and `stop` does nothing. All other
      methods raise RuntimeError there; properties work.

    A callback must not wait for a thread that calls `close`, which waits for the callback. With
    asyncio, make all calls except `serve_forever` in the loop's thread.

    Attributes:
        path: of the socket, absolute.
        region: the memory.
        vectors: of each peer.
        directory: of names, if `names` or `channels` asked for one; else None.
        error: what ended the thread of `start()`; None: nothing did.

    Raises:
        ValueError: a number of vectors that is not allowed; RegionError for a size.
        OSError: EADDRINUSE where a live server listens, or as of bind(2). Nothing is left behind.
    """

    # What subclasses in this package set before Server.__init__.
    _shared_id: int | None = None  # see Engine
    _section: Section | None = None  # see RegionServer
    _listens = True

    # What __del__, __repr__ and close() find where __init__ did not come to its end.
    _closed = True
    _released = True  # an interrupted close has set _closed alone
    _pid = 0
    _thread = 0
    path = "?"
    error: BaseException | None = None
    directory: Directory | None = None

    def __init__(
        self,
        path: str | os.PathLike[str] | Listener,
        memory: Region | SupportsIndex | str = "4M",
        vectors: int = 1,
        *,
        names: bool | int = False,
        channels: SupportsIndex | str | None = None,
        on_join: Callable[[Peer], object] | None = None,
        on_leave: Callable[[Peer], object] | None = None,
        gate: Gate | None = None,
    ) -> None:
        self._pid = os.getpid()
        self._closed = True  # until there is something to close
        self.vectors = operator.index(vectors)
        if not 0 <= self.vectors <= MAX_VECTORS:
            raise ValueError(f"{vectors} vectors: allowed are 0 to {MAX_VECTORS}")
        slots = None if names is True or names is False else operator.index(names)
        self._starts = [None]  # one: `start` takes it
        self._thread = 0  # its number, from its first moment on
        self._ended = False  # it serves no more
        self._awaiting: deque[Any] = deque()  # locks, one for each frame that waits for that
        self._stopping = False
        self._closing = False  # no step may begin
        self._close_wanted = False  # by a callback or signal handler
        self._turns = WorkLock()
        with contextlib.ExitStack() as undo:
            if isinstance(memory, Region):
                self.region = memory
            else:
                self.region = undo.enter_context(Region.create(memory))
            # QEMU aborts on what is no power of two.
            check_size(self.region.size, PAGE, what="memory that guests share")
            if names is not False or channels is not None:
                from ..peer.directory import Directory  # here: few regions have names

                self.directory = Directory.create(self.region, slots, channels=channels)
                undo.callback(self.directory.close)
            shared = descriptors.FdArray.copy(self.region.fileno())
            undo.callback(shared.close)
            readonly = descriptors.FdArray()
            undo.callback(readonly.close)
            listener = path if isinstance(path, Listener) else undo.enter_context(Listener(path))
            self.path = listener.path
            self._engine = Engine(
                listener.socket,
                shared,
                partial(_made_readonly, self.region, readonly),
                self.vectors,
                partial(_answer, self.vectors, self.region),
                on_join,
                on_leave,
                gate,
                self._section,
                self._shared_id,
                self._turns.work,
            )
            self._turns.wake = self._engine.wake
            if self._listens:
                listener.listen()
                import_the_rest()
            self._resources = undo.pop_all()
        if isinstance(path, Listener):
            self._resources.callback(listener.close)
        self._closed = False
        self._released = False

    # -- running ----------------------------------------------------------------------------------

    def fileno(self) -> int:
        """A descriptor, for any event loop, that is readable when `step(0)` has something to do.

        It stays the server's, and is closed by `close()`. Never waits; may be called anywhere.
        """
        self._check()
        return self._engine.poller.fileno()

    def step(self, timeout: float | None = None) -> None:
        """Wait at most `timeout` seconds (None: no limit) and do what there is to do.

        From any thread; a second thread waits until the step of the first one has ended, for
        `timeout` seconds at most; beside `start()` or `serve_forever()` it does nothing else. Not
        from a callback of a step, nor from a signal handler that interrupts a call of this server.

        Raises:
            ClosedError: the server is closed.
            RuntimeError: called by a callback or signal handler of a step, or in a forked child.
        """
        self._check()
        self._check_frame()
        if timeout is not None:
            deadline = time.monotonic() + seconds_of(timeout)
            if not self._turns.await_others(deadline):
                return
            timeout = left_until(deadline)
        self._step(timeout)

    def _step(self, timeout: float | None) -> None:
        turns = self._turns
        try:
            with turns.step, turns.under_way:
                try:
                    if not (self._closed or self._closing):
                        self._engine.step(timeout)
                finally:
                    turns.attend()
                    if self._close_wanted:
                        with turns.work:
                            self._close()
        finally:
            self._settle()

    def serve_forever(self) -> None:
        """Serve in this thread until `stop()` or `close()` is called.

        From any thread, as `step`. A signal handler runs at once if this is the main thread.

        Raises:
            ClosedError, RuntimeError: as of `step`.
        """
        self._check()
        self._check_frame()
        try:
            with woken_by_signals(self._engine.poller):
                self._turns.runner = threading.get_ident()
                while not (self._stopping or self._closed or self._closing):
                    self._step(None)
        finally:
            self._turns.runner = 0
            self._stopping = False
            self._turns.attend()  # what was left to this thread

    def _check_frame(self) -> None:
        if self._in_step:
            raise RuntimeError(
                "a callback or signal handler cannot begin a step while it interrupts another call"
                " of the same server"
            )

    def start(self: _S) -> _S:
        """Serve in a thread of its own until `close()` is called; return self.

        From any thread and callback, but not from a signal handler: Python's Thread.start is not
        made for that. If the new thread ends by an error, the log says so, the server closes,
        `error` has the error, and from then on all calls, and the end of a `with` block, raise
        ServerFailed.

        Raises:
            RuntimeError: it was started already; or no thread can be started.
        """
        self._check()
        try:
            self._starts.pop()  # in one step, so that only one caller gets it
        except IndexError:
            raise RuntimeError("the server runs in a thread already") from None
        thread = threading.Thread(target=self._run, name="ivshmem-server", daemon=True)
        atexit.register(self._forgotten)
        try:
            thread.start()
        except RuntimeError:
            atexit.unregister(self._forgotten)
            self._starts.append(None)
            raise
        return self

    def _run(self) -> None:
        self._thread = threading.get_ident()
        try:
            self.serve_forever()
        except BaseException as error:
            if not self._closed and not self._closing:
                self.error = error
                _log.exception("the server at %s failed, and closes", self.path)
                with contextlib.suppress(BufferError):  # `close` says when it raises that
                    self.close()
        finally:
            self._ended = True
            while self._awaiting:
                self._awaiting.popleft().release()

    def stop(self) -> None:
        """Make `serve_forever` return. Never waits; may be called anywhere."""
        if not self._closed and os.getpid() == self._pid:
            self._stopping = True
            self._engine.wake()

    # -- the state --------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether it is closed, by `close()` or because its thread has failed."""
        return self._closed

    @property
    def serving(self) -> bool:
        """Whether a thread serves now: that of `start()`, or one that is in `serve_forever()`."""
        started = not self._starts and not self._ended
        return not self._closed and (started or self._turns.runner != 0)

    @property
    def _in_step(self) -> bool:
        """Whether this is called by a callback of a step, or interrupts a step or a change."""
        return self._turns.in_step or self._turns.in_work

    @property
    def peers(self) -> list[Peer]:
        """The peers that are connected, by id. Never waits; may be called anywhere."""
        return [] if self._closed else self._engine.peers

    @property
    def paused(self) -> str:
        """Why newcomers wait in the listen backlog; "": they do not. May be called anywhere."""
        return self._engine.paused

    @property
    def counts(self) -> ServerCounts:
        """How often joins, leaves and the like have happened, as of now.

        Never waits; from any thread, callback and signal handler, also when the server is closed.
        """
        counts = self._engine.counts
        return ServerCounts(*[counts[name] for name in ServerCounts._fields])

    def report(self, *, interrupts: bool = True) -> list[PeerReport]:
        """How each peer stands, by id.

        From any thread, callback and signal handler. It waits for a change that another thread
        makes, which takes microseconds.

        Args:
            interrupts: count also the rings that peers have not taken, which takes a look at each
                of their eventfds.

        Raises:
            ClosedError: the server is closed.
        """
        self._check()
        if self._turns.in_work:  # a signal handler, which cannot wait for what it interrupts
            return self._engine.report(interrupts=interrupts)
        return self._ask(partial(self._engine.report, interrupts=interrupts))

    # -- peers ------------------------------------------------------------------------------------

    def evict(self, peer_id: int) -> None:
        """Disconnect a peer, and tell the others that it left.

        The process keeps its memory and its doorbells, and can still ring the peers that it knows,
        as each process that was once a peer. From any thread and callback; in a signal handler it
        may take effect a moment later, see Server.

        Raises:
            NoSuchPeer: there is none with this id.
            ClosedError: the server is closed.
        """
        self._check()
        if self._turns.in_work:
            # By serial number: in a moment the id can be another peer's.
            self._later(partial(self._engine.hang_up, self._engine.find(peer_id)))
        else:
            self._ask(partial(self._engine.evict, peer_id))

    @property
    def holds_leaves(self) -> bool:
        """Whether a QEMU that connects now is never told of leaves: see `hold_leaves`."""
        return self._engine.holds_leaves

    def hold_leaves(self, holds: bool) -> None:
        """Never tell QEMU that a peer left, so that its device can be unplugged.

        This includes QEMUs that are connected, but cannot undo what they were told before: `report`
        says how often that was. False: it ends for QEMUs that connect from now on. From any thread
        and callback; in a signal handler it may take effect a moment later, see Server.

        Raises:
            ClosedError: the server is closed.
        """
        self._check()
        act = partial(self._engine.hold_leaves, holds)
        if self._turns.in_work:
            self._later(act)
        else:
            self._ask(act)

    def hold(
        self, peer_id: int, *, linger: float | None = LINGER, asker: object | None = None
    ) -> bool:
        """Send a peer no messages for now.

        QEMU 10.0 and newer uses freed memory if any message comes while its device is being
        unplugged. Hold its messages before `device_del`: call this until it returns True, and
        unplug then. A peer whose set-up is under way is sent the rest of it. When the hold ends,
        the peer is told the difference: who has joined, and which of the peers that it knew have
        left. From any thread and callback; in a signal handler it may take effect a moment later,
        see Server.

        Args:
            linger: seconds after which the hold ends by itself; None: it does not. If several
                have asked, it lasts for the longest of their times. It ends at `release` in any
                case, and when the peer disconnects. If another process takes over, the
                time starts again there.
            asker: any object; then the time runs from `asker_is_gone(asker)` on.

        Returns:
            Whether the peer has read all that it was sent. If not, ask again in a moment.

        Raises:
            NoSuchPeer: there is none with this id.
            ClosedError: the server is closed.
        """
        self._check()
        engine = self._engine
        if self._turns.in_work:
            self._later(partial(engine.hold, engine.find(peer_id), linger, asker))
            return False
        return self._ask(lambda: engine.hold(engine.find(peer_id), linger, asker))

    def release(self, peer_id: int) -> bool:
        """End the `hold` of all askers; return whether the peer was held.

        From any thread and callback; in a signal handler it may take effect a moment later, see
        Server.

        Raises:
            NoSuchPeer: there is none with this id.
            ClosedError: the server is closed.
        """
        self._check()
        engine = self._engine
        if self._turns.in_work:
            serial = engine.find(peer_id)
            self._later(partial(engine.release, serial))
            return engine.holds(serial)
        return self._ask(lambda: engine.release(engine.find(peer_id)))

    def asker_is_gone(self, asker: object) -> None:
        """Let the time begin of each hold that only this `asker` wants; see `hold`.

        From any thread and callback; in a signal handler it may take effect a moment later.

        Raises:
            ClosedError: the server is closed.
        """
        self._check()
        act = partial(self._engine.asker_is_gone, asker)
        if self._turns.in_work:
            self._later(act)
        else:
            self._ask(act)

    def relisten(self, bind: Callable[[], None]) -> None:
        """Call `bind`, which replaces the listener's socket; it must not use the server.

        From any thread and callback; not from a signal handler.
        """
        self._ask(partial(self._engine.relisten, bind))

    def _ask(self, act: Callable[[], _T]) -> _T:
        """Have the engine do something when it is not being changed."""
        try:
            return self._turns.call(partial(self._unless_closed, act))
        finally:
            self._settle()

    def _later(self, act: Callable[[], object]) -> None:
        self._turns.later(lambda: None if self._closed else act())

    def _unless_closed(self, act: Callable[[], _T]) -> _T:
        self._check()
        return act()

    def _settle(self) -> None:
        """Do what a signal handler has left to the call that it interrupted."""
        if not self._turns.in_work:
            self._turns.attend()
            if self._close_wanted and not self._released and not self._turns.in_step:
                self.close()

    # -- the end ----------------------------------------------------------------------------------

    def close(self) -> None:
        """Stop, disconnect all peers and remove the socket; may be called twice.

        From any thread, callback and signal handler. It waits for the end of the step that is under
        way, and of the thread of `start()`. Called by a callback, or by a signal handler that
        interrupts a step, it takes effect when the step ends. `on_leave` is not called for the
        peers that it disconnects.

        Raises:
            BufferError: the server made the region, and a view of it is alive; all else is closed.
        """
        if os.getpid() != self._pid:
            self._close()  # without the locks, which a thread of the parent may have held
            return
        if not self._released:
            self._closing = True
            self.stop()
            if self._in_step:
                self._close_wanted = True
                return
            try:
                with self._turns.step, self._turns.work:
                    self._close()
            finally:
                self._turns.attend()  # those who wait are told that it is closed
        self._await_thread()

    def _close(self, *, abandoned: bool = False) -> None:
        if self._released:
            return
        self._closed = True
        atexit.unregister(self._forgotten)
        # Each of these may be done again: the next close finishes one that a signal handler ended.
        self._engine.close(forked=abandoned or os.getpid() != self._pid)
        self._resources.close()
        self._released = True

    def _await_thread(self) -> None:
        """Wait until the thread serves no more.

        Thread.join takes locks of Python's that a signal handler can find taken by the frame that
        it interrupts. So each waiting frame has a lock of its own, which the thread lets go.
        """
        if self._thread in (0, threading.get_ident()):
            return
        done = threading.Lock()
        done.acquire()
        self._awaiting.append(done)
        if not self._ended:
            done.acquire()

    def _forgotten(self) -> None:
        """At the end of the program: the thread has the server, so it was never collected."""
        if not self._closed and os.getpid() == self._pid:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=1)
            self.close()

    def _check(self) -> None:
        if self._closed or self._closing:
            if self.error is not None:
                raise self._failed() from self.error
            raise ClosedError("the server is closed")
        if os.getpid() != self._pid:
            raise RuntimeError(
                "a forked child shares this server's epoll object: it may only close"
            )

    def _failed(self) -> ServerFailed:
        error = self.error
        return ServerFailed(f"the server at {self.path} failed: {type(error).__name__}: {error}")

    def __enter__(self: _S) -> _S:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        self.close()
        if self.error is not None and kind is None:
            raise self._failed() from self.error

    def __repr__(self) -> str:
        state = "closed" if self._closed else counted(len(self.peers), "peer")
        return f"<ivshmem.Server at {self.path}, {state}>"

    def __del__(self, _warn: Any = warnings.warn) -> None:
        if not self._closed:
            _warn(f"unclosed {self!r}", ResourceWarning, source=self)
            self.close()


def _answer(vectors: int, region: Region) -> dict[str, int]:
    """What is told to those who only ask; `peer/inquiry.py: ask` says what it means."""
    file = os.fstat(region.fileno())
    return {
        "protocol": VERSION,
        "vectors": vectors,
        "size": region.size,
        "page_size": region.page_size,
        "device": file.st_dev,
        "inode": file.st_ino,
        "name_lost": int(region.name_leads_to() in ("nothing", "another")),
    }


def _made_readonly(region: Region, memory: descriptors.FdArray) -> descriptors.FdArray:
    """`memory`, which holds a descriptor for reading only from the first call on."""
    if not len(memory):
        memory.take(region.readonly_fd())
    return memory
