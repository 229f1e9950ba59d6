"""A time limit that is not a number is refused, wherever one is taken: it would never be over."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.stopping import users_environment
from support.waiting import PATIENCE, Background

import ivshmem
from ivshmem import control
from ivshmem.aio import connect_async

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
    done = subprocess.run(
        [sys.executable, "-m", "ivshmem", *words, f"--timeout={limit}"],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env=users_environment(),
        cwd=tmp_path,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert f"argument --timeout: not a time: {limit} (allowed are 0 seconds or more" in done.stderr
    assert done.stderr.count("\n") == 1


def test_no_limit(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with ivshmem.Server(path, "64K").start():
        for limit in ("inf", "1e300"):
            words = ["connect", "--wait", "-S", path, "--timeout", limit, "-c", "peers"]
            subprocess.run(
                [sys.executable, "-m", "ivshmem", *words],
                stdout=subprocess.DEVNULL,
                timeout=PATIENCE,
                check=True,
            )
