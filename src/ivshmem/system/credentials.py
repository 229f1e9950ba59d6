"""Who is at the other end of a Unix socket.

Knows: SO_PEERCRED, SO_PEERGROUPS. Does not know: what may be done by whom.
"""

from __future__ import annotations

import socket
import struct

from ..text import NAME, plain
from .named_tuple import NamedTuple

_UCRED = struct.Struct("iII")
_SO_PEERGROUPS = 59  # socket(7), since Linux 4.13; Python does not name it
_MOST_GROUPS = 256  # Python's getsockopt takes 1,024 bytes


class Credentials(NamedTuple):
    """Who was on the other end when it connected (SO_PEERCRED), and what its process is called.

    Attributes:
        groups: its supplementary groups (SO_PEERGROUPS); None if they cannot be known.
    """

    pid: int
    uid: int
    gid: int
    process: str
    groups: tuple[int, ...] | None = ()


def credentials(sock: socket.socket) -> Credentials:
    """Who connected. A process that is gone, or hidden by another pid namespace, has no name."""
    pid, uid, gid = _UCRED.unpack(
        sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    )
    try:
        with open(f"/proc/{pid}/comm", "rb") as comm:
            raw = comm.read()
    except OSError:
        raw = b""
    process = plain(raw.removesuffix(b"\n"), NAME) or "?"
    return Credentials(pid, uid, gid, process, _groups(sock, pid))


def _groups(sock: socket.socket, pid: int) -> tuple[int, ...] | None:
    """The supplementary groups of who connected, at that time; None if they cannot be known."""
    try:
        raw = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 4 * _MOST_GROUPS)
        return struct.unpack(f"{len(raw) // 4}I", raw)
    except OSError:
        pass  # ERANGE: they are more
    try:
        with open(f"/proc/{pid}/status") as status:
            for line in status:
                if line.startswith("Groups:"):
                    return tuple(map(int, line.split()[1:]))
    except OSError:
        pass
    return None
