"""Tasks that are cancelled at the moment at which what they wait for comes.

Where a test does not say otherwise, those that sleep look by themselves once in 1000 seconds: a
task that runs was woken by a ring.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import pytest
from support.loops import LOOPS
from support.waiting import PATIENCE, Background

import ivshmem
from ivshmem import Directory, channel, testing
from ivshmem.channel import Channels

Come = Callable[[], object]
Order = Callable[["asyncio.Task[Any]", Come], Coroutine[Any, Any, None]]
Join = Callable[..., Any]


@pytest.fixture
def join() -> Iterator[Join]:
    """Each call is another process at the channels of one region, as far as channels can tell."""
    with ExitStack() as opened:
        server = opened.enter_context(testing.server("4M"))
        with ivshmem.connect(server.path) as client:
            Directory.create(client.region, channels="2M").close()

        def join(beat: float = 1000.0) -> Channels:
            client = opened.enter_context(ivshmem.connect(server.path))
            return opened.enter_context(channel.open(client, beat=beat, lease=10000.0))

        yield join


# -- when a task is cancelled ---------------------------------------------------------------------


async def asleep() -> None:
    """Let the task begin to sleep, and the loop see the rings that the last round has left."""
    for _ in range(3):
        await asyncio.sleep(0)


async def before_it_began(task: asyncio.Task[Any], come: Come) -> None:
    task.cancel()
    come()


async def just_before(task: asyncio.Task[Any], come: Come) -> None:
    await asleep()
    task.cancel()
    come()


async def a_turn_before(task: asyncio.Task[Any], come: Come) -> None:
    await asleep()
    task.cancel()
    await asyncio.sleep(0)
    come()


async def just_after(task: asyncio.Task[Any], come: Come) -> None:
    await asleep()
    come()
    task.cancel()


async def before_the_ring_is_seen(task: asyncio.Task[Any], come: Come) -> None:
    """A loop of asyncio runs what was waiting first, and then what its descriptors call."""
    await asleep()
    come()
    asyncio.get_running_loop().call_soon(task.cancel)


async def after_the_ring_is_seen(task: asyncio.Task[Any], come: Come) -> None:
    """A loop of asyncio runs what its descriptors call, and in the same turn what its timers do."""
    await asleep()
    come()
    asyncio.get_running_loop().call_later(0, task.cancel)


ORDERS: tuple[Order, ...] = (
    before_it_began,
    just_before,
    a_turn_before,
    just_after,
    before_the_ring_is_seen,
    after_the_ring_is_seen,
)


async def cancelled(wait: Awaitable[Any], come: Come, order: Order, loop: str) -> list[Any]:
    """Cancel a task in this order; return what it returned nevertheless, if it did."""
    task = asyncio.ensure_future(wait)
    await order(task, come)
    got = []
    with contextlib.suppress(asyncio.CancelledError):
        got.append(await asyncio.wait_for(asyncio.shield(task), PATIENCE))
    if loop == "asyncio":
        assert task.cancelled() is (order is not after_the_ring_is_seen)
    return got


def run_in(loop: str, work: Coroutine[Any, Any, None]) -> None:
    running = LOOPS[loop]()
    try:
        running.run_until_complete(work)
    finally:
        running.close()


# -- calls that take something --------------------------------------------------------------------


def nothing() -> None:
    pass


class Taking(NamedTuple):
    """A call that takes what comes, and what else belongs to it."""

    wait: Callable[[], Awaitable[Any]]  # the twin
    come: Callable[[bytes], object]
    now: Callable[[], Any]  # the same call, which does not wait
    seen: Callable[[Any], bytes] = bytes  # what is in the result, which it gives back
    begin: Callable[[], object] = nothing


def messages(one: Channels, two: Channels) -> tuple[Any, Any]:
    made = one.create_messages("a", limit=8, slots=2, views=1)
    return made.reader("block"), two.open("a").writer()  # type: ignore[attr-defined]


def queue(one: Channels, two: Channels) -> tuple[Any, Any]:
    reader = one.create_queue("a", limit=8, slots=2).reader()
    return reader, two.open("a").writer()  # type: ignore[attr-defined]


def get(reader: Any, writer: Any) -> Taking:
    return Taking(reader.get_async, writer.put, lambda: reader.get(0))


def get_into(reader: Any, writer: Any) -> Taking:
    into = bytearray(8)

    def seen(size: int) -> bytes:
        return bytes(into[:size])

    return Taking(
        lambda: reader.get_into_async(into), writer.put, lambda: reader.get_into(into, 0), seen
    )


def get_rows(reader: Any, writer: Any) -> Taking:
    rows = memoryview(bytearray(16)).cast("B", (2, 8))

    def seen(count: int) -> bytes:
        return rows.tobytes()[: 8 * count]

    return Taking(
        lambda: reader.get_rows_async(rows),
        writer.put,
        lambda: reader.get_rows(rows, 0) or None,
        seen,
    )


def view(reader: Any, writer: Any) -> Taking:
    def seen(found: Any) -> bytes:
        with found:
            return bytes(found)

    return Taking(reader.view_async, writer.put, lambda: reader.view(0), seen)


def take(reader: Any, writer: Any) -> Taking:
    def seen(taken: Any) -> bytes:
        with taken:
            assert not taken.redelivered
            return bytes(taken)

    return Taking(reader.take_async, writer.put, lambda: reader.take(0), seen)


def changed(one: Channels, two: Channels) -> Taking:
    reader = one.create_value("a", limit=8).reader()
    writer = two.open("a").writer()  # type: ignore[attr-defined]
    return Taking(reader.wait_changed_async, writer.put, lambda: reader.wait_changed(0))


def take_call(one: Channels, two: Channels) -> Taking:
    server = one.create_calls("a", limit=8, slots=1).server()
    caller = two.open("a").caller()  # type: ignore[attr-defined]
    calls: list[Any] = []

    def seen(call: Any) -> bytes:
        assert not call.redelivered
        data = bytes(call)
        assert call.reply(data)
        assert calls.pop().result(0) == data
        return data

    return Taking(
        server.take_async,
        lambda data: calls.append(caller.submit(data)),
        lambda: server.take(0),
        seen,
    )


def result(one: Channels, two: Channels) -> Taking:
    caller = one.create_calls("a", limit=8, slots=1).caller()
    server = two.open("a").server()  # type: ignore[attr-defined]
    under_way: list[Any] = []

    def begin() -> None:
        under_way[:] = caller.submit(b"", 0), server.take(0)

    def now() -> bytes | None:
        reply: bytes = under_way[0].result(0)
        return reply

    return Taking(
        lambda: under_way[0].result_async(),
        lambda data: under_way[1].reply(data),
        now,
        bytes,
        begin,
    )


def accept(one: Channels, two: Channels) -> Taking:
    listener = one.create_bytes("a", buffer=64, connections=1).listen()
    room: Any = two.open("a")
    callers: list[Any] = []

    def come(data: bytes) -> None:
        callers.append(room.connect())
        callers[0].send(data)

    def seen(stream: Any) -> bytes:
        with stream, callers.pop() as caller:
            data: bytes = stream.recv(64)
            stream.send(b"hello")
            assert caller.recv(8) == b"hello"
        return data

    return Taking(listener.accept_async, come, lambda: listener.accept(0), seen)


def recv(one: Channels, two: Channels) -> Taking:
    listener = one.create_bytes("a", buffer=64).listen()
    caller = two.open("a").connect()  # type: ignore[attr-defined]
    stream = listener.accept(0)
    assert stream is not None
    stream.settimeout(0)

    def now() -> bytes | None:
        with contextlib.suppress(BlockingIOError):
            return stream.recv(64)
        return None

    return Taking(lambda: stream.recv_async(64), caller.send, now)


TAKING: dict[str, Callable[[Channels, Channels], Taking]] = {
    **{
        f"{kind.__name__} {call.__name__}": lambda one, two, kind=kind, call=call: call(  # type: ignore[misc]
            *kind(one, two)
        )
        for kind, calls in (
            (messages, (get, get_into, get_rows, view)),
            (queue, (get, get_into, take)),
        )
        for call in calls
    },
    "value wait_changed": changed,
    "calls take": take_call,
    "calls result": result,
    "bytes accept": accept,
    "bytes recv": recv,
}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("what", TAKING)
def test_what_comes_stays_for_the_next_call(join: Join, what: str, loop: str) -> None:
    one, two = join(), join()
    taking = TAKING[what](one, two)

    async def work() -> None:
        number = 0
        for order in ORDERS:
            for by_twin in (False, True, False):
                number += 1
                data = b"%08d" % number
                taking.begin()
                got = await cancelled(taking.wait(), partial(taking.come, data), order, loop)
                if not got:
                    again = asyncio.wait_for(taking.wait(), PATIENCE) if by_twin else None
                    got.append(await again if again else taking.now())
                assert [taking.seen(found) for found in got] == [data], (order, by_twin)
                if what != "calls result":  # which may be asked again
                    assert taking.now() is None, (order, by_twin)
                assert one.list()[0].unfinished == 0, (order, by_twin)

    run_in(loop, work())


# -- calls that bring something -------------------------------------------------------------------


class Bringing(NamedTuple):
    """A call that waits for room, at an end that has one slot and one loan."""

    wait: Callable[[bytes], Awaitable[Any]]  # the twin
    again: Callable[[bytes], object]  # the same call, which does not wait


def put(writer: Any) -> Bringing:
    return Bringing(writer.put_async, lambda data: writer.put(data, 0))


def put_parts(writer: Any) -> Bringing:
    def parts(data: bytes) -> list[bytes]:
        return [data[:3], data[3:]]

    return Bringing(
        lambda data: writer.put_parts_async(parts(data)),
        lambda data: writer.put_parts(parts(data), 0),
    )


def publish(writer: Any) -> Bringing:
    """The loan stays: another call publishes it."""
    loans: list[Any] = []

    def wait(data: bytes) -> Awaitable[Any]:
        loan = writer.loan(len(data))
        with memoryview(loan) as into:
            into[:] = data
        loans[:] = [loan]
        waiting: Awaitable[Any] = loan.publish_async()
        return waiting

    def again(data: bytes) -> None:
        with memoryview(loans[0]) as there:
            assert there == data
        loans[0].publish(timeout=0)

    return Bringing(wait, again)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("kind", ["messages", "queue"])
@pytest.mark.parametrize("call", [put, put_parts, publish])
def test_what_was_not_brought_is_not_there(
    join: Join, call: Callable[[Any], Bringing], kind: str, loop: str
) -> None:
    one, two = join(), join()
    create = one.create_messages if kind == "messages" else one.create_queue
    reader: Any = create("a", limit=8, slots=1).reader()
    writer: Any = two.open("a").writer()
    bringing = call(writer)

    async def work() -> None:
        came: list[Any] = []
        for number, order in enumerate(ORDERS * 2):
            former, data = b"former%2d" % number, b"number%2d" % number
            writer.put(former, 0)
            got = await cancelled(
                bringing.wait(data), lambda: came.append(reader.get(0)), order, loop
            )
            assert came.pop() == former
            if not got:
                assert reader.get(0) is None, order
                bringing.again(data)
            assert reader.get(0) == data, order
            assert reader.get(0) is None, order
        with writer.loan(8) as mine, writer.loan(8) as of_put:  # no loan has remained
            memoryview(mine)[:] = memoryview(of_put)[:] = bytes(8)
            mine.drop()

    run_in(loop, work())


@pytest.mark.parametrize("loop", LOOPS)
def test_a_call_that_is_cancelled_is_given_up(join: Join, loop: str) -> None:
    """What its server replies is nobody's, and its slot is free again."""
    one, two = join(), join()
    caller = one.create_calls("a", limit=8, slots=1).caller()
    server = two.open("a").server()

    async def work() -> None:
        replied: list[bool] = []

        def come() -> None:
            call = server.take(0)
            if call is not None:
                replied.append(call.reply(b"reply"))

        for number, order in enumerate(ORDERS * 2):
            data = b"%08d" % number
            got = await cancelled(caller.call_async(data), come, order, loop)
            assert got == [b"reply"] * len(got)
            assert replied == ([] if order in (before_it_began, a_turn_before) else [True]), order
            replied.clear()
            assert server.take(0) is None, order
            pending = caller.submit(data, 0)
            server.take(0).reply(data)
            assert pending.result(0) == data
            assert one.list()[0].unfinished == 0

    run_in(loop, work())


# -- whom else a ring was for ---------------------------------------------------------------------


class Takers(NamedTuple):
    """Ends of two processes that take from one channel, and what two others bring."""

    ends: list[Any]
    twin: Callable[[Any], Awaitable[Any]]
    call: Callable[[Any, float], Any]  # the same with a time limit
    come: list[Come]  # each as an end of its own, which knows nobody that the other rang


def queues(join: Join) -> Takers:
    made = join().create_queue("a", limit=8)
    ends = [join().open("a").reader() for _ in range(2)]
    writers = [made.writer(), join().open("a").writer()]
    return Takers(
        ends,
        lambda end: end.get_async(),
        lambda end, timeout: end.get(timeout),
        [partial(writer.put, b"x") for writer in writers],
    )


def calls(join: Join) -> Takers:
    made = join().create_calls("a", limit=8)
    ends = [join().open("a").server() for _ in range(2)]
    callers = [made.caller(), join().open("a").caller()]
    return Takers(
        ends,
        lambda end: end.take_async(),
        lambda end, timeout: end.take(timeout),
        [partial(caller.submit, b"x") for caller in callers],
    )


def connections(join: Join) -> Takers:
    made = join().create_bytes("a", buffer=64, listeners=2)
    ends = [join().open("a").listen() for _ in range(2)]
    return Takers(
        ends,
        lambda end: end.accept_async(),
        lambda end, timeout: end.accept(timeout),
        [made.connect, join().open("a").connect],
    )


KINDS = [queues, calls, connections]


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_another_process_gets_it(
    join: Join, kind: Callable[[Join], Takers], which: int, loop: str
) -> None:
    """A ring is for one that sleeps. If that one is cancelled, it rings another."""
    takers = kind(join)
    kept = []

    async def work() -> None:
        tasks = [asyncio.ensure_future(takers.twin(end)) for end in takers.ends]
        other = tasks[1 - which]
        await just_after(tasks[which], lambda: kept.append(takers.come[0]()))
        assert await asyncio.wait_for(other, PATIENCE) is not None
        assert tasks[which].cancelled()

    run_in(loop, work())


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_task_that_was_rung_for_two(
    join: Join, kind: Callable[[Join], Takers], loop: str
) -> None:
    """It takes one, and no more for now. The other one is another process's."""
    takers = kind(join)
    kept: list[Any] = []

    async def work() -> None:
        tasks = [asyncio.ensure_future(takers.twin(end)) for end in takers.ends]
        await asleep()
        kept.extend(come() for come in takers.come)  # both ring the first one: it still sleeps
        kept.extend(await asyncio.wait_for(asyncio.gather(*tasks), PATIENCE))
        assert None not in kept

    run_in(loop, work())


@pytest.mark.parametrize("kind", KINDS)
def test_an_end_that_is_closed_when_it_was_rung(join: Join, kind: Callable[[Join], Takers]) -> None:
    takers = kind(join)
    first, second = takers.ends
    assert not select.select([first], [], [], 0)[0]
    waiting = Background(partial(takers.call, second, PATIENCE))
    waiting.wait_until_asleep()
    kept = takers.come[0]()
    first.close()
    assert waiting.result() is not None
    del kept
