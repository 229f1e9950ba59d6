"""One end of a round trip, in a process of its own: `python -m ivshmem.bench.worker`.

Knows: the clock, and the loop around a ring and a wait. Does not know: what rings and waits.

    python -m ivshmem.bench.worker ROLE MODULE:FACTORY ARGUMENTS

Calls FACTORY(ROLE, *ARGUMENTS), whose arguments are in JSON and whose result is a context manager
that yields `Steps`. Any other program can be an end that does the same: it writes the line "ready",
then reads lines with a number N. The role "ping" makes N round trips, and then writes their N
durations in nanoseconds, as signed 64-bit integers of the machine; "echo" answers N rings.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import time
from array import array
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

# As timeit does: the statements stand in the loop itself, since one more Python call for each
# would cost more than what is measured.
# (Generators, as what the statements assign to lives on from one measurement to the next.)
_LOOPS = {
    "ping": """
def loop(now, {names}):
    times = None
    while True:
        count = yield times
        times = [0] * (count + 1)
        times[0] = now()
        for turn in range(1, count + 1):
            {ring}
            {wait}
            times[turn] = now()
""",
    "echo": """
def loop(now, {names}):
    while True:
        count = yield
        for turn in range(count):
            {wait}
            {ring}
""",
}

_PR_SET_PDEATHSIG = 1


class Steps(NamedTuple):
    """What an end does in each turn.

    Attributes:
        ring: a statement that makes the other end's `wait` return.
        wait: a statement that waits for the other end.
        names: what the statements know. They may assign to these names, and find there later, in
            the next measurement too, what they assigned.
        answers: as the role "echo", answers so many rings, instead of the statements.
    """

    ring: str
    wait: str
    names: dict[str, Any]
    answers: Callable[[int], object] | None = None


def loop(role: str, steps: Steps) -> Callable[[int], Any]:
    """The loop of an end, to be called with a count; "ping" returns count + 1 points in time."""
    if role == "echo" and steps.answers is not None:
        return steps.answers
    source = _LOOPS[role].format(names=", ".join(steps.names), ring=steps.ring, wait=steps.wait)
    made: dict[str, Any] = {}
    exec(source, made)  # noqa: S102
    running = made["loop"](time.perf_counter_ns, **steps.names)
    next(running)
    send: Callable[[int], Any] = running.send
    return send


def main(role: str, factory: str, arguments: str) -> None:
    # A parent that is killed cannot end us; a wait in the kernel would last for ever.
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    module, _, name = factory.partition(":")
    make = getattr(importlib.import_module(module), name)
    with make(role, *json.loads(arguments)) as steps:
        run = loop(role, steps)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        for line in sys.stdin:
            times = run(int(line))
            if role == "ping":
                took = array("q", (after - before for before, after in pairwise(times)))
                sys.stdout.buffer.write(took.tobytes())
                sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
