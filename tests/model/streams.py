"""Bytes: connections, back pressure, half-close and reset (DESIGN, section 8).

Knows: one direction of a connection (the other is the same with the roles exchanged), and how a
connection is used again.
Does not know: choosing among several connections.
Invariants: the byte at n is n, so order and loss show; all words of a connection carry the epoch of
its caller's owner word.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from model.explorer import Case, End
from model.operations import CompareExchange, Fault, Load, LoadBarrier, Process, Steps, Store
from model.role import CLOSING, FREE, OPEN, Role, awake


class Word(NamedTuple):
    value: int
    epoch: int
    ends: bool = False  # of a head: no more will come; of a tail: no more is read


class Owner(NamedTuple):
    place: str
    state: str
    epoch: int


@dataclass(frozen=True)
class Streams:
    """A case to be: callers that connect, send and close; an acceptor that reads."""

    callers: int = 1
    size: int = 2
    count: int = 3  # bytes of each caller
    reads: int = 99  # the acceptor resets a connection after so many
    mortal: frozenset[str] = frozenset()

    def case(self, without: Iterable[str] = ()) -> Case:
        processes: dict[str, Callable[[], Process]] = {"s": partial(self._accept, without)}
        for c in range(self.callers):
            processes[f"c{c}"] = partial(self._connect, c, without)
        words: dict[Hashable, Hashable] = {
            "caller": Owner("", FREE, 0),
            "acceptor": Owner("", FREE, 0),
            "head": Word(0, 0),
            "tail": Word(0, 0),
            "turn": 0,
        }
        for c in range(self.callers):
            words["over", f"c{c}"] = False
        for i in range(self.size):
            words["byte", i] = None
        return Case(processes, words | awake(*processes), self.check, self.mortal)

    def _connect(self, c: int, without: Iterable[str]) -> Process:
        return Requester(self, f"c{c}", without).run()

    def _accept(self, without: Iterable[str]) -> Process:
        return Acceptor(self, "s", without).run()

    def check(self, end: End) -> str | None:
        dead = set(end.notes) - set(end.results)
        got: Any = end.results.get("s", ())
        for read, how in got:
            if how == "end" and read != self.count:
                return f"the end came after {read} of {self.count}"
            if how == "reset" and not dead:
                return "a connection is reset, but nobody died"
        for c in range(self.callers):
            sent = end.results.get(f"c{c}")
            if sent == "reset" and not dead and self.reads > self.count:
                return f"c{c} could not send, but nobody has closed"
        return None


class Requester(Role):
    def __init__(self, setting: Streams, name: str, without: Iterable[str] = ()) -> None:
        super().__init__(name, without)
        self.setting = setting
        self.epoch = 0
        self.position = 0

    def run(self) -> Process:
        sent = "busy"
        if (yield from self.connect()):
            sent = yield from self.send()
            own = Owner(self.name, OPEN, self.epoch)
            yield CompareExchange("caller", own, own._replace(state=CLOSING))
        yield Store(("over", self.name), True)
        yield from self.announce()
        return sent

    def connect(self) -> Steps:
        caller = yield Load("caller")
        yield LoadBarrier()
        acceptor = yield Load("acceptor")
        yield LoadBarrier()
        if caller.state != FREE and not (yield from self.over(caller, acceptor)):
            return False
        self.epoch = caller.epoch + 1
        own = Owner(self.name, OPEN, self.epoch)
        if (yield CompareExchange("caller", caller, own)) != caller:
            return False
        yield Store("head", Word(0, self.epoch))
        yield from self.announce()
        return True

    def over(self, caller: Owner, acceptor: Owner) -> Steps:
        """Whether both ends have closed or are gone. One that nobody accepted yet may still be."""
        ended = caller.state == CLOSING or (yield from self.gone(caller.place))
        if not ended or acceptor.epoch != caller.epoch:
            return False
        return acceptor.state == CLOSING or (yield from self.gone(acceptor.place))

    def announce(self) -> Steps:
        yield from self.full_fence("announce fence")
        yield from self.wake("s")

    def send(self) -> Steps:
        for n in range(self.setting.count):
            while (yield from self.awaits()):
                yield from self.sleep("caller")
            if (yield from self.refused()):
                return "reset"
            yield Store(("byte", n % self.setting.size), n)
            yield from self.store_barrier("byte before head")
            self.position = n + 1
            yield Store("head", Word(n + 1, self.epoch))
            yield from self.announce()
        yield Store("head", Word(self.position, self.epoch, True))
        yield from self.announce()
        return "sent"

    def tail(self) -> Steps:
        tail = yield Load("tail")
        yield from self.load_barrier("tail before byte")
        if tail.epoch != self.epoch and self.has("tail's epoch"):
            return Word(0, self.epoch)
        return tail

    def awaits(self) -> Steps:
        tail = yield from self.tail()
        if tail.ends or self.position - tail.value < self.setting.size:
            return False
        return not (yield from self.gone("s"))  # it listens, too

    def refused(self) -> Steps:
        tail = yield from self.tail()
        return tail.ends or self.position - tail.value >= self.setting.size


class Acceptor(Role):
    def __init__(self, setting: Streams, name: str, without: Iterable[str] = ()) -> None:
        super().__init__(name, without)
        self.setting = setting
        self.epoch = 0
        self.next = 0
        self.accepting = True

    def run(self) -> Process:
        got: tuple[tuple[int, str], ...] = ()
        while True:
            if not (yield from self.accept()):
                return got
            how = yield from self.receive()
            got += ((self.next, how),)
            own = Owner(self.name, OPEN, self.epoch)
            yield CompareExchange("acceptor", own, own._replace(state=CLOSING))

    def accept(self) -> Steps:
        """Accept a connection. False: there will be none, because all callers have ended."""
        self.accepting = True
        while True:
            over = yield from self.over()
            caller = yield Load("caller")
            yield LoadBarrier()
            acceptor = yield Load("acceptor")
            yield LoadBarrier()
            if caller.state != FREE and acceptor.epoch < caller.epoch:
                own = Owner(self.name, OPEN, caller.epoch)
                if (yield CompareExchange("acceptor", acceptor, own)) == acceptor:
                    self.epoch = caller.epoch
                    self.next = 0
                    yield Store("tail", Word(0, self.epoch))
                    return True
            elif over:
                return False
            else:
                yield from self.sleep("acceptor")

    def over(self) -> Steps:
        for c in range(self.setting.callers):
            over = yield Load(("over", f"c{c}"))
            yield LoadBarrier()
            if not over and not (yield from self.gone(f"c{c}")):
                return False
        return True

    def receive(self) -> Steps:
        self.accepting = False
        while True:
            caller = yield Load("caller")
            yield LoadBarrier()
            gone = yield from self.gone(caller.place)
            head = yield Load("head")
            yield from self.load_barrier("head before byte")
            if head.epoch == self.epoch or not self.has("head's epoch"):
                if head.value > self.next:
                    yield from self.read()
                    if self.next == self.setting.reads:
                        yield from self.store_tail(ends=True)
                        return "enough"
                    continue
                if head.ends:
                    return "end"
            if gone:
                return "reset"
            yield from self.sleep("acceptor")

    def read(self) -> Steps:
        byte = yield Load(("byte", self.next % self.setting.size))
        yield from self.load_barrier("byte before tail")
        if byte != self.next:
            raise Fault(f"got {byte} instead of {self.next}")
        self.next += 1
        yield from self.store_tail()

    def store_tail(self, *, ends: bool = False) -> Steps:
        yield Store("tail", Word(self.next, self.epoch, ends))
        yield from self.full_fence("tail fence")
        caller = yield Load("caller")
        yield LoadBarrier()
        yield from self.wake(caller.place)

    def awaits(self) -> Steps:
        caller = yield Load("caller")
        yield LoadBarrier()
        if self.accepting:
            return caller.epoch == self.epoch and not (yield from self.over())
        if (yield from self.gone(caller.place)):
            return False
        head = yield Load("head")
        yield LoadBarrier()
        return head.epoch != self.epoch or (head.value == self.next and not head.ends)


ROLES = (sys.modules[__name__],)
POINTS = {
    "announce fence": "one way",
    "byte before head": "one way",
    "head before byte": "one way",
    "byte before tail": "one way",
    "tail before byte": "one way",
    "tail fence": "one way",
    "tail's epoch": "used again, full",
    "head's epoch": "used again, full",
    "caller sleep fence": "one way",
    "caller looks again": "one way",
    "acceptor sleep fence": "one way",
    "acceptor looks again": "one way",
}
BY_DAY: dict[str, Streams] = {
    "one way": Streams(count=4),
    "reset": Streams(count=4, reads=1),
    "the caller dies": Streams(count=3, mortal=frozenset({"c0"})),
    "the acceptor dies": Streams(count=4, mortal=frozenset("s")),
}
BY_NIGHT: dict[str, Streams] = {
    "used again": Streams(callers=2, count=2),
    "used again, full": Streams(callers=2, count=3),
    "around": Streams(count=9, size=4),
}
