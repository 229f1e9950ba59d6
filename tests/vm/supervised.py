"""`ivshmem serve --supervise` as a process, for tests that kill it.

Knows: how its parent and its child are found.
Does not know: who is connected.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from .host import TIMEOUT


class Supervised:
    """A parent, whose pid is in the pid file, and a child, which serves 1 MiB at `path`."""

    def __init__(self, directory: Path, vectors: int) -> None:
        self.path = directory / "socket"
        self.vectors = vectors
        self._pid_file = directory / "pid"
        command = [sys.executable, "-m", "ivshmem", "serve", "--supervise", "--quiet"]
        command += ["-S", str(self.path), "-l", "1M", "-n", str(vectors)]
        self.process = subprocess.Popen(
            [*command, "--pid-file", str(self._pid_file)], stdout=subprocess.PIPE
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline().startswith(b"serving")

    def parent(self) -> int:
        return int(self._pid_file.read_text() or 0)

    def child(self) -> int:
        """The process that serves; 0 while there is none."""
        try:
            pid = self.parent()
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        except (OSError, ValueError):
            return 0
        return int(children[0]) if children else 0

    def close(self) -> None:
        deadline = time.monotonic() + TIMEOUT
        while self.path.exists() and time.monotonic() < deadline:
            with contextlib.suppress(OSError, ValueError):  # it is being replaced
                os.kill(self.parent(), signal.SIGTERM)
            time.sleep(0.1)
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        assert not self.path.exists()
