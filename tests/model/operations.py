"""The atomic steps of a process on shared memory, which a model's generators yield.

Knows: what each step asks for, and what its answer is.
Does not know: what the memory does with it (`automaton`, `explorer`).
Invariants: every operation is immutable and hashable, because local states hold them.
"""

from __future__ import annotations

from collections.abc import Generator, Hashable
from typing import Any, NamedTuple, TypeAlias

Address: TypeAlias = Hashable
Value: TypeAlias = Hashable


class Load(NamedTuple):
    """Answer: the value of one word."""

    address: Address


class Store(NamedTuple):
    """Put a value into this process's store buffer; other processes see it later."""

    address: Address
    value: Value


class StoreBarrier(NamedTuple):
    """What is stored from now on becomes visible after what was stored before."""


class LoadBarrier(NamedTuple):
    """Loads and stores from now on are done after the loads before."""


class FullFence(NamedTuple):
    """Wait until all stores of this process are visible; also a load barrier."""


class CompareExchange(NamedTuple):
    """Atomically replace `old` by `new`, with a full fence at both sides. Answer: what was seen."""

    address: Address
    old: Value
    new: Value


class Ring(NamedTuple):
    """Wake a process out of its present or next Wait. Overtakes stores that are not visible yet."""

    process: str


class Wait(NamedTuple):
    """Sleep until somebody has rung since the last Wait."""


class Note(NamedTuple):
    """Record something in private memory that outlives the process, for the checks."""

    what: Hashable


Operation: TypeAlias = (
    Load | Store | StoreBarrier | LoadBarrier | FullFence | CompareExchange | Ring | Wait | Note
)
Process: TypeAlias = Generator[Operation, Any, Any]
Steps: TypeAlias = Generator[Operation, Any, Any]  # a part of a process: `yield from`


class Fault(Exception):
    """A process saw what the protocol promises that nobody sees."""
