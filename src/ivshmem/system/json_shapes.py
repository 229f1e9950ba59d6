"""JSON that another process wrote: read within bounds, and its types checked, before it is used.

Knows: JSON, and how to say what is wrong in it. Does not know: what any of it means.

A shape is a function of a value and of where that value stands. It returns nothing, and raises
Misshapen for a value that it does not allow. Shapes are put together:

    PEER = record(id=integer(0, 65535), process=text(), since=number())
    STATUS = record(regions=array(record(name=text(), peers=array(PEER))))
    STATUS(loads(data), "status")

Invariants:
1. `loads` raises Misshapen or returns: for any bytes, however deep, long or strange.
2. A value that a shape let through can be indexed, added, compared and formatted without an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from ..errors import Misshapen
from ..text import plain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn, TypeAlias

    Shape: TypeAlias = Callable[[Any, str], object]

_MOST_SHOWN = 40  # characters of a value in a message
_MOST_DIGITS = 20  # 2**64 has so many; Python itself refuses only thousands of them
_YEAR_9999 = 253402300799.0  # seconds since the epoch: the last that has a date


def loads(data: bytes | bytearray | str) -> Any:
    """Read JSON as RFC 8259 has it: without NaN, and without numbers that are no 64-bit ones.

    Raises:
        Misshapen: it is not JSON, or too deep for this Python.
    """
    import json  # here: a server that begins has none to read

    try:
        return json.loads(data, parse_constant=_no_number, parse_int=_integer, parse_float=_number)
    except RecursionError:
        raise Misshapen("JSON that is nested too deep") from None
    except Misshapen:
        raise
    except ValueError as error:  # UnicodeDecodeError, too
        raise Misshapen(f"not JSON ({' '.join(str(error).split())})") from None


def _no_number(name: str) -> NoReturn:
    raise Misshapen(f"{name} is not a number in JSON")


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise Misshapen(f"a number of {len(digits)} digits")
    return int(digits)


def _number(digits: str) -> float:
    found = float(digits)
    if not math.isfinite(found):
        raise Misshapen(f"the number {_cut(digits)} is too large")
    return found


# -- shapes ----------------------------------------------------------------------------------------


def integer(least: int = -(1 << 63), most: int = (1 << 64) - 1) -> Shape:
    """Allow integers from `least` to `most`; a boolean is not one."""

    def check(value: Any, where: str) -> None:
        if type(value) is not int:
            raise _wrong(value, where, "an integer")
        if not least <= value <= most:
            raise Misshapen(f"{where} is {value}: allowed are {least} to {most}")

    return check


def number(least: float = 0.0, most: float = 1e18) -> Shape:
    """Allow integers and finite floats from `least` to `most`."""

    def check(value: Any, where: str) -> None:
        if type(value) not in (int, float):
            raise _wrong(value, where, "a number")
        if not least <= value <= most:  # NaN, too
            raise Misshapen(f"{where} is {value}: allowed are {least:g} to {most:g}")

    return check


def moment() -> Shape:
    """Allow seconds since the epoch, up to the year 9999."""
    return number(0.0, _YEAR_9999)


def text(*words: str, most: int = 1 << 16) -> Shape:
    """Allow strings of up to `most` characters, or only one of `words`."""

    def check(value: Any, where: str) -> None:
        if type(value) is not str:
            raise _wrong(value, where, "a string")
        if len(value) > most:
            raise Misshapen(f"{where} has {len(value)} characters: {most} are allowed")
        if words and value not in words:
            raise _wrong(value, where, f"one of {', '.join(words)}")

    return check


def flag() -> Shape:
    """Allow true and false."""

    def check(value: Any, where: str) -> None:
        if type(value) is not bool:
            raise _wrong(value, where, "true or false")

    return check


def optional(shape: Shape) -> Shape:
    """Allow null, too."""
    return lambda value, where: None if value is None else shape(value, where)


def array(shape: Shape, most: int = 1 << 20) -> Shape:
    """Allow arrays of up to `most` elements, each of this shape."""

    def check(value: Any, where: str) -> None:
        if type(value) is not list:
            raise _wrong(value, where, "an array")
        if len(value) > most:
            raise Misshapen(f"{where} has {len(value)} elements: {most} are allowed")
        try:
            for each in value:
                shape(each, where)
        except Misshapen:  # only now is its place worth a string: there can be millions
            for number, each in enumerate(value):
                shape(each, f"{where}[{number}]")
            raise

    return check


def tuple_of(*shapes: Shape) -> Shape:
    """Allow arrays with exactly these elements."""

    def check(value: Any, where: str) -> None:
        if type(value) is not list:
            raise _wrong(value, where, "an array")
        if len(value) != len(shapes):
            raise Misshapen(f"{where} has {len(value)} elements: expected {len(shapes)}")
        for number, (shape, each) in enumerate(zip(shapes, value, strict=True)):
            shape(each, f"{where}[{number}]")

    return check


def table(shape: Shape, *, key: Shape | None = None) -> Shape:
    """Allow objects whose values all have this shape, and whose keys all have that one."""

    def check(value: Any, where: str) -> None:
        _object(value, where)
        for name, each in value.items():
            if key is not None:
                key(name, f"a key of {where}")
            shape(each, f"{where}.{_cut(name)}")

    return check


def record(also: Mapping[str, Shape] | None = None, /, **fields: Shape) -> Shape:
    """Allow objects with these fields; with those of `also`, which may be absent; and with more."""

    def check(value: Any, where: str) -> None:
        _object(value, where)
        for name, shape in fields.items():
            if name not in value:
                raise Misshapen(f"{where} has no {name}")
            shape(value[name], f"{where}.{name}")
        for name, shape in (also or {}).items():
            if name in value:
                shape(value[name], f"{where}.{name}")

    return check


def begins_with(*shapes: Shape) -> Shape:
    """Allow arrays that begin with these elements; more may follow."""
    first = tuple_of(*shapes)

    def check(value: Any, where: str) -> None:
        first(value[: len(shapes)] if type(value) is list else value, where)

    return check


def either(one: Shape, other: Shape) -> Shape:
    """Allow both shapes; the message is the second one's."""

    def check(value: Any, where: str) -> None:
        try:
            one(value, where)
        except Misshapen:
            other(value, where)

    return check


def digits() -> Shape:
    """Allow strings of decimal digits: the integers that are keys of objects."""

    def check(value: Any, where: str) -> None:
        if not (value.isascii() and value.isdecimal() and len(value) < _MOST_DIGITS):
            raise _wrong(value, where, "decimal digits")

    return check


def _object(value: Any, where: str) -> None:
    if type(value) is not dict:
        raise _wrong(value, where, "an object")


def _wrong(value: Any, where: str, wanted: str) -> Misshapen:
    return Misshapen(f"{where} is {_shown(value)}: expected {wanted}")


def _shown(value: Any) -> str:
    """A value in a message: a scalar itself, of a larger one only what it is."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "an array"
    return shown(value)


def shown(value: object) -> str:
    """Return a stranger's scalar for a message: as JSON, printable, and short."""
    import json  # here, as in `loads`

    return _cut(json.dumps(value))


def _cut(text: str) -> str:
    return plain(text, _MOST_SHOWN)
