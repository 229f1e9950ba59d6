"""A channel that another process removed: who waits there is told, and nobody gets another one."""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.waiting import PATIENCE, until

from ivshmem import ClosedError, Directory, Region, channel
from ivshmem.channel import Channels, NoSuchChannel, records


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


def calls(channels: Channels) -> dict[str, Callable[[], object]]:
    """Of each kind: a call that does not wait, and would store into the channel's memory."""
    found = ends(channels)
    messages = channels.open("messages")
    queue, value, requests = (channels.open(name) for name in ("queue", "value", "calls"))
    writers: Any = [each.writer() for each in (messages, queue, value)]  # type: ignore[attr-defined]
    caller = requests.caller()  # type: ignore[attr-defined]
    connection = found["connection"][0]
    connection.setblocking(False)
    return {
        "messages": lambda: writers[0].put(b"x", 0),
        "queue": lambda: writers[1].put(b"x", 0),
        "value": lambda: writers[2].put(b"x"),
        "calls": lambda: caller.submit(b"x", 0),
        "connection": lambda: connection.send(b"x"),
    }


def test_calls_that_do_not_wait(channels: Channels) -> None:
    """Within a beat they stop storing into what is perhaps another channel's by now."""
    every = calls(channels)
    remove_all(channels)
    for call in every.values():

        def fails(call: Callable[[], object] = call) -> bool:
            try:
                call()
            except ClosedError as error:
                assert "was removed" in str(error)  # noqa: PT017 - others are passed on
                return True
            except (TimeoutError, BlockingIOError):
                pass
            return False

        until(fails, "the channel was removed")
    again = channels.create_messages("again", limit=8)
    with again.reader() as reader, again.writer() as writer:
        for call in every.values():
            with pytest.raises(ClosedError, match="was removed"):
                call()
        writer.put(b"new")
        assert reader.get(0) == b"new"


# -- the same name, and another channel by now ----------------------------------------------------

ENDS = {
    "messages": ("writer", "reader"),
    "queue": ("writer", "reader"),
    "value": ("writer", "reader"),
    "calls": ("caller", "server"),
    "bytes": ("listen", "connect"),
}


def make(channels: Channels, kind: str) -> Any:
    size = {"buffer": 64} if kind == "bytes" else {"limit": 8}
    return getattr(channels, f"create_{kind}")("name", **size)


@pytest.mark.parametrize("kind", ENDS)
def test_ends_of_a_channel_that_was_made_anew(channels: Channels, kind: str) -> None:
    """Neither of another kind, nor of the same, are they ends of the new one."""
    found = make(channels, kind)
    for other in ENDS:
        channels.remove("name")
        made = make(channels, other)
        for end in ENDS[kind]:
            with pytest.raises(ClosedError, match="'name' was removed"):
                getattr(found, end)()
        with pytest.raises(NoSuchChannel):
            found.remove()
        assert [info.kind for info in channels.list()] == [other]
        getattr(made, ENDS[other][0])().close()


def test_another_type_by_now(channels: Channels) -> None:
    """Else a reader would take whole numbers for floats."""
    found = channels.create_messages("name", dtype="<f4", shape=(4,))
    channels.remove("name")
    channels.create_messages("name", dtype="<i4", shape=(4,))
    with pytest.raises(ClosedError, match="was removed"):
        found.reader()


def test_another_process_made_it_anew_before_the_creator_has_it(
    channels: Channels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The creator gets what it created, which is not there any more."""
    create = records.create

    def create_and_lose(*args: Any) -> Any:
        made = create(*args)
        monkeypatch.undo()
        channels.remove("name")
        make(channels, "bytes")
        return made

    monkeypatch.setattr(records, "create", create_and_lose)
    found = make(channels, "messages")
    with pytest.raises(ClosedError, match="was removed"):
        found.writer()
