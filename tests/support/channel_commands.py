"""The commands of `ivshmem channel`, run by tests."""

from __future__ import annotations

import subprocess
import sys

from . import commands


def run(path: str, *words: str, status: int = 0, input: str = "") -> str:  # noqa: A002
    """Standard output of a command; its one line of errors, if it is to fail."""
    done = commands.run("channel", words[0], "-S", path, *words[1:], input=input)
    assert done.returncode == status, done.stderr
    if not status:
        assert done.stderr == ""
        return done.stdout
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line.removeprefix("ivshmem: ")


def started(
    path: str,
    *words: str,
    stdout: int = subprocess.PIPE,
    stdin: int | None = None,
    stderr: int = subprocess.PIPE,
) -> subprocess.Popen[bytes]:
    """Start a command as a process of its own."""
    command = [sys.executable, "-m", "ivshmem", "channel", words[0], "-S", path, *words[1:]]
    return subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=stderr)
