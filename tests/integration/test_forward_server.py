"""`ivshmem forward` when its server is replaced, or its channel is removed."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import commands
from support.forwards import Forward, Pair, exchanged, is_refused, is_reset, received
from support.waiting import PATIENCE

import ivshmem
from ivshmem import channel
from ivshmem.channel import identity

pytestmark = pytest.mark.usefixtures("commands")


class ServerProcess:
    """A server that a test kills and starts again."""

    def __init__(self, path: str, *words: str) -> None:
        self.path = path
        self._words = [
            *(sys.executable, "-m", "ivshmem", "serve", "-S", path, "-q", *words),
            *("--size", "32M", "--channels", "24M"),
        ]
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(self._words, stdout=subprocess.DEVNULL)
        ivshmem.connect(self.path, timeout=PATIENCE, wait_for_server=True).close()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture
def socket_path(directory: Path) -> str:
    """Which a server that is killed leaves behind."""
    return str(directory / "s")


@contextlib.contextmanager
def served(path: str, *words: str) -> Iterator[ServerProcess]:
    server = ServerProcess(path, *words)
    try:
        yield server
    finally:
        server.kill()


@contextlib.contextmanager
def joined_pair(directory: Path, path: str, *words: object) -> Iterator[Pair]:
    pair = Pair(directory, path, "p", *words)
    try:
        yield pair
    finally:
        pair.close()


def rejoined(*sides: Forward) -> None:
    """Wait until these sides are at work at the new server."""
    for side in sides:
        side.says("joins the new one(?s:.*)p: (listens at|connects to)")


def answers(path: str, pair: Pair) -> None:
    """Check that --stdio, which joins the server of now, reaches the target."""
    words = [sys.executable, "-m", "ivshmem", "forward", "-S", path, "p", "--stdio"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        with pair.accept() as far:
            far.sendall(b"hello")
            far.shutdown(socket.SHUT_WR)
            assert process.communicate(timeout=PATIENCE)[0] == b"hello"
            assert received(far) == b""
    assert process.returncode == 0


@pytest.mark.nightly
def test_a_new_server_with_new_memory(directory: Path, socket_path: str) -> None:
    """Connections continue without a server. When the new one is there, both sides join it."""
    words = ("--connections", 4)
    with served(socket_path) as server, joined_pair(directory, socket_path, *words) as pair:
        with pair.joined() as (near, far):
            server.kill()
            pair.near.says("the server ended the connection: connections continue in its memory")
            assert exchanged(near, far, 100_000, 1)
        with pair.joined() as (near, far):
            near.sendall(b"x")
            assert received(far, 1) == b"x"
            server.start()
            assert is_reset(near)
            assert is_reset(far)
            rejoined(pair.near, pair.far)
        with pair.joined() as (near, far):
            assert exchanged(near, far, 100_000, 2)
        answers(socket_path, pair)
        with ivshmem.connect(socket_path, timeout=PATIENCE) as client:
            with channel.open(client) as channels:
                found = channels.open("p", "bytes")
                assert isinstance(found, channel.Bytes)
                assert found.connections == 4  # whichever side made it


@pytest.mark.sampled(2)
@pytest.mark.parametrize("side", ["near", "far"])
def test_a_side_that_starts_with_the_new_server(
    directory: Path, socket_path: str, side: str
) -> None:
    with served(socket_path) as server, joined_pair(directory, socket_path) as pair:
        server.kill()
        own = pair.near if side == "near" else pair.far
        own.kill()
        server.start()
        own.again()
        own.says("listens at|connects to")
        if side == "near":
            pair.port = own.port()
        rejoined(pair.far if side == "near" else pair.near)
        with pair.joined() as (near, far):
            assert exchanged(near, far, 100_000, 3)
        answers(socket_path, pair)


def test_a_new_server_with_the_same_memory(directory: Path, socket_path: str) -> None:
    """Connections continue; when none is open, both sides join."""
    with served(socket_path, "-f", str(directory / "memory")) as server:
        with joined_pair(directory, socket_path) as pair:
            with pair.joined() as (near, far):
                near.sendall(b"x")
                assert received(far, 1) == b"x"
                server.kill()
                server.start()
                for side in (pair.near, pair.far):
                    side.says("joins it when no connection is open: it has the same memory")
                assert exchanged(near, far, 100_000, 4)
            rejoined(pair.near, pair.far)
            with pair.joined() as (near, far):
                assert exchanged(near, far, 100_000, 5)
            answers(socket_path, pair)


@pytest.mark.nightly
def test_a_new_server_beside_a_virtual_machine(
    directory: Path, socket_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose memory stays that of the old server: the forward stays, too, until it has ended."""
    with served(socket_path) as server, joined_pair(directory, socket_path) as pair:
        monkeypatch.setattr(identity, "machine", lambda: 7)
        with ivshmem.connect(socket_path, timeout=PATIENCE) as client:
            with channel.open(client):
                server.kill()
                server.start()
                for side in (pair.near, pair.far):
                    side.says("stays in the memory of the old one while other machines are at work")
                with pair.joined() as (near, far):
                    assert exchanged(near, far, 100_000, 9)
        rejoined(pair.near, pair.far)
        with pair.joined() as (near, far):
            assert exchanged(near, far, 100_000, 10)


@pytest.mark.nightly
def test_a_signal_after_the_server(directory: Path, socket_path: str) -> None:
    """It ends as ever, also while it waits for a server."""
    with served(socket_path) as server, joined_pair(directory, socket_path) as pair:
        server.kill()
        pair.near.says("connections continue in its memory")
        assert pair.near.end() == 0
        assert pair.far.end() == 0


@pytest.mark.nightly
def test_a_new_server_without_channels(directory: Path, socket_path: str) -> None:
    with served(socket_path) as server:
        words = ("p", "--listen", "tcp:127.0.0.1:0", "--connections", 4)
        side = Forward(directory, "p", socket_path, *words)
        side.says("listens at")
        server.kill()
        with ivshmem.Server(socket_path, "1M").start():
            assert side.process.wait(PATIENCE) == 1
        assert "the region has no room for channels" in side.text()


@pytest.mark.nightly
def test_a_channel_that_is_removed_by_force(directory: Path, socket_path: str) -> None:
    """Its connections are reset, and both sides open it again."""
    with served(socket_path), joined_pair(directory, socket_path) as pair:
        with pair.joined() as (near, far):
            near.sendall(b"x")
            assert received(far, 1) == b"x"
            done = commands.run("channel", "rm", "p", "-S", socket_path, "--force")
            assert done.returncode == 0, done.stderr
            assert is_reset(near)
            assert is_reset(far)
        for side in (pair.near, pair.far):
            side.says("p: the channel was removed: it is opened again")
        with pair.joined() as (near, far):
            assert exchanged(near, far, 100_000, 6)
        answers(socket_path, pair)


def test_a_place_that_is_freed(directory: Path, socket_path: str) -> None:
    """The forward takes another one, as `channel info` shows."""
    with served(socket_path), joined_pair(directory, socket_path) as pair:
        with ivshmem.connect(socket_path, timeout=PATIENCE) as client:
            with channel.open(client) as channels:
                (place,) = (
                    each for each in channels.places() if each.process == pair.far.process.pid
                )
                assert channels.free_place(place.place)
        pair.far.says("place among the channels was freed(?s:.*)p: connects to")
        with pair.joined() as (near, far):
            assert exchanged(near, far, 100_000, 7)


@pytest.mark.nightly
def test_stdio_whose_channel_is_removed(directory: Path, socket_path: str) -> None:
    words = [sys.executable, "-m", "ivshmem", "forward", "-S", socket_path, "p", "--stdio"]
    with served(socket_path), joined_pair(directory, socket_path) as pair:
        with subprocess.Popen(words, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            with pair.accept() as far:
                commands.run("channel", "rm", "p", "-S", socket_path, "--force")
                assert process.wait(PATIENCE) == 1
                assert is_reset(far)
            assert process.stderr is not None
            assert b"forward p: the connection ended early: " in process.stderr.read()


@pytest.mark.nightly
def test_a_stopped_server_is_waited_for(directory: Path, socket_path: str) -> None:
    """One that does not answer does not stop the loop for long, and is joined when it does."""
    with served(socket_path) as server, joined_pair(directory, socket_path) as pair:
        server.kill()
        with socket.socket(socket.AF_UNIX) as mute:
            Path(socket_path).unlink()
            mute.bind(socket_path)
            mute.listen(1)
            pair.near.says("connections continue in its memory")
            with pair.joined() as (near, far):
                assert exchanged(near, far, 100_000, 8)
        Path(socket_path).unlink()
        server.start()
        assert pair.far.process.poll() is None


@pytest.mark.nightly
@pytest.mark.parametrize("side", ["near", "far"])
def test_a_name_that_becomes_another_kind(directory: Path, socket_path: str, side: str) -> None:
    """That forward pauses until the name is free again; others keep their connections."""
    with served(socket_path), socket.create_server(("127.0.0.1", 0)) as target:
        target.settimeout(PATIENCE)
        at = f"tcp:127.0.0.1:{target.getsockname()[1]}"
        ways = {"near": ("--listen", "tcp:127.0.0.1:0"), "far": ("--connect", at)}
        other = "far" if side == "near" else "near"
        both = Forward(
            directory,
            "both",
            socket_path,
            *("q", *ways[side], "--connections", 2),
            "p",
            *ways[side],
        )
        both.says("p: (listens at|connects to)")
        single = Forward(directory, "single", socket_path, "p", *ways[other])
        single.says("listens at|connects to")
        listens = both if side == "near" else single
        port = int(listens.says(r"p: listens at tcp:\S+:([0-9]+)")[1])
        with socket.create_connection(("127.0.0.1", port), PATIENCE) as near:
            far, _ = target.accept()
            with far, ivshmem.connect(socket_path, timeout=PATIENCE) as client:
                far.settimeout(PATIENCE)
                with channel.open(client) as channels:
                    both.process.send_signal(signal.SIGSTOP)  # or it would be quicker
                    channels.remove("q", force=True)
                    channels.create_messages("q", limit=8)
                    both.process.send_signal(signal.SIGCONT)
                    both.says("q: paused: channel 'q' is of kind messages, not bytes; it is tried")
                    if side == "near":
                        own = int(both.says(r"q: listens at tcp:\S+:([0-9]+)")[1])
                        assert is_refused(own)
                        both.says("is refused: the channel was removed")
                    assert both.text().count("q: paused") == 1
                    channels.remove("q")
                    both.says("q: the channel is open again")
                    found = channels.open("q", "bytes")
                    assert isinstance(found, channel.Bytes)
                    assert found.connections == 2
                assert exchanged(near, far, 100_000, 11)
        assert both.end() == single.end() == 0


@pytest.mark.nightly
def test_a_new_server_where_a_name_is_of_another_kind(directory: Path, socket_path: str) -> None:
    with served(socket_path) as server, joined_pair(directory, socket_path) as pair:
        server.kill()
        pair.near.process.send_signal(signal.SIGSTOP)
        pair.far.process.send_signal(signal.SIGSTOP)
        server.start()
        with ivshmem.connect(socket_path, timeout=PATIENCE) as client:
            with channel.open(client) as channels:
                channels.create_messages("p", limit=8)
                for side in (pair.near, pair.far):
                    side.process.send_signal(signal.SIGCONT)
                    side.says("p: paused: channel 'p' is of kind messages, not bytes")
                channels.remove("p")
        rejoined(pair.near, pair.far)
        with pair.joined() as (near, far):
            assert exchanged(near, far, 100_000, 12)
