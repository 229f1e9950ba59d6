"""Atomic words and copies: what they do, beside a model in Python, and what they refuse."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.peer import memory_fd

from ivshmem import ClosedError
from ivshmem.native.mapping import Atomic, AtomicU32, AtomicU64, Mapping

SIZE = 3 * 4096
LARGE = 1 << 18  # from here on a copy lets go of the GIL

ORDERS = ["relaxed", "acquire", "release", "acq_rel", "seq_cst"]
LOADS = ["relaxed", "acquire", "seq_cst"]
STORES = ["relaxed", "release", "seq_cst"]


@pytest.fixture
def fd() -> Iterator[int]:
    fd = memory_fd(SIZE)
    yield fd
    os.close(fd)


@pytest.fixture
def mapping(fd: int) -> Iterator[Mapping]:
    mapping = Mapping(fd, SIZE)
    yield mapping
    mapping.close()


@pytest.fixture(scope="module")
def area() -> Iterator[Mapping]:
    """For hypothesis, whose examples share it."""
    fd = memory_fd(SIZE)
    mapping = Mapping(fd, SIZE)
    os.close(fd)
    yield mapping
    mapping.close()


# -- words ----------------------------------------------------------------------------------------

both_widths = pytest.mark.parametrize("bits", [32, 64])


def word_at(mapping: Mapping, bits: int, offset: int) -> Atomic:
    return mapping.atomic_u32(offset) if bits == 32 else mapping.atomic_u64(offset)


# What each operation makes of a value, given its own; all return what it was.
CHANGES: dict[str, Callable[[int, int], int]] = {
    "exchange": lambda _was, value: value,
    "fetch_add": lambda was, value: was + value,
    "fetch_sub": lambda was, value: was - value,
    "fetch_and": lambda was, value: was & value,
    "fetch_or": lambda was, value: was | value,
    "fetch_xor": lambda was, value: was ^ value,
}


@both_widths
@given(data=st.data())
def test_words_do_as_their_model(area: Mapping, bits: int, data: st.DataObject) -> None:
    """Any operations in any order they can have; nothing beside the word changes."""
    size = bits // 8
    offset = data.draw(st.integers(0, SIZE // size - 1)) * size
    before = area.read(0, SIZE)
    word = word_at(area, bits, offset)
    model = int.from_bytes(before[offset : offset + size], sys.byteorder)
    values = st.integers(0, 2**bits - 1) | st.sampled_from([0, 1, 2**31, 2**bits - 1])
    for _ in range(data.draw(st.integers(1, 8))):
        value = data.draw(values)
        name = data.draw(st.sampled_from(["load", "store", "compare_exchange", *CHANGES]))
        allowed = {"load": LOADS, "store": STORES}.get(name, ORDERS)
        order = data.draw(st.none() | st.sampled_from(allowed))
        rest: tuple[Any, ...] = () if order is None else (order,)
        if name == "load":
            assert word.load(*rest) == model
        elif name == "store":
            word.store(value, *rest)
            model = value
        elif name == "compare_exchange":
            expected = data.draw(st.just(model) | values)
            assert word.compare_exchange(expected, value, *rest) == model
            model = value if expected == model else model
        else:
            assert getattr(word, name)(value, *rest) == model
            model = CHANGES[name](model, value) % 2**bits
        assert word.load() == model
    after = before[:offset] + model.to_bytes(size, sys.byteorder) + before[offset + size :]
    assert area.read(0, SIZE) == after


@both_widths
def test_words_of_one_place(fd: int, mapping: Mapping, bits: int) -> None:
    """Every word of a place is the same, and both widths are of the same bytes."""
    value = word_at(mapping, bits, 4096 + 8)
    value.store(2**bits - 1)
    assert word_at(mapping, bits, 4096 + 8).load() == 2**bits - 1
    assert mapping.atomic_u64(4096 + 8).load("seq_cst") in (2**bits - 1, (2**32 - 1) << 32)
    assert os.pread(fd, 24, 4096) == bytes(8) + (b"\xff" * (bits // 8)).ljust(8, b"\0") + bytes(8)


def calls_of(word: Atomic, value: int = 1) -> dict[str, Callable[..., object]]:
    """Every operation, waiting for its order."""
    calls: dict[str, Callable[..., object]] = {"load": word.load}
    calls["store"] = lambda *order: word.store(value, *order)
    calls["compare_exchange"] = lambda *order: word.compare_exchange(0, value, *order)
    for name in CHANGES:
        calls[name] = lambda *order, name=name: getattr(word, name)(value, *order)
    return calls


def spelled_anew(order: str) -> str:
    """An equal string that is another object."""
    return "".join(list(order))


@both_widths
@pytest.mark.parametrize("order", ORDERS)
def test_every_order_on_every_operation(mapping: Mapping, bits: int, order: str) -> None:
    for name, call in calls_of(word_at(mapping, bits, 8)).items():
        allowed = {"load": LOADS, "store": STORES}.get(name, ORDERS)
        for spelling in (order, spelled_anew(order)):
            mapping.atomic_u64(8).store(0)
            if order in allowed:
                call(spelling)
            else:
                with pytest.raises(ValueError, match=f"'{order}'.*: {', '.join(allowed)}$"):
                    call(spelling)
                assert mapping.atomic_u64(8).load() == 0, name


@both_widths
def test_what_is_no_order(mapping: Mapping, bits: int) -> None:
    for name, call in calls_of(word_at(mapping, bits, 0)).items():
        for wrong in ("", "consume", "SEQ_CST", "acq-rel", b"relaxed", None, 5, 0):
            with pytest.raises(ValueError, match="no order"):
                call(wrong)
        with pytest.raises(TypeError):
            call([])
        assert mapping.atomic_u64(0).load() == 0, name


@both_widths
def test_orders_by_name(mapping: Mapping, bits: int) -> None:
    word = word_at(mapping, bits, 0)
    word.store(3, order="relaxed")
    assert word.compare_exchange(3, 4, order="acq_rel") == 3
    assert word.load(order="seq_cst") == 4


@both_widths
@pytest.mark.parametrize("wrong", [-1, -(2**63), 2**32, 2**64, 2**200])
def test_values_that_do_not_fit(mapping: Mapping, bits: int, wrong: int) -> None:
    word = word_at(mapping, bits, 0)
    word.store(7)
    if not 0 <= wrong < 2**bits:
        for call in calls_of(word, wrong).values():
            if call == word.load:
                continue
            with pytest.raises(OverflowError):
                call()
        with pytest.raises(OverflowError):
            word.compare_exchange(wrong, 1)
    assert mapping.atomic_u64(0).load() == 7


@both_widths
def test_values_that_are_no_integers(mapping: Mapping, bits: int) -> None:
    word = word_at(mapping, bits, 0)
    strange: list[Any] = ["1", 1.5, None, b"1"]
    for wrong in strange:
        for call in list(calls_of(word, wrong).values())[1:]:
            with pytest.raises(TypeError):
                call()
    assert word.load() == 0


@both_widths
@given(offset=st.integers(-SIZE, 2 * SIZE) | st.integers())
def test_where_there_is_a_word(area: Mapping, bits: int, offset: int) -> None:
    size = bits // 8
    kind = AtomicU32 if bits == 32 else AtomicU64
    makers: list[Callable[[], Atomic]] = [
        lambda: word_at(area, bits, offset),
        lambda: kind(area, offset),
    ]
    for make in makers:
        if offset % size == 0 and 0 <= offset <= SIZE - size:
            assert type(make()) is kind
        else:
            message = f"no aligned {bits}-bit word at {offset} in {SIZE} bytes"
            with pytest.raises(ValueError, match=message):
                make()


def test_no_word_in_less_than_one(fd: int) -> None:
    small = Mapping(fd, 7)
    assert small.atomic_u32(0).load() == 0
    for make in (lambda: small.atomic_u32(4), lambda: small.atomic_u64(0)):
        with pytest.raises(ValueError):
            make()
    small.close()
    nothing: Any = None
    for kind in (AtomicU32, AtomicU64):
        with pytest.raises(TypeError):
            kind(nothing, 0)


@both_widths
def test_words_that_may_only_be_read(fd: int, bits: int) -> None:
    readonly = Mapping(fd, SIZE, readonly=True)
    word = word_at(readonly, bits, 0)
    os.pwrite(
        fd, (8).to_bytes(8, sys.byteorder), 0 if bits == 64 or sys.byteorder == "little" else 4
    )
    for name, call in calls_of(word).items():
        if name == "load":
            assert call() == 8
            continue
        with pytest.raises(TypeError, match="mapped for reading only"):
            call()
    assert word.load() == 8
    readonly.close()


@both_widths
def test_words_of_closed_memory(fd: int, bits: int) -> None:
    """Neither keeps the other: a word does not hold up close(), and does not outlive it."""
    mapping = Mapping(fd, SIZE)
    word = word_at(mapping, bits, 0)
    mapping.close()
    for call in calls_of(word).values():
        with pytest.raises(ClosedError, match="the memory is closed"):
            call()
    assert not any(os.pread(fd, SIZE, 0))


# -- where it is ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2 << 20, (2 << 20) + 4096, 64 << 20])
@pytest.mark.parametrize("readonly", [False, True])
def test_huge_pages_could_be_mapped(size: int, readonly: bool) -> None:
    """Memory that has room for one begins where one can."""
    fd = memory_fd(size)
    mappings = [Mapping(fd, size, readonly=readonly) for _ in range(3)]
    os.close(fd)
    assert [mapping.address % (2 << 20) for mapping in mappings] == [0, 0, 0]
    assert len({mapping.address for mapping in mappings}) == 3
    for mapping in mappings:
        mapping.close()


# -- copies ---------------------------------------------------------------------------------------


@given(data=st.data())
def test_copies_do_as_slices(area: Mapping, data: st.DataObject) -> None:
    offset = data.draw(st.integers(0, SIZE))
    wanted = data.draw(st.binary(max_size=min(SIZE - offset, 300)))
    before = area.read(0, SIZE)
    with memoryview(area) as view:
        assert bytes(view) == before
        assert area.write(offset, wanted) == len(wanted)
        after = before[:offset] + wanted + before[offset + len(wanted) :]
        assert bytes(view) == after
    assert area.read(offset, len(wanted)) == wanted
    buffer = bytearray(b"\xee" * (len(wanted) + 2))
    assert area.read_into(offset, memoryview(buffer)[1:-1]) == len(wanted)
    assert buffer == b"\xee" + wanted + b"\xee"


@pytest.mark.parametrize("size", [0, 1, LARGE - 1, LARGE, LARGE + 1, 3 * LARGE])
def test_small_and_large_copies(size: int) -> None:
    fd = memory_fd(4 * LARGE)
    mapping = Mapping(fd, 4 * LARGE)
    data = os.urandom(size)
    assert mapping.write(7, data) == size
    assert os.pread(fd, 4 * LARGE, 0) == bytes(7) + data + bytes(4 * LARGE - size - 7)
    assert mapping.read(7, size) == data
    buffer = bytearray(size)
    assert mapping.read_into(7, buffer) == size
    assert buffer == data
    mapping.close()
    os.close(fd)


@given(
    offset=st.integers(-5, SIZE + 5) | st.integers(),
    size=st.integers(-5, SIZE + 5) | st.integers(2**63 - SIZE, 2**63 + SIZE) | st.integers(),
)
def test_what_does_not_lie_in_the_memory(area: Mapping, offset: int, size: int) -> None:
    """Whatever the numbers, of which a peer may have sent both: ValueError, no access."""
    inside = 0 <= offset <= SIZE and 0 <= size <= SIZE - offset
    before = area.read(0, SIZE)
    if inside:
        assert len(area.read(offset, size)) == size
    else:
        with pytest.raises(ValueError, match=rf"no .* bytes at {offset} in {SIZE} bytes"):
            area.read(offset, size)
    if 0 <= size <= 2 * SIZE and not inside:
        buffer = bytearray(b"\xee" * size)
        calls: list[Callable[[int, bytearray], int]] = [area.write, area.read_into]
        for call in calls:
            with pytest.raises(ValueError, match=f"no {size} bytes at {offset} in {SIZE} bytes"):
                call(offset, buffer)
        assert buffer == b"\xee" * size
    assert area.read(0, SIZE) == before


@pytest.mark.parametrize("wrong", ["0", 0.0, None])
def test_numbers_that_are_none(mapping: Mapping, wrong: Any) -> None:
    calls: list[Callable[[], object]] = [
        lambda: mapping.read(wrong, 1),
        lambda: mapping.read(0, wrong),
        lambda: mapping.read_into(wrong, bytearray(1)),
        lambda: mapping.write(wrong, b"x"),
        lambda: mapping.atomic_u32(wrong),
    ]
    for call in calls:
        with pytest.raises(TypeError):
            call()


def test_offsets_of_other_kinds(mapping: Mapping) -> None:
    """What has __index__ is an integer."""
    assert mapping.read(np.int64(0), np.uint8(3)) == bytes(3)
    word = mapping.atomic_u64(np.uint16(8))
    word.store(int(np.int64(5)))
    assert word.load() == 5


def test_buffers_of_every_kind(mapping: Mapping) -> None:
    array: Any = np.arange(12, dtype="<u2").reshape(3, 4)
    assert mapping.write(0, array) == 24
    assert mapping.read(0, 24) == array.tobytes()
    target: Any = np.zeros((2, 6), "<u2")
    assert mapping.read_into(0, target) == 24
    assert target.tobytes() == array.tobytes()
    assert mapping.write(100, array[1:]) == 16


def test_what_is_no_such_buffer(mapping: Mapping) -> None:
    """Neither side changes."""
    array: Any = np.arange(10, dtype="u1")
    cases: list[tuple[Any, Any]] = [
        (memoryview(b"abcdef")[::2], BufferError),
        (array[::2], (ValueError, BufferError)),
        ("text", TypeError),
        (5, TypeError),
        (None, TypeError),
    ]
    for wrong, errors in cases:
        for call in (mapping.write, mapping.read_into):
            with pytest.raises(errors):
                call(0, wrong)
    for readonly in (b"abc", memoryview(b"abc")):
        with pytest.raises(BufferError):
            mapping.read_into(0, readonly)
    assert not any(mapping.read(0, SIZE))
    assert bytes(array) == bytes(range(10))


@pytest.mark.parametrize("size", [100, LARGE])
@pytest.mark.parametrize("shift", [-3, 0, 3])
def test_a_copy_within_the_memory(size: int, shift: int) -> None:
    """As by memmove: what overlaps is not copied twice."""
    fd = memory_fd(LARGE + 4096)
    mapping = Mapping(fd, LARGE + 4096)
    data = os.urandom(size)
    mapping.write(10, data)
    with memoryview(mapping) as view:
        assert mapping.write(10 + shift, view[10 : 10 + size]) == size
    assert mapping.read(10 + shift, size) == data
    with memoryview(mapping) as view:
        assert mapping.read_into(10 + shift, view[10 : 10 + size]) == size
    assert mapping.read(10, size) == data
    mapping.close()
    os.close(fd)


def test_copies_of_memory_that_may_only_be_read(fd: int) -> None:
    readonly = Mapping(fd, SIZE, readonly=True)
    os.pwrite(fd, b"seen", 5)
    assert readonly.read(5, 4) == b"seen"
    buffer = bytearray(4)
    assert readonly.read_into(5, buffer) == 4
    assert buffer == b"seen"
    for data in (b"x", b""):
        with pytest.raises(TypeError, match="mapped for reading only"):
            readonly.write(5, data)
    assert os.pread(fd, 4, 5) == b"seen"
    readonly.close()


@pytest.mark.parametrize("size", [0, 1, LARGE])
def test_copies_of_closed_memory(size: int) -> None:
    fd = memory_fd(LARGE)
    mapping = Mapping(fd, LARGE)
    os.close(fd)
    mapping.close()
    buffer = bytearray(b"\xee" * size)
    calls: list[Callable[[], object]] = [
        lambda: mapping.read(0, size),
        lambda: mapping.read_into(0, buffer),
        lambda: mapping.write(0, buffer),
    ]
    for call in calls:
        with pytest.raises(ClosedError, match="the memory is closed"):
            call()
    assert buffer == b"\xee" * size


@pytest.mark.skipif(sys.version_info < (3, 12), reason="no buffers of classes in Python before")
@pytest.mark.parametrize("size", [8, LARGE])
def test_a_buffer_that_closes_the_memory(size: int) -> None:
    """Asking an object for its buffer runs code of its own, which may do anything."""
    fd = memory_fd(LARGE)
    mapping = Mapping(fd, LARGE)
    os.close(fd)

    class Closing:
        def __buffer__(self, _flags: int) -> memoryview:
            mapping.close()
            return memoryview(bytearray(size))

    hostile: Any = Closing()
    with pytest.raises(ClosedError):
        mapping.write(0, hostile)
    assert mapping.closed


def test_closing_is_not_held_up_by_what_is_over(mapping: Mapping) -> None:
    """Neither a failed view nor a failed copy leaves the memory in use."""
    assert isinstance(mapping.read(0, 100), bytes)
    for wrong in (SIZE, -1):
        with pytest.raises(ValueError):
            mapping.write(wrong, b"x")
    nothing: Any = None
    with pytest.raises(TypeError):
        mapping.read_into(0, nothing)
    mapping.resident()
    mapping._populate(4096)
    mapping.close()
    assert mapping.closed
    for call in (lambda: mapping.resident(), lambda: mapping._populate(4096)):
        with pytest.raises(ClosedError):
            call()


def test_a_refused_view_does_not_hold_up_closing(fd: int) -> None:
    readonly = Mapping(fd, SIZE, readonly=True)
    other = Mapping(fd, SIZE)
    with pytest.raises(BufferError):
        other.read_into(0, readonly)  # wants to write
    readonly.close()
    other.close()
