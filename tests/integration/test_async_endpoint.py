"""What an AsyncEndpoint owes its loop: nothing in it waits, and all that an endpoint has is there.

The hostile peer here fills the counter of its eventfd and clears O_NONBLOCK; what takes time to
close is an endpoint that says so.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from support.waiting import PATIENCE

import ivshmem
from ivshmem import ClosedError, Directory, Interrupt, NameTaken, NoSuchVector, Region
from ivshmem.aio import AsyncEndpoint, connect_async, publish_async, wait_for_async
from ivshmem.peer import names_table
from ivshmem.peer.endpoint import Endpoint, Event

MakeServer = Callable[..., ivshmem.Server]
FULL = (1 << 64) - 2


class Bare(Endpoint):
    """An endpoint of eventfds alone, with id 0; peer 1's doorbell is at hand."""

    id = 0

    def __init__(self, vectors: int = 3) -> None:
        self.region = Region.create("4K")
        for _ in range(vectors):
            self._add_vector(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        self._ring_self(0)
        self.theirs = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._add_bell(1, os.dup(self.theirs))

    def _read_news(self) -> None: ...

    def _next_peer_event(self) -> Event | None:
        return None

    def close(self) -> None:
        if not self.closed:
            os.close(self.theirs)
        super().close()


class Slow(Bare):
    """One that takes its time to close, as a device does that another process is about to open."""

    def __init__(self) -> None:
        super().__init__()
        self.may_close = threading.Event()
        self.closed_by: list[str] = []

    def close(self) -> None:
        if not self.closed:
            assert self.may_close.wait(PATIENCE), "the loop stood still"
            self.closed_by.append(threading.current_thread().name)
        super().close()


def run(main: Any) -> Any:
    return asyncio.run(asyncio.wait_for(main, PATIENCE))


# -- ringing --------------------------------------------------------------------------------------

RINGS: dict[str, Callable[[AsyncEndpoint[Bare]], object]] = {
    "ring": lambda end: end.ring(1),
    "ring_all": lambda end: end.ring_all([1, 0], [0]),
    "ring_all of all": lambda end: end.ring_all(),
    "doorbell": lambda end: end.doorbell(1).ring(),
}


@pytest.mark.parametrize("ring", RINGS.values(), ids=RINGS)
def test_a_hostile_peer_does_not_stop_the_loop(ring: Callable[[AsyncEndpoint[Bare]], None]) -> None:
    async def main() -> None:
        async with AsyncEndpoint(Bare()) as end:
            fd = end.endpoint.theirs
            os.eventfd_write(fd, FULL)
            os.set_blocking(fd, True)
            rescued = threading.Event()

            def rescue() -> None:
                rescued.set()
                os.eventfd_read(fd)

            timer = threading.Timer(3, rescue)
            timer.start()
            try:
                for _ in range(100):
                    ring(end)
            finally:
                timer.cancel()
                timer.join()
            assert not rescued.is_set(), "the loop was held up"
            assert os.eventfd_read(fd) >= FULL
            ring(end)
            assert os.eventfd_read(fd) == 1

    run(main())


def test_as_a_real_peer_does_it(server: MakeServer, socket_path: str) -> None:
    """The same, with the descriptors that a server hands out."""
    server("64K")

    async def main() -> None:
        async with connect_async(socket_path) as one, connect_async(socket_path) as two:
            await asyncio.sleep(0)
            fd = two.endpoint._descriptor(0)
            os.eventfd_write(fd, FULL)
            os.set_blocking(fd, True)
            timer = threading.Timer(3, lambda: os.eventfd_read(fd))
            timer.start()
            begun = time.monotonic()
            one.ring(two.id)
            assert one.ring_all() == 1
            assert time.monotonic() - begun < 2
            timer.cancel()
            timer.join()
            assert await two.wait(0) > 1 << 62
            one.ring(two.id)
            assert await two.wait(0) == 1

    run(main())


# -- closing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["aclose", "async with"])
def test_the_loop_turns_while_it_closes(way: str) -> None:
    async def main() -> None:
        end = AsyncEndpoint(Slow())
        waiter = asyncio.ensure_future(end.wait(0))
        await asyncio.sleep(0)

        async def leave() -> None:
            if way == "aclose":
                await end.aclose()
            else:
                async with end:
                    pass

        closing = asyncio.ensure_future(leave())
        for _ in range(5):
            await asyncio.sleep(0.001)
        assert not closing.done()
        assert end.closed, "nobody can wait from now on"
        with pytest.raises(ClosedError):
            await waiter
        for call in (lambda: end.wait(1), lambda: end.wait(), lambda: end.wait([0, 1])):
            with pytest.raises(ClosedError):
                await call()
        end.endpoint.may_close.set()
        await closing
        assert end.endpoint.closed_by == ["ivshmem-close"]
        await end.aclose()

    run(main())
    assert not [t for t in threading.enumerate() if t.name == "ivshmem-close"]


def test_a_cancelled_close_goes_on_by_itself() -> None:
    async def main() -> Slow:
        end = AsyncEndpoint(Slow())
        closing = asyncio.ensure_future(end.aclose())
        await asyncio.sleep(0.001)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        assert not end.endpoint.closed_by
        return end.endpoint

    slow = run(main())
    (thread,) = [t for t in threading.enumerate() if t.name == "ivshmem-close"]
    assert not thread.daemon, "the program does not end before"
    slow.may_close.set()
    thread.join(PATIENCE)
    assert slow.closed


def test_an_error_of_closing_is_raised() -> None:
    async def main() -> None:
        end = AsyncEndpoint(Bare())
        view = memoryview(end.region)
        with pytest.raises(BufferError, match="in use by"):
            await end.aclose()
        assert end.closed
        view.release()
        await end.aclose()
        assert end.region.closed

    run(main())


def test_where_there_can_be_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def main() -> None:
        end = AsyncEndpoint(Bare())
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            await end.aclose()
        assert end.endpoint.closed

    run(main())


# -- what an endpoint has -------------------------------------------------------------------------


def test_all_that_an_endpoint_tells(server: MakeServer, socket_path: str) -> None:
    running = server("64K", vectors=2)

    async def main() -> None:
        async with connect_async(socket_path) as end:
            assert end.connected
            assert end.current_id() == end.id == 0
            assert end.fileno() == end.endpoint.fileno()
            assert end.ring_all([0], [0, 1]) == 2
            bell = end.doorbell(0, 1)
            bell.ring()
            assert (bell.peer, bell.vector) == (0, 1)
            assert await end.wait(1) == 2
            running.close()
            while end.connected:
                await asyncio.sleep(0.001)
                assert end.peers == []

    run(main())


@pytest.mark.parametrize("kind", [list, tuple, set, iter, lambda numbers: range(max(numbers) + 1)])
def test_waiting_for_several(kind: Callable[[list[int]], Iterable[int]]) -> None:
    async def main() -> None:
        async with AsyncEndpoint(Bare()) as end:
            end.ring(0, 1)
            end.ring(0, 1)
            assert await end.wait(kind([0, 1])) == Interrupt(1, 2), "it was there already"
            task = asyncio.ensure_future(end.wait(kind([0, 1])))
            await asyncio.sleep(0)
            end.ring(0, 2)
            await asyncio.sleep(0.001)
            assert not task.done()
            end.ring(0, 0)
            assert await task == Interrupt(0, 1)
            assert await end.wait(2) == 1

    run(main())


def test_several_and_others() -> None:
    """Each ring goes to one task, the eldest first; none is lost when some are cancelled."""

    async def main() -> None:
        async with AsyncEndpoint(Bare()) as end:
            tasks = [
                asyncio.ensure_future(wait)
                for wait in (end.wait([0, 1]), end.wait([1, 0]), end.wait([1, 2]))
            ]
            await asyncio.sleep(0)
            for task in tasks:
                assert not task.done()
            end.ring(0, 1)
            assert await tasks[0] == Interrupt(1, 1)
            tasks[1].cancel()
            await asyncio.sleep(0)
            end.ring(0, 1)
            assert await tasks[2] == Interrupt(1, 1)
            with pytest.raises(asyncio.CancelledError):
                await tasks[1]
            for queue in end._queues.values():
                assert not queue.waiters
            for _ in range(200):  # rings and cancellations in any order
                one = asyncio.ensure_future(end.wait([0, 1, 2]))
                await asyncio.sleep(0)
                end.ring(0, 2)
                one.cancel()
                try:
                    found = await one
                    assert found == Interrupt(2, 1)
                except asyncio.CancelledError:
                    assert await end.wait(2) == 1

    run(main())


def test_what_cannot_be_waited_for() -> None:
    async def main() -> None:
        async with AsyncEndpoint(Bare()) as end:
            for wrong in ([0, 3], (3,), [-1]):
                with pytest.raises(NoSuchVector):
                    await end.wait(wrong)
            with pytest.raises(ValueError, match="no vector to wait for"):
                await end.wait([])
            with pytest.raises(ValueError, match="no vector to wait for"):
                await end.wait(())
            with pytest.raises(TypeError):
                await end.wait([None])  # type: ignore[list-item]
            task = asyncio.ensure_future(end.wait([0, 1]))
            await asyncio.sleep(0)
            await end.aclose()
            with pytest.raises(ClosedError):
                await task

    run(main())


def test_a_time_limit_holds_though_events_never_end() -> None:
    async def main() -> None:
        async with AsyncEndpoint(Bare()) as end:
            seen = 0

            async def consume() -> None:
                nonlocal seen
                end.ring(0, 0)
                async for _ in end:
                    end.ring(0, 0)
                    seen += 1
                    assert seen < 2_000_000

            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(consume(), 0.1)
            assert seen

    run(main())


# -- the directory of names -----------------------------------------------------------------------


def test_names_without_waiting_in_the_loop() -> None:
    async def main() -> None:
        with (
            Region.create("4K") as region,
            Directory.create(region, beat=0.002, lease=0.2) as table,
        ):
            ticks = 0

            async def tick() -> None:
                nonlocal ticks
                while True:
                    await asyncio.sleep(0.001)
                    ticks += 1

            ticking = asyncio.ensure_future(tick())
            with pytest.raises(TimeoutError, match="no entry 'a'"):
                await wait_for_async(table, "a", 0)
            looking = asyncio.ensure_future(wait_for_async(table, "a", None))
            await asyncio.sleep(0.01)
            mine = await publish_async(table, "a", "role", id=1)
            assert (await looking).name == "a"
            with Directory.open(region, beat=0.002, lease=0.2) as other:
                with pytest.raises(NameTaken):
                    await publish_async(other, "a", id=2)
                before = ticks
                cut = asyncio.ensure_future(wait_for_async(other, "b", None))
                await asyncio.sleep(0.02)
                cut.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await cut
                assert ticks > before
            mine.withdraw()
            ticking.cancel()

    run(main())


def test_publishing_takes_a_time_limit_there_too() -> None:
    async def main() -> None:
        with Region.create("4K") as region, Directory.create(region) as table:
            region.write(2048, names_table.pack(77, 9, "a", "", range(1)))
            begun = time.monotonic()
            with pytest.raises(TimeoutError, match="not known yet"):
                await publish_async(table, "a", id=1, timeout=0.02)
            assert time.monotonic() - begun < 3

    run(main())
