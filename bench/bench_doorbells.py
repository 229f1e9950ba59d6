"""What a ring and a wait cost when nobody has to be woken, beside the same system calls in C."""

import time
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import ivshmem

from .conftest import Compare

COUNT = 100_000


@pytest.fixture
def client(tmp_path: Path) -> Iterator[ivshmem.Client]:
    with (
        ivshmem.Server(tmp_path / "socket", "4K").start() as server,
        ivshmem.connect(server.path) as client,
    ):
        yield client


def ring(client: ivshmem.Client, count: int) -> None:
    call, peer = client.ring, client.id
    for _ in repeat(None, count):
        call(peer)


def ring_and_wait(client: ivshmem.Client, count: int) -> None:
    call, wait, peer = client.ring, client.wait, client.id
    for _ in repeat(None, count):
        call(peer)
        wait(0)


@pytest.mark.parametrize(("work", "floor"), [(ring, "ring"), (ring_and_wait, "wait")])
def bench_call(
    benchmark: BenchmarkFixture,
    compare: Compare,
    client: ivshmem.Client,
    work: Callable[[ivshmem.Client, int], None],
    floor: str,
) -> None:
    def nanoseconds() -> float:
        start = time.perf_counter_ns()
        work(client, COUNT)
        return (time.perf_counter_ns() - start) / COUNT

    ours, ratio = compare(nanoseconds, [floor, str(COUNT)])
    benchmark.extra_info.update(ns_each=round(ours), ratio_to_c=round(ratio, 2))
    benchmark(work, client, 1000)
