"""A first start that fails under a service manager: the manager hears why, and not to try again.

tests/integration/test_debian.py has the same with systemd itself, by night.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import commands
from support.manager import Manager
from support.waiting import PATIENCE

import ivshmem

pytestmark = pytest.mark.usefixtures("commands")

FINAL = 78  # as RestartPreventExitStatus= of the units has it
SERVE = [sys.executable, "-m", "ivshmem", "serve", "--fd-store"]
UNITS = Path(__file__).parents[2] / "systemd/system"


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    """Where a service manager listens."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.setblocking(False)
        yield sock


def config(place: Path, text: str) -> list[str]:
    (place / "a.toml").write_text(text)
    return ["--config", str(place / "a.toml")]


KINDS: dict[str, Callable[[Path], list[str]]] = {
    "no file": lambda place: ["--config", str(place / "missing.toml")],
    "no TOML": lambda place: config(place, "x y"),
    "a wrong key": lambda place: config(place, "[region.a]\nsockets = '/s'\n"),
    "no directory": lambda place: ["-S", str(place / "missing" / "s")],
    "a file at the socket's path": lambda place: ["-S", str(place / "file")],
    "another server": lambda place: ["-S", str(place / "taken")],
    "a wrong size": lambda place: ["-S", str(place / "s"), "-l", "3"],
    "no such memory": lambda place: [
        "-S",
        str(place / "s"),
        "-f",
        str(place / "m"),
        "--existing=require",
    ],
    "no such huge pages": lambda place: ["-S", str(place / "s"), "--hugepages=8M"],
    "no control": lambda place: ["-S", str(place / "s"), "--control", str(place / "missing" / "c")],
    "no metrics": lambda place: ["-S", str(place / "s"), "--metrics", "192.0.2.1:9"],
    "a pid file": lambda place: ["-S", str(place / "s"), "-p", str(place / "missing" / "pid")],
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_manager_hears_why(tmp_path: Path, listener: socket.socket, kind: str) -> None:
    (tmp_path / "file").touch()
    with ivshmem.Server(tmp_path / "taken", "64K").start():
        done = commands.run(
            *("serve", "--fd-store", *KINDS[kind](tmp_path)),
            env={**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")},
        )
    assert done.returncode == FINAL, done.stderr
    messages = []
    with contextlib.suppress(BlockingIOError):
        while True:
            messages.append(listener.recv(4096).decode())
    # Besides the reason, descriptors can have been given to it. READY is never said.
    (said,) = (text for text in messages if not text.startswith(("FDSTORE=", "FDSTOREREMOVE=")))
    assert said.startswith("STATUS=")
    assert done.stderr == f"ivshmem: {said.removeprefix('STATUS=')}\n"


def test_without_a_manager_the_status_is_1(tmp_path: Path) -> None:
    assert commands.run("serve", "-S", str(tmp_path / "missing" / "s")).returncode == 1


def test_a_successor_that_fails_is_worth_another_try(tmp_path: Path) -> None:
    """The manager would drop all peers with the last try."""
    path = str(tmp_path / "s")
    manager = Manager([*SERVE, "-S", path, "-l", "64K"], tmp_path)
    try:
        manager.start()
        with ivshmem.connect(path):
            manager.kill()
            manager.command += ["-p", str(tmp_path / "missing" / "pid")]
            with pytest.raises(AssertionError, match="missing/pid: no such file"):
                manager.start()
            _, status = os.waitpid(manager.pid, 0)
            manager.pid = 0
            assert os.waitstatus_to_exitcode(status) == 1
    finally:
        manager.close()


def test_the_units_know_the_status() -> None:
    for name in ("ivshmem.service", "ivshmem@.service"):
        lines = (UNITS / name).read_text().splitlines()
        (known,) = [line for line in lines if line.startswith("RestartPreventExitStatus=")]
        assert {str(FINAL), "2"} <= set(known.partition("=")[2].split())
        assert "Restart=on-failure" in lines


def test_wrong_usage_is_2(tmp_path: Path) -> None:
    done = subprocess.run(
        [*SERVE, "--sise", "3"],
        capture_output=True,
        timeout=PATIENCE,
        check=False,
        env={**os.environ, "NOTIFY_SOCKET": str(tmp_path / "none")},
    )
    assert done.returncode == 2
