"""A server that is killed with SIGKILL again and again, and whose peers notice nothing.

The peers are strict: being told anything twice, out of order or not at all fails the test.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from support.peer import RawPeer
from support.waiting import PATIENCE

import ivshmem
from ivshmem.lasting.journal import Journal, Section
from ivshmem.server.records import member_record
from ivshmem.server.region_server import RegionServer
from ivshmem.system.listener import Listener

VECTORS = 3


class Kept:
    """The program support.kept, and which process serves at the moment."""

    def __init__(self, process: subprocess.Popen[str], path: str) -> None:
        self.process = process
        self.path = path
        self.pid = self._next_pid()

    def _next_pid(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def kill_and_wait(self) -> None:
        self.kill()
        self.pid = self._next_pid()


@contextmanager
def kept(path: Path, vectors: int = VECTORS) -> Iterator[Kept]:
    program = Path(__file__).parent.parent / "support" / "kept.py"
    process = subprocess.Popen(
        [sys.executable, str(program), str(path), str(vectors)], stdout=subprocess.PIPE, text=True
    )
    with process:
        try:
            yield Kept(process, str(path))
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE) == 0
            assert not path.exists()
        finally:
            process.kill()


def knows(peer: RawPeer, ids: set[int]) -> bool:
    return set(peer.counts) == ids and set(peer.counts.values()) == {VECTORS}


def settle(peers: list[RawPeer]) -> None:
    """Read until everybody knows exactly everybody."""
    ids = {peer.id for peer in peers}
    for peer in peers:
        peer.take_until(partial(knows, peer, ids))
        for other in peers:
            assert peer.vectors[other.id] == other.vectors[other.id]
    for peer in peers:
        assert not peer.readable(0)


def test_at_rest(tmp_path: Path) -> None:
    with kept(tmp_path / "socket") as server:
        peers = [RawPeer(server.path).set_up(VECTORS) for _ in range(5)]
        settle(peers)
        for _ in range(3):
            server.kill_and_wait()
            peers.pop(2).close()
            peers.append(RawPeer(server.path).set_up(VECTORS))
            settle(peers)
        assert peers[-1].id == 7
        for peer in peers:
            peer.close()


NIGHTLY = [pytest.param(seed, 60, marks=pytest.mark.nightly) for seed in range(10)]


@pytest.mark.parametrize(("seed", "kills"), [(0, 15), *NIGHTLY])
def test_at_any_moment(tmp_path: Path, seed: int, kills: int) -> None:
    dice = random.Random(seed)  # noqa: S311
    with kept(tmp_path / "socket") as server:
        peers = [RawPeer(server.path).set_up(VECTORS) for _ in range(8)]
        for _ in range(kills):
            for _ in range(dice.randrange(6)):
                peers.append(RawPeer(server.path))
                if dice.random() < 0.5:
                    peers.pop(dice.randrange(len(peers))).close()
            time.sleep(dice.random() * 0.002)
            server.kill_and_wait()
            for peer in dice.sample(peers, len(peers) // 2):
                peer.drain()
                assert not peer.eof
        for peer in peers:
            peer.set_up(VECTORS)
        settle(peers)
        for peer in peers:
            peer.close()


def test_who_is_evicted_sees_the_end_before_it_is_noted(
    socket_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or else a successor would take the connection for that of a newcomer."""
    note = Section.note
    ended: list[bool] = []

    def looked_at(section: Section, *record: object) -> None:
        if record[0] == "leave":
            peer.drain()
            ended.append(peer.eof)
        note(section, *record)

    monkeypatch.setattr(Section, "note", looked_at)
    with ivshmem.Server(socket_path, 4096, VECTORS) as server, RawPeer(socket_path) as peer:
        server.step(PATIENCE)
        peer.set_up(VECTORS)
        server.evict(peer.id)
    assert ended == [True]


def test_counts_go_on(socket_path: str) -> None:
    with contextlib.ExitStack() as stack:
        region = stack.enter_context(ivshmem.Region.create(4096))
        listener = stack.enter_context(Listener(socket_path))
        journal = Journal()
        former = RegionServer(listener, region, VECTORS, journal=Section(journal, 1))
        for _ in range(3):
            peer = stack.enter_context(RawPeer(socket_path))
            former.step(PATIENCE)
        peer.close()
        former.step(PATIENCE)
        _, records = journal.read()
        with Listener.adopt(os.dup(listener.socket.fileno())) as another:
            with RegionServer(another, region, VECTORS) as server:
                told = [member_record(*record) for _, *record in records]
                server.resume(None, told, None, os.dup)
                assert server.counts == former.counts
                former.abandon()
        del former
        journal.close()
