"""A lock on a directory or file, which leaves no file behind.

Knows: flock(2), and that it is not waited for without end. Does not know: what is locked, and why.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator

from ..native import descriptors


@contextlib.contextmanager
def locked(directory: str | os.PathLike[str], seconds: float) -> Iterator[None]:
    """Hold the lock while the block runs; continue without it if another process keeps it longer.

    Each process that can read a directory can lock it. So the worst that a process without the lock
    can meet must be the race that the lock prevents.

    Raises:
        OSError: the directory cannot be opened.
    """
    file = descriptors.FdArray()  # it owns the descriptor, whenever a signal handler raises
    try:
        file.open(os.fsdecode(directory), os.O_RDONLY | os.O_DIRECTORY)
        _wait_for(file[0], seconds)
        yield
    finally:
        file.close()


@contextlib.contextmanager
def held(fd: int, seconds: float) -> Iterator[None]:
    """The same lock, on an open file or a copy of its descriptor."""
    _wait_for(fd, seconds)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_UN)


def _wait_for(fd: int, seconds: float) -> None:
    """Lock an open file, unless somebody else keeps it locked so long."""
    give_up = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > give_up:
                return
            time.sleep(0.005)
