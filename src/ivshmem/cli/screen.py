"""A terminal's screen for a while: drawn whole, given back as it was.

Knows: terminals, keys, colours, the signals that concern them. Does not know: what is shown.

Invariants:
1. However the block ends, by an exception or a signal of those that `daemon` knows, the terminal is
   as it was; also while the process is stopped by Ctrl-Z.
2. Nobody waits for a terminal that takes nothing (Ctrl-S): a signal that comes just before write(2)
   would not be noticed in it. Then only the newest screen is there when it takes something again.
3. No line that is shown contains a line break or an escape sequence, not even in names of peers.
"""

from __future__ import annotations

import codecs
import contextlib
import enum
import os
import re
import select
import shutil
import signal
import socket
import sys
import termios
import tty
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ..text import plain
from . import signals, terminal
from .tables import cut, width
from .writing import Aside

# Another screen, no wrapping at its edge, no cursor; and back.
_ENTER = "\033[?1049h\033[?7l\033[?25l"
_LEAVE = "\033[?25h\033[?7h\033[?1049l"

# What terminals send, in both of their modes for arrows; xterm and the console differ in two.
_NAMED = {
    **dict.fromkeys(("\033[A", "\033OA"), "up"),
    **dict.fromkeys(("\033[B", "\033OB"), "down"),
    **dict.fromkeys(("\033[C", "\033OC"), "right"),
    **dict.fromkeys(("\033[D", "\033OD"), "left"),
    **dict.fromkeys(("\033[H", "\033OH", "\033[1~", "\033[7~"), "home"),
    **dict.fromkeys(("\033[F", "\033OF", "\033[4~", "\033[8~"), "end"),
    "\033[5~": "pageup",
    "\033[6~": "pagedown",
    **dict.fromkeys(("\r", "\n"), "enter"),
    **dict.fromkeys(("\x7f", "\b"), "backspace"),
}
_SEQUENCE = re.compile(r"\033(\[[0-9;?]*[ -/]*[@-~]|O.)", re.DOTALL)
_BEGUN = re.compile(r"\033(\[[0-9;?]*[ -/]*|O)?\Z")
_REST = 0.05  # seconds within which the rest of a sequence comes; the key Esc has none


class Style(enum.Enum):
    """How a line looks where colours are wanted: the codes of SGR."""

    PLAIN = ""
    TITLE = "1"  # bold
    BAR = "7"  # reverse, as far as the screen is wide: a table's head, and the foot
    ALARM = "1;31"  # bold, red


class Line(NamedTuple):
    """A line to draw."""

    text: str
    style: Style = Style.PLAIN


class Screen:
    """What `shown` gives."""

    def __init__(self) -> None:
        self._keys = sys.stdin.fileno()
        self._out = sys.stdout.fileno()
        self._aside = Aside(sys.stdout)
        self._before: list[Any] = termios.tcgetattr(self._keys)
        self._coloured = terminal.coloured()
        self._typed = ""  # and not taken by `key` yet
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        # A signal that comes just before select(2) would not be noticed in it: Python runs handlers
        # between system calls. So each one also writes a byte.
        self._woken, waker = socket.socketpair()
        self._woken.setblocking(False)
        waker.setblocking(False)
        self._waker = waker
        self._wakeup_before = signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)

    def size(self) -> tuple[int, int]:
        """Columns and rows."""
        size = shutil.get_terminal_size()
        return size.columns, size.lines

    def draw(self, lines: Sequence[Line]) -> None:
        """Show these from the top, as many as there is room for."""
        columns, rows = self.size()
        fitting = [self._drawn(line, columns) for line in lines[:rows]]
        frame = "\033[H" + "\033[K\r\n".join(fitting) + "\033[K\033[J"
        self._aside.write(frame, passing=True)

    def _drawn(self, line: Line, columns: int) -> str:
        text = cut(plain(line.text), columns)
        if not self._coloured or line.style is Style.PLAIN:
            return text
        if line.style is Style.BAR:
            text += " " * (columns - width(text))
        return f"\033[{line.style.value}m{text}\033[m"

    def key(self, seconds: float) -> str:
        """A key that is pressed within so many seconds; "" if none is, or a signal came.

        Returns:
            its character, or a name: up, down, left, right, home, end, pageup, pagedown, enter,
            backspace, esc. Other keys that are no characters are "".
        """
        if not self._typed and not self._read(seconds):
            return ""
        while _BEGUN.match(self._typed):
            before = self._typed
            if not self._read(_REST):
                self._typed = before[1:]
                return "esc"
        if found := _SEQUENCE.match(self._typed):
            self._typed = self._typed[found.end() :]
            return _NAMED.get(found[0], "")
        if not self._typed:  # a part of a character
            return ""
        key, self._typed = self._typed[0], self._typed[1:]
        return "esc" if key == "\033" else _NAMED.get(key, key)

    def _read(self, seconds: float) -> bool:
        """Take what was typed; say whether anything was."""
        ready, _, _ = select.select([self._keys, self._woken], [], [], seconds)
        if self._woken in ready:
            self._woken.recv(4096)
            return False
        if not ready:
            return False
        if not (data := os.read(self._keys, 1024)):
            raise KeyboardInterrupt  # the terminal is gone
        self._typed += self._decoder.decode(data)
        return True

    def enter(self) -> None:
        """Take the terminal."""
        tty.setcbreak(self._keys, termios.TCSANOW)
        self._aside.write(_ENTER)

    def leave(self) -> None:
        """Give it back."""
        with contextlib.suppress(termios.error, OSError):  # the terminal is gone
            termios.tcflow(self._out, termios.TCOON)  # as Ctrl-Q: what follows must get there
        self._aside.write(_LEAVE)
        self._aside.settle()
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
        self._aside.close()
        signal.set_wakeup_fd(self._wakeup_before)
        self._woken.close()
        self._waker.close()


def is_there() -> bool:
    """Whether there is a terminal that can be drawn on."""
    return sys.stdin.isatty() and sys.stdout.isatty() and not _is_dumb()


def _is_dumb() -> bool:
    return os.environ.get("TERM") == "dumb"


@contextlib.contextmanager
def shown() -> Iterator[Screen]:
    """Have the screen while the block runs.

    Raises:
        ValueError: standard input and output are not a terminal.
        SystemExit: a signal ended the program; KeyboardInterrupt for Ctrl-C.
    """
    if not is_there():
        what = "a terminal that can be drawn on" if _is_dumb() else "a terminal"
        raise ValueError(
            f"standard input and output are not {what}: `ivshmem status` prints the same once"
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
