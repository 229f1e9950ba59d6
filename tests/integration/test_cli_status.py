"""`status`, `top`, `evict` and `reload` as a person runs them, and the log of a server as JSON."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support import commands
from support.children import Child, python
from support.peer import FakeServer, RawPeer
from support.waiting import PATIENCE, until

import ivshmem
from ivshmem import control

pytestmark = pytest.mark.usefixtures("commands")
IVSHMEM = [sys.executable, "-m", "ivshmem"]
TESTS = str(Path(__file__).parents[1])
VECTORS = 2
MANY = 32  # so that some peers fill the buffer of one that does not read

# A server with everything, as `ivshmem serve` has it.
SERVE = """
    import logging, signal, sys
    sys.path.insert(0, sys.argv[2])
    from ivshmem.service import control, stall_log
    from ivshmem.cli.log_writer import LogWriter, tell_peer
    from ivshmem.service.config import RegionConfig, ServiceConfig
    from ivshmem.service.service import Service
    path, vectors = sys.argv[1], int(sys.argv[4])
    config = ServiceConfig({"default": RegionConfig(path, 4096, vectors)})
    with (
        LogWriter(sys.stderr, logging.INFO, sys.argv[3]),
        Service(
            config,
            on_join=lambda region, peer: tell_peer("joined", peer),
            on_leave=lambda region, peer: tell_peer("left", peer),
            load=lambda: config,
        ) as service,
        control.Control(control.listen(path + ".control"), service) as made,
        stall_log.StallLog(service, 0.05) as watcher,
    ):
        service.open()
        for part in (made, watcher):
            service.watch(part.fileno(), part.step)
        signal.signal(signal.SIGTERM, lambda *_: service.stop())
        print("READY", flush=True)
        service.run()
"""


@contextlib.contextmanager
def serving(path: str, log: str = "text", vectors: int = VECTORS) -> Iterator[Child]:
    with python(SERVE, path, TESTS, log, str(vectors)) as child:
        child.expect("READY")
        yield child
        child.process.terminate()
        child.finish()


@pytest.fixture
def served(socket_path: str) -> Iterator[Child]:
    with serving(socket_path) as child:
        yield child


def run(*arguments: str, status: int = 0) -> str:
    """Standard output of the command; its one line of errors, if it is to fail."""
    done = commands.run(*arguments)
    assert done.returncode == status, done.stderr
    if not status:
        assert done.stderr == ""
        return done.stdout
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


class TestStatus:
    def test_nobody(self, served: Child, socket_path: str) -> None:
        lines = run("status", "-S", socket_path).splitlines()
        assert lines[0].startswith(f"server pid {served.pid}, ivshmem ")
        assert lines[1:] == [
            "",
            f"region default: 4K (anonymous), 2 vectors, on {socket_path}",
            "  0 peers; since the start 0 joins, 0 leaves, 0 messages, 0 refused",
        ]

    def test_peers(self, served: Child, socket_path: str) -> None:
        with ivshmem.connect(socket_path, timeout=PATIENCE) as client:
            client.ring(0, 1)
            client.ring(0, 1)
            for _ in range(2):
                (row,) = run("status", "--control", f"{socket_path}.control").splitlines()[5:]
                assert re.fullmatch(rf" +0 +{os.getpid()} +\d+ .* up to date +1:2", row)
            assert client.wait(1, timeout=0) == 2

    def test_a_stalled_peer_is_stalled_since(self, socket_path: str) -> None:
        path = control.default_path(socket_path)
        with serving(socket_path, vectors=MANY), RawPeer(socket_path), ExitStack() as others:

            def stalled() -> float | None:
                others.enter_context(RawPeer(socket_path)).set_up(MANY)
                (region,) = control.request(path, {"do": "status"}, PATIENCE)["regions"]
                since = region["peers"][0]["stalled_since"]
                assert since is None or isinstance(since, float)
                return since

            clock = time.strftime("%H:%M:%S", time.localtime(until(stalled)))
            others.enter_context(RawPeer(socket_path)).set_up(MANY)
            row = run("status", "-S", socket_path).splitlines()[5]
            assert re.search(rf"^ +0 .* stalled since {clock} \(\d+ s\), \d+ unsent +-$", row)

    def test_json(self, served: Child, socket_path: str) -> None:
        with ivshmem.connect(socket_path, timeout=PATIENCE):
            found = json.loads(run("status", "-S", socket_path, "--json"))
        assert found["server"]["pid"] == served.pid
        (peer,) = found["regions"][0]["peers"]
        assert peer["pid"] == os.getpid()
        assert peer["guest"] == ""
        assert peer["interrupts"] == [0, 0]

    def test_a_guest_s_name(self, served: Child, socket_path: str) -> None:
        """A process that looks like QEMU from outside."""
        code = (
            "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]);"
            "sys.stdin.read()"
        )
        command = ["qemu-system-test", "-c", code, socket_path, "-name", "guest=web\033[2J1,x=y"]
        with subprocess.Popen(command, executable=sys.executable, stdin=subprocess.PIPE) as guest:
            path = control.default_path(socket_path)
            until(lambda: control.request(path, {"do": "status"})["regions"][0]["peers"])
            assert r" web\x1b[2J1 " in run("status", "-S", socket_path)
            guest.communicate()

    def test_evict(self, served: Child, socket_path: str) -> None:
        with ivshmem.connect(socket_path, timeout=PATIENCE) as client:
            assert run("evict", "0", "-S", socket_path) == "peer 0 of region default was evicted\n"
            assert isinstance(client.next_event(PATIENCE), ivshmem.Disconnected)
        line = run("evict", "0", "-S", socket_path, status=1)
        assert line.startswith("ivshmem: region default: peer 0 is not connected")
        remedy = re.fullmatch(r".* \(`ivshmem (.*)` lists who is\)", line)
        assert remedy is not None, line
        assert socket_path in run(*remedy[1].split())
        line = run("evict", "0", "--region", "x", "-S", socket_path, status=1)
        assert line == 'ivshmem: no region "x" is served here: there are default'
        assert "allowed are 0 to 65535" in run("evict", "65536", "-S", socket_path, status=2)

    def test_reload(self, served: Child, socket_path: str) -> None:
        assert run("reload", "-S", socket_path) == "nothing has changed\n"


class TestNoControlSocket:
    @pytest.mark.parametrize("command", [["status"], ["top"], ["evict", "1"], ["reload"]])
    def test_no_server(self, socket_path: str, command: list[str]) -> None:
        assert run(*command, "-S", socket_path, status=1) == (
            f"ivshmem: {socket_path}: no such socket: start the server (ivshmem serve), or give"
            " the path of one that runs"
        )

    def test_a_server_that_was_killed(self, socket_path: str) -> None:
        with python(SERVE, socket_path, TESTS, "text", str(VECTORS)) as child:
            child.expect("READY")
            child.kill()
        line = run("status", "-S", socket_path, status=1)
        assert line.startswith(f"ivshmem: {socket_path}: nobody listens here: start the server")
        os.unlink(socket_path)
        os.unlink(f"{socket_path}.control")

    def test_a_server_of_another_kind(self, socket_path: str) -> None:
        """It is not connected to: QEMU's example server would end when we go."""
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(socket_path)
            listener.listen()
            assert run("status", "-S", socket_path, status=1) == (
                f"ivshmem: {socket_path}: this server has no control socket there. If it has one"
                " elsewhere, give --control PATH; QEMU's example server has none"
            )
            listener.setblocking(False)
            with pytest.raises(BlockingIOError):
                listener.accept()
        os.unlink(socket_path)

    def test_the_wrong_socket(self, served: Child, socket_path: str) -> None:
        line = run("status", "--control", socket_path, status=1)
        assert f"{socket_path}: this is not a control socket" in line
        assert " 0 joins" in run("status", "-S", socket_path)

    @pytest.mark.parametrize(
        "reply",
        [
            b'{"ok":true}\n',
            b'{"ok":true,"server":{},"regions":[{}]}\n',
            b'{"ok":true,"server":[],"regions":{}}\n',
            b'{"ok":true,"server":{"pid_namespace":1},"regions":[{"peers":[{"pid":"\\u0000"}]}]}\n',
        ],
    )
    def test_a_reply_that_makes_no_sense(self, socket_path: str, reply: bytes) -> None:
        def answer(sock: socket.socket) -> None:
            sock.recv(1000)
            sock.sendall(reply)

        with FakeServer(socket_path, answer):
            line = run("status", "--control", socket_path, status=1)
        assert "the server's reply makes no sense" in line


class TestLog:
    def test_json(self, socket_path: str) -> None:
        with serving(socket_path, "json", MANY) as server:
            lines = iter(_Lines(server.process))

            def event(kind: str) -> dict[str, Any]:
                """The next one of this kind, of the first peer: others may be slow, too."""
                found = next(
                    found for found in lines if found["event"] == kind and found.get("peer", 0) == 0
                )
                assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", found.pop("time"))
                return found

            process = Path("/proc/self/comm").read_text().rstrip("\n")
            who = {"peer": 0, "pid": os.getpid(), "uid": os.getuid(), "process": process}
            with RawPeer(socket_path) as sleeper:
                joined = event("joined")
                assert joined.pop("since") == pytest.approx(time.time(), abs=PATIENCE)
                assert joined == {
                    "level": "info",
                    "event": "joined",
                    "text": f"peer 0 joined: {process} (pid {os.getpid()}), {MANY} vectors",
                    "gid": os.getgid(),
                    "vectors": MANY,
                    **who,
                }
                with ExitStack() as others:
                    path = control.default_path(socket_path)

                    def is_stalled() -> bool:
                        peer = others.enter_context(RawPeer(socket_path)).set_up(MANY)
                        others.callback(peer.drain)
                        (region,) = control.request(path, {"do": "status"}, PATIENCE)["regions"]
                        return region["peers"][0]["stalled_since"] is not None

                    until(is_stalled)
                    stalled = event("stalled")
                    assert stalled.pop("since") > 0
                    assert stalled.pop("pending") >= 0
                    assert re.fullmatch(
                        r"peer 0 does not read: .* \(pid \d+\), since [\d:]{8} \(\d+ s\),"
                        r" unsent messages: \d+",
                        stalled.pop("text"),
                    )
                    expected = {"event": "stalled", "region": "default", **who}
                    assert stalled == {"level": "warning", **expected}
                    until(lambda: not sleeper.drain())
                    reading = event("reading")
                    assert reading.pop("seconds") > 0
                    assert reading.pop("text").startswith("peer 0 reads again: ")
                    expected = {"event": "reading", "region": "default", **who}
                    assert reading == {"level": "info", **expected}
                run("evict", "0", "-S", socket_path)
                evicted = event("evicted")
                assert evicted["peer"] == 0
                assert evicted["by_uid"] == os.getuid()
                until(lambda: event("left")["peer"] == 0)

    def test_text(self, served: Child, socket_path: str) -> None:
        with RawPeer(socket_path) as peer:
            peer.set_up(VECTORS)
            lines = _Lines(served.process)
            assert lines.line().startswith("peer 0 joined: ")
            run("evict", "0", "-S", socket_path)
            told = [lines.line(), lines.line()]
            assert f"ivshmem: peer 0 of default was evicted, as uid {os.getuid()} asked" in told
            assert any(line.startswith("peer 0 left: ") for line in told)


class _Lines:
    """A process's standard error, a line at a time."""

    def __init__(self, process: subprocess.Popen[Any]) -> None:
        assert process.stderr is not None
        self._fd = process.stderr.fileno()
        self._begun = b""

    def line(self) -> str:
        while b"\n" not in self._begun:
            ready, _, _ = select.select([self._fd], [], [], PATIENCE)
            assert ready, "the child wrote nothing"
            data = os.read(self._fd, 1 << 16)
            assert data, "the child has ended"
            self._begun += data
        line, _, self._begun = self._begun.partition(b"\n")
        return line.decode()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            line = self.line()
            # A supervisor, which has no log, writes plain lines.
            found = json.loads(line) if line.startswith("{") else {"event": "log"}
            assert isinstance(found, dict)
            yield found


class TestServe:
    """The real `ivshmem serve`."""

    @staticmethod
    @contextlib.contextmanager
    def server(*arguments: str) -> Iterator[subprocess.Popen[str]]:
        with subprocess.Popen(
            [*IVSHMEM, "serve", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                assert process.stdout is not None
                for _ in range(4):
                    assert process.stdout.readline()
                yield process
            finally:
                process.terminate()

    def test_a_control_socket_beside_the_region_s(self, socket_path: str) -> None:
        with self.server("-S", socket_path, "-l", "64K") as process:
            assert run("status", "-S", socket_path).startswith(f"server pid {process.pid}, ")
            line = run("reload", "-S", socket_path, status=1)
            assert line == ("ivshmem: there is no configuration to read again: serve --config FILE")
        assert process.returncode == 0
        assert not os.path.exists(f"{socket_path}.control")

    def test_elsewhere_or_nowhere(self, socket_path: str, directory: Path) -> None:
        other = str(directory / "elsewhere")
        with self.server("-S", socket_path, "--control", other):
            assert "has no control socket" in run("status", "-S", socket_path, status=1)
            assert run("status", "--control", other).startswith("server pid ")
        assert not os.path.exists(other)
        with self.server("-S", socket_path, "--no-control"):
            assert os.listdir(directory) == ["socket"]

    def test_a_path_without_room_for_more(self, directory: Path) -> None:
        path = f"{directory}/".ljust(105, "x")
        line = run("serve", "-S", path, status=1)
        assert line.startswith(f"ivshmem: {path}.control: no control socket: a socket path has")
        assert line.endswith("; give --control PATH, or --no-control")
        assert os.listdir(directory) == []
        # Both remedies, as they are printed.
        for remedy in (["--control", f"{directory}/control"], ["--no-control"]):
            with self.server("-S", path, *remedy) as process:
                pass
            assert process.returncode == 0

    def test_metrics_and_a_log_as_json(self, socket_path: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = str(taken.getsockname()[1])
            line = run("serve", "-S", socket_path, "--metrics", port, status=1)
            assert line == (
                f"ivshmem: 127.0.0.1:{port}: address already in use: choose another address"
            )
        line = run("serve", "-S", socket_path, "--metrics", "x", status=1)
        assert line.startswith("ivshmem: x is not an address: give [HOST:]PORT")
        with self.server(
            "-S", socket_path, "--metrics", port, "--metrics-peers", "--log-format", "json"
        ) as process:
            with RawPeer(socket_path):
                assert process.stderr is not None
                told = json.loads(process.stderr.readline())
                assert (told["event"], told["address"]) == ("metrics", f"127.0.0.1:{port}")
                assert json.loads(process.stderr.readline())["event"] == "joined"
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
                    body = response.read().decode()
        assert 'ivshmem_peers{region="ivshmem"} 1.0\n' in body
        assert "\nivshmem_peer_pending_messages{" in body
        assert process.returncode == 0

    def test_the_port_that_the_kernel_chose_is_in_the_log(self, socket_path: str) -> None:
        with self.server("-S", socket_path, "--metrics", "0", "--quiet") as process:
            assert process.stderr is not None
            line = process.stderr.readline()
            found = re.search(r"metrics are at http://127\.0\.0\.1:(\d+)/metrics$", line)
            assert found is not None, line
            url = f"http://127.0.0.1:{found[1]}/metrics"
            with urllib.request.urlopen(url) as response:
                assert b"\nivshmem_info{" in response.read()
        assert process.returncode == 0

    def test_a_configuration(self, socket_path: str, directory: Path) -> None:
        pytest.importorskip("tomllib")
        file, where = directory / "c.toml", directory / "ctl"
        head = f'[service]\ncontrol = "{where}"\n'
        one = f'[region.one]\nsocket = "{socket_path}"\nsize = "4K"\n'
        two = f'[region.two]\nsocket = "{socket_path}2"\nsize = "4K"\n'
        file.write_text(head + one)
        with subprocess.Popen(
            [*IVSHMEM, "serve", "--config", str(file), "--log-format", "json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline()
            file.write_text(head + one + two)
            assert run("reload", "--control", str(where)) == "region two: added\n"
            file.write_text(head + one + two.replace("4K", "3K"))
            line = run("reload", "--control", str(where), status=1)
            assert str(file) in line
            assert "3K" in line
            assert "region two: " in run("status", "--control", str(where))
            file.write_text(head + one)
            assert run("reload", "--control", str(where)) == "region two: removed\n"
            process.terminate()
            _, errors = process.communicate(timeout=PATIENCE)
        events = [json.loads(line)["event"] for line in errors.splitlines()]
        assert events == ["reloaded", "unreloaded", "reloaded"]

    def test_events_of_refusals_and_of_another_process(self, socket_path: str) -> None:
        options = ("--supervise", "--log-format", "json", "--peers-per-uid", "1")
        with self.server("-S", socket_path, *options) as process:
            lines = iter(_Lines(process))
            with RawPeer(socket_path) as peer:
                peer.set_up(1)
                with RawPeer(socket_path) as refused:
                    assert refused.receive() is None
                assert next(lines)["event"] == "joined"
                found = next(lines)
                assert found["event"] == "refused"
                assert found["uid"] == os.getuid()
                assert found["reason"]
                path = control.default_path(socket_path)
                before = control.request(path, {"do": "status"}, PATIENCE)
                os.kill(before["server"]["pid"], signal.SIGKILL)
                found = next(line for line in lines if line["event"] != "log")
                assert found["event"] == "takeover"
                after = until(lambda: _answer(path))
                assert found["pid"] == after["server"]["pid"] != before["server"]["pid"]
                assert after["regions"][0]["peers"] == before["regions"][0]["peers"]


def _answer(path: str) -> dict[str, Any] | None:
    """What a control socket says, if somebody is there."""
    with contextlib.suppress(OSError):
        return control.request(path, {"do": "status"}, PATIENCE)
    return None
