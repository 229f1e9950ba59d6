"""Many inputs for one target, from one seed.

Knows: which inputs are worth keeping, how long one may take, how to find the one that left a
mapping behind. Does not know: targets, beside what each can do.

One input in four is traced, for that takes several times as long: if it reaches a transition
between two lines that none before it did, it is kept, and later inputs are made from it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from random import Random
from resource import RUSAGE_SELF, getrusage
from types import CodeType, FrameType
from typing import Any

import ivshmem

from .target import Finding, Target

LIMIT = 20.0  # seconds for one input, which takes a millisecond
_TRACED = 4
_BATCH = 256  # inputs between two looks at the mappings
_SETTLED = 8  # batches, in which memory may grow

_Step = tuple[CodeType, int, int]


class Found(Exception):
    """An input that brought a finding, which is the cause."""

    def __init__(self, index: int, data: bytes) -> None:
        super().__init__(index, data)
        self.index, self.data = index, data


class Campaign:
    """Runs inputs; the target is entered already.

    Attributes:
        kept: inputs that reached something new.
        reached: transitions from line to line in the target's modules.
        growth: of this process's memory, in KiB, since the first batches.

    Args:
        current: a file that holds the input that is run, for when the process dies of it.
    """

    def __init__(self, target: Target, seed: int, current: FileIO) -> None:
        self._target = target
        self._current = current
        self._seeds = target.seeds()
        self._numbers = Random(f"{target.name} {seed}")  # noqa: S311
        home = Path(ivshmem.__file__).parent
        self._files = {str(home / f"{name}.py") for name in target.modules}
        self.kept: list[bytes] = []
        self.reached: set[_Step] = set()
        self.growth = 0

    def run(self, count: int) -> None:
        """Run so many inputs, first the target's seeds.

        Raises:
            Found: the first that brought a finding.
        """
        first = largest = 0
        while first < count:
            batch: list[bytes] = []
            # If it hangs in C, where no signal handler runs, this ends the process.
            faulthandler.dump_traceback_later(LIMIT * 10, exit=True, file=2)
            for index in range(first, min(first + _BATCH, count)):
                data = self._next(index)
                batch.append(data)
                with _told(index, data):
                    self._run(index, data)
            self._look_at_mappings(first, batch)
            first += len(batch)
            if first <= _SETTLED * _BATCH:
                largest = getrusage(RUSAGE_SELF).ru_maxrss
            self.growth = getrusage(RUSAGE_SELF).ru_maxrss - largest
        faulthandler.cancel_dump_traceback_later()

    def _next(self, index: int) -> bytes:
        if index < len(self._seeds):
            return self._seeds[index]
        numbers = self._numbers
        # Rather what was kept of late: there is most to be found behind it.
        data = self.kept[int(len(self.kept) * numbers.random() ** 0.5)]
        return self._target.mutate(data, numbers, numbers.choice(self.kept))

    def _run(self, index: int, data: bytes) -> None:
        os.pwrite(self._current.fileno(), data, 0)
        os.ftruncate(self._current.fileno(), len(data))
        if index % _TRACED and index >= len(self._seeds):
            with time_limit():
                self._target.check(data)
            return
        before = len(self.reached)
        with self._tracing(), time_limit():
            self._target.check(data)
        if len(self.reached) > before or not self.kept:
            self.kept.append(data)

    @contextlib.contextmanager
    def _tracing(self) -> Iterator[None]:
        files, add = self._files, self.reached.add

        def trace(frame: FrameType, _event: str, _arg: Any) -> Any:
            code = frame.f_code
            if code.co_filename not in files:
                return None
            before = 0

            def step(frame: FrameType, _event: str, _arg: Any) -> Any:
                nonlocal before
                add((code, before, frame.f_lineno))
                before = frame.f_lineno
                return step

            return step

        former = sys.gettrace()
        sys.settrace(trace)
        try:
            yield
        finally:
            sys.settrace(former)

    def _look_at_mappings(self, first: int, batch: list[bytes]) -> None:
        """Check mappings after a batch; if any are left, find the input that leaves one."""
        try:
            self._target.check_mappings()
        except Finding as finding:
            for index, data in enumerate(batch, first):
                before = self._target.mappings()
                self._target.check(data)
                if self._target.mappings() - before:
                    raise Found(index, data) from finding
            raise Found(first, b"") from finding  # no single one does it


@contextlib.contextmanager
def _told(index: int, data: bytes) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise Found(index, data) from error


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    """Make a finding of what takes too long."""

    def late(*_: object) -> None:
        raise Finding(f"it took more than {LIMIT:g} seconds: process {os.getpid()} hung")

    former = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
