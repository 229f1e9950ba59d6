"""Progress of long work: a bar on a terminal, lines elsewhere, and nobody who is waited for."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TextIO

import pytest
from support.unread import Output
from support.waiting import until

from ivshmem.cli.progress import ProgressBar


@contextlib.contextmanager
def stream_to(output: Output, monkeypatch: pytest.MonkeyPatch) -> Iterator[TextIO]:
    monkeypatch.setenv("TERM", "xterm")
    with contextlib.closing(output), open(output.end, "w", closefd=False) as stream:
        yield stream


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    output = Output("terminal")
    with stream_to(output, monkeypatch) as stream, ProgressBar(stream) as progress:
        progress.show(0.5, "half")
        assert output.read_on() == b"\r[############............]  50%  half\x1b[K"
        progress.show(None, "nobody knows of what")
        assert output.read_on() == b"\rnobody knows of what\x1b[K"
        progress.say("a line")
        said = b""
        while not said.endswith(b"\n"):
            said += output.read_on()
        assert said == b"\r\x1b[Ka line\r\n"
        progress.show(1, "all")
        output.read_on()
        progress.wipe()
        assert output.read_on() == b"\r\x1b[K"


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", ["terminal", "terminal, Ctrl-S"])
def test_a_terminal_that_nobody_reads(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The work goes on to its end; of what was shown only the newest is there, and each line."""
    output = Output(kind)
    with stream_to(output, monkeypatch) as stream:
        with ProgressBar(stream) as progress:
            output.block()
            for number in range(1000):
                progress.show(number / 1000, f"item {number}")
            progress.say("a line")
            progress.show(1, "the last")
        said = b""
        while b"a line" not in said:
            said += output.read_on()
        assert said.count(b"item") < 10


def test_lines_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once each, in order, all of them, also when nobody reads for a while."""
    output = Output("pipe")
    wanted = [f"{number / 1000:4.0%}  item {number}" for number in range(1000)]
    with stream_to(output, monkeypatch) as stream, ProgressBar(stream) as progress:
        for number in range(1000):
            progress.show(number / 1000, f"item {number}")
            progress.show(number / 1000, f"item {number}")
        said = b""
        while said.count(b"\n") < len(wanted):
            said += output.read_on()
    assert said.decode().splitlines() == wanted


def test_a_reader_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    output = Output("pipe")
    with stream_to(output, monkeypatch) as stream, ProgressBar(stream) as progress:
        output.let_go()
        for number in range(100):
            progress.show(number / 100, f"item {number}")


def test_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but lines of its own."""
    output = Output("pipe")
    with stream_to(output, monkeypatch) as stream, ProgressBar(stream, quiet=True) as progress:
        progress.show(0.5, "half")
        progress.say("a line")
        assert output.read_on() == b"a line\n"


def test_its_thread_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    output = Output("pipe")
    with stream_to(output, monkeypatch) as stream:
        before = len(os.listdir("/proc/self/task"))
        for _ in range(3):
            with ProgressBar(stream) as progress:
                progress.show(0.5, "half")
        until(lambda: len(os.listdir("/proc/self/task")) <= before)
