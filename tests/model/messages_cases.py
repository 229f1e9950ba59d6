"""The cases of messages that are explored, by day and by night, and what each of them promises."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from model import messages
from model.explorer import ALIVE, Case, End, looks
from model.messages import BLOCK, OVERWRITE, Channel, Owner, Read, Reader, Word, Writer
from model.operations import (
    CompareExchange,
    FullFence,
    Load,
    LoadBarrier,
    Process,
    Ring,
    Store,
    Wait,
)
from model.role import FREE, OPEN

Make = Callable[..., Process]


@dataclass
class Setting:
    """A case to be: who takes part, and how."""

    channel: Channel
    messages: int = 3
    policies: tuple[str, ...] = (BLOCK,)
    closes: bool = False
    start: int = 0
    joins: frozenset[str] = frozenset()
    history: int = 0
    most: Mapping[str, int] = field(default_factory=dict)
    successor: int = 0  # how many messages the next owner of slot 0 publishes
    mortal: frozenset[str] = frozenset()
    silent: frozenset[str] = frozenset()
    removed: frozenset[str] = frozenset()
    spurious: frozenset[str] = frozenset()

    def case(self, without: Iterable[str] = ()) -> Case:
        channel, end = self.channel, self.start + self.messages
        ends = self.closes or self.mortal or self.successor or self.most
        processes: dict[str, Callable[[], Process]] = {}
        writers = {f"w{w}": self.start for w in range(channel.writers)}
        readers = {f"r{r}": policy for r, policy in enumerate(self.policies)}

        def writer(w: int) -> Process:
            role = Writer(channel, f"w{w}", w, self.start, without)
            yield from role.run(self.messages, closes=self.closes)
            if "w0" in self.removed:
                yield from stray("next")

        def reader(r: int) -> Process:
            name = f"r{r}"
            role = Reader(channel, name, r, self.policies[r], self.start, without)
            if channel.ordered:
                return (yield from role.run_ordered(end, asks="w0" in self.mortal))
            last = -1 if ends else end
            read = yield from role.run(
                last,
                joins=name in self.joins,
                history=self.history,
                most=self.most.get(name, -1),
            )
            return read

        def removed() -> Process:
            """Read without looking, store the tail late, and leave, if the row is still its own."""
            head = yield Load(("head", 0))
            yield LoadBarrier()
            yield Store(("tail", 0, 0), Word(head.value, 1))
            own = Owner("r0", OPEN, 1)
            yield CompareExchange(("reader", 0), own, own._replace(state=FREE))
            yield from stray("r1")
            yield Ring("w0")

        def stray(heir: str) -> Process:
            """Let the heir's next beat come after the late store."""
            yield FullFence()
            yield Store("strayed", True)
            yield FullFence()
            yield Ring(heir)

        def heir() -> Process:
            """Take the row of a reader that a user has removed."""
            role = Reader(channel, "r1", 0, self.policies[0], 0, without)
            return role.run(end, joins=True)

        def successor() -> Process:
            role = Writer(channel, "next", 0, 0, without)
            if self.removed:
                start = yield from role.run(self.successor, opens=True)
                if start is not None:
                    while not (yield Load("strayed")):
                        yield LoadBarrier()
                        yield Wait()
                    yield LoadBarrier()
                    yield from role.close()
                return start
            return (yield from role.run(self.successor, opens=True, closes=True))

        for w in range(channel.writers):
            processes[f"w{w}"] = partial(writer, w)
        for r in range(channel.readers):
            processes[f"r{r}"] = partial(reader, r)
        if self.successor:
            processes["next"] = successor
        if "r0" in self.removed:
            processes |= {"r0": removed, "r1": heir}
        memory = channel.memory(writers, readers, self.joins) | {"strayed": False}
        return Case(
            processes, memory, self._check, self.mortal, self.silent, self.removed, self.spurious
        )

    def _check(self, end: End) -> str | None:
        for r, policy in enumerate((*self.policies, BLOCK)):
            name = f"r{r}"
            late = end.memory.get(looks(name)) != ALIVE
            read = end.results.get(name)
            if not isinstance(read, Read):
                continue
            if (
                policy == BLOCK
                and not late
                and self.removed <= {"r0"}
                and (read.lost or read.missing)
            ):
                return f"{name} has lost {read.lost + read.missing} though it was always at work"
            for w, next_ in enumerate(read.next):
                head: Any = end.memory["head", w]
                until: int = head.value
                if self.successor:  # it may have left before the next owner came
                    start: int | None = end.results.get("next")
                    until = until if start is None else start
                if not self.removed and self.most.get(name) is None and next_ < until:
                    return f"{name} has read writer {w} until {next_} of {until}"
        return None


ROLES = (messages,)
_ONE = Channel(1, 1, 2, parts=1)
_ORDERED = Channel(1, 1, 2, parts=1, counted=16, ordered=True)
_R0, _W0 = frozenset({"r0"}), frozenset({"w0"})
BY_DAY: dict[str, Setting] = {
    "block": Setting(Channel(1, 1, 2), 5),
    "overwrite": Setting(Channel(1, 1, 2), 4, (OVERWRITE,)),
    "each sleep is rung once": Setting(Channel(1, 1, 2, parts=1, counted=16), 3),
    "close": Setting(_ONE, 3, closes=True),
    "join": Setting(_ONE, 2, start=2, history=2, joins=_R0),
    "leave": Setting(_ONE, 4, most={"r0": 1}),
    "a writer dies": Setting(_ONE, 2, closes=True, mortal=_W0),
    "a reader dies": Setting(_ONE, 3, closes=True, mortal=_R0),
    "a reader is silent": Setting(_ONE, 3, silent=_R0),
    "the next owner": Setting(_ONE, 2, closes=True, successor=2),
    "history of a former owner": Setting(_ONE, 1, closes=True, successor=1, history=1, joins=_R0),
    "two writers": Setting(Channel(2, 1, 2, parts=1), 1),
    "in the header's order": Setting(_ORDERED, 3, mortal=_R0 | _W0),
}
BY_NIGHT: dict[str, Setting] = {
    "the next owner of a dead one": Setting(_ONE, 2, closes=True, mortal=_W0, successor=2),
    "join, twice around": Setting(_ONE, 4, start=2, history=2, joins=_R0),
    "two writers, twice around": Setting(Channel(2, 1, 2, parts=1), 4),
    "a writer dies, twice around": Setting(_ONE, 5, closes=True, mortal=_W0),
    "overwrite, twice around": Setting(Channel(1, 1, 2), 6, (OVERWRITE,)),
    "three slots": Setting(Channel(1, 1, 3), 7),
    "two readers": Setting(Channel(1, 2, 2, parts=1), 3, (BLOCK, BLOCK)),
    "block and overwrite": Setting(Channel(1, 2, 2, parts=1), 3, (BLOCK, OVERWRITE)),
    "two writers and two readers": Setting(Channel(2, 2, 2, parts=1), 1, (BLOCK, OVERWRITE)),
    "two join": Setting(
        Channel(1, 2, 2, parts=1), 2, (BLOCK, BLOCK), joins=frozenset({"r0", "r1"})
    ),
    "a writer and a reader die": Setting(_ONE, 4, closes=True, mortal=_W0 | _R0),
    "silent twice around": Setting(_ONE, 5, closes=True, silent=_R0),
    "silent while the next owner comes": Setting(
        Channel(1, 1, 2), 2, (OVERWRITE,), closes=True, successor=2, silent=_R0
    ),
    "a removed writer lives": Setting(
        Channel(1, 1, 2, parts=0, tolerant=True),
        1,
        (OVERWRITE,),
        closes=True,
        successor=1,
        removed=_W0,
    ),
    "a removed reader lives": Setting(Channel(1, 1, 2, parts=1, tolerant=True), 3, removed=_R0),
    "wakes by itself": Setting(_ONE, 4, spurious=_R0 | _W0),
}
POINTS = {
    "announce fence": "leave",
    "cells stay": "history of a former owner",
    "entry before head": "leave",
    "head again after gone": "a writer dies",
    "head again after opening": "a removed writer lives",
    "head before entry": "a removed writer lives",
    "head's epoch": "a removed writer lives",
    "epoch of either": "history of a former owner",
    "hold for who joins": "join",
    "joins are counted": "join",
    "joins before rows": "join",
    "margin of one": "join",
    "payload before stamp": "overwrite",
    "payload before tail": "leave",
    "policy's epoch": "join",
    "reader looks again": "leave",
    "reader sleep fence": "leave",
    "stamp before entry": "overwrite",
    "stamp is looked at": "overwrite",
    "stamps are taken over": "history of a former owner",
    "stamps before head": "history of a former owner",
    "tail before stores": "leave",
    "tail fence": "close",
    "tail's epoch": "join",
    "who leaves wakes": "leave",
    "writer looks again": "leave",
    "writer sleep fence": "leave",
}
POINTS_BY_NIGHT = [point for point, name in POINTS.items() if name in BY_NIGHT]
