"""Nothing at an exit waits for a reader: outputs that nobody reads, by ends, by commands."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import pty
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.waiting import PATIENCE, until

from ivshmem import ServerGone, connect

IVSHMEM = [sys.executable, "-m", "ivshmem"]
EXAMPLE = str(Path(sysconfig.get_path("scripts")) / "ivshmem-server")
SECONDS = 6.0  # for an end; on a quiet machine all take less than two

SERVERS: dict[str, Callable[[Path], list[str]]] = {
    "serve": lambda place: [*IVSHMEM, "serve", "-S", f"{place}/s"],
    "verbose": lambda place: [*IVSHMEM, "serve", "-v", "-S", f"{place}/s"],
    "json": lambda place: [*IVSHMEM, "serve", "--log-format", "json", "-S", f"{place}/s"],
    "supervised": lambda place: [*IVSHMEM, "serve", "--supervise", "-S", f"{place}/s"],
    "example": lambda place: [
        *(EXAMPLE, "-F", "-v", "-S", f"{place}/s", "-m", str(place), "-l", "64K")
    ],
}
ENDS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]

# -- outputs: the descriptor, or words that open it ------------------------------------------------


def fill(fd: int) -> None:
    os.set_blocking(fd, False)
    for size in (4096, 1):
        with contextlib.suppress(BlockingIOError):
            while os.write(fd, b"x" * size):
                pass
    os.set_blocking(fd, True)


@contextlib.contextmanager
def full_pipe(_place: Path) -> Iterator[int]:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    fill(writer)
    yield writer
    os.close(reader)
    os.close(writer)


@contextlib.contextmanager
def full_socket(_place: Path) -> Iterator[int]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        fill(theirs.fileno())
        yield theirs.fileno()


@contextlib.contextmanager
def stopped_terminal(_place: Path) -> Iterator[int]:
    master, slave = pty.openpty()
    os.write(master, b"\x13")  # Ctrl-S
    yield slave
    os.close(master)
    os.close(slave)


@contextlib.contextmanager
def gone_terminal(_place: Path) -> Iterator[int]:
    master, slave = pty.openpty()
    os.close(master)
    yield slave
    os.close(slave)


@contextlib.contextmanager
def no_reader(place: Path) -> Iterator[int]:
    os.mkfifo(place / "fifo")
    both = os.open(place / "fifo", os.O_RDWR)
    writer = os.open(place / "fifo", os.O_WRONLY)
    os.close(both)
    yield writer
    os.close(writer)


@contextlib.contextmanager
def opened(path: str, flags: int) -> Iterator[int]:
    fd = os.open(path, flags)
    yield fd
    os.close(fd)


FULL_DISK = """
mount -t tmpfs -o size=4k none "$0" && head -c 4096 /dev/zero > "$0/log" || exit 99
exec "$@" >> "$0/log" 2>&1
"""
WORDS: dict[str, Callable[[Path], list[str]]] = {
    "closed": lambda _: ["sh", "-c", 'exec "$@" >&- 2>&-', "sh"],
    "stdin closed, too": lambda _: ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"],
    "full disk": lambda place: ["unshare", "-m", "sh", "-c", FULL_DISK, str(place / "disk")],
}
OUTPUTS: dict[str, Callable[[Path], contextlib.AbstractContextManager[int]]] = {
    "full pipe": full_pipe,
    "full socket": full_socket,
    "Ctrl-S": stopped_terminal,
    "terminal gone": gone_terminal,
    "no reader": no_reader,
    "/dev/full": lambda _: opened("/dev/full", os.O_WRONLY),
    "for reading": lambda _: opened("/dev/null", os.O_RDONLY),
}


@contextlib.contextmanager
def started(
    words: list[str], output: str, place: Path, ends: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Run it in a session of its own, with that output at stdout, stderr or both."""
    if output in WORDS:
        if output == "full disk":
            if os.geteuid():
                pytest.skip("mounting needs root")
            (place / "disk").mkdir()
        words = [*WORDS[output](place), *words]
        opened: contextlib.AbstractContextManager[int] = contextlib.nullcontext(subprocess.DEVNULL)
    else:
        opened = OUTPUTS[output](place)
    errors = place / "errors"
    with opened as fd, errors.open("wb") as plain:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=fd if ends in ("stdout", "both") else plain,
            stderr=fd if ends in ("stderr", "both") else plain,
            start_new_session=True,
            env={k: v for k, v in os.environ.items() if not k.startswith("PYTHON")},
        )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(PATIENCE)
    assert b"Traceback" not in errors.read_bytes()
    assert b"Exception ignored" not in errors.read_bytes()


def status_of(process: subprocess.Popen[bytes]) -> int:
    begun = time.monotonic()
    try:
        status = process.wait(SECONDS)
    except subprocess.TimeoutExpired:
        raise AssertionError(
            f"it waits still, {time.monotonic() - begun:.1f} s after the signal"
        ) from None
    return 128 - status if status < 0 else status


CASES = list(itertools.product(SERVERS, [*OUTPUTS, *WORDS], ENDS))
QUICK = [
    ("serve", "full pipe", signal.SIGTERM),
    ("json", "Ctrl-S", signal.SIGINT),
    ("supervised", "full socket", signal.SIGHUP),
    ("example", "closed", signal.SIGTERM),
    ("verbose", "full disk", signal.SIGTERM),
]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("server", "output", "end"),
    [
        *QUICK,
        *(pytest.param(*case, marks=pytest.mark.nightly) for case in CASES if case not in QUICK),
    ],
)
def test_a_server_ends(directory: Path, server: str, output: str, end: signal.Signals) -> None:
    path = directory / "s"
    with started(SERVERS[server](directory), output, directory, "both") as process:

        def joined() -> bool:
            assert process.poll() is None, f"it ended by itself: {process.returncode}"
            with contextlib.suppress(OSError, ServerGone):
                connect(path, timeout=PATIENCE).close()
                return True
            return False

        until(joined)
        for _ in range(3):  # more to be told
            connect(path, timeout=PATIENCE).close()
        process.send_signal(end)
        assert status_of(process) in (0, 128 + end)
        assert not os.path.lexists(path), "the socket was left behind"


@pytest.mark.nightly
@pytest.mark.parametrize("which", ["stdout", "stderr"])
@pytest.mark.parametrize("output", OUTPUTS)
def test_one_of_the_two(directory: Path, output: str, which: str) -> None:
    path = directory / "s"
    with started(SERVERS["verbose"](directory), output, directory, which) as process:
        until(lambda: os.path.lexists(path))
        connect(path, timeout=PATIENCE, wait_for_server=True).close()
        process.send_signal(signal.SIGTERM)
        assert status_of(process) in (0, 143)
        assert not os.path.lexists(path)


# -- commands that end by themselves, if they need not wait for a reader ---------------------------

COMMANDS: dict[str, list[str]] = {
    "connect": ["connect", "-S", "{s}", "-c", "hexdump 0 256; int 0 0; names"],
    "watch": ["connect", "-S", "{s}", "-c", "watch 0.2"],
    "connect --json": ["connect", "--json", "-S", "{s}", "-c", "peers; hexdump 0 256"],
    "status": ["status", "-S", "{s}"],
    "status --json": ["status", "--json", "-S", "{s}"],
    "qemu": ["qemu", "-S", "{s}"],
    "help": ["--help"],
    "help of serve": ["serve", "--help"],
    "version": ["-V"],
    "wrong option": ["serve", "--szie", "1"],
    "wrong configuration": ["serve", "--config", "/dev/null/x"],
    "nobody there": ["status", "-S", "/nonexistent/s"],
    "path too long": ["serve", "-S", "/tmp/" + "x" * 200],
}
BLOCKS = ("full pipe", "full socket", "Ctrl-S")
BY_THEMSELVES = [
    (command, output, end)
    for command in COMMANDS
    for output in [*OUTPUTS, "closed", "stdin closed, too"]
    for end in (ENDS[:2] if output in BLOCKS else [signal.SIGTERM])
]
SOON = [
    ("status", "full pipe", signal.SIGINT),
    ("version", "full pipe", signal.SIGINT),
    ("nobody there", "Ctrl-S", signal.SIGINT),
    ("help", "/dev/full", signal.SIGTERM),
    ("watch", "no reader", signal.SIGTERM),
]
LATER = [pytest.param(*c, marks=pytest.mark.nightly) for c in BY_THEMSELVES if c not in SOON]


@pytest.mark.sampled(8)
@pytest.mark.parametrize(("command", "output", "end"), [*SOON, *LATER])
def test_a_command_ends(directory: Path, command: str, output: str, end: signal.Signals) -> None:
    words = [*IVSHMEM, *(word.format(s=directory / "s") for word in COMMANDS[command])]
    with contextlib.ExitStack() as undo:
        if "{s}" in COMMANDS[command]:
            served = subprocess.Popen(
                [*IVSHMEM, "serve", "-S", str(directory / "s"), "-q"],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            undo.callback(served.wait, PATIENCE)
            undo.callback(served.terminate)
            connect(directory / "s", wait_for_server=True, timeout=PATIENCE).close()
        process = undo.enter_context(started(words, output, directory, "both"))
        if output in BLOCKS:
            # It may wait for a reader, as cat does, until a signal comes.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)
            process.send_signal(end)
        assert status_of(process) in (0, 1, 2, 128 + end)
