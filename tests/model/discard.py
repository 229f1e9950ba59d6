"""Readers that discard, and writers with a time limit: what is not delivered is told.

Knows: the backlog that a writer keeps for a reader, in how many places a cell stands, giving up.
Does not know: the ring that other readers read (`messages`), the next owner of a reader's slot.
Invariants: a reader gets whole messages in order; each other message was told to the writer: that
the reader missed it, or that it was not published.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Final

from model.explorer import Case, End
from model.messages import BLOCK, Channel, Read, Reader, Writer
from model.operations import Fault, Load, LoadBarrier, Note, Process, Steps, Store, StoreBarrier
from model.role import Role, awake

WRITER: Final = "writer"  # the cases of `messages` take its points out


@dataclass(frozen=True)
class Discard:
    """A case to be: one writer, and one reader that has a backlog."""

    slots: int = 2
    messages: int = 4
    parts: int = 2  # words of a payload
    mortal: frozenset[str] = frozenset()
    most: int = 0  # the reader ends after so many, and the writer does not say that it has ended
    counted: int = 1  # see Role
    stacked: bool = False  # cells are used again in the C header's order, and with its barriers

    def case(self, without: Iterable[str] = ()) -> Case:
        words: dict[Hashable, Hashable] = {"head": (0, False), "tail": 0}
        for i in range(self.slots):
            words["entry", i] = -1
        for c in range(2 * self.slots + 1):
            for part in range(self.parts):
                words["cell", c, part] = -1
        processes: dict[str, Callable[[], Process]] = {
            "w0": partial(self._write, without),
            "r0": partial(self._read, without),
        }
        return Case(processes, words | awake(*processes), self.check, self.mortal)

    def _write(self, without: Iterable[str]) -> Process:
        return Discarder(self, without).run()

    def _read(self, without: Iterable[str]) -> Process:
        return Backlogged(self, without).run()

    def check(self, end: End) -> str | None:
        got = [number for what, number in end.notes["r0"] if what == "got"]
        missed = [number for what, number in end.notes["w0"] if what == "missed"]
        if got != sorted(set(got)):
            return f"out of order: {got}"
        if set(got) & set(missed):
            return f"got {got}, and the writer was told that {missed} were missed"
        alive = {"w0", "r0"} <= set(end.results) and not self.most
        if alive and sorted(got + missed) != list(range(self.messages)):
            return f"got {got} and missed {missed} of {self.messages}"
        return None


class Discarder(Role):
    """The writer. It waits for nobody."""

    def __init__(self, setting: Discard, without: Iterable[str] = ()) -> None:
        super().__init__("w0", without, setting.counted)
        self.setting = setting
        self.head = self.tail = 0
        self.places = [0] * (2 * setting.slots + 1)  # in which each cell stands
        self.ring = [-1] * setting.slots  # what other readers have: the cells of the newest
        self.pinned = [-1] * setting.slots  # those of the backlog
        self.free = list(range(setting.slots, len(self.places)))  # if they are stacked
        if setting.stacked:
            self.ring = list(range(setting.slots))
            self.places[: setting.slots] = [1] * setting.slots

    def run(self) -> Process:
        for number in range(self.setting.messages):
            yield from self.publish(number)
        if not self.setting.most:
            yield Store("head", (self.head, True))
            yield from self.announce()

    def publish(self, number: int) -> Steps:
        slots = self.setting.slots
        cell = self.free.pop() if self.setting.stacked else self.places.index(0)
        for part in range(self.setting.parts):
            yield Store(("cell", cell, part), number)
        tail = yield Load("tail")
        yield from self.load_barrier("tail before cells")
        while self.tail != tail:
            self.drop(self.pinned[self.tail % slots])
            self.tail += 1
        self.places[cell] = 1
        if self.head - self.tail == slots and self.has("a full backlog stays"):
            yield Note(("missed", number))
        else:
            if self.has("a backlog's cells stay"):
                self.places[cell] = 2
            if self.setting.stacked:
                yield StoreBarrier()
            yield Store(("entry", self.head % slots), cell)
            self.pinned[self.head % slots] = cell
            self.head += 1
            yield from self.store_barrier("entry before head")
            yield Store("head", (self.head, False))
        self.drop(self.ring[number % slots])
        self.ring[number % slots] = cell
        yield from self.announce()

    def drop(self, cell: int) -> None:
        if cell >= 0:
            self.places[cell] = max(0, self.places[cell] - 1)
            if self.places[cell] == 0:
                self.free.append(cell)

    def announce(self) -> Steps:
        yield from self.full_fence("announce fence")
        yield from self.wake("r0")


class Backlogged(Role):
    """The reader."""

    def __init__(self, setting: Discard, without: Iterable[str] = ()) -> None:
        super().__init__("r0", without, setting.counted)
        self.setting = setting
        self.next = 0
        self.known = 0  # the head, as it was seen last

    def run(self) -> Process:
        closed = False
        while not self.setting.most or self.next != self.setting.most:
            gone = yield from self.gone("w0")
            if self.known == self.next or not self.setting.stacked:
                self.known, closed = yield Load("head")
                yield from self.load_barrier("head before entry")
            if self.next != self.known:
                yield from self.read()
            elif closed or gone:
                return
            else:
                yield from self.sleep("reader")

    def read(self) -> Steps:
        cell = yield Load(("entry", self.next % self.setting.slots))
        payload: tuple[int, ...] = ()
        for part in range(self.setting.parts):
            word = yield Load(("cell", cell, part))
            payload += (word,)
        yield from self.load_barrier("payload before tail")
        if payload != (payload[0],) * self.setting.parts or payload[0] < 0:
            raise Fault(f"got {payload}")
        yield Note(("got", payload[0]))
        self.next += 1
        if self.setting.stacked:
            yield StoreBarrier()
        yield Store("tail", self.next)

    def awaits(self) -> Steps:
        head, closed = yield Load("head")
        yield LoadBarrier()
        return head == self.next and not closed and not (yield from self.gone("w0"))


class Limited(Writer):
    """A writer that waits for a blocking reader until its time is over, and keeps the message."""

    def run_limited(self, messages: int) -> Process:
        full = 0
        for _ in range(messages):
            if (yield from self.full()):
                yield from self.sleep(WRITER)
                if (yield from self.full()):
                    full += 1
                    continue
            yield from self.publish()
        yield from self.close()
        return full


@dataclass(frozen=True)
class Full:
    """A case to be: a writer whose put ends without room."""

    messages: int = 4

    def case(self, without: Iterable[str] = ()) -> Case:
        channel = Channel(1, 1, 2, parts=1)
        processes: dict[str, Callable[[], Process]] = {
            "w0": lambda: Limited(channel, "w0", 0, 0, without).run_limited(self.messages),
            "r0": lambda: Reader(channel, "r0", 0, BLOCK, 0, without).run(),
        }
        memory = channel.memory({"w0": 0}, {"r0": BLOCK})
        return Case(processes, memory, self.check, spurious=frozenset({"w0"}))

    def check(self, end: End) -> str | None:
        read = end.results["r0"]
        published = self.messages - end.results["w0"]
        if not isinstance(read, Read) or read.lost or read.next != (published,):
            return f"{published} were published, and the reader says {read}"
        return None


ROLES = (sys.modules[__name__],)
_R0, _W0 = frozenset({"r0"}), frozenset({"w0"})
POINTS = {
    "a backlog's cells stay": "discard",
    "a full backlog stays": "discard",
    "announce fence": "discard",
    "entry before head": "discard",
    "head before entry": "discard",
    "payload before tail": "discard",
    "reader looks again": "discard",
    "reader sleep fence": "discard",
    "tail before cells": "discard",
}
BY_DAY: dict[str, Discard | Full] = {
    "discard": Discard(),
    "full": Full(3),
    "the writer dies": Discard(messages=3, parts=1, mortal=_W0),
    "the reader dies": Discard(messages=4, parts=1, mortal=_R0),
}
BY_NIGHT: dict[str, Discard | Full] = {
    "discard, twice around": Discard(messages=7),
    "full, twice around": Full(6),
}
