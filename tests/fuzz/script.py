"""Inputs that are scripts: operations with arguments, as bytes and back.

Knows: the bytes, how to change a script so that most of it keeps its sense. Does not know: what an
operation does.

Every sequence of bytes is a script, and every change of the bytes another one: an operation is one
byte, modulo their number, and then its arguments; what is missing at the end is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import NamedTuple

Value = int | bytes

_MOST = 200  # operations in a script


class Op(NamedTuple):
    """An operation and its arguments."""

    name: str
    args: tuple[Value, ...] = ()

    def __str__(self) -> str:
        return " ".join([self.name, *(repr(arg) for arg in self.args)])


class Grammar:
    """Which operations there are.

    Args:
        forms: by name, a letter for each argument: b a byte, w two, q a signed number of eight, s
            up to 255 bytes.
        begin: scripts with which to begin anew: the valid beginnings, behind which is what is
            reached by nothing else.
        tokens: bytes that make sense in an argument of form s.
    """

    def __init__(
        self,
        forms: Mapping[str, str],
        begin: Sequence[Sequence[Op]] = ((),),
        tokens: Sequence[bytes] = (),
    ) -> None:
        self._forms = forms
        self._names = list(forms)
        self._begin = begin
        self._tokens = tokens

    def decode(self, data: bytes) -> list[Op]:
        """The script that some bytes are."""
        found: list[Op] = []
        at = 0
        while at < len(data) and len(found) < _MOST:
            name = self._names[data[at] % len(self._names)]
            at += 1
            args: list[Value] = []
            for letter in self._forms[name]:
                if letter == "s":
                    length = int.from_bytes(data[at : at + 1], "little")
                    args.append(data[at + 1 : at + 1 + length])
                    at += 1 + length
                else:
                    size = _SIZES[letter]
                    raw = data[at : at + size]
                    args.append(int.from_bytes(raw.ljust(size, b"\0"), "little", signed=size == 8))
                    at += size
            found.append(Op(name, tuple(args)))
        return found

    def encode(self, script: Sequence[Op]) -> bytes:
        """The bytes of a script."""
        parts = []
        for op in script:
            parts.append(bytes([self._names.index(op.name)]))
            for letter, arg in zip(self._forms[op.name], op.args, strict=True):
                if isinstance(arg, bytes):
                    parts.append(bytes([len(arg[:255])]) + arg[:255])
                else:
                    size = _SIZES[letter]
                    parts.append((arg & ((1 << 8 * size) - 1)).to_bytes(size, "little"))
        return b"".join(parts)

    def mutate(self, script: Sequence[Op], numbers: Random, other: Sequence[Op]) -> list[Op]:
        """A script like this one, in a few places; it may take from another."""
        made = list(script)
        if not made or numbers.random() < 0.05:
            made = list(numbers.choice(self._begin))
            made += [self._new(numbers) for _ in range(numbers.randrange(12))]
        for _ in range(numbers.choice((1, 1, 1, 2, 2, 3, 5))):
            numbers.choice(_CHANGES)(self, made, numbers, other)
        return made[:_MOST]

    def _new(self, numbers: Random) -> Op:
        name = numbers.choice(self._names)
        return Op(name, tuple(self._argument(letter, numbers) for letter in self._forms[name]))

    def _argument(self, letter: str, numbers: Random, before: Value | None = None) -> Value:
        if letter == "s":
            text = before if isinstance(before, bytes) else b""
            return mutated(text, numbers, self._tokens)[:255]
        if isinstance(before, int) and numbers.random() < 0.3:
            return before + numbers.choice((-1, 1, 1 << numbers.randrange(8 * _SIZES[letter])))
        if numbers.random() < 0.6:
            return numbers.choice(_NUMBERS[letter])
        low, high = _RANGES[letter]
        return numbers.randint(low, high)

    # -- changes: each may find nothing to change -------------------------------------------------

    def _insert(self, made: list[Op], numbers: Random, other: Sequence[Op]) -> None:
        made.insert(_late(len(made) + 1, numbers), self._new(numbers))

    def _delete(self, made: list[Op], numbers: Random, other: Sequence[Op]) -> None:
        at = _late(len(made), numbers)
        del made[at : at + numbers.choice((1, 1, 2, 4))]

    def _repeat(self, made: list[Op], numbers: Random, other: Sequence[Op]) -> None:
        at = _late(len(made), numbers)
        part = made[at : at + numbers.choice((1, 1, 2, 5))]
        to = numbers.choice((at, _late(len(made) + 1, numbers)))
        made[to:to] = part * numbers.choice((1, 1, 2, 8))

    def _swap(self, made: list[Op], numbers: Random, other: Sequence[Op]) -> None:
        if made:
            one, two = _late(len(made), numbers), _late(len(made), numbers)
            made[one], made[two] = made[two], made[one]

    def _change(self, made: list[Op], numbers: Random, other: Sequence[Op]) -> None:
        at = _late(len(made), numbers)
        if at < len(made) and made[at].args:
            name, args = made[at]
            which = numbers.randrange(len(args))
            value = self._argument(self._forms[name][which], numbers, args[which])
            made[at] = Op(name, (*args[:which], value, *args[which + 1 :]))

    def _splice(self, made: list[Op], numbers: Random, other: Sequence[Op]) -> None:
        if other:
            start = numbers.randrange(len(other))
            part = other[start : start + numbers.choice((1, 2, 5, 20))]
            at = _late(len(made) + 1, numbers)
            made[at : at + numbers.choice((0, len(part)))] = part

    def _cut(self, made: list[Op], numbers: Random, other: Sequence[Op]) -> None:
        if numbers.random() < 0.2:
            del made[_late(len(made) + 1, numbers) :]


_Change = Callable[[Grammar, list[Op], Random, Sequence[Op]], None]
_CHANGES: Sequence[_Change] = (
    Grammar._insert,
    Grammar._insert,
    Grammar._change,
    Grammar._change,
    Grammar._change,
    Grammar._delete,
    Grammar._repeat,
    Grammar._swap,
    Grammar._splice,
    Grammar._cut,
)

_SIZES = {"b": 1, "w": 2, "q": 8}
_RANGES = {"b": (0, 255), "w": (0, 65535), "q": (-(1 << 63), (1 << 63) - 1)}
_NUMBERS: Mapping[str, Sequence[int]] = {
    "b": (0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 127, 128, 255),
    "w": (0, 1, 2, 7, 8, 127, 128, 255, 256, 65535),
    "q": (0, 1, -1, 65535, 65536, 1 << 31, 1 << 32, 1 << 56, (1 << 63) - 1, -(1 << 63)),
}


def _late(count: int, numbers: Random) -> int:
    """A place in 0..count-1, rather a late one: what comes early gives sense to the rest."""
    return int(count * numbers.random() ** 0.6) if count else 0


# -- texts ----------------------------------------------------------------------------------------


def mutated(text: bytes, numbers: Random, tokens: Sequence[bytes] = ()) -> bytes:
    """Bytes like these, with something else in a place or two."""
    made = bytearray(text)
    for _ in range(numbers.choice((1, 1, 2, 4))):
        at = numbers.randrange(len(made) + 1)
        end = at + numbers.choice((0, 0, 1, 1, 2, 8))
        what = numbers.randrange(6)
        if what == 0:
            made[at:end] = numbers.randbytes(numbers.choice((1, 1, 2, 8)))
        elif what == 1:
            del made[at : end + 1]
        elif what == 2:
            made[at:at] = made[at:end] * numbers.choice((1, 2, 30))
        elif what == 3:
            made[at:end] = bytes([numbers.randrange(32, 127)])
        elif tokens:
            made[at : numbers.choice((at, end))] = numbers.choice(tokens)
    return bytes(made)
