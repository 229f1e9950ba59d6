"""Variations of what a peer and a program can do to an endpoint in a loop, as tables.

The loop turns and every wait can be cancelled, whatever state the eventfds are in; no interrupt is
lost by a cancellation at any moment.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from support.waiting import PATIENCE

from ivshmem import ClosedError, Region
from ivshmem.aio import AsyncEndpoint
from ivshmem.native.descriptors import FdArray
from ivshmem.peer.endpoint import Endpoint, Event

FULL = (1 << 64) - 2
OTHER = 1


class Bare(Endpoint):
    """An endpoint of three eventfds alone; so is its peer, whose doorbells are at hand."""

    id = 0

    def __init__(self) -> None:
        self.region = Region.create("4K")
        self.own = FdArray.eventfds(3)
        self.theirs = FdArray.eventfds(1)
        for vector in range(3):
            self._add_vector(os.dup(self.own[vector]))
        self._ring_self(0)
        self._add_bell(OTHER, os.dup(self.theirs[0]))

    def _read_news(self) -> None: ...

    def _next_peer_event(self) -> Event | None:
        return None


def run(main: Awaitable[Any]) -> Any:
    return asyncio.run(asyncio.wait_for(main, PATIENCE))


class Rescue:
    """Reads an eventfd after two seconds, so that who was held up goes on, and tells of it."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.came = False
        self.timer = threading.Timer(2, self.read)

    def read(self) -> None:
        self.came = True
        os.eventfd_read(self.fd)

    def __enter__(self) -> Rescue:
        self.timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.timer.cancel()
        self.timer.join(PATIENCE)


# -- ringing --------------------------------------------------------------------------------------

STATES: dict[str, tuple[int, bool]] = {
    "empty": (0, False),
    "empty, blocking": (0, True),
    "one below full, blocking": (FULL - 1, True),
    "full": (FULL, False),
    "full, blocking": (FULL, True),
}
RINGS: dict[str, Callable[[AsyncEndpoint[Bare]], object]] = {
    "ring": lambda end: end.ring(OTHER),
    "ring_all": lambda end: end.ring_all(),
    "several times": lambda end: end.ring_all([OTHER] * 70),
    "doorbell": lambda end: end.doorbell(OTHER).ring(),
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("ring", RINGS.values(), ids=RINGS)
def test_no_ring_holds_the_loop(ring: Callable[[AsyncEndpoint[Bare]], object], state: str) -> None:
    count, blocking = STATES[state]

    async def main() -> None:
        async with AsyncEndpoint(Bare()) as end:
            fd = end.endpoint.theirs[0]
            if count:
                os.eventfd_write(fd, count)
            os.set_blocking(fd, blocking)
            with Rescue(fd) as rescue:
                for _ in range(3):
                    ring(end)
                    await asyncio.sleep(0)
            assert not rescue.came
            assert end.endpoint.theirs.drain(0) >= min(count + 3, (1 << 63) - 1), (
                "as the count is told"
            )

    run(main())


# -- waiting --------------------------------------------------------------------------------------


async def next_event(end: AsyncEndpoint[Bare]) -> object:
    async for event in end:
        return event
    raise AssertionError("no event")


WAITS: dict[str, Callable[[AsyncEndpoint[Bare]], Awaitable[object]]] = {
    "one": lambda end: end.wait(1),
    "any": lambda end: end.wait(),
    "several": lambda end: end.wait([0, 1]),
    "events": next_event,
}
each_wait = pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
Wait = Callable[[AsyncEndpoint[Bare]], Awaitable[object]]


async def at_once(task: asyncio.Future[object], ring: Callable[[], None]) -> None:
    task.cancel()
    ring()


async def asleep(task: asyncio.Future[object], ring: Callable[[], None]) -> None:
    await asyncio.sleep(0)
    task.cancel()
    ring()


async def rung_first(task: asyncio.Future[object], ring: Callable[[], None]) -> None:
    await asyncio.sleep(0)
    ring()
    task.cancel()


async def in_the_turn_of_the_ring(task: asyncio.Future[object], ring: Callable[[], None]) -> None:
    await asyncio.sleep(0)
    ring()
    asyncio.get_running_loop().call_soon(task.cancel)


async def twice(task: asyncio.Future[object], ring: Callable[[], None]) -> None:
    await asyncio.sleep(0)
    task.cancel()
    task.cancel()
    ring()
    await asyncio.sleep(0)
    task.cancel()


MOMENTS = [at_once, asleep, rung_first, in_the_turn_of_the_ring, twice]


@each_wait
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_cancelled_wait_takes_nothing(wait: Wait, moment: Any) -> None:
    """The ring is either what the task returns, or there for the next who waits."""

    async def main() -> None:
        async with AsyncEndpoint(Bare()) as end:
            task = asyncio.ensure_future(wait(end))
            await moment(task, lambda: end.endpoint.own.signal(1))
            (outcome,) = await asyncio.gather(task, return_exceptions=True)
            if isinstance(outcome, asyncio.CancelledError):
                assert await end.wait(1) == 1
            else:
                assert outcome in (1, (1, 1))
                assert end.endpoint.wait(1, 0) is None, "it was counted once"

    run(main())


@each_wait
@pytest.mark.parametrize("blocking", [False, True])
def test_counters_that_another_drains(wait: Wait, blocking: bool) -> None:
    """The loop is told of a ring that is gone when it looks; it turns, and misses no later one."""

    async def main() -> None:
        async with AsyncEndpoint(Bare()) as end:
            own = end.endpoint.own
            os.set_blocking(own[1], not blocking)
            task = asyncio.ensure_future(wait(end))
            with Rescue(own[1]) as rescue:
                for _ in range(50):
                    os.set_blocking(own[1], blocking)
                    own.signal(1)
                    asyncio.get_running_loop().call_soon(own.drain, 1)
                    await asyncio.sleep(0)
                    if task.done():
                        task = asyncio.ensure_future(wait(end))
                own.drain(1)
                own.signal(1)
                assert await task in (1, (1, 1))
            assert not rescue.came

    run(main())


@each_wait
def test_a_limit_holds_while_nothing_comes(wait: Wait) -> None:
    async def main() -> None:
        async with AsyncEndpoint(Bare()) as end:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(wait(end), 0.01)
            end.endpoint.own.signal(1)
            assert await wait(end) in (1, (1, 1))

    run(main())


@each_wait
def test_closed_while_it_waits(wait: Wait) -> None:
    async def main() -> None:
        end = AsyncEndpoint(Bare())
        tasks = [asyncio.ensure_future(wait(end)) for _ in range(3)]
        await asyncio.sleep(0)
        await end.aclose()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(outcome, (ClosedError, AssertionError)), "the end of the events"

    run(main())


@each_wait
def test_one_loop_after_another(wait: Wait) -> None:
    """What belongs to a loop that is closed goes to the next; while it is open, it is refused."""
    end = AsyncEndpoint(Bare())

    async def one() -> None:
        end.endpoint.own.signal(1)
        assert await wait(end) in (1, (1, 1))

    run(one())
    run(one())
    loop = asyncio.new_event_loop()
    loop.run_until_complete(one())
    with pytest.raises(RuntimeError, match="belongs to another event loop"):
        run(one())
    loop.close()
    assert end.endpoint.wait(1, 0) == 1
    run(one())
    end.close()
