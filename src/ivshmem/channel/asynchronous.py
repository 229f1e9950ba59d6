"""Internal: how the tasks of an asyncio loop wait at the ends of channels.

Knows: one watched descriptor for each loop and membership, and which tasks sleep. Does not know:
what an end waits for.

A task that was woken tries again by itself, and takes what it waits for at that moment. So a
cancellation, a time limit or a close takes nothing from another task.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from ..errors import ClosedError
from ..system.time_limits import seconds_of
from .ends import ChannelEnd, Wakeup
from .membership import Membership

_T = TypeVar("_T")


class _LoopWatch:
    """What a loop watches for one membership, while a task waits there."""

    def __init__(self, membership: Membership) -> None:
        self._wakeup = Wakeup(membership)
        self._fd = self._wakeup.fileno()
        self._waiting: set[asyncio.Future[None]] = set()

    def add(self, future: asyncio.Future[None]) -> None:
        if not self._waiting:
            future.get_loop().add_reader(self._fd, self._wake)
        self._waiting.add(future)

    def discard(self, future: asyncio.Future[None]) -> None:
        self._waiting.discard(future)
        if not self._waiting and not future.get_loop().is_closed():
            future.get_loop().remove_reader(self._fd)

    def _wake(self) -> None:
        self._wakeup.clear_rings()
        for future in self._waiting:
            if not future.done():
                future.set_result(None)


def _watch_of(loop: asyncio.AbstractEventLoop, membership: Membership) -> _LoopWatch:
    loops = membership.loops
    if loops is None:
        raise ClosedError("the channels are closed")
    watch = loops.get(loop)
    if watch is None:
        watch = loops[loop] = _LoopWatch(membership)
    assert isinstance(watch, _LoopWatch)
    return watch


async def _sleep(end: ChannelEnd, membership: Membership, deadline: float | None) -> bool:
    """Sleep until there may be something at an end; whether the time is not over."""
    loop = asyncio.get_running_loop()
    if deadline is not None and loop.time() >= deadline:
        return False
    future = loop.create_future()
    timer = None
    there = end._begin_waiting()
    try:
        watch = _watch_of(loop, membership)
        watch.add(future)
    except BaseException:
        end._end_waiting()
        raise
    try:
        if there:
            await asyncio.sleep(0)
        else:
            if deadline is not None:
                timer = loop.call_at(deadline, _expire, future)
            await future
    finally:
        if timer is not None:
            timer.cancel()
        watch.discard(future)
        end._end_waiting()
    return True


def _expire(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


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
