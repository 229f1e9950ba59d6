"""Where a process writes, while nobody reads.

Knows: terminals, pipes and sockets, and how each of them becomes full. Does not know: the process.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import socket
import tty


class Output:
    """Where a process writes, and where nobody reads from `block` on."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        if kind.startswith("terminal"):
            self._reader, self.end = pty.openpty()
        elif kind == "pipe":
            self._reader, self.end = os.pipe()
            fcntl.fcntl(self.end, fcntl.F_SETPIPE_SZ, 4096)
        else:
            ours, theirs = socket.socketpair()
            self._reader, self.end = ours.detach(), theirs.detach()

    def block(self) -> None:
        if self.kind == "terminal, Ctrl-S":
            os.write(self._reader, b"\x13")
            return
        if self.kind == "terminal":
            tty.setraw(self.end)
        self._fill()

    def _fill(self) -> None:
        """Leave the descriptor blocking: the process that writes there has the same one."""
        if self.kind == "socket":
            with (
                socket.socket(fileno=os.dup(self.end)) as end,
                contextlib.suppress(BlockingIOError),
            ):
                while end.send(bytes(512), socket.MSG_DONTWAIT):
                    pass
            return
        own = os.open(f"/proc/self/fd/{self.end}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            for size in (512, 1):
                with contextlib.suppress(BlockingIOError):
                    while os.write(own, bytes(size)):
                        pass
        finally:
            os.close(own)

    def let_go(self) -> None:
        """From now on there is no reader at all."""
        os.close(self._reader)
        self._reader = -1

    def read_on(self) -> bytes:
        """End Ctrl-S, and return what is there by now."""
        if self.kind == "terminal, Ctrl-S":
            os.write(self._reader, b"\x11")
        return os.read(self._reader, 1 << 16)

    def close(self) -> None:
        for fd in (self._reader, self.end):
            if fd >= 0:
                os.close(fd)
