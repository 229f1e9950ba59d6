"""One loop for what is readable, which signal handlers and other threads can wake.

Knows: epoll, waking, signals that come at the wrong moment, work that takes long. Does not know:
what is watched.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator

from ..errors import ClosedError
from ..native import descriptors
from .uncopied import Uncopied
from .work_lock import is_mine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeVar

    _T = TypeVar("_T")

_Watch = Callable[[int, Callable[[], object]], object]


class Loop(Uncopied):
    """Calls what belongs to a descriptor when that is readable.

    Descriptors are watched level-triggered, and stay the caller's: `unwatch` comes before they are
    closed.
    """

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._acts: dict[int, Callable[[], object]] = {}  # by token
        self._tokens: dict[int, int] = {}  # by descriptor
        self._nesting: set[int] = set()  # tokens of acts that can be begun while they are under way
        self._next = 0
        self._stopping = False
        self._turn = threading.RLock()  # held during a step
        self._active: list[int] = []  # tokens of the acts that are under way, the outer one first
        self._soon: deque[Callable[[], object]] = deque()
        self._closing = False  # asked for in a step
        self._runner = 0  # the thread that is in `run`
        with contextlib.ExitStack() as undo:
            self._epoll = descriptors.Epoll()
            undo.callback(self._epoll.close)
            self._wake = descriptors.FdArray.eventfds(1)
            undo.callback(self._wake.close)
            self.watch(self._wake[0], lambda: self._wake.drain(0))
            self._undo = undo.pop_all()

    def fileno(self) -> int:
        """Readable when `step(0)` has something to do."""
        return self._epoll.fileno()

    def watch(self, fd: int, act: Callable[[], object], *, nests: bool = False) -> None:
        """Let a step do this when `fd` is readable, or its other end is gone.

        Args:
            nests: it can be begun again while it is under way; see `to_thread`.
        """
        self._epoll.add(fd, self._next, descriptors.EPOLLIN)
        self._acts[self._next] = act
        self._tokens[fd] = self._next
        if nests:
            self._nesting.add(self._next)
        self._next += 1

    def unwatch(self, fd: int) -> None:
        """Undo `watch`; nothing if it was not watched."""
        if fd in self._tokens:
            token = self._tokens.pop(fd)
            del self._acts[token]
            self._nesting.discard(token)
            if os.getpid() == self._pid:  # a forked child shares the epoll object
                self._epoll.remove(fd)

    def step(self, timeout: float | None) -> None:
        """Wait at most `timeout` seconds (None: as long as it takes) and do what there is to do.

        Nothing is done any more once something that is done here has called `stop`: what is left
        may be another process's by then.

        Raises:
            RuntimeError: called by what is done in a step, or by a signal handler that interrupts
                one; or in a forked child.
        """
        self._check_process()
        if self.in_step:
            raise RuntimeError("what a step does cannot begin another step")
        try:
            with self._turn:
                self._dispatch(timeout)
                while self._soon and not self._stopping:
                    self._soon.popleft()()
        finally:
            if self._closing and not self.in_step:
                self._undo.close()

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise RuntimeError("a forked child shares this loop's epoll object: it may only close")

    def _dispatch(self, timeout: float | None) -> None:
        for token, _ in self._epoll.wait(timeout):
            if token in self._acts:  # not unwatched by one before it
                self._active.append(token)
                try:
                    self._acts[token]()
                finally:
                    self._active.pop()
                if self._stopping:
                    break

    @property
    def in_step(self) -> bool:
        """Whether this is done in a step, or interrupts one."""
        return is_mine(self._turn)

    def soon(self, act: Callable[[], object]) -> None:
        """Have a step do this at its end, when nothing else is being done.

        Never waits; may be called in any thread, signal handler or act. What it raises ends the
        step.
        """
        self._soon.append(act)
        self.wake()

    def to_thread(self, call: Callable[[], _T]) -> _T:
        """Do what takes long in a thread of its own; until it returns, the loop does all the rest.

        The rest is what is watched, except for acts that are under way, of which this call is a
        part: they are not begun again before they have ended, unless they nest. Returns or raises
        what `call` does.
        """
        done = descriptors.FdArray.eventfds(1)
        result: list[_T] = []
        errors: list[BaseException] = []

        def work() -> None:
            try:
                result.append(call())
            except BaseException as error:
                errors.append(error)
            finally:
                done.signal(0)

        paused = [
            (fd, token)
            for token in self._active
            if token not in self._nesting
            for fd in [fd for fd, its in self._tokens.items() if its == token]
        ]
        thread = threading.Thread(target=work, name="ivshmem-work")
        self.watch(done[0], lambda: None)
        try:
            for fd, token in paused:
                self._epoll.modify(fd, token, 0)
            thread.start()
            with self._turn:
                while not (result or errors):
                    self._dispatch(None)
        finally:
            if thread.ident is not None:
                thread.join()
            for fd, token in paused:
                if token in self._acts:
                    self._epoll.modify(fd, token, descriptors.EPOLLIN)
            self.unwatch(done[0])
            done.close()
        if errors:
            raise errors[0]
        return result[0]

    def run(self) -> None:
        """Make steps until `stop` is called."""
        try:
            with woken_by_signals(self.watch, self._unwatch):
                self._runner = threading.get_ident()
                while not self._stopping:
                    self.step(None)
        finally:
            self._runner = 0
            self._stopping = False

    def _unwatch(self, fd: int) -> None:
        with contextlib.suppress(ClosedError):  # by what was done in a step
            self.unwatch(fd)

    def stop(self) -> None:
        """Let `run` return. Never waits; from any thread, signal handler or act."""
        self._stopping = True
        self.wake()

    @property
    def stopping(self) -> bool:
        """Whether `stop` was called, and `run` has not returned yet."""
        return self._stopping

    def wake(self) -> None:
        """Let a step that waits return. Never waits; from any thread, signal handler or act."""
        self._wake.signal(0)

    def close(self) -> None:
        """Close what was made here; called in a step, when that ends. May be called twice."""
        if self.in_step:
            self._closing = True
            self.stop()
        else:
            self._undo.close()


@contextlib.contextmanager
def woken_by_signals(watch: _Watch, unwatch: Callable[[int], object]) -> Iterator[None]:
    """Let Python's signal handlers run also if the signal comes just before epoll_wait.

    The kernel has nothing to interrupt then, and Python runs handlers only between system calls;
    only the main thread does. A wake-up descriptor that somebody else has set stays. Python cannot
    tell which one is set without setting another, and never tells its `warn_on_full_buffer`. It is
    put back as False: a warning that is not printed harms less than one that nobody asked for.
    """
    if threading.get_ident() != threading.main_thread().ident:
        yield
        return
    near, far = socket.socketpair()
    with near, far:
        near.setblocking(False)
        far.setblocking(False)
        before = -1
        try:
            before = signal.set_wakeup_fd(far.fileno(), warn_on_full_buffer=False)
            if before == -1:
                watch(near.fileno(), lambda: near.recv(4096))
            else:
                _wake_by(before)
            yield
        finally:
            if before == -1:
                now = signal.set_wakeup_fd(-1)
                if now not in (-1, far.fileno()):
                    _wake_by(now)
                unwatch(near.fileno())


def _wake_by(fd: int) -> None:
    """Put back what somebody else had set, unless that has been closed."""
    with contextlib.suppress(OSError, ValueError):
        signal.set_wakeup_fd(fd, warn_on_full_buffer=False)
