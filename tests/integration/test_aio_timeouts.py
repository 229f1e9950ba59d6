"""Time limits in asyncio: the same argument and the same results as without."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Coroutine
from typing import Any

import pytest
from support.waiting import PATIENCE

import ivshmem
from ivshmem import Interrupt, PeerJoined, Region
from ivshmem.aio import AsyncEndpoint, connect_async
from ivshmem.peer.endpoint import Endpoint, Event

SHORT = 0.02


class Bare(Endpoint):
    """An endpoint of eventfds alone, with id 0."""

    id = 0

    def __init__(self, vectors: int = 3) -> None:
        self.region = Region.create("4K")
        for _ in range(vectors):
            self._add_vector(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        self._ring_self(0)

    def _read_news(self) -> None: ...

    def _next_peer_event(self) -> Event | None:
        return None


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, PATIENCE))


@pytest.mark.parametrize("vectors", [0, None, [0, 1], (2,), range(3)], ids=str)
@pytest.mark.parametrize("timeout", [0, SHORT, -1])
def test_a_wait_that_brings_nothing_returns_none(vectors: Any, timeout: float) -> None:
    async def main() -> None:
        async with AsyncEndpoint(Bare()) as end:
            begun = time.monotonic()
            assert await end.wait(vectors, timeout) is None
            assert end.endpoint.wait(vectors, timeout) is None, "the same without asyncio"
            assert time.monotonic() - begun >= 2 * max(timeout, 0) * 0.9
            assert await end.next_event(timeout) is None

    run(main())


def test_rings_after_a_limit_are_not_lost() -> None:
    async def main() -> None:
        async with AsyncEndpoint(Bare()) as end:
            for number in range(1, 50):
                assert await end.wait(1, 0.0001) is None
                for _ in range(number):
                    end.ring(0, 1)
                assert await end.wait(1, SHORT) == number
                end.ring(0, 2)
                assert await end.wait([0, 2], SHORT) == Interrupt(2, 1)

    run(main())


def test_a_limit_of_one_waiter_leaves_the_others() -> None:
    async def main() -> None:
        async with AsyncEndpoint(Bare()) as end:
            patient = [asyncio.ensure_future(end.wait(0)) for _ in range(2)]
            hasty = [asyncio.ensure_future(end.wait(0, SHORT)) for _ in range(3)]
            patient.append(asyncio.ensure_future(end.wait(0)))
            assert await asyncio.gather(*hasty) == [None] * 3
            for waiter in patient:
                assert not waiter.done()
                end.ring(0, 0)
                assert await waiter == 1

    run(main())


def test_no_wait_gives_other_tasks_their_turn() -> None:
    """A loop of looks at a vector that is rung all the time does not keep the others out."""

    async def main() -> None:
        async with AsyncEndpoint(Bare()) as end:
            turns = 0

            async def other() -> None:
                nonlocal turns
                while True:
                    turns += 1
                    await asyncio.sleep(0)

            task = asyncio.ensure_future(other())
            for _ in range(1000):
                end.ring(0, 0)
                assert await end.wait(0, 0) == 1
            assert turns > 5
            task.cancel()

    run(main())


@pytest.mark.parametrize("timeout", [float("nan")])
def test_what_is_not_a_number_is_refused(timeout: float) -> None:
    async def main() -> None:
        async with AsyncEndpoint(Bare()) as end:
            for vectors in (0, None, [0, 1]):
                with pytest.raises(ValueError, match="not a number"):
                    await end.wait(vectors, timeout)
            with pytest.raises(ValueError, match="not a number"):
                await end.next_event(timeout)

    run(main())


def test_events_end_in_time(socket_path: str) -> None:
    async def main() -> None:
        with ivshmem.Server(socket_path).start():
            async with connect_async(socket_path) as one, connect_async(socket_path) as two:
                two.ring(one.id)
                seen = [event async for event in one.events(timeout=0.3)]
                assert sorted(map(str, seen)) == sorted(
                    map(str, [PeerJoined(two.id), Interrupt(0, 1)])
                )
                assert [event async for event in one.events(timeout=0)] == []
                assert one.peer_events() == []
                assert one.vectors_of(two.id) == 1

    run(main())


class TestWords:
    def test_a_change_that_is_rung_for(self) -> None:
        async def main() -> None:
            async with AsyncEndpoint(Bare()) as end:
                word, sleeping = end.region.atomic_u32(0), end.region.atomic_u32(4)
                waiting = asyncio.ensure_future(end.wait_word(word, 0, 1, sleeping=sleeping))
                while not sleeping.load():
                    await asyncio.sleep(0)
                end.ring(0, 1)  # for nothing
                await asyncio.sleep(SHORT)
                assert not waiting.done()
                word.store(7)
                end.ring(0, 1)
                assert await waiting == 7
                assert sleeping.load() == 0
                assert await end.wait_word(word, 0) == 7, "changed already"

        run(main())

    @pytest.mark.parametrize("timeout", [0, SHORT])
    def test_no_change_in_time(self, timeout: float) -> None:
        async def main() -> None:
            async with AsyncEndpoint(Bare()) as end:
                word, sleeping = end.region.atomic_u64(0), end.region.atomic_u32(8)
                assert await end.wait_word(word, 0, timeout=timeout, sleeping=sleeping) is None
                assert end.endpoint.wait_word(word, 0, timeout=timeout, sleeping=sleeping) is None
                assert sleeping.load() == 0

        run(main())

    def test_zero_is_a_value(self) -> None:
        async def main() -> None:
            async with AsyncEndpoint(Bare()) as end:
                word = end.region.atomic_u32(0)
                assert await end.wait_word(word, 5) == 0
                assert end.endpoint.wait_word(word, 5) == 0

        run(main())

    def test_rung_without_end_it_ends_in_time(self) -> None:
        async def main() -> None:
            async with AsyncEndpoint(Bare()) as end:
                word = end.region.atomic_u32(0)

                async def ring() -> None:
                    while True:
                        end.ring(0, 0)
                        await asyncio.sleep(0)

                ringing = asyncio.ensure_future(ring())
                assert await end.wait_word(word, 0, timeout=SHORT) is None
                ringing.cancel()

        run(main())


SAME_CALLS = (
    *("wait", "wait_word", "next_event", "events", "peer_events", "ring_all", "doorbell"),
    *("current_id", "fileno", "vectors", "closed", "id", "region"),
)


@pytest.mark.parametrize("name", SAME_CALLS)
def test_what_the_endpoint_has_is_here_too(name: str) -> None:
    end = AsyncEndpoint(Bare())
    assert hasattr(end, name)
    assert hasattr(end.endpoint, name)
    end.close()
