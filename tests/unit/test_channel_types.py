"""Types of messages: the text in memory is any peer's; only a short grammar is taken."""

from __future__ import annotations

import random

import numpy as np
import pytest

from ivshmem.channel import ChannelTypeError, types

ALLOWED = [
    ("<f4", None),
    ("<f4", (2, 3)),
    ("|u1", (None, 4)),
    ("|b1", (1,)),
    (">i8", (None,)),
    ("<c16", (2,)),
    ("|S5", (3,)),
    ("<M8[ns]", (2,)),
    ("<m8[25s]", (2,)),
    ([("x", "<f4"), ("y", ">i2", (2, 2)), ("z", "|S3")], (3,)),
]


@pytest.mark.parametrize(("dtype", "shape"), ALLOWED)
def test_round_trips(dtype: object, shape: tuple[int | None, ...] | None) -> None:
    made = types.array_type(dtype, shape)
    read = types.parse(made.text)
    assert read is not None
    assert (read.text, read.numpy()) == (made.text, np.dtype(dtype))  # type: ignore[call-overload]
    lengths = tuple(2 if length is None else length for length in made.shape)
    raw = random.Random(1).randbytes(read.itemsize * int(np.prod(lengths)))  # noqa: S311
    array = np.frombuffer(raw, read.numpy()).reshape(lengths)
    assert bytes(read.encode(array)) == raw
    again = read.decode(raw)
    assert (again.dtype, again.shape, again.tobytes()) == (array.dtype, lengths, raw)
    assert again.flags.writeable


def test_no_rows_are_an_array_too() -> None:
    kind = types.parse("array <f4 ?x3")
    assert kind is not None
    empty = np.empty((0, 3), "<f4")
    assert bytes(kind.encode(empty)) == b""
    assert kind.decode(b"").shape == (0, 3)


@pytest.mark.parametrize(
    "text",
    [
        "array",
        "array ",
        "array <f4",
        "array <f4 ",
        "array <f4 2 ",
        "array <f4  2",
        "array <f4 0",
        "array <f4 -1",
        "array <f4 2x?",
        "array <f4 2x",
        "array <f4 \u0663",
        "array |S\u0663 2",
        "array |S0 2",
        "array |O 2",
        "array O 2",
        "array <f3 2",
        "array =f4 2",
        "array <U4 2",
        "array |V8 2",
        "array <M8[x] 2",
        "array <M8 2",
        "array <M8[0s] 2",
        "array <f4 99999999999",
        "array <f4 9999999999x9999999999",
        "array <f4 " + "x".join("1" * 17),
        "array |S999999999 3",
        "array a:<f4,a:<f4 2",
        "array a:<f4, 2",
        "array :<f4 2",
        "array a:|O 2",
        "array a:<f4*0 2",
        "array a:<f4*9999999999x9999999999 2",
        "array a:b:<f4 2",
        "array __import__('os'):<f4 2",
        "array <f4 2\n",
    ],
)
def test_what_is_not_allowed(text: str) -> None:
    if text == "array":
        assert types.parse(text) is None
        return
    with pytest.raises(ChannelTypeError):
        types.parse(text)


def test_what_is_parsed_is_a_dtype_without_objects() -> None:
    """Whatever the text is: it is refused, or numpy takes what comes of it."""
    draw = random.Random(2)  # noqa: S311
    parts = [
        "array ", "schema ", "<", ">", "|", "f4", "i8", "S", "M8[", "ns", "]", "O", "u1", "b1", ":",
        "a", "b", ",", "*", "x", "?", " ", "1", "2", "9", "0", "\u0663", "\xe9", "c8", "m8[s]",
    ]  # fmt: skip
    taken = 0
    for _ in range(20000):
        text = "array " + "".join(draw.choices(parts, k=draw.randrange(1, 7)))
        text += draw.choice([" 2", " ?", ""])
        try:
            kind = types.parse(text)
        except ChannelTypeError:
            continue
        if kind is not None:
            assert not kind.numpy().hasobject
            assert kind.numpy().itemsize == kind.itemsize
            taken += 1
    assert taken > 10


def test_what_does_not_fit() -> None:
    kind = types.array_type("<f4", (2, None)[:1])
    for wrong in (np.zeros(3, "<f4"), np.zeros(2, "<f8"), np.zeros((2, 1), "<f4"), 5, "x", None):
        with pytest.raises(ChannelTypeError, match="the channel has messages of array <f4 2"):
            kind.encode(wrong)
    for size in (0, 4, 7, 12):
        with pytest.raises(ChannelTypeError, match="is not array <f4 2"):
            kind.decode(bytes(size))
    padded = np.dtype([("a", "i1"), ("b", "<i4")], align=True)
    for dtype in (object, [("a", "<i4"), ("b", object)], padded):
        with pytest.raises(ChannelTypeError):
            types.array_type(dtype, None)
