"""Round trips in an event loop: `await client.wait(0)` and its like beside a bare reader callback.

The other end is roundtrip.c, on a core of its own or on the same; the ways take turns in one loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from itertools import pairwise
from pathlib import Path
from time import perf_counter_ns as now

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import ivshmem
from ivshmem.aio import AsyncEndpoint
from ivshmem.bench.cores import Pinning, cores_for
from ivshmem.bench.percentiles import Sample

from .conftest import Build

ROUNDS, TRIPS = 9, 2000

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": asyncio.new_event_loop}
with contextlib.suppress(ImportError):
    import uvloop

    LOOPS["uvloop"] = uvloop.new_event_loop

End = AsyncEndpoint[ivshmem.Client]


async def bare(end: End, peer: int) -> list[int]:
    """The floor: a callback that reads the eventfd and rings; no task, no future."""
    loop, fd = asyncio.get_running_loop(), end.endpoint._descriptor(0)
    read, ring, done = os.eventfd_read, end.ring, loop.create_future()
    times: list[int] = []

    def answered() -> None:
        read(fd)
        times.append(now())
        if len(times) > TRIPS:
            done.set_result(None)
        else:
            ring(peer, 0)

    loop.add_reader(fd, answered)
    times.append(now())
    ring(peer, 0)
    await done
    loop.remove_reader(fd)
    return times


async def future(end: End, peer: int) -> list[int]:
    """What one writes without this package: a future for each doorbell."""
    loop, fd = asyncio.get_running_loop(), end.endpoint._descriptor(0)
    read, ring = os.eventfd_read, end.ring
    answer = loop.create_future()
    loop.add_reader(fd, lambda: answer.set_result(read(fd)))
    times = [now()]
    for _ in range(TRIPS):
        answer = loop.create_future()
        ring(peer, 0)
        await answer
        times.append(now())
    loop.remove_reader(fd)
    return times


async def wait(end: End, peer: int) -> list[int]:
    ring, wait_ = end.ring, end.wait
    times = [now()]
    for _ in range(TRIPS):
        ring(peer, 0)
        await wait_(0)
        times.append(now())
    return times


async def wait_any(end: End, peer: int) -> list[int]:
    ring, wait_ = end.ring, end.wait
    times = [now()]
    for _ in range(TRIPS):
        ring(peer, 0)
        await wait_()
        times.append(now())
    return times


async def events(end: End, peer: int) -> list[int]:
    ring = end.ring
    times = [now()]
    ring(peer, 0)
    async for event in end:
        if isinstance(event, ivshmem.Interrupt):
            times.append(now())
            if len(times) > TRIPS:
                break
            ring(peer, 0)
    return times


Way = Callable[[End, int], Awaitable[list[int]]]
WAYS: tuple[Way, ...] = (bare, future, wait, wait_any, events)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A server's path. It is another process: a second thread would make each ring dearer."""
    path = str(tmp_path / "socket")
    command = [sys.executable, "-m", "ivshmem", "serve", "-S", path, "-l", "4K", "-n", "1"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while not os.path.exists(path):
            assert process.poll() is None
        yield path
        process.terminate()


@contextlib.contextmanager
def echo(program: Path, path: str, client: ivshmem.Client, cores: set[int]) -> Iterator[int]:
    """A process in C that answers the client; yields its id."""
    with subprocess.Popen(
        [program, "client", path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        os.sched_setaffinity(process.pid, cores)
        peer = int(process.stdout.readline().split()[1])
        print(f"echo {client.id}", file=process.stdin, flush=True)
        yield peer
        process.terminate()


@pytest.mark.parametrize("pinning", ["two", "same"])
@pytest.mark.parametrize("name", LOOPS)
def bench_aio(
    benchmark: BenchmarkFixture,
    build: Build,
    tmp_path: Path,
    server: str,
    name: str,
    pinning: Pinning,
) -> None:
    program = tmp_path / "roundtrip"
    build("roundtrip.c", program)
    cores = os.sched_getaffinity(0)
    here, there = cores_for(pinning)
    loop = LOOPS[name]()
    took: dict[Way, list[int]] = {way: [] for way in WAYS}

    def measure(way: Way) -> None:
        # Each has an endpoint of its own: what one lets the kernel watch, others do not pay for.
        with ivshmem.connect(server) as client, echo(program, server, client, there) as peer:
            end = AsyncEndpoint(client)
            times = loop.run_until_complete(way(end, peer))
            end.close()
        took[way].append(Sample(b - a for a, b in pairwise(times)).percentile(50))

    def measure_others() -> None:
        for way in WAYS:
            if way is not wait:
                measure(way)

    os.sched_setaffinity(0, here)
    try:
        benchmark.pedantic(  # type: ignore[no-untyped-call]
            lambda: measure(wait), setup=measure_others, rounds=ROUNDS
        )
    finally:
        os.sched_setaffinity(0, cores)
        loop.close()
    for way, figures in took.items():
        ratios = [ours / least for ours, least in zip(figures, took[bare], strict=True)]
        benchmark.extra_info[f"{way.__name__}_us"] = round(statistics.median(figures) / 1000, 1)
        benchmark.extra_info[f"{way.__name__}_to_bare"] = round(statistics.median(ratios), 2)
