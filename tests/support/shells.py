"""Shells on terminals of their own, into which a test types what a page says.

Knows: prompts, logins, what a command leaves on a screen. Does not know: which commands.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import termios
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

# Of a shell without a start file, of root's shell in a machine, and of a machine's getty.
_PROMPT = r"(bash-\S+[#$]|root@\S+#) \Z"
_LOGIN = r"login: \Z"
_ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[a-zA-Z]|[c=>78]|\][^\x07]*\x07)|\r|\x07")
_WIDE = struct.pack("HHHH", 50, 250, 0, 0)  # nothing is cut or broken into two lines


class Shell:
    """A shell. `said` is what its screen got since the last line was typed.

    Args:
        name: in failure messages.
    """

    def __init__(self, name: str, folder: Path, environment: Mapping[str, str]) -> None:
        self.name = name
        self.said = self.all = ""
        self._pid, self._fd = pty.fork()
        if self._pid == 0:
            try:
                os.chdir(folder)
                # Its programs are a person's: pytest's signals are its own.
                for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGPIPE):
                    signal.signal(number, signal.SIG_DFL)
                os.execvpe(  # noqa: S606  it is a shell
                    "bash", ["bash", "--norc", "--noprofile"], {**environment}
                )
            finally:
                os._exit(127)
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, _WIDE)

    def read(self, seconds: float) -> bool:
        """Take what comes within this time; say whether anything did."""
        if not select.select([self._fd], [], [], seconds)[0]:
            return False
        try:
            data = os.read(self._fd, 1 << 16)
        except OSError:  # the shell has ended
            return False
        text = data.decode(errors="replace")
        self.all = _ESCAPES.sub("", self.all + text)
        self.said = _ESCAPES.sub("", self.said + text)
        return True

    def wait(self, pattern: str, seconds: float) -> None:
        """Read until the screen has this.

        Raises:
            AssertionError: it did not come; the message ends with the screen.
        """
        give_up = time.monotonic() + seconds
        while not re.search(pattern, self.said, re.MULTILINE):
            left = give_up - time.monotonic()
            assert left > 0, f"terminal {self.name}: no {pattern!r}:\n{self.all[-3000:]}"
            self.read(min(left, 1.0))

    def ready(self, seconds: float) -> None:
        """Wait until a command can be typed; log in as root where a machine asks who it is."""
        self.wait(f"{_PROMPT}|{_LOGIN}", seconds)
        if re.search(_LOGIN, self.said):
            self.press("root\n")
            self.wait(_PROMPT, seconds)

    def enter(self, line: str) -> None:
        """Type a line and Enter."""
        self.press(f"{line}\n")

    def press(self, keys: str) -> None:
        """Press keys; what the screen had before is forgotten."""
        while self.read(0):
            pass
        self.said = ""
        os.write(self._fd, keys.encode())

    def close(self) -> None:
        """Hang up, which ends what runs there."""
        os.close(self._fd)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._pid, 0)

    def __enter__(self) -> Shell:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
