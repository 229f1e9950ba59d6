"""Arrays that pass through channels are the shared memory itself, in each process."""

from __future__ import annotations

import gc
import os
import traceback
import weakref
from collections.abc import Callable, Iterator
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
