"""`ivshmem serve`, killed, or replaced by another one: no peer notices.

The peers are strict: what is told twice, out of order or not at all fails the test.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from support.faults import Faults
from support.peer import RawPeer
from support.waiting import PATIENCE, Background, until

from ivshmem.errors import HandoverError
from ivshmem.lasting import handover
from ivshmem.lasting.journal import Journal
from ivshmem.service import snapshots, succession

VECTORS = 2


class Serving:
    """`ivshmem serve` with a pid file."""

    def __init__(
        self,
        directory: Path,
        *options: str,
        region: bool = True,
        environment: dict[str, str] | None = None,
        python: str = sys.executable,
        stdout: int | None = None,
        stderr: int | None = None,
    ) -> None:
        self.path = directory / "socket"
        self.pid_file = directory / "pid"
        self.log = directory / "log"
        command = [python, "-m", "ivshmem", "serve"]
        if region:
            command += ["-S", str(self.path), "-l", "64K", "-n", str(VECTORS)]
        if "--pid-file" not in options:
            command += ["--pid-file", str(self.pid_file)]
        command += options
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                command, stdout=stdout or subprocess.PIPE, stderr=stderr or log, env=environment
            )
        if self.process.stdout is None:
            return
        self.banner = self.process.stdout.readline().decode()
        assert self.banner.startswith("serving"), self.log.read_text()

    def parent(self) -> int:
        """The process that is named in the pid file, and lives."""
        return until(self._family)[0]

    def child(self) -> int:
        """The process that serves."""
        return until(self._family)[1]

    def _family(self) -> tuple[int, int] | None:
        try:
            pid = int(self.pid_file.read_text())
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        except (OSError, ValueError):
            return None  # the parent is being replaced
        return (pid, int(children[0])) if children else None

    def _gone(self) -> bool:
        with contextlib.suppress(OSError, ValueError):  # the parent is being replaced
            os.kill(int(self.pid_file.read_text()), signal.SIGTERM)
        return not self.pid_file.exists()

    def end(self) -> None:
        until(self._gone)
        self.process.wait(PATIENCE)
        if self.process.stdout is not None:
            self.process.stdout.close()


Serve = Callable[..., Serving]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    started: list[Serving] = []

    def start(*options: str, **how: Any) -> Serving:
        started.append(Serving(tmp_path, *options, **how))
        return started[-1]

    yield start
    for serving in reversed(started):
        serving.end()
    (tmp_path / "log").unlink()
    assert not list(tmp_path.iterdir())


@pytest.fixture
def peers() -> Iterator[list[RawPeer]]:
    there: list[RawPeer] = []
    yield there
    for peer in there:
        peer.close()


def kill(pid: int) -> None:
    """Kill a process and wait until it is dead: it goes on to have children for a while."""
    fd = os.pidfd_open(pid)
    try:
        os.kill(pid, signal.SIGKILL)
        assert select.select([fd], [], [], PATIENCE)[0]
    finally:
        os.close(fd)


def knows(peer: RawPeer, ids: set[int]) -> bool:
    return set(peer.counts) == ids and set(peer.counts.values()) == {VECTORS}


def settle(peers: list[RawPeer]) -> None:
    """Read until everybody knows exactly everybody."""
    ids = {peer.id for peer in peers}
    for peer in peers:
        while not knows(peer, ids):
            assert peer.take() is not None, "the server ended the connection"
        for other in peers:
            assert peer.vectors[other.id] == other.vectors[other.id]


def test_child_and_parent_are_killed(serve: Serve, peers: list[RawPeer]) -> None:
    serving = serve("--supervise")
    assert serving.banner.rstrip().endswith(f"pid {serving.parent()}")
    path = str(serving.path)
    peers += [RawPeer(path).set_up(VECTORS) for _ in range(3)]
    for victim in (serving.child, serving.parent, serving.child, serving.parent):
        kill(victim())
        peers.append(RawPeer(path).set_up(VECTORS))
        peers.pop(0).close()
        settle(peers)
    assert [peer.id for peer in peers] == [4, 5, 6]


def test_leaves_are_still_held(serve: Serve, peers: list[RawPeer]) -> None:
    """By a successor, for who was there before it and for who comes after."""
    serving = serve("--supervise", "--hold-leaves")
    path = str(serving.path)
    comm = Path("/proc/self/comm")
    before = comm.read_text().removesuffix("\n")
    try:
        comm.write_text("qemu-system-x86")
        for _ in range(2):
            peers.append(RawPeer(path).set_up(VECTORS))
            with RawPeer(path) as visitor:
                visitor.set_up(VECTORS)
            kill(serving.child())
        status = [sys.executable, "-m", "ivshmem", "status", "-S", path, "--json"]

        def ask() -> Any:
            """What it answers when the successor has begun."""
            done = subprocess.run(status, check=False, capture_output=True)
            return None if done.returncode else json.loads(done.stdout)

        shown = until(ask)
        found = shown["regions"][0]["peers"]
        assert [(p["leaves_told"], p["leaves_held"]) for p in found] == [(0, 2), (0, 1)]
    finally:
        comm.write_text(before)
    for peer in peers:
        peer.drain()
        assert not peer.left


def test_killed_when_no_descriptor_is_left(serve: Serve, peers: list[RawPeer]) -> None:
    """All are in use, and a newcomer waits in the queue; when somebody leaves, it has its turn."""
    serving = serve("--supervise")
    for pid in (serving.parent(), serving.child()):
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (90, 90))
    path = str(serving.path)
    newcomer = RawPeer(path)
    while newcomer.readable(0.5):
        peers.append(newcomer.set_up(VECTORS))
        newcomer = RawPeer(path)
    assert len(peers) > 10
    for _ in range(3):
        kill(serving.child())
        settle(peers)
    peers.pop(0).close()
    peers.append(newcomer.set_up(VECTORS))
    settle(peers)


def test_the_parent_sends_signals_on(serve: Serve, peers: list[RawPeer]) -> None:
    serving = serve("--supervise")
    peers.append(RawPeer(str(serving.path)).set_up(VECTORS))
    serving.process.send_signal(signal.SIGINT)
    assert serving.process.wait(PATIENCE) == 0
    assert peers[0].readable(PATIENCE)


def test_what_cannot_be_served_ends_the_parent(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ivshmem", "serve", "--supervise", "-S", str(tmp_path / "no" / "s")],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.sampled(2)
@pytest.mark.parametrize("new", [[], ["--supervise"]], ids=["plain", "supervised"])
@pytest.mark.parametrize("old", [[], ["--supervise"]], ids=["plain", "supervised"])
def test_taken_over(serve: Serve, peers: list[RawPeer], old: list[str], new: list[str]) -> None:
    first = serve(*old)
    path = str(first.path)
    peers += [RawPeer(path).set_up(VECTORS) for _ in range(3)]
    half = RawPeer(path)
    half.read_bytes(0)
    # One that reads nothing while so many come and go that its buffer is full.
    for _ in range(200):
        RawPeer(path).close()
    peers.append(RawPeer(path).set_up(VECTORS))
    for peer in peers[1:]:
        peer.drain()
    second = serve("--takeover", *new)
    assert first.process.wait(PATIENCE) == 0
    peers += [half.set_up(VECTORS), RawPeer(path).set_up(VECTORS)]
    settle(peers)
    if new:
        kill(second.child())
        peers.append(RawPeer(path).set_up(VECTORS))
        settle(peers)
    assert int(second.pid_file.read_text()) == second.process.pid
    peers.pop(1).close()
    settle(peers)


def test_nobody_to_take_over_from(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ivshmem", "serve", "--takeover", "-S", str(tmp_path / "socket")],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "socket.control: no server to take over from listens here: " in done.stderr


@pytest.mark.sampled(2)
@pytest.mark.parametrize("after", range(4))
def test_a_successor_that_dies(serve: Serve, peers: list[RawPeer], after: int) -> None:
    """At each step of the handover; the former one goes on."""
    serving = serve()
    path = str(serving.path)
    peers.append(RawPeer(path).set_up(VECTORS))
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(f"{path}.control")
        sock.settimeout(PATIENCE)
        sock.sendall(b'{"do": "takeover"}\n')
        if after > 0:
            line = b""
            while not line.endswith(b"\n"):
                line += sock.recv(1)
            assert json.loads(line)["ok"]
        if after > 1:
            _, fds, _, _ = socket.recv_fds(sock, 1, 250)
            for fd in fds:
                os.close(fd)
        if after > 2:
            sock.sendall(b"n")
    peers.append(RawPeer(path).set_up(VECTORS))
    settle(peers)
    until(lambda: "another process tried to take over" in serving.log.read_text())


def test_who_has_let_go_does_nothing_more(serve: Serve, peers: list[RawPeer]) -> None:
    """A newcomer that knocks in the same moment is the other's: the former one leaves it alone."""
    serving = serve()
    path = str(serving.path)
    peers.append(RawPeer(path).set_up(VECTORS))
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(f"{path}.control")
        sock.settimeout(PATIENCE)
        sock.sendall(b'{"do": "version"}\n')
        assert sock.recv(4096)  # it is known to the loop
        os.kill(serving.process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, serving.process.pid, os.WSTOPPED)
        # Both wake the server at once, in this order.
        sock.sendall(b'{"do": "takeover"}\n')
        with RawPeer(path) as newcomer:
            taken: list[tuple[Journal, set[int]]] = []
            taking = Background(lambda: taken.append(handover.take(sock, snapshots)))
            os.kill(serving.process.pid, signal.SIGCONT)
            taking.result()
            ((journal, fds),) = taken
            assert serving.process.wait(PATIENCE) == 0
            journal.close()
            assert not newcomer.readable(0)
            assert peers[0].drain() == 0
            assert "peer 1" not in serving.log.read_text()
        for fd in fds:
            os.close(fd)
    serving.path.unlink()


@pytest.mark.nightly
@pytest.mark.parametrize("call", ["eventfd", "epoll_ctl", "open"])
def test_a_successor_that_fails_leaves_all_to_the_next(
    tmp_path_factory: pytest.TempPathFactory, serve: Serve, peers: list[RawPeer], call: str
) -> None:
    faults = Faults(tmp_path_factory.mktemp("faults"))
    with contextlib.closing(faults):
        serving = serve("--supervise", environment={**os.environ, **faults.environment})
        path = str(serving.path)
        peers.append(RawPeer(path).set_up(VECTORS))
        for after in range(0, 9, 2):
            # The parent may not die of what it cannot say, nor wait.
            faults.arm(call, errno.ENOMEM, after=after)
            kill(serving.child())
            peers.append(RawPeer(path).set_up(VECTORS))
            settle(peers)
        faults.disarm(call)


@pytest.mark.parametrize("state", ["full", "closed"])
def test_nobody_reads_what_the_parent_says(serve: Serve, peers: list[RawPeer], state: str) -> None:
    ends = os.pipe()
    with open(ends[0], "rb") as reader, open(ends[1], "wb", buffering=0) as writer:
        serving = serve("--supervise", stderr=writer.fileno())
        path = str(serving.path)
        peers.append(RawPeer(path).set_up(VECTORS))
        if state == "full":
            os.set_blocking(writer.fileno(), False)
            while writer.write(bytes(4096)):
                pass
        else:
            reader.close()
        kill(serving.child())
        peers.append(RawPeer(path).set_up(VECTORS))
        settle(peers)


def test_what_a_successor_cannot_have_it_does_without(
    tmp_path_factory: pytest.TempPathFactory, serve: Serve, peers: list[RawPeer]
) -> None:
    """The pid file, the metrics' port, somebody who reads what it prints: not worth a peer."""
    first = serve()
    path = str(first.path)
    peers.append(RawPeer(path).set_up(VECTORS))
    nowhere = tmp_path_factory.mktemp("none") / "none" / "pid"
    with socket.create_server(("127.0.0.1", 0)) as taken, open("/dev/full", "w") as full:
        port = str(taken.getsockname()[1])
        second = serve(
            *("--takeover", "--metrics", port, "--pid-file", str(nowhere)), stdout=full.fileno()
        )
        try:
            assert first.process.wait(PATIENCE) == 0
            peers.append(RawPeer(path).set_up(VECTORS))
            settle(peers)
            for text in (f"no pid file: {nowhere}", f"served anyway: 127.0.0.1:{port}"):
                until(lambda text=text: text in second.log.read_text(), text)  # type: ignore[misc]
        finally:
            second.process.terminate()
            second.process.wait(PATIENCE)


def test_the_metrics_port_of_a_successor(serve: Serve, peers: list[RawPeer]) -> None:
    """A child binds the configured port again; who takes over has metrics only if it says so."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = free.getsockname()
    first = serve("--supervise", "--metrics", str(address[1]))
    peers.append(RawPeer(str(first.path)).set_up(VECTORS))
    line = f"metrics are at http://127.0.0.1:{address[1]}/"
    until(lambda: line in first.log.read_text(), line)  # it comes after the peer was let in
    kill(first.child())
    until(lambda: first.log.read_text().count(line) == 2, f"{line} again")
    socket.create_connection(address, PATIENCE).close()
    serve("--takeover")
    assert first.process.wait(PATIENCE) == 0
    settle(peers)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, PATIENCE)


def test_options_of_one_region_are_not_for_others(
    tmp_path_factory: pytest.TempPathFactory, peers: list[RawPeer]
) -> None:
    """Who forgets --config continues with what is served."""
    directory = tmp_path_factory.mktemp("config")
    control, path = directory / "control", directory / "socket"
    file = directory / "file"
    file.write_text(
        f'[service]\ncontrol = "{control}"\n'
        f'[region.db]\nsocket = "{path}"\nsize = "64K"\nvectors = {VECTORS}\n'
    )
    command = [sys.executable, "-m", "ivshmem", "serve"]
    with subprocess.Popen([*command, "--config", str(file)], stdout=subprocess.PIPE) as first:
        assert first.stdout is not None
        assert first.stdout.readline().startswith(b"serving")
        peers.append(RawPeer(str(path)).set_up(VECTORS))
        options = ["--takeover", "--control", str(control), "-S", str(directory / "other"), "-n7"]
        with subprocess.Popen(
            [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as second:
            assert second.stdout is not None
            assert second.stderr is not None
            assert second.stdout.readline().startswith(b"serving")
            peers.append(RawPeer(str(path)).set_up(VECTORS))
            settle(peers)
            second.terminate()
            assert b"give the --config FILE that has region db" in second.stderr.read()


def test_rules_stay_unless_others_are_given(serve: Serve) -> None:
    first = serve("--deny", "all", "--mode", "0600")
    second = serve("--takeover")
    assert first.process.wait(PATIENCE) == 0
    with RawPeer(str(first.path)) as refused:
        assert refused.take() is None
    assert first.path.stat().st_mode & 0o777 == 0o600
    third = serve("--takeover", "--deny", "uid:65534")
    assert second.process.wait(PATIENCE) == 0
    until(lambda: "region ivshmem: deny changed" in third.log.read_text())
    with RawPeer(str(first.path)) as peer:
        peer.set_up(VECTORS)


class Killing(socket.socket):
    """Kills a process when that has let go of its service."""

    victim = 0

    def recv(self, *arguments: Any) -> bytes:
        data = super().recv(*arguments)
        if data == b"y":
            kill(self.victim)
        return data


def test_killed_when_it_had_let_go(serve: Serve, peers: list[RawPeer]) -> None:
    """Nobody goes on where it was, for another does."""
    ends = os.pipe()
    with open(ends[0], "rb"), open(ends[1], "wb", buffering=0) as writer:
        serving = serve("--supervise", stderr=writer.fileno())
        peers.append(RawPeer(str(serving.path)).set_up(VECTORS))
        os.set_blocking(writer.fileno(), False)
        while writer.write(bytes(4096)):
            pass  # so that its end takes a while
        with Killing(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.connect(f"{serving.path}.control")
            sock.settimeout(PATIENCE)
            sock.victim = serving.child()
            sock.sendall(b'{"do": "takeover"}\n')
            journal, fds = handover.take(sock, snapshots)
        assert serving.process.wait(PATIENCE) == 0
    journal.close()
    for fd in fds:
        os.close(fd)
    serving.path.unlink()
    Path(f"{serving.path}.control").unlink(missing_ok=True)


def test_the_interpreter_is_gone(
    tmp_path_factory: pytest.TempPathFactory, serve: Serve, peers: list[RawPeer]
) -> None:
    """An upgrade removes it for a while: a server that loses its parent just then goes on."""
    python = tmp_path_factory.mktemp("bin") / "python"
    python.symlink_to(os.path.realpath(sys.executable))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    serving = serve("--supervise", python=str(python), environment=environment)
    path = str(serving.path)
    child = serving.child()
    peers.append(RawPeer(path).set_up(VECTORS))
    python.unlink()
    kill(serving.parent())
    until(lambda: "no process continues if this one is killed" in serving.log.read_text())
    peers.append(RawPeer(path).set_up(VECTORS))
    settle(peers)
    os.kill(child, signal.SIGTERM)
    until(lambda: not serving.path.exists())
    serving.pid_file.unlink()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("change", ["version", "a region", "a peer", "a setting"])
def test_what_cannot_be_understood_is_not_taken(
    serve: Serve, peers: list[RawPeer], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """The former one goes on: a state of another version, for instance."""
    serving = serve()
    path = str(serving.path)
    peers.append(RawPeer(path).set_up(VECTORS))
    line = handover._line

    def changed(*arguments: Any) -> Any:
        offer = line(*arguments)
        ((record, server),) = offer["state"]["regions"]
        if change == "version":
            offer["version"] += 1
        elif change == "a region":
            record.append("new")
        elif change == "a peer":
            server["held"]["0"].append("new")
        else:
            del record[2]["socket"]
        return offer

    monkeypatch.setattr(handover, "_line", changed)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(f"{path}.control")
        sock.sendall(b'{"do": "takeover"}\n')
        with pytest.raises(HandoverError):
            handover.take(sock, snapshots)
    peers.append(RawPeer(path).set_up(VECTORS))
    settle(peers)


def test_too_few_descriptors_to_take_over(serve: Serve, peers: list[RawPeer]) -> None:
    serving = serve()
    path = str(serving.path)
    peers += [RawPeer(path).set_up(VECTORS) for _ in range(40)]
    done = subprocess.run(
        [sys.executable, "-m", "ivshmem", "serve", "--takeover", "-S", path],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60)),
    )
    assert done.returncode == 1
    assert "descriptors are too many for this process: raise the limit" in done.stderr
    peers.append(RawPeer(path).set_up(VECTORS))
    settle(peers)


def test_every_line_of_the_log_is_json(serve: Serve, peers: list[RawPeer]) -> None:
    serving = serve("--supervise", "--log-format", "json")
    kill(serving.child())
    peers.append(RawPeer(str(serving.path)).set_up(VECTORS))
    until(lambda: "joined" in serving.log.read_text())
    lines = [json.loads(line) for line in serving.log.read_text().splitlines()]
    assert "died of SIGKILL" in lines[0]["text"]
    assert [line["event"] for line in lines] == ["log", "takeover", "joined"]


def test_the_file_is_wrong_when_the_parent_is_killed(
    tmp_path_factory: pytest.TempPathFactory, serve: Serve, peers: list[RawPeer]
) -> None:
    """What nobody asked to be read again changes nothing, the form of the log included."""
    directory = tmp_path_factory.mktemp("config")
    file, path = directory / "file", directory / "socket"
    file.write_text(
        f'[service]\nlog_format = "json"\n'
        f'[region.db]\nsocket = "{path}"\nsize = "64K"\nvectors = {VECTORS}\n'
    )
    serving = serve("--supervise", "--config", str(file), region=False)
    peers.append(RawPeer(str(path)).set_up(VECTORS))
    file.write_text("wrong")
    kill(serving.parent())
    peers.append(RawPeer(str(path)).set_up(VECTORS))
    settle(peers)
    until(lambda: '"takeover"' in serving.log.read_text())
    lines = [json.loads(line) for line in serving.log.read_text().splitlines()]
    assert any(
        line["text"].startswith(f"the configuration is not applied, all stays as it was: {file}")
        for line in lines
    )


def test_a_parent_that_cannot_be_watched(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """For want of descriptors: the service goes on, and the log says what it lacks."""
    kept: Any = SimpleNamespace(parent=os.getppid(), fd=-1)
    refused = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    monkeypatch.setattr(os, "pidfd_open", Mock(side_effect=refused))
    service = Mock()
    with succession.replacing(kept, service):
        pass
    assert service.mock_calls == []
    assert f"Too many open files: no process takes the place of the parent (pid {kept.parent})" in (
        caplog.text
    )
