"""The one epoll loop: what is called when a descriptor is readable, and how a wait is ended.

Knows: epoll, waking, signals that come at the wrong moment, work that takes long. Does not know:
what is watched.

Three classes use it. A server's engine and a request server watch many descriptors in steps that
their owner makes: they use `Poller`. A service makes the steps by itself: it is a `Loop`.
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
    from typing import TypeAlias, TypeVar

    _T = TypeVar("_T")

    Act: TypeAlias = Callable[[], object]
    ActOnEvents: TypeAlias = Callable[[int], object]
    Ready: TypeAlias = list[tuple[int, int]]  # tokens, each with its events


class Poller(Uncopied):
    """An epoll object, and what to call for each of its descriptors.

    Descriptors are watched level-triggered. They stay the caller's, who calls `unwatch` before
    closing one. Only `wake` may be called in other threads and in signal handlers.
    """

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._acts: dict[int, ActOnEvents] = {}  # by token
        self._tokens: dict[int, int] = {}  # by descriptor
        # Never used twice: an event that was fetched for a descriptor which has been closed since
        # cannot be taken for one of a new descriptor with the same number.
        self._next_token = 0
        with contextlib.ExitStack() as undo:
            self._epoll = descriptors.Epoll()
            undo.callback(self._epoll.close)
            self._wake = descriptors.FdArray.eventfds(1)
            undo.callback(self._wake.close)
            self.watch_events(self._wake[0], lambda _: self._wake.drain(0))
            self._undo = undo.pop_all()

    def fileno(self) -> int:
        """Readable when `wait(0)` returns something."""
        return self._epoll.fileno()

    def watch_events(self, fd: int, act: ActOnEvents, events: int = descriptors.EPOLLIN) -> None:
        """Call `act(events)` when one of these events has come.

        EPOLLHUP and EPOLLERR are always among them.

        Raises:
            OSError: ENOSPC or ENOMEM; `fd` is not watched.
        """
        token = self._next_token
        self._epoll.add(fd, token, events)
        self._next_token = token + 1
        self._acts[token] = act
        self._tokens[fd] = token

    def watch(self, fd: int, act: Act) -> None:
        """Call `act()` when `fd` is readable, or its other end is gone.

        Raises:
            OSError: as of `watch_events`.
        """
        self.watch_events(fd, lambda _: act())

    def watch_for(self, fd: int, events: int) -> None:
        """Change the events for which a watched descriptor is watched."""
        self._epoll.modify(fd, self._tokens[fd], events)

    def unwatch(self, fd: int) -> None:
        """Undo `watch`; nothing if `fd` is not watched."""
        token = self._tokens.pop(fd, None)
        if token is None:
            return
        self._acts.pop(token, None)
        if os.getpid() == self._pid:  # a forked child shares the epoll object
            with contextlib.suppress(ClosedError):  # a signal handler closed it just now
                self._epoll.remove(fd)

    def replace(self, fd: int, put: Act, events: int = descriptors.EPOLLIN) -> None:
        """Have `put` place another file under the number `fd`, which stays watched.

        epoll(7) watches the open file description. The old one may live on in another process (a
        parent, a service manager), and would report to this epoll object for ever.
        """
        self._epoll.remove(fd)
        try:
            put()
        finally:
            self._epoll.add(fd, self._tokens[fd], events)

    def wait(self, timeout: float | None) -> Ready:
        """Wait at most `timeout` seconds (None: no limit); return what `dispatch` takes."""
        return self._epoll.wait(timeout)

    def dispatch(self, ready: Ready) -> None:
        """Call what belongs to these events, except for descriptors that are no longer watched."""
        acts = self._acts
        for token, events in ready:
            act = acts.get(token)
            if act is not None:  # an act before this one can have called `unwatch`
                act(events)

    def wake(self) -> None:
        """Let a wait return. Never waits; from any thread, signal handler or act."""
        self._wake.signal(0)

    def close(self) -> None:
        """Close the epoll object; may be called twice. What was watched stays open."""
        self._tokens.clear()
        self._acts.clear()  # they refer to their owner, which most often owns this
        self._undo.close()


class Loop(Poller):
    """A poller that makes its own steps, one at a time."""

    def __init__(self) -> None:
        self._nesting: set[int] = set()  # descriptors whose acts can be begun while under way
        self._stopping = False
        self._turn = threading.RLock()  # held during a step
        self._active: list[int] = []  # tokens of the acts that are under way, the outer one first
        self._soon: deque[Act] = deque()
        self._closing = False  # asked for in a step
        self._runner = 0  # the thread that is in `run`
        super().__init__()

    def watch(self, fd: int, act: Act, *, nests: bool = False) -> None:
        """Call `act()` in a step when `fd` is readable, or its other end is gone.

        Args:
            nests: it can be begun again while it is under way; see `to_thread`.
        """
        super().watch(fd, act)
        if nests:
            self._nesting.add(fd)

    def unwatch(self, fd: int) -> None:
        """Undo `watch`; nothing if `fd` is not watched."""
        self._nesting.discard(fd)
        super().unwatch(fd)

    def step(self, timeout: float | None) -> None:
        """Wait at most `timeout` seconds (None: no limit) and do what there is to do.

        If an act calls `stop`, the acts after it are not called: what they are about may belong to
        another process by then.

        Raises:
            RuntimeError: called by an act, or by a signal handler that interrupts a step; or in a
                forked child.
        """
        self._check_process()
        if self.in_step:
            raise RuntimeError("what a step does cannot begin another step")
        try:
            with self._turn:
                self.dispatch(self.wait(timeout))
                while self._soon and not self._stopping:
                    self._soon.popleft()()
        finally:
            if self._closing and not self.in_step:
                super().close()

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise RuntimeError("a forked child shares this loop's epoll object: it may only close")

    def dispatch(self, ready: Ready) -> None:
        """Call what belongs to these events, until one act calls `stop`."""
        for token, events in ready:
            act = self._acts.get(token)
            if act is not None:  # an act before this one can have called `unwatch`
                self._active.append(token)
                try:
                    act(events)
                finally:
                    self._active.pop()
                if self._stopping:
                    break

    @property
    def in_step(self) -> bool:
        """Whether the caller is an act of a step, or interrupts a step."""
        return is_mine(self._turn)

    def soon(self, act: Act) -> None:
        """Call `act()` at the end of a step, outside of all other acts.

        Never waits; may be called in any thread, signal handler or act. What `act` raises ends the
        step.
        """
        self._soon.append(act)
        self.wake()

    def to_thread(self, call: Callable[[], _T]) -> _T:
        """Call `call()` in a thread of its own, and serve everything else until it returns.

        Acts that are under way (this call is a part of them) are not begun again before they have
        ended, unless they nest. Returns or raises what `call` does.
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

        paused = self._under_way()
        thread = threading.Thread(target=work, name="ivshmem-work")
        self.watch(done[0], lambda: None)
        try:
            for fd in paused:
                self.watch_for(fd, 0)
            thread.start()
            with self._turn:
                while not (result or errors):
                    self.dispatch(self.wait(None))
        finally:
            if thread.ident is not None:
                thread.join()
            for fd, token in paused.items():
                if self._tokens.get(fd) == token:
                    self.watch_for(fd, descriptors.EPOLLIN)
            self.unwatch(done[0])
            done.close()
        if errors:
            raise errors[0]
        return result[0]

    def _under_way(self) -> dict[int, int]:
        """Descriptors, with their tokens, whose acts are under way and do not nest."""
        return {
            fd: token
            for fd, token in self._tokens.items()
            if token in self._active and fd not in self._nesting
        }

    def run(self) -> None:
        """Make steps until `stop` is called."""
        try:
            with woken_by_signals(self):
                self._runner = threading.get_ident()
                while not self._stopping:
                    self.step(None)
        finally:
            self._runner = 0
            self._stopping = False

    def stop(self) -> None:
        """Let `run` return. Never waits; from any thread, signal handler or act."""
        self._stopping = True
        self.wake()

    @property
    def stopping(self) -> bool:
        """Whether `stop` was called, and `run` has not returned yet."""
        return self._stopping

    def close(self) -> None:
        """Close the epoll object; called in a step, at its end. May be called twice."""
        if self.in_step:
            self._closing = True
            self.stop()
        else:
            super().close()


@contextlib.contextmanager
def woken_by_signals(poller: Poller) -> Iterator[None]:
    """Run Python's signal handlers also if the signal comes just before epoll_wait(2).

    There is no system call to interrupt at that moment, and Python runs handlers only between
    bytecodes. Only the main thread runs handlers, so in other threads this does nothing.

    A wake-up descriptor that the program has set stays in use. To read which one is set, Python's
    only way is to set another one for a moment; and Python does not tell its warn_on_full_buffer.
    So that flag cannot be restored: it is False afterwards, because a warning that is not printed
    does less harm than one that nobody asked for.
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
                poller.watch(near.fileno(), lambda: near.recv(4096))
            else:
                _wake_by(before)
            yield
        finally:
            if before == -1:
                now = signal.set_wakeup_fd(-1)
                if now not in (-1, far.fileno()):
                    _wake_by(now)
                poller.unwatch(near.fileno())


def _wake_by(fd: int) -> None:
    """Set the program's wake-up descriptor again, unless the program has closed it."""
    with contextlib.suppress(OSError, ValueError):
        signal.set_wakeup_fd(fd, warn_on_full_buffer=False)
