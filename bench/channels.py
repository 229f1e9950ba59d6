"""Messages between two processes, beside the same in C: `python -m bench.channels`.

Knows: the measurements and their order. Does not know: the programs in C (channel.c).

Each measurement is made with every way in turn, several times; a ratio is the median of the ratios
of the rounds. Two processes, each on a core of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ivshmem
from ivshmem import channel
from ivshmem.channel import Channels

from . import floor

SIZE = 64  # bytes of a message
ROUNDS = 7
LIMIT = 60.0  # seconds that a measurement may take
SPIN = 0.01

# name -> (the way in C that it is compared with, messages of one measurement)
WAYS: dict[str, tuple[str, int]] = {
    "C: ring, stream": ("C: ring, stream", 1_000_000),
    "C: ivshmem_channel.h, stream": ("C: ring, stream", 1_000_000),
    "put, get": ("C: ivshmem_channel.h, stream", 300_000),
    "put_rows, get_rows of 64": ("C: ivshmem_channel.h, stream", 1_000_000),
    "C: ring, round trip": ("C: ring, round trip", 100_000),
    "C: ivshmem_channel.h, round trip": ("C: ring, round trip", 100_000),
    "put, get, round trip, spinning": ("C: ivshmem_channel.h, round trip", 50_000),
}


def in_c(program: Path, folder: Path, name: str, count: int) -> float:
    """Return nanoseconds for each message, or round trip, of one run of channel.c."""
    kind = "header" if "ivshmem_channel.h" in name else "ring"
    mode = "pingpong" if "round trip" in name else "stream"
    path = folder / "memory"
    with ivshmem.Region.create("16M", path=path, replace=True) as region:
        with ivshmem.Directory.create(region, channels="8M") as directory:
            assert directory.channels is not None
            offset = directory.channels.start
    words = [str(program), str(path), str(offset), kind, mode, str(count), str(SIZE)]
    return float(subprocess.run(words, check=True, stdout=subprocess.PIPE, timeout=LIMIT).stdout)


def stream_to(own: Channels, count: int) -> None:
    get = own.open("there").reader("block").get  # type: ignore[attr-defined]
    back = own.open("back").writer()  # type: ignore[attr-defined]
    back.put(b"ready")
    for _ in range(count):
        get(LIMIT, spin=SPIN)
    back.put(b"done")


def rows_to(own: Channels, count: int) -> None:
    reader = own.open("there").reader("block")  # type: ignore[attr-defined]
    back = own.open("back").writer()  # type: ignore[attr-defined]
    rows = memoryview(bytearray(64 * SIZE)).cast("B", (64, SIZE))
    back.put(b"ready")
    while count > 0:
        count -= reader.get_rows(rows, LIMIT, spin=SPIN)
    back.put(b"done")


def echo_to(own: Channels, count: int) -> None:
    get = own.open("there").reader("block").get  # type: ignore[attr-defined]
    put = own.open("back").writer().put  # type: ignore[attr-defined]
    put(b"ready")
    for _ in range(count):
        put(get(LIMIT, spin=SPIN))


def stream(writer: Any, reader: Any, count: int) -> None:
    put, data = writer.put, bytes(SIZE)
    for _ in range(count):
        put(data, LIMIT, spin=SPIN)
    reader.get(LIMIT)


def rows(writer: Any, reader: Any, count: int) -> None:
    data = memoryview(bytes(64 * SIZE)).cast("B", (64, SIZE))
    for _ in range(count // 64):
        writer.put_rows(data, LIMIT, spin=SPIN)
    reader.get(LIMIT)


def round_trips(writer: Any, reader: Any, count: int) -> None:
    put, get, data = writer.put, reader.get, bytes(SIZE)
    for _ in range(count):
        put(data)
        get(LIMIT, spin=SPIN)


OURS: dict[str, tuple[Callable[[Any, Any, int], None], Callable[[Channels, int], None]]] = {
    "put, get": (stream, stream_to),
    "put_rows, get_rows of 64": (rows, rows_to),
    "put, get, round trip, spinning": (round_trips, echo_to),
}


def in_python(folder: Path, name: str, count: int) -> float:
    """Return nanoseconds for each message, or round trip, between two processes in Python."""
    near, _ = OURS[name]
    path = folder / "memory"
    count -= count % 64
    with ivshmem.Region.create("16M", path=path, replace=True) as region:
        ivshmem.Directory.create(region, channels="8M").close()
        with channel.open(region) as channels:
            for each in ("there", "back"):
                channels.create_messages(each, limit=SIZE, slots=1024, writers=1, readers=1)
            words = [sys.executable, "-m", "bench.channels", "--far", name, str(path), str(count)]
            with (
                channels.open("back").reader("block") as reader,  # type: ignore[attr-defined]
                channels.open("there").writer() as writer,  # type: ignore[attr-defined]
                subprocess.Popen(words) as far,
            ):
                assert reader.get(LIMIT) == b"ready"
                os.sched_setaffinity(0, {0})
                begun = time.perf_counter_ns()
                near(writer, reader, count)
                took = time.perf_counter_ns() - begun
                os.sched_setaffinity(0, range(os.cpu_count() or 1))
                far.wait(LIMIT)
    return took / count


def far_end(name: str, path: str, count: int) -> None:
    os.sched_setaffinity(0, {1})
    with ivshmem.Region.attach(path=path) as region, channel.open(region) as channels:
        OURS[name][1](channels, count)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.channels", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--far", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.far:
        far_end(options.far[0], options.far[1], int(options.far[2]))
        return
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory(prefix="ivshmem-bench-", dir="/dev/shm") as name:
        folder = Path(name)
        program = folder / "channel"
        floor.build("channel.c", program, f"-I{channel.get_include()}")
        for _ in range(options.rounds):
            for way, (_, count) in WAYS.items():
                one = in_python if way in OURS else (lambda *args: in_c(program, *args))
                found[way].append(one(folder, way, count))
    print("| way | ns, median | least | to | ratio |\n|---|---|---|---|---|")
    for way, figures in found.items():
        other = WAYS[way][0]
        ratios = [a / b for a, b in zip(figures, found[other], strict=True)]
        print(
            f"| {way} | {statistics.median(figures):.0f} | {min(figures):.0f} | {other} |"
            f" {statistics.median(ratios):.2f} |"
        )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
