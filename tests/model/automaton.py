"""One process of the model as an automaton, made lazily out of a generator.

A generator cannot be copied, but it is deterministic: where it stands and what its variables hold
follows from the values that it was given. So equal positions with equal variables are one node,
and a node's successor for a value is computed once, by running a generator there: the one that
stands there already, or a new one that is given the node's history again.

Knows: nodes, the store buffer, which loads may see old values.
Does not know: the memory, other processes.
Invariants: a `Local` is at rest: what it does next concerns other processes. What concerns nobody
else (putting a store into the buffer, a barrier, a note) was done on the way, because no other
process can tell when. Local states are interned: equal ones are the same object.

Stores: a buffer that keeps the order of each address, and the order that barriers demand, and no
other (as write combining and arm64 do).
Loads: since its last barrier, a process may see a value that was current at any time since then
(as arm64 does), but of one address never an older one than before. The first load behind a barrier
need not: that is as if it had been done earlier. A store behind a load with no load barrier in
between is a fault: it could become visible before the load was done.
"""

from __future__ import annotations

import dis
import gc
from collections.abc import Callable
from functools import cache
from itertools import count
from types import CodeType, FunctionType
from typing import Any, Final, NamedTuple

from model.operations import (
    Address,
    CompareExchange,
    Fault,
    FullFence,
    Load,
    LoadBarrier,
    Note,
    Operation,
    Process,
    Ring,
    Store,
    StoreBarrier,
    Value,
    Wait,
)

LOAD, FENCE, EXCHANGE, RING, WAIT, ENDED, FAILED, DEAD = range(8)

BARRIER: Final = (-1, -1)  # in a buffer, among pairs of address and value
Buffer = tuple[tuple[int, int], ...]


class Window(NamedTuple):
    """What may still be read since the last barrier of this process."""

    begins: Any = None  # where the barrier stands in the program
    loaded: bool = False  # a load was done since
    old: tuple[tuple[int, tuple[int, ...]], ...] = ()  # of each address, the oldest first

    def without(self, address: int) -> Window:
        if not any(address == at for at, _ in self.old):
            return self
        return self._replace(old=tuple([kept for kept in self.old if kept[0] != address]))

    def replaced(self, address: int, values: tuple[int, ...]) -> Window:
        return self._replace(old=tuple(sorted((*self.without(address).old, (address, values)))))


class Ended(NamedTuple):
    """In place of an operation: the process has returned."""

    result: Any


class Failed(NamedTuple):
    """In place of an operation: the process has found a fault."""

    text: str


class Assumptions:
    """What is supposed of a case until it shows otherwise; then the search begins again.

    That no process stores to an address: then its loads concern nobody else. And that after a
    certain barrier of its program a process loads an address as the first one, or not at all: then
    its old values do not matter.
    """

    def __init__(self) -> None:
        self._variable: set[Address] = set()
        self._overtaken: set[tuple[Any, int]] = set()
        self.refuted = False

    def constant(self, address: Address) -> bool:
        return address not in self._variable

    def stored(self, address: Address) -> None:
        if address not in self._variable:
            self._variable.add(address)
            self.refuted = True

    def overtakes(self, begins: Any, address: int) -> bool:
        return (begins, address) in self._overtaken

    def overtaken(self, begins: Any, address: int) -> None:
        if (begins, address) not in self._overtaken:
            self._overtaken.add((begins, address))
            self.refuted = True


class Words:
    """Small integers for addresses and values, which make states quick to compare."""

    def __init__(self) -> None:
        self._numbers: dict[Any, int] = {}
        self._words: list[Any] = []

    def number(self, word: Any) -> int:
        number = self._numbers.setdefault((type(word), word), len(self._words))
        if number == len(self._words):
            self._words.append(word)
        return number

    def word(self, number: int) -> Any:
        return self._words[number]

    def __len__(self) -> int:
        return len(self._words)


def freeze(value: Any, seen: dict[int, int]) -> Any:
    """Return what can be compared and hashed in place of a variable's value."""
    if value is None or isinstance(value, (int, str, frozenset, FunctionType, type)):
        return value
    if isinstance(value, tuple):
        return tuple([freeze(part, seen) for part in value])
    if isinstance(value, range):
        return value
    if id(value) in seen:  # `self` in each frame
        return ("again", seen[id(value)])
    seen[id(value)] = len(seen)
    if isinstance(value, list):
        return ("list", *[freeze(part, seen) for part in value])
    if isinstance(value, (set, dict)):
        parts = value.items() if isinstance(value, dict) else value
        return (type(value), tuple(sorted((freeze(part, seen) for part in parts), key=repr)))
    return (type(value), tuple([freeze(part, seen) for part in vars(value).values()]))


def position(process: Process) -> Any:
    """Return where a suspended generator stands, and what it will still look at.

    Models loop over ranges only: other iterators are not seen here.
    """
    frames: list[Any] = []
    seen: dict[int, int] = {}
    part: Any = process
    while part is not None:
        frame = part.gi_frame
        names = live(frame.f_code, frame.f_lasti)
        values = [freeze(frame.f_locals[name], seen) for name in names if name in frame.f_locals]
        loops = [freeze(turns.__reduce__()[1:], seen) for turns in iterators(part)]
        frames.append((frame.f_code, frame.f_lasti, (*values, *loops)))
        part = part.gi_yieldfrom
    return tuple(frames)


def iterators(process: Any) -> list[Any]:
    """Return what the loops of a suspended generator have left: it is in no variable."""
    referents = gc.get_referents(process, process.gi_frame)
    return [each for each in referents if type(each) is type(iter(range(0)))]


@cache
def live(code: CodeType, position: int) -> tuple[str, ...]:
    """Return the variables whose values matter after an instruction, which is what keeps states
    few.

    What cannot be told counts as needed. Models have no try and no with, hence no other ways.
    """
    instructions = list(dis.get_instructions(code))
    places = {instruction.offset: place for place, instruction in enumerate(instructions)}
    needed: list[frozenset[str]] = [frozenset()] * len(instructions)
    changed = True
    while changed:
        changed = False
        for place in reversed(range(len(instructions))):
            instruction = instructions[place]
            names: set[str] = set()
            if instruction.opcode in _JUMPS:
                names |= needed[places[instruction.argval]]
            if not instruction.opname.startswith(_LEAVES) and place + 1 < len(instructions):
                names |= needed[place + 1]
            if instruction.opname == "STORE_FAST":
                names.discard(instruction.argval)
            else:
                names |= _names(instruction)
            if names != needed[place]:
                needed[place] = frozenset(names)
                changed = True
    always = {*code.co_cellvars, *code.co_freevars}
    return tuple(sorted(needed[places[position]] | always))


def _names(instruction: dis.Instruction) -> set[str]:
    """Return the local variables of an instruction: one, two in newer Pythons, or none."""
    if "_FAST" not in instruction.opname:
        return set()
    names = instruction.argval
    return {names} if isinstance(names, str) else set(names)


_JUMPS: Final = frozenset(dis.hasjrel) | frozenset(dis.hasjabs)
_LEAVES: Final = ("JUMP_FORWARD", "JUMP_ABSOLUTE", "JUMP_BACKWARD", "RETURN", "RAISE", "RERAISE")


class Node:
    """A generator's state: the operation that it asks for, and what it does for each answer."""

    __slots__ = ("_before", "_following", "_given", "_here", "_owner", "_place", "operation")

    def __init__(self, owner: Automaton, before: Node | None, given: Value) -> None:
        self._owner = owner
        self._before = before
        self._given = given
        self._here: Process | None = None
        self._following: dict[Value, Node] = {}
        self._place: Any = None
        self.operation: Operation | Ended | Failed

    def window(self) -> Window:
        """Return what may be read after this node's barrier."""
        return Window((self._owner.name, self._place))

    def give(self, value: Value) -> Node:
        """Return the node after the operation's answer."""
        following = self._following.get(value)
        if following is None:
            process = self._here or self._again()
            self._here = None
            following = self._following[value] = self._owner.run(process, self, value)
        return following

    def stands(self, process: Process, place: Any) -> None:
        self._here, self._place = process, place

    def _again(self) -> Process:
        history = []
        node = self
        while node._before is not None:
            history.append(node._given)
            node = node._before
        process = self._owner.make()
        next(process)
        for value in reversed(history):
            process.send(value)
        return process


class Local:
    """A process at rest: its node, the stores that nobody sees yet, and what it may still read."""

    __slots__ = (
        "_flushes",
        "_given",
        "_older",
        "_owner",
        "_staled",
        "address",
        "buffer",
        "kind",
        "name",
        "new",
        "node",
        "notes",
        "old",
        "own",
        "process",
        "window",
    )

    def __init__(
        self, owner: Automaton, node: Node, buffer: Buffer, window: Window, notes: Any
    ) -> None:
        self._owner = owner
        self.name = owner.name
        self.node = node
        self.buffer = buffer
        self.window = window
        self.notes = notes
        self._given: dict[int, Local] = {}
        self._flushes: list[tuple[int, int, Local]] | None = None
        self._older: list[tuple[int, Local]] | None = None
        self._staled: dict[tuple[int, int], Local] = {}
        self.address = self.old = self.new = self.own = -1
        self.process = ""
        number = owner.words.number
        operation = node.operation
        if isinstance(operation, Load):
            self.kind, self.address = LOAD, owner.addresses.number(operation.address)
            own = [value for address, value in buffer if address == self.address]
            self.own = own[-1] if own else -1
            if window.loaded:
                owner.assumed.overtaken(window.begins, self.address)
        elif isinstance(operation, CompareExchange):
            self.kind, self.address = EXCHANGE, owner.addresses.number(operation.address)
            self.old, self.new = number(operation.old), number(operation.new)
        elif isinstance(operation, Ring):
            self.kind, self.process = RING, operation.process
        elif isinstance(operation, (Ended, Failed)):
            self.kind = ENDED if isinstance(operation, Ended) else FAILED
        else:
            self.kind = WAIT if isinstance(operation, Wait) else FENCE

    def give(self, value: int) -> Local:
        """Return the state after the operation was answered (a load: with the current value)."""
        after = self._given.get(value)
        if after is None:
            window = self.window
            if self.kind == LOAD:
                window = window.without(self.address)._replace(loaded=True)
            elif self.kind == EXCHANGE:
                window = self.node.window()
            after = self._given[value] = self._owner.settle(
                self.node.give(self._owner.words.word(value)), self.buffer, window, self.notes
            )
        return after

    def older(self) -> list[tuple[int, Local]]:
        """Return the states after the load has seen a value that is no longer current."""
        if self._older is None:
            self._older = []
            values = dict(self.window.old).get(self.address, ()) if self.window.loaded else ()
            for place, value in enumerate(values):
                window = self.window.replaced(self.address, values[place:])
                after = self.node.give(self._owner.words.word(value))
                local = self._owner.settle(after, self.buffer, window, self.notes)
                self._older.append((value, local))
        return self._older

    def flushes(self) -> list[tuple[int, int, Local]]:
        """Return each store that may become visible next, with the state after that."""
        if self._flushes is None:
            self._flushes = []
            passed = set()
            for place, (address, value) in enumerate(self.buffer):
                if address < 0:
                    break
                if address not in passed:
                    passed.add(address)
                    rest = self.buffer[:place] + self.buffer[place + 1 :]
                    if rest and rest[0] == BARRIER:
                        rest = rest[1:]
                    window = self.window.without(address)
                    after = self._owner.settle(self.node, rest, window, self.notes)
                    self._flushes.append((address, value, after))
        return self._flushes

    def staled(self, address: int, old: int) -> Local:
        """Return the state after another process has replaced a value, which is still readable."""
        after = self._staled.get((address, old))
        if after is None:
            after = self
            if self._owner.assumed.overtakes(self.window.begins, address):
                values = dict(self.window.old).get(address, ())
                values = (*[value for value in values if value != old], old)
                window = self.window.replaced(address, values)
                after = self._owner.local(self.node, self.buffer, window, self.notes)
            self._staled[address, old] = after
        return after

    def dead(self) -> Local:
        """Return the state of the process after its death here; what nobody saw is lost."""
        return self._owner.dead(self.notes)


class Automaton:
    """All states of one process that were reached so far."""

    def __init__(
        self,
        name: str,
        make: Callable[[], Process],
        addresses: Words,
        words: Words,
        assumed: Assumptions,
    ) -> None:
        self.name = name
        self.make = make
        self.addresses = addresses
        self.words = words
        self.assumed = assumed
        self._initial: dict[Address, Value] = {}
        self._nodes: dict[Any, Node] = {}
        self._locals: dict[Any, Local] = {}

    def start(self, initial: dict[Address, Value]) -> Local:
        """Return the first state. `initial`: the words of memory, for those that never change."""
        self._initial = initial
        return self.settle(self.run(self.make(), None, None), (), Window((self.name,)), ())

    def run(self, process: Process, before: Node | None, value: Value) -> Node:
        """Give a generator an answer and return the node that it comes to."""
        node = Node(self, before, value)
        key: Any
        try:
            node.operation = process.send(value)
        except StopIteration as end:
            node.operation = key = Ended(end.value)
        except Fault as fault:
            node.operation = key = Failed(str(fault))
        else:
            frames = position(process)
            key = (node.operation, frames)  # its operands need not live on in variables
        known = self._nodes.setdefault(key, node)
        if known is node and not isinstance(node.operation, (Ended, Failed)):
            node.stands(process, tuple([frame[:2] for frame in frames]))
        return known

    def settle(self, node: Node, buffer: Buffer, window: Window, notes: Any) -> Local:
        """Do what concerns nobody else, and return where the process is at rest then."""
        for turn in count():
            operation = node.operation
            answer: Value = None
            if isinstance(operation, Store):
                if window.loaded:
                    text = f"the store to {operation.address} may overtake loads before it"
                    return self.local(self.failed(text), (), Window(), notes)
                self.assumed.stored(operation.address)
                word = self.words.number(operation.value)
                buffer += ((self.addresses.number(operation.address), word),)
            elif isinstance(operation, StoreBarrier):
                if buffer and buffer[-1] != BARRIER:
                    buffer += (BARRIER,)
            elif isinstance(operation, LoadBarrier):
                window = node.window()
            elif isinstance(operation, Note):
                notes += (operation.what,)
            elif isinstance(operation, FullFence) and not buffer:
                window = node.window()
            elif isinstance(operation, Load) and self.assumed.constant(operation.address):
                answer = self._initial[operation.address]
                if turn > 1000:  # it spins until the address changes
                    self.assumed.stored(operation.address)
            else:
                return self.local(node, buffer, window, notes)
            node = node.give(answer)
        raise AssertionError

    def local(self, node: Node, buffer: Buffer, window: Window, notes: Any) -> Local:
        if isinstance(node.operation, (Ended, Failed)):
            window = Window()
        if isinstance(node.operation, CompareExchange):
            self.assumed.stored(node.operation.address)
        key = (node, buffer, window, notes)
        local = self._locals.get(key)
        if local is None:
            local = self._locals[key] = Local(self, *key)
        return local

    def failed(self, text: str) -> Node:
        node = Node(self, None, None)
        node.operation = Failed(text)
        return self._nodes.setdefault(node.operation, node)

    def dead(self, notes: Any) -> Local:
        node = Node(self, None, None)
        node.operation = Ended(None)
        local = self.local(self._nodes.setdefault("dead", node), (), Window(), notes)
        local.kind = DEAD
        return local

    def __len__(self) -> int:
        return len(self._locals)
