"""Doorbell round trips between host and guest, and between guests, beside a program in C.

Both programs, roundtrip.c and roundtrip.py, run in turn in the same guests, of one boot.
"""

from __future__ import annotations

import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from vm import image
from vm.harness import Guest

import ivshmem
from ivshmem.qemu import cmdline

from .conftest import HERE, Build

# Measurements of each side, in turn, and round trips in each.
ROUNDS, TRIPS = 7, 4000
TIMEOUT = 60.0
STARTING = 120.0  # seconds: an emulated guest imports slowly

# Starts, feeds and stops one program at a time.
RUNNER = """
    import shlex, subprocess, sys
    from raw.sysfs import find
    print("AT", find()[0], flush=True)
    child = None
    for line in iter(sys.stdin.readline, ""):
        match shlex.split(line):
            case ["start", *command]:
                child = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)
            case ["stop"]:
                if child is not None:
                    child.terminate()
                    child.wait()
            case _:
                child.stdin.write(line)
                child.stdin.flush()
"""


class InGuest:
    """An end in a guest that goes on running when its program ends."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self._address = guest.expect("AT").split()[1]

    def start(self, program: Sequence[str]) -> int:
        """The id."""
        self.say(shlex.join(["start", *program, "guest", self._address]))
        return int(self._guest.expect("READY", STARTING).split()[1])

    def say(self, line: str) -> None:
        self._guest.send(line)

    def took(self) -> list[int]:
        return list(map(int, self._guest.expect("TOOK", TIMEOUT).split()[1:]))

    def stop(self) -> None:
        self.say("stop")


class OnHost:
    """An end that is a process of the host, on one core."""

    def __init__(self, socket: str | Path, core: int) -> None:
        self._socket, self._core = str(socket), core
        self._process: subprocess.Popen[str] | None = None

    def start(self, program: Sequence[str]) -> int:
        """The id."""
        self._process = subprocess.Popen(
            [*program, "client", self._socket],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        os.sched_setaffinity(self._process.pid, {self._core})
        return int(self._line("READY")[0])

    def say(self, line: str) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        print(line, file=self._process.stdin, flush=True)

    def took(self) -> list[int]:
        return list(map(int, self._line("TOOK")))

    def stop(self) -> None:
        if self._process is not None:
            with self._process:  # closes its pipes and waits
                self._process.terminate()
            self._process = None

    def _line(self, start: str) -> list[str]:
        assert self._process is not None
        assert self._process.stdout is not None
        first, *words = self._process.stdout.readline().split() or ["nothing"]
        assert first == start, f"it said {first} and not {start}"
        return words


class Times(NamedTuple):
    """Nanoseconds a round trip."""

    p50: int
    p99: int


class Programs(NamedTuple):
    """Command lines without the role."""

    c: list[str]
    library: list[str]


End = InGuest | OnHost


def measure(
    pinging: End, program: Sequence[str], echoing: End, echo_program: Sequence[str]
) -> Times:
    try:
        peer = echoing.start(echo_program)
        own = pinging.start(program)
        echoing.say(f"echo {own}")
        pinging.say(f"ping {peer} {TRIPS}")
        return Times(*pinging.took())
    finally:
        pinging.stop()
        echoing.stop()


def pin(guest: Guest, processors: int, rest: int) -> None:
    """Which core runs the guest's processors, and which the rest of QEMU.

    Left to themselves they move: a round trip takes half as long while all are on one core.
    """
    emulated = {processor["thread-id"] for processor in guest.qmp("query-cpus-fast")}
    for thread in map(int, os.listdir(f"/proc/{guest.pid}/task")):
        os.sched_setaffinity(thread, {processors if thread in emulated else rest})


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory, build: Build) -> Programs:
    if (reason := image.missing()) is not None:
        pytest.skip(reason)
    program = tmp_path_factory.mktemp("roundtrip") / "roundtrip"
    build("roundtrip.c", program)
    return Programs([str(program)], [sys.executable, str(HERE / "roundtrip.py")])


@pytest.fixture
def cores() -> tuple[int, int]:
    """Two, if there are two."""
    available = sorted(os.sched_getaffinity(0))
    return available[0], available[-1]


MakeGuest = Callable[[str], Guest]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ivshmem.Server]:
    with ivshmem.Server(tmp_path / "socket", "1M").start() as server:
        yield server


@pytest.fixture
def boot(server: ivshmem.Server) -> Iterator[MakeGuest]:
    with ExitStack() as guests:

        def make(name: str) -> Guest:
            args = cmdline.doorbell(server.path, server.vectors)
            return guests.enter_context(Guest(RUNNER, args=args, name=name, iommu=True))

        yield make


def compare(
    benchmark: BenchmarkFixture,
    floor: Callable[[], Times],
    ours: Callable[[], Times],
    rounds: int = ROUNDS,
) -> None:
    """Measure both in turn; the ratios are medians of the rounds' ratios."""
    floors: list[Times] = []
    figures: list[Times] = []
    benchmark.pedantic(  # type: ignore[no-untyped-call]
        lambda: figures.append(ours()), setup=lambda: floors.append(floor()), rounds=rounds
    )
    for index, name in enumerate(Times._fields):
        benchmark.extra_info[f"{name}_us"] = round(
            statistics.median(each[index] for each in figures) / 1000, 1
        )
        ratios = [each[index] / least[index] for each, least in zip(figures, floors, strict=True)]
        benchmark.extra_info[f"{name}_to_c"] = round(statistics.median(ratios), 2)


@pytest.mark.parametrize(
    ("pinging", "by_library"),
    [("guest", "guest"), ("host", "host"), ("guest", "both")],
)
def bench_host_and_guest(
    benchmark: BenchmarkFixture,
    programs: Programs,
    server: ivshmem.Server,
    boot: MakeGuest,
    cores: tuple[int, int],
    pinging: str,
    by_library: str,
) -> None:
    """The guest's processor on one core; the rest of QEMU, and the host's end, on another."""
    guest = boot("guest")
    a: End = InGuest(guest)
    b: End = OnHost(server.path, cores[1])
    pin(guest, *cores)
    if pinging == "host":
        a, b = b, a
    c, library = programs
    echoing_by = library if by_library == "both" else c
    compare(benchmark, lambda: measure(a, c, b, c), lambda: measure(a, library, b, echoing_by))


def bench_two_guests(
    benchmark: BenchmarkFixture, programs: Programs, boot: MakeGuest, cores: tuple[int, int]
) -> None:
    """Each guest, with all of QEMU, on a core of its own."""
    guests = [boot("a"), boot("b")]
    a, b = map(InGuest, guests)
    for guest, core in zip(guests, cores, strict=True):
        pin(guest, core, core)
    c, library = programs
    compare(benchmark, lambda: measure(a, c, b, c), lambda: measure(a, library, b, library))
