"""What readers that overwrite cost their writer, which has a core of its own.

Knows: the writer's loop, and that each reader read during it. Does not know: how figures are shown.

    python -m bench.channels.readers DIRECTORY

is a reader: for each line of its standard input it opens a reader, reads until the last message,
closes the reader, and prints how many messages it read, and how many it lost.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import ivshmem
from ivshmem import channel
from ivshmem.bench.cores import cores_for

from .. import in_memory
from ..ways import ROOT

READERS = (1, 4, 16)
COUNT = 2_000_000  # messages in a round, of 64 bytes: a time slice for each of 16 readers, and more
SLOTS = 1024
LAST = b"last"
SPIN = 0.01


@contextlib.contextmanager
def crowd(most: int = max(READERS)) -> Iterator[Crowd]:
    """Start the processes of so many readers."""
    with contextlib.ExitStack() as stack:
        yield Crowd(stack, most)


class Crowd:
    """The processes of the readers, and the writer, which is this process."""

    def __init__(self, stack: contextlib.ExitStack, most: int) -> None:
        self._name = stack.enter_context(in_memory.folder())
        region = stack.enter_context(ivshmem.Region.create("1M", path=f"{self._name}/memory"))
        ivshmem.Directory.create(region, channels="512K").close()
        channels = stack.enter_context(channel.open(region))
        made = channels.create_messages(
            "crowd", limit=64, slots=SLOTS, writers=1, readers=most, overflow="overwrite"
        )
        self._writer: Any = stack.enter_context(made.writer())
        self._processes = [stack.enter_context(self._process()) for _ in range(most)]
        for process in self._processes:
            assert process.stdout is not None
            process.stdout.readline()

    @contextlib.contextmanager
    def _process(self) -> Iterator[subprocess.Popen[str]]:
        with subprocess.Popen(
            [sys.executable, "-m", __name__, self._name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        ) as process:
            os.sched_setaffinity(process.pid, cores_for("two")[1])
            yield process

    def round(self, readers: int, count: int = COUNT) -> tuple[float, int]:
        """Nanoseconds for a put while so many read, and how much the slowest of them read.

        A reader that read more than SLOTS messages read during the round, and not only afterwards.
        """
        chosen = self._processes[:readers]
        for process in chosen:
            print(file=process.stdin, flush=True)
        for process in chosen:
            assert process.stdout is not None
            assert process.stdout.readline() == "open\n"
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, cores_for("two")[0])
        try:
            put, data = self._writer.put, bytes(64)
            begun = time.perf_counter_ns()
            for _ in repeat(None, count):
                put(data)
            took = (time.perf_counter_ns() - begun) / count
            put(LAST)
        finally:
            os.sched_setaffinity(0, before)
        read = []
        for process in chosen:
            assert process.stdout is not None
            got, lost = map(int, process.stdout.readline().split())
            assert got + lost == count, f"{got} read, {lost} lost, {count} written"
            read.append(got)
        return took, min(read)


def main(directory: str) -> None:
    # Readers share a core by time slices, also if the bench has a real-time priority.
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    with ivshmem.Region.attach(path=Path(directory) / "memory") as region:
        with channel.open(region) as channels:
            crowd: Any = channels.open("crowd")
            print("ready", flush=True)
            for _ in sys.stdin:
                with crowd.reader("overwrite") as reader:
                    print("open", flush=True)
                    get, read = reader.get, 0
                    while get(60, spin=SPIN) != LAST:
                        read += 1
                    lost = reader.lost
                print(read, lost, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
