"""Arrays that pass through channels are the shared memory itself, in each process."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import mmap
import os
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from pickle import PickleBuffer
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ivshmem import ClosedError, Directory, Region, channel
from ivshmem.channel import Channels, types

PATIENCE = 30.0
SHAPE = (4, 16)


@pytest.fixture
def region() -> Iterator[Region]:
    with Region.create("1M") as region:
        Directory.create(region, channels="512K").close()
        yield region


@pytest.fixture
def channels(region: Region) -> Iterator[Channels]:
    with channel.open(region) as channels:
        yield channels


def elsewhere(region: Region, work: Callable[[Region, Any], object]) -> None:
    """Do it in a process that has the memory mapped at another address, and channels of its own."""
    fd = os.dup(region.fileno())
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            with Region.from_fd(fd) as own, channel.open(own) as channels:
                assert own.address != region.address
                work(own, channels)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(fd)
    assert os.waitpid(pid, 0)[1] == 0


def same_memory(region: Region, array: Any) -> bool:
    whole = np.frombuffer(memoryview(region), "u1")
    return bool(np.shares_memory(array, whole) and array.ctypes.data % 64 == 0)


def seen_in_each_way(view: Any) -> list[Any]:
    return [
        view.array,
        np.from_dlpack(view),
        np.asarray(view).view("<f4").reshape(SHAPE),
        np.frombuffer(memoryview(view), "<f4").reshape(SHAPE),
    ]


def test_a_view_is_the_memory_that_another_process_wrote(
    region: Region, channels: Channels
) -> None:
    frames = channels.create_messages("a", dtype="<f4", shape=SHAPE)
    wanted = np.arange(64, dtype="<f4").reshape(SHAPE)

    def write(own: Region, there: Any) -> None:
        with there.open("a").writer() as writer, writer.loan() as loan:
            assert same_memory(own, loan.array)
            assert loan.array.flags.writeable
            loan.array[:] = wanted

    with frames.reader() as reader:
        elsewhere(region, write)
        view = reader.view(PATIENCE)
        assert view is not None
        with view:
            for array in seen_in_each_way(view):
                assert same_memory(region, array)
                assert not array.flags.writeable
                with pytest.raises(ValueError, match="read-only"):
                    array[0, 0] = 1
                assert (array == wanted).all()
            region.write(view.offset, np.float32(7).tobytes())  # as any peer can
            assert [array[0, 0] for array in seen_in_each_way(view)] == [7] * 4
            del array


def test_a_loan_is_the_memory_that_another_process_sees(region: Region, channels: Channels) -> None:
    frames = channels.create_messages("a", dtype="<f4", shape=SHAPE)

    def read(own: Region, there: Any) -> None:
        with there.open("a").reader(history=1) as reader, reader.view(PATIENCE) as view:
            for array in seen_in_each_way(view):
                assert same_memory(own, array)
                assert not array.flags.writeable
                assert (array == 3).all()
            del array

    with frames.writer() as writer:
        with writer.loan() as loan:
            assert same_memory(region, loan.array)
            loan.array[:] = 3
        elsewhere(region, read)


def test_others_that_are_taken_where_they_lie(region: Region, channels: Channels) -> None:
    """Messages of queues, calls, and values: what can be looked at is the memory, too."""
    queue = channels.create_queue("a", limit=64)
    calls = channels.create_calls("b", limit=64)
    value = channels.create_value("c", limit=64)
    with queue.writer() as writer, queue.reader() as reader:
        writer.put(b"x" * 64)
        taken = reader.take(0)
        assert taken is not None
        with taken:
            array = np.frombuffer(memoryview(taken), "u1")
            assert same_memory(region, array)
            assert not array.flags.writeable
            del array
    with calls.caller() as caller, calls.server() as server:
        pending = caller.submit(b"y" * 64)
        call = server.take(0)
        assert call is not None
        array = np.frombuffer(memoryview(call), "u1")
        assert same_memory(region, array)
        del array
        call.reply(b"z")
        assert pending.result(PATIENCE) == b"z"
    with value.writer() as setter, value.reader() as watcher:
        setter.put(b"w" * 64)
        view = watcher.view()
        assert view is not None
        with view:
            array = np.frombuffer(memoryview(view), "u1")
            assert same_memory(region, array)
            assert bytes(array) == b"w" * 64
            del array


def test_what_is_taken_has_the_type_and_the_time(region: Region, channels: Channels) -> None:
    """Messages of queues, and calls, are offered to numpy and others as those of a View are."""
    wanted = np.arange(64, dtype="<f4").reshape(SHAPE)
    queue = channels.create_queue("a", dtype="<f4", shape=SHAPE, times=True)
    calls = channels.create_calls("b", dtype="<f4", shape=SHAPE)
    with (
        queue.writer() as writer,
        queue.reader() as reader,
        calls.caller() as caller,
        calls.server() as server,
    ):
        begun = time.time()
        writer.put(wanted)
        pending = caller.submit(wanted)
        taken: Any = reader.take(0)
        call: Any = server.take(0)
        assert begun - 0.001 <= taken.time <= time.time()
        assert call.time is None  # the channel has no times
        for message in taken, call:
            interface = SimpleNamespace(__array_interface__=message.__array_interface__)
            for array in [*seen_in_each_way(message), np.asarray(interface)]:
                assert same_memory(region, array)
                assert not array.flags.writeable
                assert array.dtype == wanted.dtype
                assert (array == wanted).all()
            array = message.array
            with pytest.raises(BufferError, match="in use"):
                taken.done() if message is taken else call.reply(wanted)
            del array
        assert taken.offset != call.offset
        taken.done()
        waited_for = call.reply(call.array + 1)
        assert waited_for
        assert (pending.result(0) == wanted + 1).all()
        for message in taken, call:
            for name in "array", "__array_interface__":
                with pytest.raises(ClosedError, match="was released"):
                    getattr(message, name)


def test_what_is_taken_without_a_type_is_bytes(channels: Channels) -> None:
    queue = channels.create_queue("a", limit=64)
    with queue.writer() as writer, queue.reader() as reader:
        writer.put(b"abc")
        taken: Any = reader.take(0)
        with taken:
            assert taken.array.tobytes() == b"abc"
            assert taken.time is None


@pytest.mark.parametrize("way", range(4), ids=["array", "dlpack", "asarray", "frombuffer"])
def test_an_array_outlives_all_that_made_it(region: Region, way: int) -> None:
    """Nothing else refers to the view, its reader or the channels: the array keeps them."""
    channels = channel.open(region)
    frames = channels.create_messages("a", dtype="<f4", shape=SHAPE, slots=1)
    reader, writer = frames.reader("block"), frames.writer()
    with writer.loan() as loan:
        loan.array[:] = 5
    view = reader.view(0)
    assert view is not None
    array = seen_in_each_way(view)[way]
    gone = weakref.ref(channels)
    del view, reader, frames, loan
    gc.collect()
    assert (array == 5).all()
    with pytest.raises(TimeoutError):
        writer.put(np.zeros(SHAPE, "<f4"), 0)  # it still waits for the view
    with pytest.raises(BufferError):
        region.close()
    assert (array == 5).all()
    del array
    gc.collect()
    writer.put(np.zeros(SHAPE, "<f4"), 0)
    writer.close()
    channels.close()
    del channels, writer
    gc.collect()
    assert gone() is None


def test_an_array_of_what_was_overtaken_stays_readable(region: Region, channels: Channels) -> None:
    frames = channels.create_messages("a", dtype="<f4", shape=SHAPE, slots=1)
    with frames.writer() as writer, frames.reader("overwrite") as reader:
        writer.put(np.ones(SHAPE, "<f4"))
        view = reader.view(0)
        assert view is not None
        array = view.array
        for _ in range(4):
            writer.put(np.zeros(SHAPE, "<f4"))
        assert set(np.unique(array)) <= {0, 1}
        del array
        with pytest.raises(channel.Overtaken):
            view.release()


OBJECTS: Any = np.array([["a", None]], object)
NESTED: Any = np.array([[(1, (2, None))]], [("Offset", "<i4"), ("O", [("b", "<i4"), ("c", "O")])])
BESIDE_DATES: Any = np.array([[(0, None)]], [("time", "<M8[s]"), ("what", "O")])  # has no format
OF_CTYPES = (ctypes.py_object * 2 * 1)()
WITHOUT: Any = np.array([[(1, 2)]], [("Offset", "<i4"), ("O", "<i4")])
HOLDERS = [OBJECTS, NESTED, BESIDE_DATES, OF_CTYPES, PickleBuffer(OBJECTS), memoryview(NESTED)]
HOLDER_NAMES = ["objects", "nested", "beside dates", "ctypes", "PickleBuffer", "memoryview"]


def in_each_kind(channels: Channels, holder: Any) -> Iterator[Callable[[], object]]:
    """Whatever sends a buffer, or receives into one."""
    messages = channels.create_messages("a", limit=64)
    queue = channels.create_queue("b", limit=64)
    value = channels.create_value("c", limit=64)
    calls = channels.create_calls("d", limit=64)
    connections = channels.create_bytes("e", connections=1)
    with (
        messages.writer() as writer,
        messages.reader() as reader,
        queue.writer() as feeder,
        queue.reader() as worker,
        value.writer() as setter,
        calls.caller() as caller,
        calls.server() as server,
        connections.listen(),
        connections.connect() as stream,
    ):
        pending = caller.submit(b"request")
        request = server.take(0)
        assert request is not None
        yield lambda: writer.put(holder)
        yield lambda: asyncio.run(writer.put_async(holder))
        yield lambda: writer.put_rows(holder)
        yield lambda: writer.put_parts([b"head", holder])
        yield lambda: feeder.put(holder)
        yield lambda: setter.put(holder)
        yield lambda: caller.submit(holder, 0)
        yield lambda: request.reply(holder)
        yield lambda: stream.send(holder)
        yield lambda: stream.sendall(holder)
        yield lambda: asyncio.run(stream.sendall_async(holder))
        assert reader.get(0) is None
        assert worker.get(0) is None
        assert server.take(0) is None
        writer.put(b"8 bytes.")
        feeder.put(b"8 bytes.")
        yield lambda: reader.get_into(holder, 0)
        yield lambda: reader.get_rows(holder, 0)
        yield lambda: worker.get_into(holder, 0)
        yield lambda: stream.recv_into(holder)
        assert reader.get(0) == worker.get(0) == b"8 bytes."
        request.reply(b"reply")
        assert pending.result(0) == b"reply"


@pytest.mark.parametrize("holder", HOLDERS, ids=HOLDER_NAMES)
def test_addresses_of_objects_are_neither_sent_nor_received(
    channels: Channels, holder: Any
) -> None:
    """The memory of an array of objects is addresses: a peer could learn, and set, them."""
    for call in in_each_kind(channels, holder):
        with pytest.raises((TypeError, ValueError)):
            call()


def test_what_it_says_of_objects(channels: Channels) -> None:
    with channels.create_messages("a", limit=64).writer() as writer:
        for holder in OBJECTS, BESIDE_DATES, memoryview(NESTED):
            with pytest.raises(channel.ChannelTypeError, match=r"of Python objects: .*pickle=True"):
                writer.put(holder)


@pytest.mark.parametrize(
    "data",
    [
        WITHOUT,
        memoryview(WITHOUT),
        np.zeros(8, "<M8[s]"),
        PickleBuffer(bytearray(4)),
        (ctypes.c_uint16 * 3)(1, 2, 3),
        memoryview(b"abcd").cast("B", (2, 2)),
        mmap.mmap(-1, 5),
    ],
    ids=["fields", "view of fields", "dates", "pickled", "ctypes", "2 x 2", "mmap"],
)
def test_other_buffers_are_sent_as_they_lie(channels: Channels, data: Any) -> None:
    messages = channels.create_messages("a", limit=64)
    with messages.writer() as writer, messages.reader() as reader:
        writer.put(data)
        assert reader.get(0) == (data.tobytes() if isinstance(data, np.ndarray) else bytes(data))
        with pytest.raises((BufferError, ValueError), match="contiguous"):
            writer.put(np.zeros((4, 4), "u1")[:, ::2])


def test_a_stream_writer_refuses_objects(channels: Channels) -> None:
    async def main() -> None:
        connections = channels.create_bytes("a", connections=1)
        with connections.listen():
            _, writer = await connections.open_connection()
            with pytest.raises(channel.ChannelTypeError, match="of Python objects"):
                writer.write(OBJECTS)
            writer.close()

    asyncio.run(main())


FOUR: dict[str, Any] = {"dtype": "<f4", "shape": 4}


def writers_of_each_kind(channels: Channels, **kind: Any) -> dict[str, Any]:
    return {
        "messages": channels.create_messages("a", **kind),
        "queue": channels.create_queue("b", **kind),
        "value": channels.create_value("c", **kind),
    }


@pytest.mark.parametrize(
    "rows",
    [
        np.ones((2, 4), "<i4"),
        np.ones((2, 4), ">f4"),
        np.ones((2, 3), "<f4"),
        np.ones((2, 2, 2), "<f4"),
        np.ones(4, "<f4"),
        memoryview(bytes(32)).cast("B", (2, 16)),
    ],
    ids=["int", "byte order", "short", "square", "one row", "bytes"],
)
def test_rows_of_another_type_are_refused(channels: Channels, rows: Any) -> None:
    messages = channels.create_messages("a", **FOUR)
    with messages.writer() as writer, messages.reader() as reader:
        with pytest.raises(channel.ChannelTypeError, match="the channel has messages of array <f4"):
            writer.put_rows(rows)
        with pytest.raises(channel.ChannelTypeError, match="each row of this is an array of"):
            asyncio.run(writer.put_rows_async(rows))
        assert reader.get(0) is None


@pytest.mark.parametrize("dtype", ["<f4", "<M8[s]", "x:<i2,y:|S3"])
def test_rows_of_the_type_are_sent(channels: Channels, dtype: str) -> None:
    kind = types.ArrayType(dtype, (None,)).numpy()
    messages = channels.create_messages("a", dtype=kind, limit=64)
    wanted: Any = np.frombuffer(bytes(range(kind.itemsize * 6)), kind).reshape(3, 2)
    with messages.writer() as writer, messages.reader() as reader:
        columns: Any = np.asfortranarray(wanted)
        for rows in wanted, columns:
            assert writer.put_rows(rows) == 3
            for row in wanted:
                assert reader.get(0).tobytes() == row.tobytes()
        assert writer.put_rows(wanted[:0]) == 0
        assert writer.put_rows(wanted[:1, :0]) == 1
        assert reader.get(0).shape == (0,)


@pytest.mark.parametrize("kind", ["messages", "queue", "value"])
def test_a_message_of_another_size_is_not_published(channels: Channels, kind: str) -> None:
    made = writers_of_each_kind(channels, **FOUR)[kind]
    with made.writer() as writer, made.reader() as reader:
        calls: list[Callable[[], object]] = [
            lambda: writer.put_parts([b"abc"]),
            lambda: writer.put_parts([]),
            lambda: asyncio.run(writer.put_parts_async([b"abc"])),
            lambda: writer.loan(3).publish(),
            lambda: writer.loan().publish(size=12),
            lambda: asyncio.run(writer.loan(3).publish_async()),
            lambda: writer.loan(3).__enter__().__exit__(None),
        ]
        for call in calls:
            with pytest.raises(channel.ChannelTypeError, match=r"bytes is not array <f4 4"):
                call()
        assert (reader.get() if kind == "value" else reader.get(0)) is None
        writer.put_parts([bytes(8), bytes(8)])
        assert (reader.get() if kind == "value" else reader.get(0)).tolist() == [0] * 4
        loan = writer.loan()
        with pytest.raises(channel.ChannelTypeError):
            loan.publish(size=0)
        loan.array[:] = 1  # it stayed
        loan.publish()
        assert (reader.get() if kind == "value" else reader.get(0)).tolist() == [1] * 4


def test_a_message_of_a_part_of_an_element_is_not_published(channels: Channels) -> None:
    messages = channels.create_messages("a", dtype="<f4", limit=64)
    with messages.writer() as writer, messages.reader() as reader:
        with pytest.raises(channel.ChannelTypeError, match="6 bytes is not array <f4"):
            writer.loan(6).publish()
        for size in 0, 4, 64:
            writer.loan(size).publish()
            assert reader.get(0).nbytes == size


def test_messages_are_not_received_as_other_numbers(channels: Channels) -> None:
    kinds = writers_of_each_kind(channels, **FOUR)
    messages, queue = kinds["messages"], kinds["queue"]
    floats: Any
    ints, floats, raw = np.empty((1, 4), "<i4"), np.empty((1, 4), "<f4"), bytearray(16)
    with (
        messages.writer() as writer,
        messages.reader() as reader,
        queue.writer() as feeder,
        queue.reader() as worker,
    ):
        for into in (floats, raw, np.empty((1, 16), "u1"), memoryview(floats)):
            for call in reader.get_into, reader.get_rows, worker.get_into:
                if into is raw and call == reader.get_rows:
                    continue
                (feeder if call == worker.get_into else writer).put(np.ones(4, "<f4"))
                with pytest.raises(channel.ChannelTypeError, match="this is for int32"):
                    call(ints, 0)
                assert call(into, 0) in (1, 16)
                assert bytes(into) == np.ones(4, "<f4").tobytes()


def test_objects_have_no_bytes_to_lend_or_view(channels: Channels) -> None:
    """What is sent must be what `put` makes of an object; and no message is lost by a refusal."""
    room = np.empty((2, 32), "u1")
    ways: dict[str, tuple[Any, ...]] = {
        "loan": (),
        "put_parts": ([b"abc"],),
        "put_rows": (room,),
        "view": (),
        "get_into": (room,),
        "get_rows": (room,),
    }
    for name, made in writers_of_each_kind(channels, limit=256).items():
        with made.writer(pickle=True) as writer, made.reader(pickle=True) as reader:
            writer.put(name)
            refused = 0
            for end in writer, reader:
                for way, arguments in ways.items():
                    for call in way, f"{way}_async":
                        if hasattr(end, call):
                            refused += 1
                            with pytest.raises(channel.ChannelTypeError, match="with pickle=True"):
                                called(end, call, arguments)
            assert refused >= 5 + 1
            if name == "queue":
                with reader.take(0) as taken:
                    with pytest.raises(channel.ChannelTypeError, match="with pickle=True"):
                        _ = taken.array
                    assert taken.get() == name
            else:
                assert (reader.get() if name == "value" else reader.get(0)) == name


def called(end: Any, way: str, takes: tuple[Any, ...]) -> Any:
    if not way.endswith("_async"):
        return getattr(end, way)(*takes)

    async def main() -> Any:
        return await getattr(end, way)(*takes)

    return asyncio.run(main())
