"""Round trips through channels between ends that sleep: the same as sleeping.c, line for line.

python sleeping.py OFFSET guest ADDRESS | client SOCKET

Run by bench_channel_guest.py, on the host and in guests; sleeping.c says which lines it obeys. (The
library finds the area by itself.)
"""

from __future__ import annotations

import signal
import sys
from itertools import pairwise, repeat
from time import perf_counter_ns as now

import ivshmem
import ivshmem.guest
from ivshmem import channel
from ivshmem.channel import Channels
from ivshmem.peer.endpoint import Endpoint

WARM_UP, SIZE, BEAT = 200, 64, 0.1


def open_endpoint(role: str, where: str) -> Endpoint:
    return ivshmem.connect(where) if role == "client" else ivshmem.guest.open(where)


def ping(channels: Channels, rounds: int) -> None:
    data = bytes(SIZE)
    with (
        channels.open("back").reader("block") as reader,  # type: ignore[attr-defined]
        channels.open("there").writer() as writer,  # type: ignore[attr-defined]
    ):
        put, get = writer.put, reader.get
        put(data)
        while get(BEAT) is None:  # the other end may have yet to open its own
            put(data)
        while get(BEAT) is not None:
            pass
        for _ in repeat(None, WARM_UP):
            put(data)
            get()
        times = [0] * (rounds + 1)
        times[0] = now()
        for i in range(1, rounds + 1):
            put(data)
            get()
            times[i] = now()
    took = sorted(after - before for before, after in pairwise(times))
    print("TOOK", took[rounds // 2], took[rounds * 99 // 100], flush=True)


def echo(channels: Channels) -> None:
    with (
        channels.open("there").reader("block") as reader,  # type: ignore[attr-defined]
        channels.open("back").writer() as writer,  # type: ignore[attr-defined]
    ):
        put, get = writer.put, reader.get
        while True:
            put(get())


def ended(_number: int, _frame: object) -> None:
    raise SystemExit(0)  # by way of all `with` blocks, so that the slots are free


def main() -> None:
    signal.signal(signal.SIGTERM, ended)
    with open_endpoint(*sys.argv[2:]) as end, channel.open(end) as channels:
        print("READY", end.id, flush=True)
        for line in sys.stdin:
            command, *numbers = line.split()
            if command == "ping":
                ping(channels, int(numbers[1]))
            elif command == "echo":
                echo(channels)
            else:
                raise SystemExit(2)


if __name__ == "__main__":
    main()
