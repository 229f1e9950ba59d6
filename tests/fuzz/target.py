"""What a target of fuzzing is, and what is a finding whatever the target.

Knows: descriptors and mappings that were left, errors that nobody saw.
Does not know: what an input means, where inputs come from.
"""

from __future__ import annotations

import abc
import contextlib
import gc
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from random import Random
from types import TracebackType
from typing import Any, TypeVar

from support.leaks import open_fds, shared_mappings

from .script import Grammar, Op, mutated

T = TypeVar("T", bound="Target")


class Finding(Exception):
    """An input did what none may do."""


class Target(abc.ABC):
    """Something that reads what others wrote; a context manager around the inputs.

    A finding is whatever `run` raises. `check` adds what is one for every target.
    """

    name: str
    modules: Sequence[str]  # of the package, whose lines say whether an input reached something new
    share: int  # of the inputs, among all targets
    undo: contextlib.ExitStack
    _descriptors: dict[int, str] | None = None  # before the first input

    @abc.abstractmethod
    def seeds(self) -> Sequence[bytes]:
        """Inputs to begin with: the ordinary ones."""

    @abc.abstractmethod
    def run(self, data: bytes) -> None:
        """Do it with one input. What it may raise is caught here, anything else is a finding."""

    @abc.abstractmethod
    def mutate(self, data: bytes, numbers: Random, other: bytes) -> bytes:
        """An input like this one; it may take from the other."""

    def show(self, data: bytes) -> str:
        """An input as a person reads it."""
        return repr(data)

    def set_up(self) -> None:  # noqa: B027 - most have nothing to share
        """Make what all inputs share; `undo` takes it back."""

    def __enter__(self: T) -> T:
        self.undo = contextlib.ExitStack()
        with contextlib.ExitStack() as undo:
            undo.callback(lambda: self.undo.close())
            self._unseen = self.undo.enter_context(_unseen_errors())
            self.set_up()
            undo.pop_all()
        self._mappings = shared_mappings()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.undo.close()

    def check(self, data: bytes) -> None:
        """Run one input, and look at what it has left behind."""
        if self._descriptors is None:
            self._descriptors = open_fds()
        self.run(data)
        # Their number and not which they are: a server has one set for whoever comes next.
        if len(os.listdir("/proc/self/fd")) - 1 > len(self._descriptors):
            left = Counter(open_fds().values()) - Counter(self._descriptors.values())
            raise Finding(f"descriptors were left: {', '.join(left)}")
        if self._unseen:
            raise Finding(f"an error that nobody saw: {self._unseen.pop()}")

    def mappings(self) -> Counter[str]:
        """Mappings that were not there at first. It takes as long as half an input."""
        return shared_mappings() - self._mappings

    def check_mappings(self) -> None:
        """Look for mappings that were left."""
        if left := self.mappings():
            raise Finding(f"mappings were left: {dict(left)}")


class Scripted(Target):
    """A target whose inputs are scripts."""

    grammar: Grammar

    @abc.abstractmethod
    def scripts(self) -> Sequence[Sequence[Op]]:
        """Scripts to begin with."""

    @abc.abstractmethod
    def play(self, script: Sequence[Op]) -> None:
        """What `run` does, with a script."""

    def seeds(self) -> Sequence[bytes]:
        return [self.grammar.encode(script) for script in self.scripts()]

    def run(self, data: bytes) -> None:
        self.play(self.grammar.decode(data))

    def mutate(self, data: bytes, numbers: Random, other: bytes) -> bytes:
        decode = self.grammar.decode
        return self.grammar.encode(self.grammar.mutate(decode(data), numbers, decode(other)))

    def show(self, data: bytes) -> str:
        return "\n".join(map(str, self.grammar.decode(data)))


class Textual(Target):
    """A target whose inputs are texts, of lines more often than not."""

    tokens: Sequence[bytes]

    def mutate(self, data: bytes, numbers: Random, other: bytes) -> bytes:
        if numbers.random() < 0.2:
            return mutated(data, numbers, self.tokens)
        lines = data.split(b"\n")
        at = numbers.randrange(len(lines))
        what = numbers.randrange(6)
        key, equals, value = lines[at].partition(b" = ")
        if equals and what > 3:
            known = [line.partition(b" = ")[2] for line in other.split(b"\n")]
            changed = mutated(value, numbers, self.tokens)
            value = numbers.choice([*self.tokens, *known, changed, changed])
            lines[at] = key + equals + value
        elif what == 0:
            del lines[at]
        elif what == 1:
            lines.insert(at, numbers.choice(other.split(b"\n")))
        elif what == 2:
            lines.insert(numbers.randrange(len(lines)), lines[at])
        else:
            lines[at] = mutated(lines[at], numbers, self.tokens)
        return b"\n".join(lines)


class _Log(logging.Handler):
    """Takes what the package logs, which is nothing worse than a warning."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR:
            self._found.append(f"{record.getMessage()}: {record.exc_info}")


@contextlib.contextmanager
def _unseen_errors() -> Iterator[list[str]]:
    """Errors that are only printed, as in finalizers, or logged."""
    found: list[str] = []
    log, handler = logging.getLogger("ivshmem"), _Log(found)
    propagate, log.propagate = log.propagate, False
    log.addHandler(handler)

    def note(unraisable: Any) -> None:
        found.append(f"{unraisable.exc_value!r} in {unraisable.object!r}")

    before = sys.unraisablehook
    sys.unraisablehook = note
    try:
        yield found
    finally:
        gc.collect()
        sys.unraisablehook = before
        log.removeHandler(handler)
        log.propagate = propagate
