"""Internal: how the tasks of an asyncio loop wait at the ends of channels.

Knows: one watched descriptor for each loop and membership, and which tasks sleep. Does not know:
what an end waits for.

A task that was woken tries again by itself, and takes what it waits for at that moment. So a
cancellation, a time limit or a close takes nothing from another task.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

from ..errors import ClosedError
from ..peer.waiting_tasks import Waiter
from ..system.time_limits import seconds_of
from .ends import ChannelEnd, Wakeup
from .membership import Membership

_T = TypeVar("_T")


class _LoopWatch:
    """What a loop watches for one membership: its descriptor, at most once without a waiter.

    To watch it for each sleep anew costs more than all else that a sleep costs.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, membership: Membership) -> None:
        self._loop = weakref.ref(loop)
        self._membership = membership
        self._wakeup = Wakeup(membership)
        self._fd = self._wakeup.fileno()
        self._watched = False
        self._waiting: dict[Waiter, ChannelEnd] = {}

    def add(self, waiter: Waiter, end: ChannelEnd, loop: asyncio.AbstractEventLoop) -> None:
        if not self._watched:
            loop.add_reader(self._fd, self._wake)
            self._watched = True
        self._waiting[waiter] = end

    def discard(self, waiter: Waiter) -> None:
        self._waiting.pop(waiter, None)

    def _wake(self) -> None:
        self._wakeup.clear_rings()
        loop = self._loop()
        assert loop is not None  # it is running
        waiting = list(self._waiting.items())
        if not waiting or self._membership.closed:
            loop.remove_reader(self._fd)
            self._watched = False
        for number, (waiter, end) in enumerate(waiting):
            try:
                if waiter.callback is not None and not end._sleeps_on():
                    waiter.resume(None)
            except BaseException:  # KeyboardInterrupt and SystemExit leave the task's step
                for other, _ in waiting[number + 1 :]:
                    loop.call_soon(other.expire)
                raise


def _watch_of(loop: asyncio.AbstractEventLoop, membership: Membership) -> _LoopWatch:
    loops = membership.loops
    if loops is None:
        raise ClosedError("the channels are closed")
    watch = loops.get(loop)
    if watch is None:
        # A loop that was closed while tasks slept is kept by them: without this, their ends were
        # never closed.
        for former in loops.keyrefs():
            other = former()
            if other is not None and other.is_closed():
                loops.pop(other, None)
        watch = loops[loop] = _LoopWatch(loop, membership)
    assert isinstance(watch, _LoopWatch)
    return watch


async def _sleep(end: ChannelEnd, membership: Membership, deadline: float | None) -> bool:
    """Sleep until there may be something at an end; whether the time is not over."""
    loop = asyncio.get_running_loop()
    if deadline is not None and loop.time() >= deadline:
        return False
    waiter = Waiter(loop)
    timer = None
    there = end._begin_waiting()
    try:
        watch = _watch_of(loop, membership)
        watch.add(waiter, end, loop)
    except BaseException:
        end._end_waiting()
        raise
    try:
        if there:
            await asyncio.sleep(0)
        else:
            if deadline is not None:
                timer = loop.call_at(deadline, waiter.expire)
            await waiter
    finally:
        if timer is not None:
            timer.cancel()
        watch.discard(waiter)
        end._end_waiting()
    return True


async def until_something(
    end: ChannelEnd, call: Callable[..., _T], timeout: float | None, *args: Any
) -> _T:
    """Call until the result is not None, or the time is over.

    Args:
        call: takes `args` and timeout=0, with which it does not wait.
    """
    found = call(*args, timeout=0)
    if found is not None:
        return found
    deadline = _deadline(timeout)
    while await _sleep(end, end._membership(), deadline):
        found = call(*args, timeout=0)
        if found is not None:
            break
    return found


async def until_in_time(
    end: ChannelEnd, call: Callable[..., _T], timeout: float | None, *args: Any, **options: Any
) -> _T:
    """Call until it does not raise TimeoutError, or the time is over, which raises it."""
    deadline = _deadline(timeout)
    while True:
        try:
            return call(*args, timeout=0, **options)
        except TimeoutError:
            if not await _sleep(end, end._membership(), deadline):
                raise


async def until_no_wait(
    end: ChannelEnd, call: Callable[..., _T], timeout: float | None, *args: Any
) -> _T:
    """Call until it does not raise BlockingIOError; TimeoutError if the time is over."""
    deadline = _deadline(timeout)
    while True:
        try:
            return call(*args)
        except BlockingIOError:
            if not await _sleep(end, end._membership(), deadline):
                raise TimeoutError(
                    f"connection of {end.name!r}: nothing moved in {timeout:g} s"
                ) from None


def _deadline(timeout: float | None) -> float | None:
    return None if timeout is None else asyncio.get_running_loop().time() + seconds_of(timeout)
