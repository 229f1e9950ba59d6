"""Value: the latest message of one writer, never torn (DESIGN, section 7).

Knows: reading the newest entry, and what the next owner of the slot keeps.
Does not know: how a message is published (`messages`).
Invariants: whoever reads gets a whole value, never an older one than before, whoever has died.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from model.explorer import Case, End
from model.messages import OVERWRITE, Channel, Reader, Word, Writer, entry_at
from model.operations import Fault, Load, LoadBarrier, Process, Steps, Store


class Setter(Writer):
    """A writer that waits for nobody."""

    def full(self) -> Steps:
        return False
        yield

    def drained(self) -> Steps:
        return True
        yield

    def adopt(self) -> Steps:
        """Keep the last whole value, and take the other entries."""
        slots, kept = self.channel.slots, self.position - 1
        self.cells = [-1] * slots
        self.free = list(
            reversed(range(self.channel.cells))
        )  # the worst order: not the unused first
        for i in range(slots):
            p = self.position + (i - self.position) % slots
            if p - slots == kept:
                cell = yield from entry_at(self.w, i, kept)
                if cell >= 0 and self.has("the last value's cell is kept"):
                    self.cells[i] = cell
                    self.free.remove(cell)
            elif self.has("other stamps are taken"):
                yield Store(("stamp", self.w, i), Word(p, self.epoch))


class Getter(Reader):
    """A reader of the newest.

    The last value of a former owner is still the value until the next one is set, also if that one
    stops before it has stored a head of its own. So epochs say nothing here.
    """

    epoch_counts = False
    asks = False  # whether the writer is gone
    gone_before = False

    def run_values(self, last: int, gets: int, tries: int, *, asks: bool = False) -> Process:
        """Get until a position was seen, or the writer is gone, and sleep between; or so many
        times."""
        self.asks = asks
        seen = -1
        for _ in range(gets or 100):
            if asks:
                self.gone_before = yield from self.gone("w0")
            n = yield from self.get(tries)
            if n < seen:
                raise Fault(f"{self.name} got {n} after {seen}")
            seen = n
            self.next[0] = n + 1
            if seen == last or self.gone_before:
                return
            if not gets:
                yield from self.sleep("reader")

    def get(self, tries: int) -> Steps:
        for _ in range(tries):
            head = yield Load(("head", 0))
            yield from self.load_barrier("head before entry")
            if (yield from self.copy(0, head.value - 1)):
                return head.value - 1
        raise Fault(f"{self.name} was overtaken {tries} times")

    def right(self, w: int, n: int, payload: tuple[Any, ...]) -> bool:
        """Whether it is whole; its writer may have been another one before this owner."""
        return payload[0] is not None and all(
            part == payload[0] and part[:2] == (w, n) for part in payload
        )

    def awaits(self) -> Steps:
        head = yield Load(("head", 0))
        yield LoadBarrier()
        if head.value != self.next[0]:
            return False
        return not self.asks or not (yield from self.gone("w0"))


@dataclass
class Setting:
    slots: int = 2
    parts: int = 2
    messages: int = 3
    successor: int = 0
    gets: int = 0
    tries: int = 4
    mortal: frozenset[str] = frozenset()
    silent: frozenset[str] = frozenset()
    start: int = 2
    counted: int = 1  # see Role
    ordered: bool = False  # see Channel

    def case(self, without: Iterable[str] = ()) -> Case:
        channel = Channel(
            1, 1, self.slots, parts=self.parts, counted=self.counted, ordered=self.ordered
        )
        asks = bool(self.mortal) and not self.gets
        last = self.start + self.messages - 1

        def heir() -> Process:
            return (
                yield from Setter(channel, "next", 0, 0, without).run(self.successor, opens=True)
            )

        processes: dict[str, Callable[[], Process]] = {
            "w0": lambda: Setter(channel, "w0", 0, self.start, without).run(self.messages),
            "r0": lambda: Getter(channel, "r0", 0, OVERWRITE, self.start, without).run_values(
                last, self.gets, self.tries, asks=asks
            ),
        }
        if self.successor:
            processes["next"] = heir
        memory = channel.memory({"w0": self.start}, {"r0": OVERWRITE})
        return Case(processes, memory, self.check, self.mortal, self.silent)

    def check(self, end: End) -> str | None:
        """Demand that the last value that was published is still there."""
        head: Any = end.memory["head", 0]
        i = (head.value - 1) % self.slots
        cell = end.memory["entry", 0, i]
        payload: list[Any] = [end.memory["cell", 0, cell, part] for part in range(self.parts)]
        if any(part[:2] != (0, head.value - 1) for part in payload):
            return f"the last value, {head.value - 1}, has become {payload}"
        return None


ROLES = (sys.modules[__name__],)
_W0 = frozenset({"w0"})
POINTS = {
    "head before entry": "latest",
    "reader looks again": "latest",
    "reader sleep fence": "latest",
    "other stamps are taken": "the writer dies",
    "the last value's cell is kept": "the writer dies",
}
BY_DAY: dict[str, Setting] = {
    "latest": Setting(messages=2),
    "the writer dies": Setting(messages=1, gets=2, successor=1, mortal=_W0),
    "nobody comes after it": Setting(messages=1, mortal=_W0),
}
BY_NIGHT: dict[str, Setting] = {
    "latest, twice around": Setting(messages=4, tries=6),
    "four slots": Setting(slots=4, messages=4, gets=2),
    "the writer dies later": Setting(messages=2, gets=2, successor=2, mortal=_W0, tries=6),
}
