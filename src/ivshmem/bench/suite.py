"""The short version of all measurements, for one machine and some ten seconds.

Knows: what is compared with what, and how the time is shared out. Does not know: how any of it is
measured, how it is shown.

A round measures each way once, one after the other, so that what else the machine does meets all of
them. Only what was measured in the same rounds is compared.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from ..peer.client import connect
from ..system.time_limits import left_until
from . import ends, memory, statements
from .cores import PINNINGS, Pinning, cores_for
from .result import ROUNDS, Measuring, Result, ResultGroup, turns
from .roundtrip import Pair, measure, python_end

SPIN = 50e-6  # seconds

TRIPS = 50_000  # round trips at once, at most
_TRIAL = 1000  # round trips
_PLACES = 8  # for pairs in the server's memory, of each pinning
_TITLES: dict[Pinning, str] = {"two": "round trip, two cores", "same": "round trip, one core"}

# Called with what share (0 to 1) of all is done, and what is measured now; it may raise.
TellProgress = Callable[[float, str], object]


class _Part(NamedTuple):
    """What is measured in the same rounds.

    `run` is given seconds, and yields what share of them is over and the group so far.
    """

    title: str
    weight: float
    run: Callable[[float], Measuring]


def run(seconds: float, tell: TellProgress) -> list[ResultGroup]:
    """Measure everything in about so many seconds.

    Raises:
        WorkerFailed: a process that takes part died.
        OSError: no memory, no processes, no descriptors.
    """
    end = time.monotonic() + seconds
    with (
        tempfile.TemporaryDirectory(prefix="ivshmem-bench-") as directory,
        ends.serving(path := os.path.join(directory, "socket")),
    ):
        parts = _parts(path)
        total = sum(part.weight for part in parts)
        done = 0.0
        groups = []
        for number, part in enumerate(parts):
            tell(done / total, part.title)
            left = left_until(end)
            budget = left * part.weight / sum(later.weight for later in parts[number:])
            group = ResultGroup(part.title)
            with contextlib.closing(part.run(budget)) as measuring:
                for share, group in measuring:  # noqa: B007
                    tell((done + share * part.weight) / total, part.title)
            groups.append(group)
            done += part.weight
        tell(1.0, "done")
    return groups


def _parts(path: str) -> list[_Part]:
    return [
        _Part("ring, nobody waiting", 1, lambda budget: _rings(path, budget)),
        _Part(_TITLES["two"], 9, lambda budget: _round_trips(path, "two", budget)),
        _Part(_TITLES["same"], 6, lambda budget: _round_trips(path, "same", budget)),
        _Part("copy", 2, memory.copies),
        _Part("huge pages", 2, memory.huge_pages),
    ]


# -- doorbells ------------------------------------------------------------------------------------


def _rings(path: str, budget: float) -> Measuring:
    """Ring while no process waits: a system call, and nothing else."""
    group = ResultGroup("ring, nobody waiting")
    plain = group.add("os.eventfd_write")
    ours = group.add("ring(peer)", plain)
    eventfd = os.eventfd(0)
    try:
        with (
            connect(path) as here,
            connect(path) as there,
            statements.pinned(),
        ):
            here.ring(there.id)  # by now it has heard of the other one
            names: dict[str, object] = {"write": os.eventfd_write, "eventfd": eventfd}
            names |= {"ring": here.ring, "peer": there.id}
            for done in turns(budget):
                for result, statement in (plain, "write(eventfd, 1)"), (ours, "ring(peer)"):
                    result.add(*statements.measure(statement, names, budget / ROUNDS / 2))
                yield done, group
    finally:
        os.close(eventfd)


def _round_trips(path: str, pinning: Pinning, budget: float) -> Measuring:
    """Round trips of two processes, which sleep or spin; on one core a fixed spin is hopeless."""
    group = ResultGroup(_TITLES[pinning])
    start = time.monotonic()
    try:
        cores = cores_for(pinning)
    except ValueError as error:
        group.note = str(error)
        yield 1.0, group
        return
    waits = {"wait(0)": "wait(0)", 'wait(0, spin="auto")': 'wait(0, spin="auto")'}
    if pinning == "two":
        waits[f"wait(0, spin={SPIN * 1e6:.0f}e-6)"] = f"wait(0, spin={SPIN})"
    with contextlib.ExitStack() as stack:
        plain = group.add("os.eventfd, blocking")
        pairs: list[tuple[Result, Pair]] = [
            (plain, stack.enter_context(eventfd_pair(cores))),
        ]
        ours: list[tuple[str, str, list[str]]] = [
            *((name, "client", [wait]) for name, wait in waits.items()),
            ("wait_word, rings spared", "word", []),
        ]
        first = _PLACES * PINNINGS.index(pinning)
        for place, (name, factory, arguments) in enumerate(ours, first):
            ping, echo = (
                python_end(role, f"{ends.__name__}:{factory}", path, place, *arguments)
                for role in ("ping", "echo")
            )
            pair = stack.enter_context(Pair(ping, echo, cores))
            pair.trips(_TRIAL)  # those that spin find out whether that brings anything
            pairs.append((group.add(name, plain), pair))
        left = max(budget - (time.monotonic() - start), 0)
        for done in turns(left):
            for number, (result, pair) in enumerate(pairs):
                yield done + number / len(pairs) / ROUNDS, group
                result.add(*measure(pair, TRIPS, left / ROUNDS / len(pairs)))
    yield 1.0, group


@contextlib.contextmanager
def eventfd_pair(cores: tuple[set[int], set[int]]) -> Iterator[Pair]:
    """The yardstick: two processes with two eventfds, by the functions in `os`."""
    a, b = fds = os.eventfd(0), os.eventfd(0)
    try:
        factory = f"{ends.__name__}:eventfds"
        ping = python_end("ping", factory, a, b, fds=fds)
        echo = python_end("echo", factory, b, a, fds=fds)
        with Pair(ping, echo, cores) as pair:
            yield pair
    finally:
        os.close(a)
        os.close(b)
