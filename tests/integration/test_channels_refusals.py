"""What calls of channels refuse: the words that they say, and what a user does then."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
from support import commands
from support.waiting import PATIENCE

import ivshmem
from ivshmem import Directory, Region, Server, channel
from ivshmem.channel import (
    ChannelCorrupt,
    ChannelError,
    Channels,
    ChannelTypeError,
    Messages,
    records,
)
from ivshmem.memory.sizes import format_size
from ivshmem.native.areas import find_area


@pytest.fixture
def region() -> Iterator[Region]:
    with Region.create("512K") as region:
        Directory.create(region, channels="256K").close()
        yield region


@pytest.fixture
def channels(region: Region) -> Iterator[Channels]:
    with channel.open(region, name="own") as channels:
        yield channels


# -- room in the area -----------------------------------------------------------------------------


@pytest.fixture
def served(socket_path: str) -> Iterator[Channels]:
    """The channels of a server that has little room for them."""
    with Server(socket_path, "256K", channels="128K").start():
        with ivshmem.connect(socket_path, timeout=PATIENCE) as client:
            with channel.open(client, name="own") as channels:
                yield channels


def create_small(channels: Channels, name: str) -> object:
    return channels.create_bytes(name, buffer=64, connections=1)


def create_large(channels: Channels, name: str) -> object:
    return channels.create_value(name, limit=16 << 10)  # 6 cells, and 4K for the words


@pytest.mark.usefixtures("commands")
@pytest.mark.parametrize(
    ("create", "count", "takes"), [(create_small, 8, "4K"), (create_large, 1, "100K")]
)
def test_no_room_for_a_channel(
    socket_path: str,
    served: Channels,
    create: Callable[[Channels, str], object],
    count: int,
    takes: str,
) -> None:
    """All records are in use, or the memory is; what the message names shows what can go."""
    for i in range(count):
        create(served, f"there{i}")
    unit, units, _, most = records.room(served._member)
    with pytest.raises(ChannelError) as refused:
        create(served, "more")
    assert type(refused.value) is ChannelError
    assert str(refused.value) == (
        f"no room for channel 'more': it takes {takes}, and of the area's"
        f" {format_size(unit * units)} at most {format_size(unit * most)} are free in one piece (or"
        " all 8 channels exist that it can have); `ivshmem channel ls` lists what is there"
    )
    assert [info.name for info in served.list()] == [f"there{i}" for i in range(count)]

    (named,) = re.findall("`ivshmem (.*?)`", str(refused.value))
    said = commands.run(*shlex.split(named), "-S", socket_path).stdout
    listed = [line.split()[0] for line in said.splitlines()[1:]]
    assert listed == [f"there{i}" for i in range(count)]
    served.remove(listed[-1])
    create(served, "more")
    assert "more" in [info.name for info in served.list()]


# -- loans and views ------------------------------------------------------------------------------


@pytest.mark.parametrize("loans", [1, 2])
@pytest.mark.parametrize("kind", ["messages", "queue"])
def test_all_loans_are_in_use(channels: Channels, kind: str, loans: int) -> None:
    """With that of `put`, which needs one for the time of its copy."""
    create = channels.create_messages if kind == "messages" else channels.create_queue
    made: Any = create("a", limit=8, slots=8, loans=loans)
    with made.writer() as writer, made.reader() as reader:
        lent = [writer.loan(8) for _ in range(loans + 1)]
        calls: list[Callable[[], object]] = [
            lambda: writer.loan(8),
            lambda: writer.put(b"x", 0),
            lambda: writer.put_parts([b"x"], 0),
            lambda: asyncio.run(writer.put_async(b"x")),
        ]
        if kind == "messages":
            calls.append(lambda: writer.put_rows(memoryview(bytes(8)).cast("B", (1, 8)), 0))
        for call in calls:
            with pytest.raises(ChannelError) as refused:
                call()
            assert type(refused.value) is ChannelError
            assert str(refused.value) == (
                f"channel 'a': {loans + 1} loans at once, which are all that it was made for"
            )
        assert reader.get(0) is None
        memoryview(lent[0])[:] = b"lent for"
        lent[0].publish(timeout=0)
        writer.put(b"put", 0)
        with writer.loan(5) as again:
            memoryview(again)[:] = b"again"
        lent[1].drop()
        writer.put(b"dropped", 0)
        assert [reader.get(0) for _ in range(5)] == [
            b"lent for",
            b"put",
            b"again",
            b"dropped",
            None,
        ]


@pytest.mark.parametrize("views", [1, 2])
def test_all_views_are_alive(channels: Channels, views: int) -> None:
    messages = channels.create_messages("a", limit=8, slots=4, views=views)
    with messages.writer() as writer, messages.reader("block") as reader:
        for i in range(3):
            writer.put(b"%d" % i)
        alive = [reader.view(0) for _ in range(views)]
        for call in (lambda: reader.view(0), lambda: asyncio.run(cast(Any, reader.view_async()))):
            with pytest.raises(ChannelError) as refused:
                call()
            assert type(refused.value) is ChannelError
            count = {1: "1 view", 2: "2 views"}[views]
            assert str(refused.value) == (
                f"channel 'a': {count} at once, which are all that it was made for: release one"
            )
        assert alive[0] is not None
        alive[0].release()
        with cast(Any, reader.view(0)) as view:
            assert bytes(view) == b"%d" % views
        for left in alive[1:]:
            with cast(Any, left):
                assert bytes(cast(Any, left)) == b"1"


# -- ways to overflow -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("allowed", "shown", "refused"),
    [
        ("block", "block", ("overwrite", "discard")),
        (("overwrite", "block"), "overwrite, block", ("discard",)),
        ("discard", "discard", ("block", "overwrite")),
        (("block", "discard"), "block, discard", ("overwrite",)),
    ],
)
def test_an_overflow_that_the_creator_did_not_allow(
    region: Region, channels: Channels, allowed: Any, shown: str, refused: tuple[Any, ...]
) -> None:
    channels.create_messages("a", limit=8, slots=4, overflow=allowed)
    with channel.open(region) as others:
        found = cast(Messages, others.open("a"))
        for way in refused:
            with pytest.raises(ChannelTypeError) as error:
                found.reader(way)
            assert str(error.value) == f"channel 'a' allows its readers {shown}, not {way!r}"
            assert found.overflow == tuple(shown.split(", "))
            for named in found.overflow:
                with found.writer() as writer, found.reader(cast(Any, named)) as reader:
                    writer.put(b"x", 0)
                    assert reader.get(0) == b"x"
        assert channels.list()[0].readers == ()


# -- types ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "there", "wrong", "wanted"),
    [
        ({"schema": "state v2"}, "schema state v2", {"schema": "state v1"}, "schema state v1"),
        ({"schema": "state v2"}, "schema state v2", {"schema": ""}, ""),
        ({"schema": "state v2"}, "schema state v2", {"dtype": "<f4", "shape": (2,)}, "array <f4 2"),
        ({}, "", {"schema": "state v1"}, "schema state v1"),
        (
            {"dtype": "<f4", "shape": (2,)},
            "array <f4 2",
            {"dtype": "<f4", "shape": (2, 1)},
            "array <f4 2x1",
        ),
    ],
)
def test_a_type_that_differs_at_opening(
    channels: Channels, made: Any, there: str, wrong: Any, wanted: str
) -> None:
    channels.create_value("a", limit=8, **made)
    with pytest.raises(ChannelTypeError) as refused:
        channels.open("a", "value", **wrong)
    assert str(refused.value) == f"channel 'a' has messages of type {there!r}, not {wanted!r}"
    with pytest.raises(ChannelTypeError) as refused:
        channels.create_value("a", limit=8, exist_ok=True, **wrong)
    assert str(refused.value) == (
        f"channel 'a' is there, of kind value and type {there!r}; wanted was kind value, type"
        f" {wanted!r}"
    )
    assert channels.open("a", "value", **made).type == there
    assert channels.open("a", "value").type == there


# -- whose a spoiled word is ----------------------------------------------------------------------


def spoil(region: Region, value: int) -> tuple[int, int]:
    """Let the only word with this value be half of all values ahead; return where, and what."""
    area = find_area(region)
    assert area is not None
    words = memoryview(region.read(area.offset, area.size)).cast("Q")
    (at,) = [i for i, word in enumerate(words) if word >> 24 == value]
    spoiled = words[at] ^ 1 << 63
    region.write(area.offset + 8 * at, spoiled.to_bytes(8, "little"))
    return area.offset + 8 * at, spoiled


def reader_of_messages(channels: Channels, other: Any) -> tuple[Callable[[], object], Any]:
    reader = channels.create_messages("a", limit=8, slots=4, writers=1).reader("overwrite")
    writer = other.open("a").writer()
    for i in range(777):
        writer.put(b"%d" % i)
        assert i == 776 or reader.get(0) == b"%d" % i
    return lambda: reader.view(0), writer


def receiver(channels: Channels, other: Any) -> tuple[Callable[[], object], Any]:
    listener = channels.create_bytes("a", buffer=1024, connections=1).listen()
    caller = other.open("a").connect()
    stream: Any = listener.accept(0)
    caller.sendall(bytes(777))
    return lambda: stream.recv(8), caller


@pytest.mark.parametrize("kind", [reader_of_messages, receiver])
@pytest.mark.parametrize("owner", ["there", "closed", "removed"])
def test_whose_a_spoiled_word_is(region: Region, kind: Any, owner: str) -> None:
    with channel.open(region, name="own") as own:
        other = channel.open(region, name="other")
        try:
            call, end = kind(own, other)
            whose = f"which belongs to place 1 (process {os.getpid()}, 'other')"
            if owner == "closed":
                end.close()
                if kind is receiver:  # a writer's slot stays until its messages were read
                    whose = "which belongs to no place"
            elif owner == "removed":
                own.free_place(1)
                whose = "which belonged to place 1"
            at, seen = spoil(region, 777)
            with pytest.raises(ChannelCorrupt) as found:
                call()
            assert str(found.value) == (
                f"channel 'a': the head at {at:#x}, {whose}, is impossible ({seen:#x}): some"
                " process that can write to the memory has spoiled it"
            )
        finally:
            other.close()
