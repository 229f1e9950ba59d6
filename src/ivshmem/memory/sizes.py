"""Sizes as people write them, and which of them a region can have.

Knows: suffixes, fractions, hexadecimal; powers of two. Does not know: pages, files, memory.
"""

from __future__ import annotations

import operator
import re

from ..errors import RegionError
from ..text import counted

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import SupportsIndex

LARGEST = 1 << 62  # the largest power of two that a file can have, off_t being signed

_UNITS = "BKMGTPE"  # each 1024 times the one before
_SIZE = re.compile(
    r"(?:(0[xX][0-9a-fA-F]+)|(\d+(?:\.\d*)?|\.\d+))\s*(?:([BKMGTPE])(?:i?B)?)?",
    re.ASCII | re.IGNORECASE,
)


def parse_size(size: SupportsIndex | str) -> int:
    """Return bytes, from a number or from a text such as "4M", "1.5G", "64 KiB", "0x100000".

    Suffixes are powers of 1024, as QEMU reads them; a bare number is bytes.

    Raises:
        RegionError: it is not a size, or negative, or not a whole number of bytes.
        TypeError: it is neither a whole number nor a text.
    """
    if not isinstance(size, str):
        number = operator.index(size)
        if number < 0:
            raise RegionError(f"a size cannot be negative: {number}")
        return number
    match = _SIZE.fullmatch(size.strip()) if len(size) < 100 else None
    if match is None:
        raise RegionError(
            f"{size[:100]!r} is not a size: expected bytes, or a number with B, K, M, G, T, P or E,"
            " such as 4M"
        )
    hexadecimal, decimal, unit = match.groups()
    if hexadecimal:
        number, parts = int(hexadecimal, 16), 1
    else:
        whole, _, places = decimal.partition(".")
        number, parts = int(whole + places), 10 ** len(places)
    value: int
    value, rest = divmod(number * 1024 ** _UNITS.index((unit or "B").upper()), parts)
    if rest:
        raise RegionError(f"{size!r} is not a whole number of bytes")
    return value


def format_size(size: int) -> str:
    """Return exactly this size in bytes as a text, such as "1.5G", which parse_size reads.

    The unit is the largest one that needs at most three decimals.
    """
    for power in range(len(_UNITS) - 1, 0, -1):
        thousandths, odd = divmod(size * 1000, 1024**power)
        if thousandths >= 1000 and not odd:
            whole, rest = divmod(thousandths, 1000)
            return f"{whole}.{rest:03}".rstrip("0").rstrip(".") + _UNITS[power]
    return counted(size, "byte")


def roughly(size: int) -> str:
    """Return about this size as a text, with one decimal."""
    power = min(max(size.bit_length() - 1, 0) // 10, len(_UNITS) - 1)
    return f"{size / 1024**power:.1f}{_UNITS[power]}" if power else counted(size, "byte")


def check_size(size: int, page: int, *, what: str = "a region") -> None:
    """Refuse a size that makes QEMU abort, and name the nearest size that works.

    Raises:
        RegionError: `size` is not a power of two, or less than a page.
    """
    if size > LARGEST:
        raise RegionError(
            f"{what} cannot have {format_size(size)}: the largest is {format_size(LARGEST)}"
        )
    if size >= page and size & (size - 1) == 0:
        return
    above = max(round_up(size), page)
    below = max(above // 2, page)
    nearest = above if above - size <= size - below or below == above else below
    raise RegionError(
        f"{what} cannot have {format_size(size)}: it must be a power of two and at least one page"
        f" ({format_size(page)}); the nearest that works is {format_size(nearest)}"
    )


def round_up(size: int) -> int:
    """Return the smallest power of two that is not below `size`."""
    return 1 << max(size - 1, 0).bit_length()
