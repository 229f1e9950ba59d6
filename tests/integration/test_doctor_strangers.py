"""The doctor meets servers and files that are not what it looks for: it says so, and harms none."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from support.peer import FakeServer

from ivshmem.doctor import host, open_files, request, server
from ivshmem.doctor.check import Check, run


def looked_at(path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Check]:
    """The checks of a server; what is here runs in a Python, so it might be ours, and is asked."""
    monkeypatch.setattr(server, "_SECONDS", 0.3)
    steps = server.ServerSteps(request.Request(str(path), qemu="/bin/true")).steps()
    return {check.name: check for check in run("host", steps)}


SAYS: dict[str, tuple[bytes, str, str]] = {
    "nothing": (b"", "warning", "no answer, so this may not be an ivshmem server"),
    "the greeting of a server of another make": (bytes(8), "warning", "which cannot be asked"),
    "QMP": (b'{"QMP": {"version": {}}}\r\n', "failed", 'it answers {"QMP": {"version": {}}}'),
    "SSH": (b"SSH-2.0-x\x1b[2J\r\n", "failed", r"it answers SSH-2.0-x\x1b[2J\r\n"),
    "numbers without end": (b"{" + b'"a":' * 4000, "failed", "not an ivshmem server"),
    "deep nesting": (b'{"a":' + b"[" * 3000, "failed", "not an ivshmem server"),
    "a wrong answer": (b'{"protocol": 0, "size": -1}', "failed", "not an ivshmem server"),
    "no JSON": (b"{{{{", "failed", "not an ivshmem server"),
}


@pytest.mark.parametrize("what", SAYS)
def test_a_server_that_says(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said, state, found = SAYS[what]

    def answer(peer: socket.socket) -> None:
        if said:
            peer.sendall(said)
            if what != "the greeting of a server of another make":
                peer.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):  # of what was more than an answer
            peer.recv(1)

    with FakeServer(str(tmp_path / "s"), answer):
        check = looked_at(tmp_path / "s", monkeypatch)["server"]
    assert (check.state, found in check.found) == (state, True), check
    assert check.fix  # beside it, or as a peer of it
    assert ("--socket" in check.fix) == (state == "failed")


def test_datagrams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(tmp_path / "s"))
        check = looked_at(tmp_path / "s", monkeypatch)["server"]
    assert check.state != "ok"


@pytest.mark.parametrize("kind", ["file", "directory", "fifo", "device"])
def test_what_is_no_socket(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s"
    make: dict[str, Callable[[], object]] = {
        "file": path.touch,
        "directory": path.mkdir,
        "fifo": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/null"),
    }
    make[kind]()
    before = stat.S_IFMT(path.lstat().st_mode)
    checks = looked_at(path, monkeypatch)
    assert checks["socket"].state == "failed"
    assert checks["server"].state == "skipped"
    assert f"{path}.2" in checks["socket"].fix
    assert stat.S_IFMT(path.lstat().st_mode) == before


@pytest.mark.parametrize("kind", ["directory", "fifo", "device"])
def test_what_is_no_memory(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "m"
    make: dict[str, Callable[[], object]] = {
        "directory": path.mkdir,
        "fifo": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/null"),
    }
    make[kind]()
    wanted = request.Request(path=str(path), qemu="/bin/true")
    (check,) = (check for check in host.examine_host(wanted) if check.name == "memory")
    assert check.state == "failed"
    assert "not a regular file" in check.found
    assert not any(word in check.fix for word in ("mv ", "rm ", "chmod"))


class TestHolders:
    HEAD = b"Num       RefCount Protocol Flags    Type St Inode Path\n"

    def listeners(
        self, lines: bytes, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> list[str]:
        (tmp_path / "net").mkdir()
        (tmp_path / "net/unix").write_bytes(self.HEAD + lines)
        monkeypatch.setattr(open_files, "PROC", tmp_path)
        links: list[str] = []

        def noted(link: str) -> list[open_files.FoundProcess]:
            links.append(link)
            return []

        monkeypatch.setattr(open_files, "_with_link", noted)
        open_files.processes_listening(path)
        return links

    def test_a_path_that_is_not_utf_8(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lines = b"0: 00000002 00000000 00010000 0001 01 7 /tmp/\xff\n"
        lines += b"0: 00000002 00000000 00010000 0001 01 8 /tmp/s\n"
        assert self.listeners(lines, "/tmp/s", tmp_path, monkeypatch) == ["socket:[8]"]

    def test_a_path_with_a_line_in_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whoever binds such a path could otherwise have the doctor blame another process."""
        lines = b"0: 00000002 00000000 00010000 0001 01 7 /tmp/x\n"
        lines += b"0: 00000002 00000000 00010000 0001 01 9 /tmp/s\n"  # the rest of that path
        lines += b"0: 00000002 00000000 00010000 0001 01 9 /run/other\n"
        lines += b"0: 00000002 00000000 00010000 0001 01 8 /tmp/s\n"
        assert self.listeners(lines, "/tmp/s", tmp_path, monkeypatch) == ["socket:[8]"]
