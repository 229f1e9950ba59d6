"""Which processes have a device's file open.

Knows: /proc. Does not know: what the file is. Root sees all processes, others their own.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

PROC = Path("/proc")


def of(path: Path) -> list[int]:
    """The ids of the processes that have the file at `path` open, in ascending order."""
    found = []
    for place in PROC.glob("[0-9]*"):
        with contextlib.suppress(OSError):  # the process has ended, or is another user's
            if any(_leads_to(fd, str(path)) for fd in (place / "fd").iterdir()):
                found.append(int(place.name))
    return sorted(found)


def named(pids: list[int]) -> str:
    """Those processes, as a message names them."""
    if not pids:
        return "a process that cannot be seen from here"
    return f"process {' and '.join(map(str, pids))}"


def _leads_to(fd: Path, path: str) -> bool:
    with contextlib.suppress(OSError):  # closed since it was listed
        return os.readlink(fd) == path
    return False
