"""What a monitor can be that is none, or is busy; that of a real QEMU is in tests/vm."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from ivshmem.errors import QemuGone, QmpError
from ivshmem.qemu.monitor import Monitor

GREETING = (
    b'{"QMP": {"version": {"qemu": {"micro": 0, "minor": 0, "major": 9}}, "capabilities": []}}\n'
)
DONE = b'{"return": {}, "id": "__ivshmem#00000"}\n'


def talk(address: Path | str, seconds: float = 0.5) -> None:
    async def main() -> None:
        async with Monitor(str(address), "vm", seconds) as monitor:
            await monitor.execute("query-status")

    asyncio.run(main())


class Liar:
    """Listens, and does to each client what it is told."""

    def __init__(self, path: Path, act: Callable[[socket.socket], object]) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._act = act
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        # shutdown() ends the accept().
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                with client, contextlib.suppress(ConnectionError):
                    self._act(client)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def __enter__(self) -> Liar:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def until_closed(client: socket.socket) -> None:
    while client.recv(4096):
        pass


def greet_and_listen(client: socket.socket) -> None:
    client.sendall(GREETING)
    until_closed(client)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (until_closed, "no greeting within 0.5 s"),
        (greet_and_listen, "no greeting within 0.5 s"),
        (lambda client: client.sendall(b"QEMU 7.2.22 monitor\n(qemu) "), "is not a QMP monitor"),
        (lambda client: client.sendall(b""), "is not a QMP monitor"),
        (lambda client: client.sendall(b"\xff" * 100_000), "is not a QMP monitor"),
    ],
)
def test_what_is_no_monitor(
    directory: Path, act: Callable[[socket.socket], object], reason: str
) -> None:
    with (
        Liar(directory / "qmp", act),
        pytest.raises(QmpError, match=reason) as error,
    ):
        talk(directory / "qmp")
    assert "\n" not in str(error.value)


def agree(client: socket.socket) -> bytes:
    """Greet, and take the capabilities; returns what comes next."""
    client.sendall(GREETING)
    asked = client.recv(4096)
    ident = asked.split(b'"id": "')[-1].split(b'"')[0] if b'"id": "' in asked else b""
    ident = ident or asked.split(b'"id":"')[-1].split(b'"')[0]
    client.sendall(b'{"return": {}, "id": "' + ident + b'"}\n')
    return client.recv(4096)


def test_it_ends_in_the_middle(directory: Path) -> None:
    with Liar(directory / "qmp", agree), pytest.raises(QemuGone, match="vm: QEMU has ended"):
        talk(directory / "qmp", 20)


def test_it_hangs_up_at_first(directory: Path) -> None:
    """As QEMU on somebody who comes in the moment when another client goes."""
    calls = []

    def late(client: socket.socket) -> None:
        calls.append(1)
        if len(calls) == 3:
            agree(client)

    with Liar(directory / "qmp", late), pytest.raises(QemuGone):
        talk(directory / "qmp", 20)
    assert len(calls) == 3


@pytest.mark.parametrize(
    "late",
    [b'{"event": "STOP", "timestamp": {"seconds": 1, "microseconds": 0}}', b'{"return": {}}'],
)
def test_it_has_something_for_the_last_client(directory: Path, late: bytes) -> None:
    """QEMU sent it before its greeting: an event, or the answer to a query that was cancelled."""
    calls = []

    def act(client: socket.socket) -> None:
        calls.append(1)
        if len(calls) < 3:
            client.sendall(late + b"\r\n")
        else:
            agree(client)

    with Liar(directory / "qmp", act), pytest.raises(QemuGone):
        talk(directory / "qmp", 20)
    assert len(calls) == 3


@pytest.mark.nightly
def test_what_is_json_and_no_monitor(directory: Path) -> None:
    with (
        Liar(directory / "qmp", lambda client: client.sendall(b"{}\n")),
        pytest.raises(QmpError, match="is not a QMP monitor"),
    ):
        talk(directory / "qmp")


def test_it_does_not_answer(directory: Path) -> None:
    def silent(client: socket.socket) -> None:
        agree(client)
        until_closed(client)

    with Liar(directory / "qmp", silent), pytest.raises(QmpError, match="no answer to query-st"):
        talk(directory / "qmp")


@pytest.mark.parametrize("address", ["nowhere", "host:", "host:99999", "host:x"])
def test_no_address(address: str) -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        talk(address)


def test_nobody_there(directory: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is the QEMU of vm running") as error:
        talk(directory / "qmp")
    assert error.value.filename == str(directory / "qmp")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(ConnectionRefusedError):
            talk(f"127.0.0.1:{free.getsockname()[1]}")


def test_a_queue_that_is_full(directory: Path) -> None:
    """A Unix socket says EAGAIN then, which is not "under way"."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory / "qmp"))
        listener.listen(0)
        with socket.socket(socket.AF_UNIX) as first:
            first.connect(str(directory / "qmp"))
            with pytest.raises(QmpError, match="no answer at"):
                talk(directory / "qmp")


def test_without_the_library(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    monkeypatch.setitem(sys.modules, "qemu.qmp", None)
    with pytest.raises(QmpError, match=r"pip install qemu.qmp"):
        talk(directory / "qmp")
