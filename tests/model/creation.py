"""Creation: records, units and names (DESIGN, section 2).

Knows: taking a record and units, two creators of one name, what a dead creator leaves.
Does not know: what stands in the channel.
Invariants: a unit belongs to the record that its word names (index and epoch), if that record's
state has this epoch and is not free: so one exchange of the state frees everything.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NamedTuple

from model.explorer import Case, End
from model.operations import (
    CompareExchange,
    FullFence,
    Load,
    LoadBarrier,
    Note,
    Process,
    Ring,
    Steps,
    Store,
    Wait,
)
from model.role import FREE, Role

MAKING: Final = "making"
READY: Final = "ready"


class State(NamedTuple):
    """A record's state word. Its creator stands in it: it may die after this exchange."""

    what: str
    creator: str
    epoch: int


class Unit(NamedTuple):
    record: int
    epoch: int


class Name(NamedTuple):
    text: str
    epoch: int


NOBODY: Final = Unit(-1, 0)


class Creator(Role):
    """Creates a channel of some units, or opens the one of that name."""

    def __init__(self, setting: Setting, name: str, without: Iterable[str] = ()) -> None:
        super().__init__(name, without)
        self.setting = setting
        self.epoch = 0

    def run(self, channel: str, first: int, units: int) -> Process:
        """Create a channel. `first`: where this creator looks for free units first."""
        for _ in range(self.setting.tries):
            record = yield from self.take_record()
            if record is None:
                return "no record is free"
            mine = State(MAKING, self.name, self.epoch)
            yield Store(("name", record), Name(channel, self.epoch))
            yield from self.full_fence("name fence")
            other = yield from self.rival(record, channel)
            if other == "":
                start = yield from self.take_units(record, first, units)
                if start is None:
                    yield CompareExchange(("state", record), mine, mine._replace(what=FREE))
                    return "no room"
                yield Store(("content", record), (start, units, self.epoch))
                ready = mine._replace(what=READY)
                if (yield CompareExchange(("state", record), mine, ready)) == mine:
                    yield Note(("made", channel, record, start, units))
                    return "made"
                return "removed"
            yield CompareExchange(("state", record), mine, mine._replace(what=FREE))
            if other == READY:
                return "opened"
        return "name taken"

    def take_record(self) -> Steps:
        """Take a free record, or one whose creator has died."""
        for record in range(self.setting.records):
            state = yield Load(("state", record))
            yield LoadBarrier()
            if state.what == MAKING and (yield from self.gone(state.creator)):
                free = state._replace(what=FREE)
                if (yield CompareExchange(("state", record), state, free)) == state:
                    state = free
            if state.what == FREE:
                mine = State(MAKING, self.name, state.epoch + 1)
                if (yield CompareExchange(("state", record), state, mine)) == state:
                    self.epoch = mine.epoch
                    return record
        return None

    def rival(self, own: int, channel: str) -> Steps:
        """Return "" if nobody else makes or has this name, or what the other's state is."""
        for record in range(self.setting.records):
            if record != own:
                found = yield from self.settled(record, own, channel)
                if found:
                    return found
        return ""

    def settled(self, record: int, own: int, channel: str) -> Steps:
        """Wait until a record of the same name and a larger index is made or given up."""
        while True:
            state = yield Load(("state", record))
            yield LoadBarrier()
            name = yield Load(("name", record))
            yield LoadBarrier()
            if state.what == FREE or name != Name(channel, state.epoch):
                return ""  # a name that is not there yet: its owner will see ours
            if state.what == READY:
                return READY
            if (yield from self.gone(state.creator)):
                yield CompareExchange(("state", record), state, state._replace(what=FREE))
                if not self.has("looks again after freeing"):  # it may have been made before
                    return ""
                continue
            if record < own or not self.has("the smaller index waits"):
                return MAKING if record < own else ""
            if not (yield from self.works(state.creator)):
                return MAKING

    def take_units(self, record: int, first: int, units: int) -> Steps:
        """Take a run of units, the first that is free as a whole. Return where, or None."""
        for turn in range(self.setting.units):
            start = (first + turn) % self.setting.units
            if start + units <= self.setting.units:
                taken = 0
                for unit in range(start, start + units):
                    one = yield from self.take_unit(record, unit)
                    taken += one
                if taken == units:
                    return start
                yield from self.give_back(record)
        return None

    def give_back(self, record: int) -> Steps:
        """Let go of the units of a run that is not free as a whole."""
        mine = Unit(record, self.epoch)
        for unit in range(self.setting.units):
            word = yield Load(("unit", unit))
            yield LoadBarrier()
            if word == mine:
                yield CompareExchange(("unit", unit), mine, NOBODY)

    def take_unit(self, record: int, unit: int) -> Steps:
        word = yield Load(("unit", unit))
        yield LoadBarrier()
        if word != NOBODY:
            state = yield Load(("state", word.record))
            yield LoadBarrier()
            living = state.what != FREE and state.epoch == word.epoch
            if living or not self.has("units of a free record are free"):
                return 0
        mine = Unit(record, self.epoch)
        if self.has("units are exchanged"):
            seen = yield CompareExchange(("unit", unit), word, mine)
            return 1 if seen == word else 0
        yield Store(("unit", unit), mine)
        return 1


@dataclass
class Setting:
    """A case to be: each creator with its channel's name, where it begins, and how many units."""

    creators: dict[str, tuple[str, int, int]]
    records: int = 2
    units: int = 2
    tries: int = 2
    mortal: frozenset[str] = frozenset()
    silent: frozenset[str] = frozenset()
    last: str = ""  # begins when the others have ended or are gone, and must succeed

    def case(self, without: Iterable[str] = ()) -> Case:
        words: dict[Hashable, Hashable] = {}
        for record in range(self.records):
            words["state", record] = State(FREE, "", 0)
            words["name", record] = Name("", 0)
            words["content", record] = (0, 0, 0)
        for unit in range(self.units):
            words["unit", unit] = NOBODY
        for name in self.creators:
            words["over", name] = False
        processes: dict[str, Callable[[], Process]] = {
            name: partial(self._create, name, without) for name in self.creators
        }
        return Case(processes, words, self.check, self.mortal, self.silent)

    def _create(self, name: str, without: Iterable[str]) -> Process:
        creator = Creator(self, name, without)
        if name == self.last:
            for other in range(len(self.creators) - 1):
                while not (yield from self._over(creator, list(self.creators)[other])):
                    yield Wait()
        result = yield from creator.run(*self.creators[name])
        if self.last and name != self.last:
            yield Store(("over", name), True)
            yield FullFence()
            yield Ring(self.last)
        return result

    def _over(self, creator: Creator, other: str) -> Steps:
        over = yield Load(("over", other))
        yield LoadBarrier()
        return over or (yield from creator.gone(other))

    def check(self, end: End) -> str | None:
        ready: dict[str, int] = {}
        used: dict[int, int] = {}
        for record in range(self.records):
            state: Any = end.memory["state", record]
            if state.what == MAKING and state.creator in end.results:
                return f"record {record} is left in the making"
            if state.what != READY:
                continue
            name: Any = end.memory["name", record]
            content: Any = end.memory["content", record]
            if name.text in ready:
                return f"{name.text} is both {ready[name.text]} and {record}"
            ready[name.text] = record
            start, units, epoch = content
            if epoch != state.epoch:
                return f"record {record} is ready, but its content is not"
            for unit in range(start, start + units):
                if unit in used:
                    return f"unit {unit} belongs to both {used[unit]} and {record}"
                used[unit] = record
                if end.memory["unit", unit] != Unit(record, epoch):
                    return f"unit {unit} of record {record} says {end.memory['unit', unit]}"
        if self.last and end.results[self.last] not in ("made", "opened"):
            return f"{self.last}: {end.results[self.last]}"
        for name_, (channel, _, _) in self.creators.items():
            result = end.results.get(name_)
            if result in ("made", "opened") and channel not in ready:
                return f"{name_} has {result} {channel}, which is not there"
        return None


ROLES = (sys.modules[__name__],)
POINTS = {
    "name fence": "one name",
    "the smaller index waits": "one name",
    "looks again after freeing": "a creator dies",
    "units are exchanged": "overlap",
    "units of a free record are free": "what the dead leave",
}
_BOTH = frozenset({"a", "b"})
BY_DAY: dict[str, Setting] = {
    "one name": Setting({"a": ("x", 0, 1), "b": ("x", 0, 1)}),
    "overlap": Setting({"a": ("x", 0, 2), "b": ("y", 1, 1)}),
    "a creator dies": Setting({"a": ("x", 0, 1), "b": ("x", 0, 1)}, mortal=frozenset("a")),
    "what the dead leave": Setting(
        {"a": ("x", 0, 2), "b": ("x", 0, 2)}, mortal=frozenset("a"), last="b"
    ),
}
BY_NIGHT: dict[str, Setting] = {
    "one dies, room for one": Setting(
        {"a": ("x", 0, 2), "b": ("y", 0, 2)}, records=1, mortal=_BOTH
    ),
    "silent": Setting({"a": ("x", 0, 1), "b": ("x", 0, 1)}, silent=_BOTH),
    "three": Setting(dict.fromkeys("abc", ("x", 0, 1)), records=3, units=3),
}
