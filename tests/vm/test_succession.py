"""The server is killed every second, and neither guests nor host processes notice."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.peer import RawPeer

import ivshmem
from ivshmem.qemu import cmdline

from .harness import Guest, MakeGuest
from .host import TIMEOUT
from .resident import Run
from .residents import Pair
from .supervised import Supervised

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


@pytest.fixture
def supervised(tmp_path: Path) -> Iterator[Supervised]:
    server = Supervised(tmp_path, VECTORS)
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
@pytest.mark.nightly
def test_killed_every_second_for_a_minute(guest: MakeGuest, supervised: Supervised) -> None:
    """While guests come and go."""
    arguments = cmdline.doorbell(str(supervised.path), VECTORS)
    with ivshmem.connect(supervised.path) as host:
        stays = guest(STAYS, args=arguments, iommu=True, name="stays")
        assert stays.expect("READY") == "READY 1"
        visitors = Visitors(guest, supervised.path)
        try:
            ring_while_killed(supervised, host, stays, 1, seconds=60)
        finally:
            visitors.stop()
        assert visitors.error is None
        assert visitors.came >= 2
        all_are_told(supervised, host, stays, guests=[1])
        stays.send("end")
        assert stays.wait() == 0
        until_peers(host, [])
        assert host.connected


def test_killed_every_second(pair: Pair, pair_host: ivshmem.Client) -> None:
    """While one guest rings, and the other one looks on."""
    stays = pair.a.run(STAYS)
    assert stays.expect("READY") == "READY 1"
    ring_while_killed(pair.server, pair_host, stays, 1, seconds=4)
    all_are_told(pair.server, pair_host, stays, guests=[1, 2])
    stays.send("end")
    assert stays.wait() == 0
    looks_on = pair.b.run(STAYS)
    assert looks_on.expect("READY") == "READY 2"
    all_are_told(pair.server, pair_host, looks_on, guests=[1, 2])
    looks_on.send("end")
    assert looks_on.wait() == 0
    assert pair_host.connected


def ring_while_killed(
    server: Supervised, host: ivshmem.Client, stays: Guest | Run, ident: int, seconds: int
) -> None:
    """The host and a guest ring each other, and clients come and go, while the server is killed."""
    stays.send(f"echo {host.id}")
    rounds = 0
    killer = Killer(server)
    try:
        with memoryview(host.region) as memory:
            end = time.monotonic() + seconds
            while time.monotonic() < end or len(killer.killed) <= seconds / 2:
                with ivshmem.connect(server.path, timeout=TIMEOUT) as other:
                    other.ring(host.id, 1)
                    assert host.wait(1, TIMEOUT)
                for _ in range(20):
                    before = memory[0]
                    host.ring(ident, 0)
                    assert host.wait(0, TIMEOUT), stays.report()
                    assert memory[0] == (before + 1) % 256
                    rounds += 1
            memory[8] = 1
    finally:
        killer.stop()
    assert stays.expect("DONE") == "DONE"
    print(f"{len(killer.killed)} kills, {rounds} round trips")
    assert rounds > 100


def all_are_told(
    server: Supervised, host: ivshmem.Client, stays: Guest | Run, guests: list[int]
) -> None:
    """The server, the host and a guest know of each other, and of one who comes after all that."""
    with RawPeer(str(server.path)) as witness:
        witness.set_up(server.vectors)
        assert set(witness.counts) == {host.id, *guests, witness.id}
        until_peers(host, [*guests, witness.id])
    with ivshmem.connect(server.path, timeout=TIMEOUT) as newcomer:
        stays.send(f"ring {newcomer.id}")
        assert newcomer.wait(1, TIMEOUT), stays.report()


def until_peers(client: ivshmem.Client, ids: list[int]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while client.peers != ids:
        assert time.monotonic() < deadline, client.peers
        time.sleep(0.01)
