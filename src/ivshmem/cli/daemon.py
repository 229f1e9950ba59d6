"""Going into the background, and the limit of descriptors.

Knows: processes. Does not know: what they do there, pid files (pid_file.py), signals (signals.py).
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal

from . import signals

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    # What `in_background` hands over, to be called when all is set up.
    TellReady: TypeAlias = Callable[[], None]


def raise_fd_limit() -> None:
    """A server holds a socket and its vectors for each peer; the usual 1,024 is soon too few."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def in_background(run: Callable[[TellReady], int], *, silent: bool) -> int:
    """Run `run(ready)` in a daemon; return in this process when it calls `ready()` or ends.

    What the daemon prints to stderr before it is ready is seen, its status returned. Afterwards it
    has no terminal, and with `silent` nothing to print to. Signals that end a server and come to
    this process before that are sent on to the daemon.
    """
    reader, writer = os.pipe()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals.ENDING)  # until both know what to do
    child = os.fork()
    if child:
        os.close(writer)
        try:
            with signals.handled(lambda number, _frame: os.kill(child, number)):
                told = os.read(reader, 1)
            if told:
                return 0
            return status_of(os.waitpid(child, 0)[1])
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            os.close(reader)
    os.close(reader)
    os.setsid()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def ready() -> None:
        """May be called again, by another process with the same table of descriptors, too."""
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2) if silent else (0,):
            os.dup2(null, fd)
        with contextlib.suppress(OSError):  # the launcher has ended
            os.write(writer, b"1")
        os.dup2(null, writer, inheritable=False)
        os.close(null)

    status = 1
    try:
        status = run(ready)
    finally:
        os._exit(status)  # not through the frames of the parent, whose clean-up is not ours


def status_of(status: int) -> int:
    """An exit status from what wait(2) says, as shells report death by a signal."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code
