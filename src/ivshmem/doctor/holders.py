"""Which processes have something open.

Knows: /proc. Does not know: what it is that they have open. Root sees all processes, others their
own.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")


class Holder(NamedTuple):
    """A process, and the command line that it was started with."""

    pid: int
    arguments: list[str]

    def __str__(self) -> str:
        return f"pid {self.pid} ({shlex.join(self.arguments)[:60]})"


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
                words = (place / "cmdline").read_bytes().decode(errors="replace").split("\0")
                found.append(Holder(int(place.name), words[:-1]))
    return found


def _leads_to(fd: Path, link: str) -> bool:
    with contextlib.suppress(OSError):  # closed meanwhile
        return os.readlink(fd) == link
    return False
