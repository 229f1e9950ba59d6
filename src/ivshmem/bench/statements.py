"""Statements in this process, each execution measured.

Knows: the clock's own cost. Does not know: what a statement does.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from array import array
from collections.abc import Callable, Iterator
from itertools import pairwise

from .noise import noise_between, snapshot
from .roundtrip import Measured
from .worker import Steps, loop

MOST = 20_000  # executions that are measured at once
LEAST = 20
_WARM_UP = 5


@contextlib.contextmanager
def pinned() -> Iterator[None]:
    """Keep this thread on one core, and give it back what it had."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def measure(statement: str, names: dict[str, object], seconds: float) -> Measured:
    """Execute a statement for about so long; the durations are without the clock's own cost.

    Inside `pinned`.
    """
    run = loop("ping", Steps(statement, "pass", names))
    each = statistics.median(_durations(run(_WARM_UP)))
    return _measured(run, int(min(MOST, max(LEAST, seconds * 1e9 / max(each, 1)))))


def measure_exactly(statement: str, names: dict[str, object], count: int) -> Measured:
    """The same for so many executions, of which the first is measured, too."""
    return _measured(loop("ping", Steps(statement, "pass", names)), count)


def _measured(run: Callable[[int], list[int]], count: int) -> Measured:
    clock = _clock()
    ends, cores = (os.getpid(),), (os.sched_getaffinity(0),)
    before = snapshot(ends)
    start = time.perf_counter_ns()
    points = run(count)
    wall = time.perf_counter_ns() - start
    noise = noise_between(before, snapshot(ends, ended=True), cores, wall)
    return Measured(array("q", (max(took - clock, 0) for took in _durations(points))), noise)


def _clock() -> int:
    """Nanoseconds that the loop takes around a statement that does nothing."""
    return int(statistics.median(_durations(loop("ping", Steps("pass", "pass", {}))(200))))


def _durations(points: list[int]) -> array[int]:
    return array("q", (after - before for before, after in pairwise(points)))
