"""Which processes have a file open, and what this process has.

Knows: /proc. Does not know: what the file is. Root sees all processes, others their own.
"""

from __future__ import annotations

import contextlib
import functools
import os
import resource


def pids_with_open(link: str | os.PathLike[str]) -> list[int]:
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


def described(pids: list[int]) -> str:
    """Those processes, as a message names them."""
    if not pids:
        return "a process that cannot be seen from here"
    return f"process {' and '.join(map(str, pids))}"


def _leads_to(descriptor: str, wanted: str) -> bool:
    with contextlib.suppress(OSError):  # closed since it was listed
        return os.readlink(descriptor) == wanted
    return False


@functools.cache
def pid_namespace() -> int:
    """The inode of this process's pid namespace, 0 if that is not known."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def resident_bytes() -> int:
    try:
        with open("/proc/self/statm") as statm:
            pages = int(statm.read().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * resource.getpagesize()


def open_fds() -> int:
    try:
        return len(os.listdir("/proc/self/fd")) - 1  # the one that lists
    except OSError:
        return 0


def fd_limit() -> int | None:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return None if limit == resource.RLIM_INFINITY else limit
