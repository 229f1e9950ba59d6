"""Who works on an object that one frame at a time may change: threads, and signal handlers.

Knows: locks, and which frame has them. Does not know: what is changed.

A signal handler runs in the main thread, between any two bytecodes of whatever that thread is
doing. So it can come while its own thread has a lock, and nothing that the handler calls may wait
for that lock, or for a thread that waits for it. What makes a deadlock impossible here:

1. `work` is held only by code of this package that changes the object, never while code of others
   runs (callbacks, gates, handlers of the log), and never while anything is waited for.
2. A frame that finds `work` held by its own thread interrupts such a change: it does not wait. What
   it wants is put in the queue, and the interrupted frame does it when its change is complete.
3. Where another thread makes the steps, that thread does what is in the queue, so that a signal
   handler that comes now holds `work` up for nobody. If that thread is kept from it by a callback,
   the frame that waits does it after a moment: by rule 1 it gets `work`.

A lock is only taken by `with`: CPython runs no signal handler between taking a lock and entering
the block. RLock._is_owned() tells in one call whether this thread has a lock. (A lock and a note
who has it would be two steps, with room for a signal handler in between.)
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from . import late_logging

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypeVar

    _T = TypeVar("_T")

_log = late_logging.log_of("ivshmem.server")

_LOOKS = (0.0002, 0.01)  # seconds between two looks whether another thread steps
_PATIENCE = 0.2  # seconds until a command is not left to a thread that is kept from it


class WorkLock:
    """The turns of one object.

    Attributes:
        wake: lets the wait of a step end; may be called from any thread or signal handler.
        step: held during a step, its waiting and its callbacks included.
        under_way: held as long. Any thread can ask it whether a step is under way.
        work: held during a change.
        runner: the thread that makes step after step; 0: none does. A hint, which may be out of
            date.
    """

    def __init__(self) -> None:
        self.wake: Callable[[], object] = lambda: None
        self.step = threading.RLock()
        self.under_way = threading.Lock()
        self.work = threading.RLock()
        self.runner = 0
        self._commands: deque[_Command] = deque()

    @property
    def in_step(self) -> bool:
        """Whether this thread is in a step: this is a callback of it, or interrupts it."""
        return is_mine(self.step)

    @property
    def in_work(self) -> bool:
        """Whether this frame interrupts a change."""
        return is_mine(self.work)

    def call(self, act: Callable[[], _T]) -> _T:
        """Do this between two changes, and return what it returns.

        Not for a frame that interrupts a change: see `in_work` and `later`.
        """
        command = _Command(act)
        self._commands.append(command)
        try:
            if self.in_step or not self._others_step():
                self.attend()
            else:
                self.wake()
            while not command.done.acquire(timeout=_PATIENCE):
                self.attend()
        except BaseException:  # a signal handler's, for instance: nobody waits for it any more
            command.act = None
            raise
        result: _T = command.result()
        return result

    def later(self, act: Callable[[], object]) -> None:
        """Do this when the change is complete that this frame interrupts; errors are logged."""
        self._commands.append(_Command(act, waited=False))
        self.wake()

    def attend(self) -> None:
        """Do what is in the queue; to be called after each change."""
        # A signal handler can add something until `work` is let go, so look again after that.
        while self._commands:
            with self.work:
                while self._commands:
                    self._commands.popleft().run()

    def await_others(self, deadline: float) -> bool:
        """Wait until no other thread steps; False: one still does at `deadline`.

        Between this and taking `step` another thread may begin. A lock that is taken with a time
        limit would not have that gap, but no `with` can take it so: see above.
        """
        pause, longest = _LOOKS
        while self._others_step():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(pause, left))
            pause = min(pause * 2, longest)
        return True

    def _others_step(self) -> bool:
        return self.under_way.locked() or self.runner not in (0, threading.get_ident())


class _Command:
    """Something to do, for a frame that waits for it, or for none."""

    def __init__(self, act: Callable[[], object], *, waited: bool = True) -> None:
        self.act: Callable[[], object] | None = act
        # A lock of its own for each: one frame waits for it, so none can find it half taken.
        self.done = threading.Lock()
        self.done.acquire()
        self._waited = waited
        self._result: Any = None
        self._error: BaseException | None = None

    def run(self) -> None:
        act = self.act
        if act is None:
            return
        try:
            self._result = act()
        except Exception as error:
            self._error = error
            if not self._waited:
                _log.exception("what was to be done after a step failed")
        except BaseException:  # of a signal handler in the frame that does this
            self._error = RuntimeError("the thread that was to do this was interrupted")
            raise
        finally:
            self.done.release()

    def result(self) -> Any:
        if self._error is not None:
            raise self._error
        return self._result


def is_mine(lock: Any) -> bool:
    """Whether this thread has an RLock."""
    owned: bool = lock._is_owned()
    return owned
