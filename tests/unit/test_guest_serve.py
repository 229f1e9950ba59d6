"""`ivshmem guest serve` under a service manager: its socket, READY, and why it cannot start.

tests/vm/test_guest_setup.py has a real device and a real manager.
"""

from __future__ import annotations

import argparse
import errno
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ivshmem.cli import guest_serve, main
from ivshmem.system import systemd


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(str(tmp_path / "notify"))
        told.settimeout(30)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield told


def options(*words: str) -> argparse.Namespace:
    return main._parser(["guest"]).parse_args(["guest", "serve", *words])


def no_device(*_: object) -> int:
    raise OSError(errno.EBUSY, "another process has the device open", "0000:00:04.0")


def test_why_it_does_not_start(
    manager: socket.socket,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(guest_serve, "_share", no_device)
    arguments = options()
    assert guest_serve.run(arguments) == systemd.EXIT_FIRST_START
    reason = "0000:00:04.0: another process has the device open"
    assert manager.recv(4096).decode() == f"STATUS={reason}"
    assert capsys.readouterr().err == f"ivshmem: {reason}\n"
    # Without a manager it is an error like any other.
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    with pytest.raises(OSError, match="another process"):
        guest_serve.run(arguments)


def test_it_is_ready_when_it_serves(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    def share(_: argparse.Namespace, begin: Callable[[str], object]) -> int:
        begin("sharing it")
        raise OSError(errno.EIO, "it broke later")

    monkeypatch.setattr(guest_serve, "_share", share)
    with pytest.raises(OSError, match="it broke later"):  # worth another try
        guest_serve.run(options())
    assert manager.recv(4096).decode() == "READY=1\nSTATUS=sharing it"


def test_a_socket_that_the_manager_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "passed")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as made:
        made.bind(path)
        made.listen()
        monkeypatch.setattr(systemd, "listen_fds", lambda: [("unknown", os.dup(made.fileno()))])
        with guest_serve._listener(options("-S", str(tmp_path / "other"))) as listener:
            assert listener.path == path
    assert os.path.exists(path), "it is the manager's"
    assert not os.path.exists(tmp_path / "other")
    two = [("a", 100), ("b", 101)]
    monkeypatch.setattr(systemd, "listen_fds", lambda: two)
    with pytest.raises(ValueError, match="passed 2 sockets"):
        guest_serve._listener(options())
