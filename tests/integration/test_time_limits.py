"""A time limit that is not a number is refused, wherever one is taken: it would never be over."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from support import commands
from support.stopping import users_environment
from support.waiting import Background

import ivshmem
from ivshmem import control
from ivshmem.aio import connect_async

pytestmark = pytest.mark.usefixtures("commands")

NAN = float("nan")


async def _connected(path: str, wait_for_server: bool) -> None:
    async with connect_async(path, timeout=NAN, wait_for_server=wait_for_server):
        pass


CALLS: dict[str, Callable[[str], object]] = {
    "connect": lambda path: ivshmem.connect(path, timeout=NAN),
    "connect, wait": lambda path: ivshmem.connect(path, timeout=NAN, wait_for_server=True),
    "async": lambda path: asyncio.run(_connected(path, False)),
    "async, wait": lambda path: asyncio.run(_connected(path, True)),
    "control": lambda path: control.ControlClient(path, NAN),
}


@pytest.mark.parametrize("served", [False, True], ids=["no server", "a server"])
@pytest.mark.parametrize("call", CALLS)
def test_a_call(tmp_path: Path, call: str, served: bool) -> None:
    path = str(tmp_path / "s")

    def make() -> None:
        with pytest.raises(ValueError, match="timeout is not a number"):
            CALLS[call](path)

    if served:
        with ivshmem.Server(path, "64K").start():
            Background(make).result()
    else:
        Background(make).result()


SHORT: Any = Decimal("0.02")


async def _nothing_comes(path: str) -> None:
    async with connect_async(path, timeout=SHORT + 9, vectors=1) as client:
        assert await client.wait(0, SHORT) is None
        assert await client.wait([0], SHORT) is None
        assert await client.next_event(SHORT) is None
        assert await client.wait_word(client.region.atomic_u32(0), 0, timeout=SHORT) is None
        assert [event async for event in client.events(SHORT)] == []


def test_a_decimal_is_a_limit_everywhere(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with pytest.raises(TimeoutError):
        ivshmem.connect(path, timeout=SHORT, wait_for_server=True)
    with ivshmem.Server(path, "64K", names=True).start():
        with ivshmem.connect(path, timeout=SHORT + 9) as client:
            assert client.wait(0, SHORT) is None
            assert client.next_event(SHORT) is None
            assert list(client.events(SHORT)) == []
            with ivshmem.Directory.open(client) as names, pytest.raises(TimeoutError):
                names.wait_for("nobody", SHORT)
        asyncio.run(_nothing_comes(path))
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(path)
        silent.listen()
        with pytest.raises(TimeoutError, match="no reply within"):
            control.request(path, {"do": "status"}, SHORT)


def test_text_is_no_limit(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="seconds are a number, not '5'"):
        ivshmem.connect(tmp_path / "s", timeout="5")  # type: ignore[arg-type]


def test_without_a_limit_a_reply_is_waited_for(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as slow:
        slow.bind(path)
        slow.listen()
        asking = Background(lambda: control.request(path, {"do": "version"}))
        accepted, _ = slow.accept()
        with accepted:
            accepted.recv(1 << 10)
            accepted.sendall(b'{"ok": true, "version": "x", "protocol": 1, "pid": 1}\n')
            assert asking.result() == {"version": "x", "protocol": 1, "pid": 1}


@pytest.mark.parametrize("limit", ["nan", "-1", "soon"])
@pytest.mark.parametrize(
    "words",
    [
        ["connect", "-c", "peers"],
        ["connect", "--wait", "-c", "peers"],
        ["save", "f"],
        ["load", "f"],
    ],
    ids=" ".join,
)
def test_a_command(tmp_path: Path, words: list[str], limit: str) -> None:
    done = commands.run(*words, f"--timeout={limit}", env=users_environment(), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"argument --timeout: not a time: {limit} (allowed are 0 seconds or more" in done.stderr
    assert done.stderr.count("\n") == 1


def test_no_limit(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with ivshmem.Server(path, "64K").start():
        for limit in ("inf", "1e300"):
            words = ["connect", "--wait", "-S", path, "--timeout", limit, "-c", "peers"]
            assert commands.run(*words).returncode == 0
