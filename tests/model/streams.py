"""Bytes: connections, back pressure, half-close and reset (DESIGN, section 8).

Knows: one direction of a connection (the other is the same with the roles exchanged), and how a
connection is used again.
Does not know: choosing among several connections.
Invariants: the byte at n says n and who sent it, so order, loss and another's bytes show; all words
of a connection carry the epoch of its caller's owner word. The steps are those of the C header,
except that one byte here is all that the C sends at once.
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
    Fault,
    Load,
    LoadBarrier,
    Process,
    Ring,
    Steps,
    Store,
    StoreBarrier,
)
from model.role import CLOSING, FREE, OPEN, Role, awake


class Word(NamedTuple):
    value: int
    epoch: int
    ends: bool = False  # of a head: no more will come; of a tail: no more is read


class Owner(NamedTuple):
    place: str
    state: str
    epoch: int


class Sleeper(NamedTuple):
    state: str
    number: int
    epoch: int


ENDS: Final = ("caller", "acceptor")


@dataclass(frozen=True)
class Streams:
    """A case to be: callers that connect, send and close; an acceptor that reads."""

    callers: int = 1
    size: int = 2
    count: int = 3  # bytes of each caller
    reads: int = 99  # the acceptor resets a connection after so many
    mortal: frozenset[str] = frozenset()
    most: int = 0  # the acceptor ends after so many connections, and no caller says that it is over
    counted: int = 1  # see Role
    announced: bool = False  # a barrier stands before each head and tail, as in the C header
    again: bool = False  # a caller that finds no free connection tries again

    def case(self, without: Iterable[str] = ()) -> Case:
        processes: dict[str, Callable[[], Process]] = {"s": partial(self._accept, without)}
        for c in range(self.callers):
            processes[f"c{c}"] = partial(self._connect, c, without)
        words: dict[Hashable, Hashable] = {
            "caller": Owner("", FREE, 0),
            "acceptor": Owner("", FREE, 0),
            "head": Word(0, 0),
            "tail": Word(0, 0),
        }
        for end in ENDS:
            words["end sleeper", end] = Sleeper("awake", 0, 0)
        for c in range(self.callers):
            words["over", f"c{c}"] = False
        for i in range(self.size):
            words["byte", i] = None
        return Case(processes, words | awake("s"), self.check, self.mortal)

    def _connect(self, c: int, without: Iterable[str]) -> Process:
        return Requester(self, f"c{c}", without).run()

    def _accept(self, without: Iterable[str]) -> Process:
        return Acceptor(self, "s", without).run()

    def check(self, end: End) -> str | None:
        dead = set(end.notes) - set(end.results)
        got: Any = end.results.get("s", ())
        sources = [source for _, _, source in got if source]
        if len(set(sources)) < len(sources):
            return f"what a caller sent came twice: {got}"
        for read, how, _ in got:
            if how == "end" and read != self.count:
                return f"the end came after {read} of {self.count}"
            if how == "reset" and not dead:
                return "a connection is reset, but nobody died"
        for c in range(self.callers):
            sent = end.results.get(f"c{c}")
            if sent == "reset" and not dead and self.reads > self.count:
                return f"c{c} could not send, but nobody has closed"
        return None


class Side(Role):
    """One end of a connection, or a listener: `end` is then None."""

    def __init__(self, setting: Streams, name: str, without: Iterable[str] = ()) -> None:
        super().__init__(name, without, setting.counted)
        self.setting = setting
        self.end: str | None = None
        self.rang: Sleeper | None = None  # the last sleep of the other end that was rung
        self.epoch = 0

    def says(self, state: str) -> Store:
        if self.end is None:
            return super().says(state)
        return Store(("end sleeper", self.end), Sleeper(state, self.sleeps, self.epoch))

    def wake_end(self, end: str) -> Steps:
        """Ring the owner of an end, if it sleeps. A full fence stands before."""
        sleeper = yield Load(("end sleeper", end))
        yield LoadBarrier()
        if sleeper.state != "sleeps" or sleeper == self.rang:
            return
        owner = yield Load(end)
        yield LoadBarrier()
        if owner.state != OPEN or (yield from self.gone(owner.place)):
            return
        if owner.epoch == sleeper.epoch:
            if self.counted > 1:
                self.rang = sleeper
            yield Ring(owner.place)

    def free(self, end: str, owner: Owner) -> Steps:
        """Free an end that has this owner. Whether this process did it."""
        return (yield CompareExchange(end, owner, Owner("", FREE, owner.epoch))) == owner

    def owners(self) -> Steps:
        caller = yield Load("caller")
        yield LoadBarrier()
        acceptor = yield Load("acceptor")
        yield LoadBarrier()
        return caller, acceptor


class Requester(Side):
    def __init__(self, setting: Streams, name: str, without: Iterable[str] = ()) -> None:
        super().__init__(setting, name, without)
        self.position = 0
        self.refused = False

    def run(self) -> Process:
        sent = "busy"
        connected = yield from self.connect()
        while not connected and self.setting.again:
            connected = yield from self.connect()
        if connected:
            sent = yield from self.send()
            yield from self.close()
        if not self.setting.most:
            yield Store(("over", self.name), True)
            yield from self.full_fence("announce fence")
            yield from self.wake("s")
        return sent

    def connect(self) -> Steps:
        if (yield from self.gone("s")):  # nobody listens
            return False
        if not (yield from self.is_free()):
            return False
        caller, acceptor = yield from self.owners()
        if caller.state != FREE or acceptor.state != FREE:
            return False
        own = Owner(self.name, OPEN, caller.epoch + 1)
        if (yield CompareExchange("caller", caller, own)) != caller:
            return False
        now = yield Load("acceptor")
        yield LoadBarrier()
        late = now != acceptor and now.epoch != own.epoch
        if late and self.has("the acceptor is looked at again"):
            yield from self.free("caller", own)
            return False
        self.epoch, self.end = own.epoch, "caller"
        self.rung, self.rang = {}, None
        yield Store("head", Word(0, self.epoch))
        yield from self.full_fence("announce fence")
        yield from self.wake("s")
        return True

    def is_free(self) -> Steps:
        """Whether a connection is free, or became it: its ends are gone."""
        caller, acceptor = yield from self.owners()
        if acceptor.state != FREE and not (yield from self.gone(acceptor.place)):
            return False
        if caller.state == OPEN and not (yield from self.gone(caller.place)):
            return False
        if caller.state == CLOSING and acceptor.state == FREE and acceptor.epoch != caller.epoch:
            return False  # it can still be accepted
        if caller.state != FREE and not (yield from self.free("caller", caller)):
            return False
        return acceptor.state == FREE or (yield from self.free("acceptor", acceptor))

    def send(self) -> Steps:
        for n in range(self.setting.count):
            while (yield from self.awaits()):
                yield from self.sleep("caller")
            if self.refused:
                return "reset"
            yield Store(("byte", n % self.setting.size), (self.name, n))
            yield from self.store_barrier("byte before head")
            self.position = n + 1
            yield Store("head", Word(n + 1, self.epoch))
            yield from self.announce()
        return "sent"

    def announce(self) -> Steps:
        yield from self.full_fence("announce fence")
        yield from self.wake_end("acceptor")

    def close(self) -> Steps:
        if self.setting.announced:
            yield StoreBarrier()
        yield Store("head", Word(self.position, self.epoch, True))
        yield from self.announce()
        own = Owner(self.name, OPEN, self.epoch)
        closing = own._replace(state=CLOSING)
        if (yield CompareExchange("caller", own, closing)) != own:
            return
        acceptor = yield Load("acceptor")
        yield LoadBarrier()
        if acceptor.epoch == self.epoch or (yield from self.gone("s")):
            yield from self.free("caller", closing)
        yield from self.wake_end("acceptor")

    def awaits(self) -> Steps:
        """Look at the other end; return whether this caller must wait for room."""
        acceptor = yield Load("acceptor")
        yield LoadBarrier()
        if acceptor.epoch == self.epoch:
            closed = acceptor.state == FREE or (yield from self.gone(acceptor.place))
        else:
            closed = yield from self.gone("s")  # who else should accept
        tail = yield Load("tail")
        yield from self.load_barrier("tail before byte")
        if tail.epoch != self.epoch and self.has("tail's epoch"):
            tail = Word(0, self.epoch)
        self.refused = closed or tail.ends
        return not self.refused and self.position - tail.value >= self.setting.size


class Acceptor(Side):
    def __init__(self, setting: Streams, name: str, without: Iterable[str] = ()) -> None:
        super().__init__(setting, name, without)
        self.next = 0
        self.source = ""

    def run(self) -> Process:
        got: tuple[tuple[int, str, str], ...] = ()
        while len(got) < self.setting.most or not self.setting.most:
            if not (yield from self.accept()):
                break
            how = yield from self.receive()
            got += ((self.next, how, self.source),)
            yield from self.close()
        return got

    def accept(self) -> Steps:
        """Accept a connection. False: there will be none, because all callers have ended."""
        while True:
            over = yield from self.over()
            found = yield from self.caller()
            if found is not None:
                acceptor, epoch = found
                if (yield from self.take(acceptor, Owner(self.name, OPEN, epoch))):
                    return True
            elif over:
                return False
            else:
                yield from self.sleep("acceptor")

    def caller(self) -> Steps:
        """Return the acceptor's word and the epoch of a caller that waits, or None."""
        acceptor = yield Load("acceptor")
        yield LoadBarrier()
        caller = yield Load("caller")
        yield LoadBarrier()
        if caller.state == FREE or acceptor.state != FREE or acceptor.epoch == caller.epoch:
            return None
        head = yield Load("head")
        yield LoadBarrier()
        if head.epoch != caller.epoch and self.has("a caller's words are stored"):
            return None
        return (acceptor, caller.epoch)

    def take(self, acceptor: Owner, own: Owner) -> Steps:
        if (yield CompareExchange("acceptor", acceptor, own)) != acceptor:
            return False
        caller = yield Load("caller")
        yield LoadBarrier()
        if caller.epoch != own.epoch and self.has("the caller is looked at again"):
            yield from self.free("acceptor", own)
            return False
        self.epoch, self.end = own.epoch, "acceptor"
        self.next, self.source = 0, ""
        self.rang = None
        yield from self.store_tail()
        return True

    def over(self) -> Steps:
        for c in range(self.setting.callers):
            over = False
            if not self.setting.most:
                over = yield Load(("over", f"c{c}"))
                yield LoadBarrier()
            if not over and not (yield from self.gone(f"c{c}")):
                return False
        return True

    def receive(self) -> Steps:
        while True:
            closed, head = yield from self.look()
            if head.value > self.next:
                yield from self.read()
                if self.next == self.setting.reads:
                    yield from self.store_tail(ends=True)
                    return "enough"
            elif head.ends:
                return "end"
            elif closed:
                return "reset"
            else:
                yield from self.sleep("acceptor")

    def look(self) -> Steps:
        """Return whether the caller has closed or is gone, and what it has sent until then."""
        caller = yield Load("caller")
        yield LoadBarrier()
        closed = caller.state == FREE
        if caller.epoch != self.epoch and self.has("another caller"):
            closed = True
        elif not closed:
            closed = yield from self.gone(caller.place)
        head = yield Load("head")
        yield from self.load_barrier("head before byte")
        if head.epoch != self.epoch:  # here caller() saw to that; the C asks in both directions
            head = Word(self.next, self.epoch)
        return closed, head

    def read(self) -> Steps:
        byte = yield Load(("byte", self.next % self.setting.size))
        yield from self.load_barrier("byte before tail")
        source, number = byte or ("", -1)
        if self.next == 0:
            self.source = source
        if (source, number) != (self.source, self.next):
            raise Fault(f"got {byte} instead of {self.source}'s {self.next}")
        self.next += 1
        yield from self.store_tail()

    def store_tail(self, *, ends: bool = False) -> Steps:
        if self.setting.announced:
            yield StoreBarrier()
        yield Store("tail", Word(self.next, self.epoch, ends))
        yield from self.full_fence("tail fence")
        yield from self.wake_end("caller")

    def close(self) -> Steps:
        yield from self.store_tail(ends=True)
        caller = yield Load("caller")
        yield LoadBarrier()
        if caller.state == CLOSING and caller.epoch == self.epoch:
            yield from self.free("caller", caller)
        yield from self.free("acceptor", Owner(self.name, OPEN, self.epoch))
        yield from self.wake_end("caller")
        self.end = None

    def awaits(self) -> Steps:
        if self.end is None:
            found = yield from self.caller()
            return found is None and not (yield from self.over())
        closed, head = yield from self.look()
        return not closed and head.value == self.next and not head.ends


ROLES = (sys.modules[__name__],)
POINTS = {
    "announce fence": "one way",
    "byte before head": "one way",
    "head before byte": "one way",
    "byte before tail": "one way",
    "tail before byte": "one way",
    "tail fence": "one way",
    "tail's epoch": "used again, full",
    "a caller's words are stored": "used again after a death",
    "the caller is looked at again": "used again after a death",
    "the acceptor is looked at again": "used again after a death",
    "another caller": "used again after a death",
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
    "used again after a death": Streams(callers=2, count=1, mortal=frozenset({"c0"})),
    "around": Streams(count=9, size=4),
}
