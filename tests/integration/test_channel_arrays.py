"""Arrays that pass through channels are the shared memory itself, in each process."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import mmap
import os
import traceback
import weakref
from collections.abc import Callable, Iterator
from pickle import PickleBuffer
from typing import Any

import numpy as np
import pytest

from ivshmem import Directory, Region, channel
from ivshmem.channel import Channels

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


OBJECTS = np.array([["a", None]], object)
NESTED = np.array([[(1, (2, None))]], [("Offset", "<i4"), ("O", [("b", "<i4"), ("c", "O")])])
BESIDE_DATES = np.array([[(0, None)]], [("time", "<M8[s]"), ("what", "O")])  # has no format
OF_CTYPES = (ctypes.py_object * 2 * 1)()
WITHOUT = np.array([[(1, 2)]], [("Offset", "<i4"), ("O", "<i4")])
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
        PickleBuffer(np.arange(4)),
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
                writer.write(OBJECTS)  # type: ignore[arg-type]
            writer.close()

    asyncio.run(main())
