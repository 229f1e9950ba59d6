"""Nothing at the exit of a process waits for a reader: whatever its output is, SIGTERM ends it.

And a reader that is gone is no failure of a server.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import sysconfig
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.peer import RawPeer
from support.stopping import users_environment
from support.unread import Output
from support.waiting import PATIENCE, until

IVSHMEM = [sys.executable, "-m", "ivshmem"]
SCRIPTS = Path(sysconfig.get_path("scripts"))

SERVERS = {
    "serve": [*IVSHMEM, "serve"],
    "json": [*IVSHMEM, "serve", "--log-format", "json"],
    "supervised": [*IVSHMEM, "serve", "--supervise"],
    "example": [str(SCRIPTS / "ivshmem-server"), "-F", "-v", "-M", f"ivshmem-reads-{os.getpid()}"],
}


KINDS = ("terminal, Ctrl-S", "terminal", "pipe", "socket")


@pytest.fixture
def output(request: pytest.FixtureRequest) -> Iterator[Output]:
    output = Output(request.param)
    yield output
    output.close()


@contextlib.contextmanager
def started(command: list[str], stdout: int, stderr: int) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, env=users_environment()
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def joins(path: str, number: int) -> None:
    for _ in range(number):
        until(lambda: os.path.exists(path), "a socket")
        peer = until(lambda: _peer(path), "a peer")
        peer.set_up(1)
        peer.close()


def _peer(path: str) -> RawPeer | None:
    try:
        return RawPeer(path)
    except OSError:
        return None


@pytest.mark.sampled(18)
@pytest.mark.parametrize("when", ["from the start", "later"])
@pytest.mark.parametrize("output", KINDS, indirect=True)
@pytest.mark.parametrize("server", SERVERS)
def test_a_server_whose_output_nobody_reads(
    tmp_path: Path, server: str, output: Output, when: str
) -> None:
    path = str(tmp_path / "socket")
    if when == "from the start":
        output.block()
    with started([*SERVERS[server], "-S", path, "-l", "64K"], output.end, output.end) as process:
        joins(path, 1)
        if when == "later":
            output.block()
        joins(path, 3)
        process.terminate()
        assert process.wait(PATIENCE) == 0
    assert not os.path.lexists(path)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("gone", ["stdout", "stderr"])
@pytest.mark.parametrize("server", SERVERS)
def test_a_server_whose_reader_goes(tmp_path: Path, server: str, gone: str) -> None:
    """Its exit status says how the server ended, not whether anybody read that."""
    path = str(tmp_path / "socket")
    output = Output("pipe")
    with contextlib.closing(output), open(os.devnull, "wb") as null:
        ends = (output.end, null.fileno())
        stdout, stderr = ends if gone == "stdout" else ends[::-1]
        with started([*SERVERS[server], "-S", path, "-l", "64K"], stdout, stderr) as process:
            joins(path, 1)
            output.let_go()
            joins(path, 3)
            process.terminate()
            assert process.wait(PATIENCE) == 0


COMMANDS = {
    "help": ["--help"],
    "version": ["--version"],
    "qemu": ["qemu", "--plain", "/dev/shm/none", "-l", "4M"],
    "an error": ["status", "-S", "/no/such/socket"],
    "wrong usage": ["serve", "--szie", "4M"],
}


@pytest.mark.parametrize("read", [True, False])
def test_what_else_breaks_is_said(read: bool) -> None:
    """Only when standard output is unread is a broken pipe no news: others break, too."""
    code = (
        "import errno, sys; from ivshmem.cli.run import guarded\n"
        "def run(): raise BrokenPipeError(errno.EPIPE, 'the server has closed the connection')\n"
        "sys.stdin.read(); raise SystemExit(guarded(run))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=users_environment(),
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        if not read:
            process.stdout.close()
        process.stdin.close()
        said = process.stderr.read()
    assert process.returncode == 1
    assert said == (b"ivshmem: the server has closed the connection\n" if read else b"")


@pytest.mark.sampled(3)
@pytest.mark.parametrize("where", ["closed pipe", "/dev/full"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_whose_reader_is_gone(tmp_path: Path, command: str, where: str) -> None:
    """It ends as told by its own work, without Python's complaint and status 120."""
    if where == "/dev/full":
        end = os.open(where, os.O_WRONLY)
    else:
        reader, end = os.pipe()
        os.close(reader)
    try:
        for stream in ("stdout", "stderr"):
            other = tmp_path / stream
            with other.open("w") as file:
                done = subprocess.run(
                    [*IVSHMEM, *COMMANDS[command]],
                    stdout=end if stream == "stdout" else file,
                    stderr=end if stream == "stderr" else file,
                    env=users_environment(),
                    check=False,
                )
            assert done.returncode in (0, 1, 2), stream
            assert "Traceback" not in other.read_text()
            assert "Exception ignored" not in other.read_text()
    finally:
        os.close(end)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("state", ["Ctrl-S", "full"])
def test_top_on_a_terminal_that_nobody_reads(tmp_path: Path, state: str, number: int) -> None:
    path = str(tmp_path / "socket")
    output = Output("terminal, Ctrl-S" if state == "Ctrl-S" else "terminal")
    with (
        contextlib.closing(output),
        started([*IVSHMEM, "serve", "-q", "-S", path, "-l", "64K"], -3, -3),
    ):
        joins(path, 1)
        until(lambda: os.path.exists(f"{path}.control"))
        top = subprocess.Popen(
            [*IVSHMEM, "top", "-S", path],
            stdin=output.end,
            stdout=output.end,
            stderr=subprocess.DEVNULL,
            env=users_environment(TERM="xterm"),
            start_new_session=True,
        )
        try:
            until(lambda: termios.tcgetattr(output.end)[3] & termios.ICANON == 0, "top's screen")
            output.block()
            until(lambda: _in_write_or_waits(top.pid))
            top.send_signal(number)
            # Ctrl-C is a way to leave it.
            assert top.wait(PATIENCE) == (0 if number == signal.SIGINT else 128 + number)
        finally:
            top.kill()
            top.wait()


def _in_write_or_waits(pid: int) -> bool:
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"
    return False


def test_news_is_complete_where_somebody_reads(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    news = tmp_path / "news"
    with (
        news.open("w") as file,
        started([*IVSHMEM, "serve", "-S", path], subprocess.DEVNULL, file.fileno()) as process,
    ):
        joins(path, 50)
        process.terminate()
        assert process.wait(PATIENCE) == 0
    lines = news.read_text().splitlines()
    assert sum("joined" in line for line in lines) == 50
