"""Commands that draw on a screen, on terminals of their own.

Knows: what a shell does for what runs in its foreground, what is drawn. Does not know: what it
means.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping
from pathlib import Path

from .waiting import PATIENCE, until

IVSHMEM = [sys.executable, "-m", "ivshmem"]


class Terminal:
    """A command of ivshmem on a terminal of its own."""

    def __init__(
        self,
        *arguments: str,
        rows: int = 24,
        columns: int = 120,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.before = termios.tcgetattr(slave)
        # The leader of a session, whose terminal this is; its child is in the foreground, as a
        # shell has it.
        leader = (
            "import fcntl, os, signal, subprocess, sys, termios\n"
            "fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
            "signal.signal(signal.SIGTTOU, signal.SIG_IGN)\n"
            "child = subprocess.Popen(sys.argv[1:], preexec_fn=os.setpgrp)\n"
            "os.tcsetpgrp(0, child.pid)\n"
            "while True:\n"
            "    _, status = os.waitpid(child.pid, os.WUNTRACED)\n"
            "    if not os.WIFSTOPPED(status):\n"
            "        os._exit(os.waitstatus_to_exitcode(status) % 256)\n"
            "    os.tcsetpgrp(0, os.getpgrp())\n"
            "    os.write(1, b'<stopped>')\n"
            "    os.read(0, 100)\n"
            "    os.tcsetpgrp(0, child.pid)\n"
            "    child.send_signal(signal.SIGCONT)\n"
        )
        hidden = ("COLUMNS", "LINES", "NO_COLOR", "CLICOLOR")
        own = {name: text for name, text in os.environ.items() if name not in hidden}
        self.process = subprocess.Popen(
            [sys.executable, "-c", leader, *IVSHMEM, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env={**own, "TERM": "xterm", **(environment or {})},
        )
        self.slave = slave
        self.output = b""
        self._seen = 0

    def expect(self, pattern: str) -> None:
        """Read until this appears in what was not looked at yet."""
        begun = time.monotonic()
        while not (found := re.search(pattern.encode(), self.output[self._seen :], re.DOTALL)):
            left = begun + PATIENCE - time.monotonic()
            ready, _, _ = select.select([self.master], [], [], max(left, 0))
            assert ready, f"no {pattern!r} in {self.output[self._seen :]!r}"
            self.output += os.read(self.master, 4096)
        self._seen += found.end()

    def screen(self) -> list[str]:
        """The lines of the last screen that was drawn whole."""
        last = self.output[: self._seen].rpartition(b"\033[H")[2].decode()
        return re.sub(r"\033\[[0-9;]*[KJm]|\r", "", last).split("\n")

    def drawn(self, pattern: str = "") -> list[str]:
        """The lines of the next whole screen that has this."""
        while True:
            self.expect(r"\033\[H.*?\033\[J")
            if re.search(pattern, "\n".join(lines := self.screen()), re.MULTILINE):
                return lines

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def end(self) -> int:
        """Wait for its end; the terminal is as it was."""
        until(lambda: self._drain() and self.process.poll() is not None)
        self._drain()
        assert termios.tcgetattr(self.slave) == self.before
        for on, off in ((b"\033[?1049h", b"\033[?1049l"), (b"\033[?25l", b"\033[?25h")):
            assert self.output.count(on) == self.output.count(off) > 0
            assert self.output.rfind(on) < self.output.rfind(off)
        return self.process.returncode

    def _drain(self) -> bool:
        while select.select([self.master], [], [], 0)[0]:
            self.output += os.read(self.master, 4096)
        return True

    def child(self) -> int:
        """The process that draws."""
        path = f"/proc/{self.process.pid}/task/{self.process.pid}/children"
        return int(until(lambda: Path(path).read_text().strip()))

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.master)
        os.close(self.slave)
