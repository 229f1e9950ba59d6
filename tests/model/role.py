"""What every role does alike: fences that a mutation can take out, sleeping, and ringing.

Knows: the sleeper words and the race between a sleep and a ring (DESIGN: Waiting).
Does not know: what a role waits for.
Invariants: a word is a pair of value and epoch wherever two owners could follow each other.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Hashable, Iterable
from types import ModuleType
from typing import Final

from model.explorer import ALIVE, BACK, GONE, SILENT, looks
from model.operations import (
    FullFence,
    Load,
    LoadBarrier,
    Ring,
    Steps,
    Store,
    StoreBarrier,
    Wait,
)

FREE: Final = "free"
OPEN: Final = "open"
CLOSING: Final = "closing"


class Role:
    """One process.

    `without`: the names of the points that a mutation removes. `counted`: sleeps are counted modulo
    this, and each is rung once, and store barriers stand before what is said of them, as in the C
    header; 1 has fewer states: it rings whenever it sees a sleeper.
    """

    def __init__(self, name: str, without: Iterable[str] = (), counted: int = 1) -> None:
        self.name = name
        self.without = frozenset(without)
        self.counted = counted
        self.sleeps = 0
        self.seen = ALIVE
        self.rung: dict[str, int] = {}  # the last sleep of each other that was rung

    def has(self, point: str) -> bool:
        return point not in self.without

    def store_barrier(self, point: str) -> Steps:
        if self.has(point):
            yield StoreBarrier()

    def load_barrier(self, point: str) -> Steps:
        if self.has(point):
            yield LoadBarrier()

    def full_fence(self, point: str) -> Steps:
        if self.has(point):
            yield FullFence()

    def awaits(self) -> Steps:
        """Whether there is nothing to do: what is looked at again before the wait."""
        raise NotImplementedError

    def sleep(self, kind: str) -> Steps:
        """Wait for a ring, unless something has come. `kind` names the mutation points."""
        self.sleeps = (self.sleeps + 1) % self.counted
        if self.counted > 1:
            yield StoreBarrier()
        yield self.says("sleeps")
        yield from self.full_fence(f"{kind} sleep fence")
        nothing = True
        if self.has(f"{kind} looks again"):
            nothing = yield from self.awaits()
        yield LoadBarrier()
        if nothing:
            yield Wait()
        if self.counted > 1:
            yield StoreBarrier()
        yield self.says("awake")

    def says(self, state: str) -> Store:
        """Return the store that says whether this process sleeps."""
        return Store(sleeper(self.name), (state, self.sleeps))

    def some_sleep(self, kind: str, count: int) -> Steps:
        """Whether some process of a kind sleeps: the C looks at all before it rings one."""
        sleepers = 0
        for i in range(count):
            state, _ = yield Load(sleeper(f"{kind}{i}"))
            yield LoadBarrier()
            sleepers += state == "sleeps"
        return sleepers > 0

    def wake(self, name: str) -> Steps:
        """Ring a process if it sleeps. A full fence stands between what it waits for and this."""
        yield from self.wakes(name)

    def wakes(self, name: str) -> Steps:
        """Ring a process if it sleeps and this one has not rung that sleep yet. Whether it did."""
        state, count = yield Load(sleeper(name))
        yield LoadBarrier()
        if state == "sleeps" and (self.counted == 1 or self.rung.get(name) != count):
            self.seen = ALIVE
            if self.counted > 1:
                self.seen = yield Load(looks(name))
                yield LoadBarrier()
                if self.seen == GONE:
                    return False
                self.rung[name] = count
            yield Ring(name)
            return True
        return False

    def wakes_living(self, name: str) -> Steps:
        """Ring a process that sleeps. Whether it will come: if it dies later, that rings all."""
        if not (yield from self.wakes(name)):
            return False
        if self.counted > 1:  # as it was before the ring
            return self.seen != SILENT
        return not self.has("a ring to the dead does not count") or (yield from self.works(name))

    def works(self, name: str) -> Steps:
        """Whether a place is at work: neither silent nor gone."""
        how = yield Load(looks(name))
        yield LoadBarrier()
        return how in (ALIVE, BACK)

    def gone(self, name: str) -> Steps:
        how = yield Load(looks(name))
        yield LoadBarrier()
        return how == GONE


def sleeper(name: str) -> Hashable:
    return ("sleeper", name)


def awake(*names: str) -> dict[Hashable, Hashable]:
    """Return the sleeper words of processes that are awake."""
    return {sleeper(name): ("awake", 0) for name in names}


def named_points(*modules: ModuleType) -> set[str]:
    """Return the points that the roles of some modules name, which a mutation can remove."""
    points: set[str] = set()
    for module in modules:
        for call in ast.walk(ast.parse(inspect.getsource(module))):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
                continue
            names = [str(name.value) for name in call.args if isinstance(name, ast.Constant)]
            if call.func.attr in ("has", "store_barrier", "load_barrier", "full_fence"):
                points.update(names)
            elif call.func.attr == "sleep":
                points.update(f"{name} {what}" for name in names for what in SLEEP)
    return points


SLEEP: Final = ("sleep fence", "looks again")
