"""Round trips to a peer that runs `bench --echo`.

Knows: beginning while it is not there yet, noticing that it fell silent. Does not know: which peer
is meant, how anything is shown.

Only doorbells are rung; the shared memory is neither read nor written. The waits have no time
limit, since those that have one are slower: a timer looks whether there is progress. Timers belong
to the main thread, so this does, too.
"""

from __future__ import annotations

import bisect
import contextlib
import signal
import statistics
import time
from array import array
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Literal

from ..errors import NoAnswer
from ..peer.client import Client
from ..peer.endpoint import Endpoint
from ..system.time_limits import left_until
from ..text import counted
from . import suite
from .cores import cores_for
from .result import ROUNDS, Measuring, ResultGroup, turns
from .roundtrip import measure

Spin = float | Literal["auto"]

STALL = 5.0  # seconds without an answer, after those before, until the peer is given up

_KNOCK = 0.1  # seconds between rings while no answer has come
_PATIENCE = 1.0  # seconds until it is said what to do at the other end
_SILENCE = 2.0  # seconds in which a peer that was not rung must stop ringing
_TICK = 0.25  # seconds between looks for progress
_WARM_UP, _LEAST = 20, 50  # round trips


# -- ringing first ---------------------------------------------------------------------------------


def knock(
    endpoint: Endpoint, peer: int, vector: int, timeout: float, unanswered: Callable[[], object]
) -> None:
    """Ring until an answer comes; calls `unanswered` once if that takes a while.

    Raises:
        NoAnswer: none came in time, or the peer rings without being rung.
        NoSuchPeer, NoSuchVector, NoInterrupts: as of `ring` and `wait`.
    """
    endpoint.wait(vector, 0)  # drop earlier rings; raises if this endpoint has no interrupts
    start = time.monotonic()
    told = False
    while True:
        endpoint.ring(peer, vector)
        if endpoint.wait(vector, min(_KNOCK, timeout)):
            break
        elapsed = time.monotonic() - start
        if elapsed >= timeout:
            option = f" --vector {vector}" if vector else ""
            raise NoAnswer(
                f"peer {peer} did not answer for {counted(timeout, 'second')}: is `ivshmem"
                f" bench --echo {endpoint.id}{option}` running there?"
            )
        if elapsed >= _PATIENCE and not told:
            told = True
            unanswered()
    # Rings that it has not answered yet.
    start = time.monotonic()
    while endpoint.wait(vector, _KNOCK):
        if time.monotonic() > start + _SILENCE:
            raise NoAnswer(f"another peer rings vector {vector}: choose another vector")


def round_trips(endpoint: Endpoint, peer: int, vector: int, seconds: float) -> Measuring:
    """Measure round trips, the peer having answered to `knock`, for about so many seconds.

    Yields after each measurement: what share of all is done, and the group so far.

    Raises:
        NoAnswer: the peer fell silent, or left.
    """
    end = time.monotonic() + seconds
    group = ResultGroup(f"peer {peer}, vector {vector}")
    plain = group.add("os.eventfd, two processes here")
    asleep = group.add(f"wait({vector})", plain)
    spinning = group.add(f'wait({vector}, spin="auto")', plain)
    with suite.eventfd_pair(cores_for("free")) as pair:
        left = left_until(end)
        share = left / ROUNDS / 3
        for done in turns(left):
            durations, noise = measure(pair, suite.TRIPS, share)
            plain.add(durations, noise)
            yield done + 1 / ROUNDS / 3, group
            # Which processes make up the peer is not known, so its load is not told from that of
            # others while it is rung: who disturbed the yardstick disturbed these, too.
            asleep.add(_measure(endpoint, peer, vector, share, 0), noise)
            yield done + 2 / ROUNDS / 3, group
            spinning.add(_measure(endpoint, peer, vector, share, "auto"), noise)
            yield done + 1 / ROUNDS, group


def _measure(endpoint: Endpoint, peer: int, vector: int, seconds: float, spin: Spin) -> array[int]:
    each = statistics.median(_trips(endpoint, peer, vector, _WARM_UP, spin))
    count = int(min(suite.TRIPS, max(_LEAST, seconds * 1e9 / max(each, 1))))
    return _trips(endpoint, peer, vector, count, spin)


def _trips(endpoint: Endpoint, peer: int, vector: int, count: int, spin: Spin) -> array[int]:
    """Durations of so many round trips, in nanoseconds."""
    points = [0] * (count + 1)

    def done() -> int:
        """Round trips so far; the points in time that are still to come are 0."""
        return max(bisect.bisect_left(points, True, key=lambda point: point == 0) - 1, 0)

    with _watched(endpoint, peer, done):
        _loop(endpoint, peer, vector, spin, points)
    return array("q", (after - before for before, after in pairwise(points)))


def _loop(endpoint: Endpoint, peer: int, vector: int, spin: Spin, points: list[int]) -> None:
    ring, wait, now = endpoint.ring, endpoint.wait, time.perf_counter_ns
    points[0] = now()
    if spin:
        for turn in range(1, len(points)):
            ring(peer, vector)
            wait(vector, spin=spin)
            points[turn] = now()
    else:
        for turn in range(1, len(points)):
            ring(peer, vector)
            wait(vector)
            points[turn] = now()


@contextlib.contextmanager
def _watched(endpoint: Endpoint, peer: int, done: Callable[[], int]) -> Iterator[None]:
    """Leave the block by NoAnswer when there is no more progress."""
    progress, since = -1, time.monotonic()

    def check_progress(_number: int, _frame: object) -> None:
        nonlocal progress, since
        if (now_done := done()) > progress:
            progress, since = now_done, time.monotonic()
            return
        if _left(endpoint, peer):
            raise NoAnswer(f"peer {peer} left after {progress} round trips")
        if time.monotonic() > since + STALL:
            raise NoAnswer(
                f"peer {peer} stopped answering after {progress} round trips: no answer for"
                f" {STALL:g} seconds"
            )

    handler = signal.signal(signal.SIGALRM, check_progress)
    timer = signal.setitimer(signal.ITIMER_REAL, _TICK, _TICK)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *timer)


def _left(endpoint: Endpoint, peer: int) -> bool:
    """Whether a peer is known to have gone: a guest is never told."""
    return isinstance(endpoint, Client) and endpoint.connected and peer not in endpoint.peers
