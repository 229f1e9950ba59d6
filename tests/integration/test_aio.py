"""Endpoints in event loops: asyncio's own, and uvloop where it is installed.

What counts most is that no ring is lost, whatever ends a wait, and that a loop is left as it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import socket
import sys
import threading
import time
import warnings
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from support.children import Child, python
from support.loops import LOOPS
from support.peer import FakeServer, until_closed
from support.waiting import PATIENCE, in_child, until

import ivshmem
from ivshmem import (
    ClosedError,
    DeviceGone,
    Disconnected,
    Interrupt,
    NoInterrupts,
    NoSuchVector,
    PeerJoined,
    PeerLeft,
    ServerGone,
)
from ivshmem.aio import AsyncEndpoint, connect_async, open_async
from ivshmem.native import descriptors
from ivshmem.peer.endpoint import Endpoint, Event

T = TypeVar("T")

MakeServer = Callable[..., ivshmem.Server]
MakeLoop = Callable[[], asyncio.AbstractEventLoop]
Run = Callable[[Coroutine[Any, Any, T]], T]


@pytest.fixture(params=LOOPS)
def new_loop(request: pytest.FixtureRequest) -> MakeLoop:
    return LOOPS[request.param]


@pytest.fixture
def run(new_loop: MakeLoop) -> Run[Any]:
    """Runs a coroutine in a loop of its own; tasks that are left are cancelled."""
    return lambda main: run_in(new_loop(), main)


def run_in(loop: asyncio.AbstractEventLoop, main: Coroutine[Any, Any, T]) -> T:
    unhandled: list[dict[str, Any]] = []

    async def whole() -> T:
        result = await asyncio.wait_for(main, PATIENCE)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        await loop.shutdown_default_executor()
        return result

    loop.set_exception_handler(lambda _, context: unhandled.append(context))
    try:
        result = loop.run_until_complete(whole())
    finally:
        loop.close()
    assert unhandled == []
    return result


async def turns(count: int = 3) -> None:
    """Let the loop look at its descriptors so many times."""
    for _ in range(count):
        await asyncio.sleep(0)


async def start(*coroutines: Coroutine[Any, Any, T]) -> list[asyncio.Task[T]]:
    """Tasks that have come to their first wait."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    await turns()
    return tasks


def at_once(wait: Coroutine[Any, Any, object]) -> object:
    """What a coroutine returns without suspending."""
    with pytest.raises(StopIteration) as done:
        wait.send(None)
    return done.value.value


class Bare(Endpoint):
    """An endpoint of eventfds alone, with id 0 and what can happen to a guest's device."""

    id = 0

    def __init__(self, vectors: int = 2, *, relay: bool | None = None) -> None:
        """With `relay`, it can be unplugged; True: as a device that listens alone."""
        self.removal = descriptors.FdArray.eventfds(1)
        fds = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(vectors)]
        for fd in fds:
            self._add_vector(fd)
        self._ring_self(0)
        self.relay: descriptors.Relay | None = None
        if relay is not None:
            self._watch_news(self.removal[0], urgent=True)
        if relay:
            self.relay = descriptors.Relay(self.removal[0], fds)
            self._listen_alone(self.relay)

    def unplug(self) -> None:
        self.removal.signal(0)

    def _read_news(self) -> None:
        raise DeviceGone("unplugged")

    def _next_peer_event(self) -> Event | None:
        return None

    def close(self) -> None:
        super().close()
        if self.relay is not None:
            self.relay.close()
        self.removal.close()


@pytest.fixture
def bare() -> Iterator[AsyncEndpoint[Bare]]:
    end = AsyncEndpoint(Bare())
    yield end
    end.close()


# Rings as it is told, "COUNT VECTORS SEED": in bursts and pauses; says how often it rang each.
RINGER = """
    import random, sys, time, ivshmem
    with ivshmem.connect(sys.argv[1]) as client:
        print(client.id, flush=True)
        for line in sys.stdin:
            count, vectors, seed = map(int, line.split())
            choice = random.Random(seed)
            rung = [0] * vectors
            while count:
                for _ in range(min(count, choice.choice([1, 1, 1, 2, 5, 20]))):
                    vector = choice.randrange(vectors)
                    client.ring(0, vector)
                    rung[vector] += 1
                    count -= 1
                if choice.random() < 0.3:
                    time.sleep(choice.random() / 1000)
            print(*rung, flush=True)
"""

# Answers each ring, on the same vector.
ECHO = """
    import sys, ivshmem
    with ivshmem.connect(sys.argv[1]) as client:
        print(client.id, flush=True)
        while True:
            vector, _ = client.wait()
            client.ring(0, vector)
"""


async def line_of(child: Child) -> str:
    return await asyncio.get_running_loop().run_in_executor(None, child.line)


# -- waiting --------------------------------------------------------------------------------------


def test_both_ways_of_connecting(server: MakeServer, socket_path: str, run: Run[None]) -> None:
    server("64K", vectors=3)

    async def main() -> None:
        async with connect_async(socket_path, timeout=PATIENCE) as one:
            assert (one.id, one.vectors, one.peers, one.closed) == (0, 3, [], False)
            assert one.region.size == 65536
            assert isinstance(one.endpoint, ivshmem.Client)
            assert one.endpoint.path == socket_path
            assert repr(one) == f"<ivshmem.aio.AsyncEndpoint of {one.endpoint!r}>"
            two = await connect_async(socket_path, vectors=3, readonly=True)
            assert two.region.readonly
            assert one.peers == [two.id]
            two.ring(one.id, 2)
            assert await one.wait(2) == 1
            two.close()
            two.close()
            assert two.closed
        assert one.closed

    run(main())


def test_round_trips_with_a_process(server: MakeServer, socket_path: str, run: Run[None]) -> None:
    """A thousand for each of three tasks, each with a vector of its own; and any, by a fourth."""
    server(vectors=4)

    async def main() -> None:
        async with connect_async(socket_path) as client:
            with python(ECHO, socket_path) as child:
                peer = int(await line_of(child))

                async def ping(vector: int) -> None:
                    for _ in range(1000):
                        client.ring(peer, vector)
                        assert await client.wait(vector) == 1

                async def ping_any() -> None:
                    for _ in range(1000):
                        client.ring(peer, 3)
                        assert await client.wait() == Interrupt(3, 1)

                await asyncio.gather(ping(0), ping(1), ping(2), ping_any())

    run(main())


def test_what_is_there_is_taken_without_suspending(
    bare: AsyncEndpoint[Bare], run: Run[None]
) -> None:
    async def main() -> None:
        for _ in range(3):
            bare.ring(0, 1)
            bare.ring(0, 1)
            assert at_once(bare.wait(1)) == 2
            bare.ring(0, 1)
            assert at_once(bare.wait()) == Interrupt(1, 1)
            bare.ring(0, 0)
            assert at_once(bare.__anext__()) == Interrupt(0, 1)

    run(main())


def test_who_rings_without_end_does_not_stop_the_loop(
    bare: AsyncEndpoint[Bare], run: Run[None]
) -> None:
    async def ring_and_wait(*vector: int) -> None:
        while True:
            bare.ring(0)
            await bare.wait(*vector)

    async def ring_and_iterate() -> None:
        bare.ring(0)
        async for _ in bare:
            bare.ring(0)

    async def main() -> None:
        for endless in (ring_and_wait(0), ring_and_wait(), ring_and_iterate()):
            (task,) = await start(endless)
            await turns(20)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            bare.endpoint.wait(0, 0)

    run(main())


def test_rings_that_nobody_waits_for_are_counted(bare: AsyncEndpoint[Bare], run: Run[None]) -> None:
    async def main() -> None:
        for wait in (lambda: bare.wait(0), bare.wait, bare.__anext__):
            (task,) = await start(wait())
            bare.ring(0)
            await task  # from now on, the loop watches
            for _ in range(5):
                bare.ring(0)
                await turns()
            # They have stayed, for who comes, by this way or by the other.
            assert bare.endpoint.wait(0, 0) == 5
            bare.ring(0)
            await turns()
            assert await bare.wait(0) == 1

    run(main())


def test_a_descriptor_is_not_watched_without_a_waiter(
    bare: AsyncEndpoint[Bare], run: Run[None]
) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        fds = [bare.endpoint._descriptor(which) for which in (0, 1, "any", "queued")]
        tasks = await start(bare.wait(1), bare.wait(), bare.__anext__())
        for _ in tasks:
            bare.ring(0, 1)
            await turns()
        assert all(task.done() for task in tasks)
        bare.ring(0, 1)
        bare.endpoint._set_queued(True)
        await turns()
        assert not any(loop.remove_reader(fd) for fd in fds)
        bare.endpoint._set_queued(False)
        assert await bare.wait(1) == 1
        (task,) = await start(bare.wait(1))
        bare.ring(0, 1)
        assert await task == 1

    run(main())


def test_who_waits_first_is_served_first(bare: AsyncEndpoint[Bare], run: Run[None]) -> None:
    async def main() -> None:
        served = []

        async def wait(number: int) -> None:
            await bare.wait(0)
            served.append(number)

        tasks = await start(*map(wait, range(5)))
        tasks[2].cancel()
        for _ in range(4):
            bare.ring(0)
            await turns()
        assert served == [0, 1, 3, 4]
        # Who comes while another waits does not overtake, though something is there.
        first = await start(wait(5))
        bare.ring(0)
        second = asyncio.ensure_future(wait(6))
        await turns()
        assert served[4:] == [5]
        bare.ring(0)
        await asyncio.gather(*first, second)

    run(main())


def test_one_vector_before_any_before_events(bare: AsyncEndpoint[Bare], run: Run[None]) -> None:
    async def main() -> None:
        events, any_, one = await start(bare.__anext__(), bare.wait(), bare.wait(1))
        bare.ring(0, 1)
        await turns()
        assert one.done()
        bare.ring(0, 1)
        await turns()
        assert any_.done()
        bare.ring(0, 1)
        assert await events == await any_ == Interrupt(1, 1)
        assert await one == 1
        # Nor does who is only coming take what another waits for by number.
        one, other = await start(bare.wait(1), bare.wait(0))
        bare.ring(0, 1)
        any_ = asyncio.ensure_future(bare.wait())
        events = asyncio.ensure_future(bare.__anext__())
        await turns()
        assert (one.done(), other.done(), any_.done(), events.done()) == (True, *3 * [False])
        for vector in (0, 0, 0):
            bare.ring(0, vector)
            await turns()
        assert await other == 1
        assert await any_ == await events == Interrupt(0, 1)

    run(main())


def test_many_vectors_ready_at_once(run: Run[None]) -> None:
    async def main() -> None:
        async with AsyncEndpoint(Bare(300)) as end:
            tasks = await start(*map(end.wait, range(100)))
            for _ in range(2):
                for vector in range(300):
                    end.ring(0, vector)
            assert await asyncio.gather(*tasks) == [2] * 100
            found = [await end.wait() for _ in range(200)]
            assert sorted(found) == [Interrupt(vector, 2) for vector in range(100, 300)]

    run(main())


def test_no_such_vector(bare: AsyncEndpoint[Bare], run: Run[None]) -> None:
    async def main() -> None:
        for vector in (2, -1, 1 << 40):
            with pytest.raises(NoSuchVector):
                await bare.wait(vector)
        with pytest.raises(TypeError):
            await bare.wait("0")  # type: ignore[arg-type]

    run(main())


def test_vectors_that_come_later(bare: AsyncEndpoint[Bare], run: Run[None]) -> None:
    async def main() -> None:
        (task,) = await start(bare.wait())
        bare.endpoint._add_vector(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        bare.ring(0, 2)
        assert await task == Interrupt(2, 1)
        (one,) = await start(bare.wait(2))
        bare.ring(0, 2)
        assert await one == 1

    run(main())


# -- events ---------------------------------------------------------------------------------------


def test_events(server: MakeServer, socket_path: str, run: Run[None]) -> None:
    """Each as it happens, and also what was taken in by something else before."""
    serving = server()

    async def main() -> None:
        async with connect_async(socket_path) as one:
            seen: asyncio.Queue[Event] = asyncio.Queue()

            async def follow() -> None:
                async for event in one:
                    seen.put_nowait(event)

            (task,) = await start(follow())
            two = await connect_async(socket_path)
            assert await seen.get() == PeerJoined(two.id)
            two.ring(one.id)
            assert await seen.get() == Interrupt(0, 1)
            three = await connect_async(socket_path)
            until(lambda: len(one.peers) == 2)
            assert await seen.get() == PeerJoined(three.id)
            two.close()
            assert await seen.get() == PeerLeft(two.id)
            # Who waits for interrupts takes in news for others.
            (any_,) = await start(one.wait())
            three.close()
            assert await seen.get() == PeerLeft(three.id)
            serving.close()
            assert isinstance(await seen.get(), Disconnected)
            one.ring(one.id)
            assert await any_ == Interrupt(0, 1)
            one.ring(one.id)
            assert await seen.get() == Interrupt(0, 1)
            assert not task.done()
            one.close()
            await task

    run(main())


def test_events_that_somebody_else_has_taken_in(
    server: MakeServer, socket_path: str, run: Run[None]
) -> None:
    """The descriptor of the server's news tells nothing any more."""
    server()

    async def main() -> None:
        async with connect_async(socket_path) as one:
            (task,) = await start(one.__anext__())
            with ivshmem.connect(socket_path, timeout=PATIENCE) as two:
                until(lambda: one.peers == [two.id])
                assert await task == PeerJoined(two.id)

    run(main())


def test_news_that_nobody_reads_do_not_keep_the_loop_busy(
    server: MakeServer, socket_path: str, run: Run[None]
) -> None:
    server()

    async def main() -> None:
        async with connect_async(socket_path) as one:
            any_, vector = await start(one.wait(), one.wait(0))
            async with connect_async(socket_path) as two:
                until(lambda: one.peers == [two.id])
                before = time.thread_time()
                await asyncio.sleep(0.1)
                assert time.thread_time() - before < 0.05
                two.ring(one.id)
                await vector
                two.ring(one.id)
                await any_
            assert await one.__anext__() == PeerJoined(two.id)

    run(main())


def test_a_server_that_is_killed(socket_path: str, run: Run[None]) -> None:
    """An event; waits go on, and so do doorbells."""
    code = """
        import sys, ivshmem
        with ivshmem.Server(sys.argv[1]) as server:
            print("READY", flush=True)
            server.serve_forever()
    """

    async def main(child: Child) -> None:
        async with connect_async(socket_path) as one, connect_async(socket_path) as two:
            until(lambda: one.peers == [two.id])
            waiting, following = await start(one.wait(0), follow(one))
            child.kill()
            await following
            assert not one.endpoint.connected
            two.ring(one.id)
            assert await waiting == 1
            (again,) = await start(one.wait())
            two.ring(one.id)
            assert await again == Interrupt(0, 1)

    async def follow(one: AsyncEndpoint[ivshmem.Client]) -> None:
        async for event in one:
            if isinstance(event, Disconnected):
                break

    with python(code, socket_path) as child:
        child.expect("READY")
        run(main(child))
    os.unlink(socket_path)


# -- what ends a wait -----------------------------------------------------------------------------


async def by_cancel(wait: Coroutine[Any, Any, object]) -> None:
    (task,) = await start(wait)
    assert task.cancel("why")
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()


async def by_wait_for(wait: Coroutine[Any, Any, object]) -> None:
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(wait, 0.001)


async def by_timeout(wait: Coroutine[Any, Any, object]) -> None:
    if sys.version_info >= (3, 11):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                await wait
    else:
        await by_wait_for(wait)


async def by_gather(wait: Coroutine[Any, Any, object]) -> None:
    both = asyncio.gather(wait, asyncio.sleep(PATIENCE))
    await turns()
    both.cancel()
    with pytest.raises(asyncio.CancelledError):
        await both


async def by_task_group(wait: Coroutine[Any, Any, object]) -> None:
    if sys.version_info < (3, 11):
        await by_cancel(wait)
        return
    task = None
    with contextlib.suppress(LookupError):
        try:
            async with asyncio.TaskGroup() as group:
                task = group.create_task(wait)
                await turns()
                raise LookupError
        except Exception as error:
            raise error.exceptions[0] from None  # type: ignore[attr-defined]
    assert task is not None
    assert task.cancelled()


async def by_wait(wait: Coroutine[Any, Any, object]) -> None:
    _, pending = await asyncio.wait([asyncio.ensure_future(wait)], timeout=0.001)
    pending.pop().cancel()


async def by_shield(wait: Coroutine[Any, Any, object]) -> None:
    task = asyncio.ensure_future(wait)
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(asyncio.shield(task), 0.001)
    assert not task.done()
    task.cancel()


async def by_never_starting(wait: Coroutine[Any, Any, object]) -> None:
    asyncio.ensure_future(wait).cancel()


async def by_closing_it(wait: Coroutine[Any, Any, object]) -> None:
    wait.send(None)
    wait.close()


ENDS = [
    by_cancel,
    by_wait_for,
    by_timeout,
    by_gather,
    by_task_group,
    by_wait,
    by_shield,
    by_never_starting,
    by_closing_it,
]


@pytest.mark.parametrize("end", ENDS)
def test_a_wait_that_is_cut_short_takes_nothing(
    bare: AsyncEndpoint[Bare],
    run: Run[None],
    end: Callable[[Coroutine[Any, Any, object]], Awaitable[None]],
) -> None:
    async def main() -> None:
        for wait in (lambda: bare.wait(0), bare.wait, bare.__anext__):
            await end(wait())
            bare.ring(0)
            await turns()
            assert at_once(bare.wait(0)) == 1
            # And the next goes on as ever.
            await end(wait())
            await turns()
            bare.ring(0)
            assert at_once(wait()) in (1, Interrupt(0, 1))
            (task,) = await start(wait())
            bare.ring(0)
            assert await task in (1, Interrupt(0, 1))

    run(main())


@pytest.mark.parametrize("way", ["coroutine", "task", "gather", "shield", "wait_for", "wait"])
def test_each_way_of_awaiting(bare: AsyncEndpoint[Bare], run: Run[None], way: str) -> None:
    async def main() -> None:
        asyncio.get_running_loop().call_later(0.001, bare.ring, 0)
        wait = bare.wait(0)
        if way == "coroutine":
            rings = await wait
        elif way == "task":
            rings = await asyncio.ensure_future(wait)
        elif way == "gather":
            (rings,) = await asyncio.gather(wait)
        elif way == "shield":
            rings = await asyncio.shield(wait)
        elif way == "wait_for":
            rings = await asyncio.wait_for(wait, PATIENCE)
        else:
            done, _ = await asyncio.wait([asyncio.ensure_future(wait)])
            rings = done.pop().result()
        assert rings == 1

    run(main())


def test_tasks_in_python(bare: AsyncEndpoint[Bare], run: Run[None]) -> None:
    """Where asyncio's own are not the ones in C; and with the checks of debug mode."""

    def in_python(
        loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any
    ) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.tasks._PyTask(  # type: ignore[attr-defined]
            coroutine, loop=loop, **options
        )
        return task

    async def main() -> None:
        asyncio.get_running_loop().set_task_factory(in_python)
        asyncio.get_running_loop().set_debug(True)
        for end in (by_cancel, by_wait_for, by_gather):
            await end(bare.wait(0))
            (task,) = await start(bare.wait(0))
            assert "Waiter" in repr(task)
            bare.ring(0)
            assert await task == 1

    run(main())


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks are new in Python 3.12")
def test_eager_tasks(bare: AsyncEndpoint[Bare], run: Run[None]) -> None:
    async def wait(vector: int) -> int:
        rings = await bare.wait(vector)
        if vector == 0:
            # Started inside a task that goes on inside a reader's callback.
            assert await asyncio.ensure_future(wait(1)) == 1
        return rings

    def eager(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        # Not asyncio.eager_task_factory, which in Python 3.13.0 does not take what uvloop gives it.
        return asyncio.Task(coroutine, loop=loop, **{**options, "eager_start": True})

    async def main() -> None:
        asyncio.get_running_loop().set_task_factory(eager)
        bare.ring(0)
        task = asyncio.ensure_future(bare.wait(0))
        assert task.done()
        task = asyncio.ensure_future(wait(0))
        assert not task.done()
        bare.ring(0)
        await turns()
        bare.ring(0, 1)
        assert await task == 1

    run(main())


@pytest.mark.parametrize("first", ["cancel", "ring"])
@pytest.mark.parametrize("kind", ["vector", "any", "events"])
def test_cancelled_and_rung_in_the_same_turn(
    bare: AsyncEndpoint[Bare], run: Run[None], first: str, kind: str
) -> None:
    """Either the task has it, or it is still there."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        had = 0

        async def wait() -> None:
            nonlocal had
            if kind == "vector":
                rings = await bare.wait(0)
                had += rings
            elif kind == "any":
                found = await bare.wait()
                had += found.rings
            else:
                event = await bare.__anext__()
                assert isinstance(event, Interrupt)
                had += event.rings
            await asyncio.sleep(PATIENCE)

        for number in range(1, 101):
            (task,) = await start(wait())
            if first == "ring":
                bare.ring(0)
                loop.call_later(0, task.cancel)
            else:
                loop.call_soon(task.cancel)
                bare.ring(0)
            with pytest.raises(asyncio.CancelledError):
                await task
            had += bare.endpoint.wait(0, 0) or 0
            assert had == number

    run(main())


def test_cancelled_by_whom_the_ring_woke(bare: AsyncEndpoint[Bare], run: Run[None]) -> None:
    """A task that goes on in the reader's callback cancels the one that is next."""

    async def main() -> None:
        others: list[asyncio.Task[int]] = []

        async def wait() -> int:
            rings = await bare.wait(0)
            others[0].cancel()
            bare.ring(0)
            return rings

        one, two, three = await start(wait(), bare.wait(0), bare.wait(0))
        others.append(two)
        bare.ring(0)
        assert await one == await three == 1
        assert two.cancelled()

    run(main())


@pytest.mark.sampled(4)
@pytest.mark.parametrize("seed", range(3))
def test_no_ring_is_lost_in_a_storm(
    server: MakeServer, socket_path: str, run: Run[None], seed: int
) -> None:
    """Rung by a process; taken by tasks that are cancelled and timed out all the time."""
    vectors, count = 3, 5000
    server(vectors=vectors)
    choice = random.Random(seed)  # noqa: S311 - chosen, not guessed
    had = [0] * vectors

    async def take(client: AsyncEndpoint[ivshmem.Client], vector: int | None) -> None:
        if vector is None:
            found = await client.wait()
            had[found.vector] += found.rings
        elif vector < 0:
            event = await client.__anext__()
            if isinstance(event, Interrupt):
                had[event.vector] += event.rings
        else:
            rings = await client.wait(vector)  # had[vector] += await .. would add to the former
            had[vector] += rings

    async def taker(client: AsyncEndpoint[ivshmem.Client], vector: int | None) -> None:
        limit = choice.choice([0, 0.0001, 0.001, 0.01])
        for _ in range(choice.randrange(1, 20)):
            with contextlib.suppress(asyncio.TimeoutError):
                if choice.random() < 0.3:
                    await asyncio.wait_for(take(client, vector), limit)
                elif sys.version_info >= (3, 11):
                    async with asyncio.timeout(limit):
                        await take(client, vector)

    async def with_child() -> None:
        first = await connect_async(socket_path)  # id 0 is who is rung
        with python(RINGER, socket_path) as child:
            assert await line_of(child) == "1"
            await storm(first, child)

    async def storm(client: AsyncEndpoint[ivshmem.Client], child: Child) -> None:
        async with client:
            child.tell(f"{count} {vectors} {seed}")
            told = asyncio.ensure_future(line_of(child))
            tasks: set[asyncio.Task[None]] = set()
            while not told.done():
                while len(tasks) < 12:
                    vector = choice.choice([*range(vectors), None, -1])
                    tasks.add(asyncio.ensure_future(taker(client, vector)))
                for task in choice.sample(sorted(tasks, key=id), 2):
                    task.cancel()
                await asyncio.sleep(choice.choice([0, 0, choice.random() / 2000]))
                tasks = {task for task in tasks if not task.done()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert sum(had) > 0
            for vector in range(vectors):
                had[vector] += client.endpoint.wait(vector, 0) or 0
            assert had == list(map(int, (await told).split()))

    run(with_child())


# -- the end --------------------------------------------------------------------------------------


def test_close_sends_all_home(bare: AsyncEndpoint[Bare], run: Run[None]) -> None:
    async def iterate() -> str:
        async for _ in bare:
            raise AssertionError
        return "ended"

    async def main() -> None:
        one, two, any_, end = await start(bare.wait(0), bare.wait(0), bare.wait(), iterate())
        bare.close()
        assert not one.done()
        for task in (one, two, any_):
            with pytest.raises(ClosedError, match="was closed while waiting"):
                await task
        assert await end == "ended"
        for wait in (lambda: bare.wait(0), bare.wait):
            with pytest.raises(ClosedError, match="the endpoint is closed"):
                await wait()
        assert await iterate() == "ended"
        bare.close()

    run(main())


def test_closed_and_cancelled_at_once(bare: AsyncEndpoint[Bare], run: Run[None]) -> None:
    async def main() -> None:
        one, two = await start(bare.wait(0), bare.wait(0))
        one.cancel()
        bare.close()
        two.cancel()
        for task in (one, two):
            with pytest.raises(asyncio.CancelledError):
                await task

    run(main())


@pytest.mark.parametrize("kind", ["vector", "any", "events"])
def test_closed_by_whom_the_ring_woke(bare: AsyncEndpoint[Bare], run: Run[None], kind: str) -> None:
    """Inside the callback of a reader, with others that are due in the same turn."""

    async def wait() -> None:
        if kind == "vector":
            await bare.wait(0)
        elif kind == "any":
            await bare.wait()
        else:
            await bare.__anext__()
        bare.close()

    async def main() -> None:
        others = [bare.wait(1), bare.wait(1)]
        if kind == "vector":
            others.append(bare.wait(0))
        one, *rest = await start(wait(), *others)
        bare.ring(0, 0)
        bare.ring(0, 1)
        await asyncio.wait([one, *rest])
        assert one.exception() is None
        assert bare.closed
        # The first may have had its turn before.
        assert [type(task.exception()) for task in rest[1:]] == [ClosedError] * (len(rest) - 1)
        assert rest[0].exception() is None or type(rest[0].exception()) is ClosedError

    run(main())


def test_a_loop_that_ends_before_close(new_loop: MakeLoop, bare: AsyncEndpoint[Bare]) -> None:
    """The endpoint is not bound to it any longer; who waited there is forgotten."""

    async def first() -> None:
        bare.ring(0)
        await bare.wait(0)
        await start(bare.wait(0), bare.wait())

    async def second() -> None:
        (task,) = await start(bare.wait(0))
        bare.ring(0)
        assert await task == 1

    run_in(new_loop(), first())
    run_in(new_loop(), second())
    bare.close()


@pytest.mark.parametrize("loop_is_closed", [False, True])
def test_forgotten(
    server: MakeServer, socket_path: str, new_loop: MakeLoop, loop_is_closed: bool
) -> None:
    """The client warns, as ever, and closes; without a garbage collection, or a ring."""
    server()
    loop = new_loop()

    async def use() -> AsyncEndpoint[ivshmem.Client]:
        client = await connect_async(socket_path)
        client.ring(client.id)
        await client.wait(0)
        (one, two, three) = await start(client.wait(0), client.wait(), client.__anext__())
        for task in (one, two, three):
            task.cancel()
        await asyncio.wait([one, two, three])
        return client

    gc.disable()
    try:
        client = loop.run_until_complete(use())
        if loop_is_closed:
            loop.close()
        with pytest.warns(ResourceWarning, match="unclosed <ivshmem.Client"):
            del client
        loop.close()
    finally:
        gc.enable()


def test_forgotten_by_another_thread(server: MakeServer, socket_path: str, run: Run[None]) -> None:
    server()
    kept: list[AsyncEndpoint[ivshmem.Client]] = []

    async def main() -> None:
        kept.append(await connect_async(socket_path))
        (task,) = await start(kept[0].wait())
        task.cancel()
        await asyncio.wait([task])
        del task
        fd = kept[0].endpoint._descriptor("any")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            thread = threading.Thread(target=kept.clear)
            thread.start()
            thread.join()
            await turns()
            gc.collect()
        assert [str(w.message)[:25] for w in caught] == ["unclosed <ivshmem.Client "]
        assert not asyncio.get_running_loop().remove_reader(fd)

    run(main())


def test_the_endpoint_can_outlive_it(bare: AsyncEndpoint[Bare], run: Run[None]) -> None:
    async def main() -> None:
        other = AsyncEndpoint(bare.endpoint)
        (task,) = await start(other.wait(0))
        bare.ring(0)
        await task
        del other
        assert not bare.endpoint.closed
        assert not asyncio.get_running_loop().remove_reader(bare.endpoint._descriptor(0))

    run(main())


def test_a_forked_child_leaves_the_loop_alone(bare: AsyncEndpoint[Bare], run: Run[None]) -> None:
    """The epoll object is the parent's, too."""

    async def main() -> None:
        one, two = await start(bare.wait(0), bare.wait())
        in_child(bare.close)
        for vector in (0, 1):
            bare.ring(0, vector)
        assert await one == 1
        assert await two == Interrupt(1, 1)

    run(main())


# -- loops and threads ----------------------------------------------------------------------------


def test_another_loop(bare: AsyncEndpoint[Bare], new_loop: MakeLoop) -> None:
    loop = new_loop()

    async def wait() -> None:
        bare.ring(0)
        await bare.wait(0)

    loop.run_until_complete(wait())

    async def intrude() -> None:
        for attempt in (bare.wait(0), bare.wait(), bare.__anext__()):
            with pytest.raises(RuntimeError, match="belongs to another event loop"):
                await attempt

    run_in(new_loop(), intrude())
    loop.close()
    with pytest.raises(RuntimeError, match="no running event loop"):
        bare.wait(0).send(None)


def test_another_thread(bare: AsyncEndpoint[Bare], run: Run[None]) -> None:
    async def main() -> None:
        (task,) = await start(bare.wait(0))
        loop = asyncio.get_running_loop()

        def from_outside() -> None:
            with pytest.raises(RuntimeError, match="runs in another thread"):
                bare.close()
            with pytest.raises(RuntimeError, match="belongs to another event loop"):
                asyncio.run(bare.wait(0))
            bare.ring(0)  # which may come from anywhere

        await loop.run_in_executor(None, from_outside)
        assert await task == 1
        (task,) = await start(bare.wait(0))
        await loop.run_in_executor(None, loop.call_soon_threadsafe, bare.close)
        with pytest.raises(ClosedError):
            await task

    run(main())


# -- a guest's device -----------------------------------------------------------------------------


@pytest.mark.parametrize("relay", [False, True])
@pytest.mark.parametrize("at_once", [False, True])
def test_a_device_that_goes(run: Run[None], relay: bool, at_once: bool) -> None:
    async def main() -> None:
        async with AsyncEndpoint(Bare(relay=relay)) as end:

            async def wait(kind: str) -> None:
                if kind == "any":
                    await end.wait()
                elif kind == "events":
                    await end.__anext__()
                else:
                    await end.wait(int(kind))

            kinds = ["0", "0", "1", "any", "events"]
            end.ring(0)
            assert await end.wait(0) == 1
            tasks = [] if at_once else await start(*map(wait, kinds))
            end.endpoint.unplug()
            for task in tasks or map(wait, kinds):
                with pytest.raises(DeviceGone):
                    await task
            # What is readable from now on does not keep the loop busy.
            before = time.thread_time()
            await asyncio.sleep(0.1)
            assert time.thread_time() - before < 0.05

    run(main())


@pytest.mark.parametrize("kind", ["0", "1", "any", "events"])
@pytest.mark.parametrize("relay", [False, True])
def test_each_wait_hears_that_a_device_goes(run: Run[None], relay: bool, kind: str) -> None:
    """Also when nobody waits for anything else, and after it had waited and stopped."""

    async def main() -> None:
        async with AsyncEndpoint(Bare(relay=relay)) as end:
            for last in (False, True):
                wait: Coroutine[Any, Any, object]
                if kind == "any":
                    wait = end.wait()
                elif kind == "events":
                    wait = end.__anext__()
                else:
                    wait = end.wait(int(kind))
                (task,) = await start(wait)
                if last:
                    end.endpoint.unplug()
                    with pytest.raises(DeviceGone):
                        await task
                else:
                    task.cancel()
                    await asyncio.wait([task])
                    end.ring(0, 0)
                    end.ring(0, 1)
                    await turns()
                    for vector in (0, 1):
                        assert end.endpoint.wait(vector, 0) == 1

    run(main())


@pytest.mark.parametrize("relay", [False, True])
def test_a_device_that_goes_while_nobody_waits(run: Run[None], relay: bool) -> None:
    """Though the loop has looked already, and found nobody to tell."""

    async def main() -> None:
        async with AsyncEndpoint(Bare(relay=relay)) as end:
            (task,) = await start(end.wait(0))
            task.cancel()
            await asyncio.wait([task])
            end.endpoint.unplug()
            await turns()
            for vector in (0, 1, 0):
                with pytest.raises(DeviceGone):
                    await asyncio.wait_for(end.wait(vector), PATIENCE)

    run(main())


class Deaf(Bare):
    def __init__(self) -> None:
        super().__init__(0)

    def _check_can_wait(self) -> None:
        raise NoInterrupts("none")


def test_a_device_without_interrupts(monkeypatch: pytest.MonkeyPatch, run: Run[None]) -> None:
    asked = []

    def open_device(address: str | None, **kwargs: object) -> Deaf:
        asked.append((address, kwargs))
        return Deaf()

    monkeypatch.setattr("ivshmem.guest.open", open_device)

    async def main() -> None:
        async with open_async("00:04.0", access="sysfs") as device:
            assert device.id == 0
            for attempt in (device.wait(0), device.wait(), device.__anext__()):
                with pytest.raises(NoInterrupts):
                    await attempt

    run(main())
    assert asked == [("00:04.0", {"access": "sysfs", "memory": None})]


# -- opening --------------------------------------------------------------------------------------


def threads() -> int:
    return sum(thread.name == "ivshmem-open" for thread in threading.enumerate())


def test_what_connect_raises(directory: Path, socket_path: str, run: Run[None]) -> None:
    async def main() -> None:
        with pytest.raises(FileNotFoundError, match="start the server"):
            await connect_async(socket_path)
        with pytest.raises(ServerGone, match="ended the connection before"):
            with FakeServer(socket_path, lambda _: None):
                await connect_async(socket_path)
        with pytest.raises(TimeoutError, match="set-up was not complete in time"):
            with FakeServer(socket_path, until_closed):
                await connect_async(socket_path, timeout=0.05)
        with pytest.raises(TypeError):
            await connect_async(None)  # type: ignore[arg-type]

    run(main())
    until(lambda: threads() == 0)


def test_a_cancelled_connect_ends(socket_path: str, run: Run[None]) -> None:
    """The server says nothing, and sees the end of the connection; the loop has gone on."""
    accepted = threading.Event()

    def serve(connection: socket.socket) -> None:
        accepted.set()
        until_closed(connection)

    async def main() -> None:
        async def opened() -> None:
            async with connect_async(socket_path):
                raise AssertionError

        (task,) = await start(opened())
        while not accepted.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with FakeServer(socket_path, serve):
        run(main())
    until(lambda: threads() == 0)


def test_no_thread_to_connect_with(
    server: MakeServer, socket_path: str, run: Run[None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The socket is closed at once: a ResourceWarning later would be an error here."""

    async def main() -> None:
        def start(_thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            with pytest.raises(RuntimeError, match="can't start"):
                await connect_async(socket_path)
        gc.collect()

    server()
    run(main())


def test_cancelled_at_any_moment(server: MakeServer, socket_path: str, run: Run[None]) -> None:
    """What comes too late is closed: the server has nobody left."""
    serving = server()

    async def connect() -> None:
        async with connect_async(socket_path):
            pass

    async def main() -> None:
        for number in range(200):
            task = asyncio.ensure_future(connect())
            await asyncio.sleep(number / 100_000)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    run(main())
    until(lambda: serving.peers == [])
    until(lambda: threads() == 0)


def test_a_full_backlog(socket_path: str, run: Run[None]) -> None:
    """It is waited for without blocking the loop."""

    async def main(listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with pytest.raises(TimeoutError, match=r"accepts nobody: no answer in 0\.05 seconds"):
            await connect_async(socket_path, timeout=0.05)
        (task,) = await start(connect())
        before = loop.time()
        await asyncio.sleep(0)
        assert loop.time() - before < 1
        assert not task.done()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        (task,) = await start(connect())
        # Room comes, and with it the end of a connection that nobody serves.
        for _ in range(2):
            connection, _ = await loop.sock_accept(listener)
            connection.close()
        with pytest.raises(ServerGone):
            await task

    async def connect() -> None:
        await connect_async(socket_path)

    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as one:
        listener.bind(socket_path)
        listener.setblocking(False)
        listener.listen(0)
        one.connect(socket_path)  # that is all there is room for
        run(main(listener))
    os.unlink(socket_path)


def test_a_device_that_comes_too_late_is_closed(
    monkeypatch: pytest.MonkeyPatch, run: Run[None]
) -> None:
    go_on = threading.Event()
    made: list[Bare] = []

    def open_device(*_: object, **__: object) -> Bare:
        go_on.wait(PATIENCE)
        made.append(Bare())
        return made[0]

    monkeypatch.setattr("ivshmem.guest.open", open_device)

    async def main() -> None:
        async def opened() -> None:
            await open_async()

        (task,) = await start(opened())
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main())
    go_on.set()
    until(lambda: threads() == 0)
    assert made[0].closed
