"""200 peers with 8 vectors each connect one after the other, and each ends with every vector of
every peer, also when ten of them stop reading for a while. (QEMU's example server fails this at 35
to 47 peers.) Peers that come and go do no harm to who stays.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.limits import open_files
from support.peer import RawPeer
from support.waiting import PATIENCE, until

import ivshmem
from ivshmem.protocol.limits import MAX_ID

PEERS, VECTORS = 200, 8
FEWER = 60  # by day: more than QEMU's example server can do

MakeServer = Callable[..., ivshmem.Server]


class Crowd:
    """Peers that ring each doorbell they get, at once, with the number that belongs to its name.

    A doorbell that led to another vector than its name says would spoil the sums of both.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.peers: list[RawPeer] = []
        self._own: dict[RawPeer, list[int]] = {}
        numbers = random.Random(1)  # noqa: S311
        self._numbers = [[numbers.getrandbits(40) for _ in range(VECTORS)] for _ in range(PEERS)]

    def join(self) -> RawPeer:
        own: list[int] = []

        def keep(peer_id: int, vector: int, fd: int) -> None:
            os.eventfd_write(fd, self._numbers[peer_id][vector])
            if peer_id == peer.id:
                own.append(fd)
            else:
                os.close(fd)

        peer = RawPeer(self.path, keep)
        self.peers.append(peer)
        self._own[peer] = own
        return peer

    def check(self) -> None:
        """Everyone rang every vector of everyone once."""
        everyone = dict.fromkeys(range(len(self.peers)), VECTORS)
        for peer in self.peers:
            assert peer.counts == everyone
            assert not peer.left
        for peer in self.peers:
            sums = [os.eventfd_read(fd) for fd in self._own[peer]]
            assert sums == [len(self.peers) * number for number in self._numbers[peer.id]]

    def close(self) -> None:
        for peer in self.peers:
            peer.close()
            for fd in self._own[peer]:
                os.close(fd)


@pytest.fixture
def crowd(socket_path: str) -> Iterator[Crowd]:
    made = Crowd(socket_path)
    yield made
    made.close()


def complete(peers: list[RawPeer], number: int) -> bool:
    """Whether these have every vector of everyone, after another look."""
    return all(sum(p.counts.values()) == number * VECTORS for p in peers if p.drain() is not None)


@pytest.mark.parametrize(
    ("number", "lazy"),
    [
        (FEWER, 3),
        pytest.param(PEERS, 0, marks=pytest.mark.nightly),
        pytest.param(PEERS, 10, marks=pytest.mark.nightly),
    ],
)
def test_everyone_gets_every_vector(
    server: MakeServer, crowd: Crowd, number: int, lazy: int
) -> None:
    """Of those who do not read, half stop after their set-up, and half never begin."""
    with open_files(8192):
        serving = server(vectors=VECTORS)
        stalled: list[RawPeer] = []
        for each in range(number):
            peer = crowd.join()
            if each % 20 == 7 and len(stalled) < lazy:
                if len(stalled) % 2:
                    peer.set_up(VECTORS)
                stalled.append(peer)
                # Its id would be the next one's if that were accepted first.
                until(lambda n=each: len(serving.peers) == n + 1)  # type: ignore[misc]
            else:
                peer.set_up(VECTORS)
                assert peer.id == each
            for other in crowd.peers:
                if other not in stalled:
                    other.drain()
        awake = [peer for peer in crowd.peers if peer not in stalled]
        until(lambda: complete(awake, number), "those who read know everyone")
        assert len(stalled) == lazy
        assert not any(sum(p.counts.values()) == number * VECTORS for p in stalled)
        until(lambda: complete(stalled, number), "those who read again know everyone")
        crowd.check()


def test_everyone_leaves(server: MakeServer, socket_path: str) -> None:
    """The last one is told of every other, once; one who does not read costs nobody anything."""
    serving = server(vectors=2)
    peers = [RawPeer(socket_path, lambda _id, _n, fd: os.close(fd)).set_up(2) for _ in range(100)]
    last, lazy = peers[0], peers[1]
    last.take_until(lambda: sum(last.counts.values()) == 200)
    for peer in peers[2:]:
        peer.close()
    last.take_until(lambda: len(last.left) == 98)
    assert last.counts == {0: 2, 1: 2}
    until(lambda: len(serving.peers) == 2)
    lazy.take_until(lambda: lazy.counts == {0: 2, 1: 2})
    last.close()
    lazy.close()


def test_come_and_go_past_one_who_does_not_read(server: MakeServer, socket_path: str) -> None:
    """Far more than fits into its buffer happens; then it learns what is true."""
    serving = server(vectors=4)
    stayer = RawPeer(socket_path).set_up(4)
    watcher = RawPeer(socket_path).set_up(4)
    for _ in range(300):
        with RawPeer(socket_path) as guest:
            guest.set_up(4)
        until(lambda: len(serving.peers) == 2)
    newest = RawPeer(socket_path).set_up(4)
    there = {stayer.id, watcher.id, newest.id}
    for peer in (stayer, watcher):
        peer.take_until(lambda p=peer: set(p.counts) == there and p.counts[newest.id] == 4)  # type: ignore[misc]
        assert peer.vectors[newest.id] == newest.vectors[newest.id]
    for peer in (stayer, watcher, newest):
        peer.close()


@pytest.mark.nightly
def test_more_joins_than_ids(tmp_path: Path) -> None:
    """One who stays is told of all; when it knows every id, newcomers wait until it has gone."""
    path = str(tmp_path / "socket")
    joins = MAX_ID + 1 + 3000
    command = [sys.executable, "-m", "ivshmem", "serve", "--quiet", "--no-control", "-S", path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as server:
        assert server.stdout is not None
        assert server.stderr is not None
        server.stdout.readline()
        stays = RawPeer(path).set_up(1)
        try:
            for number in range(joins):
                with RawPeer(path) as newcomer:
                    if number == MAX_ID:
                        assert not newcomer.readable(0.5)
                        assert b"only 4095 ids left" in server.stderr.readline()
                        assert b"every id is taken, or known" in server.stderr.readline()
                        stays.take_until(lambda: len(stays.left) == MAX_ID)  # each but once
                        stays.close()
                    newcomer.read_bytes(16)
                if number % 50 == 0 and number < MAX_ID:
                    stays.drain()
        finally:
            stays.close()
            server.terminate()
        assert server.wait(PATIENCE) == 0
