"""Queue: each message goes to one of the readers (DESIGN, section 5).

Knows: claims whose positions wrap, redelivery, skipping busy entries, passing a ring on.
Does not know: slots' take-over; what the queue has in common with messages (`messages` shows it).
Invariants: of one message, `get` notes at most one ("got", message); `take` notes each delivery,
and at most one success.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NamedTuple

from model.explorer import Case, End
from model.operations import (
    CompareExchange,
    Fault,
    FullFence,
    Load,
    LoadBarrier,
    Note,
    Process,
    Ring,
    Steps,
    Store,
    StoreBarrier,
    Wait,
)
from model.role import Role, awake

DONE: Final = "done"
OPENED: Final = "open"
REDELIVER: Final = "redeliver"
TAKEN: Final = "taken"
ONCE: Final = "once"


class Claim(NamedTuple):
    position: int  # modulo `Queue.modulus`
    state: str
    reader: str = ""  # its slot and epoch, hence its place


class Found(NamedTuple):
    """A claim that has become ours."""

    w: int
    claim: Claim
    redelivered: bool
    cell: int


@dataclass(frozen=True)
class Queue:
    writers: int = 1
    readers: int = 2
    slots: int = 2
    messages: int = 2  # of each writer
    ways: tuple[str, ...] = (
        "get",
        "get",
    )  # of the readers: get, take, one, fail, second, hold, return, rest, limit, heir
    mortal: frozenset[str] = frozenset()
    silent: frozenset[str] = frozenset()
    closes: bool = True
    batch: int = 1  # puts with one announcement
    spurious: frozenset[str] = frozenset()
    most: tuple[int, ...] = ()  # each reader ends after so many messages
    counted: int = 1  # see Role
    modulus: int = 1 << 28  # of the positions that claims have; at least twice `slots`
    ordered: bool = False  # with the store barriers that the C header has and need not have

    def case(self, without: Iterable[str] = ()) -> Case:
        processes: dict[str, Callable[[], Process]] = {}
        words: dict[Hashable, Hashable] = {}
        for w in range(self.writers):
            processes[f"w{w}"] = partial(self._put, w, without)
            words["head", w] = (0, False)
            for i in range(self.slots):
                words["claim", w, i] = Claim((i - self.slots) % self.modulus, DONE)
                words["entry", w, i] = i
            for c in range(self.slots + 1):
                words["cell", w, c] = None
        for r in range(self.readers):
            processes[f"r{r}"] = partial(self._get, r, without)
        words |= awake(*processes) | {"begun": False}
        return Case(processes, words, self.check, self.mortal, self.silent, spurious=self.spurious)

    def _put(self, w: int, without: Iterable[str]) -> Process:
        return Producer(self, w, without).run()

    def _get(self, r: int, without: Iterable[str]) -> Process:
        return Consumer(self, r, without).run()

    def position(self, head: int, claim: Claim) -> int:
        """Return the last position before the head that can be a claim's."""
        return head - 1 - (head - 1 - claim.position) % self.modulus

    def is_passed(self, head: int, claim: Claim) -> bool:
        """Whether the head has passed a claim, if its writer has not passed over it for long."""
        return head - self.position(head, claim) <= self.modulus // 2

    def check(self, end: End) -> str | None:
        notes = [note for notes in end.notes.values() for note in notes]
        finished = Counter(note for note in notes if note[0] in ("got", "done"))
        dead = set(end.notes) - set(end.results)
        for note, count in finished.items():
            if count > 1:
                return f"{note} happened {count} times"
        delivered = Counter(note[1:] for note in notes if note[0] == "first")
        for message, count in delivered.items():
            if count > 1:
                return f"{message} was delivered {count} times without a word"
        lost = 0
        for w in range(self.writers):
            head: Any = end.memory["head", w]
            busy = [end.memory["claim", w, i] for i in range(self.slots)]
            open_ = [
                claim
                for claim in busy
                if isinstance(claim, Claim)
                and claim.state in (OPENED, REDELIVER)
                # Otherwise its writer died before it was published.
                and (claim.state == REDELIVER or self.is_passed(head[0], claim))
            ]
            if open_ and not {f"r{r}" for r in range(self.readers)} <= dead:
                living = [r for r in range(self.readers) if f"r{r}" not in dead]
                if any(self.ways[r] in ("get", "take") for r in living):
                    return f"nobody took {open_[0]} of writer {w} of {head}"
            published = [number for _, _, number, p in end.notes[f"w{w}"] if p < head[0]]
            for p in published:
                if not (finished["got", w, p] or finished["done", w, p] or open_):
                    lost += 1
            got = [note for notes in end.notes.values() for note in notes if note[:2] == ("got", w)]
            if self.readers == 1 and got != sorted(got):
                return f"out of order: {got}"
        if lost > (1 if dead & {f"r{r}" for r in range(self.readers)} else 0):
            return f"{lost} messages are lost"
        return None


class Producer(Role):
    def __init__(self, queue: Queue, w: int, without: Iterable[str] = ()) -> None:
        super().__init__(f"w{w}", without, queue.counted)
        self.queue = queue
        self.w = w
        self.position = 0
        self.cells = list(range(queue.slots))
        self.spare = queue.slots

    def run(self) -> Process:
        for number in range(self.queue.messages):
            yield from self.put(number)
        if self.queue.closes:
            yield Store(("head", self.w), (self.position, True))
            yield from self.announce(everybody=True)

    def put(self, number: int) -> Steps:
        w = self.w
        yield Store(("cell", w, self.spare), (w, number))
        while (yield from self.awaits()):
            yield from self.sleep("writer")
        p = self.position
        i = p % self.queue.slots
        if self.queue.ordered:
            yield StoreBarrier()
        yield Store(("entry", w, i), self.spare)
        if self.queue.ordered:
            yield StoreBarrier()
        yield Store(("claim", w, i), Claim(p % self.queue.modulus, OPENED))
        yield Note(("put", w, number, p))
        yield from self.store_barrier("claim before head")
        self.spare, self.cells[i] = self.cells[i], self.spare
        self.position = p + 1
        yield Store(("head", w), (p + 1, False))
        if (number + 1) % self.queue.batch == 0:
            yield from self.announce()

    def awaits(self) -> Steps:
        """Pass over entries that readers have. Whether the next one is unread, or all are taken."""
        for n in range(self.position, self.position + self.queue.slots):
            claim = yield Load(("claim", self.w, n % self.queue.slots))
            yield from self.load_barrier("claim before stores")
            if claim.state == DONE or not self.has("busy entries are skipped"):
                self.position = n
                return False
            if claim.state == OPENED:
                return True
        return True

    def announce(self, *, everybody: bool = False) -> Steps:
        """Wake one reader that sleeps, of those that this writer has not rung yet."""
        yield from self.full_fence("announce fence")
        if self.queue.ordered and not (yield from self.some_sleep("r", self.queue.readers)):
            return
        for r in range(self.queue.readers):
            if (yield from self.wakes_living(f"r{r}")) and not everybody:
                return


class Consumer(Role):
    def __init__(self, queue: Queue, r: int, without: Iterable[str] = ()) -> None:
        super().__init__(f"r{r}", without, queue.counted)
        self.queue = queue
        self.r = r
        self.got = 0
        self.way = queue.ways[r]
        self.next = [0] * queue.writers
        self.closed = [False] * queue.writers
        self.behind: tuple[int, Claim] | None = None  # open again, or its reader has left it

    def run(self) -> Process:
        if self.way in ("second", "rest"):
            while not (yield Load("begun")):
                yield LoadBarrier()
                yield Wait()
            yield LoadBarrier()
        while self.way == "heir":
            if (yield from self.over()):
                return
            found = yield from self.look_everywhere()
            if found is not None:
                yield from self.work(found)
            else:
                yield from self.sleep("reader")
        if self.way == "limit":
            yield from self.sleep("reader")
            yield from self.give_up()
            return
        most = self.queue.most[self.r] if self.queue.most else -1
        while self.got != most:
            found = yield from self.look()
            if found is not None:
                yield from self.work(found)
                self.got += bool(self.queue.most)
                if self.way in ("one", "fail", "second", "hold", "return"):
                    return
            elif all(self.closed) and (yield from self.awaits()):
                return
            elif self.behind is None:
                yield from self.sleep("reader")

    def give_up(self) -> Steps:
        """End a wait without a message: who was rung for one passes the ring on."""
        yield from self.full_fence("awake fence")
        if self.has("a limit passes the ring on"):
            yield from self.pass_on()

    def look(self) -> Steps:
        """Claim a message: the next of a writer, or what was seen behind its head."""
        for w in range(self.queue.writers):
            gone = yield from self.gone(f"w{w}")
            head, closed = yield Load(("head", w))
            yield from self.load_barrier("head before claim")
            for n in range(max(self.next[w], head - self.queue.slots), head):
                self.next[w] = n + 1
                claim = yield Load(("claim", w, n % self.queue.slots))
                yield LoadBarrier()
                if claim.position == n % self.queue.modulus and claim.state == OPENED:
                    found = yield from self.claim(w, claim)
                    if found is not None:
                        return found
            self.closed[w] = closed or gone
        if self.behind is None:
            return None
        w, claim = self.behind
        self.behind = None
        now = yield Load(("claim", w, claim.position % self.queue.slots))
        yield LoadBarrier()
        if now != claim:
            return None
        return (yield from self.claim(w, claim))

    def over(self) -> Steps:
        """Whether the only message is done."""
        head, _ = yield Load(("head", 0))
        yield LoadBarrier()
        claim = yield Load(("claim", 0, 0))
        yield LoadBarrier()
        return head == 1 and claim.state == DONE

    def look_everywhere(self) -> Steps:
        """Claim a message, as the C header does before it sleeps: also what a silent one has."""
        head, _ = yield Load(("head", 0))
        yield LoadBarrier()
        while self.next[0] < head:
            position = self.next[0]
            self.next[0] += 1
            claim = yield Load(("claim", 0, position % self.queue.slots))
            yield LoadBarrier()
            if claim.position == position % self.queue.modulus and claim.state == OPENED:
                found = yield from self.claim(0, claim)
                if found is not None:
                    return found
        for i in range(self.queue.slots):
            claim = yield Load(("claim", 0, i))
            yield LoadBarrier()
            if self.is_published(head, claim) and (yield from self.free(claim)):
                found = yield from self.claim(0, claim)
                if found is not None:
                    return found
        return None

    def is_published(self, head: int, claim: Claim) -> bool:
        """Whether the head has passed a claim: that of a message that a reader has, or had, too.

        No writer passes over an open claim, so that its position tells. It passes over the others,
        for so long that positions wrap.
        """
        if claim.state != OPENED and self.has("what was taken is published"):
            return True
        return self.queue.is_passed(head, claim)

    def free(self, claim: Claim) -> Steps:
        """Whether a message waits, or who has it is silent or gone."""
        if claim.state in (OPENED, REDELIVER):
            return True
        if claim.state == TAKEN and claim.reader != self.name:
            return not (yield from self.works(claim.reader))
        if claim.state == ONCE and claim.reader != self.name:
            return (yield from self.gone(claim.reader))
        return False

    def claim(self, w: int, claim: Claim) -> Steps:
        place = ("claim", w, claim.position % self.queue.slots)
        if claim.state == ONCE:  # of a dead reader: lost
            yield CompareExchange(place, claim, Claim(claim.position, DONE))
            yield from self.wake(f"w{w}")
            return None
        state = ONCE if self.way in ("get", "one", "second", "rest") else TAKEN
        mine = Claim(claim.position, state, self.name)
        if self.has("claims are exchanged"):
            if (yield CompareExchange(place, claim, mine)) != claim:
                return None
        else:
            yield LoadBarrier()
            yield Store(place, mine)
        cell = yield Load(("entry", w, claim.position % self.queue.slots))
        yield LoadBarrier()
        yield from self.pass_on()
        return Found(w, mine, claim.state != OPENED, cell)

    def pass_on(self) -> Steps:
        """Wake another reader if there is more: writers may have rung this one for several."""
        if not self.has("a reader rings the next"):
            return
        for w in range(self.queue.writers):
            head, _ = yield Load(("head", w))
            yield LoadBarrier()
            for i in range(self.queue.slots):
                claim = yield Load(("claim", w, i))
                yield LoadBarrier()
                if self.is_published(head, claim) and claim.state in (OPENED, REDELIVER):
                    yield from self.wake_another()
                    return

    def wake_another(self) -> Steps:
        if self.queue.ordered and not (yield from self.some_sleep("r", self.queue.readers)):
            return
        for r in range(self.queue.readers):
            other = f"r{r}" != self.name or self.queue.ordered
            if other and (yield from self.wakes_living(f"r{r}")):
                return

    def let_begin(self) -> Steps:
        yield Store("begun", True)
        yield FullFence()
        yield Ring("r1")

    def hold(self, w: int) -> Steps:
        """Have a message until all were published."""
        yield from self.let_begin()
        head = 0
        while head < self.queue.messages:
            head, _ = yield Load(("head", w))
            yield LoadBarrier()

    def work(self, found: Found) -> Steps:
        w, mine, redelivered, cell = found
        place = ("claim", w, mine.position % self.queue.slots)
        payload = yield Load(("cell", w, cell))
        yield LoadBarrier()  # as the exchange is
        if mine.state == TAKEN and not redelivered and payload is not None:
            yield Note(("first", *payload))
        if self.way in ("hold", "return") and mine.position == 0:
            yield from self.hold(w)
        if self.way in ("fail", "return") and not redelivered:
            new = Claim(mine.position, REDELIVER)
            if self.way == "fail":
                yield from self.let_begin()
            again = (yield CompareExchange(place, mine, new)) == mine
            if again and self.has("who fails rings"):
                yield from self.wake_another()
            return
        done = (yield CompareExchange(place, mine, Claim(mine.position, DONE))) == mine
        if done:
            if payload is None or payload[0] != w:
                raise Fault(f"{self.name} got {payload} at {mine.position} of writer {w}")
            yield Note(("got" if mine.state == ONCE else "done", *payload))
            yield from self.wake(f"w{w}")
        elif mine.state == ONCE:
            raise Fault(f"{self.name}: {mine} was taken away")
        if self.queue.mortal or self.queue.silent:  # in place of the beat
            for r in range(self.queue.readers):
                if f"r{r}" != self.name:
                    yield Ring(f"r{r}")

    def awaits(self) -> Steps:
        for w in range(self.queue.writers):
            head, closed = yield Load(("head", w))
            yield LoadBarrier()
            if closed > self.closed[w]:
                return False
            for i in range(self.queue.slots):
                claim = yield Load(("claim", w, i))
                yield LoadBarrier()
                if self.is_published(head, claim) and (yield from self.free(claim)):
                    if self.queue.position(head, claim) < self.next[w]:
                        self.behind = (w, claim)
                    return False
            if not self.closed[w] and (yield from self.gone(f"w{w}")):
                return False
        return self.way != "heir" or not (yield from self.over())


ROLES = (sys.modules[__name__],)
_R0 = frozenset({"r0"})
POINTS = {
    "a limit passes the ring on": "time limit",
    "a reader rings the next": "one each",
    "announce fence": "one reader",
    "awake fence": "time limit",
    "busy entries are skipped": "one reader",
    "claim before head": "two at once",
    "claim before stores": "one reader",
    "claims are exchanged": "get",
    "head before claim": "one reader",
    "reader looks again": "one reader",
    "reader sleep fence": "one reader",
    "what was taken is published": "positions wrap",
    "who fails rings": "fail",
    "writer looks again": "one reader",
    "writer sleep fence": "one reader",
}
BY_DAY: dict[str, Queue] = {
    "one reader": Queue(readers=1, messages=3, ways=("get",)),
    "two at once": Queue(readers=1, ways=("get",), batch=2),
    "get": Queue(messages=1),
    "fail": Queue(ways=("fail", "second"), messages=1, closes=False),
    "time limit": Queue(ways=("limit", "one"), messages=1, closes=False, spurious=_R0),
    "a reader that acknowledges dies": Queue(ways=("take", "take"), messages=1, mortal=_R0),
    "a writer dies": Queue(messages=2, readers=1, ways=("get",), mortal=frozenset({"w0"})),
    "positions wrap": Queue(
        ways=("return", "rest"), messages=3, most=(1, 3), closes=False, modulus=4
    ),
}
BY_NIGHT: dict[str, Queue] = {
    "a reader dies": Queue(messages=1, mortal=_R0),
    "hold": Queue(ways=("hold", "one"), messages=3, closes=False),
    "get twice": Queue(),
    "take twice": Queue(ways=("take", "take")),
    "silent": Queue(ways=("take", "take"), messages=1, silent=_R0),
    "one each": Queue(writers=2, messages=1, ways=("one", "one"), slots=1, closes=False),
    "around": Queue(readers=1, messages=5, ways=("take",)),
    "a limit while one dies": Queue(ways=("limit", "take"), messages=1, mortal=_R0),
}
