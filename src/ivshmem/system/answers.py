"""What a stranger's JSON says, fetched by type: a QMP monitor's answers, a control socket's.

Knows: the types that JSON has, and what is said of a value that has another one.
Does not know: what was asked, or what the values mean. json_shapes.py checks a whole value of a
known form at once; here a caller takes what it needs, of a form that changes from one QEMU to the
next.

Invariants:
1. Whatever the JSON contains, a method returns a value of the type that it names, or raises
   WrongAnswer with one line: who answered what, where the wrong value stands, and what it is.
2. Text has no lone surrogates: it can be printed, encoded and sent back.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..errors import WrongAnswer

_MOST_SHOWN = 60  # characters of a wrong value
_MOST_NUMBER = 1 << 64  # sizes and counts have 64 bits at most


class _Missing:
    """The default of a value that has to be there."""


_MISSING = _Missing()


class Answer:
    """An answer, or a part of one.

    The methods take the key of a value in it, "" for the answer itself, and what they return if
    there is none, or null. Without a default its absence is an error.

    Args:
        value: what json.loads made of it.
        where: whose answer to what; every error begins with it.
    """

    def __init__(self, value: Any, where: str, path: str = "") -> None:
        self._value = value
        self._where = where
        self._path = path

    def text(self, key: str = "", default: str | _Missing = _MISSING) -> str:
        """A text; lone surrogates, which no encoding has, are refused."""
        value = self._get(key, default)
        if isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value):
            return value
        raise self._wrong(key, value, "text")

    def number(self, key: str = "", default: int | _Missing = _MISSING) -> int:
        """A whole number, of at most 64 bits and not negative."""
        value = self._get(key, default)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST_NUMBER:
            return value
        raise self._wrong(key, value, "a whole number of at most 64 bits")

    def real(self, key: str = "", default: float | _Missing = _MISSING) -> float:
        """A number, with a fraction or without."""
        value = self._get(key, default)
        numeric = isinstance(value, int | float) and not isinstance(value, bool)
        if numeric and abs(value) < _MOST_NUMBER:  # false of NaN, too
            return float(value)
        raise self._wrong(key, value, "a number")

    def flag(self, key: str = "", default: bool | _Missing = _MISSING) -> bool:
        """True or false."""
        value = self._get(key, default)
        if isinstance(value, bool):
            return value
        raise self._wrong(key, value, "true or false")

    def simple(self, key: str = "") -> Any:
        """A property of any simple type, or a list of these, as it is to be sent back later."""
        value = self._get(key, _MISSING)
        for each in value if isinstance(value, list) else [value]:
            part = Answer(each, self._where, self._named(key))
            if isinstance(each, str):
                part.text()
            elif not isinstance(each, bool):
                part.real()
        return value

    def part(self, key: str = "") -> Answer:
        """An object, empty if there is none, whose values can be fetched in turn."""
        value = self._get(key, {})
        if isinstance(value, dict):
            return Answer(value, self._where, self._named(key))
        raise self._wrong(key, value, "an object")

    def parts(self, key: str = "") -> list[Answer]:
        """The elements of a list, of which there are none if it is absent."""
        value = self._get(key, [])
        if isinstance(value, list):
            name = self._named(key)
            return [Answer(each, self._where, f"{name}[{i}]") for i, each in enumerate(value)]
        raise self._wrong(key, value, "a list")

    def __contains__(self, key: str) -> bool:
        return isinstance(self._value, dict) and self._value.get(key) is not None

    def __iter__(self) -> Iterator[Answer]:
        return iter(self.parts())

    def _get(self, key: str, default: Any) -> Any:
        value = self._value
        if key:
            if not isinstance(value, dict):
                raise self._wrong("", value, "an object")
            value = value.get(key)
        if value is not None:
            return value
        if isinstance(default, _Missing):
            raise WrongAnswer(f"{self._where}: {self._named(key) or 'the answer'} is missing{_WHO}")
        return default

    def _named(self, key: str) -> str:
        return ".".join(filter(None, [self._path, key]))

    def _wrong(self, key: str, value: object, wanted: str) -> WrongAnswer:
        name = self._named(key) or "the answer"
        return WrongAnswer(f"{self._where}: {name} is {shown(value)}, not {wanted}{_WHO}")


_WHO = ": is this a monitor of QEMU (-qmp)?"


def shown(value: object) -> str:
    """A wrong value, short, in one line; of what is nested only the type."""
    if isinstance(value, dict | list):
        kind = "an object" if isinstance(value, dict) else "a list"
        return f"{kind} of {len(value)}"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 1 << 128:
        return f"a number of {value.bit_length()} bits"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = ascii(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}.."
