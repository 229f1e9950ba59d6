"""What functions in Cython return when they raise is none of the header's codes.

A function `except -2` that returns the code -2 has raised nothing, and its caller crashes.
"""

from __future__ import annotations

import re
from pathlib import Path

CHANNEL = Path(__file__).parents[2] / "src/ivshmem/channel"


def test_codes_are_not_taken_for_exceptions() -> None:
    header = (CHANNEL / "ivshmem_channel/words.h").read_text()
    codes = {int(code) for code in re.findall(r"^ +IVSHMEM_\w+ = (-\d+)", header, re.MULTILINE)}
    assert {-1, -2, -14} <= codes
    codes -= {-1}  # IVSHMEM_AGAIN: functions `except -1` return no codes
    found = [
        f"{path.name}: {line.strip()}"
        for path in sorted([*CHANNEL.glob("*.pyx"), *CHANNEL.glob("*.pxd")])
        for line in path.read_text().splitlines()
        for value in re.findall(r"except (-\d+)", line)  # with "except?" the caller looks
        if int(value) in codes
    ]
    assert found == []
