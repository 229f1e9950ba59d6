"""Doorbell round trips by way of the library: the same as roundtrip.c, line for line.

python roundtrip.py guest ADDRESS | client SOCKET

Run by bench_guest.py, on the host and in guests; roundtrip.c says which lines it obeys.
"""

from __future__ import annotations

import sys
import time
from itertools import pairwise, repeat
from typing import TYPE_CHECKING

import ivshmem
import ivshmem.guest

if TYPE_CHECKING:
    from ivshmem.peer.endpoint import Endpoint

WARM_UP, KNOCK = 200, 0.1


def open_endpoint(role: str, where: str) -> Endpoint:
    return ivshmem.connect(where) if role == "client" else ivshmem.guest.open(where)


def knock(end: Endpoint, peer: int) -> None:
    """The peer's QEMU may not know of this end yet, and drop its answer: ring until one comes."""
    end.ring(peer, 0)
    while not end.wait(0, KNOCK):
        end.ring(peer, 0)
    while end.wait(0, KNOCK):
        pass


def ping(end: Endpoint, peer: int, rounds: int) -> None:
    knock(end, peer)
    ring, wait, now = end.ring, end.wait, time.perf_counter_ns
    for _ in repeat(None, WARM_UP):
        ring(peer, 0)
        wait(0)
    times = [0] * (rounds + 1)
    times[0] = now()
    for i in range(1, rounds + 1):
        ring(peer, 0)
        wait(0)
        times[i] = now()
    took = sorted(after - before for before, after in pairwise(times))
    print("TOOK", took[rounds // 2], took[rounds * 99 // 100], flush=True)


def echo(end: Endpoint, peer: int) -> None:
    ring, wait = end.ring, end.wait
    while True:
        wait(0)
        ring(peer, 0)


def main() -> None:
    with open_endpoint(*sys.argv[1:]) as end:
        print("READY", end.id, flush=True)
        for line in sys.stdin:
            command, *numbers = line.split()
            if command == "ping":
                ping(end, *map(int, numbers))
            elif command == "echo":
                echo(end, *map(int, numbers))
            else:
                raise SystemExit(2)


if __name__ == "__main__":
    main()
