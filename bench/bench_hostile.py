"""What honest peers notice of a hostile one: round trips and joins during an attack, beside quiet.

Each attack is of tests/support/hostile.py, by another user if this one is root. It takes processor
time as well, which says nothing about the server: "busy" is as many processes that only compute.
Quiet and attack take turns, and a ratio is the median of those of the rounds.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from support.children import python
from support.hostile import ATTACKS, BUSY, attack

import ivshmem

VECTORS = 2
ROUNDS = 3
TRIPS, JOINS = 200, 10  # of a round

SERVE = f"""
    import sys, ivshmem
    from ivshmem.system.listener import Listener
    with ivshmem.Server(Listener(sys.argv[1], mode=0o666), 65536, {VECTORS}) as server:
        server.start()
        print("READY")
        sys.stdin.readline()
"""

# A message there and back, whoever rings in between: counted in the memory.
ECHO = """
    import sys, ivshmem
    client = ivshmem.connect(sys.argv[1], timeout=60)
    asked, answered = client.region.atomic_u64(0), client.region.atomic_u64(64)
    print("READY")
    while True:
        client.wait(0, 60)
        number = asked.load()
        if number != answered.load():
            answered.store(number)
            client.ring(0, 1)
"""

CASES = {**ATTACKS, "busy, 1 process": (BUSY, 1), "busy, 3 processes": (BUSY, 3)}


class Honest:
    """A server in a process of its own, and two that exchange messages."""

    def __init__(self, stack: ExitStack, path: str) -> None:
        self.path = path
        stack.enter_context(python(SERVE, path)).expect("READY")
        self.client = stack.enter_context(ivshmem.connect(path, timeout=60))
        stack.enter_context(python(ECHO, path)).expect("READY")
        self.asked = self.client.region.atomic_u64(0)
        self.answered = self.client.region.atomic_u64(64)
        self.number = 0

    def trip(self) -> None:
        self.number += 1
        self.asked.store(self.number)
        self.client.ring(1, 0)
        while self.answered.load() != self.number:
            self.client.wait(1, 60)  # with a limit: without one, a full counter would hold up both

    def join(self) -> None:
        """From connect until set-up is complete, and away again."""
        ivshmem.connect(self.path, timeout=60).close()
        self.client.peer_events()

    def measure(self) -> tuple[float, float, float]:
        """Medians of a round trip and a join, and the slowest join, in nanoseconds."""
        trips, joins = timed(self.trip, TRIPS), timed(self.join, JOINS)
        return statistics.median(trips), statistics.median(joins), max(joins)


def timed(work: Callable[[], None], count: int) -> list[int]:
    durations = []
    for _ in range(count):
        start = time.perf_counter_ns()
        work()
        durations.append(time.perf_counter_ns() - start)
    return durations


@contextmanager
def honest(path: Path) -> Iterator[Honest]:
    with ExitStack() as stack:
        yield Honest(stack, str(path))


@pytest.mark.parametrize("name", CASES)
def bench_hostile(benchmark: BenchmarkFixture, tmp_path: Path, name: str) -> None:
    source, processes = CASES[name]
    tmp_path.chmod(0o711)
    for parent in tmp_path.parents:  # pytest's own are for root alone, and the attacker is not root
        if parent.owner() == "root" and os.geteuid() == 0 and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o011)
    ratios: list[tuple[float, ...]] = []
    figures: list[tuple[float, ...]] = []
    for number in range(ROUNDS):  # a server each: some attacks use up ids
        with honest(tmp_path / str(number)) as scene:
            scene.measure()
            quiet = scene.measure()
            with attack(source, processes, scene.path, VECTORS):
                figures.append(scene.measure())
            ratios.append(tuple(a / b for a, b in zip(figures[-1], quiet, strict=True)))
    trip, join, slowest = (statistics.median(column) for column in zip(*figures, strict=True))
    trip_ratio, join_ratio, _ = (statistics.median(c) for c in zip(*ratios, strict=True))
    benchmark.extra_info.update(
        trip_us=round(trip / 1e3, 1),
        trip_to_quiet=round(trip_ratio, 2),
        join_us=round(join / 1e3),
        join_to_quiet=round(join_ratio, 2),
        slowest_join_us=round(slowest / 1e3),
    )
    with honest(tmp_path / "quiet") as scene:
        benchmark.pedantic(scene.trip, rounds=10)  # type: ignore[no-untyped-call]
