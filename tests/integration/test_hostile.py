"""Clients that vanish at any byte, send garbage, are killed, half-open, or never read.

The others notice nothing but the leave, and nothing of them stays behind.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
from collections.abc import Callable, Iterator

import pytest
from support.children import python
from support.leaks import open_fds
from support.peer import Eventfds, RawPeer, send_raw
from support.waiting import PATIENCE, Background, until

import ivshmem

VECTORS = 2
MakeServer = Callable[..., ivshmem.Server]

CLIENT = """
    import sys, ivshmem
    with ivshmem.connect(sys.argv[1], timeout=60) as client:
        client.peers
        print(f"READY {client.id}")
        for event in client.events():
            print(event)
"""


@pytest.fixture
def serving(server: MakeServer) -> ivshmem.Server:
    return server(vectors=VECTORS)


@pytest.fixture
def witness(serving: ivshmem.Server) -> Iterator[RawPeer]:
    """A strict peer, the first; in the end it knows nobody else, and a newcomer is served."""
    with RawPeer(serving.path) as peer:
        peer.set_up(VECTORS)
        yield peer
        until(lambda: len(serving.peers) == 1, "the others have gone")
        with RawPeer(serving.path) as newcomer:
            newcomer.set_up(VECTORS)
            assert newcomer.vectors[peer.id] == peer.vectors[peer.id]
            # The last of the others may have stood in the backlog until now.
            peer.take_until(lambda: peer.counts == {peer.id: VECTORS, newcomer.id: VECTORS})
            assert peer.vectors[newcomer.id] == newcomer.vectors[newcomer.id]
        peer.take_until(lambda: set(peer.counts) == {peer.id})


HANDSHAKE = 8 * (3 + VECTORS + VECTORS)  # version, id, memory, the witness, itself


def test_vanishing_at_any_byte(serving: ivshmem.Server, witness: RawPeer) -> None:
    before = len(open_fds())
    for count in range(HANDSHAKE + 1):
        with RawPeer(serving.path) as peer:
            peer.read_bytes(count)
        until(lambda: len(serving.peers) == 1)
        witness.drain()
    # One eventfd array may be kept for the next newcomer.
    assert len(open_fds()) <= before + VECTORS


def test_vanishing_at_any_byte_while_nobody_waits(
    serving: ivshmem.Server, witness: RawPeer
) -> None:
    """The same without a pause: leaves and joins overtake each other."""
    for count in range(HANDSHAKE + 1):
        with RawPeer(serving.path) as peer:
            peer.read_bytes(count)
    witness.take_until(lambda: not serving.peers[1:])


def test_connecting_and_going_at_once(serving: ivshmem.Server, witness: RawPeer) -> None:
    for _ in range(300):
        RawPeer(serving.path).close()


def test_several_at_once(serving: ivshmem.Server, witness: RawPeer) -> None:
    """Threads of peers that vanish anywhere, beside two clients that ring each other."""

    def storm(seed: int) -> None:
        numbers = random.Random(seed)  # noqa: S311
        for _ in range(40):
            with RawPeer(serving.path) as peer:
                peer.read_bytes(numbers.choice([0, 8, 24, 25, 31, 40, 47, 56]))

    with (
        ivshmem.connect(serving.path, timeout=PATIENCE) as one,
        ivshmem.connect(serving.path, timeout=PATIENCE) as other,
    ):
        storms = [Background(lambda n=n: storm(n)) for n in range(4)]  # type: ignore[misc]
        for _ in range(200):
            one.ring(other.id, 1)
            assert other.wait(1, PATIENCE) == 1
            other.ring(one.id, 0)
            assert one.wait(0, PATIENCE) == 1
            assert witness.drain() >= 0
        for thread in storms:
            thread.result()
        until(lambda: len(serving.peers) == 3)
        until(lambda: one.peers == sorted([witness.id, other.id]))
        until(lambda: other.peers == sorted([witness.id, one.id]))
        assert one.connected
        assert other.connected


@pytest.mark.parametrize("when", ["first", "during", "after"])
def test_garbage(serving: ivshmem.Server, witness: RawPeer, when: str) -> None:
    """What peers send is not read. It disturbs nobody, the sender's own set-up included."""
    rubbish = random.Random(1).randbytes(1 << 16)  # noqa: S311
    with RawPeer(serving.path) as peer, Eventfds() as fds:
        if when == "during":
            peer.read_bytes(27)
        elif when == "after":
            peer.set_up(VECTORS)
        peer.socket.setblocking(False)
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            socket.send_fds(peer.socket, [b"\xff" * 8], fds.make(20))
            while True:
                peer.socket.send(rubbish)
        if when == "first":
            peer.set_up(VECTORS)
        elif when == "during":
            peer.read_bytes(HANDSHAKE - 27)
        witness.take_until(lambda: len(witness.counts) == 2 and not peer.drain())
        with ivshmem.connect(serving.path, timeout=PATIENCE) as client:
            client.ring(witness.id)


def test_garbage_with_descriptors_costs_the_server_none(
    serving: ivshmem.Server, witness: RawPeer
) -> None:
    with RawPeer(serving.path) as peer, Eventfds() as fds:
        made = fds.make(5)
        before = len(open_fds())
        with contextlib.suppress(BrokenPipeError):
            for _ in range(5):
                send_raw(peer.socket, 0, *made)
        peer.set_up(VECTORS)
        assert len(open_fds()) <= before + 2 * (1 + VECTORS)


@pytest.mark.parametrize("early", [True, False])
def test_half_open(serving: ivshmem.Server, witness: RawPeer, early: bool) -> None:
    """A peer that will never send again is as good as any: none does."""
    with RawPeer(serving.path) as peer:
        if early:
            peer.socket.shutdown(socket.SHUT_WR)
        peer.set_up(VECTORS)
        if not early:
            peer.socket.shutdown(socket.SHUT_WR)
        with RawPeer(serving.path) as third:
            third.set_up(VECTORS)
            peer.take_until(lambda: peer.counts.get(third.id) == VECTORS)
        peer.take_until(lambda: third.id in peer.left)


@pytest.mark.parametrize("early", [True, False])
def test_a_peer_that_refuses_to_listen_has_left(
    serving: ivshmem.Server, witness: RawPeer, early: bool
) -> None:
    with RawPeer(serving.path) as peer:
        if not early:
            peer.set_up(VECTORS)
        peer.socket.shutdown(socket.SHUT_RD)
        with RawPeer(serving.path) as third:
            third.set_up(VECTORS)  # the server notices at the latest when it has something to tell
            until(lambda: {p.id for p in serving.peers} == {witness.id, third.id})


@pytest.mark.nightly
def test_never_reading(serving: ivshmem.Server, witness: RawPeer) -> None:
    """Its buffer fills up, and everybody else goes on."""
    with RawPeer(serving.path):
        until(lambda: len(serving.peers) == 2)
        crowd = [RawPeer(serving.path).set_up(VECTORS) for _ in range(150)]
        witness.take_until(lambda: sum(witness.counts.values()) == 152 * VECTORS)
        for peer in crowd:
            peer.close()
        until(lambda: len(serving.peers) == 2)
        witness.take_until(lambda: len(witness.counts) == 2)


def test_killed(serving: ivshmem.Server, witness: RawPeer) -> None:
    """SIGKILL of a real client: one leave, and its memory and doorbells do no harm."""
    with ivshmem.connect(serving.path, timeout=PATIENCE) as client:
        with python(CLIENT, serving.path) as child:
            child.expect("READY 2")
            assert client.next_event(PATIENCE) == ivshmem.PeerJoined(2)
            client.ring(2, 1)
            child.expect("Interrupt(vector=1, rings=1)")
            (process,) = [peer for peer in serving.peers if peer.id == 2]
            assert process.pid == child.pid
            child.kill()
        assert client.next_event(PATIENCE) == ivshmem.PeerLeft(2)
        with pytest.raises(ivshmem.NoSuchPeer):
            client.ring(2)
        assert client.peers == [witness.id]
        assert client.next_event(0) is None


@pytest.mark.nightly
def test_killed_while_stopped(serving: ivshmem.Server, witness: RawPeer) -> None:
    """A client that is stopped does not read; then it goes on where it was, or dies."""
    with python(CLIENT, serving.path) as child:
        child.expect("READY 1")
        os.kill(child.pid, signal.SIGSTOP)
        guests = [RawPeer(serving.path).set_up(VECTORS) for _ in range(170)]
        for guest in guests[1:]:
            guest.close()
        until(lambda: len(serving.peers) == 3)
        os.kill(child.pid, signal.SIGCONT)
        joined: set[str] = set()
        while joined != {f"PeerJoined(peer={guests[0].id})"}:
            line = child.line()
            if line.startswith("PeerLeft"):
                joined.remove(line.replace("Left", "Joined"))
            else:
                assert line.startswith("PeerJoined"), line
                joined.add(line)
        os.kill(child.pid, signal.SIGSTOP)
        child.kill()
        guests[0].close()
    witness.take_until(lambda: len(witness.counts) == 1 or not serving.peers[1:])


def test_the_region_survives_its_users(serving: ivshmem.Server, witness: RawPeer) -> None:
    with ivshmem.connect(serving.path, timeout=PATIENCE) as client:
        with python(
            """
            import os, signal, sys, ivshmem
            client = ivshmem.connect(sys.argv[1], timeout=60)
            memoryview(client.region)[10:15] = b"hello"
            try:
                os.ftruncate(client.region.fileno(), 0)
            except PermissionError:
                print("READY")
            os.kill(os.getpid(), signal.SIGKILL)
            """,
            serving.path,
        ) as child:
            child.expect("READY")
            child.process.wait(PATIENCE)
        with memoryview(client.region) as view:
            assert bytes(view[10:15]) == b"hello"
