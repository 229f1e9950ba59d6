"""Processes of the command line that stop themselves at a named place, to get a signal there.

A process that stops itself with SIGSTOP gets what is sent to it when it continues, or dies there.
So a test sends a signal to a real process at an exact place in its life.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from .waiting import until

# A user has none of these; they hide what Python's buffers do at the exit of a process.
_NOT_A_USERS = ("PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE", "PYTHONHASHSEED", "PYTHONOPTIMIZE")

_CUSTOMIZE = """\
import os, signal, sys
where, note = os.environ["IVSHMEM_TEST_STOPS_AT"], os.environ["IVSHMEM_TEST_NOTE"]
file, _, name = where.partition(":")

def look(frame, event, argument):
    code = frame.f_code
    if event != "call" or code.co_name != name or not code.co_filename.endswith(file):
        return
    try:
        fd = os.open(note + ".taken", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return  # one process stops there, once
    os.close(fd)
    with open(note + ".new", "w") as out:
        out.write(str(os.getpid()))
    os.rename(note + ".new", note)
    os.kill(os.getpid(), signal.SIGSTOP)

if where:
    sys.setprofile(look)
"""


def users_environment(**more: str) -> dict[str, str]:
    """The environment of a process that a user starts."""
    kept = {key: value for key, value in os.environ.items() if key not in _NOT_A_USERS}
    return {**kept, **more}


class Stop:
    """A place where one of the processes that are started with `environment` stops, once.

    Args:
        place: "FILE:FUNCTION", for instance "service.py:open"; "": nowhere.
    """

    def __init__(self, directory: Path, place: str) -> None:
        directory.mkdir()
        (directory / "sitecustomize.py").write_text(_CUSTOMIZE)
        self._note = directory / "note"
        self.environment = users_environment(
            PYTHONPATH=str(directory),
            IVSHMEM_TEST_STOPS_AT=place,
            IVSHMEM_TEST_NOTE=str(self._note),
        )

    def reached(self) -> int:
        """Wait until a process has stopped there; its pid."""
        until(self._note.exists, "a process at the place where it stops")
        pid = int(self._note.read_text())
        until(lambda: state(pid) == "T", "a stopped process")
        return pid

    def again(self) -> None:
        """Let the next process stop there, too."""
        self._note.unlink()
        Path(f"{self._note}.taken").unlink()

    def family(self) -> set[int]:
        """All processes that live and were started with this environment."""
        return set(self._family())

    def _family(self) -> Iterator[int]:
        mark = b"IVSHMEM_TEST_NOTE=" + os.fsencode(self._note) + b"\0"
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError):
                    if mark in _environment(entry) and state(int(entry.name)) != "Z":
                        yield int(entry.name)

    def kill_all(self) -> None:
        """End whatever is left."""
        while family := self.family():
            for pid in family:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def _environment(process: Path) -> bytes:
    """Read a process's environment, also of one that is in the middle of execve(2).

    Such a process has a program, and no environment for some microseconds. One that still has none
    after so many milliseconds was started without.
    """
    for _ in range(20):
        if found := (process / "environ").read_bytes():
            return found
        os.readlink(process / "exe")  # OSError: a thread of the kernel
        time.sleep(0.001)
    return b""


def state(pid: int) -> str:
    """The letter that ps(1) shows; "": there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""
