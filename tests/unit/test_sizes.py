"""Sizes as people write them: what is understood, what is refused and in which words."""

from __future__ import annotations

import contextlib
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ivshmem import RegionError, parse_size
from ivshmem.memory.sizes import check_size, format_size, roughly, round_up

UNDERSTOOD = [
    (4096, 4096),
    (0, 0),
    ("0", 0),
    ("4096", 4096),
    ("4096B", 4096),
    ("1K", 1 << 10),
    ("4M", 4 << 20),
    ("4m", 4 << 20),
    ("4MB", 4 << 20),
    ("4MiB", 4 << 20),
    ("64 KiB", 64 << 10),
    ("  2G\n", 2 << 30),
    ("1T", 1 << 40),
    ("1P", 1 << 50),
    ("8E", 8 << 60),
    ("1.5M", 3 << 19),
    ("1.5G", 3 << 29),
    (".5K", 512),
    ("2.K", 2048),
    ("0x100000", 1 << 20),
    ("0X1fF", 511),
    ("0x10K", 16 << 10),
    ("007", 7),
]

REFUSED = [
    (-1, "a size cannot be negative: -1"),
    ("", "'' is not a size"),
    ("M", "'M' is not a size"),
    ("-4M", "'-4M' is not a size"),
    (
        "4X",
        "'4X' is not a size: expected bytes, or a number with B, K, M, G, T, P or E, such as 4M",
    ),
    ("4 M B", "is not a size"),
    ("4,5M", "is not a size"),
    ("1e6", "is not a size"),
    ("0x", "is not a size"),
    ("0x1.8M", "is not a size"),
    (".", "is not a size"),
    ("4M 4M", "is not a size"),
    ("\u0664M", "is not a size"),  # a digit, in Arabic
    ("4\u212a", "is not a size"),  # the sign of kelvin, which is a K without case
    ("0.3", "'0.3' is not a whole number of bytes"),
    ("1.0001K", "is not a whole number of bytes"),
]


@pytest.mark.parametrize(("text", "size"), UNDERSTOOD)
def test_understood(text: int | str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(("text", "message"), REFUSED)
def test_refused(text: int | str, message: str) -> None:
    with pytest.raises(RegionError) as caught:
        parse_size(text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (1023, "1023 bytes"),
        (1024, "1K"),
        (1025, "1025 bytes"),
        (1536, "1.5K"),
        (3 << 20, "3M"),
        ((1 << 30) + 1, "1073741825 bytes"),
        ((1 << 30) + (1 << 20), "1025M"),
        (1 << 62, "4E"),
        (8 << 60, "8E"),
    ],
)
def test_formatted(size: int, text: str) -> None:
    assert format_size(size) == text


@given(st.integers(0, 1 << 70))
def test_what_is_printed_is_exact(size: int) -> None:
    assert parse_size(format_size(size).replace("bytes", "B").replace("byte", "B")) == size


@given(st.integers(0, 1 << 66))
def test_roughly_is_near(size: int) -> None:
    text = roughly(size)
    number = Fraction(text.partition(" byte")[0].rstrip("KMGTPE"))
    unit = 0 if " byte" in text else "BKMGTPE".index(text[-1])
    assert abs(number * 1024**unit - size) <= Fraction(1024**unit, 20)
    assert number < 1025 or unit == 6


@given(st.text())
def test_any_text_is_a_size_or_refused(text: str) -> None:
    with contextlib.suppress(RegionError):
        assert parse_size(text) >= 0


def works(size: int, page: int) -> bool:
    """Whether a guest can have a region of that size."""
    return page <= size < 1 << 63 and size.bit_count() == 1


@given(
    st.integers(0, 1 << 66) | st.integers(0, 66).map(lambda bit: 1 << bit),
    st.sampled_from([4096, 2 << 20]),
)
@example(7 << 60, 4096)
@example(9 << 60, 4096)
def test_a_size_works_or_the_nearest_is_named(size: int, page: int) -> None:
    try:
        check_size(size, page)
    except RegionError as error:
        named = parse_size(str(error).split()[-1])
        assert not works(size, page)
        assert works(named, page), "the one that is named does not work"
        good = [1 << bit for bit in range(63) if works(1 << bit, page)]
        assert abs(named - size) == min(abs(other - size) for other in good)
    else:
        assert works(size, page)


@given(st.integers(0, 1 << 66))
def test_rounded_up(size: int) -> None:
    rounded = round_up(size)
    assert rounded >= size
    assert rounded.bit_count() == 1
    assert size < 2 or rounded < 2 * size
