"""Internal: what a creator says of a channel, checked: its name, type and numbers.

Knows: what is allowed. Does not know: how a channel lies in memory (ivshmem_channel/geometry.h).
"""

from __future__ import annotations

import operator
from typing import Any

from ..errors import ChannelExists, ChannelTypeError
from ..text import plain
from . import records, types

MOST = (1 << 31) - 64  # bytes of a message
_NUMBERS = ("limit", "slots", "writers", "readers", "loans", "views")
# What a creator calls them, where that is another word.
_ARGUMENTS = {
    "calls": {"writers": "callers", "readers": "servers"},
    "bytes": {"writers": "connections", "readers": "listeners", "slots": "buffer"},
}


def power(what: str, number: int) -> int:
    """Return the least power of two that is not less.

    Raises:
        ValueError: the number is less than 1.
    """
    if operator.index(number) < 1:
        raise ValueError(f"{what} {number}: 1 or more are needed")
    return 1 << max(operator.index(number) - 1, 0).bit_length()


def options_of(times: bool, ring_always: bool = False) -> int:
    """Return what a creator chose, as one number in the record."""
    chosen = {"times": times, "ring_always": ring_always}
    return sum(bit for name, bit in records.OPTIONS.items() if chosen[name])


def check_same(
    found: dict[str, Any], kind: str, name: str, text: str, geometry: dict[str, int]
) -> None:
    """Check that a channel that is there is the one that was to be created.

    Raises:
        ChannelTypeError: it is of another kind or type.
        ChannelExists: it has another geometry.
    """
    if found["kind"] != kind or found["type"] != text:
        raise ChannelTypeError(
            f"channel {name!r} is there, of kind {found['kind']} and type {plain(found['type'])!r};"
            f" wanted was kind {kind}, type {text!r}"
        )
    wanted = {
        **geometry,
        "overflow": tuple(
            way for way, bit in records.OVERFLOW.items() if geometry["overflow"] & bit
        ),
        **{name: bool(geometry["options"] & bit) for name, bit in records.OPTIONS.items()},
    }
    for what in (*_NUMBERS, "overflow", *records.OPTIONS):
        if found[what] != wanted[what]:
            word, there = _shown(kind, what, found[what])
            _, other = _shown(kind, what, wanted[what])
            raise ChannelExists(f"channel {name!r} is there, with {word} {there} and not {other}")


def check_numbers(kind: str, geometry: dict[str, int]) -> None:
    """Check the numbers of a channel that is to be created.

    Raises:
        TypeError, ValueError: one is not allowed; the message says what is.
    """
    of_bytes = kind == "bytes"
    limits = dict(records.NUMBERS_OF_BYTES if of_bytes else records.NUMBERS)
    if not of_bytes:
        limits["views"] = (1, geometry["slots"])
    for what, limit in limits.items():
        if not limit[0] <= operator.index(geometry[what]) <= limit[1]:
            (word, given), (_, least), (_, most) = (
                _shown(kind, what, number) for number in (geometry[what], *limit)
            )
            raise ValueError(f"{word} {given}: {least} to {most} are possible")


def _shown(kind: str, what: str, value: Any) -> tuple[str, Any]:
    """Return the word for a fact of a geometry, and its value, as a creator says them."""
    if what == "loans":
        value -= 1  # the one of `put`, which a creator does not count
    elif what == "overflow":
        value = ", ".join(value) or "none"
    return _ARGUMENTS.get(kind, {}).get(what, what), value


def check_name(name: str) -> None:
    """Check the name of a channel that is to be created.

    Raises:
        TypeError, ValueError: it is not allowed.
    """
    if not isinstance(name, str):
        raise TypeError(f"a channel's name is text, not {name!r}")
    if (
        not name.isprintable()
        or name != name.strip()
        or not 1 <= len(name.encode()) <= records.NAME_BYTES
    ):
        raise ValueError(
            f"channel {name!r}: a name is 1 to {records.NAME_BYTES} bytes of printable text without"
            " a space at either end"
        )


def type_and_limit(dtype: Any, shape: Any, schema: str, limit: int | None) -> tuple[str, int]:
    """Return a type as text, and the limit of its messages.

    Raises:
        TypeError, ValueError: one is not allowed, or they do not fit each other.
        ChannelTypeError: a dtype that is not allowed.
    """
    if not isinstance(schema, str):
        raise TypeError(f"a schema is text, not {schema!r}")
    if dtype is not None and schema:
        raise ValueError("dtype and schema exclude each other")
    if dtype is None:
        if limit is None:
            raise ValueError("limit: how many bytes the longest message has")
        text = f"schema {schema}" if schema else ""
        if not text.isprintable():
            raise ValueError(f"schema {schema!r}: printable text is allowed")
    else:
        kind = types.array_type(dtype, shape)
        text = kind.text
        if limit is None:
            if kind.size is None:
                raise ValueError(f"limit: a message of {kind} has no greatest size")
            limit = kind.size
        elif kind.size is not None and limit < kind.size:
            raise ValueError(f"limit {limit}: a message of {kind} has {kind.size} bytes")
    if len(text.encode()) > records.TYPE_BYTES:
        raise ValueError(
            f"the type takes {len(text.encode())} bytes; {records.TYPE_BYTES} are allowed"
        )
    if not 1 <= operator.index(limit) <= MOST:
        raise ValueError(f"limit {limit}: 1 to {MOST} bytes")
    return text, limit
