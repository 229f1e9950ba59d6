"""Programs in C that use ivshmem_channel.h: where they are, and what compiles them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

PROGRAMS = Path(__file__).parents[1] / "channel"
WARNINGS = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"]


def needs(compiler: str) -> str:
    """Return the compiler; skip the test that needs it, if it is not installed."""
    package = "g++" if "+" in compiler else "gcc"
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}: apt-get install {package}")
    return compiler
