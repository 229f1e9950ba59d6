"""What the operating system refuses is said as people read it, wherever it happens.

That is without the number that Python puts before it, and in the form of the log that was asked
for: also what a server has to say before it has read its options.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support.stopping import users_environment
from support.waiting import PATIENCE, Background

IVSHMEM = [sys.executable, "-m", "ivshmem"]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize("more", [[], ["--supervise"]], ids=["serve", "supervise"])
@pytest.mark.parametrize("address", ["/nobody/is/there", "relative"])
def test_a_manager_that_cannot_be_told(
    tmp_path: Path, address: str, more: list[str], form: str
) -> None:
    with subprocess.Popen(
        [*IVSHMEM, "serve", "-S", str(tmp_path / "s"), "--log-format", form, *more],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=users_environment(NOTIFY_SOCKET=address),
    ) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        process.terminate()
        assert process.stderr.read() == ""
        assert process.wait(PATIENCE) == 0
    if form == "json":
        told = json.loads(line)
        assert told["level"] == "warning"
        line = f"ivshmem: {told['text']}"
    assert line.startswith(f"ivshmem: the service manager cannot be told anything: {address}: ")
    assert "Errno" not in line


@pytest.mark.parametrize("more", [[], ["--supervise"]], ids=["serve", "supervise"])
def test_an_offer_that_breaks_off(tmp_path: Path, more: list[str]) -> None:
    """The other process closes while there is something that it has not read."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{path}.control")
        listener.listen()

        def close() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.recv(1)

        other = Background(close)
        done = subprocess.run(
            [*IVSHMEM, "serve", "--takeover", "-S", str(path), *more],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            env=users_environment(),
            check=False,
        )
        other.result()
    assert done.returncode == 1
    assert done.stderr == (
        "ivshmem: nothing was taken over: connection reset by peer: it has ended, or another"
        " process has just taken over (`ivshmem status` tells); omit --takeover to start a new"
        " server\n"
    )
