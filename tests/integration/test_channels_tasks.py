"""Tasks that wait at the ends of channels: which of them a ring runs, and how a wait ends.

Those that sleep look by themselves once in 1000 seconds: a task that runs was woken by a ring.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from support.loops import LOOPS, TaskSteps
from support.waiting import PATIENCE

import ivshmem
from ivshmem import Directory, channel, testing
from ivshmem.channel import Channels

Run = Callable[[Coroutine[Any, Any, None]], None]
Sides = tuple[Channels, Channels]
MANY = 6


@pytest.fixture
def sides() -> Iterator[Sides]:
    """What two processes have of the channels of a region, as far as channels can tell."""
    with ExitStack() as opened:
        server = opened.enter_context(testing.server("4M"))
        clients = [opened.enter_context(ivshmem.connect(server.path)) for _ in range(2)]
        Directory.create(clients[0].region, channels="2M").close()
        one, two = (
            opened.enter_context(channel.open(client, beat=1000.0, lease=10000.0))
            for client in clients
        )
        yield one, two


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    loop = LOOPS[request.param]()

    def run(work: Coroutine[Any, Any, None]) -> None:
        loop.run_until_complete(asyncio.wait_for(work, PATIENCE))

    yield run
    loop.close()


Waiters = tuple[list[Callable[[], Awaitable[Any]]], Callable[[int], object]]


def messages(one: Channels, two: Channels) -> Waiters:
    made = [one.create_messages(f"m{i}", limit=8, slots=4) for i in range(MANY)]
    writers = [two.open(each.name).writer() for each in made]  # type: ignore[attr-defined]
    return [each.reader().get_async for each in made], lambda i: writers[i].put(b"x")


def writers(one: Channels, two: Channels) -> Waiters:
    made = [one.create_messages(f"w{i}", limit=8, slots=1) for i in range(MANY)]
    readers = [two.open(each.name).reader("block") for each in made]  # type: ignore[attr-defined]
    filled = [each.writer() for each in made]
    for writer in filled:
        writer.put(b"x")

    def putter(writer: Any) -> Callable[[], Awaitable[Any]]:
        return lambda: writer.put_async(b"x")

    return [putter(writer) for writer in filled], lambda i: readers[i].get()


def values(one: Channels, two: Channels) -> Waiters:
    made = [one.create_value(f"v{i}", limit=8) for i in range(MANY)]
    setters = [two.open(each.name).writer() for each in made]  # type: ignore[attr-defined]
    return [each.reader().wait_changed_async for each in made], lambda i: setters[i].put(b"x")


def queues(one: Channels, two: Channels) -> Waiters:
    made = [one.create_queue(f"q{i}", limit=8) for i in range(MANY)]
    givers = [two.open(each.name).writer() for each in made]  # type: ignore[attr-defined]
    return [each.reader().get_async for each in made], lambda i: givers[i].put(b"x")


def calls(one: Channels, two: Channels) -> Waiters:
    caller = one.create_calls("c", limit=8, slots=8).caller()
    server = two.open("c").server()  # type: ignore[attr-defined]
    pending = [caller.submit(b"x") for _ in range(MANY)]
    taken = [server.take(PATIENCE) for _ in range(MANY)]
    return [each.result_async for each in pending], lambda i: taken[i].reply(b"x")


@pytest.mark.parametrize("kind", [messages, writers, values, queues, calls])
def test_a_ring_runs_only_the_tasks_that_have_something(
    sides: Sides, run: Run, kind: Callable[[Channels, Channels], Waiters]
) -> None:
    waits, give = kind(*sides)

    async def work() -> None:
        counted = TaskSteps(asyncio.get_running_loop())
        tasks = [asyncio.ensure_future(wait()) for wait in waits]
        await asyncio.sleep(0)
        assert counted.steps == MANY  # each sleeps now
        for i, task in enumerate(tasks):
            counted.steps = 0
            give(i)
            await task
            assert counted.steps == 1
            assert not any(other.done() for other in tasks[i + 1 :])

    run(work())


def test_what_a_wait_is(sides: Sides) -> None:
    made = sides[0].create_messages("a", limit=8, slots=4)
    with made.reader() as reader, made.writer() as writer:
        waiting: Any = reader.get_async()
        assert waiting.__qualname__ == "Reader.get"
        assert asyncio.iscoroutine(waiting)
        assert not asyncio.isfuture(waiting)
        writer.put(b"x")
        with pytest.raises(StopIteration) as ended:
            waiting.send(None)
        assert ended.value.value == b"x"
        with pytest.raises(RuntimeError, match="already awaited"):
            waiting.send(None)
        with pytest.raises(RuntimeError, match="running event loop"):
            reader.get_async().send(None)  # there is nothing, and no loop


@pytest.mark.parametrize("how", ["throw", "close", "forget"])
def test_a_wait_that_ends_early_sleeps_no_more(sides: Sides, run: Run, how: str) -> None:
    made = sides[0].create_messages("a", limit=8, slots=4)
    reader = made.reader()
    writer = sides[1].open("a").writer()  # type: ignore[attr-defined]

    async def work() -> None:
        waiting: Any = reader.get_async()
        sleep = waiting.send(None)
        woken: list[object] = []
        sleep.add_done_callback(woken.append, context=None)
        if how == "throw":
            with pytest.raises(KeyError):
                waiting.throw(KeyError())
        elif how == "close":
            waiting.close()
        else:
            del waiting
        writer.put(b"x")
        assert await reader.get_async() == b"x"
        sleep.expire()
        assert woken == []

    run(work())


def test_a_wait_reports_what_its_time_limit_lacks(sides: Sides, run: Run) -> None:
    made = sides[0].create_messages("a", limit=8, slots=4)

    async def work() -> None:
        with made.reader() as reader, made.writer() as writer:
            text: Any = "1"
            for wait in (reader.get_async(text), writer.put_async(b"x", text)):
                with pytest.raises(TypeError, match="seconds are a number, not '1'"):
                    await wait
            assert await reader.get_async(0) is None

    run(work())
