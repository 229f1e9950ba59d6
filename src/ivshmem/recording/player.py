"""Internal: replays a file into channels.

Knows: which channel a topic goes to, and when a message is due. Does not know: how a file is read
(source.py), what a channel's facts are in it (facts.py).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from ..channel.kinds import Messages, Value
from ..errors import ChannelTypeError, IvshmemError, NoSuchChannel
from ..memory.sizes import format_size
from ..system.uncopied import Uncopied
from ..text import plain
from . import facts
from .source import RecordedFile

if TYPE_CHECKING:
    from ..channel import Channels
    from ..channel.writers import Writer

_SECOND = 1_000_000_000  # nanoseconds


class Player(Uncopied):
    """Sends the messages of a file to channels; a context manager.

    Channels that are missing are made from what the file says of them. After an error those that it
    made, and sent nothing to, are removed.

    Args:
        channels: of the region.
        source: the file.
        speed: how many times as fast as it was recorded; inf: without a pause.
        since, until: nanoseconds since 1970; what was recorded before or later is not sent.
        tell: called with a line when a topic gets another name.

    Attributes:
        sent: messages.
        missed: how often a reader that discards did not get one.
        position: log_time of the last message that was sent, in nanoseconds.

    Raises:
        ChannelTypeError, ChannelError: a channel is there that does not fit; the message shows
            both. Or there is no room.
        ValueError: what the file says of a channel is not allowed.
    """

    def __init__(
        self,
        channels: Channels,
        source: RecordedFile,
        *,
        speed: float = 1.0,
        since: int,
        until: int,
        tell: Callable[[str], object],
    ) -> None:
        self._channels = channels
        self._source = source
        self._speed = speed
        self._since, self._until = since, until
        self.sent = self.missed = 0
        self.position = since
        self._writers: dict[int, Writer] = {}
        self._by_name: dict[str, Writer] = {}
        self._unused: dict[str, Messages | Value] = {}  # made here, and nothing was sent yet
        try:
            self._names = names = facts.names_of(source.topics.values())
            limits: dict[str, int] = {}
            for number, topic in source.topics.items():
                name = names[number]
                limits[name] = max(limits.get(name, 1), topic.limit)
            for number, topic in source.topics.items():
                if not topic.facts and not topic.used:
                    continue  # how large its messages are, nobody knows
                name = names[number]
                if name != topic.name:
                    tell(f"topic {topic.name!r} becomes channel {name!r}")
                if name not in self._by_name:
                    found = self._channel(name, topic, limits[name])
                    self._by_name[name] = found.writer()
                self._writers[number] = self._by_name[name]
        except BaseException:
            self.close()
            self._remove_unused()
            raise

    def _channel(self, name: str, topic: facts.Topic, limit: int) -> Messages | Value:
        """The channel of a topic, which is there or is made."""
        type_arguments = facts.type_arguments(topic.type)
        try:
            found = self._channels.open(name)
        except NoSuchChannel:
            create = (
                self._channels.create_value
                if topic.kind == "value"
                else self._channels.create_messages
            )
            found = create(name, **facts.geometry_of(topic, limit), **type_arguments)
            self._unused[name] = found
        wanted, there = (topic.kind, topic.type), (found.kind, found._facts["type"])
        if wanted != there or found.limit < limit:
            raise ChannelTypeError(
                f"channel {name!r} is there, {_described(*there, found.limit)}, and the file has"
                f" {_described(*wanted, limit)}: remove the channel (`ivshmem channel rm`), or"
                " replay into another region"
            )
        assert isinstance(found, Messages | Value)
        found._type = None  # bytes, also of arrays, and without numpy
        return found

    def play(self, step: Callable[[], object]) -> int:
        """Send all messages once, each when it is due; return how many that were.

        Args:
            step: called after each message, and while none is due.

        Raises:
            ChannelError: a message has no place in its channel; what came before was sent.
            ValueError: the file is damaged.
        """
        first: int | None = None
        before = self.sent
        begun = time.monotonic()
        for message in self._source.read(self._since, self._until):
            if first is None:
                first, begun = message.time, time.monotonic()
            due = begun + (message.time - first) / _SECOND / self._speed
            while (left := due - time.monotonic()) > 0:
                time.sleep(min(left, 0.1))
                step()
            writer = self._writers[message.topic]
            self.missed += writer.put(message.data)
            self._unused.pop(self._names[message.topic], None)
            self.sent += 1
            self.position = message.time
            step()
        return self.sent - before

    def _remove_unused(self) -> None:
        for found in self._unused.values():
            with contextlib.suppress(IvshmemError):  # another process uses it already
                found.remove()
        self._unused.clear()

    def close(self) -> None:
        """Close the writers; may be called twice. The channels stay."""
        for writer in self._by_name.values():
            writer.close()

    def __enter__(self) -> Player:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self.close()
        if kind is not None and issubclass(kind, Exception):
            self._remove_unused()


def _described(kind: str, text: str, limit: int) -> str:
    words = f" of type {plain(text)!r}" if text else " without a type"
    return f"of kind {kind}{words}, messages of {format_size(limit)} at most"


def moment(text: str, start: int) -> int:
    """Return a time that a user gave, in nanoseconds since 1970.

    Args:
        text: seconds from `start`, or a time as RFC 3339 has it.

    Raises:
        ValueError: it is neither.
    """
    try:
        return start + round(float(text) * _SECOND)
    except (ValueError, OverflowError):
        pass
    try:
        given = datetime.fromisoformat(text.upper().replace("Z", "+00:00"))
    except ValueError:
        given = None
    if given is None or given.tzinfo is None:
        raise ValueError(
            f"{text!r}: seconds from the start (12.5), or a time with its zone"
            " (2026-02-03T04:05:06Z)"
        )
    whole = given.astimezone(timezone.utc) - datetime(1970, 1, 1, tzinfo=timezone.utc)
    return (whole.days * 86400 + whole.seconds) * _SECOND + whole.microseconds * 1000
