"""Internal: to watch a channel of messages, or a value, without ever holding up who writes it.

Knows: which reader slows no writer, and what was lost to it. Does not know: what is done with a
message; threads.

Invariants:
1. A watcher that is too slow loses messages. No writer waits for it.
2. While messages come, it looks for them by itself: a writer rings it once after a silence, and not
   for each message.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, NamedTuple

from ..errors import ChannelTypeError, Overtaken
from ..system.uncopied import Uncopied
from .info import POSITIONS
from .kinds import Messages, Value
from .values import ValueReader

if TYPE_CHECKING:
    from typing import Literal

    from .readers import Reader
    from .views import View


# Seconds after a message for which it looks by itself, and between two looks.
_AWAKE = 0.1
_PAUSE = 0.001


class Seen(NamedTuple):
    """A message that was seen.

    Attributes:
        data: a copy of it; b"", if only sizes were asked for.
        size: its bytes.
        writer, position: the slot of its writer, and its number among the messages of that slot.
        time: of publication, in seconds since 1970; None: the channel has no times.
        lost: messages of the same writer that were lost before it.
    """

    data: bytes
    size: int
    writer: int
    position: int
    time: float | None
    lost: int


class Watcher(Uncopied):
    """A reader that loses messages instead of slowing a writer; a context manager.

    Args:
        found: the channel.
        history: as of Messages.reader; of a value, 1 or more: begin with the content that is there.

    Raises:
        ChannelTypeError: all readers of the channel block its writers.
        ChannelError, ClosedError: as of Messages.reader.
    """

    def __init__(self, found: Messages | Value, *, history: int = 0) -> None:
        self._reader: Reader | ValueReader
        self._next: dict[int, int] = {}
        self._first = False  # what a value is now is still to be seen
        if isinstance(found, Value):
            self._reader = found.reader()
            self._first = history > 0
        else:
            self._reader = found.reader(way_of(found), history=history)
        self.lost = 0
        self._awake = -math.inf  # when it may sleep

    def take(self, timeout: float | None = None, *, copied: bool = True) -> Seen | None:
        """Return the next message.

        Args:
            timeout: seconds to wait at most; None: for ever.
            copied: if False, `data` is empty, and only the size is told.

        Returns:
            None: no message came in time.

        Raises:
            ChannelCorrupt, ClosedError: as of Reader.get.
        """
        while True:
            view = self._view(timeout)
            if view is None:
                return None
            position, writer = view.position, view.writer
            # Where the count begins, also if this message is overwritten before it is copied.
            expected = self._next.setdefault(writer, (position - view.lost) % POSITIONS)
            try:
                with view:
                    data = bytes(view) if copied else b""
            except Overtaken:
                continue  # the next one tells how many were lost
            lost = (position - expected) % POSITIONS
            self._next[writer] = (position + 1) % POSITIONS
            self.lost += lost
            return Seen(data, view.size, writer, position, view.time, lost)

    def _view(self, timeout: float | None) -> View | None:
        until = math.inf if timeout is None else time.monotonic() + timeout
        while (view := self._waited(0)) is None:
            now = time.monotonic()
            if now >= min(until, self._awake):
                view = self._waited(None if timeout is None else max(until - now, 0))
                break
            time.sleep(min(_PAUSE, until - now))
        if view is not None:
            self._awake = time.monotonic() + _AWAKE
        return view

    def _waited(self, timeout: float | None) -> View | None:
        if isinstance(self._reader, ValueReader):
            if self._first:
                self._first = False
                if (view := self._reader.view()) is not None:
                    return view
            if self._reader.wait_changed(timeout) is None:
                return None
            return self._reader.view()
        return self._reader.view(timeout)

    def close(self) -> None:
        """Free the reader's slot; may be called twice."""
        self._reader.close()

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def way_of(found: Messages) -> Literal["overwrite", "discard"]:
    """Return how a reader of the channel overflows that slows no writer.

    Raises:
        ChannelTypeError: all readers of the channel block its writers.
    """
    if "overwrite" in found.overflow or found._membership.readonly:
        return "overwrite"
    if "discard" in found.overflow:
        return "discard"
    raise ChannelTypeError(
        f"channel {found.name!r} lets its readers only block, so that watching would slow its"
        " writers: create it with overflow=('block', 'overwrite'), or on a host use --readonly"
    )
