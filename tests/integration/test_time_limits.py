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
from support.waiting import Background, until

import ivshmem
from ivshmem import control
from ivshmem.aio import connect_async, publish_async, wait_for_async

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


# What is no time limit, and what refusing it raises. (float() takes a Decimal, so that is one.)
NO_LIMITS: list[Any] = [NAN, "1", b"1", [], {}, object(), 1j]


async def refused_in_asyncio(path: str, bad: Any) -> None:
    """With something there already, so that no call has to wait."""
    errors = (TypeError, ValueError)
    async with connect_async(path, vectors=2) as client:
        client.region.write(0, b"\1")
        word = client.region.atomic_u32(0)
        with ivshmem.Directory.open(client.endpoint) as names:
            names.publish("there")
            calls: list[Callable[[], Any]] = [
                lambda: client.wait(0, bad),
                lambda: client.wait([0], bad),
                lambda: client.wait(None, bad),
                lambda: client.wait_word(word, 0, timeout=bad),
                lambda: client.next_event(bad),
                lambda: anext(client.events(bad)),
                lambda: wait_for_async(names, "there", bad),
                lambda: publish_async(names, "here", timeout=bad),
                lambda: connect_async(path, timeout=bad),
            ]
            for call in calls:
                client.ring(client.id)
                with pytest.raises(errors, match="number"):
                    await call()
            assert await client.wait(0, 0) == len(calls)


def refused(path: str, bad: Any) -> None:
    with ivshmem.Server(path + ".s", "4K") as server:
        client = ivshmem.connect(path)
        with client, ivshmem.Directory.open(client) as names:
            names.publish("there")
            client.ring(client.id)
            calls: list[Callable[[], Any]] = [
                lambda: client.wait(0, bad),
                lambda: client.wait([0], bad),
                lambda: client.wait(None, bad),
                lambda: client.wait_word(client.region.atomic_u32(0), 1, timeout=bad),
                lambda: client.next_event(bad),
                lambda: next(client.events(bad)),
                lambda: names.wait_for("there", bad),
                lambda: names.publish("here", timeout=bad),
                lambda: ivshmem.connect(path, timeout=bad),
                lambda: control.request(path, {}, bad),
                lambda: control.ControlClient(path, bad),
                lambda: server.step(bad),
            ]
            for call in calls:
                with pytest.raises((TypeError, ValueError), match="number"):
                    call()
            assert client.wait(0, 0) == 1


@pytest.mark.parametrize("bad", NO_LIMITS, ids=lambda bad: type(bad).__name__)
def test_what_is_no_limit_is_refused_before_anything_is_taken(tmp_path: Path, bad: Any) -> None:
    path = str(tmp_path / "s")
    with ivshmem.Server(path, "64K", 2, names=True).start():
        Background(lambda: refused(path, bad)).result()
        Background(lambda: asyncio.run(refused_in_asyncio(path, bad))).result()


@pytest.mark.parametrize("wait_for_server", [False, True])
@pytest.mark.parametrize("limit", [0, -1, -0.5])
def test_without_time_nobody_connects(tmp_path: Path, limit: float, wait_for_server: bool) -> None:
    path = str(tmp_path / "s")

    async def in_asyncio() -> None:
        await connect_async(path, timeout=limit, wait_for_server=wait_for_server)

    def connect() -> None:
        ivshmem.connect(path, timeout=limit, wait_for_server=wait_for_server)

    nobody = TimeoutError if wait_for_server else FileNotFoundError
    for call in (connect, lambda: asyncio.run(in_asyncio())):
        with pytest.raises(nobody):
            call()
        with ivshmem.Server(path, "64K").start():
            for _ in range(10):
                with pytest.raises(TimeoutError, match="set-up was not complete in time"):
                    call()


@pytest.mark.parametrize("limit", [float("inf"), 1e20, 3e6, 10**12])
def test_a_request_takes_a_limit_of_any_length(tmp_path: Path, limit: float) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        asking = Background(lambda: control.request(path, {"do": "x"}, limit))
        accepted, _ = server.accept()
        with accepted:
            accepted.sendall(b'{"ok": true}\n')
            assert asking.result() == {}


def test_a_request_without_time_says_so(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(path)
        silent.listen()
        with pytest.raises(TimeoutError, match="no reply within 0 seconds"):
            control.request(path, {"do": "x"}, -1)


@pytest.mark.parametrize("limit", [0, 0.02])
def test_a_step_beside_another_thread_keeps_its_limit(tmp_path: Path, limit: float) -> None:
    with ivshmem.Server(tmp_path / "s", "64K").start() as server:
        until(lambda: server.serving)
        Background(lambda: server.step(limit)).result()
    with ivshmem.Server(tmp_path / "s", "64K") as server:
        other = Background(lambda: server.step(None))
        until(server._turns.under_way.locked)
        Background(lambda: server.step(limit)).result()
        server.stop()  # wakes the other step
        other.result()


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
