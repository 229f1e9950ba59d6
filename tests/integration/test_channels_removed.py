"""Ends of a channel that another process removed by force: who waits there is told."""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.waiting import PATIENCE

from ivshmem import ClosedError, Directory, Region, channel
from ivshmem.channel import Channels


@pytest.fixture
def channels() -> Iterator[Channels]:
    with Region.create("2M") as region:
        Directory.create(region, channels="1M").close()
        with channel.open(region) as channels:
            yield channels


def ends(channels: Channels) -> dict[str, tuple[Any, Callable[..., Any], Callable[..., Any]]]:
    """Of each kind: an end, a call that waits there, and its twin for asyncio."""
    reader = channels.create_messages("messages", limit=8).reader()
    queue = channels.create_queue("queue", limit=8).reader()
    value = channels.create_value("value", limit=8).reader()
    server = channels.create_calls("calls", limit=8).server()
    stream = channels.create_bytes("bytes", buffer=1024, connections=1)
    listener = stream.listen()
    connection = stream.connect()
    accepted = listener.accept(PATIENCE)
    return {
        "messages": (reader, reader.get, reader.get_async),
        "queue": (queue, queue.get, queue.get_async),
        "value": (value, value.wait_changed, value.wait_changed_async),
        "calls": (server, server.take, server.take_async),
        "listener": (listener, listener.accept, listener.accept_async),
        "connection": (accepted, lambda: connection.recv(1), lambda: connection.recv_async(1)),
    }


KINDS = ("messages", "queue", "value", "calls", "listener", "connection")


def remove_all(channels: Channels) -> None:
    for info in channels.list():
        channels.remove(info.name, force=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_that_waits(channels: Channels, kind: str) -> None:
    there = ends(channels)
    remove_all(channels)
    with pytest.raises(ClosedError, match="was removed"):
        there[kind][1]()


def test_tasks_that_wait(channels: Channels) -> None:
    async def main() -> None:
        there = ends(channels)
        tasks = {kind: asyncio.ensure_future(there[kind][2]()) for kind in KINDS}
        await asyncio.sleep(0.05)
        remove_all(channels)
        for task in tasks.values():
            with pytest.raises(ClosedError, match="was removed"):
                await asyncio.wait_for(task, PATIENCE)

    asyncio.run(main())


def test_a_descriptor_that_is_watched(channels: Channels) -> None:
    reader = channels.create_messages("messages", limit=8).reader()
    fd = reader.fileno()
    assert reader.get(0) is None
    remove_all(channels)
    assert select.select([fd], [], [], PATIENCE)[0]
    with pytest.raises(ClosedError, match="was removed"):
        reader.get(0)
