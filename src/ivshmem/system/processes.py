"""Which processes have a file open.

Knows: /proc. Does not know: what the file is. Root sees all processes, others their own.
"""

from __future__ import annotations

import contextlib
import os


def of(link: str | os.PathLike[str]) -> list[int]:
    """The ids of the processes with a descriptor that leads there, in ascending order.

    Args:
        link: what the kernel writes at /proc/PID/fd/N: a path, "PATH (deleted)", "socket:[INODE]".
    """
    wanted = os.fspath(link)
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # the process has ended, or is another user's
            if any(
                _leads_to(f"/proc/{pid}/fd/{fd}", wanted) for fd in os.listdir(f"/proc/{pid}/fd")
            ):
                found.append(int(pid))
    return sorted(found)


def named(pids: list[int]) -> str:
    """Those processes, as a message names them."""
    if not pids:
        return "a process that cannot be seen from here"
    return f"process {' and '.join(map(str, pids))}"


def _leads_to(descriptor: str, wanted: str) -> bool:
    with contextlib.suppress(OSError):  # closed since it was listed
        return os.readlink(descriptor) == wanted
    return False
