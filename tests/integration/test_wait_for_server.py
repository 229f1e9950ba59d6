"""A server that is not there yet is waited for, each way of connecting, no longer than asked."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support import commands
from support.peer import FakeServer
from support.waiting import PATIENCE, Background, interrupt_when_asleep, pauses, until

import ivshmem
from ivshmem.aio import connect_async

pytestmark = pytest.mark.usefixtures("commands")


def sync(path: str, timeout: float | None) -> int:
    with ivshmem.connect(path, timeout=timeout, wait_for_server=True) as client:
        return client.id


def in_loop(path: str, timeout: float | None) -> int:
    async def main() -> int:
        async with connect_async(path, timeout=timeout, wait_for_server=True) as client:
            return client.id

    return asyncio.run(main())


def command(path: str, timeout: float | None) -> int:
    limit = [] if timeout is None else ["--timeout", str(timeout)]
    done = commands.run("connect", "--wait", "-S", path, *limit, "-c", "dump")
    if done.returncode:
        assert done.stderr.count("\n") == 1, done.stderr
        raise (TimeoutError if "no server came" in done.stderr else OSError)(done.stderr)
    assert done.stdout.startswith("id 0, 1 vector")
    return 0


Way = Callable[[str, "float | None"], int]
each_way = pytest.mark.parametrize("connect", [sync, in_loop, command])
library_ways = pytest.mark.parametrize("connect", [sync, in_loop])


def make_nothing(path: Path) -> None:
    """The directory is there, the socket is not."""


def make_no_directory(path: Path) -> None:
    path.parent.rmdir()


def make_stale(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


def make_dangling(path: Path) -> None:
    path.symlink_to(path.with_name("nowhere"))


@pytest.fixture
def place(directory: Path) -> Path:
    (directory / "sub").mkdir()
    return directory / "sub" / "s"


@each_way
@pytest.mark.parametrize(
    "before",
    [make_nothing, make_no_directory, make_stale],
    ids=["missing", "no directory", "stale"],
)
def test_the_client_may_come_first(
    place: Path, connect: Way, before: Callable[[Path], None]
) -> None:
    before(place)
    waiting = Background(lambda: connect(str(place), PATIENCE))
    assert waiting.running
    place.parent.mkdir(exist_ok=True)
    with ivshmem.Server(str(place), "64K").start():
        assert waiting.result() == 0
    assert not place.exists()


@pytest.mark.sampled(3)
@each_way
@pytest.mark.parametrize("before", [make_nothing, make_no_directory, make_stale, make_dangling])
def test_no_longer_than_asked(place: Path, connect: Way, before: Callable[[Path], None]) -> None:
    before(place)
    begun = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no server came in 0\.2 seconds: start it"):
        connect(str(place), 0.2)
    assert 0.2 <= time.monotonic() - begun < 15


@library_ways
def test_a_look_without_waiting(place: Path, connect: Way) -> None:
    with pytest.raises(TimeoutError, match="no server came in 0 seconds"):
        connect(str(place), 0)


def make_file(path: Path) -> None:
    path.write_text("x")


def make_parent_a_file(path: Path) -> None:
    path.parent.rmdir()
    path.parent.write_text("x")


def make_datagram(path: Path) -> None:
    """Somebody listens there, and is no server of this kind."""
    global _open
    _open = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    _open.bind(str(path))


_open: socket.socket | None = None


@each_way
@pytest.mark.parametrize("before", [make_file, make_parent_a_file, make_datagram, Path.mkdir])
def test_what_waiting_does_not_help(
    place: Path, connect: Way, before: Callable[[Path], None]
) -> None:
    """What is in the way does not go away by itself."""
    before(place)
    try:
        with pytest.raises(OSError) as found:
            connect(str(place), PATIENCE)
        assert not isinstance(found.value, TimeoutError)
    finally:
        if _open is not None:
            _open.close()


@library_ways
def test_one_that_refuses_is_an_error(socket_path: str, connect: Way) -> None:
    """Or it would be asked again and again."""
    with FakeServer(socket_path, lambda _: None), pytest.raises(ivshmem.ServerGone):
        connect(socket_path, PATIENCE)


def test_without_the_wish_nobody_waits(place: Path) -> None:
    with pytest.raises(FileNotFoundError, match="start the server"):
        ivshmem.connect(str(place), timeout=PATIENCE)
    with pytest.raises(FileNotFoundError):
        asyncio.run(connect_async(str(place), timeout=PATIENCE).__aenter__())


def test_ctrl_c_ends_it_at_once(place: Path) -> None:
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt), interrupt_when_asleep(pauses):
        ivshmem.connect(str(place), wait_for_server=True)
    assert time.monotonic() - begun < 10


def test_where_nobody_says_which(place: Path) -> None:
    """The command looks at the usual places until a server is at one of them."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    place.parent.chmod(0o700)
    place = place.with_name("ivshmem.sock")
    program = f"""
        import os, sys
        from ivshmem.peer import default_paths
        from ivshmem.cli.main import main
        default_paths.OF_ROOT = {str(place)!r}
        default_paths.OF_THE_EXAMPLE = {str(place.with_name("nowhere"))!r}
        default_paths._own = lambda: {str(place.with_name("own"))!r}
        os.environ.pop("XDG_RUNTIME_DIR", None)
        sys.argv = ["ivshmem", "connect", "--wait", *sys.argv[1:]]
        sys.exit(main())
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    late = subprocess.run(
        [*command, "--timeout", "0.1"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=PATIENCE,
        check=False,
    )
    assert late.returncode == 1
    assert "no server within 0.1 seconds: no server was found; looked at" in late.stderr
    with subprocess.Popen(
        [*command, "-c", "dump"], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            with ivshmem.Server(str(place), "64K").start():
                output, _ = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    assert output.startswith("id 0, 1 vector")


def test_ctrl_c_at_the_command(place: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "ivshmem", "connect", "--wait", "-S", str(place), "-c", "dump"],
        stderr=subprocess.PIPE,
        text=True,
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTHON")},
    )
    with process:
        try:
            # It sleeps between looks, which it does when it is past all imports.
            number = Path(f"/proc/{process.pid}/syscall")
            until(lambda: number.read_text().split()[0] in ("230", "35", "115", "101"), "a pause")
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    assert "Traceback" not in errors
    assert process.returncode != 0


def test_a_cancelled_task_leaves_nothing(place: Path) -> None:
    async def main() -> None:
        task = asyncio.ensure_future(in_task())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def in_task() -> None:
        await connect_async(str(place), wait_for_server=True)

    asyncio.run(main())
