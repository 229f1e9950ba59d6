"""Framing: the literal bytes of version 0, and the same messages however the stream was cut.

Every descriptor that goes in comes out once, with the message whose bytes it came with.
"""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivshmem.protocol.framing import Framer, Message, encode

BYTES = [
    (0, b"\x00\x00\x00\x00\x00\x00\x00\x00"),
    (1, b"\x01\x00\x00\x00\x00\x00\x00\x00"),
    (-1, b"\xff\xff\xff\xff\xff\xff\xff\xff"),
    (65535, b"\xff\xff\x00\x00\x00\x00\x00\x00"),
    (0x0102, b"\x02\x01\x00\x00\x00\x00\x00\x00"),
    (-(1 << 63), b"\x00\x00\x00\x00\x00\x00\x00\x80"),
    ((1 << 63) - 1, b"\xff\xff\xff\xff\xff\xff\xff\x7f"),
]

# Chunks as they come off the socket, and the messages in them.
Chunks = list[tuple[bytes, tuple[int, ...]]]

CUT: list[tuple[str, Chunks, list[Message]]] = [
    ("one with its descriptor", [(encode(-1), (7,))], [Message(-1, (7,))]),
    (
        "descriptor with the first part",
        [(encode(5)[:3], (7,)), (encode(5)[3:], ())],
        [Message(5, (7,))],
    ),
    (
        "descriptor with the last part",
        [(encode(5)[:3], ()), (encode(5)[3:], (7,))],
        [Message(5, (7,))],
    ),
    (
        "descriptors with each part, in order",
        [(encode(5)[:1], (7,)), (encode(5)[1:4], (8, 9)), (encode(5)[4:], (10,))],
        [Message(5, (7, 8, 9, 10))],
    ),
    (
        "two messages in one chunk: it belongs to the second",
        [(encode(5) + encode(6), (7,))],
        [Message(5), Message(6, (7,))],
    ),
    (
        "a chunk that ends inside the next message: it belongs there",
        [(encode(5) + encode(6)[:2], (7,)), (encode(6)[2:], ())],
        [Message(5), Message(6, (7,))],
    ),
    (
        "a held one stays with the message that it began",
        [(encode(5)[:4], (7,)), (encode(5)[4:] + encode(6)[:4], (8,)), (encode(6)[4:], ())],
        [Message(5, (7,)), Message(6, (8,))],
    ),
    (
        "a held one goes to the first of two",
        [(encode(5)[:4], (7,)), (encode(5)[4:] + encode(6), (8,))],
        [Message(5, (7,)), Message(6, (8,))],
    ),
]


@pytest.mark.parametrize(("value", "data"), BYTES)
def test_literal_bytes(value: int, data: bytes) -> None:
    assert encode(value) == data
    assert list(Framer().feed(data)) == [Message(value)]


@pytest.mark.parametrize(("value", "data"), BYTES)
@pytest.mark.parametrize("fds", [(), (7,)])
def test_byte_by_byte(value: int, data: bytes, fds: tuple[int, ...]) -> None:
    framer = Framer()
    for index in range(7):
        assert list(framer.feed(data[index : index + 1], fds if index == 0 else ())) == []
        assert framer.partial
        assert framer.held == fds
    assert list(framer.feed(data[7:])) == [Message(value, fds)]
    assert not framer.partial
    assert framer.held == ()


@pytest.mark.parametrize(("value", "data"), BYTES)
@pytest.mark.parametrize("tail", range(1, 8))
def test_with_a_tail(value: int, data: bytes, tail: int) -> None:
    framer = Framer()
    assert list(framer.feed(data + encode(42)[:tail])) == [Message(value)]
    assert framer.partial
    assert list(framer.feed(encode(42)[tail:])) == [Message(42)]
    assert not framer.partial


@pytest.mark.parametrize(
    ("chunks", "messages"), [case[1:] for case in CUT], ids=[case[0] for case in CUT]
)
def test_descriptors(chunks: Chunks, messages: list[Message]) -> None:
    framer = Framer()
    assert [m for data, fds in chunks for m in framer.feed(data, fds)] == messages
    assert framer.held == ()
    assert not framer.partial


@pytest.mark.parametrize("begun", [b"", b"\x05\x00"])
def test_nothing_is_nothing(begun: bytes) -> None:
    framer = Framer()
    assert list(framer.feed(begun)) == []
    assert list(framer.feed(b"")) == []
    assert framer.partial == bool(begun)


@given(
    values=st.lists(st.integers(-(1 << 63), (1 << 63) - 1), max_size=6),
    cuts=st.lists(st.integers(0, 48), max_size=8),
    tail=st.binary(max_size=7),
    fds=st.data(),
)
def test_any_cut(values: list[int], cuts: list[int], tail: bytes, fds: st.DataObject) -> None:
    stream = b"".join(map(encode, values)) + tail
    bounds = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    framer = Framer()
    messages: list[Message] = []
    expected: dict[int, tuple[int, ...]] = {}
    given_fd = 100
    for start, end in itertools.pairwise(bounds):
        count = fds.draw(st.integers(0, 2))
        new = tuple(range(given_fd, given_fd + count))
        given_fd += count
        index = (end - 1) // 8
        expected[index] = expected.get(index, ()) + new
        messages += framer.feed(stream[start:end], new)
    assert [m.value for m in messages] == values
    assert [m.fds for m in messages] == [expected.get(i, ()) for i in range(len(values))]
    assert framer.held == expected.get(len(values), ())
    assert framer.partial == bool(tail)
