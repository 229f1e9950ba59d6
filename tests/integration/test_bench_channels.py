"""`python -m bench.channels`: messages really pass between two ends; ratios are of messages."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from array import array
from pathlib import Path

import pytest
from bench.channels import geometries, in_c, loops, ours, peers, readers, system_calls, tables
from bench.channels.exchange import Exchange
from bench.ways import ROOT, Way
from support.waiting import until

from ivshmem.bench.cores import cores_for
from ivshmem.bench.noise import Noise
from ivshmem.bench.roundtrip import Measured, Pair

needs_compiler = pytest.mark.skipif(
    shutil.which("cc") is None and shutil.which("gcc") is None, reason="no C compiler"
)

OURS = [ours.PutGet, ours.PutInto, ours.PutView, ours.Rows, ours.Lists]


def durations(way: Way, turns: int = 3) -> list[int]:
    with way.ends() as ends, Pair(*ends, cores_for("free")) as pair:
        return list(pair.trips(turns)) + list(pair.trips(turns))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", [*OURS, peers.Pipe], ids=lambda kind: kind.__name__)
def test_messages_in_a_turn(kind: type[Exchange]) -> None:
    assert all(took > 0 for took in durations(kind(64, 128)))


def test_ends_that_sleep() -> None:
    assert len(durations(ours.Blocking())) == 6


@pytest.mark.parametrize(
    "way", [loops.Bare("asyncio"), loops.Awaited("asyncio")], ids=["bare", "awaited"]
)
def test_ends_in_an_event_loop(way: Way) -> None:
    assert all(took > 0 for took in durations(way))


@pytest.mark.nightly
@needs_compiler
def test_ends_in_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_c.InC, "program", tmp_path / "channel")
    in_c.build(in_c.InC.program)
    for kind in (in_c.Ring, in_c.Header):
        for size in (64, 1 << 20):
            assert all(took > 0 for took in durations(kind(size, 5)))


def test_every_reader_reads() -> None:
    if len(cores_for("free")[0]) < 2:
        pytest.skip("two cores are needed")
    with readers.crowd(2) as crowd:
        for count in (1, 2):  # a busy machine may give a reader no time in a short round
            until(
                lambda: crowd.round(count, 300_000)[1] > readers.SLOTS,  # noqa: B023
                "a round in which each reader reads",
            )


@pytest.mark.skipif(shutil.which("strace") is None, reason="no strace: apt-get install strace")
def test_a_busy_stream_makes_no_system_call() -> None:
    assert sum(system_calls.count(20_000).values()) <= 100


def test_what_strace_counts() -> None:
    table = (
        "    calls syscall\n--------- ------\n       10 ppoll\n        2 read\n       12 total\n"
    )
    assert system_calls.parsed(table) == {"ppoll": 10, "read": 2}


def test_channels_take_what_they_say() -> None:
    for one in geometries.used():
        assert one.payload <= one.size, one
        assert one.payload <= one.touched < one.size + 2 * geometries.PAGE, one


def test_a_ratio_is_of_messages() -> None:
    """A row's turns can have more messages than those of the row that it is compared with."""
    quiet = Noise(0.0, ())
    rows = [
        tables.Row(peers.Pipe(count=100), each=100),
        tables.Row(peers.Zmq(), "multiprocessing.Pipe", 2),
    ]
    measured = {
        "multiprocessing.Pipe": [Measured(array("q", [1000, 2000, 3000]), quiet)],
        "pyzmq": [Measured(array("q", [30, 50, 90]), quiet)],
    }
    table = tables.Table("Both", "two", rows, latency=False)
    first, second = tables.figures(table, measured)
    assert first["ns"]["p50"] == 20
    assert second["ratio"] == 2.5
    assert "| pyzmq | 50 | 50 | 2.50 | multiprocessing.Pipe | 2 | 1 of 1 |" in tables.markdown(
        table, [first, second]
    )


@pytest.mark.nightly
@needs_compiler
def test_the_command(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    command = [sys.executable, "-W", "error", "-m", "bench.channels", "spinning", "memory"]
    command += ["--rounds", "1", "--turns", "50", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "| put, get |" in done.stdout
    assert set(json.loads(file.read_text())) == {"Round trips of 64 B, spinning", "memory"}
