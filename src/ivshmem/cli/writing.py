"""Writing to a descriptor that may be full, or whose reader may be gone.

Knows: write(2), how long a reader is waited for. Does not know: what is written.

Invariants:
1. Nothing here writes through a buffered stream of Python's: a thread that is stuck in such a write
   holds the stream's lock, for which the interpreter waits at its exit.
2. Only threads that the exit does not wait for write to what may block.
"""

from __future__ import annotations

import os
import threading
import time

_SECONDS = 1.0  # that `show` waits for a reader


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


def show(text: str, fd: int = 1, end: str = "\n") -> None:
    """Write a text to a descriptor, and wait for its reader no longer than a second.

    Raises:
        OSError: as of write(2).
    """
    errors: list[OSError] = []

    def write() -> None:
        try:
            write_all(fd, text, end)
        except OSError as error:
            errors.append(error)

    thread = threading.Thread(target=write, name="ivshmem-show", daemon=True)
    thread.start()
    thread.join(_SECONDS)
    for error in errors:
        raise error
