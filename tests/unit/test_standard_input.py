"""Standard input of a command: lines at once, and an end when nobody wants more."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ivshmem.cli.standard_input import lines, pieces


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def test_a_line_comes_as_soon_as_it_is_whole(pipe: tuple[int, int]) -> None:
    came = lines(lambda: None, pipe[0])
    os.write(pipe[1], b"one\n\nthr")
    assert next(came) == b"one"
    assert next(came) == b""
    os.write(pipe[1], b"ee\nlast")
    assert next(came) == b"three"
    null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(null, pipe[1])  # so the pipe has no writer any more
    os.close(null)
    assert list(came) == [b"last"]


@pytest.mark.parametrize("data", [b"", b"\n", b"a", b"a\n", b"a\n\nb", b"x" * 200_000 + b"\ny\n"])
def test_lines_are_those_of_a_file(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "input"
    file.write_bytes(data)
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        assert list(lines(lambda: None, fd)) == data.splitlines()
    finally:
        os.close(fd)


def test_who_is_not_wanted_any_more_reads_nothing(pipe: tuple[int, int]) -> None:
    wanted = [True, True]

    def check() -> None:
        if not wanted:
            raise KeyError
        wanted.pop()

    with pytest.raises(KeyError):
        next(pieces(check, pipe[0]))  # it waits, and looks
    os.write(pipe[1], b"x")
    with pytest.raises(KeyError):
        next(pieces(check, pipe[0]))
    assert os.read(pipe[0], 10) == b"x"


def test_a_descriptor_that_does_not_block(pipe: tuple[int, int]) -> None:
    os.set_blocking(pipe[0], False)
    came = pieces(lambda: None, pipe[0])
    os.write(pipe[1], b"x")
    assert next(came) == b"x"
