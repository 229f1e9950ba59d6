"""Lines of the log that may come ten times a second, each at most once a minute.

Knows: when which kind of line was written last. Does not know: what is wrong, where lines go.
"""

from __future__ import annotations

import time

_SECONDS = 60.0
_KINDS = 1000  # of which is remembered when they were last written


class Complaints:
    """Tells which complaints are due."""

    def __init__(self) -> None:
        self._last: dict[str, float] = {}  # by kind, by time.monotonic()

    def is_due(self, kind: str) -> bool:
        """Whether a complaint of this kind is to be written now; then it counts as written."""
        now = time.monotonic()
        last = self._last.get(kind)
        if last is not None and now <= last + _SECONDS:
            return False
        if len(self._last) > _KINDS:
            self._last.clear()
        self._last[kind] = now
        return True
