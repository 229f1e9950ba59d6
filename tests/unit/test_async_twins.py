"""Each public call that can block has a twin in ivshmem.aio, or is one to be called in a thread."""

from __future__ import annotations

import asyncio
import inspect
import re
import threading
from collections.abc import Callable
from typing import Any

import pytest
from support.public_names import listing
from support.waiting import PATIENCE

import ivshmem
from ivshmem import Directory, Region, aio, channel, guest
from ivshmem.aio import AsyncEndpoint, close_async

# In the words of the list of public names. What is not here, and not in IN_A_THREAD, never waits.
TWINS = {
    "connect": "connect_async",
    "open_device": "open_async",
    "Directory.publish": "publish_async",
    "Directory.wait_for": "wait_for_async",
    "Directory.close": "close_async",
}
# Endpoint and what inherits it; `ring` and `ring_all` never wait there.
OF_ENDPOINTS = {"close", "events", "next_event", "ring", "ring_all", "wait", "wait_word"}
IN_A_THREAD = {
    *("Region.attach", "Region.close", "Region.create", "Region.open", "Region.populate"),
    *("check_image", "load", "save", "measure"),
    *("ControlClient", "ControlClient.ask", "ControlClient.hold", "ControlClient.release"),
    *("request", "Server.close", "Server.serve_forever"),
    # `step(0)` never waits.
    "Server.step",
}
# A loop without the interpreter; and names for what `ring` and `ring_all` are in asyncio.
NOT_IN_ASYNCIO = {"echo", "ring_nowait", "ring_all_nowait"}


def public_calls(kind: type) -> set[str]:
    return {
        name
        for name in dir(kind)
        if not name.startswith("_") and callable(inspect.getattr_static(kind, name))
    }


@pytest.mark.parametrize("kind", [ivshmem.Endpoint, ivshmem.Client, guest.GuestDevice])
def test_an_endpoint_has_all_its_calls_in_asyncio(kind: type) -> None:
    assert public_calls(kind) - NOT_IN_ASYNCIO <= {*public_calls(AsyncEndpoint), "ring"}
    properties = {name for name in dir(kind) if isinstance(getattr(kind, name), property)}
    assert properties <= {*dir(AsyncEndpoint)}


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_takes_the_same_arguments(name: str) -> None:
    head, _, attribute = name.partition(".")
    thing = getattr(ivshmem, head, None) or getattr(guest, head)
    call: Callable[..., Any] = getattr(thing, attribute) if attribute else thing
    theirs = [*inspect.signature(call).parameters.values()]
    ours = [*inspect.signature(getattr(aio, TWINS[name])).parameters.values()]
    if attribute:
        assert (theirs[0].name, ours[0].name) == ("self", head.lower())
        del theirs[0], ours[0]
    assert [(each.name, each.default, each.kind) for each in ours] == [
        (each.name, each.default, each.kind) for each in theirs
    ]


def with_a_time_limit() -> set[str]:
    """The public calls, outside ivshmem.aio and ivshmem.testing, that take a `timeout`."""
    found = set()
    text = re.sub(r"\[ivshmem\.(aio|testing)\]\n(.+\n)+", "", listing())
    for line in text.splitlines():
        if made := re.match(r"(?:class|def|async def) (\w+)", line):
            owner = made[1]
        if re.search(r"\btimeout\b", line):
            called = re.match(r"    \.?(\w+)", line)
            found.add(f"{owner}.{called[1]}" if called and called[1] != owner else owner)
    return found


def with_a_method_beside() -> set[str]:
    """The calls of channels, whose twins are methods of the same class."""
    kinds = {name: getattr(channel, name) for name in channel.__all__}
    return {
        f"{kind}.{name.removesuffix('_async')}"
        for kind, thing in kinds.items()
        if isinstance(thing, type)
        for name in public_calls(thing)
        if name.endswith("_async")
    }


@pytest.mark.parametrize("call", sorted(with_a_method_beside()))
def test_a_method_beside_takes_the_same_arguments(call: str) -> None:
    kind, _, name = call.partition(".")
    thing = getattr(channel, kind)
    theirs = [*inspect.signature(getattr(thing, name)).parameters]
    ours = [*inspect.signature(getattr(thing, f"{name}_async")).parameters]
    # A task does not spin; a connection's time limit in a thread is set by `settimeout`.
    theirs = [each for each in theirs if each != "spin"]
    assert ours == theirs or (kind == "Stream" and ours == [*theirs, "timeout"])


def test_what_takes_a_time_limit_has_a_twin() -> None:
    kinds = ("Broker", "Client", "Endpoint", "GuestDevice", "Server")
    endpoints = {f"{kind}.{name}" for kind in kinds[1:4] for name in (*OF_ENDPOINTS, "echo")}
    found = with_a_time_limit()
    assert {"connect", "Client.wait", "Directory.publish", "ControlClient", "request"} <= found
    rest = found - endpoints - TWINS.keys() - IN_A_THREAD - with_a_method_beside()
    rest = {name for name in rest if not name.endswith("_async")}
    # `open_connection` is for asyncio alone, as that of asyncio is.
    assert rest == {"Broker.step", "Bytes.open_connection", "Stream.settimeout"}


def test_the_lists_name_what_there_is() -> None:
    text = listing()
    for name in {*TWINS, *IN_A_THREAD}:
        owner, _, attribute = name.partition(".")
        head = re.search(rf"^(?:class|def) {owner}\b.*\n((?:    .*\n)*)", text, re.MULTILINE)
        assert head, name
        assert not attribute or f"    .{attribute}(" in head[1], name
    assert {*TWINS.values()} | {"AsyncEndpoint", "Opening"} == {*aio.__all__}
    assert {*public_calls(AsyncEndpoint), "ring"} >= OF_ENDPOINTS


def test_closing_a_directory_leaves_the_loop_running(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while the directory's thread is in the middle of a sign of life."""
    under_way, may_end = threading.Event(), threading.Event()
    beat = Directory._beat_once

    def slow(self: Directory) -> None:
        under_way.set()
        may_end.wait(PATIENCE)
        beat(self)

    async def main() -> None:
        with Region.create("4K") as region:
            directory = Directory.create(region, beat=0.001)
            directory.publish("a", id=1)
            await asyncio.to_thread(under_way.wait, PATIENCE)
            closing = asyncio.ensure_future(close_async(directory))
            for _ in range(5):
                await asyncio.sleep(0.001)
                assert not closing.done()
            may_end.set()
            await closing
            with pytest.raises(ivshmem.ClosedError):
                directory.entries()

    monkeypatch.setattr(Directory, "_beat_once", slow)
    asyncio.run(asyncio.wait_for(main(), PATIENCE))
