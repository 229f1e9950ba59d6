"""Places: joining, leaving, and freeing the place of the dead (DESIGN, section 2).

Knows: the words of one place, who may take it, and what counts as proof.
Does not know: beats and leases (`explorer` changes what a place looks like).
Invariants: nobody loses a place while it lives, unless a user has removed it; a place whose owner
has died comes back as soon as it can be proven; a place's other words are believed only with the
epoch of its number.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from model.explorer import Case, End
from model.operations import (
    CompareExchange,
    FullFence,
    Load,
    LoadBarrier,
    Process,
    Ring,
    Steps,
    Store,
    Wait,
)
from model.role import Role


class Number(NamedTuple):
    """Who has a place: a random number ("" is nobody). Its epoch counts the owners."""

    owner: str
    epoch: int


class Word(NamedTuple):
    value: str
    epoch: int


@dataclass(frozen=True)
class Places:
    """A case to be: who joins, who leaves again, and who begins when all others are over."""

    joins: tuple[str, ...]
    leaves: frozenset[str] = frozenset()
    last: str = ""
    user: str = ""  # a user removes this one's place, at any time
    mortal: frozenset[str] = frozenset()

    def case(self, without: Iterable[str] = ()) -> Case:
        words: dict[Hashable, Hashable] = {
            "number": Number("", 0),
            "process": Word("", 0),
            "removed": False,
        }
        processes: dict[str, Callable[[], Process]] = {}
        for name in self.joins:
            words["over", name] = False
            processes[name] = partial(self._join, name, without)
        if self.user:
            processes["user"] = partial(self._remove, without)
        return Case(processes, words, self.check, self.mortal)

    def _join(self, name: str, without: Iterable[str]) -> Process:
        return Member(self, name, without).run()

    def _remove(self, without: Iterable[str]) -> Process:
        number = yield Load("number")
        yield LoadBarrier()
        if number.owner == self.user:
            free = number._replace(owner="")
            if (yield CompareExchange("number", number, free)) == number:
                yield Store("removed", True)

    def check(self, end: End) -> str | None:
        number: Any = end.memory["number"]
        holders = [name for name, result in end.results.items() if result == "joined"]
        for name in holders:
            if number.owner != name and not (name == self.user and end.memory["removed"]):
                return f"{name} has lost its place to {number}"
        process: Any = end.memory["process"]
        proven = number.owner and process.epoch == number.epoch
        if end.results.get(self.last) == "stuck" and proven:
            return f"the place of {number.owner}, which was dead, did not come back"
        if end.results.get(self.last) == "full" and not number.owner and not self.user:
            return "a free place was not taken"
        return None


class Member(Role):
    def __init__(self, setting: Places, name: str, without: Iterable[str] = ()) -> None:
        super().__init__(name, without)
        self.setting = setting
        self.holder = ""
        self.dead: tuple[str, ...] = ()  # seen before this one began

    def run(self) -> Process:
        if self.name == self.setting.last:
            yield from self.others()
        epoch = yield from self.join()
        if not epoch:
            return "stuck" if self.holder in self.dead else "full"
        if self.name in self.setting.leaves:
            mine = Number(self.name, epoch)
            yield CompareExchange("number", mine, mine._replace(owner=""))
        yield from self.tell()
        return "left" if self.name in self.setting.leaves else "joined"

    def others(self) -> Steps:
        """Wait until the other members have ended or are gone."""
        for other in range(len(self.setting.joins)):
            name = self.setting.joins[other]
            while name != self.name:
                over = yield Load(("over", name))
                yield LoadBarrier()
                if (yield from self.gone(name)):
                    self.dead += (name,)
                    break
                if over:
                    break
                yield Wait()

    def tell(self) -> Steps:
        yield Store(("over", self.name), True)
        if self.setting.last and self.name != self.setting.last:
            yield FullFence()
            yield Ring(self.setting.last)

    def join(self) -> Steps:
        """Take the place. Return the epoch, or 0 if another has it."""
        number = yield Load("number")
        yield LoadBarrier()
        self.holder = number.owner
        if number.owner and not (yield from self.proven(number)):
            yield from self.tell()
            return 0
        mine = Number(self.name, number.epoch + 1)
        if self.has("the number is exchanged"):
            if (yield CompareExchange("number", number, mine)) != number:
                yield from self.tell()
                return 0
        else:
            yield Store("number", mine)
        yield Store("process", Word(self.name, mine.epoch))
        return mine.epoch

    def proven(self, number: Number) -> Steps:
        """Whether the owner is dead, seen by the process that it has stored with its epoch."""
        process = yield Load("process")
        yield LoadBarrier()
        if process.epoch != number.epoch and self.has("process's epoch"):
            return False
        return process.value != "" and (yield from self.gone(process.value))


ROLES = (sys.modules[__name__],)
_A = frozenset("a")
POINTS = {
    "the number is exchanged": "two join",
    "process's epoch": "a dead one, removed before",
}
BY_DAY: dict[str, Places] = {
    "two join": Places(("a", "b")),
    "one leaves": Places(("a", "b"), leaves=_A, last="b"),
    "one dies": Places(("a", "b"), mortal=_A, last="b"),
    "one leaves and dies": Places(("a", "b", "c"), leaves=_A, mortal=_A, last="c"),
    "a dead one, removed before": Places(("a", "b", "c"), user="a", mortal=_A, last="c"),
}
BY_NIGHT: dict[str, Places] = {
    "three": Places(("a", "b", "c", "d"), leaves=frozenset("ab"), mortal=_A, last="d"),
}
