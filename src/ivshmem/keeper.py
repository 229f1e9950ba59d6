"""A small parent that keeps a server's descriptors: when the server is killed, a child goes on.

Knows: processes that share their descriptors, death by signals. Does not know: what a server does.

Invariants:
1. Parent and child have the same table of descriptors (clone(2), CLONE_FILES), so that nothing is
   closed when one of them dies, and nothing has to be handed over.
2. The parent has one thread, opens nothing, and does nothing but wait.
3. A child that loses its parent can become one: it starts its program anew in its own place, where
   it finds all it had.
"""

from __future__ import annotations

import logging
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable
from typing import NoReturn

from . import _fds

_log = logging.getLogger("ivshmem.server")

# Successors in so many seconds, after which each next one waits a second: something is wrong then
# that will not pass by trying again.
_MANY, _IN_SECONDS = 100, 5.0

_VARIABLE = "IVSHMEM_JOURNAL"


def keep(
    run: Callable[[bool], int], ending: Iterable[signal.Signals], *, again: bool = False
) -> int:
    """Call `run(again)` in a child; when a signal kills that, `run(True)` in another; and so on.

    A child that was told to go on, and failed to, is followed by another, too.

    Call it in a process with one thread.

    Args:
        run: what the child does; its result is the child's exit status. It may find out with
            `os.getppid()` whether the parent is still there.
        ending: signals that are blocked; those that come to the parent are sent on to the child.
        again: what the first child is told.

    Returns:
        The exit status of the child that ended by itself: the first one's, or 0.
    """
    wanted = {*ending, signal.SIGCHLD}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    deaths: list[float] = []
    while True:
        child = _fds.fork_sharing_files()
        if child == 0:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            _end_with(run, again)
        status = _wait(child, wanted)
        if os.WIFSIGNALED(status):
            what = f"died of {signal.Signals(os.WTERMSIG(status)).name}"
        elif again and os.WEXITSTATUS(status):
            # What it could not do, for want of memory perhaps, may be possible in a while; to end
            # here would be the end of what is kept.
            what = f"ended with status {os.WEXITSTATUS(status)}"
            time.sleep(1.0)
        else:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            return os.WEXITSTATUS(status)
        print(f"ivshmem: the server (pid {child}) {what}: another goes on", file=sys.stderr)
        again = True
        deaths = [*deaths[-_MANY:], time.monotonic()]
        if len(deaths) > _MANY and deaths[-1] - deaths[0] < _IN_SECONDS:
            time.sleep(1.0)


def _end_with(run: Callable[[bool], int], again: bool) -> None:
    status = 1
    try:
        status = run(again)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # not through the frames of the parent, whose clean-up is not ours


def _wait(child: int, wanted: set[signal.Signals]) -> int:
    """Wait for the child's end, and send it the signals that come."""
    while True:
        number = signal.sigwait(wanted)
        if number == signal.SIGCHLD:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                return status
        else:
            os.kill(child, number)


def start_anew(fds: Iterable[int], journal: int) -> NoReturn:
    """Run this program from its beginning in this process, which lost its parent.

    Args:
        fds: of those that it needs, all others are closed.
        journal: the one by which it finds the others; `inherited` returns it there.
    """
    for fd in (journal, *fds):
        os.set_inheritable(fd, True)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, sys.orig_argv, {**os.environ, _VARIABLE: str(journal)})  # noqa: S606


def inherited() -> tuple[int, set[int]] | None:
    """The journal and the other descriptors that `start_anew` was given, if it was called."""
    value = os.environ.pop(_VARIABLE, None)
    if value is None:
        return None
    fds = {fd for fd in strays(()) if fd > 2 and os.get_inheritable(fd)}
    for fd in fds:
        os.set_inheritable(fd, False)
    return int(value), fds - {int(value)}


def strays(known: Iterable[int]) -> list[int]:
    """Descriptors that are open beside the known ones: what a predecessor left behind."""
    try:
        with os.scandir("/proc/self/fd") as entries:
            found = [int(entry.name) for entry in entries]
    except OSError:  # EMFILE: no descriptor is left to look with
        found = list(range(resource.getrlimit(resource.RLIMIT_NOFILE)[0]))
    return [fd for fd in found if fd not in set(known) and _is_open(fd)]


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False  # the directory that was just read
    return True
