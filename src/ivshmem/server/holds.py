"""Which peers are sent no messages for now, and until when.

Knows: who has asked for that, and for how long. Does not know: how a peer is sent nothing (the
roster does), what wakes the loop at a deadline.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator


class MessageHold:
    """Why one peer is sent nothing, and for how long.

    Each asker names a time. The hold ends when the last of these times is over.

    Attributes:
        linger: the longest time that was asked for, in seconds; inf: no limit.
    """

    __slots__ = ("_askers", "_end", "linger")

    def __init__(self) -> None:
        self.linger = 0.0
        self._askers: dict[object, float] = {}  # those who are there, and their times
        self._end = 0.0  # when the times of the others are over, by time.monotonic()

    @property
    def deadline(self) -> float | None:
        """When it ends by itself, by time.monotonic(); None: that is not known, or never."""
        return None if self._askers or self._end == math.inf else self._end

    def ask(self, asker: object | None, linger: float) -> None:
        """Hold for at least `linger` seconds: from now on, or from when `asker` is gone."""
        self.linger = max(self.linger, linger)
        if asker is None:
            self._count_down(linger)
        else:
            self._askers[asker] = linger

    def asker_is_gone(self, asker: object) -> None:
        """Let the time of this asker begin."""
        if asker in self._askers:
            self._count_down(self._askers.pop(asker))

    def _count_down(self, linger: float) -> None:
        self._end = max(self._end, time.monotonic() + linger)


class MessageHolds(dict[int, MessageHold]):
    """The holds by the peers' serial numbers."""

    def asker_is_gone(self, asker: object) -> None:
        """Let the time begin of each hold that only this asker wants."""
        for hold in self.values():
            hold.asker_is_gone(asker)

    def seconds_left(self) -> float:
        """Seconds until the first hold ends, at least 0.001; 0: none is known to end."""
        deadlines = [each.deadline for each in self.values() if each.deadline is not None]
        return max(min(deadlines) - time.monotonic(), 0.001) if deadlines else 0

    def expired(self) -> Iterator[tuple[int, MessageHold]]:
        """Yield the holds whose time is over; they may be removed in between."""
        now = time.monotonic()
        for serial, hold in list(self.items()):
            if hold.deadline is not None and hold.deadline <= now:
                yield serial, hold


def or_none(linger: float) -> float | None:
    """A time as the journal has it: None stands for no limit."""
    return None if linger == math.inf else linger
