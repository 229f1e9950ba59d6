"""A small parent that keeps a server's descriptors: when the server is killed, a child goes on.

Knows: processes that share their descriptors, death by signals. Does not know: what a server does.

Invariants:
1. Parent and child have the same table of descriptors (clone(2), CLONE_FILES), so that nothing is
   closed when one of them dies, and nothing has to be handed over.
2. The parent has one thread, opens nothing, and does nothing but wait for its child.
3. A child that loses its parent can become one: it starts its program anew in its own place, where
   it finds all it had.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import NoReturn

from . import _fds
from .errors import IvshmemError
from .plain import paragraph

_log = logging.getLogger("ivshmem.server")

# Successors in so many seconds, after which each next one waits a second: something is wrong then
# that will not pass by trying again.
_MANY, _IN_SECONDS = 100, 5.0

_VARIABLE = "IVSHMEM_JOURNAL"

_AGAIN = 75  # the exit status of a child that wants another to go on (EX_TEMPFAIL of sysexits.h)


def say(text: str) -> None:
    """Write a line to stderr if somebody reads there: who waits for that, or dies of it, keeps
    nothing.
    """
    poll = select.poll()
    poll.register(2, select.POLLOUT)
    with contextlib.suppress(OSError):
        if any(events == select.POLLOUT for _, events in poll.poll(0)):
            os.write(2, paragraph(text).encode()[: select.PIPE_BUF - 1] + b"\n")


def keep(
    run: Callable[[bool], int],
    ending: Iterable[signal.Signals],
    *,
    again: bool = False,
    tell: Callable[[str], object] = say,
) -> int:
    """Call `run(again)` in a child; when a signal kills that, `run(True)` in another; and so on.

    A child that was told to go on, and failed to, is followed by another, too, and one that failed
    in `left_to_another`.

    Call it in a process with one thread.

    Args:
        run: what the child does; its result is the child's exit status. It may find out with
            `os.getppid()` whether the parent is still there.
        ending: signals that are blocked; those that come to the parent are sent on to the child.
        again: what the first child is told.
        tell: what to do with a line for the log; it may not wait.

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
        status, ended = _wait(child, wanted)
        if os.WIFSIGNALED(status):
            what = f"died of {signal.Signals(os.WTERMSIG(status)).name}"
        elif not ended and (os.WEXITSTATUS(status) == _AGAIN or (again and status)):
            # What it could not do, for want of memory perhaps, may be possible in a while; to end
            # here would be the end of what is kept.
            what = f"ended with status {os.WEXITSTATUS(status)}"
            time.sleep(1.0)
        else:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            return os.WEXITSTATUS(status)
        tell(f"the server (pid {child}) {what}: another goes on")
        again = True
        deaths = [*deaths[-_MANY:], time.monotonic()]
        if len(deaths) > _MANY and deaths[-1] - deaths[0] < _IN_SECONDS:
            time.sleep(1.0)


def _end_with(run: Callable[[bool], int], again: bool) -> None:
    status = 1
    try:
        status = run(again)
    finally:
        _flush()
        os._exit(status)  # not through the frames of the parent, whose clean-up is not ours


@contextlib.contextmanager
def left_to_another(tell: Callable[[str], object] = say) -> Iterator[None]:
    """In a child: if the block fails, end at once, with nothing closed, and another goes on."""
    try:
        yield
    except Exception as error:
        known = isinstance(error, IvshmemError | OSError | ValueError)
        text = traceback.format_exception_only(error) if known else traceback.format_exc()
        tell(f"pid {os.getpid()} cannot go on: {''.join(text).rstrip()}")
        os._exit(_AGAIN)


def _wait(child: int, wanted: set[signal.Signals]) -> tuple[int, bool]:
    """Send a child the signals that come, until it ends: its status, whether it was told to."""
    ended = False
    while True:
        number = signal.sigwait(wanted)
        if number == signal.SIGCHLD:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                return status, ended
        else:
            ended = ended or number != signal.SIGHUP  # which may ask for something else
            os.kill(child, number)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


def start_anew(fds: Iterable[int], journal: int) -> NoReturn:
    """Run this program from its beginning in this process, which lost its parent.

    Args:
        fds: of those that it needs, all others are closed.
        journal: the one by which it finds the others; `inherited` returns it there.

    Raises:
        OSError: as of execve(2), if the interpreter has been removed; then all is as it was.
    """
    needed = (journal, *fds)
    before = [
        (number, signal.signal(number, signal.SIG_DFL))
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    ]
    try:
        for fd in needed:
            os.set_inheritable(fd, True)
        _flush()
        environment = {**os.environ, _VARIABLE: str(journal)}
        os.execve(sys.executable, sys.orig_argv, environment)  # noqa: S606
    finally:
        for fd in needed:
            os.set_inheritable(fd, False)
        for number, handler in before:
            signal.signal(number, handler)


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
