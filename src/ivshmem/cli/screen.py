"""A terminal's screen for a while: drawn whole, given back as it was.

Knows: terminals, keys, the signals that concern them. Does not know: what is shown.

Invariants:
1. However the block ends, by an exception or a signal of those that `daemon` knows, the terminal is
   as it was; also while the process is stopped by Ctrl-Z.
2. No line that is shown contains a line break or an escape sequence, not even in names of peers.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import socket
import sys
import termios
import tty
from collections.abc import Iterator, Sequence
from typing import Any

from ..text import plain
from . import signals
from .tables import cut
from .writing import show

# Another screen, no wrapping at its edge, no cursor; and back.
_ENTER = "\033[?1049h\033[?7l\033[?25l"
_LEAVE = "\033[?25h\033[?7h\033[?1049l"


class Screen:
    """What `shown` gives."""

    def __init__(self) -> None:
        self._keys = sys.stdin.fileno()
        self._out = sys.stdout.fileno()
        self._before: list[Any] = termios.tcgetattr(self._keys)
        # A signal that comes just before select(2) would not be noticed in it: Python runs handlers
        # between system calls. So each one also writes a byte.
        self._woken, waker = socket.socketpair()
        self._woken.setblocking(False)
        waker.setblocking(False)
        self._waker = waker
        self._wakeup_before = signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)

    def draw(self, lines: Sequence[str]) -> None:
        """Show these from the top, as many as there is room for."""
        columns, rows = shutil.get_terminal_size()
        fitting = [cut(plain(line), columns) for line in lines[:rows]]
        _write(self._out, "\033[H" + "\033[K\r\n".join(fitting) + "\033[K\033[J")

    def key(self, seconds: float) -> str:
        """A key that is pressed within so many seconds; "" if none is, or a signal came."""
        ready, _, _ = select.select([self._keys, self._woken], [], [], seconds)
        if self._woken in ready:
            self._woken.recv(4096)
            return ""
        if not ready:
            return ""
        if not (data := os.read(self._keys, 1)):
            raise KeyboardInterrupt  # the terminal is gone
        return data.decode(errors="replace")

    def enter(self) -> None:
        """Take the terminal."""
        tty.setcbreak(self._keys, termios.TCSADRAIN)
        _write(self._out, _ENTER)

    def leave(self) -> None:
        """Give it back."""
        with contextlib.suppress(termios.error, OSError):  # the terminal is gone
            termios.tcflow(self._out, termios.TCOON)  # as Ctrl-Q: what follows must get there
        with contextlib.suppress(OSError):
            show(_LEAVE, self._out, end="")  # waits a second at most
        with contextlib.suppress(termios.error):
            termios.tcsetattr(self._keys, termios.TCSANOW, self._before)

    def pause(self, *_: object) -> None:
        """A signal handler for Ctrl-Z."""
        self.leave()
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)  # continues here after SIGCONT
        signal.signal(signal.SIGTSTP, self.pause)
        self.enter()

    def close(self) -> None:
        """Close what was made here."""
        signal.set_wakeup_fd(self._wakeup_before)
        self._woken.close()
        self._waker.close()


@contextlib.contextmanager
def shown() -> Iterator[Screen]:
    """Have the screen while the block runs.

    Raises:
        ValueError: standard input and output are not a terminal.
        SystemExit: a signal ended the program; KeyboardInterrupt for Ctrl-C.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()) or os.environ.get("TERM") == "dumb":
        raise ValueError(
            "standard input and output are not a terminal: `ivshmem status` prints the same once"
        )
    with signals.held(), contextlib.closing(Screen()) as screen:
        before = [
            (number, signal.signal(number, handler))
            for number, handler in (
                (signal.SIGTSTP, screen.pause),
                (signal.SIGWINCH, lambda *_: None),  # it wakes `key`, and so the size is looked at
            )
        ]
        try:
            screen.enter()
            with signals.raised():
                yield screen
        finally:
            for number, handler in before:
                signal.signal(number, handler)
            screen.leave()


def _write(fd: int, text: str) -> None:
    data = text.encode(errors="replace")
    while data:
        data = data[os.write(fd, data) :]
