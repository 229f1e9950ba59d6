"""What a ring and a wait cost when nobody has to be woken, beside the same system calls in C.

The server is a process of its own, as in real life: a second Python thread in this process would
make every ring let go of the interpreter's lock, and one case measures just that.
"""

import threading
import time
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import ivshmem

from .conftest import Compare
from .ways import serving

COUNT = 100_000
VECTORS = 4

Work = Callable[[ivshmem.Client, int], None]


@pytest.fixture
def client(tmp_path: Path) -> Iterator[ivshmem.Client]:
    path = tmp_path / "socket"
    with serving(path, VECTORS), ivshmem.connect(path) as client:
        yield client


@pytest.fixture
def another_thread() -> Iterator[None]:
    """One that sleeps all the time."""
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    yield
    done.set()
    thread.join()


def ring(client: ivshmem.Client, count: int) -> None:
    call, peer = client.ring, client.id
    for _ in repeat(None, count):
        call(peer)


def doorbell(client: ivshmem.Client, count: int) -> None:
    call = client.doorbell(client.id).ring
    for _ in repeat(None, count):
        call()


def ring_and_wait(client: ivshmem.Client, count: int) -> None:
    call, wait, peer = client.ring, client.wait, client.id
    for _ in repeat(None, count):
        call(peer)
        wait(0)


def measured(
    benchmark: BenchmarkFixture, compare: Compare, client: ivshmem.Client, work: Work, floor: str
) -> None:
    """Nanoseconds for each of COUNT, and for the table of pytest-benchmark a thousand of them."""

    def nanoseconds() -> float:
        start = time.perf_counter_ns()
        work(client, COUNT)
        return (time.perf_counter_ns() - start) / COUNT

    ours, ratio = compare(nanoseconds, [floor, str(COUNT)])
    benchmark.extra_info.update(ns_each=round(ours), ratio_to_c=round(ratio, 2))
    benchmark(work, client, 1000)


@pytest.mark.parametrize(
    ("work", "floor"), [(ring, "ring"), (doorbell, "ring"), (ring_and_wait, "wait")]
)
def bench_call(
    benchmark: BenchmarkFixture, compare: Compare, client: ivshmem.Client, work: Work, floor: str
) -> None:
    measured(benchmark, compare, client, work, floor)


@pytest.mark.usefixtures("another_thread")
@pytest.mark.parametrize(
    ("work", "floor"), [(ring, "ring"), (doorbell, "ring"), (ring_and_wait, "wait")]
)
def bench_call_threaded(
    benchmark: BenchmarkFixture, compare: Compare, client: ivshmem.Client, work: Work, floor: str
) -> None:
    measured(benchmark, compare, client, work, floor)


@pytest.mark.parametrize("peers", [1, 8])
def bench_ring_all(
    benchmark: BenchmarkFixture, compare: Compare, client: ivshmem.Client, peers: int
) -> None:
    """Each of four vectors of every peer, in one call; figures are for one doorbell."""
    others = [ivshmem.connect(client.path) for _ in range(peers)]
    try:
        vectors = range(VECTORS)
        assert len(client.peers) == peers  # which takes in the news of them
        rung = client.ring_all(vectors=vectors)
        assert rung == peers * VECTORS

        def ring_all(client: ivshmem.Client, count: int) -> None:
            call = client.ring_all
            for _ in repeat(None, count // rung):
                call(vectors=vectors)

        measured(benchmark, compare, client, ring_all, "ring")
    finally:
        for other in others:
            other.close()
