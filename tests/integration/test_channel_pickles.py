"""Objects in channels, where both ends said pickle=True."""

from __future__ import annotations

import asyncio
import pickle
import struct
from collections.abc import Iterator

import pytest
from support.waiting import PATIENCE

from ivshmem import Directory, Region, channel
from ivshmem.channel import Channels
from ivshmem.channel.pickled import Pickled


@pytest.fixture
def channels() -> Iterator[Channels]:
    with Region.create("4M") as region:
        Directory.create(region, channels="2M").close()
        with channel.open(region) as channels:
            yield channels


THINGS = [None, {"a": [1, 2.5, "text"]}, b"bytes", {1, 2}, bytearray(1000)]


def test_objects_pass_each_kind(channels: Channels) -> None:
    messages = channels.create_messages("messages", limit=10000)
    queue = channels.create_queue("queue", limit=10000)
    for each in (messages, queue):
        with each.writer(pickle=True) as writer, each.reader(pickle=True) as reader:
            for thing in THINGS:
                writer.put(thing)
                assert reader.get(1) == thing
    value = channels.create_value("value", limit=10000)
    with value.writer(pickle=True) as writer, value.reader(pickle=True) as changes:
        writer.put({"x": 1})
        assert changes.get() == {"x": 1}
    calls = channels.create_calls("calls", limit=1000)
    with calls.caller(pickle=True) as caller, calls.server(pickle=True) as server:
        pending = caller.submit({"x": 2})
        call = server.take(1)
        assert call is not None
        assert call.get() == {"x": 2}
        call.reply([call.size])
        assert pending.result(1) == [call.size]


def test_asyncio_gets_none_as_any_other_object(channels: Channels) -> None:
    async def work() -> None:
        for make in (channels.create_messages, channels.create_queue):
            made = make(make.__name__, limit=100)
            with made.writer(pickle=True) as writer, made.reader(pickle=True) as reader:
                for thing in (1, None, 2):
                    writer.put(thing)
                assert [await reader.get_async(0.01) for _ in range(4)] == [1, None, 2, None]
        value = channels.create_value("value", limit=100)
        with value.writer(pickle=True) as writer, value.reader(pickle=True) as changes:
            writer.put(None)
            changed = asyncio.wait_for(changes.wait_changed_async(), PATIENCE)
            assert await changed is None

    asyncio.run(work())


def test_arrays_are_copied_once_and_can_be_changed(channels: Channels) -> None:
    numpy = pytest.importorskip("numpy")
    messages = channels.create_messages("a", limit=100000, slots=4, writers=1)
    with messages.writer(pickle=True) as writer, messages.reader(pickle=True) as reader:
        array = numpy.arange(1000)
        writer.put({"frame": array})
        got = reader.get(1)["frame"]
        assert (got == array).all()
        got[0] = 7


def test_both_ends_must_say_so(channels: Channels) -> None:
    messages = channels.create_messages("a", limit=100)
    with messages.writer() as plain, messages.reader() as raw:
        with messages.reader(pickle=True) as reader:
            plain.put(b"no pickle")
            with pytest.raises(channel.ChannelTypeError, match="must say pickle=True, too"):
                reader.get(1)
        with messages.writer(pickle=True) as writer:
            writer.put([1])
        assert raw.get(1) == b"no pickle"
        assert raw.get(1)[:4] == b"pkl5"
    typed = channels.create_value("b", dtype="<f4", shape=2)
    with pytest.raises(channel.ChannelTypeError, match="are not pickled"):
        typed.writer(pickle=True)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"pkl5",
        b"pkl5" + struct.pack("<IQ", 0, 1 << 63),
        b"pkl5" + struct.pack("<IQ", 0, 1000),
        b"pkl5" + struct.pack("<IQ", 0xFFFFFFFF, 0),
        b"pkl5" + struct.pack("<IQQ", 1, 0, 1 << 40) + bytes(100),
        b"PKL5" + bytes(100),
    ],
)
def test_what_is_not_such_a_message(data: bytes) -> None:
    with pytest.raises(channel.ChannelTypeError):
        Pickled().decode(data)


def test_more_buffers_than_a_message_can_name() -> None:
    """Those that have no place beside the pickle stand in it."""
    many = (1 << 16) + 2
    data = Pickled().encode([pickle.PickleBuffer(bytearray(b"%d" % i)) for i in range(many)])
    assert data[4:8] == struct.pack("<I", 1 << 16)
    assert Pickled().decode(bytes(data)) == [b"%d" % i for i in range(many)]
