"""Writing to a descriptor that may be full, or whose reader may be gone.

Knows: write(2), how long a reader is waited for, what may be left out. Does not know: what is
written.

Invariants:
1. Nothing here writes through a buffered stream of Python's: a thread that is stuck in such a write
   holds the stream's lock, for which the interpreter waits at its exit.
2. Only threads that the exit does not wait for write to what may block.
"""

from __future__ import annotations

import contextlib
import io
import os
import threading
import time

from ..system.uncopied import Uncopied

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TextIO

_SECONDS = 1.0  # that a reader is waited for


def write_all(fd: int, text: str, end: str = "\n") -> None:
    """Write a text and its end to a descriptor; for as long as it takes.

    Raises:
        OSError: as of write(2).
    """
    data = memoryview((text + end).encode(errors="backslashreplace"))
    while data:
        try:
            data = data[os.write(fd, data) :]
        except BlockingIOError:  # another process has made it so
            time.sleep(0.05)


def show(text: str, fd: int = 1) -> None:
    """Write a text to a descriptor, and wait for its reader no longer than a second.

    Raises:
        OSError: as of write(2).
    """
    errors: list[OSError] = []

    def write() -> None:
        try:
            write_all(fd, text)
        except OSError as error:
            errors.append(error)

    thread = threading.Thread(target=write, name="ivshmem-show", daemon=True)
    thread.start()
    thread.join(_SECONDS)
    for error in errors:
        raise error


class Aside(Uncopied):
    """Writes texts to a stream's descriptor, by a thread: who gives them never waits for a reader.

    Texts that nobody can be shown, since the descriptor is broken, are lost without a word.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._changed = threading.Condition()
        self._texts: list[str] = []  # that are not written yet, in order
        self._passing = False  # whether the last of them is
        self._writes = False
        self._closed = False
        self._thread: threading.Thread | None = None

    def write(self, text: str, *, passing: bool = False) -> None:
        """Have a text written.

        Args:
            passing: the next one takes its place, if that is passing too and this one was not
                written yet.
        """
        with self._changed:
            if passing and self._passing and self._texts:
                self._texts.pop()
            self._texts.append(text)
            self._passing = passing
            self._changed.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="ivshmem-aside", daemon=True)
            self._thread.start()

    def settle(self) -> None:
        """Wait until all is written, but no longer than a second."""
        with self._changed:
            self._changed.wait_for(lambda: not (self._texts or self._writes), _SECONDS)

    def close(self) -> None:
        """Let the thread end when it has written what it has."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._writes = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._texts or self._closed)
                if not self._texts:
                    return
                text = "".join(self._texts)
                self._texts.clear()
                self._writes = True
            with contextlib.suppress(OSError, ValueError):
                self._write(text)

    def _write(self, text: str) -> None:
        try:
            fd = self._stream.fileno()
        except io.UnsupportedOperation:  # a stream in memory, which never blocks
            self._stream.write(text)
        else:
            write_all(fd, text, end="")
