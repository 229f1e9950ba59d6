"""Pid files: one that a server holds, locked, as long as it runs.

Knows: which files may be written, which process has locked one. Does not know: what it does.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time

from ..native import descriptors
from ..system import new_files, safe_files
from .run import one_line

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_PATIENCE = 5.0  # seconds that a server which was taken over from may take to end


@contextlib.contextmanager
def held(path: str | None, patience: float = 0.0) -> Iterator[None]:
    """Hold a locked file with this process's id while the block runs; None: hold none.

    An existing file is used only if root or we own it and it has one name: another user could have
    put a precious file here, or any number into it. A device or a pipe, such as /dev/null or
    /dev/stdout, only gets the id written.

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


def _held(place: safe_files.SafePlace, line: bytes, give_up: float) -> descriptors.FdArray:
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


def _made(place: safe_files.SafePlace, line: bytes) -> descriptors.FdArray:
    """A new file, which is locked before others can open it."""
    with new_files.NewFile(place, os.O_RDWR, 0o644) as draft:
        _write(place, draft.file, line)
        draft.publish(keep_lock=True)
        return draft.file


def _write(place: safe_files.SafePlace, file: descriptors.FdArray, line: bytes) -> None:
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


def _removed(place: safe_files.SafePlace, file: descriptors.FdArray) -> None:
    with contextlib.suppress(OSError):
        place.remove(file[0])


@contextlib.contextmanager
def held_by_server(
    path: str | None, tell: Callable[[str], object], *, is_successor: bool
) -> Iterator[None]:
    """The same for a server.

    Args:
        tell: what to do with a line for the log.
        is_successor: there are peers already, so the server runs without a pid file if it must.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(held(path, _PATIENCE if is_successor else 0.0))
        except OSError as error:
            if not is_successor:
                raise
            tell(f"no pid file: {one_line(error)}")
        yield
