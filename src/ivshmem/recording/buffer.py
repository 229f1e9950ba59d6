"""Internal: what is read and not yet written, between threads.

Knows: how many bytes it may hold. Does not know: what they are.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Generic, TypeVar

_T = TypeVar("_T")


class Buffer(Generic[_T]):
    """A queue that is full after so many bytes, and can end.

    Args:
        most: bytes. One item always fits.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._items: deque[tuple[_T, int]] = deque()
        self._size = 0
        self._ended = False
        self._changed = threading.Condition()

    def put(self, item: _T, size: int) -> bool:
        """Add an item of so many bytes; wait while it is full. False: it has ended."""
        with self._changed:
            while self._size and self._size + size > self._most and not self._ended:
                self._changed.wait()
            if self._ended:
                return False
            self._items.append((item, size))
            self._size += size
            self._changed.notify_all()
            return True

    def get(self, timeout: float) -> _T | None:
        """Take an item; None: none came in time, or it has ended and is empty."""
        with self._changed:
            if not self._items and not self._ended:
                self._changed.wait(timeout)
            if not self._items:
                return None
            item, size = self._items.popleft()
            self._size -= size
            self._changed.notify_all()
            return item

    def end(self) -> None:
        """Let nothing more in. What is there can be taken."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def clear(self) -> int:
        """Drop what is there; return how many items that were."""
        with self._changed:
            count = len(self._items)
            self._items.clear()
            self._size = 0
            return count

    @property
    def drained(self) -> bool:
        """Whether it has ended, and everything was taken."""
        with self._changed:
            return self._ended and not self._items
