"""Which processes have something open.

Knows: /proc. Does not know: what it is that they have open. Root sees all processes, others their
own.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

from ..plain import command, plain

PROC = Path("/proc")
_MOST_BYTES = 4096  # of a command line
_MOST_CHARACTERS = 60  # of them are shown


class Holder(NamedTuple):
    """A process, and the command line that it was started with."""

    pid: int
    arguments: list[str]

    def __str__(self) -> str:
        return f"pid {self.pid} ({plain(command(self.arguments), _MOST_CHARACTERS)})"


def of_file(path: Path) -> list[Holder]:
    """Who has the file at `path` open."""
    return _with_link(str(path))


def of_socket(path: str) -> list[Holder]:
    """Who listens on the Unix socket bound to `path`."""
    links = {
        f"socket:[{fields[6]}]"
        for fields in (
            line.split(maxsplit=7) for line in (PROC / "net/unix").read_text().splitlines()[1:]
        )
        # the flag of a socket that listens, __SO_ACCEPTCON
        if len(fields) == 8 and fields[7] == path and int(fields[3], 16) & 0x10000
    }
    return [holder for link in sorted(links) for holder in _with_link(link)]


def _with_link(link: str) -> list[Holder]:
    found = []
    for place in sorted(PROC.glob("[0-9]*"), key=lambda place: int(place.name)):
        with contextlib.suppress(OSError):  # not ours to see, or gone meanwhile
            if any(_leads_to(fd, link) for fd in (place / "fd").iterdir()):
                with open(place / "cmdline", "rb") as file:
                    words = os.fsdecode(file.read(_MOST_BYTES)).removesuffix("\0").split("\0")
                found.append(Holder(int(place.name), words))
    return found


def _leads_to(fd: Path, link: str) -> bool:
    with contextlib.suppress(OSError):  # closed meanwhile
        return os.readlink(fd) == link
    return False
