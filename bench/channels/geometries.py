"""The memory of channels: what they say that they take, and what is touched when all of it is used.

Knows: geometries, how each kind is filled, and the pages of a file. Does not know: layouts.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import ivshmem
from ivshmem import channel
from ivshmem.channel import Channels

from .. import in_memory

LIMIT = 4096  # bytes of each message
PAGE = os.sysconf("SC_PAGE_SIZE")
_MEMORY = 16 << 20


class Used(NamedTuple):
    """A channel's memory, in bytes.

    Attributes:
        words: the call that made it.
        payload: of all messages, or of both directions of all connections, that it can hold.
        size: as the channel says, and `ivshmem channel info` shows.
        touched: in pages that got memory when all slots and loans were used; above `size` by less
            than two pages, if what the channel takes is exactly that.
    """

    words: str
    payload: int
    size: int
    touched: int


def _filled(writer: Any, slots: int) -> None:
    """Write each cell of a writer: those of its slots, and all loans at once."""
    for _ in range(slots):
        writer.put(b"\1" * LIMIT, 1)
    loans = []
    with contextlib.suppress(ivshmem.errors.ChannelError):
        while True:  # one more than was asked for is `put`'s
            loans.append(writer.loan())
            with memoryview(loans[-1]) as memory:
                memory[:] = b"\1" * LIMIT
    for loan in loans:
        loan.drop()


def _messages(channels: Channels, slots: int, **geometry: Any) -> int:
    made = channels.create_messages("it", limit=LIMIT, slots=slots, **geometry)
    with contextlib.ExitStack() as stack:
        for _ in range(geometry["readers"]):
            stack.enter_context(made.reader(geometry["overflow"]))
        for _ in range(geometry["writers"]):
            writer = stack.enter_context(made.writer())
            if geometry["overflow"] == "discard":  # its backlog keeps these, and the slots others
                for _ in range(slots):
                    writer.put(b"\1" * LIMIT, 1)
            _filled(writer, slots)
    return int(geometry["writers"]) * slots * LIMIT


def _queue(channels: Channels, slots: int, **geometry: Any) -> int:
    made = channels.create_queue("it", limit=LIMIT, slots=slots, **geometry)
    with contextlib.ExitStack() as stack:
        for _ in range(geometry["writers"]):
            _filled(stack.enter_context(made.writer()), slots)
    return int(geometry["writers"]) * slots * LIMIT


def _value(channels: Channels, **geometry: Any) -> int:
    made = channels.create_value("it", limit=LIMIT, **geometry)
    with made.writer() as writer:
        _filled(writer, 4)
    return LIMIT


def _calls(channels: Channels, slots: int, **geometry: Any) -> int:
    made = channels.create_calls("it", limit=LIMIT, slots=slots, **geometry)
    with contextlib.ExitStack() as stack:
        server: Any = stack.enter_context(made.server())
        for _ in range(geometry["callers"]):
            caller = stack.enter_context(made.caller())
            calls = [caller.submit(b"\1" * LIMIT) for _ in range(slots)]
            for _ in calls:
                server.take().reply(b"\1" * LIMIT)
    return int(geometry["callers"]) * slots * LIMIT * 2


def _bytes(channels: Channels, buffer: int, **geometry: Any) -> int:
    made = channels.create_bytes("it", buffer=buffer, **geometry)
    with contextlib.ExitStack() as stack:
        listener: Any = stack.enter_context(made.listen())
        for _ in range(geometry["connections"]):
            ends = stack.enter_context(made.connect()), stack.enter_context(listener.accept())
            for end in ends:
                end.sendall(b"\1" * buffer)
    return int(geometry["connections"]) * buffer * 2


# What is filled, and with which geometry.
GEOMETRIES: list[tuple[str, Callable[..., int], dict[str, Any]]] = [
    ("messages", _messages, {"slots": 16, "writers": 1, "readers": 1, "overflow": "block"}),
    ("messages", _messages, {"slots": 64, "writers": 4, "readers": 8, "overflow": "block"}),
    ("messages", _messages, {"slots": 16, "writers": 1, "readers": 1, "overflow": "discard"}),
    ("queue", _queue, {"slots": 16, "writers": 4, "readers": 8}),
    ("value", _value, {"readers": 8}),
    ("calls", _calls, {"slots": 16, "callers": 4, "servers": 2}),
    ("bytes", _bytes, {"buffer": 1 << 16, "connections": 4}),
]


def used() -> list[Used]:
    """Make and fill a channel of each geometry."""
    found = []
    for kind, fill, geometry in GEOMETRIES:
        with in_memory.folder() as directory:
            path = f"{directory}/memory"
            with open(path, "wb") as file:
                file.truncate(_MEMORY)  # `Region.create` would fill it with pages
            with ivshmem.Region.attach(path=path) as region:
                ivshmem.Directory.create(region, channels="12M").close()
                with channel.open(region) as channels:
                    before = os.stat(path).st_blocks
                    payload = fill(channels, **geometry)
                    touched = (os.stat(path).st_blocks - before) * 512
                    (info,) = channels.list()
        words = ", ".join(f"{name}={value!r}" for name, value in geometry.items())
        limit = "" if kind == "bytes" else f", limit={LIMIT}"
        found.append(Used(f"create_{kind}({words}{limit})", payload, info.size, touched))
    return found
