"""Calls: a request is served once, or its caller is told (DESIGN, section 5).

Knows: claiming a request, its reply, a server's death, the caller's time limit.
Does not know: what a queue does with order and redelivery (`queue`).
Invariants: a request is run at most once; "never ran" is said only of one that never will; a reply
is the one to this request.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple

from model import role
from model.explorer import Case, End
from model.operations import (
    CompareExchange,
    Fault,
    Load,
    LoadBarrier,
    Note,
    Process,
    Ring,
    Steps,
    Store,
    StoreBarrier,
)
from model.role import Role, awake

DONE: Final = "done"
OPENED: Final = "open"
TAKEN: Final = "taken"
REPLIED: Final = "replied"


class Claim(NamedTuple):
    position: int
    state: str
    server: str = ""


@dataclass(frozen=True)
class Calls:
    """A case to be."""

    callers: int = 1
    servers: int = 1
    slots: int = 1
    calls: int = 1  # of each caller, one after the other
    one: bool = False  # a server ends after one call
    limit: bool = False  # the wait for a reply ends when it wakes
    mortal: frozenset[str] = frozenset()
    silent: frozenset[str] = frozenset()
    spurious: frozenset[str] = frozenset()
    most: int = 0  # with cells: a server ends after so many calls, and no caller says that it has
    counted: int = 1  # see Role
    cells: bool = False  # a request has a cell, and an entry that says which, as in the C header

    @property
    def asks(self) -> bool:
        """Whether, with cells, the server asks if its caller is gone, and ends then."""
        return "c0" in self.mortal

    @property
    def until_done(self) -> bool:
        """Whether, with cells, servers end when the last call of the only caller is over."""
        return not self.most

    def case(self, without: Iterable[str] = ()) -> Case:
        words: dict[Hashable, Hashable] = {}
        processes: dict[str, Callable[[], Process]] = {}
        for c in range(self.callers):
            processes[f"c{c}"] = partial(self._call, c, without)
            words["head", c] = (0, False)
            for i in range(self.slots):
                words["claim", c, i] = Claim(i - self.slots, DONE)
                words["request", c, i] = words["reply", c, i] = None
                words["entry", c, i] = i
            words["request", c, self.slots] = None
        for s in range(self.servers):
            processes[f"s{s}"] = partial(self._serve, s, without)
        words |= awake(*processes)
        return Case(processes, words, self.check, self.mortal, self.silent, spurious=self.spurious)

    def _call(self, c: int, without: Iterable[str]) -> Process:
        return Requester(self, c, without).run()

    def _serve(self, s: int, without: Iterable[str]) -> Process:
        return Server(self, s, without).run()

    def check(self, end: End) -> str | None:
        notes = [note for notes in end.notes.values() for note in notes]
        ran = Counter(note[1:] for note in notes if note[0] == "ran")
        dead = set(end.notes) - set(end.results)
        for call, count in ran.items():
            if count > 1:
                return f"{call} ran {count} times"
        for c in range(self.callers):
            for number, outcome in enumerate(end.results.get(f"c{c}") or ()):
                if outcome == "never ran" and ran[c, number]:
                    return f"call {number} ran, and the caller was told that it did not"
                if outcome == "reply" and not ran[c, number]:
                    return f"call {number} has a reply, but did not run"
                if outcome == "gone" and not dead:
                    return f"call {number} has lost a server that lives"
        return None


class Side(Role):
    """A caller or a server."""

    def __init__(self, setting: Calls, name: str, without: Iterable[str] = ()) -> None:
        super().__init__(name, without, setting.counted)
        self.setting = setting

    def wake_servers(self, *, everybody: bool = False) -> Steps:
        if self.setting.cells and not (yield from self.some_sleep("s", self.setting.servers)):
            return
        for s in range(self.setting.servers):
            if f"s{s}" == self.name and not self.setting.cells:
                continue
            if (yield from self.wakes_living(f"s{s}")) and not everybody:
                return


class Requester(Side):
    def __init__(self, setting: Calls, c: int, without: Iterable[str] = ()) -> None:
        super().__init__(setting, f"c{c}", without)
        self.c = c
        self.position = 0
        self.of_slots = list(range(setting.slots))  # the cell of each
        self.spare = setting.slots

    def run(self) -> Process:
        outcomes: tuple[str, ...] = ()
        for number in range(self.setting.calls):
            outcome = yield from self.call(number)
            outcomes += (outcome,)
            if self.setting.cells and self.setting.until_done:  # in place of the beat
                for s in range(self.setting.servers):
                    yield Ring(f"s{s}")
        if not self.setting.one and not self.setting.cells:
            yield Store(("head", self.c), (self.position, True))
            yield from self.announce(everybody=True)
        return outcomes

    def call(self, number: int) -> Steps:
        c, p = self.c, self.position
        i = p % self.setting.slots
        claim = yield Load(("claim", c, i))
        yield LoadBarrier()
        if claim.state not in (DONE, REPLIED):
            return "full"  # given up before, and still with a server
        cell = self.spare if self.setting.cells else i
        yield Store(("request", c, cell), (c, number))
        if self.setting.cells:
            yield StoreBarrier()
            yield Store(("entry", c, i), cell)
            yield StoreBarrier()
            self.spare, self.of_slots[i] = self.of_slots[i], self.spare
        yield Store(("claim", c, i), Claim(p, OPENED))
        yield from self.store_barrier("request before head")
        self.position = p + 1
        yield Store(("head", c), (p + 1, False))
        yield from self.announce()
        return (yield from self.reply(number, i))

    def announce(self, *, everybody: bool = False) -> Steps:
        yield from self.full_fence("announce fence")
        yield from self.wake_servers(everybody=everybody)

    def reply(self, number: int, i: int) -> Steps:
        place = ("claim", self.c, i)
        while True:
            claim = yield Load(place)
            yield from self.load_barrier("replied before reply")
            if claim.state == REPLIED:
                reply = yield Load(("reply", self.c, i))
                yield from self.load_barrier("reply before done")
                if reply != (self.c, number):
                    raise Fault(f"the reply to call {number} is {reply}")
                if self.setting.cells:  # the C ends all calls alike
                    now = yield Load(place)
                    yield from self.take_back(place, now)
                else:
                    yield Store(place, claim._replace(state=DONE))
                return "reply"
            if claim.state == TAKEN and (yield from self.gone(claim.server)):
                if (yield from self.take_back(place, claim)):
                    return "gone"
                continue
            yield from self.sleep("caller")
            if self.setting.limit:
                claim = yield Load(place)
                yield LoadBarrier()
                if claim.state == OPENED and (yield from self.take_back(place, claim)):
                    return "never ran"
                if claim.state == TAKEN:
                    return "given up"

    def take_back(self, place: Hashable, claim: Claim) -> Steps:
        """End a call that has no reply. Whether that was in time."""
        done = claim._replace(state=DONE)
        if self.has("calls are taken back by exchange"):
            return (yield CompareExchange(place, claim, done)) == claim
        yield Store(place, done)
        return True

    def awaits(self) -> Steps:
        i = (self.position - 1) % self.setting.slots
        claim = yield Load(("claim", self.c, i))
        yield LoadBarrier()
        if claim.state == REPLIED:
            return False
        return claim.state == OPENED or not (yield from self.gone(claim.server))


class Server(Side):
    def __init__(self, setting: Calls, s: int, without: Iterable[str] = ()) -> None:
        super().__init__(setting, f"s{s}", without)
        self.served = 0
        self.next = [0] * setting.callers
        self.closed = [False] * setting.callers

    def run(self) -> Process:
        if self.setting.cells:
            yield from self.run_cells()
            return
        while True:
            found = yield from self.look()
            if found is not None:
                c, claim = found
                served = yield from self.serve(c, claim)
                if served and self.setting.one:
                    return
            elif all(self.closed):
                return
            else:
                yield from self.sleep("server")

    def run_cells(self) -> Steps:
        """Serve as the C header does, until there were so many calls, or will be none."""
        while True:
            if self.setting.until_done and (yield from self.over()):
                return
            gone = False
            if self.setting.asks:
                gone = yield from self.gone("c0")
            if (yield from self.take()):
                self.served += 1
                if self.served == self.setting.most:
                    return
            elif gone:
                return
            else:
                yield from self.sleep("server")

    def over(self) -> Steps:
        """Whether the only caller's last call is over."""
        head, _ = yield Load(("head", 0))
        yield LoadBarrier()
        last = self.setting.calls - 1
        claim = yield Load(("claim", 0, last % self.setting.slots))
        yield LoadBarrier()
        return head > last and claim.state == DONE

    def has_more(self) -> Steps:
        """Whether there is an open request, as the C header looks for one."""
        for c in range(self.setting.callers):
            head, _ = yield Load(("head", c))
            yield LoadBarrier()
            for i in range(self.setting.slots):
                claim = yield Load(("claim", c, i))
                yield LoadBarrier()
                if claim.state == OPENED and claim.position < head:
                    return True
        return False

    def take(self) -> Steps:
        """Serve a request, as the C header finds one. Whether there was one."""
        slots = self.setting.slots
        for c in range(self.setting.callers):
            head, _ = yield Load(("head", c))
            yield LoadBarrier()
            while self.next[c] < head:
                position = self.next[c]
                self.next[c] += 1
                claim = yield Load(("claim", c, position % slots))
                yield LoadBarrier()
                is_open = claim.position == position and claim.state == OPENED
                if is_open and (yield from self.serve(c, claim)):
                    return True
            for i in range(slots):  # one that waits longer
                claim = yield Load(("claim", c, i))
                yield LoadBarrier()
                is_open = claim.state == OPENED and claim.position < head
                if is_open and (yield from self.serve(c, claim)):
                    return True
        return False

    def look(self) -> Steps:
        """Return an open request, or None."""
        for c in range(self.setting.callers):
            gone = yield from self.gone(f"c{c}")
            head, closed = yield Load(("head", c))
            yield LoadBarrier()
            for i in range(self.setting.slots):
                claim = yield Load(("claim", c, i))
                yield LoadBarrier()
                if claim.state == OPENED and claim.position < head:
                    return (c, claim)
            self.closed[c] = closed or gone
        return None

    def serve(self, c: int, claim: Claim) -> Steps:
        """Serve a request. Return whether no other server was quicker."""
        place = ("claim", c, claim.position % self.setting.slots)
        mine = Claim(claim.position, TAKEN, self.name)
        if self.has("requests are exchanged"):
            if (yield CompareExchange(place, claim, mine)) != claim:
                return False
        else:
            yield Store(place, mine)
        cell = claim.position % self.setting.slots
        if self.setting.cells:
            cell = yield Load(("entry", c, cell))
            yield LoadBarrier()
        if self.has("a server rings the next"):
            yield from self.pass_on()
        request = yield Load(("request", c, cell))
        yield LoadBarrier()
        if request is None or request[0] != c:
            raise Fault(f"{self.name} got the request {request} of caller {c}")
        yield Note(("ran", *request))
        yield Store(("reply", c, claim.position % self.setting.slots), request)
        replied = mine._replace(state=REPLIED)
        if (yield CompareExchange(place, mine, replied)) == mine:
            yield from self.wake(f"c{c}")
        return True

    def pass_on(self) -> Steps:
        """Wake another server if there is more: callers may have rung this one for several."""
        if self.setting.cells:
            more = yield from self.has_more()
        else:
            found = yield from self.look()
            more = found is not None
        if more:
            yield from self.wake_servers()

    def awaits(self) -> Steps:
        if self.setting.cells:
            if (yield from self.has_more()):
                return False
            if self.setting.asks:
                return not (yield from self.gone("c0"))
            return not self.setting.until_done or not (yield from self.over())
        closed = list(self.closed)
        found = yield from self.look()
        news = self.closed != closed
        self.closed = closed
        return found is None and not news


ROLES = (sys.modules[__name__], role)
POINTS = {
    "announce fence": "one call",
    "request before head": "one call",
    "replied before reply": "one call",
    "reply before done": "one call",
    "requests are exchanged": "two servers",
    "calls are taken back by exchange": "time limit",
    "a ring to the dead does not count": "a server dies",
    "a server rings the next": "one each",
    "caller sleep fence": "one call",
    "caller looks again": "one call",
    "server sleep fence": "one call",
    "server looks again": "one call",
}
_S0 = frozenset({"s0"})
BY_DAY: dict[str, Calls] = {
    "one call": Calls(calls=2),
    "two servers": Calls(servers=2, calls=1),
    "time limit": Calls(calls=2, limit=True, spurious=frozenset({"c0"})),
    "the caller dies": Calls(calls=2, mortal=frozenset({"c0"})),
}
BY_NIGHT: dict[str, Calls] = {
    "a server dies": Calls(servers=2, calls=1, mortal=_S0),
    "one each": Calls(callers=2, servers=2, one=True),
    "a server dies later": Calls(servers=2, slots=2, calls=2, mortal=_S0),
    "time limit and death": Calls(calls=2, limit=True, spurious=frozenset({"c0"}), mortal=_S0),
    "silent": Calls(servers=2, calls=2, silent=_S0),
}
