"""asyncio's readers and writers over connections of channels, as over sockets."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import sys
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any

import pytest
from support.loops import LOOPS, TaskSteps

from ivshmem import ClosedError, Directory, Region, channel
from ivshmem.channel import Bytes, StreamListener
from ivshmem.channel.transport import StreamTransport

PATIENCE = 30.0
Run = Callable[[Coroutine[Any, Any, None]], None]
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """Run a coroutine in each kind of loop; fail if the loop was told of an error."""
    loop = LOOPS[request.param]()
    told: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: told.append(context))

    def run(work: Coroutine[Any, Any, None]) -> None:
        loop.run_until_complete(asyncio.wait_for(work, PATIENCE))

    yield run
    for task in asyncio.all_tasks(loop):
        task.cancel()
        loop.run_until_complete(asyncio.wait([task]))
    loop.close()
    assert not told


@pytest.fixture
def region() -> Iterator[Region]:
    with Region.create("4M") as region:
        Directory.create(region, channels="2M").close()
        yield region


@pytest.fixture
def room(region: Region) -> Iterator[Bytes]:
    with channel.open(region, beat=0.01, lease=0.1) as channels:
        yield channels.create_bytes("a", buffer=4096)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ClosedError):
        while data := await reader.read(1000):
            writer.write(data)
            await writer.drain()
    writer.close()


async def write_on(writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(bytes(1000))
        await writer.drain()
        await asyncio.sleep(0)


def test_lines_there_and_back(room: Bytes, run: Run) -> None:
    async def work() -> None:
        async with await room.start_server(echo) as server:
            assert server.is_serving()
            reader, writer = await room.open_connection()
            writer.writelines([b"one\n", b"two\n"])
            assert await reader.readline() == b"one\n"
            assert await reader.readexactly(4) == b"two\n"
            assert writer.get_extra_info("peername") == "a"
            assert writer.can_write_eof()
            writer.write_eof()
            assert await reader.read() == b""
            writer.close()
            await writer.wait_closed()
        assert not server.is_serving()
        with pytest.raises(ConnectionRefusedError):
            await room.open_connection()

    run(work())


def test_more_than_fits_in_both_directions_at_once(room: Bytes, run: Run) -> None:
    data = os.urandom(300_000)

    async def send(writer: asyncio.StreamWriter) -> None:
        for at in range(0, len(data), 7000):
            writer.write(data[at : at + 7000])
            await writer.drain()
        writer.write_eof()

    async def work() -> None:
        async with await room.start_server(echo):
            pairs = [await room.open_connection() for _ in range(3)]
            sending = [asyncio.create_task(send(writer)) for _, writer in pairs]
            for reader, _ in pairs:
                assert await reader.read() == data
            await asyncio.gather(*sending)
            for _, writer in pairs:
                writer.close()

    run(work())


def test_drain_waits_for_a_slow_reader(room: Bytes, run: Run) -> None:
    async def work() -> None:
        accepted: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        async with await room.start_server(
            lambda reader, writer: accepted.set_result((reader, writer)), limit=1000
        ):
            _, writer = await room.open_connection()
            writer.write(bytes(1 << 20))
            draining = asyncio.create_task(writer.drain())
            assert not (await asyncio.wait([draining], timeout=0.05))[0]
            reader, its_writer = await accepted
            assert len(await reader.readexactly(1 << 20)) == 1 << 20
            await draining
            writer.transport.abort()
            with pytest.raises((ConnectionResetError, BrokenPipeError)):
                await write_on(its_writer)

    run(work())


def test_close_sends_what_was_written(room: Bytes, run: Run) -> None:
    async def work() -> None:
        received: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            received.set_result(await reader.read())
            writer.close()

        async with await room.start_server(handler):
            _, writer = await room.open_connection()
            writer.write(b"a" * 50_000)
            writer.close()
            assert await received == b"a" * 50_000

    run(work())


def test_the_other_ends_process_dies(region: Region, room: Bytes, run: Run) -> None:
    async def work() -> None:
        accepted: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        async with await room.start_server(
            lambda reader, writer: accepted.set_result((reader, writer))
        ):
            fd = os.dup(region.fileno())
            pid = os.fork()
            if pid == 0:
                own = channel.open(Region.from_fd(fd))
                stream = own.open("a").connect()  # type: ignore[attr-defined]
                stream.sendall(b"some")
                signal.pause()
            os.close(fd)
            reader, writer = await accepted
            assert await reader.readexactly(4) == b"some"
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            with pytest.raises(ConnectionResetError):
                await reader.read()
            writer.close()

    run(work())


def test_the_channels_are_closed(region: Region, run: Run) -> None:
    async def work() -> None:
        with channel.open(region) as channels:
            room = channels.create_bytes("a", buffer=4096)
            server = await room.start_server(echo)
            reader, writer = await room.open_connection()
            waiting = asyncio.create_task(reader.read())
            await asyncio.sleep(0)
        with pytest.raises((ClosedError, ConnectionResetError)):
            await waiting
        await server.wait_closed()
        writer.close()

    run(work())


def test_serve_forever_ends_with_its_task(room: Bytes, run: Run) -> None:
    async def work() -> None:
        server = await room.start_server(echo)
        await server.start_serving()
        serving = asyncio.create_task(server.serve_forever())
        await asyncio.sleep(0)
        serving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await serving
        await server.wait_closed()
        room.listen().close()  # its slot is free

    run(work())


def test_a_protocol_that_fails_is_reported(room: Bytes) -> None:
    class Failing(asyncio.Protocol):
        ended: Any = None

        def data_received(self, _: bytes) -> None:
            raise ZeroDivisionError

        def connection_lost(self, error: Exception | None) -> None:
            self.ended = error

    told: list[dict[str, Any]] = []

    async def work() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
        with room.listen() as listener:
            caller = await room.connect_async()
            accepted = await listener.accept_async()
            assert accepted is not None
            protocol = Failing()
            transport = StreamTransport(accepted, protocol)
            assert transport.get_protocol() is protocol
            caller.sendall(b"a")
            assert await caller.recv_async(1) == b""
            await asyncio.sleep(0)
            assert isinstance(protocol.ended, ZeroDivisionError)
            transport.write(b"nothing comes of it")
            caller.close()

    asyncio.run(work())
    assert [type(context["exception"]) for context in told] == [ZeroDivisionError]


def test_the_end_of_the_loop_closes_connections(room: Bytes) -> None:
    kept: list[Any] = []

    async def work() -> None:
        server = await room.start_server(lambda *pair: kept.append(pair))
        StreamTransport(room.connect(), asyncio.Protocol())
        assert server.is_serving()

    for _ in range(40):  # of 16 connections, and one listener
        asyncio.run(work())


def test_connections_end_with_the_loop_while_they_send(room: Bytes) -> None:
    kept: list[Any] = []

    async def work(listener: StreamListener) -> None:
        _, writer = await room.open_connection()
        kept.append((writer, listener.accept(1)))
        writer.write(bytes(100_000))
        writer.close()

    with room.listen() as listener:
        asyncio.run(work(listener))
        ((writer, accepted),) = kept
        assert writer.get_extra_info("stream").closed
        assert accepted is not None
        accepted.close()


def test_a_function_for_connections_that_raises_leaves_the_server_at_work(room: Bytes) -> None:
    told: list[dict[str, Any]] = []
    taken = []

    def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        taken.append(writer)
        if len(taken) == 1:
            raise ZeroDivisionError
        writer.write(b"a")

    async def work() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
        async with await room.start_server(connected):
            for answer in (b"", b"a"):
                reader, writer = await room.open_connection()
                assert await reader.read(1) == answer
                writer.close()
            taken[1].close()

    asyncio.run(asyncio.wait_for(work(), PATIENCE))
    assert [type(context["exception"]) for context in told] == [ZeroDivisionError]


def test_limits_hold_for_what_was_written_before(room: Bytes, run: Run) -> None:
    async def work() -> None:
        with room.listen():
            _, writer = await room.open_connection()
            writer.write(bytes(10_000))
            writer.transport.set_write_buffer_limits(high=0)
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(writer.drain(), 0.05)
            writer.transport.abort()

    run(work())


def test_nothing_is_received_after_close(room: Bytes, run: Run) -> None:
    class Once(asyncio.Protocol):
        transport: StreamTransport
        received = 0

        def data_received(self, _: bytes) -> None:
            self.received += 1
            self.transport.write(bytes(5000))  # more than has room: the connection stays open
            self.transport.close()

    async def work() -> None:
        with room.listen() as listener, room.connect() as caller:
            accepted = listener.accept()
            assert accepted is not None
            protocol = Once()
            protocol.transport = StreamTransport(accepted, protocol)
            caller.sendall(b"a")
            left = 5000 - len(await caller.recv_async(1))
            caller.sendall(b"b")
            while left:
                left -= len(await caller.recv_async(left))
            assert await caller.recv_async(1) == b""
            assert protocol.received == 1

    run(work())


def test_a_peer_that_sends_without_end_leaves_other_tasks_their_turn(room: Bytes) -> None:
    class Endless:
        """A stream that always has something, and has room."""

        name = "a"
        moved = 0

        async def recv_async(self, _: int) -> bytes:
            self.moved += 1
            return b"a"

        def _send_now(self, _: object) -> int:
            raise BlockingIOError

        async def sendall_async(self, data: bytes) -> None:
            self.moved += 1

        def close(self) -> None:
            pass

    async def work() -> None:
        for data in (b"", bytes(1 << 24)):
            stream = Endless()
            transport = StreamTransport(stream, asyncio.Protocol())  # type: ignore[arg-type]
            transport.write(data)
            if data:
                transport.pause_reading()
            for _ in range(3):
                await asyncio.sleep(0)
            assert 16 <= stream.moved < 100
            transport.abort()

    asyncio.run(work())


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks are new in Python 3.12")
def test_tasks_that_begin_eagerly(room: Bytes, run: Run) -> None:
    async def work() -> None:
        loop: Any = asyncio.get_running_loop()
        eager: Any = vars(asyncio)["eager_task_factory"]
        loop.set_task_factory(eager)
        with room.listen() as listener:
            _, writer = await room.open_connection()
            accepted = listener.accept()
            assert accepted is not None
            transport: Any = writer.transport
            stream = transport._stream

            class Late:
                """It has no room at first, and has it when the task looks."""

                def __getattr__(self, name: str) -> Any:
                    return getattr(stream, name)

                def _send_now(self, _: object) -> int:
                    raise BlockingIOError

            transport._stream = Late()
            writer.write(b"one")
            writer.write(b"two")
            writer.close()
            await writer.wait_closed()
            assert accepted.recv(10) == b"onetwo"
            accepted.close()
        loop.set_task_factory(None)

    run(work())


def test_a_ring_runs_no_task_whose_connection_has_nothing(room: Bytes, run: Run) -> None:
    async def work() -> None:
        counted = TaskSteps(asyncio.get_running_loop())
        async with await room.start_server(echo):
            pairs = [await room.open_connection() for _ in range(8)]
            for reader, writer in pairs:
                writer.write(b"a")
                assert await reader.readexactly(1) == b"a"
            counted.steps = 0
            reader, writer = pairs[0]
            for _ in range(10):
                writer.write(b"a")
                assert await reader.readexactly(1) == b"a"
            assert 10 <= counted.steps <= 40  # 150 and more if each ring ran all tasks
            for _, writer in pairs:
                writer.close()

    run(work())


def test_a_loop_that_was_closed_while_tasks_slept_is_forgotten(room: Bytes) -> None:
    def sleep_and_close() -> weakref.ref[asyncio.AbstractEventLoop]:
        loop = asyncio.new_event_loop()
        task: Any = loop.create_task(room.listen().accept_async())
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
        task._log_destroy_pending = False
        return weakref.ref(loop)

    async def wait_a_moment() -> None:
        with room.connect() as stream, contextlib.suppress(TimeoutError):
            await stream.recv_async(1, timeout=0.001)

    closed = sleep_and_close()
    asyncio.run(wait_a_moment())
    gc.collect()
    assert closed() is None
    room.listen().close()  # its slot is free
