"""Messages through channels, from Python.

Knows: the calls of a channel that each row measures. Does not know: how they are measured.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import ivshmem
from ivshmem import channel
from ivshmem.channel import Channels

from ..ways import Shared, serving
from .exchange import ANSWER, Exchange, Link

LIMIT = 60  # seconds that a call waits
SPIN = 0.01  # seconds
ROWS = 64  # messages at once

ROOM = "32M"
AREA = "16M"


def slots_of(size: int) -> int:
    """Messages that a channel keeps: enough for a stream, few where they are large."""
    return 1024 if size <= 4096 else 4


def create(channels: Channels, size: int) -> None:
    """Make the two channels of an exchange."""
    for name, limit in {"there": size, "back": max(ANSWER, 1)}.items():
        slots = slots_of(limit)
        channels.create_messages(name, limit=limit, slots=slots, writers=1, readers=1)


def made(path: Path, size: int) -> int:
    """Make a region with the two channels; the offset of their area."""
    with ivshmem.Region.create(ROOM, path=path) as region:
        with ivshmem.Directory.create(region, channels=AREA) as directory:
            assert directory.channels is not None
            start = directory.channels.start
        with channel.open(region) as channels:
            create(channels, size)
    return start


class Ours(Exchange):
    """Two channels in a region without a server: both ends spin, and a ring is never needed."""

    send, receive = "put(data, LIMIT, spin=SPIN)", "get(LIMIT, spin=SPIN)"
    answer, hear = "", ""

    @property
    def settings(self) -> str:  # type: ignore[override]
        return f'reader("block"), slots={slots_of(self.size)}, spin={SPIN:g}'

    @contextlib.contextmanager
    def shared(self) -> Iterator[Shared]:
        with super().shared() as shared:
            made(Path(shared.ping[0]) / "memory", self.size)
            yield shared

    @contextlib.contextmanager
    def channels(self, directory: str) -> Iterator[Channels]:
        """Join, as an end does."""
        with ivshmem.Region.attach(path=f"{directory}/memory") as region:
            with channel.open(region) as channels:
                yield channels

    @contextlib.contextmanager
    def link(self, role: str, directory: str) -> Iterator[Link]:
        there, back = ("there", "back") if role == "ping" else ("back", "there")
        with (
            self.channels(directory) as channels,
            channels.open(back).reader("block") as reader,  # type: ignore[attr-defined]
            channels.open(there).writer() as writer,  # type: ignore[attr-defined]
        ):
            names = {"put": writer.put, "get": reader.get, "writer": writer, "reader": reader}
            names |= {"LIMIT": LIMIT, "SPIN": SPIN}
            yield Link(self.send, self.receive, names, self.answer, self.hear)


class PutGet(Ours):
    label = "put, get"


class PutInto(Ours):
    """Copied into a buffer of the reader's."""

    label = "put, get_into"
    receive = "get_into(into, LIMIT, spin=SPIN)"

    @contextlib.contextmanager
    def link(self, role: str, directory: str) -> Iterator[Link]:
        with super().link(role, directory) as link:
            names = {"get_into": link.names["reader"].get_into, "into": bytearray(self.size)}
            yield link._replace(names={**link.names, **names})


class PutView(Ours):
    """Looked at where it lies."""

    label = "put, view"
    receive = "view(LIMIT, spin=SPIN).release()"
    hear = "get(LIMIT, spin=SPIN)"

    @contextlib.contextmanager
    def link(self, role: str, directory: str) -> Iterator[Link]:
        with super().link(role, directory) as link:
            names = {"view": link.names["reader"].view}
            yield link._replace(names={**link.names, **names})


class Rows(Ours):
    """From one buffer into another, many messages in a call."""

    label = f"put_rows, get_rows of {ROWS}"
    at_once = ROWS
    hear = "get(LIMIT, spin=SPIN)"
    send = "put_rows(rows, LIMIT, spin=SPIN)"
    answer = "put(data, LIMIT, spin=SPIN)"

    @contextlib.contextmanager
    def link(self, role: str, directory: str) -> Iterator[Link]:
        with super().link(role, directory) as link:
            rows = memoryview(bytearray(ROWS * self.size)).cast("B", (ROWS, self.size))
            get_rows = link.names["reader"].get_rows

            def fill(count: int) -> None:
                while count > 0:
                    count -= get_rows(rows, LIMIT, spin=SPIN)

            names = {"put_rows": link.names["writer"].put_rows, "rows": rows, "fill": fill}
            yield link._replace(names={**link.names, **names}, receive_all=f"fill({self.count})")


class Lists(Ours):
    """Objects of bytes from a list, and into a list."""

    label = f"lists of {ROWS} bytes objects"
    at_once = ROWS
    send = "put_all()"
    receive = "messages = [get(LIMIT, spin=SPIN) for _ in repeat(None, ROWS)]"
    answer, hear = "put(data, LIMIT, spin=SPIN)", "get(LIMIT, spin=SPIN)"

    @contextlib.contextmanager
    def link(self, role: str, directory: str) -> Iterator[Link]:
        with super().link(role, directory) as link:
            put = link.names["put"]
            messages = [bytes(self.size) for _ in range(ROWS)]

            def put_all() -> None:
                for each in messages:
                    put(each, LIMIT, spin=SPIN)

            names = {"put_all": put_all, "messages": messages, "ROWS": ROWS}
            yield link._replace(names={**link.names, **names})


class Blocking(Ours):
    """Two clients of a server; both ends sleep, and are rung."""

    label = "put, get, blocking"
    settings = 'reader("block"), get() without spin'
    send, receive = "put(data)", "get()"

    @contextlib.contextmanager
    def shared(self) -> Iterator[Shared]:
        with Exchange.shared(self) as shared:
            socket = Path(shared.ping[0]) / "socket"
            with serving(socket, memory=ROOM, channels=AREA):
                with ivshmem.connect(socket) as client, channel.open(client) as channels:
                    create(channels, self.size)
                yield shared

    @contextlib.contextmanager
    def channels(self, directory: str) -> Iterator[Channels]:
        with ivshmem.connect(f"{directory}/socket") as client:
            with channel.open(client) as channels:
                yield channels


class Adaptive(Blocking):
    """The same, but an end spins before it sleeps, for as long as that helps."""

    label = 'put, get, spin="auto"'
    settings = 'reader("block"), get(spin="auto")'
    receive = 'get(spin="auto")'
