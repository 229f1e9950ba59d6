"""The name of the guest that a QEMU runs, by its command line.

Knows: /proc, QEMU's -name. Does not know: which processes are a QEMU (programs.py), who is a peer.

A process can write what it likes into its command line: a guest's name is a claim, not a proof.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise

from ..text import NAME, plain
from .programs import is_qemu

_MOST_BYTES = 1 << 20  # of a command line
_SLACK = 2.0  # seconds by which the clocks of two files in /proc may differ


def guest_of(pid: int, since: float) -> str:
    """Return the name of the guest that a QEMU runs, which was a process already at that time.

    Args:
        since: seconds since the epoch. A process that began later only has the same number.

    Returns:
        "" if the process is not a QEMU, has no -name, or cannot be seen from here.
    """
    try:
        if _started(pid) > since + _SLACK:
            return ""
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            line = file.read(_MOST_BYTES)
    except (OSError, ValueError, IndexError):
        return ""
    # Its command line was read already, so asking the process once more costs nothing new.
    return guest_name(os.fsdecode(line).split("\0")) if is_qemu(pid, ask_process=True) else ""


def guest_name(arguments: Sequence[str]) -> str:
    """Return the name in the command line of a QEMU, printable; "" if there is none."""
    name = ""
    for option, value in pairwise(arguments):
        if option in ("-name", "--name"):
            name = _guest(value) or name
    return plain(name, NAME)


def _guest(value: str) -> str:
    """Return NAME of "guest=NAME,process=..".

    The first key may be omitted; a comma in a value is written twice.
    """
    parts = value.replace(",,", "\0").split(",")
    for number, part in enumerate(parts):
        key, equals, text = part.partition("=")
        if equals and key == "guest":
            return text.replace("\0", ",")
        if not equals and number == 0:
            return part.replace("\0", ",")
    return ""


def _started(pid: int) -> float:
    """When a process began, seconds since the epoch."""
    with open(f"/proc/{pid}/stat", errors="replace") as stat:
        ticks = int(stat.read().rpartition(")")[2].split()[19])
    with open("/proc/stat") as machine:
        for line in machine:
            if line.startswith("btime "):
                return int(line.split()[1]) + ticks / os.sysconf("SC_CLK_TCK")
    raise ValueError("no btime")
