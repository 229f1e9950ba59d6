"""Pid files, and going into the background.

Knows: processes. Does not know: what they do there.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import signal
import stat
import time

from ..native import descriptors
from ..system import new_files, safe_files
from .run import one_line

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import NoReturn, TypeAlias

    # What `in_background` hands over, to be called when all is set up.
    Ready: TypeAlias = Callable[[], None]

# SIGHUP: the terminal is closed.
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

_PATIENCE = 5.0  # seconds that a server which was taken over from may take to end


@contextlib.contextmanager
def pid_file(path: str | None, patience: float = 0.0) -> Iterator[None]:
    """Hold a locked file with this process's id while the block runs; None: hold none.

    A file that is there is used only if it is root's or ours and has no second name: another user
    could have put a file here that is precious, or any number into it. To a device or a pipe, such
    as /dev/null or /dev/stdout, the id is written, and that is all.

    Args:
        patience: seconds in which another process that holds it may end.

    Raises:
        OSError: EEXIST when another process holds it; it is left alone then. PermissionError, it is
            another user's or has several hard links.
    """
    if path is None:
        yield
        return
    line = f"{os.getpid()}\n".encode()
    with contextlib.ExitStack() as undo:
        place = undo.enter_context(safe_files.find(path))
        file = _held(place, line, time.monotonic() + patience)
        undo.callback(file.close)
        if stat.S_ISREG(os.fstat(file[0]).st_mode):
            undo.callback(_removed, place, file)
        yield


def _held(place: safe_files.Place, line: bytes, give_up: float) -> descriptors.FdArray:
    """The file at a place, with the line in it, and locked; made if it is not there."""
    while True:
        try:
            file = place.open(os.O_RDWR, lone=True, streams=True)
        except FileNotFoundError:
            with contextlib.suppress(FileExistsError):  # another process was quicker
                return _made(place, line)
            continue
        with safe_files.closed_on_error(file):
            if not stat.S_ISREG(os.fstat(file[0]).st_mode):
                _write(place, file, line)
                return file
            try:
                fcntl.flock(file[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(file[0], 20, 0).decode(errors="replace").strip()
                if _is_locked_by_reader(file[0], holder):
                    place.remove(file[0])
                    file.close()
                    continue
                if time.monotonic() >= give_up:
                    raise FileExistsError(
                        errno.EEXIST,
                        f"a server with this pid file runs already (pid {holder}): stop it, or"
                        " choose another pid file",
                        place.path,
                    ) from None
                file.close()
                time.sleep(0.01)
                continue
            if place.leads_to(file[0]):
                os.ftruncate(file[0], 0)
                _write(place, file, line)
                return file
        file.close()  # removed by its last holder between our open and our lock


def _made(place: safe_files.Place, line: bytes) -> descriptors.FdArray:
    """A new file, which is locked before others can open it."""
    with new_files.NewFile(place, os.O_RDWR, 0o644) as draft:
        _write(place, draft.file, line)
        draft.publish(keep_lock=True)
        return draft.file


def _write(place: safe_files.Place, file: descriptors.FdArray, line: bytes) -> None:
    try:
        os.write(file[0], line)
    except OSError as error:
        raise OSError(
            error.errno,
            f"the pid cannot be written here ({error.strerror}): choose another path",
            place.path,
        ) from None


def _is_locked_by_reader(fd: int, holder: str) -> bool:
    """Whether it is locked, and not by a server.

    flock(2) needs no right to write, and everybody may read a pid file. A server's lock belongs to
    the process that the file names, which is root's or ours; proc_locks(5).
    """
    found = os.fstat(fd)
    # Some file systems have other device numbers here (btrfs): then nothing is found.
    file = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    with open("/proc/locks") as lines:
        locks = [line.split() for line in lines]
    pids = {words[4] for words in locks if words[1] == "FLOCK" and words[5] == file}
    return bool(pids) and all(pid != holder and _is_strange(pid) for pid in pids)


def _is_strange(pid: str) -> bool:
    """Whether a process is of a user other than root and ours; False if it cannot be told."""
    try:
        with open(f"/proc/{pid}/status") as status:
            users = next(line.split()[1:] for line in status if line.startswith("Uid:"))
    except (OSError, StopIteration):
        return False
    return not {0, os.geteuid()} & {int(user) for user in users}


def _removed(place: safe_files.Place, file: descriptors.FdArray) -> None:
    with contextlib.suppress(OSError):
        place.remove(file[0])


@contextlib.contextmanager
def pid_file_of(
    path: str | None, tell: Callable[[str], object], *, going_on: bool
) -> Iterator[None]:
    """The same for a server.

    Args:
        tell: what to do with a line for the log.
        going_on: there are peers already, so the server does without a pid file if it must.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(pid_file(path, _PATIENCE if going_on else 0.0))
        except OSError as error:
            if not going_on:
                raise
            tell(f"no pid file: {one_line(error)}")
        yield


def raise_fd_limit() -> None:
    """A server holds a socket and its vectors for each peer; the usual 1,024 is soon too few."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@contextlib.contextmanager
def signals_held(*, for_good: bool = False) -> Iterator[None]:
    """Let the signals that end a server wait while the block runs.

    Args:
        for_good: ignore them afterwards if they were let come in the block: nothing is left to do
            then that could wait. Otherwise they do what they did before, so that they end a
            process whose results nobody reads.
    """
    handlers = [(number, signal.getsignal(number)) for number in ENDING]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        if not for_good:
            for number, handler in handlers:
                signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def ended_by_signals(
    stop: Callable[[], object], reload: Callable[[], object] | None = None
) -> Iterator[None]:
    """Inside `signals_held`: let them come, and call `stop`, while the block runs.

    With `reload`, SIGHUP calls that instead.
    """

    def act(number: int, _frame: object) -> None:
        if number == signal.SIGHUP and reload is not None:
            reload()
        else:
            stop()

    with _handled(act):
        yield


def has_terminal() -> bool:
    """Whether SIGHUP means that the terminal is gone, and not that somebody asks for something."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


@contextlib.contextmanager
def ended_by_exceptions() -> Iterator[None]:
    """Inside `signals_held`: let them come while the block runs, and leave it by an exception."""
    with _handled(lambda number, _frame: _leave(number)):
        yield


@contextlib.contextmanager
def ended_at_steps() -> Iterator[Callable[[], None]]:
    """The same, but the block is left only where it calls what it is given, or by a second signal.

    For a block that makes things which an exception in the wrong moment would leave behind.
    """
    came: list[int] = []

    def note(number: int, _frame: object) -> None:
        if came:
            _leave(number)
        came.append(number)

    def step() -> None:
        if came:
            _leave(came[0])

    with _handled(note):
        yield step


def _leave(number: int) -> NoReturn:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)  # as shells report it


@contextlib.contextmanager
def _handled(handler: Callable[[int, object], object]) -> Iterator[None]:
    """Let the signals that end a server come, to `handler`, while the block runs."""
    for number in ENDING:
        signal.signal(number, handler)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
        for number in ENDING:
            signal.signal(number, signal.SIG_IGN)  # the end has begun


def in_background(run: Callable[[Ready], int], *, silent: bool) -> int:
    """Run `run(ready)` in a daemon; return in this process when it calls `ready()` or ends.

    What the daemon prints to stderr before it is ready is seen, its status returned. Afterwards it
    has no terminal, and with `silent` nothing to print to. Signals that end a server and come to
    this process before that are sent on to the daemon.
    """
    reader, writer = os.pipe()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)  # until both know what to do
    child = os.fork()
    if child:
        os.close(writer)
        try:
            with _handled(lambda number, _frame: os.kill(child, number)):
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
        with contextlib.suppress(OSError):  # nobody waits any more
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
