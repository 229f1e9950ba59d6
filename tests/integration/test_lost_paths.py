"""A socket's path is removed or replaced while its server runs."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import commands
from support.children import NOBODY, needs_root
from support.isolated import environment
from support.peer import RawPeer
from support.running import Running
from support.waiting import PATIENCE, until

from ivshmem import control
from ivshmem.service import control as service_control
from ivshmem.service import control_client, path_watch
from ivshmem.system import listener as listener_module
from ivshmem.system import sockets
from ivshmem.system.listener import Listener

VECTORS = 2


class Counting(path_watch.PathWatch):
    """Counts its looks, and makes none while a test has the lock."""

    looks = 0
    lock = threading.Lock()

    def step(self) -> None:
        with self.lock:
            super().step()
        self.looks += 1


class Watched(Running):
    """A region "db" at `path`, with its control socket; its paths are looked at all the time."""

    def __init__(self, path: str, **more: Any) -> None:
        super().__init__({"db": path}, VECTORS, **more)
        self.control = self.add(
            service_control.Control(
                service_control.listen(control.default_path(path)), self.service
            )
        )
        self.paths = self.add(Counting(self.service, lambda: self.control, 0.01))
        self.start()


@pytest.fixture
def watched(socket_path: str) -> Iterator[Watched]:
    with Watched(socket_path) as found:
        yield found


def status(path: str) -> dict[str, object]:
    (region,) = control.request(f"{path}.control", {"do": "status"}, PATIENCE)["regions"]
    return dict(region)


def is_back(path: str) -> bool:
    """Whether connecting succeeds. (A socket is live a moment before it listens.)"""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(path) == 0


def newcomer(path: str) -> RawPeer:
    """A peer that connects as soon as one can."""

    def connected() -> RawPeer | None:
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            return RawPeer(path)
        return None

    return until(connected)


def stale(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)


class TestBoundAgain:
    @pytest.mark.parametrize("replace", [lambda _: None, stale], ids=["gone", "stale"])
    def test_a_region(
        self,
        watched: Watched,
        socket_path: str,
        caplog: pytest.LogCaptureFixture,
        replace: object,
    ) -> None:
        caplog.set_level(logging.WARNING)
        assert callable(replace)
        with RawPeer(socket_path) as before:
            before.set_up(VECTORS)
            number = watched.service.regions["db"].listener.socket.fileno()
            for _ in range(3):
                with watched.paths.lock:
                    os.unlink(socket_path)
                    replace(socket_path)
                with newcomer(socket_path) as after:
                    after.set_up(VECTORS)
                    assert before.drain() > 0
                    assert watched.service.regions["db"].listener.socket.fileno() == number
            assert status(socket_path)["unreachable"] == ""
        words = "is gone" if replace is not stale else "leads to another socket"
        assert f"{socket_path} {words}: it was bound again" in caplog.text

    def test_the_control_socket(self, watched: Watched, socket_path: str) -> None:
        path = f"{socket_path}.control"
        with control.ControlClient(path, PATIENCE) as before:
            os.unlink(path)
            until(lambda: is_back(path))
            assert stat.S_IMODE(os.stat(path).st_mode) == service_control.MODE
            assert status(socket_path)["name"] == "db"
            assert before.ask({"do": "version"})["protocol"] == control_client.PROTOCOL

    def test_its_permissions(self, socket_path: str) -> None:
        with Watched(socket_path, mode=0o640):
            os.unlink(socket_path)
            until(lambda: is_back(socket_path))
            assert stat.S_IMODE(os.stat(socket_path).st_mode) == 0o640

    def test_its_directory(self, directory: Path) -> None:
        place = directory / "place"
        place.mkdir()
        with Watched(str(place / "s")):
            place.rename(directory / "moved")
            place.mkdir()
            until(lambda: is_back(str(place / "s")))
        assert list(place.iterdir()) == []
        for left in (directory / "moved").iterdir():
            left.unlink()

    def test_not_while_somebody_waits(self, socket_path: str) -> None:
        """They would be cut off: QEMU spins then."""
        with Listener(socket_path) as listener:
            listener.listen()
            with socket.socket(socket.AF_UNIX) as newcomer:
                newcomer.connect(socket_path)
                os.unlink(socket_path)
                with pytest.raises(BlockingIOError):
                    listener.bind_again()
                assert not os.path.exists(socket_path)
                listener.socket.accept()[0].close()
            listener.bind_again()
            assert listener.astray() == ""


@needs_root
def test_a_socket_that_this_user_may_not_connect_to(directory: Path) -> None:
    """A service manager binds it for others, and passes it to a server with a user of its own."""
    directory.chmod(0o755)
    with Listener(str(directory / "socket"), mode=0o600) as listener:
        listener.listen()
        os.seteuid(NOBODY)
        try:
            with pytest.raises(PermissionError):
                sockets.is_live(listener.path)
            assert listener.astray() == ""
        finally:
            os.seteuid(0)


class TestLeftAlone:
    @pytest.mark.parametrize("kind", ["file", "directory", "fifo", "link"])
    def test_another_file(
        self,
        watched: Watched,
        socket_path: str,
        caplog: pytest.LogCaptureFixture,
        kind: str,
    ) -> None:
        path = Path(socket_path)
        with watched.paths.lock:
            path.unlink()
            if kind == "file":
                path.touch()
            elif kind == "directory":
                path.mkdir()
            elif kind == "fifo":
                os.mkfifo(path)
            else:
                path.symlink_to("/etc/passwd")
        before = path.lstat()
        until(lambda: "no client can connect" in caplog.text)
        assert status(socket_path)["unreachable"] == "leads to a file that is not a socket"
        looks = watched.paths.looks
        until(lambda: watched.paths.looks > looks + 2)
        assert path.lstat() == before
        assert caplog.text.count("no client can connect") == 1
        (path.rmdir if kind == "directory" else path.unlink)()
        until(lambda: path.exists() and sockets.is_live(socket_path))

    def test_another_server(
        self, watched: Watched, socket_path: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        draft = f"{socket_path}.draft"
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(draft)
            other.listen()
            os.rename(draft, socket_path)
            until(lambda: "another process listens there" in caplog.text)
            assert status(socket_path)["unreachable"] == "leads to another socket"
            mine = os.lstat(socket_path)
            watched.__exit__(None, None, None)
            assert os.lstat(socket_path) == mine
        os.unlink(socket_path)

    def test_a_group_that_is_no_more(
        self, socket_path: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Somebody deleted it, or the directory service that knew it is down: it is told, once."""

        def unknown(name: object) -> int:
            raise ValueError(f"no group {name!r}")

        with Watched(socket_path, group=os.getegid()) as watched, RawPeer(socket_path) as before:
            before.set_up(VECTORS)
            with watched.paths.lock:
                monkeypatch.setattr(listener_module, "group_id", unknown)
                os.unlink(socket_path)
            until(lambda: "it cannot be bound again: no group" in caplog.text)
            looks = watched.paths.looks
            until(lambda: watched.paths.looks > looks + 2)
            assert caplog.text.count("no client can connect") == 1
            assert status(socket_path)["unreachable"] == "is gone"
            monkeypatch.undo()
            with newcomer(socket_path) as after:
                after.set_up(VECTORS)
                assert before.drain() > 0

    def test_one_that_a_service_manager_bound(self, socket_path: str) -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(socket_path)
            sock.listen()
            with Listener.adopt(os.dup(sock.fileno())) as listener:
                os.unlink(socket_path)
                assert listener.astray() == "is gone"
                with pytest.raises(PermissionError, match="restart its socket unit"):
                    listener.bind_again()
            with Listener.adopt(os.dup(sock.fileno())) as listener:
                assert listener.astray() == "is gone", "it was before"


def test_killed_at_each_step_of_binding_it_again(socket_path: str) -> None:
    """What a successor knows of the path leads it to bind it again, and never to give it up."""
    with Listener(socket_path) as listener:
        listener.listen()
        number = listener.socket.fileno()
        noted: list[tuple[int, int] | None] = [listener.file]

        def successor(file: tuple[int, int] | None) -> Listener:
            return Listener.adopt(os.dup(number), unlink=True, file=file)

        def note() -> None:
            with successor(noted[-1]) as before:
                assert before.astray() == "leads to another socket"
            noted.append(listener.file)

        os.unlink(socket_path)
        with pytest.raises(ZeroDivisionError):
            listener.bind_again(note=lambda: 1 // 0)
        assert listener.file == noted[0]
        assert listener.astray() == "is gone"
        listener.bind_again(note=note)
        with successor(noted[1]) as after:
            assert after.astray() == ""
            after.unlinks = False
    # Killed after `note` and before the new socket took the old one's place.
    with Listener(socket_path) as fresh:
        file = fresh.file
        fresh.unlinks = False
    with Listener.adopt(_listening(), unlink=True, file=file) as old:
        old.path = socket_path
        assert old.astray() == "is stale"
        old.bind_again()
        assert old.astray() == ""


def _listening() -> int:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(b"\0ivshmem-test-%d" % os.getpid())
        sock.listen()
        return sock.detach()


def test_an_inode_that_is_used_again_is_another(socket_path: str) -> None:
    """The kernel holds the old one as long as the socket is bound."""
    with Listener(socket_path) as listener:
        for _ in range(100):
            os.unlink(socket_path)
            stale(socket_path)
            assert listener.astray() == "leads to another socket"
        os.unlink(socket_path)


# -- processes -------------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(*options: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-m", "ivshmem", "serve", "-q", "-l", "64K", "-n", "2", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("serving")
            yield process
        finally:
            process.terminate()


@pytest.mark.nightly
def test_a_supervised_child_and_its_successor(socket_path: str) -> None:
    """Each finds what the one before bound again."""
    with serving("--supervise", "-S", socket_path) as process, RawPeer(socket_path) as first:
        first.set_up(VECTORS)
        os.unlink(socket_path)
        until(lambda: os.path.exists(socket_path) and sockets.is_live(socket_path))
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        child = int(children.read_text())
        os.kill(child, signal.SIGKILL)
        until(lambda: children.read_text().strip() not in ("", str(child)))
        with newcomer(socket_path) as second:
            second.set_up(VECTORS)
            assert first.drain() > 0
            assert status(socket_path)["unreachable"] == ""
        process.terminate()
        assert process.wait(PATIENCE) == 0
    assert not os.path.exists(socket_path)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("replaced", [False, True])
def test_a_successor_says_what_became_of_the_path(socket_path: str, replaced: bool) -> None:
    """It used to print "serving on" a path by which nobody could connect."""
    with serving("-S", socket_path) as first, RawPeer(socket_path) as peer:
        peer.set_up(VECTORS)
        os.kill(first.pid, signal.SIGSTOP)  # so that it does not notice
        os.unlink(socket_path)
        if replaced:
            Path(socket_path).touch()
        with subprocess.Popen(
            [sys.executable, "-m", "ivshmem", "serve", "-q", "--takeover", "-S", socket_path],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        ) as second:
            assert second.stderr is not None
            connected = Path(f"/proc/{second.pid}/net/unix")
            until(lambda: connected.exists())
            os.kill(first.pid, signal.SIGCONT)
            line = second.stderr.readline()
            while "continues with" in line:
                line = second.stderr.readline()
            if replaced:
                assert f"no client can connect to {socket_path}, which leads to a file" in line
                assert status(socket_path)["unreachable"] != ""
            else:
                assert "it was bound again" in line
                with RawPeer(socket_path) as other:
                    other.set_up(VECTORS)
            second.terminate()
            assert second.wait(PATIENCE) == 0
    with contextlib.suppress(FileNotFoundError):
        os.unlink(socket_path)


@pytest.mark.nightly
@pytest.mark.usefixtures("commands")
def test_what_the_commands_say(socket_path: str) -> None:
    def ivshmem(*words: str) -> str:
        done = commands.run(*words, env=environment())
        return done.stdout + done.stderr

    with serving("-S", socket_path):
        os.unlink(socket_path)
        Path(socket_path).touch()
        told = f"nobody can connect: {socket_path} leads to a file that is not a socket"
        assert told in ivshmem("status", "-S", socket_path)
        checks = json.loads(ivshmem("doctor", "--json", "-S", socket_path, "--qemu", "true"))[
            "checks"
        ]
        (check,) = (check for check in checks if check["name"] == "socket")
        assert check["state"] == "failed"
        assert f"{socket_path} is not a socket, and pid " in check["found"]
        assert " still serves its peers there" in check["found"]
        # What it recommends, as it is printed, says why nobody can connect.
        words = ["sh", "-c", check["fix"]]
        done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment())
        assert told in done.stdout, (check, done)
        region = json.loads(ivshmem("status", "--json", "-S", socket_path))["regions"][0]
        assert region["unreachable"] == "leads to a file that is not a socket"
        os.unlink(socket_path)
        until(lambda: os.path.exists(socket_path) and sockets.is_live(socket_path))
