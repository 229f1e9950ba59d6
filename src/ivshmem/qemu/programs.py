"""Whether a process is a QEMU.

Knows: what QEMU's programs are called, where /proc says what a process is.
Does not know: what anybody does with the answer.

A name is a claim, not a proof: a process that wants to be taken for a QEMU is.
"""

from __future__ import annotations

import os

# How the names of QEMU's programs begin: qemu-system-x86_64, qemu-kvm, kvm.
NAMES = ("qemu", "kvm")

_MOST_BYTES = 4096  # of a command line's first word


def is_qemu(pid: int, process: str = "?", *, ask_process: bool = False) -> bool | None:
    """Whether a process is a QEMU, as far as can be known; None: nobody can know.

    One whose user gave it another name (`-name x,process=web1`) is known by its program. The
    program of another user's process is hidden from all but root; its command line is not.

    Args:
        process: the name that it had when it was seen; "?" if nobody has seen it.
        ask_process: look at its command line, too. That is in the process's own memory, so a
            process that is stopped, or hostile, can delay whoever reads it.
    """
    names = [] if process == "?" else [process]
    if pid > 0:
        names += filter(None, [_program(pid), _name(pid)])
        if ask_process:
            names += filter(None, [_first_word(pid)])
    if not names:
        return None
    return any(map(is_qemu_name, names))


def is_qemu_name(name: str) -> bool:
    """Whether a program of this name, with or without its folder, is a QEMU.

    Wrappers hide the real program beside themselves as ".qemu-system-x86_64-wrapped".
    """
    return os.path.basename(name).lstrip(".").startswith(NAMES)


def _program(pid: int) -> str:
    """Its file, which stays known when it was deleted (by an upgrade of the package, say)."""
    try:
        return os.readlink(f"/proc/{pid}/exe")
    except OSError:
        return ""


def _name(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", errors="replace") as file:
            return file.read().rstrip("\n")
    except OSError:
        return ""


def _first_word(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read(_MOST_BYTES).partition(b"\0")[0].decode(errors="replace")
    except OSError:
        return ""
