"""The server is killed every second for a minute, and neither guests nor host processes notice."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.peer import RawPeer

import ivshmem
from ivshmem.qemu import cmdline

from .harness import MakeGuest
from .host import TIMEOUT

VECTORS = 2

STAYS = """
    from ivshmem import guest
    with guest.open() as device, memoryview(device.region) as memory:
        print("READY", device.id, flush=True)
        for line in iter(input, "end"):
            verb, peer = line.split()
            if verb == "ring":
                device.ring(int(peer), 1)
                continue
            while not memory[8]:
                if device.wait(0, timeout=1):
                    memory[0] = (memory[0] + 1) % 256
                    device.ring(int(peer), 0)
            print("DONE", flush=True)
"""

COMES_AND_GOES = """
    from ivshmem import guest
    with guest.open() as device:
        print("READY", device.id, flush=True)
        device.ring(int(input()), 1)
        input()
"""


class Supervised:
    """`ivshmem serve --supervise`: a parent, whose pid is in the pid file, and a child."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "socket"
        self._pid_file = directory / "pid"
        command = [sys.executable, "-m", "ivshmem", "serve", "--supervise", "--quiet"]
        command += ["-S", str(self.path), "-l", "1M", "-n", str(VECTORS)]
        self.process = subprocess.Popen(
            [*command, "--pid-file", str(self._pid_file)], stdout=subprocess.PIPE
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline().startswith(b"serving")

    def parent(self) -> int:
        return int(self._pid_file.read_text() or 0)

    def child(self) -> int:
        """The process that serves; 0 while there is none."""
        try:
            pid = self.parent()
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        except (OSError, ValueError):
            return 0
        return int(children[0]) if children else 0

    def close(self) -> None:
        deadline = time.monotonic() + TIMEOUT
        while self.path.exists() and time.monotonic() < deadline:
            with contextlib.suppress(OSError, ValueError):  # it is being replaced
                os.kill(self.parent(), signal.SIGTERM)
            time.sleep(0.1)
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        assert not self.path.exists()


@pytest.fixture
def supervised(tmp_path: Path) -> Iterator[Supervised]:
    server = Supervised(tmp_path)
    yield server
    server.close()


class Killer:
    """Kills the child, and each fifth time the parent, every second."""

    def __init__(self, server: Supervised) -> None:
        self._server = server
        self._end = threading.Event()
        self.killed: list[int] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._end.wait(1.0):
            child, parent = self._server.child(), self._server.parent()
            victim = parent if len(self.killed) % 5 == 4 else child
            if child and victim:
                os.kill(victim, signal.SIGKILL)
                self.killed.append(victim)

    def stop(self) -> None:
        self._end.set()
        self._thread.join()


class Visitors:
    """Guests that come one after the other, ring a host process that came with them, and go."""

    def __init__(self, guest: MakeGuest, path: Path) -> None:
        self._guest, self._path = guest, path
        self._end = threading.Event()
        self.came = 0
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._end.is_set():
                self._visit()
                self.came += 1
        except BaseException as error:
            self.error = error

    def _visit(self) -> None:
        arguments = cmdline.doorbell(str(self._path), VECTORS)
        visitor = self._guest(COMES_AND_GOES, args=arguments, iommu=True, name="visitor")
        assert visitor.expect("READY")
        with ivshmem.connect(self._path, timeout=TIMEOUT) as friend:
            visitor.send(str(friend.id))
            assert friend.wait(1, TIMEOUT), visitor.report()
        visitor.send("end")
        assert visitor.wait() == 0

    def stop(self) -> None:
        self._end.set()
        self._thread.join()


@pytest.mark.timeout(400)
@pytest.mark.parametrize("seconds", [4, pytest.param(60, marks=pytest.mark.nightly)])
def test_killed_every_second(guest: MakeGuest, supervised: Supervised, seconds: int) -> None:
    arguments = cmdline.doorbell(str(supervised.path), VECTORS)
    with ivshmem.connect(supervised.path) as host, memoryview(host.region) as memory:
        stays = guest(STAYS, args=arguments, iommu=True, name="stays")
        assert stays.expect("READY") == "READY 1"
        stays.send(f"echo {host.id}")
        rounds = 0
        killer = Killer(supervised)
        visitors = Visitors(guest, supervised.path)
        try:
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                with ivshmem.connect(supervised.path, timeout=TIMEOUT) as other:
                    other.ring(host.id, 1)
                    assert host.wait(1, TIMEOUT)
                for _ in range(20):
                    before = memory[0]
                    host.ring(1, 0)
                    assert host.wait(0, TIMEOUT), stays.report()
                    assert memory[0] == (before + 1) % 256
                    rounds += 1
        finally:
            visitors.stop()
            killer.stop()
        memory[8] = 1
        assert stays.expect("DONE") == "DONE"
        assert visitors.error is None
        print(f"{len(killer.killed)} kills, {visitors.came} visitors, {rounds} round trips")
        assert len(killer.killed) > seconds / 2
        assert visitors.came >= max(1, seconds // 30)
        assert rounds > 100
        with RawPeer(str(supervised.path)) as witness:
            witness.set_up(VECTORS)
            assert set(witness.counts) == {host.id, 1, witness.id}
            until_peers(host, [1, witness.id])
        with ivshmem.connect(supervised.path, timeout=TIMEOUT) as newcomer:
            # The guest was told of one who came after all that.
            stays.send(f"ring {newcomer.id}")
            assert newcomer.wait(1, TIMEOUT), stays.report()
        stays.send("end")
        assert stays.wait() == 0
        until_peers(host, [])
        assert host.connected


def until_peers(client: ivshmem.Client, ids: list[int]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while client.peers != ids:
        assert time.monotonic() < deadline, client.peers
        time.sleep(0.01)
