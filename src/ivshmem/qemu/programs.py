"""Whether a process is a QEMU: the one rule, for the server, `status` and `migrate`.

Knows: what QEMU's programs are called, where /proc says what a process is.
Does not know: what anybody does with the answer.

A process is a QEMU if one of its names is that of a QEMU program: its executable, its name in
/proc, the name that it had when it connected, and, where the caller allows it, the first word of
its command line. So a user may rename it (`-name x,process=web1`).

Where there is no pid, only the name counts that somebody else has seen: a QEMU on another machine,
one in another pid namespace, one that has ended. If there is no such name either, the answer is
None. Callers treat None as they treat a QEMU where a mistake could crash a guest.

A name is a claim, not a proof: a process that wants to be taken for a QEMU is.
"""

from __future__ import annotations

import os

# How the names of QEMU's programs begin: qemu-system-x86_64, qemu-kvm, kvm.
NAMES = ("qemu", "kvm")

_MOST_BYTES = 4096  # of a command line's first word


def is_qemu(pid: int, process: str = "?", *, ask_process: bool = False) -> bool | None:
    """Say whether a process is a QEMU, as far as can be known; None: nobody can know.

    The executable of another user's process is hidden from every user except root; its command
    line is not. So a server that is not root's takes a renamed QEMU of another user for something
    else, unless `ask_process` is set.

    Args:
        pid: 0 if the process is not on this machine, or cannot be seen from here.
        process: the name that it had when it connected; "?" if nobody has seen it.
        ask_process: look at its command line, too. That is in the process's own memory, so a
            process that is stopped, or hostile, can delay its reader. The server never does this.
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
    """Say whether a program of this name, with or without its folder, is a QEMU.

    Wrappers hide the real program beside themselves as ".qemu-system-x86_64-wrapped".
    """
    return os.path.basename(name).lstrip(".").startswith(NAMES)


def _program(pid: int) -> str:
    """Return its executable; known even if the file was deleted, by an upgrade for instance."""
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
