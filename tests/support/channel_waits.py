"""Each call of a channel that waits, and what ends it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from ivshmem.channel import Bytes, Channels


class Pair:
    """Both ends of a channel of each kind, of two processes."""

    def __init__(self, one: Channels, two: Channels) -> None:
        self.reader = one.create_messages("messages", limit=8, slots=1).reader("block")
        self.writer: Any = two.open("messages").writer()  # type: ignore[attr-defined]
        self.taker = one.create_queue("queue", limit=8, slots=1).reader()
        self.giver: Any = two.open("queue").writer()  # type: ignore[attr-defined]
        self.looker = one.create_value("value", limit=8).reader()
        self.setter: Any = two.open("value").writer()  # type: ignore[attr-defined]
        self.server: Any = one.create_calls("calls", limit=8, slots=1).server()
        self.caller: Any = two.open("calls").caller()  # type: ignore[attr-defined]
        self.listener: Any = one.create_bytes("bytes", buffer=64).listen()
        self.room = cast(Bytes, two.open("bytes"))
        self.stream: Any = self.room.connect()
        self.accepted: Any = self.listener.accept()
        self.calls: list[Any] = []

    def fill(self, connection: Any) -> None:
        connection.settimeout(0)
        while True:
            try:
                connection.send(bytes(64))
            except BlockingIOError:
                break
        connection.settimeout(None)

    def begin(self) -> None:
        self.calls.append(self.caller.submit(b"call"))

    def reply(self) -> None:
        call = self.server.take()
        assert call is not None
        call.reply(b"reply")

    def greet(self) -> None:
        self.calls.append(self.room.connect())
        self.calls[0].send(b"hello")


# What is done first, so that there is no room.
FULL: dict[str, Callable[[Pair], Any]] = {
    "room for a message": lambda p: p.writer.put(b"a"),
    "room in a queue": lambda p: p.giver.put(b"a"),
    "room for bytes": lambda p: p.fill(p.stream),
}
# The call that waits, what the other side does then, and what the call returns.
WAITS: dict[str, tuple[Callable[[Pair], Any], Callable[[Pair], Any], Any]] = {
    "a message": (lambda p: p.reader.get(), lambda p: p.writer.put(b"a"), b"a"),
    "room for a message": (lambda p: p.writer.put(b"b"), lambda p: p.reader.get(), 0),
    "a message of a queue": (lambda p: p.taker.get(), lambda p: p.giver.put(b"a"), b"a"),
    "room in a queue": (lambda p: p.giver.put(b"b"), lambda p: p.taker.get(), 0),
    "a value": (lambda p: p.looker.wait_changed(), lambda p: p.setter.put(b"a"), b"a"),
    "a call": (lambda p: p.server.take().get(), Pair.begin, b"call"),
    "a reply": (lambda p: p.caller.call(b"a"), Pair.reply, b"reply"),
    "a connection": (lambda p: p.listener.accept().recv(8), Pair.greet, b"hello"),
    "bytes": (lambda p: p.accepted.recv(8), lambda p: p.stream.send(b"a"), b"a"),
    "room for bytes": (lambda p: p.stream.send(b"a"), lambda p: p.accepted.recv(64), 1),
    "the end of bytes": (lambda p: p.accepted.recv(8), lambda p: p.stream.close(), b""),
}
