"""What is no name, mode, range, directory or configuration: an error that says what to pass."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ivshmem
from ivshmem import Directory, Listener, Region, aio, channel, config, testing

# What is wrong on purpose.
FIVE: Any = 5
TEXT: Any = "rw"

CALLS: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "a name": (lambda _: Region.open("4K", name=FIVE), TypeError, "name is text, not 5"),
    "a region's mode": (
        lambda at: Region.create("4K", path=at / "r", mode=TEXT),
        TypeError,
        "mode: expected a number, for example 0o660, not 'rw'",
    ),
    "a mode to open": (lambda at: Region.open("4K", path=at, mode=TEXT), TypeError, "mode: "),
    "a mode with more": (
        lambda at: Region.open("4K", path=at / "r", mode=0o1777),
        ValueError,
        "mode 0o1777: 0 to 0o777 are allowed",
    ),
    "a socket's mode": (lambda at: Listener(at / "s", mode=TEXT), TypeError, "mode: expected"),
    "a place": (lambda _: Directory.open(FIVE), TypeError, "an endpoint or a region, not on 5"),
    "a place to make": (lambda _: Directory.create(FIVE), TypeError, "or a region, not on 5"),
    "a configuration": (lambda _: config.parse(TEXT, "f"), TypeError, "the bytes of a conf"),
    "an endpoint": (lambda _: aio.AsyncEndpoint(FIVE), TypeError, "a Client or a GuestDevice"),
    "many vectors": (lambda _: enter(testing.fake_device(vectors=5000)), ValueError, "0 to 2048"),
    "fewer than none": (lambda _: enter(testing.fake_device(vectors=-1)), ValueError, "-1 vectors"),
    "a part of one": (lambda _: enter(testing.fake_device(vectors=1.5)), TypeError, "integer"),  # type: ignore[arg-type]
}


def enter(manager: Any) -> None:
    with manager:
        pass


@pytest.mark.parametrize("what", CALLS)
def test_it_is_refused(tmp_path: Path, what: str) -> None:
    call, kind, text = CALLS[what]
    with pytest.raises(kind, match=text):
        call(tmp_path)
    assert not [*tmp_path.iterdir()]


def test_publishing() -> None:
    with Region.create("4K") as region, Directory.create(region) as names:
        with pytest.raises(TypeError, match="name: expected text, not 5"):
            names.publish(FIVE, id=1)
        with pytest.raises(TypeError, match="role: expected text, not 5"):
            names.publish("a", FIVE, id=1)
        with pytest.raises(TypeError, match=r"vector_range: expected a range, not \[0, 1\]"):
            names.publish("a", vector_range=[0, 1], id=1)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="a beat every -1 s: more than 0 seconds"):
            Directory.open(region, beat=-1)
        with pytest.raises(TypeError, match="lease: seconds are a number, not 'rw'"):
            Directory.open(region, lease=TEXT)
        assert names.entries() == []


def test_an_asynchronous_endpoint_is_not_a_directory() -> None:
    async def main(path: str) -> None:
        async with aio.connect_async(path) as client:
            wrong: Any = client
            with pytest.raises(TypeError, match=r"not on <.*>: pass its `endpoint`"):
                Directory.open(wrong)
            calls: list[Callable[[], Any]] = [
                lambda: aio.publish_async(wrong, "a"),
                lambda: aio.wait_for_async(wrong, "a"),
                lambda: aio.close_async(wrong),
            ]
            for call in calls:
                with pytest.raises(TypeError, match=r"expected a Directory, as Directory\.open"):
                    await call()
            assert client.connected

    with testing.server(names=True) as server:
        asyncio.run(main(server.path))


def test_a_hostile_peer_that_wants_more_vectors_than_there_are() -> None:
    with (
        testing.server(vectors=2) as server,
        pytest.raises(TimeoutError, match=r"gave 2 of 5 vectors in 0\.05 seconds"),
    ):
        testing.HostilePeer(server.path, vectors=5, timeout=0.05)
    with pytest.raises(OSError):
        ivshmem.connect(server.path)


@pytest.mark.parametrize("wrong", ["1", b"1", [1], float("nan")], ids=repr)
def test_what_is_no_time_limit_of_a_channel(wrong: Any) -> None:
    """It is refused also where the call would not wait, and takes and sends nothing."""
    refusal = ValueError if isinstance(wrong, float) else TypeError
    with (
        Region.create("4M") as region,
        contextlib.closing(Directory.create(region, channels="2M")),
        channel.open(region) as channels,
    ):
        messages, queue = (
            channels.create_messages("a", limit=8),
            channels.create_queue("b", limit=8),
        )
        value, calls = channels.create_value("c", limit=8), channels.create_calls("d", limit=8)
        connections = channels.create_bytes("e", connections=2)
        reader, worker, watcher = messages.reader(), queue.reader(), value.reader()
        writer, feeder, setter = messages.writer(), queue.writer(), value.writer()
        caller, server, listener = calls.caller(), calls.server(), connections.listen()
        loan, two, room = writer.loan(8), [b"a", b"b"], bytearray(8)
        rows = memoryview(bytearray(8)).cast("B", (2, 4))
        stream, pending = connections.connect(), caller.submit(b"1")
        served = server.take(0)
        assert served is not None
        served.reply(b"reply")
        waits = caller.submit(b"2")
        for end in writer, feeder, setter:
            end.put(b"here")
        takers: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
            *((end.put, (b"data",)) for end in (writer, feeder, setter)),
            (writer.put_parts, (two,)), (writer.put_rows, (rows,)), (loan.publish, ()),
            (caller.submit, (b"3",)), (caller.call, (b"3",)), (pending.result, ()),
            (reader.get, ()), (reader.get_into, (room,)), (reader.get_rows, (rows,)),
            (reader.view, ()), (worker.get, ()), (worker.get_into, (room,)), (worker.take, ()),
            (watcher.wait_changed, ()), (server.take, ()), (server.serve, (bytes,)),
            (listener.accept, ()), (connections.connect, ()),
        ]  # fmt: skip
        for call, arguments in takers:
            with pytest.raises(refusal):
                call(*arguments, timeout=wrong)
            twin = getattr(call.__self__, f"{call.__name__}_async")  # type: ignore[attr-defined]
            with pytest.raises(refusal):
                asyncio.run(awaited(twin, *arguments, timeout=wrong))
        with pytest.raises(refusal):
            stream.settimeout(wrong)
        assert [reader.get(0), reader.get(0)] == [b"here", None]
        assert [worker.get(0), worker.get(0)] == [b"here", None]
        assert watcher.wait_changed(0) == b"here"
        call_of_2 = server.take(0)
        assert call_of_2 is not None
        assert bytes(call_of_2) == b"2"
        assert server.take(0) is None
        assert pending.result(0) == b"reply"
        assert not waits.done()
        assert listener.accept(0) is not None


async def awaited(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    return await call(*arguments, **options)


def test_a_loan_that_is_too_long_says_its_size() -> None:
    with (
        Region.create("1M") as region,
        contextlib.closing(Directory.create(region, channels="512K")),
        channel.open(region) as channels,
        channels.create_messages("a", limit=8).writer() as writer,
    ):
        for size in 9, 1 << 32, 1 << 70:
            with pytest.raises(channel.MessageTooLong, match=f"a message of {size} bytes"):
                writer.loan(size)
        with pytest.raises(ValueError, match="no message has -1 bytes"):
            writer.loan(-1)
