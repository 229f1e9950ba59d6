"""One endpoint, one server, one region in many threads at once.

Knows: what threads may rely on. Holds on every build; a free-threaded one tries it hardest.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from support.children import python
from support.peer import Eventfds, RawPeer
from support.waiting import PATIENCE, Background, until

import ivshmem
from ivshmem import ClosedError, Interrupt, NoSuchPeer, PeerJoined, Region, Server
from ivshmem.native.mapping import AtomicU64

VECTORS = 4
MakeServer = Callable[..., Server]
Wait = Callable[[ivshmem.Client, int], int | Interrupt | None]

# Each way of waiting sleeps, and is woken, in a way of its own.
WAYS: dict[str, Wait] = {
    "plain": lambda client, vector: client.wait(vector),
    "limited": lambda client, vector: client.wait(vector, PATIENCE),
    "spinning": lambda client, vector: client.wait(vector, spin=0.001),
    "auto": lambda client, vector: client.wait(vector, spin="auto"),
    "spinning, limited": lambda client, vector: client.wait(vector, PATIENCE, spin=0.001),
    "any": lambda client, _: client.wait(),
    "any, spinning": lambda client, _: client.wait(spin=0.001),
    "several": lambda client, vector: client.wait([vector, (vector + 1) % VECTORS]),
}


def at_once(*calls: Callable[[], object]) -> list[Background]:
    """Threads that begin together when all of them are there."""
    barrier = threading.Barrier(len(calls))

    def begin(call: Callable[[], object]) -> object:
        barrier.wait(PATIENCE)
        return call()

    return [Background(lambda call=call: begin(call)) for call in calls]  # type: ignore[misc]


def finish(threads: Sequence[Background]) -> None:
    for thread in threads:
        thread.result()


def until_closed(call: Callable[[], object]) -> Callable[[], object]:
    """That call again and again; ClosedError ends it."""

    def run() -> None:
        with suppress(ClosedError):
            while True:
                call()

    return run


@pytest.fixture(autouse=True)
def quick_turns() -> Iterator[None]:
    """Threads that never wait give the lock of the interpreter away soon.

    Else each call of a thread beside them that waits takes as many times 5 ms as there are of them.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def clients(server: MakeServer, socket_path: str) -> Iterator[Callable[[], ivshmem.Client]]:
    """Connects clients to a server with some vectors; closes them."""
    server(vectors=VECTORS)
    with ExitStack() as stack:
        yield lambda: stack.enter_context(ivshmem.connect(socket_path, timeout=PATIENCE))


class Decoys:
    """Files and eventfds that take the numbers of descriptors which were closed just before."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.touch()
        self._files: list[int] = []
        self._eventfds = Eventfds()
        self._counters: list[int] = []

    def open(self, count: int) -> None:
        for _ in range(count):
            self._files.append(os.open(self._path, os.O_RDWR))
            self._counters += self._eventfds.make()

    def check(self) -> None:
        """Close them: nobody has written to any."""
        for fd in self._files:
            os.close(fd)
        self._files.clear()
        struck = []
        for fd in self._counters:
            with suppress(BlockingIOError):
                struck.append((fd, os.eventfd_read(fd)))
        self._counters.clear()
        self._eventfds.__exit__(None, None, None)
        assert not struck, f"rings landed in other eventfds: {struck}"
        assert self._path.stat().st_size == 0, "a ring landed in a file"


@pytest.fixture
def decoys(tmp_path: Path) -> Iterator[Decoys]:
    made = Decoys(tmp_path / "decoy")
    yield made
    made.check()


# -- ringing and waiting --------------------------------------------------------------------------

# Four threads ring every vector of the peer, four count what comes in on one each.
TWIN = """
    import sys, threading
    import ivshmem
    path, peer, rounds, vectors, expected = sys.argv[1], *map(int, sys.argv[2:])
    with ivshmem.connect(path, timeout=30) as client:
        begin = threading.Barrier(2 * vectors)
        totals = [0] * vectors

        def ring():
            begin.wait(30)
            for number in range(rounds):
                for vector in range(vectors):
                    client.ring(peer, vector)

        def count(vector):
            begin.wait(30)
            while totals[vector] < expected:
                totals[vector] += client.wait(vector)

        threads = [threading.Thread(target=ring) for _ in range(vectors)]
        threads += [threading.Thread(target=count, args=(v,)) for v in range(vectors)]
        print("READY")
        sys.stdin.readline()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print(*totals, *[client.wait(v, 0) for v in range(vectors)])
        sys.stdin.readline()
"""


@pytest.mark.parametrize("way", ["plain", "limited", "spinning", "auto", "spinning, limited"])
def test_every_ring_is_counted_once(
    clients: Callable[[], ivshmem.Client], socket_path: str, way: str
) -> None:
    """Eight threads here, eight in another process, over one client each."""
    rounds = 100
    expected = rounds * VECTORS
    client = clients()
    totals = [0] * VECTORS
    wait = WAYS[way]
    numbers = map(str, (client.id, rounds, VECTORS, expected))
    with python(TWIN, socket_path, *numbers) as child:
        child.expect("READY")
        (other,) = until(lambda: client.peers)

        def ring() -> None:
            for _ in range(rounds):
                for vector in range(VECTORS):
                    client.ring(other, vector)

        def count(vector: int) -> None:
            while totals[vector] < expected:
                rung = wait(client, vector)
                assert isinstance(rung, int)
                assert rung > 0
                totals[vector] += rung

        counters = [lambda v=v: count(v) for v in range(VECTORS)]
        threads = at_once(*[ring] * VECTORS, *counters)
        child.tell()
        finish(threads)
        assert totals == [expected] * VECTORS
        assert [client.wait(vector, 0) for vector in range(VECTORS)] == [None] * VECTORS
        child.expect(" ".join([str(expected)] * VECTORS + ["None"] * VECTORS))
        child.tell()
        child.finish()


@pytest.mark.parametrize("way", WAYS)
def test_waiters_of_the_same_vector_share_its_rings(
    clients: Callable[[], ivshmem.Client], way: str
) -> None:
    """What four threads are given is what four others rang, and closing sends all four home."""
    client, ringer = clients(), clients()
    rung = Counter[int]()
    lock = threading.Lock()
    rounds = 250

    def take() -> None:
        found = WAYS[way](client, 0)
        assert found is not None
        vector, count = found if isinstance(found, tuple) else (0, found)
        with lock:
            rung[vector] += count

    def ring() -> None:
        for _ in range(rounds):
            ringer.ring(client.id, 0)

    until(lambda: ringer.peers)
    takers = at_once(*[until_closed(take)] * 4)
    finish(at_once(*[ring] * 4))
    until(lambda: rung.total() >= 4 * rounds, "every ring")
    client.close()
    finish(takers)
    assert rung == {0: 4 * rounds}


@pytest.mark.parametrize(
    ("first", "closers"), [*((way, 1) for way in WAYS), ("plain", 2), ("spinning, limited", 2)]
)
def test_close_sends_every_waiter_home(
    clients: Callable[[], ivshmem.Client], decoys: Decoys, first: str, closers: int
) -> None:
    """Four wait in different ways, four ring, and the closers close nobody else's descriptor."""
    ways = list(WAYS.values())
    begin = list(WAYS).index(first)
    chosen = [ways[(begin + step) % len(ways)] for step in range(4)]
    other = clients()
    for _ in range(3):
        client = clients()
        until(lambda c=client: c.peers == [other.id])  # type: ignore[misc]

        waiters = [until_closed(lambda c=client, w=way: w(c, 0)) for way in chosen]  # type: ignore[misc]

        def ring_other(client: ivshmem.Client = client) -> None:
            client.ring(other.id, 1)

        def ring_self(client: ivshmem.Client = client) -> None:
            client.ring(client.id, 0)

        ringers = [until_closed(ring_self)] * 2 + [until_closed(ring_other)] * 2

        def close(client: ivshmem.Client = client) -> None:
            client.close()
            decoys.open(8)

        threads = at_once(*waiters, *ringers)
        until(lambda: other.wait(1, 0))  # they are at work
        finish(at_once(*[close] * closers))
        finish(threads)
        decoys.check()


@pytest.mark.parametrize("way", WAYS)
def test_close_sends_sleepers_home(clients: Callable[[], ivshmem.Client], way: str) -> None:
    """Eight of them, who sleep at the same vector."""
    for _ in range(3):
        client = clients()
        sleepers = [Background(lambda c=client: WAYS[way](c, 0)) for _ in range(8)]  # type: ignore[misc]
        client.close()
        for sleeper in sleepers:
            with pytest.raises(ClosedError):
                sleeper.result()


# -- peers that come and go -----------------------------------------------------------------------


@pytest.mark.parametrize("way", ["ring", "ring_all", "doorbell"])
def test_a_ring_never_lands_elsewhere(
    clients: Callable[[], ivshmem.Client], socket_path: str, decoys: Decoys, way: str
) -> None:
    """Four threads ring a peer while it leaves, and its descriptors' numbers are used again."""
    client = clients()
    target = -1
    done = False

    def ring() -> None:
        while not done:
            with suppress(NoSuchPeer):
                if way == "ring":
                    client.ring(target, 1)
                elif way == "ring_all":
                    client.ring_all([target], [0, 1, 2, 3])
                else:
                    bell = client.doorbell(target, 2)
                    while True:
                        bell.ring()

    ringers = at_once(*[ring] * 4)
    try:
        for _ in range(12):
            with RawPeer(socket_path) as peer:
                peer.set_up(VECTORS)
                target = peer.id
                until(lambda t=target: t in client.peers)  # type: ignore[misc]
            while client.peers:
                pass
            decoys.open(2 * VECTORS)
            decoys.check()
    finally:
        done = True
        finish(ringers)


def test_peers_from_many_threads(clients: Callable[[], ivshmem.Client], socket_path: str) -> None:
    """A list of those who were there at one moment, whoever else is looking."""
    client = clients()
    done = False

    def look() -> int:
        looks = 0
        while not done or looks == 0:
            peers = client.peers
            assert peers == sorted(set(peers))
            assert client.id not in peers
            repr(client)
            looks += 1
        return looks

    lookers = at_once(*[look] * 8)
    try:
        for _ in range(5):
            with ExitStack() as crowd:
                for _ in range(3):
                    crowd.enter_context(RawPeer(socket_path)).set_up(VECTORS)
        until(lambda: client.peers == [])
    finally:
        done = True
        finish(lookers)


def test_every_event_is_told_once(clients: Callable[[], ivshmem.Client], socket_path: str) -> None:
    """Eight threads take events; nobody sees what another one has seen, and none is lost."""
    client = clients()
    seen: list[int] = []
    rung = 0
    lock = threading.Lock()

    def take() -> None:
        nonlocal rung
        for event in client.events():
            with lock:
                if isinstance(event, PeerJoined):
                    seen.append(event.peer)
                elif isinstance(event, Interrupt):
                    rung += event.rings

    takers = at_once(*[take] * 8)
    with ExitStack() as crowd:
        ids = []
        for _ in range(30):
            ids.append(crowd.enter_context(RawPeer(socket_path)).set_up(VECTORS).id)
            client.ring(client.id, 3)
        until(lambda: len(seen) >= 30 and rung >= 30, "all events")
        client.close()
        finish(takers)
    assert sorted(seen) == sorted(ids)
    assert rung == 30


def test_the_same_descriptor_for_all(clients: Callable[[], ivshmem.Client]) -> None:
    for _ in range(10):
        client = clients()
        threads = at_once(*[client.fileno] * 8)
        assert {thread.result() for thread in threads} == {client.fileno()}
        client.close()


def test_fileno_and_close(clients: Callable[[], ivshmem.Client], decoys: Decoys) -> None:
    for _ in range(8):
        client = clients()
        ask = until_closed(client.fileno)
        wait = until_closed(lambda c=client: c.wait(timeout=0))  # type: ignore[misc]
        queue = until_closed(lambda c=client: c.wait([0, 1], 0))  # type: ignore[misc]
        finish(at_once(ask, ask, wait, queue, client.close))
        decoys.open(4)
        decoys.check()


# -- a server -------------------------------------------------------------------------------------


def test_a_crowd_at_a_server(server: MakeServer, socket_path: str) -> None:
    """Eight threads connect, look, ring and leave; others look at the server at the same time."""
    serving = server(vectors=VECTORS)
    done = False

    def visit() -> None:
        for _ in range(4):
            with ivshmem.connect(socket_path, timeout=PATIENCE) as client:
                for peer in client.peers:
                    with suppress(NoSuchPeer):
                        client.ring(peer, 0)
                client.ring(client.id, 1)
                assert client.wait(1, PATIENCE) == 1

    def look() -> None:
        while not done:
            ids = [peer.id for peer in serving.peers]
            assert ids == sorted(set(ids))
            repr(serving)

    lookers = at_once(look, look)
    try:
        finish(at_once(*[visit] * 8))
    finally:
        done = True
        finish(lookers)
    until(lambda: serving.peers == [])


def test_closed_by_many_while_a_crowd_connects(socket_path: str) -> None:
    for _ in range(4):
        serving = Server(socket_path, vectors=VECTORS).start()

        def visit() -> None:
            with suppress(ivshmem.ServerGone, OSError):
                while True:
                    ivshmem.connect(socket_path, timeout=PATIENCE).close()

        visitors = at_once(*[visit] * 4)
        until(lambda s=serving: s.peers)  # type: ignore[misc]
        finish(at_once(*[serving.close] * 4))
        finish(visitors)


# -- memory ---------------------------------------------------------------------------------------


def test_additions_from_eight_threads_add_up() -> None:
    rounds = 1000
    with Region.create("4K") as region:

        def add() -> None:
            word = region.atomic_u64(8)
            for _ in range(rounds):
                word.fetch_add(1)

        def exchange() -> None:
            word = region.atomic_u64(16)
            for _ in range(rounds):
                seen = word.load()
                while (found := word.compare_exchange(seen, seen + 1)) != seen:
                    seen = found

        finish(at_once(*[add] * 8))
        finish(at_once(*[exchange] * 8))
        assert region.atomic_u64(8).load() == 8 * rounds
        assert region.atomic_u64(16).load() == 8 * rounds
        assert region.atomic_u64(0).load() == region.atomic_u64(24).load() == 0


def test_views_from_eight_threads_are_counted() -> None:
    region = Region.create("4K")

    def look() -> None:
        for number in range(500):
            with memoryview(region) as view:
                view[number % 4096] = 1
            assert region.resident() == 4096

    finish(at_once(*[look] * 8))
    region.close()


def test_memory_is_not_unmapped_under_a_call() -> None:
    """Every call on a closed region says so; none of them crashes."""
    for _ in range(8):
        region = Region.create("64K")
        word = region.atomic_u64(0)

        def look(region: Region = region) -> None:
            with memoryview(region) as view:
                view[65535] = view[4096]

        def close(region: Region = region) -> None:
            while True:
                try:
                    return region.close()
                except BufferError:  # a view is alive
                    continue

        def change(word: AtomicU64 = word) -> None:
            word.compare_exchange(word.fetch_add(1), 0)

        calls: list[Callable[[], object]] = [change, change, word.load, look]
        finish(at_once(*[until_closed(call) for call in calls], close, close))
