"""Python programs in processes of their own, which say READY and are always ended."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from .waiting import PATIENCE

NOBODY = 65534

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")

_BECOME = """\
import ctypes, fcntl, logging, mmap, os, resource, selectors, signal, socket, struct, sys
import threading, traceback
import ivshmem
for name in ivshmem.__all__:
    getattr(ivshmem, name)  # else it is imported when it is used, by who cannot read it
os.setgroups([])
os.setresgid({user}, {user}, {user})
os.setresuid({user}, {user}, {user})
"""


class Child:
    """A running program. Its lines are read with `line()`."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.pid = process.pid
        self._buffer = b""
        self._log = ""

    def line(self) -> str:
        """The next line that it prints; "" when it has ended."""
        assert self.process.stdout is not None
        line, self._buffer = _line(self.process.stdout.fileno(), self._buffer)
        return line

    def log_line(self) -> str:
        """The next line that it writes to standard error, which finish() returns once more."""
        assert self.process.stderr is not None
        line, rest = _line(self.process.stderr.fileno(), b"")
        self._log += line + "\n" + rest.decode()
        return line

    def expect(self, text: str) -> None:
        """The next line is this; otherwise the child's standard error is shown."""
        line = self.line()
        if line != text:
            self.process.kill()
            assert self.process.stderr is not None
            raise AssertionError(
                f"got {line!r} for {text!r}\n{self.process.stderr.read().decode()}"
            )

    def tell(self, text: str = "") -> None:
        """Send it a line."""
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode() + b"\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(PATIENCE)

    def finish(self) -> str:
        """Wait for its end, which must be a good one; returns what it wrote to standard error."""
        _, errors = self.process.communicate(timeout=PATIENCE)
        assert self.process.returncode == 0, errors.decode()
        return self._log + errors.decode()

    def cpu_seconds(self) -> float:
        """Processor time used so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _line(fd: int, begun: bytes) -> tuple[str, bytes]:
    """The next line from a pipe, and what was read beyond it."""
    while b"\n" not in begun:
        ready, _, _ = select.select([fd], [], [], PATIENCE)
        assert ready, "the child printed nothing"
        data = os.read(fd, 4096)
        if not data:
            return "", b""
        begun += data
    line, _, rest = begun.partition(b"\n")
    return line.decode(), rest


@contextlib.contextmanager
def python(code: str, *arguments: str, user: int | None = None) -> Iterator[Child]:
    """Run a program; warnings are errors in it, and it does not outlive the block.

    With `user` it becomes that user when it has imported what it needs, which only root may read.
    """
    before = "" if user is None else _BECOME.format(user=user)
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-u", "-c", before + textwrap.dedent(code), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd="/",
    )
    with process:
        try:
            yield Child(process)
        finally:
            if process.poll() is None:
                process.kill()
            for stream in (process.stdout, process.stderr):
                assert stream is not None
                stream.close()


def children_of(pid: int) -> list[int]:
    """The processes that a process's first thread has made and not waited for."""
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
