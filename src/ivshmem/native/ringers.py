"""Internal: threads that ring, in a process that cannot leave a ring to the kernel.

Without asynchronous I/O (see Signaller in descriptors.pyx) only write(2) rings, and that waits if a
hostile peer has filled the eventfd's counter and cleared O_NONBLOCK. A look before the write does
not help: the peer can do so in between. So another thread writes, and may wait as long as it must.

Knows: threads, and how long a caller waits for one. Does not know: what it calls.
"""

from __future__ import annotations

import _thread
import os
from collections import deque
from collections.abc import Callable

# A counter that is full is not rung at all, so that each thread needs a peer that fills a counter
# in the microsecond before the write. So many at once are an attack; further rings are then lost.
MOST = 64
# A write takes a microsecond, but on a busy machine the thread must wait for its turn. Seconds.
PATIENCE = 0.01


class Ringer:
    """What a thread sleeps on, and what it is to do next."""

    def __init__(self) -> None:
        self.sleep = _thread.allocate_lock()
        self.sleep.acquire()
        self.work: tuple[Callable[[int], object], int, _thread.LockType] | None = None


class Ringers:
    """Threads of which each rings for one caller at a time. They end with the process.

    A signal handler may ring while it interrupts a ring: Python code holds no lock here. A ring
    neither imports nor opens anything: perhaps no descriptor is left.
    """

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.started = 0
        self._idle: deque[Ringer] = deque()

    def ring(self, write: Callable[[int], object], fd: int) -> bool:
        """Have a thread call `write(fd)`. Return when it has, or after 10 ms.

        Returns:
            False if no thread could be started: then `write` is never called.
        """
        try:
            ringer = self._idle.pop()
        except IndexError:
            if self.started >= MOST:
                return True  # lost
            ringer = Ringer()
            try:
                self.started += 1
                _thread.start_new_thread(self._serve, (ringer,))
            except RuntimeError:  # no memory, RLIMIT_NPROC, or the interpreter ends
                self.started -= 1
                return False
        done = _thread.allocate_lock()
        done.acquire()
        ringer.work = write, fd, done
        ringer.sleep.release()
        done.acquire(timeout=PATIENCE)
        return True

    def _serve(self, ringer: Ringer) -> None:
        while True:
            ringer.sleep.acquire()
            assert ringer.work is not None
            write, fd, done = ringer.work
            ringer.work = None  # what was rung need not live until the next ring
            write(fd)
            del write
            self._idle.append(ringer)  # the caller may ring again at once
            done.release()


_shared: Ringers | None = None


def ring(write: Callable[[int], object], fd: int) -> bool:
    """Do what Ringers.ring does, by the process's own: a fork leaves threads behind."""
    global _shared
    if _shared is None or _shared.pid != os.getpid():
        _shared = Ringers()
    return _shared.ring(write, fd)
