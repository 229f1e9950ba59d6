"""Which processes have a file open or listen on a socket, with their command lines.

Knows: command lines and sockets in /proc. Does not know: what the file or socket is for. Root sees
all processes, other users their own.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from ..system import processes
from ..text import command, plain

PROC = Path("/proc")
_LISTENS = 0x10000  # the flag of a socket that listens, __SO_ACCEPTCON
_LINE = re.compile(
    r"[0-9A-Fa-f]+: [0-9A-F]{8} [0-9A-F]{8} (?P<flags>[0-9A-F]{8}) [0-9A-F]{4} [0-9A-F]{2}"
    r" +(?P<inode>[0-9]+) (?P<path>.*)"
)
_MOST_BYTES = 4096  # of a command line
_MOST_CHARACTERS = 60  # of them are shown


class FoundProcess(NamedTuple):
    """A process, and the command line that it was started with."""

    pid: int
    arguments: list[str]

    def __str__(self) -> str:
        return f"pid {self.pid} ({plain(command(self.arguments), _MOST_CHARACTERS)})"


def processes_with_file(path: Path) -> list[FoundProcess]:
    """Return the processes that have the file at `path` open."""
    return _with_link(str(path))


def processes_listening(path: str) -> list[FoundProcess]:
    """Return the processes that listen on the Unix socket bound to `path`.

    A claim, not a proof: the kernel writes paths into its list as they are, and a path can have a
    newline in it, so a process that binds such a path writes lines of that list. So a socket with
    more than one line is ignored.
    """
    text = (PROC / "net/unix").read_bytes().decode(errors="surrogateescape")
    found = [match for line in text.split("\n")[1:] if (match := _LINE.fullmatch(line))]
    lines = Counter(match["inode"] for match in found)
    links = {
        f"socket:[{match['inode']}]"
        for match in found
        if match["path"] == path
        and int(match["flags"], 16) & _LISTENS
        and lines[match["inode"]] == 1
    }
    return [process for link in sorted(links) for process in _with_link(link)]


def _with_link(link: str) -> list[FoundProcess]:
    found = []
    for pid in processes.pids_with_open(link):
        with (
            contextlib.suppress(OSError),  # it has ended since
            open(PROC / str(pid) / "cmdline", "rb") as file,
        ):
            words = os.fsdecode(file.read(_MOST_BYTES)).removesuffix("\0").split("\0")
            found.append(FoundProcess(pid, words))
    return found
