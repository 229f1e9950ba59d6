"""Try every interleaving of a few processes on one memory, and every death and silence.

A case is the processes, the first words of memory, and what is checked at the end. A global state
is one flat tuple: the memory's words, who has been rung, what each place looks like, each
process's local state. All reachable states are visited once; of a visited state only its hash is
kept (64 bits: two of ten million states share one with a chance of 3 in a million).

Death: a mortal process may end at every step; any part of its buffer that the buffer's order allows
has become visible before (those are steps of their own), the rest never does.
Silence: a process that was stopped and comes back is one that is slow, which the interleavings
have anyway, and that *looks* silent, which is a word of memory that changes at any time. So
processes load `looks(name)`: ALIVE, SILENT or GONE (proof: only of the dead), or BACK, which is
alive again. Each change of it rings all sleepers: that is what the beat is for. Nothing else wakes
a process by itself, so that a lost ring shows as a deadlock.

Found are: faults that a process raises itself, ends that the check refuses, deadlocks, and states
from which no end can be reached (where only a death or the like leads on, there is a deadlock).
"""

from __future__ import annotations

import random
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NamedTuple

from model import automaton
from model.automaton import Assumptions, Automaton, Local, Words
from model.operations import Address, Process, Value

ALIVE: Final = "alive"
SILENT: Final = "silent"
BACK: Final = "alive again"
GONE: Final = "gone"

# What may happen, but need not: nothing may depend on it.
DIES: Final = "dies"
STOPS: Final = "stops and looks"
REMOVED: Final = "is removed by a user and looks"
MISFORTUNES: Final = (DIES, STOPS, REMOVED)

State = tuple[Any, ...]
Order = Literal["depth", "breadth"]


def looks(process: str) -> Address:
    """Return the address of what a process looks like to the others."""
    return ("looks", process)


@dataclass(frozen=True)
class End:
    """Where all processes have ended: what the memory holds, and what each one says."""

    memory: Mapping[Address, Value]
    results: Mapping[str, Any]  # of those that have ended, not died
    notes: Mapping[str, tuple[Any, ...]]


@dataclass(frozen=True)
class Case:
    """What is explored. `check` returns what is wrong at an end, or nothing."""

    processes: Mapping[str, Callable[[], Process]]
    memory: Mapping[Any, Value]
    check: Callable[[End], str | None]
    mortal: frozenset[str] = frozenset()  # one of these may die
    silent: frozenset[str] = frozenset()  # each of these may look silent once
    removed: frozenset[str] = frozenset()  # by a user, as if proven gone, at any time
    spurious: frozenset[str] = frozenset()  # whose Wait may return without a ring: a time limit


@dataclass
class Found:
    """The result: how many states there are, and the first fault with the schedule that leads to
    it."""

    states: int = 0
    steps: int = 0
    ends: int = 0
    locals: dict[str, int] = field(default_factory=dict)
    fault: str | None = None
    schedule: list[str] = field(default_factory=list)
    whole: bool = True  # all states were visited

    def __str__(self) -> str:
        locals_ = ", ".join(f"{name} {count}" for name, count in self.locals.items())
        counts = f"{self.states} states, {self.steps} steps, {self.ends} ends; local: {locals_}"
        if self.fault is None:
            return counts
        return "\n".join([self.fault, *self.schedule, counts])


class _Search:
    def __init__(self, case: Case, assumed: Assumptions) -> None:
        self.case = case
        self._names = list(case.processes)
        self._addresses, self._words = Words(), Words()
        memory = dict(case.memory)
        for name in self._names:
            if name in case.mortal | case.silent | case.removed:
                assumed.stored(looks(name))
            memory.setdefault(looks(name), ALIVE)
        words = tuple([self._words.number(memory[address]) for address in memory])
        for address in memory:
            self._addresses.number(address)
        assumed.refuted = False
        self._automata = [
            Automaton(name, make, self._addresses, self._words, assumed)
            for name, make in case.processes.items()
        ]
        self._size = len(words)
        self._rung = self._size  # where a state holds who was rung
        self._processes = self._rung + len(self._names)
        started = tuple([process.start(memory) for process in self._automata])
        self.first: State = (*words, *[0] * len(self._names), *started)

    def local_states(self) -> dict[str, int]:
        return {process.name: len(process) for process in self._automata}

    def next_states(self, state: State) -> Iterator[tuple[State, tuple[Any, ...]]]:
        """Yield each state that may follow, with what happened."""
        first = self._processes
        for index, name in enumerate(self._names):
            local: Local = state[first + index]
            for address, word, after in local.flushes():
                yield self._write(state, index, address, word, after), (name, "shows", address)
            kind = local.kind
            if kind == automaton.LOAD and local.own >= 0:
                yield self._become(state, index, local.give(local.own)), (name, "has", local.own)
            elif kind == automaton.LOAD:
                for word, after in local.older():
                    yield self._become(state, index, after), (name, "loads the older", word)
                word = state[local.address]
                yield self._become(state, index, local.give(word)), (name, "loads", word)
            elif kind == automaton.EXCHANGE:
                if not local.buffer:
                    word = state[local.address]
                    after = local.give(word)
                    if word == local.old:
                        new = self._write(state, index, local.address, local.new, after)
                        yield new, (name, "exchanges", local.new)
                    else:
                        yield self._become(state, index, after), (name, "fails to exchange", word)
            elif kind == automaton.RING:
                yield self._ring(state, index, local), (name, "rings", local.process)
            elif kind == automaton.WAIT:
                if state[self._rung + index]:
                    woken = list(self._become(state, index, local.give(self._nothing)))
                    woken[self._rung + index] = 0
                    yield tuple(woken), (name, "wakes", "")
                elif name in self.case.spurious:
                    after = local.give(self._nothing)
                    yield self._become(state, index, after), (name, "wakes by itself", "")
        if self.case.mortal or self.case.silent or self.case.removed:
            yield from self._environment(state)

    @property
    def _nothing(self) -> int:
        return self._words.number(None)

    def _become(self, state: State, index: int, after: Local) -> State:
        place = self._processes + index
        return (*state[:place], after, *state[place + 1 :])

    def _write(self, state: State, index: int, address: int, word: int, after: Local) -> State:
        new = list(state)
        old = state[address]
        new[address] = word
        first = self._processes
        new[first + index] = after
        for place in range(first, len(new)):
            other: Local = new[place]
            if place != first + index and old != word:
                new[place] = other.staled(address, old)
        return tuple(new)

    def _ring(self, state: State, index: int, local: Local) -> State:
        new = list(self._become(state, index, local.give(self._nothing)))
        target = self._names.index(local.process)
        if new[self._processes + target].kind not in (automaton.ENDED, automaton.DEAD):
            new[self._rung + target] = 1
        return tuple(new)

    def _environment(self, state: State) -> Iterator[tuple[State, tuple[Any, ...]]]:
        first = self._processes
        anybody = any(local.kind == automaton.DEAD for local in state[first:])
        for index, name in enumerate(self._names):
            local: Local = state[first + index]
            dead = local.kind == automaton.DEAD
            if name in self.case.mortal and not anybody and local.kind != automaton.FAILED:
                new = list(self._become(state, index, local.dead()))
                new[self._rung + index] = 0
                yield tuple(new), (name, DIES, "")
            seen = self._words.word(state[self._addresses.number(looks(name))])
            if seen == ALIVE and (dead or name in self.case.silent):
                how = "looks" if dead else STOPS
                yield self._look(state, name, SILENT), (name, how, SILENT)
            if seen == SILENT and not dead:
                yield self._look(state, name, BACK), (name, "looks", BACK)
            if seen != GONE and (dead or name in self.case.removed):
                how = "looks" if dead else REMOVED
                yield self._look(state, name, GONE), (name, how, GONE)

    def _look(self, state: State, name: str, how: str) -> State:
        new = list(state)
        new[self._addresses.number(looks(name))] = self._words.number(how)
        for index in range(len(self._names)):
            if new[self._processes + index].kind not in (automaton.ENDED, automaton.DEAD):
                new[self._rung + index] = 1
        return tuple(new)

    def step(self, before: State, step: tuple[Any, ...]) -> Step:
        """Return a step without its value, which follows from the steps before."""
        name, what, object_ = step
        if what == DIES:
            return Step(name, "dies", "")
        if what in ("looks", STOPS, REMOVED):
            return Step(name, {SILENT: "silent", GONE: "gone", BACK: "back"}[object_], "")
        local: Local = before[self._processes + self._names.index(name)]
        if what == "shows":
            waits = local.kind in (automaton.FENCE, automaton.EXCHANGE)
            others = len(local.flushes()) - 1
            return Step(name, what, self._addresses.word(object_), others, waits)
        if what in ("rings", "wakes"):
            return Step(name, what, object_)
        what = {"has": "loads", "loads the older": "older", "fails to exchange": "exchanges"}.get(
            what, what
        )
        return Step(name, what, self._addresses.word(local.address))

    def fault(self, state: State) -> str | None:
        """Return what is wrong in a state by itself."""
        for local in state[self._processes :]:
            if local.kind == automaton.FAILED:
                return f"{local.name}: {local.node.operation.text}"
        return None

    def ended(self, state: State) -> bool:
        """Whether no process will do anything more."""
        return all(
            local.kind in (automaton.ENDED, automaton.DEAD) and not local.buffer
            for local in state[self._processes :]
        )

    def refused(self, state: State) -> str | None:
        """Return what the case's check says of an end."""
        memory = {
            self._addresses.word(place): self._words.word(state[place])
            for place in range(self._size)
        }
        locals_ = state[self._processes :]
        results = {
            local.name: local.node.operation.result
            for local in locals_
            if local.kind == automaton.ENDED
        }
        return self.case.check(End(memory, results, {local.name: local.notes for local in locals_}))

    def stuck(self, state: State) -> str:
        """Return who sleeps in a state that nothing follows."""
        sleeps = [local.name for local in state[self._processes :] if local.kind == automaton.WAIT]
        return f"asleep for ever: {', '.join(sleeps)}"

    def describe(self, before: State, step: tuple[Any, ...]) -> str:
        """Return one line of a schedule."""
        name, what, object_ = step
        if what == "shows":
            local: Local = before[self._processes + self._names.index(name)]
            word = next(word for at, word, _ in local.flushes() if at == object_)
            address, value = self._addresses.word(object_), self._words.word(word)
            return f"{name}: {address} = {value} becomes visible"
        if what in ("has", "loads", "loads the older", "exchanges", "fails to exchange"):
            local = before[self._processes + self._names.index(name)]
            address, value = self._addresses.word(local.address), self._words.word(object_)
            return f"{name} {what} {address}: {value}"
        return f"{name} {what} {object_}".rstrip()


def explore(
    case: Case, *, order: Order = "depth", most: int = 100_000_000, live: bool = True
) -> Found:
    """Visit all states of a case, or those before the first fault.

    `order`: "breadth" finds the shortest schedule. `most`: stop after so many states. `live`:
    demand that an end can be reached from everywhere, not only that nothing is stuck.
    """
    assumed = Assumptions()
    while True:
        search = _Search(case, assumed)
        if assumed.refuted:
            continue
        found = _visit(search, assumed, order, most, live)
        if not assumed.refuted:
            found.locals = search.local_states()
            return found


def _visit(search: _Search, assumed: Assumptions, order: Order, most: int, live: bool) -> Found:
    found = Found()
    numbers = {hash(search.first): 0}
    parents = array("q", [-1])
    sources, targets, ends = array("q"), array("q"), array("q")
    todo = deque([search.first])
    take = todo.pop if order == "depth" else todo.popleft
    while todo:
        state = take()
        number = numbers[hash(state)]
        found.fault = search.fault(state)
        stuck = True
        if found.fault is None:
            for after, step in search.next_states(state):
                found.steps += 1
                certain = step[1] not in MISFORTUNES
                mark = hash(after)
                known = numbers.setdefault(mark, len(numbers))
                if known == len(parents):
                    parents.append(number)
                    todo.append(after)
                if certain:
                    stuck = False
                if live and certain:
                    sources.append(number)
                    targets.append(known)
            if search.ended(state):
                ends.append(number)
                found.ends += 1
                found.fault = search.refused(state)
            elif stuck:
                found.fault = search.stuck(state)
        found.states = len(numbers)
        if assumed.refuted:
            return found
        if found.fault is not None:
            found.whole = False
            found.schedule = _schedule(search, numbers, parents, number)
            return found
        if found.states > most:
            found.whole = False
            return found
    lost = _hopeless(len(numbers), sources, targets, ends) if live else None
    if lost is not None:
        found.fault = "no end can be reached from here"
        found.schedule = _schedule(search, numbers, parents, lost)
    return found


def _hopeless(count: int, sources: array[int], targets: array[int], ends: array[int]) -> int | None:
    """Return the first state from which no end can be reached."""
    before = array("q", [0]) * (count + 1)  # where the sources of each target begin
    for target in targets:
        before[target + 1] += 1
    for number in range(count):
        before[number + 1] += before[number]
    place = array("q", before)
    sorted_sources = array("q", sources)
    for source, target in zip(sources, targets, strict=True):
        sorted_sources[place[target]] = source
        place[target] += 1
    hopeful = bytearray(count)
    todo = list(ends)
    for number in todo:
        hopeful[number] = 1
    while todo:
        number = todo.pop()
        for source in sorted_sources[before[number] : before[number + 1]]:
            if not hopeful[source]:
                hopeful[source] = 1
                todo.append(source)
    return next((number for number in range(count) if not hopeful[number]), None)


def _schedule(
    search: _Search, numbers: Mapping[int, int], parents: array[int], number: int
) -> list[str]:
    """Return the steps that lead to a state, by doing them again."""
    path = [number]
    while parents[path[-1]] >= 0:
        path.append(parents[path[-1]])
    lines = []
    state = search.first
    for goal in reversed(path[:-1]):
        for after, step in search.next_states(state):
            if numbers.get(hash(after)) == goal:
                lines.append(search.describe(state, step))
                state = after
                break
        else:
            raise AssertionError("a step cannot be done again")
    return lines


class Step(NamedTuple):
    """What a process does.

    It "shows" a store, "loads" a word or what was there before ("older"), or "exchanges" it; or it
    "rings" a process, or "wakes". Or it "dies"; or it looks "silent", "gone", or "back".
    """

    process: str
    what: str
    address: Address  # or the process that it rings
    others: int = 0  # of a store: how many more may become visible in its place
    waits: bool = False  # of a store: the process waits until its stores are visible


def covering(case: Case) -> list[list[Step]]:
    """Return schedules from the beginning to an end that go along every edge of the state graph.

    The same case gives the same schedules.
    """
    assumed = Assumptions()
    while True:
        search = _Search(case, assumed)
        if not assumed.refuted:
            graph = _graph(search)
        if not assumed.refuted:
            return list(_cover(graph))


def by_chance(case: Case, count: int) -> list[list[Step]]:
    """Return so many schedules by chance, for a case that has too many states to go along all.

    As for `covering`, the same case gives the same schedules.
    """
    assumed = Assumptions()
    while True:
        search = _Search(case, assumed)
        chance = random.Random(count)  # noqa: S311 - no secret
        found: list[list[Step]] = []
        while len(found) < count and not assumed.refuted:
            found.append(_walk(search, chance))
        if not assumed.refuted:
            return found


def _walk(search: _Search, chance: random.Random) -> list[Step]:
    """Go to an end. Some schedules change between processes often, some seldom.

    A process that has stopped does nothing for a while; what others see of it comes later, too.
    """
    steps: list[Step] = []
    stopped, until = "", 0
    state = search.first
    turns = chance.choice((1, 2, 4, 16, 64))
    while not search.ended(state):
        following = list(search.next_states(state))
        certain = [each for each in following if each[1][1] not in MISFORTUNES]
        if chance.randrange(20):  # else most would end soon
            following = certain or following
        if len(steps) < until:
            others = [each for each in following if each[1][0] != stopped]
            following = others or following
        if steps and chance.randrange(turns):
            same = [each for each in following if each[1][0] == steps[-1].process]
            following = same or following
        after, step = chance.choice(following)
        steps.append(search.step(state, step))
        state = after
        if step[1] in MISFORTUNES:
            stopped, until = step[0], len(steps) + chance.choice((0, 50, 200))
    return steps


@dataclass
class _Graph:
    following: list[list[tuple[int, Step]]] = field(default_factory=list)  # of each state
    before: list[tuple[int, Step] | None] = field(default_factory=list)  # on the shortest way
    ends: list[int] = field(default_factory=list)


def _graph(search: _Search) -> _Graph:
    graph = _Graph([[]], [None])
    numbers = {search.first: 0}
    states = [search.first]
    for number, state in enumerate(states):
        for after, step in search.next_states(state):
            known = numbers.setdefault(after, len(states))
            taken = search.step(state, step)
            if known == len(states):
                states.append(after)
                graph.following.append([])
                graph.before.append((number, taken))
            graph.following[number].append((known, taken))
        if search.ended(state):
            graph.ends.append(number)
    return graph


_LONG: Final = 1000  # a schedule that goes along so many new edges takes the shortest way to an end


def _cover(graph: _Graph) -> Iterator[list[Step]]:
    leads = _ways_out(graph)
    fresh = [set(range(len(edges))) for edges in graph.following]
    for number in range(len(fresh)):
        while fresh[number]:
            steps: list[Step] = []
            place = number
            while (came := graph.before[place]) is not None:
                place = came[0]
                steps.append(came[1])
            steps.reverse()
            place, most = number, len(steps) + _LONG
            while graph.following[place]:
                edge = min(fresh[place] if len(steps) < most else (), default=leads[place])
                fresh[place].discard(edge)
                place, step = graph.following[place][edge]
                steps.append(step)
            yield steps


def _ways_out(graph: _Graph) -> list[int]:
    """Return, of each state, the edge that is on the shortest way to an end."""
    sources: list[list[tuple[int, int]]] = [[] for _ in graph.following]
    for number, edges in enumerate(graph.following):
        for edge, (after, _) in enumerate(edges):
            sources[after].append((number, edge))
    leads = [-1] * len(sources)
    todo = deque(graph.ends)
    seen = set(todo)
    while todo:
        for source, edge in sources[todo.popleft()]:
            if source not in seen:
                seen.add(source)
                leads[source] = edge
                todo.append(source)
    return leads


def holds(case: Case) -> Found:
    """Visit all states of a case that has no fault; otherwise raise with the shortest schedule."""
    found = explore(case)
    if found.fault is not None:
        raise AssertionError(str(explore(case, order="breadth")))
    return found
