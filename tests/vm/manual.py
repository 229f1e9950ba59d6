"""The server of QEMU's manual, `ivshmem-server`: its lines start ours, and it ends as that does."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sysconfig
from pathlib import Path

from support.waiting import until

_SCRIPTS = Path(sysconfig.get_path("scripts"))


def run_server(line: str) -> None:
    """Run a line of the manual; the server it starts goes into the background by itself."""
    command, *arguments = shlex.split(line)
    assert command == "ivshmem-server"
    result = subprocess.run([_SCRIPTS / command, *arguments], timeout=60, check=False)
    assert result.returncode == 0


def end_server(pidfile: Path) -> None:
    """SIGTERM, and wait until it has removed its pid file, the last thing it does."""
    os.kill(int(pidfile.read_text()), signal.SIGTERM)
    until(lambda: not pidfile.exists(), "the server's end")
