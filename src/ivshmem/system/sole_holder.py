"""Whether this process alone has a file open or mapped.

Knows: leases of fcntl(2). Does not know: what the file holds.

The kernel gives a write lease only if no other open file leads to the same inode. A mapping, and a
descriptor that was sent to another process, keep the file open from which they came. So a lease
proves what a search in /proc cannot: other users' processes count, and processes in other PID
namespaces.
"""

from __future__ import annotations

import contextlib
import fcntl
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def alone_with(fd: int) -> Iterator[bool]:
    """Run a block, and tell it whether no other process has the file of `fd`, open or mapped.

    If so, another process that opens the file waits until the block has ended: keep it short. False
    also means that the kernel does not tell: the file is another user's, an anonymous one, or in a
    file system without leases.
    """
    try:
        # When a process opens the file the kernel sends a signal: not SIGIO, which would end this
        # process, but one that is ignored by default.
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError:
        yield False
        return
    try:
        yield True
    finally:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
