"""Places of channels: an id or a name is nobody's for ever, and takes nothing over."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from support.waiting import PATIENCE, until

import ivshmem
from ivshmem import Directory, Region, channel, testing
from ivshmem.channel import Channels

HOW: dict[str, Any] = {"name": "same", "beat": 0.01, "lease": 0.2}


@pytest.fixture(params=["of no endpoint", "of one that was evicted"])
def two(request: pytest.FixtureRequest) -> Iterator[tuple[Channels, Channels]]:
    """Two that have one name and one id, as far as the memory tells."""
    with ExitStack() as opened:
        if request.param == "of no endpoint":
            region = opened.enter_context(Region.create("4M"))
            Directory.create(region, channels="2M").close()
            places: list[Any] = [region, region]
            first = opened.enter_context(channel.open(region, **HOW))
        else:
            server = opened.enter_context(testing.server("4M", vectors=1, channels="2M"))
            old = opened.enter_context(ivshmem.connect(server.path, timeout=PATIENCE))
            places = [old]
            first = opened.enter_context(channel.open(old, **HOW))
            server.evict(old.id)
            until(lambda: not server.peers, "it has left")
            new = opened.enter_context(ivshmem.connect(server.path, timeout=PATIENCE))
            assert new.id == old.id
            places.append(new)
        yield first, opened.enter_context(channel.open(places[1], **HOW))


def test_an_equal_name_and_id_takes_no_place_over(two: tuple[Channels, Channels]) -> None:
    """Both stay at work, each with its own slots; the end of one is not the other's."""
    first, second = two
    messages = first.create_messages("a", limit=8, writers=2, readers=2)
    again: Any = second.open("a")
    with again.reader("block") as reader, messages.writer() as one:
        with again.writer() as other:
            assert [(each.id, each.name) for each in first.places()] == [(0, "same")] * 2
            assert len({each.place for each in second.places()}) == 2
            one.put(b"one")
            other.put(b"other")
            assert {reader.get(PATIENCE), reader.get(PATIENCE)} == {b"one", b"other"}
        second_place = next(info.readers[0].place for info in first.list() if info.name == "a")
        one.put(b"still")
        assert reader.get(PATIENCE) == b"still"
    second.close()
    (left,) = first.places()
    assert left.place != second_place
    assert left.state == "at work"
    assert not first.closed
    with messages.reader("block") as reader, messages.writer() as one:
        one.put(b"own")
        assert reader.get(PATIENCE) == b"own"
