"""Messages: each reader gets every message of every writer (DESIGN, section 4).

Knows: the rings of entries, stamps, cells, tails, joining and closing.
Does not know: how the area gives out slots (`places`).
Invariants: a writer publishes position p with the payload (writer, p, epoch) in each of two words,
so that a reader knows what it must find; two words that differ are a torn message.

Writers of one channel share nothing but the readers' rows, and a reader takes from each writer by
itself. So cases of one writer show a ring; cases of two show sleeping and waking, which is all that
writers do to the same word.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from model.explorer import GONE, SILENT, looks
from model.operations import (
    CompareExchange,
    Fault,
    Load,
    LoadBarrier,
    Process,
    Steps,
    Store,
    StoreBarrier,
)
from model.role import CLOSING, FREE, OPEN, Role, awake

BLOCK: Final = "block"
OVERWRITE: Final = "overwrite"


class Word(NamedTuple):
    value: int
    epoch: int
    closed: bool = False  # of a head: no more will come


class Owner(NamedTuple):
    place: str
    state: str
    epoch: int


@dataclass(frozen=True)
class Channel:
    writers: int
    readers: int
    slots: int
    loans: int = 1
    parts: int = 2  # words of a payload; two show a torn one
    counted: int = 1  # see Role
    tolerant: bool = (
        False  # a removed process that lives may still store payload: do not look at it
    )
    ordered: bool = False  # in the C header's order, with looks that it has and need not have

    @property
    def cells(self) -> int:
        return self.slots + self.loans

    def memory(
        self, writers: Mapping[str, int], readers: Mapping[str, str], joins: Collection[str] = ()
    ) -> dict[Hashable, Hashable]:
        """Return the first words. `writers`, `readers`: who has opened the slots in this order.

        A writer is given with its next position (the history before it is written), a reader with
        its policy. `joins`: the readers that have not opened theirs yet.
        """
        words: dict[Hashable, Hashable] = {"joins": 0}
        for w, (name, position) in enumerate(writers.items()):
            words["writer", w] = Owner(name, OPEN, 1)
            words["head", w] = Word(position, 1)
            for i in range(self.slots):
                p = position - self.slots + i
                words["stamp", w, p % self.slots] = Word(p, 1) if p >= 0 else Word(-1, 0)
                words["entry", w, p % self.slots] = p % self.slots
                for part in range(self.parts):
                    words["cell", w, p % self.slots, part] = (w, p, 1) if p >= 0 else None
            for c in range(self.slots, self.cells):
                for part in range(self.parts):
                    words["cell", w, c, part] = None
        for r, (name, policy) in enumerate(readers.items()):
            words["reader", r] = Owner(name, FREE if name in joins else OPEN, 1)
            words["policy", r] = (OVERWRITE, 0) if name in joins else (policy, 1)
            for w, position in enumerate(writers.values()):
                words["tail", r, w] = Word(position, 1)
        return words | awake(*writers, *readers, "next", "r1")


class Known(NamedTuple):
    """What a writer knows of a reader: whose row it is, and what must not be overwritten."""

    place: str
    epoch: int
    policy: str
    tail: int


class Writer(Role):
    """A writer that has opened slot `w`."""

    def __init__(
        self, channel: Channel, name: str, w: int, start: int = 0, without: Iterable[str] = ()
    ) -> None:
        super().__init__(name, without, channel.counted)
        self.channel = channel
        self.w = w
        self.epoch = 1
        self.position = start
        self.cells = list(range(channel.slots))  # of each entry
        self.free = list(range(channel.slots, channel.cells))
        self.closed = False
        self.joins = -1
        self.bound = start  # ordered: up to which readers are known to have room
        self.blocks: dict[int, int] = {}  # the epoch of each reader that blocks
        self.known: dict[int, Known] = {}

    def run(self, messages: int, *, opens: bool = False, closes: bool = False) -> Process:
        if opens and not (yield from self.open()):
            return None
        start = self.position
        for _ in range(messages):
            yield from self.publish()
        if closes:
            yield from self.close()
        return start

    def open(self) -> Steps:
        """Take the slot if it is free, or closed or gone and read by all. Whether it is ours."""
        w = self.w
        yield from self.reap()
        owner = yield Load(("writer", w))
        yield LoadBarrier()
        if owner.state != FREE:
            return False
        self.epoch = owner.epoch + 1
        own = Owner(self.name, OPEN, self.epoch)
        if (yield CompareExchange(("writer", w), owner, own)) != owner:
            return False
        if self.has("head again after opening"):  # what was published until then stays published
            self.position = yield from self.published()
        yield from self.adopt()
        yield from self.store_barrier("stamps before head")
        yield Store(("head", w), Word(self.position, self.epoch))
        return True

    def reap(self) -> Steps:
        """Free the slot if its owner closed or is gone, and all have read what it published."""
        owner = yield Load(("writer", self.w))
        yield LoadBarrier()
        if owner.state == FREE or (owner.state == OPEN and not (yield from self.gone(owner.place))):
            return
        if (yield from self.drained()):
            yield CompareExchange(("writer", self.w), owner, owner._replace(state=FREE))

    def published(self) -> Steps:
        head = yield Load(("head", self.w))
        yield LoadBarrier()
        return head.value

    def adopt(self) -> Steps:
        """Take over the former owner's messages, with their cells, for readers that come late."""
        slots = self.channel.slots
        self.cells = [-1] * slots
        self.free = list(reversed(range(self.channel.cells)))  # the worst order: used ones first
        for i in range(slots):
            p = self.position - 1 - (self.position - 1 - i) % slots
            stamp = yield Load(("stamp", self.w, i))
            cell = yield Load(("entry", self.w, i))
            yield LoadBarrier()
            if p < 0 or stamp.value != p or cell not in self.free:
                yield Store(("stamp", self.w, i), Word(p + slots, self.epoch))
                continue
            if self.has("cells stay"):
                self.free.remove(cell)
                self.cells[i] = cell
            if self.has("stamps are taken over"):
                yield Store(("stamp", self.w, i), Word(p, self.epoch))

    def restore(self) -> Steps:
        """What each beat does: a late store of a former owner hides this word."""
        yield Store(("head", self.w), Word(self.position, self.epoch, self.closed))
        yield from self.announce()

    def drained(self) -> Steps:
        """Whether no reader that is at work has something left of the former owner."""
        self.position = yield from self.published()  # what it knows until it looks again
        for r in range(self.channel.readers):
            if not (yield from self.read_by(r, self.position)):
                return False
        return True

    def read_by(self, r: int, head: int) -> Steps:
        reader = yield Load(("reader", r))
        tail = yield Load(("tail", r, self.w))
        yield from self.load_barrier("tail before stores")
        if reader.state == FREE or (tail.epoch == reader.epoch and tail.value == head):
            return True
        return not (yield from self.works(reader.place))

    def publish(self) -> Steps:
        w, p, slots = self.w, self.position, self.channel.slots
        cell = self.free.pop(0)
        for part in range(self.channel.parts):
            yield Store(("cell", w, cell, part), (w, p, self.epoch))
        while (yield from self.full()):
            yield from self.sleep("writer")
        yield Store(("stamp", w, p % slots), Word(p, self.epoch))
        yield from self.store_barrier("stamp before entry")
        yield Store(("entry", w, p % slots), cell)
        yield from self.store_barrier("entry before head")
        if self.cells[p % slots] >= 0:
            self.free.append(self.cells[p % slots])
        self.cells[p % slots] = cell
        self.position = p + 1
        yield Store(("head", w), Word(p + 1, self.epoch))
        yield from self.announce()

    def announce(self) -> Steps:
        """Make the head visible, and wake who sleeps: also readers that have just joined."""
        yield from self.full_fence("announce fence")
        if self.channel.ordered:
            if (yield from self.some_sleep("r", self.channel.readers)):
                for r in range(self.channel.readers):
                    yield from self.wake(f"r{r}")
            return
        for r in range(self.channel.readers):
            owner = yield Load(("reader", r))
            yield LoadBarrier()
            if owner.state != FREE:
                yield from self.wake(owner.place)

    def full(self) -> Steps:
        """Whether a reader that is waited for has not read what the next message overwrites."""
        if self.channel.ordered:
            return (yield from self.look())
        joins = yield Load("joins")
        yield from self.load_barrier("joins before rows")
        if joins != self.joins:
            self.joins = joins
            for r in range(self.channel.readers):
                yield from self.meet(r)
        for r in range(self.channel.readers):
            if r in self.known and (yield from self.waits_for(r)):
                return True
        return False

    awaits = full

    def look(self) -> Steps:
        """The same, as the C header looks: at all readers, when it knows of no room any more."""
        if self.position != self.bound:
            joins = yield Load("joins")
            yield LoadBarrier()
            if joins == self.joins:
                return False
        self.joins = yield Load("joins")
        yield LoadBarrier()
        slots = self.channel.slots
        self.bound = self.position + 99
        for r in range(self.channel.readers):
            owner = yield Load(("reader", r))
            yield LoadBarrier()
            if owner.state == FREE:
                continue
            how = yield Load(looks(owner.place))
            yield LoadBarrier()
            if how == GONE:
                continue
            policy, epoch = yield Load(("policy", r))
            yield LoadBarrier()
            if epoch == owner.epoch:
                self.blocks[r] = epoch if policy == BLOCK else 0
            if self.blocks.get(r) != owner.epoch:
                continue
            tail = yield Load(("tail", r, self.w))
            yield LoadBarrier()
            room = slots - (self.position - tail.value) if tail.epoch == owner.epoch else 0
            if room <= 0 and how != SILENT:
                self.bound = self.position
                return True
            self.bound = min(self.bound, self.position + max(room, 1))
        return False

    def meet(self, r: int) -> Steps:
        """Learn whose row it is; of a new reader hold what it may still find."""
        owner = yield Load(("reader", r))
        policy, epoch = yield Load(("policy", r))
        yield from self.load_barrier("tail before stores")
        if owner.state == FREE or (epoch != owner.epoch and self.has("policy's epoch")):
            self.known.pop(r, None)  # who is about to join counts one more when it has
        elif r not in self.known or self.known[r].epoch != owner.epoch:
            hold = self.position - self.channel.slots if self.has("hold for who joins") else -99
            self.known[r] = Known(owner.place, owner.epoch, policy, hold)

    def waits_for(self, r: int) -> Steps:
        known = self.known[r]
        if known.policy != BLOCK or self.position - known.tail < self.channel.slots:
            return False
        tail = yield Load(("tail", r, self.w))
        owner = yield Load(("reader", r))
        yield from self.load_barrier("tail before stores")
        if owner.epoch != known.epoch or owner.state == FREE:
            del self.known[r]
            return False
        if tail.epoch == known.epoch or not self.has("tail's epoch"):
            known = self.known[r] = known._replace(tail=max(known.tail, tail.value))
        if self.position - known.tail != self.channel.slots:
            return False  # farther behind is who was silent and has lost it anyway
        return (yield from self.works(known.place))

    def close(self) -> Steps:
        self.closed = True
        yield from self.restore()
        own = Owner(self.name, OPEN, self.epoch)
        yield CompareExchange(("writer", self.w), own, own._replace(state=CLOSING))


def entry_at(w: int, i: int, position: int) -> Steps:
    """Return the cell of a message, if its stamp says so before and behind that look, or -1."""
    first = yield Load(("stamp", w, i))
    yield LoadBarrier()
    if first.value != position:
        return -1
    cell = yield Load(("entry", w, i))
    yield LoadBarrier()
    second = yield Load(("stamp", w, i))
    yield LoadBarrier()
    return cell if second == first else -1


class Read(NamedTuple):
    """What a reader says at its end."""

    lost: int
    missing: int
    next: tuple[int, ...]


class Reader(Role):
    """A reader that has opened slot `r`."""

    epoch_counts = True  # a former owner's message is none of the present one's

    def __init__(
        self,
        channel: Channel,
        name: str,
        r: int,
        policy: str = BLOCK,
        start: int = 0,
        without: Iterable[str] = (),
    ) -> None:
        super().__init__(name, without, channel.counted)
        self.channel = channel
        self.r = r
        self.policy = policy
        self.epoch = 1
        self.next = [start] * channel.writers
        self.epochs = [1] * channel.writers
        self.first = [start] * channel.writers  # what came before is history: no loss if it is gone
        self.closed = [False] * channel.writers
        self.lost = 0
        self.missing = 0  # of the history
        self.got = 0
        self.heads = [start] * channel.writers  # ordered: as it was seen last
        self.turn = 0
        self.asks = False

    def run(
        self, last: int = -1, *, joins: bool = False, history: int = 0, most: int = -1
    ) -> Process:
        """Read until each writer has closed or is gone, or until a position is reached with each.

        `most`: leave after so many messages.
        """
        if joins and not (yield from self.join(history)):
            return None
        while not all(self.closed) and self.got != most:
            some = False
            for w in range(self.channel.writers):
                if not self.closed[w]:
                    some = (yield from self.take(w)) or some
                    self.closed[w] = self.closed[w] or self.next[w] == last
            if not some and not all(self.closed):
                yield from self.sleep("reader")
                if self.channel.tolerant:  # a beat has come
                    for w in range(self.channel.writers):
                        yield from self.read_until(w)
        if last < 0:
            yield from self.leave()
        return Read(self.lost, self.missing, tuple(self.next))

    def run_ordered(self, last: int, *, asks: bool) -> Process:
        """Read as the C header does, until a position is reached with each writer.

        `asks`: or until the only writer is gone.
        """
        self.asks = asks
        gone = False
        while self.next != [last] * self.channel.writers:
            if asks:
                gone = yield from self.gone("w0")
            if (yield from self.take_next()):
                continue
            if gone:
                break
            yield from self.settle()
            yield from self.sleep("reader")
        return Read(self.lost, self.missing, tuple(self.next))

    def take_next(self) -> Steps:
        """Take a message of any writer, in turn. The head is loaded when all that is known is read.

        It is for readers that block: they lose nothing.
        """
        for _ in range(self.channel.writers):
            w = self.turn
            self.turn = (w + 1) % self.channel.writers
            n = self.next[w]
            if self.heads[w] == n:
                head = yield Load(("head", w))
                yield LoadBarrier()
                if head.value == n:
                    continue
                yield Load(("writer", w))  # whose head it is
                yield LoadBarrier()
                self.heads[w] = head.value
            if not (yield from self.copy(w, n)):
                raise Fault(f"message {n} of writer {w} was overwritten")
            self.next[w] = n + 1
            yield from self.read_until(w)
            return True
        return False

    def settle(self) -> Steps:
        """Free the slots of writers that are gone, if everything was read."""
        for w in range(self.channel.writers):
            owner = yield Load(("writer", w))
            yield LoadBarrier()
            if owner.state == FREE or not (yield from self.gone(owner.place)):
                continue
            head = yield Load(("head", w))
            yield LoadBarrier()
            if head.value == self.next[w]:
                yield CompareExchange(("writer", w), owner, owner._replace(state=FREE))

    def join(self, history: int) -> Steps:
        r = self.r
        owner = yield Load(("reader", r))
        yield LoadBarrier()
        if owner.state != FREE and not (yield from self.gone(owner.place)):
            return False
        self.epoch = owner.epoch + 1
        own = Owner(self.name, OPEN, self.epoch)
        if (yield CompareExchange(("reader", r), owner, own)) != owner:
            return False
        yield Store(("policy", r), (self.policy, self.epoch))
        if self.has("joins are counted"):
            yield from self.count_join()
        for w in range(self.channel.writers):
            head = yield Load(("head", w))
            # A writer that has not seen the join yet is overwriting head - slots.
            margin = self.channel.slots - (1 if self.has("margin of one") else 0)
            self.first[w] = head.value
            self.epochs[w] = head.epoch
            self.next[w] = max(0, head.value - min(history, margin))
        yield LoadBarrier()
        for w in range(self.channel.writers):
            yield from self.read_until(w)
        return True

    def count_join(self) -> Steps:
        for _ in range(self.channel.readers):
            joins = yield Load("joins")
            yield LoadBarrier()
            if (yield CompareExchange("joins", joins, joins + 1)) == joins:
                return
        raise Fault("more joins at once than readers")

    def leave(self) -> Steps:
        own = Owner(self.name, OPEN, self.epoch)
        yield CompareExchange(("reader", self.r), own, own._replace(state=FREE))
        if self.policy == BLOCK and self.has("who leaves wakes"):
            for w in range(self.channel.writers):
                owner = yield Load(("writer", w))
                yield from self.wake(owner.place)

    def take(self, w: int) -> Steps:
        """Take one message of a writer. Return whether there was anything to do."""
        head = yield Load(("head", w))
        yield from self.load_barrier("head before entry")
        owner = yield Load(("writer", w))
        yield LoadBarrier()
        if head.epoch != owner.epoch and self.has("head's epoch"):
            return False  # a late store of a former owner: no news
        self.epochs[w] = head.epoch
        n = self.next[w]
        if head.value == n:
            self.closed[w] = head.closed or (yield from self.left(w, owner.place))
            return False
        if head.value - n > self.channel.slots:
            self.lose(w, head.value - n - self.channel.slots)
        elif not (yield from self.copy(w, n)):
            self.lose(w, 1)
        else:
            self.next[w] = n + 1
            self.got += 1
        yield from self.read_until(w)
        return True

    def left(self, w: int, place: str) -> Steps:
        """Whether the writer is gone, and everything that it published was read."""
        if not (yield from self.gone(place)):
            return False
        if self.has("head again after gone"):  # it may have published one more, and died
            head = yield Load(("head", w))
            yield LoadBarrier()
            return head.value == self.next[w]
        return True

    def lose(self, w: int, count: int) -> None:
        lost = max(0, self.next[w] + count - max(self.next[w], self.first[w]))
        self.lost += lost
        self.missing += count - lost
        self.next[w] += count

    def copy(self, w: int, n: int) -> Steps:
        """Read message n of a writer. Return whether it was whole."""
        i = n % self.channel.slots
        if self.channel.ordered:
            cell = yield from entry_at(w, i, n)
            if cell < 0:
                return False
        else:
            cell = yield Load(("entry", w, i))
        payload: tuple[Any, ...] = ()
        for part in range(self.channel.parts):
            word = yield Load(("cell", w, cell, part))
            payload += (word,)
        yield from self.load_barrier("payload before stamp")
        stamp = yield Load(("stamp", w, i))
        yield from self.load_barrier("payload before tail")
        if stamp.value < n:
            raise Fault(f"the head of writer {w} announced {n} before its stamp")
        if stamp.value != n and self.has("stamp is looked at"):
            return False
        if stamp.epoch != self.epochs[w] and self.epoch_counts:
            owner = yield Load(("writer", w))  # a new owner is just taking the messages over
            yield LoadBarrier()
            if stamp.epoch != owner.epoch or not self.has("epoch of either"):
                return False
        if not self.channel.tolerant and not self.right(w, n, payload):
            raise Fault(f"reader {self.r} got {payload} instead of {n} of writer {w}")
        return True

    def right(self, w: int, n: int, payload: tuple[Any, ...]) -> bool:
        first: tuple[int, int, int] | None = payload[0]  # None: nothing was stored there yet
        whole = payload == (first,) * self.channel.parts
        return first is not None and first[:2] == (w, n) and whole

    def read_until(self, w: int) -> Steps:
        """Say how far this reader has read, and wake the writer if it waits for that."""
        if self.channel.ordered:
            yield StoreBarrier()
        yield Store(("tail", self.r, w), Word(self.next[w], self.epoch))
        if self.policy == BLOCK:
            yield from self.full_fence("tail fence")
            if self.channel.ordered:
                if (yield from self.some_sleep("w", self.channel.writers)):
                    for i in range(self.channel.writers):
                        yield from self.wake(f"w{i}")
                return
            owner = yield Load(("writer", w))
            yield from self.wake(owner.place)

    def awaits(self) -> Steps:
        if self.channel.ordered:
            for w in range(self.channel.writers):
                head = yield Load(("head", w))
                yield LoadBarrier()
                if head.value != self.next[w]:
                    return False
            return not self.asks or not (yield from self.gone("w0"))
        for w in range(self.channel.writers):
            if not self.closed[w]:
                head = yield Load(("head", w))
                owner = yield Load(("writer", w))
                if (head.value != self.next[w] or head.closed) and head.epoch == owner.epoch:
                    return False
                if (yield from self.gone(owner.place)):
                    return False
        return True
