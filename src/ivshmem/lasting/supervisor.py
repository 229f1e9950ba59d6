"""A small parent that shares a server's descriptors: when a signal kills the server, the parent
starts another, which continues.

Knows: processes that share their descriptors, death by signals. Does not know: what a server does.

Invariants:
1. Parent and child have the same table of descriptors (clone(2), CLONE_FILES), so that nothing is
   closed when one of them dies, and nothing has to be handed over.
2. The parent has one thread, opens nothing, writes nothing, and does nothing but wait for its
   child. Whatever a child's status or a signal's number is, nothing in its loop raises.
3. A child that loses its parent can become one: it starts its program anew in its own place, where
   it finds all it had.
4. Only a child judges whether another child is of use: it ends with the status `AGAIN` if so.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import stat
import sys
import time

from ..native import descriptors
from ..text import paragraph

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

# Successors in so many seconds, after which each next one waits a second: something is wrong then
# that will not pass by trying again.
_MANY, _IN_SECONDS = 100, 5.0

_VARIABLE = "IVSHMEM_JOURNAL"
_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

AGAIN = 75  # the exit status of a child that wants a successor (EX_TEMPFAIL of sysexits.h)


def say(text: str) -> None:
    """Write a line to stderr if a reader takes it at once; never wait, never raise."""
    data = paragraph(text).encode(errors="replace")[: select.PIPE_BUF - 1] + b"\n"
    with contextlib.suppress(OSError):
        mode = os.fstat(2).st_mode
        if stat.S_ISREG(mode):
            os.write(2, data)
        elif stat.S_ISSOCK(mode) or not _write_at_once(data):
            _write_if_ready(data)


def _write_at_once(data: bytes) -> bool:
    """Write to the terminal or pipe at stderr without blocking; False: it cannot be opened.

    A terminal that was stopped with Ctrl-S can take a part of a line and then block the writer,
    whatever poll(2) has said. O_NONBLOCK belongs to the open file description, which others share,
    so this opens another one.
    """
    flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        fd = os.open("/proc/self/fd/2", flags)
    except OSError:
        return False  # another user's terminal, for instance
    try:
        os.write(fd, data)
    finally:
        os.close(fd)
    return True


def _write_if_ready(data: bytes) -> None:
    poll = select.poll()
    poll.register(2, select.POLLOUT)
    if any(events == select.POLLOUT for _, events in poll.poll(0)):
        os.write(2, data)


def supervise(
    run: Callable[[list[str]], int], ending: Iterable[signal.Signals], deaths: Iterable[str] = ()
) -> int:
    """Call `run` in a child; when a signal kills the child, call it in another; and so on.

    A child that ends with the status `AGAIN` is followed by another, too, after a second. Call this
    in a process with one thread.

    Args:
        run: what the child does; its result is the child's exit status. Its argument says what
            became of earlier children, the last one at the end; only the last hundred are kept.
            `run` can find out with `os.getppid()` whether the parent is still there.
        ending: signals that are blocked; the parent sends those that come to it on to the child.
            If a signal kills the child before it has obeyed, the next child gets the last of them.
        deaths: what the first child is told.

    Returns:
        The exit status of the child that ended by itself.

    Raises:
        OSError: the first child could not be made.
    """
    wanted = {*ending, signal.SIGCHLD}
    # A process that was started with SIGCHLD ignored would never hear of its child's end.
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    told = list(deaths)
    times: list[float] = []
    owed = 0  # the last signal that no child has obeyed yet
    try:
        while True:
            try:
                child = descriptors.fork_sharing_files()
            except (OSError, MemoryError):
                if not told:
                    raise
                owed = _pause(wanted) or owed
                continue
            if child == 0:
                signal.signal(signal.SIGCHLD, handler)
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
                _end_with(run, told)
            status, owed = _wait(child, wanted, owed)
            if os.WIFSIGNALED(status):
                end = f"died of {name_of(os.WTERMSIG(status))}"
            elif os.WEXITSTATUS(status) == AGAIN and owed in (0, signal.SIGHUP):
                # What it could not do, for want of memory perhaps, may be possible in a while.
                end = f"ended with status {AGAIN}"
                owed = _pause(wanted) or owed
            else:
                return os.WEXITSTATUS(status)
            told = [*told[1 - _MANY :], f"the server (pid {child}) {end}"]
            times = [*times[-_MANY:], time.monotonic()]
            if len(times) > _MANY and times[-1] - times[0] < _IN_SECONDS:
                owed = _pause(wanted) or owed
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        signal.signal(signal.SIGCHLD, handler)


def name_of(number: int) -> str:
    """What a signal is called; also a real-time one, most of which have no name in `signal`."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number} (SIGRTMIN+{number - signal.SIGRTMIN})"


def _end_with(run: Callable[[list[str]], int], told: list[str]) -> None:
    status = 1
    try:
        status = run(told)
    finally:
        # Not through the frames of the parent, whose clean-up is not ours. Nothing is flushed,
        # since that could wait for a reader: what a child prints, it writes at once.
        os._exit(status)


@contextlib.contextmanager
def left_to_another(tell: Callable[[str], object] = say) -> Iterator[None]:
    """In a child: if the block fails, end at once and close nothing, so that another continues."""
    try:
        yield
    except Exception as error:
        try:
            tell(f"pid {os.getpid()} cannot continue: {_described(error)}")
        finally:
            os._exit(AGAIN)


def _described(error: Exception) -> str:
    import traceback  # here, since the parent never needs it

    known = isinstance(error, OSError | ValueError) or "ivshmem" in type(error).__module__
    text = traceback.format_exception_only(error) if known else traceback.format_exception(error)
    return "".join(text).rstrip()


def _pause(wanted: set[signal.Signals]) -> int:
    """Let a second pass; the last signal that came then, 0 for none."""
    came = 0
    until = time.monotonic() + 1.0
    while (left := until - time.monotonic()) > 0:
        info = signal.sigtimedwait(wanted, left)
        if info is not None and info.si_signo != signal.SIGCHLD:
            came = info.si_signo
    return came


def _wait(child: int, wanted: set[signal.Signals], owed: int) -> tuple[int, int]:
    """Send a child the signals that come, until it ends: its status, and the last of them.

    `owed` is sent first.
    """
    number = owed
    while True:
        if number and number != signal.SIGCHLD:
            owed = number
            with contextlib.suppress(OSError):
                os.kill(child, number)
        try:
            pid, status = os.waitpid(child, os.WNOHANG)
        except OSError:
            return AGAIN << 8, owed  # ECHILD: how it ended cannot be known
        if pid:
            return status, owed
        number = signal.sigwait(wanted)


def start_anew(fds: Iterable[int], journal: int, is_ending: Callable[[], bool]) -> None:
    """Run this program from its beginning in this process, which lost its parent.

    Args:
        fds: of those that it needs, all others are closed.
        journal: the one by which it finds the others; `inherited` returns it there.
        is_ending: whether a signal has told this process to end. Then nothing is started, and this
            returns. A signal that comes later is obeyed by the program that is started.

    Raises:
        OSError: as of execve(2), if the interpreter has been removed; then all is as it was.
    """
    needed = (journal, *fds)
    # A signal to end must not kill the program before it can close anything. So it waits, also over
    # execve, until `supervise` takes it.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    before = [(number, signal.getsignal(number)) for number in _ENDING]
    try:
        if is_ending():
            return
        for number in _ENDING:
            signal.signal(number, signal.SIG_DFL)
        for fd in needed:
            os.set_inheritable(fd, True)
        environment = {**os.environ, _VARIABLE: str(journal)}
        os.execve(sys.executable, sys.orig_argv, environment)  # noqa: S606
    finally:
        for fd in needed:
            os.set_inheritable(fd, False)
        for number, handler in before:
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def inherited() -> tuple[int, set[int]] | None:
    """The journal and the other descriptors that `start_anew` was given, if it was called."""
    value = os.environ.pop(_VARIABLE, None)
    if value is None:
        return None
    fds = {fd for fd in strays(()) if fd > 2 and os.get_inheritable(fd)}
    for fd in fds:
        os.set_inheritable(fd, False)
    return int(value), fds - {int(value)}


def is_heir() -> bool:
    """Whether `start_anew` has started this program; until `inherited` is called."""
    return _VARIABLE in os.environ


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
