"""One loop for what is readable, which signal handlers and other threads can wake.

Knows: epoll, waking, signals that come at the wrong moment. Does not know: what is watched.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator

from . import _fds

_Watch = Callable[[int, Callable[[], object]], object]


class Loop:
    """Calls what belongs to a descriptor when that is readable.

    Descriptors are watched level-triggered, and stay the caller's: `unwatch` comes before they are
    closed.
    """

    def __init__(self) -> None:
        self._acts: dict[int, Callable[[], object]] = {}  # by token
        self._tokens: dict[int, int] = {}  # by descriptor
        self._next = 0
        self._stopping = False
        with contextlib.ExitStack() as undo:
            self._epoll = _fds.Epoll()
            undo.callback(self._epoll.close)
            self._wake = _fds.FdArray.eventfds(1)
            undo.callback(self._wake.close)
            self.watch(self._wake[0], lambda: self._wake.drain(0))
            self._undo = undo.pop_all()

    def fileno(self) -> int:
        """Readable when `step(0)` has something to do."""
        return self._epoll.fileno()

    def watch(self, fd: int, act: Callable[[], object]) -> None:
        """Let a step do this when `fd` is readable, or its other end is gone."""
        self._epoll.add(fd, self._next, _fds.EPOLLIN)
        self._acts[self._next] = act
        self._tokens[fd] = self._next
        self._next += 1

    def unwatch(self, fd: int) -> None:
        """Undo `watch`; nothing if it was not watched."""
        if fd in self._tokens:
            del self._acts[self._tokens.pop(fd)]
            self._epoll.remove(fd)

    def step(self, timeout: float | None) -> None:
        """Wait at most `timeout` seconds (None: as long as it takes) and do what there is to do.

        Nothing is done any more once something that is done here has called `stop`: what is left
        may be another process's by then.
        """
        for token, _ in self._epoll.wait(timeout):
            if token in self._acts:  # not unwatched by one before it
                self._acts[token]()
                if self._stopping:
                    break

    def run(self) -> None:
        """Make steps until `stop` is called."""
        try:
            with woken_by_signals(self.watch, self.unwatch):
                while not self._stopping:
                    self.step(None)
        finally:
            self._stopping = False

    def stop(self) -> None:
        """Let `run` return; from any thread or a signal handler."""
        self._stopping = True
        self.wake()

    def wake(self) -> None:
        """Let a step that waits return; from any thread or a signal handler."""
        self._wake.signal(0)

    def close(self) -> None:
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
