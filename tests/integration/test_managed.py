"""`ivshmem serve` under a service manager: sockets that it passes, descriptors that it keeps.

The peers are strict: what is told twice, out of order or not at all fails the test.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.manager import Manager
from support.peer import RawPeer
from support.waiting import PATIENCE, until

from ivshmem import control

VECTORS = 2
SERVE = [sys.executable, "-m", "ivshmem", "serve"]

Manage = Callable[..., Manager]


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "socket")


@pytest.fixture
def region(path: str) -> list[str]:
    return [*SERVE, "-S", path, "-l", "64K", "-n", str(VECTORS)]


@pytest.fixture
def manage(tmp_path: Path) -> Iterator[Manage]:
    with contextlib.ExitStack() as stack:

        def make(*command: str, **kwargs: object) -> Manager:
            manager = Manager(command, tmp_path, **kwargs)  # type: ignore[arg-type]
            stack.callback(manager.close)
            manager.start()
            return manager

        yield make


@pytest.fixture
def peers() -> Iterator[list[RawPeer]]:
    there: list[RawPeer] = []
    yield there
    for peer in there:
        peer.close()


@pytest.fixture
def listener(path: str) -> Iterator[socket.socket]:
    """As a socket unit has it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind(path)
        sock.listen()
        yield sock


def connected(path: str) -> RawPeer | None:
    """A peer, if somebody listens already: a socket is bound a moment before that."""
    try:
        return RawPeer(path)
    except (FileNotFoundError, ConnectionRefusedError):
        return None


def settle(peers: list[RawPeer]) -> None:
    """Read until everybody knows exactly everybody."""
    ids = {peer.id for peer in peers}
    for peer in peers:
        while set(peer.counts) != ids or set(peer.counts.values()) != {VECTORS}:
            assert peer.take() is not None, "the server ended the connection"
        for other in peers:
            assert peer.vectors[other.id] == other.vectors[other.id]


def test_says_how_it_is(manage: Manage, region: list[str], path: str) -> None:
    manager = manage(*region, watchdog=0.1)
    assert manager.last("STATUS") == "1 region, 0 peers"
    until(lambda: manager.last("WATCHDOG"))
    with RawPeer(path).set_up(VECTORS):
        until(lambda: manager.last("STATUS") == "1 region, 1 peer")
    until(lambda: manager.last("STATUS") == "1 region, 0 peers")
    assert manager.kill(signal.SIGTERM) == 0
    until(lambda: manager.last("STOPPING"))
    assert not os.path.exists(path)


@pytest.mark.nightly
def test_a_socket_is_there_already(
    manage: Manage, listener: socket.socket, path: str, peers: list[RawPeer]
) -> None:
    """Its path need not be said, who waits in its queue is served, and it stays."""
    peers.append(RawPeer(path))
    manager = manage(*SERVE, "-n", str(VECTORS), sockets=[("ivshmem.socket", listener)])
    peers[0].set_up(VECTORS)
    assert manager.kill(signal.SIGTERM) == 0
    assert peers[0].take() is None
    peers.append(RawPeer(path))
    manager.start()
    peers[1].set_up(VECTORS)


def test_a_socket_is_nobodys(
    manage: Manage, region: list[str], listener: socket.socket, tmp_path: Path
) -> None:
    region[region.index("-S") + 1] = str(tmp_path / "another")
    with pytest.raises(AssertionError, match=f"{tmp_path}/socket was passed .* no region uses it"):
        manage(*region, sockets=[("ivshmem.socket", listener)])


def test_systemd_socket_activate(path: str) -> None:
    """The real one, which is a program like any other."""
    if shutil.which("systemd-socket-activate") is None:
        pytest.skip("needs systemd-socket-activate: apt-get install systemd")
    command = ["systemd-socket-activate", "-l", path, *SERVE, "-n", str(VECTORS), "--quiet"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            with until(lambda: connected(path)) as peer:
                peer.set_up(VECTORS)
                assert process.stdout is not None
                assert process.stdout.readline().startswith(b"serving 4M")
        finally:
            process.terminate()
    assert process.returncode == 0


@pytest.mark.sampled(6)
@pytest.mark.parametrize("reverse", [False, True], ids=["in-order", "reversed"])
@pytest.mark.parametrize("passed", [False, True], ids=["own-socket", "passed-socket"])
def test_killed(
    manage: Manage,
    region: list[str],
    path: str,
    peers: list[RawPeer],
    reverse: bool,
    passed: bool,
    request: pytest.FixtureRequest,
) -> None:
    given = [("ivshmem.socket", request.getfixturevalue("listener"))] if passed else []
    manager = manage(*region, "--fd-store", reverse=reverse, sockets=given)
    peers += [RawPeer(path).set_up(VECTORS) for _ in range(3)]
    memory = peers[0].memory
    for _ in range(4):
        manager.kill()
        peers.append(RawPeer(path))  # waits in the queue
        peers.pop(0).close()  # while nobody looks
        manager.start()
        peers[-1].set_up(VECTORS)
        peers.append(RawPeer(path).set_up(VECTORS))
        peers.pop(0).close()
        settle(peers)
    assert {peer.memory for peer in peers} == {memory}
    # A group for the region and for each peer, and the journal: what was dropped is not kept.
    until(lambda: len(set(manager.names())) == 5)
    assert len(manager.names()) == 1 + 2 + 3 * (1 + VECTORS)


def test_restarted(manage: Manage, region: list[str], path: str, peers: list[RawPeer]) -> None:
    """As `systemctl restart` does it, with other options than before."""
    manager = manage(*region, "--fd-store")
    peers += [RawPeer(path).set_up(VECTORS) for _ in range(2)]
    manager.command += ["--mode", "0600", "--deny", f"uid:{os.getuid()}"]
    manager.restart(signal.SIGTERM)
    settle(peers)
    assert os.stat(path).st_mode & 0o777 == 0o600
    with RawPeer(path) as refused:
        assert refused.take() is None
    manager.command = manager.command[:-2]
    manager.restart(signal.SIGTERM)
    peers.append(RawPeer(path).set_up(VECTORS))
    settle(peers)


def test_stopped(manage: Manage, region: list[str], path: str) -> None:
    """The manager, which closes what it has, ends what the process has left."""
    manager = manage(*region, "--fd-store")
    with RawPeer(path).set_up(VECTORS) as peer:
        assert manager.kill(signal.SIGTERM) == 0
        assert not peer.readable(0)
        manager.close_stored()
        assert peer.take() is None


def test_something_is_lost(
    manage: Manage, region: list[str], path: str, peers: list[RawPeer]
) -> None:
    """Who has lost an eventfd leaves; who has lost nothing stays."""
    manager = manage(*region, "--fd-store")
    peers += [RawPeer(path).set_up(VECTORS) for _ in range(3)]
    settle(peers)
    until(lambda: {f"1/{peer.id}" for peer in peers} <= {*manager.names()}, "the store has all")
    manager.kill()
    lost = peers.pop(1)
    manager.lose(f"1/{lost.id}")
    manager.start()
    assert lost.take() is None
    lost.close()
    settle(peers)
    assert f"1/{lost.id}" not in manager.names()


def test_the_journal_is_lost(manage: Manage, region: list[str], path: str) -> None:
    """All are cut off, and the server begins anew."""
    manager = manage(*region, "--fd-store")
    with RawPeer(path).set_up(VECTORS) as peer:
        manager.kill()
        manager.lose("journal")
        manager.start()
        assert peer.take() is None
    with RawPeer(path).set_up(VECTORS) as peer:
        assert peer.id == 0


def test_a_journal_of_another_version(manage: Manage, region: list[str], path: str) -> None:
    """The same: this version cannot know who is at the other ends."""
    manager = manage(*region, "--fd-store")
    with RawPeer(path).set_up(VECTORS) as peer:
        manager.kill()
        journal = next(fd for name, fd in manager.store if name == "journal")
        os.pwrite(journal, b"ivshmem journal 9\n", 0x8000)
        manager.start()
        assert "all peers of the last process are cut off" in manager.log.read_text()
        assert peer.take() is None
    with RawPeer(path).set_up(VECTORS) as peer:
        assert peer.id == 0


def test_configuration_is_broken_meanwhile(
    manage: Manage, tmp_path: Path, path: str, peers: list[RawPeer]
) -> None:
    """Nobody has asked for it to be read: all stays as it was, and it can be fixed."""
    file = tmp_path / "config"
    good = f'[region.a]\nsocket = "{path}"\nsize = "64K"\nvectors = {VECTORS}\n'
    file.write_text(good)
    manager = manage(*SERVE, "--config", str(file), "--fd-store")
    peers.append(RawPeer(path).set_up(VECTORS))
    file.write_text("[region.a]\nsocket = 1\n")
    manager.restart()
    assert f"all stays as it was: {file}: region.a.socket = 1" in manager.log.read_text()
    peers.append(RawPeer(path).set_up(VECTORS))
    file.write_text(good + f'[region.b]\nsocket = "{path}-b"\nsize = "64K"\nvectors = {VECTORS}\n')
    os.kill(manager.pid, signal.SIGHUP)
    until(lambda: "reloaded: " in manager.log.read_text())
    until(lambda: manager.last("RELOADING"))  # the manager may read it later than we the log
    manager.restart()
    settle(peers)
    with RawPeer(f"{path}-b").set_up(VECTORS):
        pass


def test_what_cannot_begin_never_begins(region: list[str], tmp_path: Path) -> None:
    """The second time there is a journal, in which there is nothing."""
    region[region.index("-S") + 1] = str(tmp_path / "missing" / "socket")
    manager = Manager([*region, "--fd-store"], tmp_path)
    try:
        for _ in range(2):
            with pytest.raises(AssertionError, match="no such file"):
                manager.start()
            os.waitpid(manager.pid, 0)
        (tmp_path / "missing").mkdir()
        manager.start()
        with RawPeer(str(tmp_path / "missing" / "socket")).set_up(VECTORS):
            pass
    finally:
        manager.close()


@pytest.mark.nightly
def test_what_is_seen_cannot_be_had(
    manage: Manage, region: list[str], path: str, peers: list[RawPeer]
) -> None:
    """A successor whose port for metrics is somebody else's by now serves all the same."""
    with socket.create_server(("127.0.0.1", 0)) as somebody:
        port = somebody.getsockname()[1]
        manager = manage(*region, "--fd-store")
        peers.append(RawPeer(path).set_up(VECTORS))
        manager.command += ["--metrics", str(port)]
        manager.restart(signal.SIGTERM)
        peers.append(RawPeer(path).set_up(VECTORS))
        settle(peers)


@pytest.mark.nightly
@pytest.mark.parametrize("reverse", [False, True], ids=["in-order", "reversed"])
def test_killed_at_any_moment(manage: Manage, region: list[str], path: str, reverse: bool) -> None:
    """Peers come and go while the server is killed again and again.

    A newcomer that was accepted just then, and is told nothing yet, may be cut off: it was in
    nobody else's hands. Nobody else may be: `set_up` and `settle` fail if a connection ends.
    """
    manager = manage(*region, "--fd-store", "--quiet", reverse=reverse)
    end = threading.Event()
    killed = 0

    def kill() -> None:
        nonlocal killed
        dice = random.Random(7)  # noqa: S311
        while not end.is_set():
            time.sleep(dice.random() * 0.05)
            manager.restart()
            killed += 1

    thread = threading.Thread(target=kill)
    thread.start()
    peers: list[RawPeer] = []
    came = 0
    try:
        give_up = time.monotonic() + 4 * PATIENCE
        while came < 20 or killed < 8:
            assert time.monotonic() < give_up, (came, killed)
            peer = RawPeer(path)
            if peer.take() is None:
                peer.close()
                continue
            peers.append(peer.set_up(VECTORS))
            came += 1
            if len(peers) > 8:
                peers.pop(0).close()
    finally:
        end.set()
        thread.join()
    settle(peers)
    for peer in peers:
        peer.close()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("killed", [False, True], ids=["reads-on", "killed"])
def test_the_manager_is_busy(
    manage: Manage, region: list[str], path: str, peers: list[RawPeer], killed: bool
) -> None:
    """A newcomer is sent nothing before its descriptors are kept; all others are served."""
    manager = manage(*region, "--fd-store", "--quiet")
    peers += [RawPeer(path).set_up(VECTORS) for _ in range(3)]
    settle(peers)
    leaver = peers.pop(0)
    with control.ControlClient(f"{path}.control") as client:

        def shown() -> Any:
            return client.ask({"do": "status"})["regions"][0]

        with manager.busy():
            manager.fill()
            peers += [RawPeer(path), RawPeer(path)]
            until(lambda: "service manager" in shown()["paused"])
            leaver.close()
            for peer in peers[:2]:
                peer.take_until(lambda peer=peer: leaver.id in peer.left)  # type: ignore[misc]
            assert len(shown()["peers"]) == 2
            assert not any(peer.readable(0) for peer in peers)
            if killed:
                manager.kill()
    if killed:
        manager.start()
        with peers.pop(2) as newcomer:
            assert newcomer.take() is None  # it was accepted, and told nothing
    for peer in peers[2:]:
        peer.set_up(VECTORS)
    settle(peers)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--fd-store"], "NOTIFY_SOCKET is not set"),
        (["--fd-store", "--supervise"], "--fd-store is not allowed with --supervise"),
        (["--fd-store", "--takeover"], "--fd-store is not allowed with --takeover"),
        (["--fd-store", "--daemon"], "--fd-store is not allowed with --daemon"),
    ],
)
def test_what_cannot_be(region: list[str], options: list[str], reason: str) -> None:
    done = subprocess.run([*region, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert reason in done.stderr
    assert len(done.stderr.splitlines()) == 1
