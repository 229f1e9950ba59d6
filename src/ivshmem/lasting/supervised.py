"""What a supervised process has of its supervisor.

Knows: a page that all of its children share, descriptors in reserve. Does not know: what is served.
"""

from __future__ import annotations

import contextlib
import mmap
import os

_RESERVE = range(8, 40, 4)  # where the numbers of descriptors stand in the shared page

# Variables by which a service manager says which process it means: this one, thus its children.
_MEANT = ("LISTEN_PID", "WATCHDOG_PID")


class Supervision:
    """What a child has of its parent.

    Attributes:
        fd: of the journal of all children, a file in memory.
        parent: its pid.
        known: descriptors that it had before there was a child; all others are children's.
        heir: this parent took the place of one that was killed.
    """

    def __init__(self, fd: int, known: set[int], *, heir: bool) -> None:
        self.fd = fd
        self.known = known
        self.parent = os.getpid()
        self.heir = heir
        self._meant = [name for name in _MEANT if os.environ.get(name) == str(self.parent)]
        self._shared = mmap.mmap(-1, mmap.PAGESIZE)  # by all children
        if heir:
            self.announce()

    @property
    def announced(self) -> bool:
        """Whether a child has opened all that it was to open, and has said so."""
        return self._shared[0] != 0

    def announce(self) -> None:
        """Note that."""
        self._shared[0] = 1

    def reserve(self) -> None:
        """Keep a few descriptors unused, if any are left, which the next child will need."""
        with contextlib.suppress(OSError):
            for place in _RESERVE:
                fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
                self._shared[place : place + 4] = fd.to_bytes(4, "little")

    def release(self) -> None:
        """Close those of the last child."""
        for place in _RESERVE:
            fd = int.from_bytes(self._shared[place : place + 4], "little")
            self._shared[place : place + 4] = bytes(4)  # first, lest another file be closed
            if fd:
                os.close(fd)

    def become(self) -> None:
        """In a child: let what the service manager says to its parent be for the child."""
        for name in self._meant:
            os.environ[name] = str(os.getpid())
