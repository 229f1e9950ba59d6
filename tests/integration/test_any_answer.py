"""Whatever answers at a server's paths: each command ends in time, without a traceback."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from ivshmem.cli.main import main

DEEP = b"[" * 60000
LONG = b'{"ok":true,"regions":[' + b"{}," * 20000 + b"{}]}"


def said(**fields: object) -> bytes:
    return json.dumps({"ok": True, **fields}).encode()


def region(**fields: object) -> bytes:
    """A status whose region is true except for these."""
    true: dict[str, object] = dict.fromkeys(("vectors", "size", "page_size"), 1)
    true |= dict.fromkeys(("socket", "source", "memory", "paused"), "x")
    server = dict.fromkeys(
        ("pid", "uid", "protocol", "since", "time", "cpu", "resident", "pid_namespace"), 1
    )
    fds = {"open": 1, "limit": None}
    each = {"name": "r", "counts": {}, "peers": [], **true, **fields}
    return said(server={"version": "1", "fds": fds, **server}, regions=[each])


def peer(**fields: object) -> bytes:
    numbers = ("id", "pid", "uid", "gid", "vectors", "since", "pending")
    true = {**dict.fromkeys(numbers, 1), "process": "x", "names": [], "readonly": False}
    return region(
        peers=[{**true, "set_up": True, "stalled_since": None, "interrupts": [1], **fields}]
    )


ANSWERS: dict[str, bytes] = {
    "nothing": b"",
    "an empty line": b"\n",
    "zeros": bytes(100) + b"\n",
    "bytes": bytes(range(256)) + b"\n",
    "a word": b"hello\n",
    "HTTP": b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n",
    "SSH": b"SSH-2.0-OpenSSH_9.2\r\n",
    "QMP": b'{"QMP": {"version": {}, "capabilities": []}}\n',
    "D-Bus": b"REJECTED EXTERNAL\r\n",
    "Varlink": b'{"error":"org.varlink.service.MethodNotFound"}\0',
    "ivshmem": struct.pack("<q", 0) * 2 + b"\n",
    "null": b"null\n",
    "true": b"true\n",
    "a number": b"1\n",
    "NaN": b'{"ok":NaN}\n',
    "infinity": b'{"ok":true,"time":1e999}\n',
    "an array": b"[]\n",
    "a string": b'"ok"\n',
    "no ok": b"{}\n",
    "ok is one": b'{"ok":1}\n',
    "ok is a string": b'{"ok":"true"}\n',
    "ok twice": b'{"ok":false,"ok":true}\n',
    "ok only": b'{"ok":true}\n',
    "no error": b'{"ok":false}\n',
    "error is a number": b'{"ok":false,"error":1}\n',
    "error is an object": b'{"ok":false,"error":{"a":[1]}}\n',
    "error of lines": b'{"ok":false,"error":"a\\nb\\r\\nc\\u2028d"}\n',
    "error of escapes": b'{"ok":false,"error":"\\u001b]0;x\\u0007\\u009b31m"}\n',
    "error from right to left": b'{"ok":false,"error":"\\u202eevil"}\n',
    "half a pair": b'{"ok":false,"error":"\\ud800"}\n',
    "a long error": b'{"ok":false,"error":"' + b"x" * 100000 + b'"}\n',
    "deep": DEEP + b"\n",
    "deep, in a field": b'{"ok":true,"regions":' + DEEP + b"\n",
    "long": LONG + b"\n",
    "half a line": b'{"ok":true,',
    "two lines": b'{"ok":true}\n{"ok":true}\n',
    "many digits": b'{"ok":true,"server":' + b"9" * 5000 + b"}\n",
    "regions is null": said(regions=None) + b"\n",
    "regions is an object": said(server={}, regions={}) + b"\n",
    "no regions": said(server={}, regions=[]) + b"\n",
    "changes is a string": said(changes="abc", region=1, read=1, held=1) + b"\n",
    "changes of numbers": said(changes=[1, None], region=[], read=[], held={}) + b"\n",
    "changes of escapes": said(changes=["\x1b[2J\n"], region="\x1b[2J", read=True, held=True)
    + b"\n",
    "a true status": region() + b"\n",
    "a true peer": peer() + b"\n",
    "a region of escapes": region(name="\x1b[2J\nall is well", socket="\x07") + b"\n",
    "a huge region": region(size=(1 << 64) - 1, vectors=2048) + b"\n",
    "a size below zero": region(size=-1) + b"\n",
    "vectors beyond": region(vectors=1 << 40) + b"\n",
    "counts of strings": region(counts={"joins": "x"}) + b"\n",
    "a peer of escapes": peer(process="\x1b[31m\nfix: rm", names=["\x9b"]) + b"\n",
    "a peer of the future": peer(since=1e18) + b"\n",
    "a peer with no interrupts": peer(interrupts=[], vectors=2048) + b"\n",
    "a peer's uid is none": peer(uid=-1, pid=1 << 31) + b"\n",
    "a peer is a list": region(peers=[[]]) + b"\n",
}
COMMANDS = (
    *("status", "status --json", "peers", "evict 1", "hold 1 --linger 1", "release 1", "reload"),
    *(
        pytest.param(command, marks=pytest.mark.nightly)  # these wait, or do more
        for command in ("connect --timeout 0.3", "qemu", "doctor")
    ),
)


@pytest.fixture
def answers(socket_path: str) -> Iterator[list[bytes]]:
    """What a stranger says to each who connects, at both paths."""
    answer = [b""]

    def act(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = listener.accept()
                with sock, contextlib.suppress(OSError):
                    sock.sendall(answer[0])
                    sock.shutdown(socket.SHUT_WR)
                    sock.settimeout(5)
                    while sock.recv(1000):
                        pass

    with contextlib.ExitStack() as undo:
        for path in (socket_path, f"{socket_path}.control"):
            listener = undo.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(path)
            undo.callback(os.unlink, path)
            listener.listen(8)
            thread = threading.Thread(target=act, args=[listener])
            thread.start()
            undo.callback(thread.join)
            undo.callback(listener.shutdown, socket.SHUT_RDWR)
        yield answer


@pytest.mark.parametrize("command", COMMANDS)
def test_each_answer(
    answers: list[bytes], socket_path: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    word, *more = command.split()
    for what, data in ANSWERS.items():
        if word == "doctor" and not what.startswith(("a peer", "deep", "error", "NaN")):
            continue  # it takes longer
        answers[0] = data
        status: object
        try:
            status = main([word, "-S", socket_path, *more])
        except SystemExit as end:
            status = end.code
        except BaseException as error:
            pytest.fail(f"{command}, {what}: {error!r}")
        out, err = capsys.readouterr()
        both = (out + err).replace("\n", "")
        assert both.isprintable(), f"{command}, {what}: {both!r}"
        assert "Traceback" not in both, f"{command}, {what}"
        assert status is not None
        if status != 0 and word != "doctor":
            assert err.count("\n") == 1, f"{command}, {what}: {err!r}"
            assert len(err) < 3000, f"{command}, {what}: {len(err)}"
