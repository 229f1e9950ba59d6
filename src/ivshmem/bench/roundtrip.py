"""Round trips between two processes, each trip's duration measured.

Knows: starting two ends, pinning them, ending them. Does not know: how they ring and wait.

    with Pair(python_end("ping", "bench.ways:eventfd", 5, 6, fds=[5, 6]),
              python_end("echo", "bench.ways:eventfd", 6, 5, fds=[5, 6]), cores_for("two")) as pair:
        durations, noise = measure(pair, trips=10_000)

worker.py says what an end is. The processes live as long as the pair and sleep between
measurements, so that different pairs can take turns.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ..errors import WorkerFailed
from ..system.uncopied import Uncopied
from ..text import counted
from .noise import Noise, noise_between, snapshot

WARM_UP = 20  # round trips before each measurement, which also tell how long one takes
LEAST = 50  # round trips that are measured however long they take
PATIENCE = 60.0  # seconds until an end that says nothing is taken for stuck
FAREWELL = 0.5  # seconds for an end to end by itself, and remove what it made


class End(NamedTuple):
    """A program that is one end, the descriptors that it inherits, and where it is started."""

    command: Sequence[str]
    fds: Sequence[int] = ()
    directory: str | os.PathLike[str] | None = None


def python_end(
    role: str,
    factory: str,
    *arguments: object,
    fds: Iterable[int] = (),
    directory: str | os.PathLike[str] | None = None,
) -> End:
    """An end in Python: `factory` is "module:name", called as worker.py says.

    Args:
        directory: where it is started, and finds modules that are not installed.
    """
    command = [sys.executable, "-m", "ivshmem.bench.worker", role, factory, json.dumps(arguments)]
    return End(command, tuple(fds), directory)


class _EndProcess(Uncopied):
    """A running end."""

    def __init__(self, role: str, end: End, cores: set[int]) -> None:
        self.role = role
        with contextlib.ExitStack() as stack:
            self._errors = stack.enter_context(tempfile.TemporaryFile())
            self._process = stack.enter_context(  # closes its pipes, and waits
                subprocess.Popen(
                    list(end.command),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._errors,
                    pass_fds=end.fds,
                    cwd=end.directory,
                    bufsize=0,
                    start_new_session=True,  # Ctrl-C is for us, and we end it
                )
            )
            stack.callback(self._end)
            # Threads that it starts later inherit this.
            os.sched_setaffinity(self._process.pid, cores)
            self._stack = stack.pop_all()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def output(self) -> int:
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    def tell(self, count: int) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its output says the same, and why
            self._process.stdin.write(b"%d\n" % count)

    def failure(self) -> WorkerFailed:
        """What it died of."""
        try:
            status = self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            return WorkerFailed(f"the {self.role} process closed its output, and did not end")
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        said = next((line.strip() for line in reversed(lines) if line.strip()), "no message")
        how = f"was ended by signal {-status}" if status < 0 else f"ended with exit status {status}"
        return WorkerFailed(f"the {self.role} end {how}: {said}")

    def dismiss(self) -> None:
        """There will be no more to do."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def _end(self) -> None:
        self.dismiss()
        try:
            self._process.wait(FAREWELL)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def close(self) -> None:
        self._stack.close()


class Pair(Uncopied):
    """Two running ends; they end with the `with` block.

    Args:
        cores: those that the ping end may use, and those of the echo end; see `cores_for`.

    Raises:
        WorkerFailed: an end did not become ready.
    """

    def __init__(self, ping: End, echo: End, cores: tuple[set[int], set[int]]) -> None:
        self.cores = cores
        with contextlib.ExitStack() as stack:
            self._ping = _EndProcess("ping", ping, cores[0])
            stack.callback(self._ping.close)
            self._echo = _EndProcess("echo", echo, cores[1])
            stack.callback(self._echo.close)
            stack.callback(self._ping.dismiss)
            selector = stack.enter_context(selectors.DefaultSelector())
            for process in (self._ping, self._echo):
                selector.register(process.output, selectors.EVENT_READ, process)
            self._selector = selector
            self._ready()
            self._stack = stack.pop_all()

    @property
    def pids(self) -> tuple[int, int]:
        """Those of the ping end and of the echo end."""
        return self._ping.pid, self._echo.pid

    def _ready(self) -> None:
        said = {self._ping: b"", self._echo: b""}
        while any(not text.endswith(b"\n") for text in said.values()):
            process, data = self._hear()
            said[process] += data

    def trips(self, count: int) -> array[int]:
        """The durations of so many round trips, in nanoseconds, in the order of happening.

        Raises:
            WorkerFailed: an end died during that. The pair is of no more use.
        """
        self._echo.tell(count)
        self._ping.tell(count)
        took = bytearray()
        while len(took) < count * 8:
            process, data = self._hear()
            if process is self._ping:
                took += data
        return array("q", bytes(took))

    def _hear(self) -> tuple[_EndProcess, bytes]:
        ready = self._selector.select(PATIENCE)
        if not ready:
            raise WorkerFailed(f"no result from either end for {counted(PATIENCE, 'second')}")
        process: _EndProcess = ready[0][0].data
        data = os.read(process.output, 1 << 16)
        if not data:
            raise process.failure()
        return process, data

    def close(self) -> None:
        """End both processes; may be called twice."""
        self._stack.close()

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Measured(NamedTuple):
    """Durations in nanoseconds in the order of happening, and who disturbed them."""

    durations: array[int]
    noise: Noise


def measure(
    pair: Pair, trips: int, seconds: float = float("inf"), known: Sequence[int] = ()
) -> Measured:
    """Measure round trips: `trips` of them, or fewer (at least LEAST) if that takes too long.

    Args:
        seconds: how long it may take, roughly.
        known: processes whose load on these cores is part of what is measured.
    """
    each = statistics.median(pair.trips(WARM_UP)) / 1e9
    count = max(LEAST, int(min(trips, seconds / max(each, 1e-9))))
    before = snapshot(pair.pids, known)
    start = time.perf_counter_ns()
    durations = pair.trips(count)
    wall = time.perf_counter_ns() - start
    after = snapshot(pair.pids, known, ended=True)
    return Measured(durations, noise_between(before, after, pair.cores, wall))
