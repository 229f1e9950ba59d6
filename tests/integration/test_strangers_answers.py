"""Whatever a control socket or a server answers: one line that says so, and never a traceback."""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ivshmem import control
from ivshmem.cli import evict, reload, status, top
from ivshmem.cli import run as cli_run
from ivshmem.errors import IvshmemError, ServerGone
from ivshmem.peer import inquiry
from ivshmem.service import control_client

PEER: dict[str, Any] = {
    "id": 3,
    "pid": 71,
    "uid": 0,
    "gid": 0,
    "process": "qemu",
    "names": ["a"],
    "vectors": 2,
    "since": 1.7e9,
    "readonly": False,
    "set_up": True,
    "pending": 4,
    "stalled_since": 1.7e9,
    "leaves_told": 1,
    "leaves_held": 2,
    "interrupts": [0, 5],
}
REGION: dict[str, Any] = {
    "name": "db",
    "socket": "/s",
    "unreachable": "",
    "vectors": 2,
    "size": 4096,
    "page_size": 4096,
    "file_system": "tmpfs",
    "source": "posix",
    "memory": "m",
    "paused": "x",
    "holds_leaves": True,
    "channels": 65536,
    "counts": {"joins": 3, "leaves": 2},
    "peers": [PEER],
}
SERVER: dict[str, Any] = {
    "pid": 70,
    "uid": 0,
    "version": "0.1.0",
    "protocol": 1,
    "since": 1.7e9,
    "time": 1.8e9,
    "cpu": 0.5,
    "resident": 1 << 20,
    "fds": {"open": 9, "limit": None},
    "pid_namespace": 1,
}
STATUS: dict[str, Any] = {"ok": True, "server": SERVER, "regions": [REGION]}
REPLIES = {
    "status": STATUS,
    "evict": {"ok": True, "region": "db"},
    "reload": {"ok": True, "changes": ["region db: added"]},
}
RUN = {"status": status.run, "evict": evict.run, "reload": reload.run}
WRONG: list[Any] = [
    *(None, True, False, -1, 7, 1 << 63, 1 << 64, 0.5, -0.5, 1e18, 1e300, "", "x", "\ud800"),
    *("\x1b[2J\nfix: rm", "\u202e", [], [[]], [None], ["x"], {}, {"a": 1}, {"": {}}),
]

BYTES = {
    "nothing": b"",
    "an empty line": b"\n",
    "no object": b"[]\n",
    "null": b"null\n",
    "a string": b'"ok"\n',
    "no ok": b"{}\n",
    "ok is a number": b'{"ok": 1}\n',
    "ok is null": b'{"ok": null}\n',
    "an error that is a number": b'{"ok": false, "error": 7}\n',
    "an error that is an object": b'{"ok": false, "error": {"a": []}}\n',
    "no error": b'{"ok": false}\n',
    "an error with an escape sequence": b'{"ok": false, "error": "a\\u001b[2J\\nb"}\n',
    "an error with a lone surrogate": b'{"ok": false, "error": "\\ud800"}\n',
    "a long error": b'{"ok": false, "error": "' + b"x" * 70_000 + b'"}\n',
    "truncated": json.dumps(STATUS).encode()[:-40],
    "a truncated line": json.dumps(STATUS).encode()[:-40] + b"\n",
    "deep arrays": b"[" * 200_000 + b"\n",
    "deep objects": b'{"ok":' * 200_000 + b"\n",
    "a deep field": b'{"ok": true, "server": ' + b"[" * 5000 + b"]" * 5000 + b"}\n",
    "not a number": b'{"ok": true, "server": NaN}\n',
    "infinity": b'{"ok": true, "server": -Infinity}\n',
    "a float that is none": b'{"ok": true, "server": 1e9999}\n',
    "a long integer": b'{"ok": true, "server": ' + b"1" * 10_000 + b"}\n",
    "not UTF-8": b'{"ok": true, "server": "\xff"}\n',
    "UTF-16": '{"ok": true}\n'.encode("utf-16"),
    "zeros": b"\0" * 5000 + b"\n",
    "one field twice": b'{"ok": true, "ok": false}\n',
    "two lines": b'{"ok": false, "error": "a"}\n{"ok": true}\n',
}


class Stranger:
    """Answers each request, on each connection, with what `data` is at that moment."""

    def __init__(self, path: str) -> None:
        self.data = b""
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while True:
            sock, _ = self._listener.accept()
            with sock, contextlib.suppress(OSError):
                if self.data == b"end":
                    return
                sock.settimeout(5)
                while sock.recv(1 << 16):
                    sock.sendall(self.data)
                    if not self.data.endswith(b"\n"):
                        break

    def end(self, path: str) -> None:
        self.data = b"end"
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(path)
        self._thread.join()
        self._listener.close()
        os.unlink(path)


@pytest.fixture
def stranger(socket_path: str) -> Iterator[Stranger]:
    made = Stranger(socket_path)
    yield made
    made.end(socket_path)


Said = Callable[..., tuple[int, str, str]]


@pytest.fixture
def said(socket_path: str, capsys: pytest.CaptureFixture[str]) -> Said:
    """Exit status and output of a command; all that it prints can be shown on a terminal."""

    def run(command: str, **options: Any) -> tuple[int, str, str]:
        known = {"control": socket_path, "socket": None, "id": 3, "region": None, "json": False}
        # Not by way of main: to make the parser takes longer than all the rest.
        code = cli_run.guarded(RUN[command], argparse.Namespace(**{**known, **options}))
        out, err = capsys.readouterr()
        assert all(line.isprintable() for line in (out + err).splitlines())
        assert (code, err.count("\n")) in ((0, 0), (1, 1)), (code, out, err)
        assert "fix: rm" not in [line.strip() for line in out.splitlines()]
        assert len(err) < 6000
        return code, out, err

    return run


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in a reply."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for number, each in enumerate(value):
            yield from places(each, (*path, number))


def mutants(whole: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Each place of a reply with each wrong value, or left out."""
    for path in list(places(whole))[1:]:
        for wrong in (*WRONG, "absent"):
            changed = copy.deepcopy(whole)
            where: Any = changed
            for step in path[:-1]:
                where = where[step]
            if wrong == "absent":
                del where[path[-1]]
            else:
                where[path[-1]] = wrong
            yield changed


@pytest.mark.parametrize("command", list(RUN))
def test_a_true_reply(stranger: Stranger, said: Said, command: str) -> None:
    stranger.data = json.dumps(REPLIES[command]).encode() + b"\n"
    assert said(command)[0] == 0


@pytest.mark.parametrize("command", list(RUN))
@pytest.mark.parametrize("what", list(BYTES))
def test_bytes(stranger: Stranger, said: Said, command: str, what: str) -> None:
    stranger.data = BYTES[what]
    assert said(command)[0] == 1


@pytest.mark.parametrize("command", list(RUN))
def test_every_field_with_every_wrong_value(stranger: Stranger, said: Said, command: str) -> None:
    for changed in mutants(REPLIES[command]):
        stranger.data = json.dumps(changed).encode() + b"\n"
        code, _, err = said(command)
        if code:
            assert any(
                words in err
                for words in ("makes no sense", "is not a control socket", "it could not be done")
            ), (changed, err)


def test_json_of_every_mutant_is_json(stranger: Stranger, said: Said) -> None:
    for changed in mutants(STATUS):
        stranger.data = json.dumps(changed).encode() + b"\n"
        code, out, _ = said("status", json=True)
        if code == 0:
            json.loads(out)


def test_top(stranger: Stranger, socket_path: str) -> None:
    """Also when one answer is compared with another one."""
    options = argparse.Namespace(control=socket_path, socket=None)
    for changed in itertools.islice(mutants(STATUS), 0, None, 3):
        with contextlib.closing(top.StatusPoller(options)) as looks:
            stranger.data = json.dumps(STATUS).encode() + b"\n"
            looks.first()
            stranger.data = json.dumps(changed).encode() + b"\n"
            looks.next()
            stranger.data = json.dumps(STATUS).encode() + b"\n"
            looks.next()


def test_silence(socket_path: str, said: Said) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(socket_path)
        silent.listen()
        late = pytest.raises(TimeoutError, match=r"no reply within 0\.1 seconds")
        with control.ControlClient(socket_path, 0.1) as client, late:
            client.ask({"do": "status"})
    os.unlink(socket_path)


def test_an_endless_line(stranger: Stranger, said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_client, "_MOST_REPLY", 1 << 16)
    stranger.data = b"x" * (1 << 20)
    assert "is not a control socket" in said("status")[2]


ANSWER = {"protocol": 0, "vectors": 2, "size": 4096, "page_size": 4096, "peers": 1}


class TestQuestions:
    """What `sockets.ask` takes for the answer of a server of this package."""

    @staticmethod
    def ask(path: str, data: bytes) -> dict[str, int]:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()

            def answer() -> None:
                sock, _ = listener.accept()
                with sock, contextlib.suppress(OSError):
                    sock.sendall(data)

            thread = threading.Thread(target=answer)
            thread.start()
            try:
                return inquiry.ask(path, 5)
            finally:
                thread.join()
                os.unlink(path)

    def test_a_true_answer(self, socket_path: str) -> None:
        assert self.ask(socket_path, json.dumps(ANSWER).encode()) == ANSWER

    @pytest.mark.parametrize("what", list(BYTES))
    def test_bytes(self, socket_path: str, what: str) -> None:
        with pytest.raises(ServerGone) as caught:
            self.ask(socket_path, BYTES[what])
        assert str(caught.value).isprintable()

    def test_every_field_with_every_wrong_value(self, socket_path: str) -> None:
        for changed in mutants(ANSWER):
            with contextlib.suppress(ServerGone):
                answer = self.ask(socket_path, json.dumps(changed).encode())
                assert set(ANSWER) <= set(answer)
                assert all(type(value) is int for value in answer.values())
                assert answer["size"] > 0


def test_an_error_is_the_package_s(stranger: Stranger, socket_path: str) -> None:
    """In Python, too."""
    for changed in mutants(STATUS):
        stranger.data = json.dumps(changed).encode() + b"\n"
        with contextlib.suppress(IvshmemError):
            control.request(socket_path, {"do": "status"})
