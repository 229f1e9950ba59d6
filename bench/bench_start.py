"""From exec to service, and what a waiting process holds in memory; beside the interpreter alone.

`python3 -c pass` takes turns with the commands, so that all of them meet the same disturbance. It
is E below; P is what `python3 -I` holds that only waits.
"""

from __future__ import annotations

import contextlib
import os
import socket
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

ROUNDS = 15
SCRIPTS = Path(sysconfig.get_path("scripts"))
IVSHMEM, SERVER = str(SCRIPTS / "ivshmem"), str(SCRIPTS / "ivshmem-server")
NAME = f"ivshmem-start-{os.getpid()}"

# Milliseconds beyond E, and MiB beyond P.
ACCEPTS = {
    "ivshmem-server": ([SERVER, "-F", "-M", NAME], 60),
    "serve": ([IVSHMEM, "serve"], 60),
}
FINISHES = {
    "status": ([IVSHMEM, "status"], 80),
    "qemu": ([IVSHMEM, "qemu"], 80),
    "evict": ([IVSHMEM, "evict", "7"], 80),
    "import ivshmem": ([sys.executable, "-c", "import ivshmem"], 50),
    "from ivshmem import connect": ([sys.executable, "-c", "from ivshmem import connect"], 80),
}
HOLDS = {
    "serve": ([IVSHMEM, "serve"], 8),
    "supervisor": ([IVSHMEM, "serve", "--supervise"], 3),
}


def users_environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}


def started(command: list[str]) -> subprocess.Popen[bytes]:
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, stdout=quiet, stderr=quiet, env=users_environment())


def finish(command: list[str]) -> float:
    begin = time.perf_counter()
    started(command).wait()
    return time.perf_counter() - begin


def accept(command: list[str], path: Path) -> float:
    """Seconds until somebody can connect; then the server is ended."""
    begin = time.perf_counter()
    process = started([*command, "-S", str(path)])
    try:
        _connect(path)
        return time.perf_counter() - begin
    finally:
        process.terminate()
        process.wait()


def _connect(path: Path) -> None:
    give_up = time.monotonic() + 30
    while time.monotonic() < give_up:
        with socket.socket(socket.AF_UNIX) as sock, contextlib.suppress(OSError):
            sock.connect(str(path))
            return
        time.sleep(0.0005)
    raise AssertionError(f"nobody listens on {path}")


def floor() -> float:
    return finish([sys.executable, "-c", "pass"])


def beside(
    benchmark: BenchmarkFixture, name: str, limit: float, measure: Callable[[], float]
) -> None:
    """Take turns with the floor, and print the differences."""
    floors, times = [], []
    for _ in range(ROUNDS):
        floors.append(floor())
        times.append(measure())
    least = (min(times) - min(floors)) * 1e3
    median = statistics.median(a - b for a, b in zip(times, floors, strict=True)) * 1e3
    benchmark.extra_info |= {
        "E, ms": round(min(floors) * 1e3, 1),
        "beyond E, ms: least": round(least, 1),
        "median": round(median, 1),
        "target": limit,
    }
    print(
        f"\n{name}: E ({min(floors) * 1e3:.0f} ms) + {least:.0f} ms at least,"
        f" + {median:.0f} ms in the median; target: {limit:g} ms"
    )
    benchmark.pedantic(measure, rounds=1)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("name", ACCEPTS)
def bench_start_until_it_accepts(benchmark: BenchmarkFixture, tmp_path: Path, name: str) -> None:
    command, limit = ACCEPTS[name]
    beside(benchmark, name, limit, lambda: accept(command, tmp_path / "socket"))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    path = tmp_path / "server"
    process = started([IVSHMEM, "serve", "-S", str(path)])
    _connect(Path(f"{path}.control"))
    yield str(path)
    process.terminate()
    process.wait()


@pytest.mark.parametrize("name", FINISHES)
def bench_start_until_it_ends(benchmark: BenchmarkFixture, server: str, name: str) -> None:
    command, limit = FINISHES[name]
    if command[0] == IVSHMEM:
        command = [*command, "-S", server]
    beside(benchmark, name, limit, lambda: finish(command))


def held(pid: int) -> tuple[float, float]:
    """MiB that are resident, and those of them that are private."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    kib = {key: int(rest.split()[0]) for key, _, rest in (line.partition(":") for line in lines)}
    return kib["Rss"] / 1024, (kib["Private_Clean"] + kib["Private_Dirty"]) / 1024


@pytest.mark.parametrize("name", HOLDS)
def bench_start_memory(benchmark: BenchmarkFixture, tmp_path: Path, name: str) -> None:
    command, limit = HOLDS[name]
    path = tmp_path / "socket"
    waits = "import sys; sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-I", "-c", waits], stdin=subprocess.PIPE, env=users_environment()
    ) as idle:
        process = started([*command, "-S", str(path)])
        _connect(Path(f"{path}.control"))
        time.sleep(0.5)  # until it has come to rest
        (resident, private), (floor_resident, floor_private) = held(process.pid), held(idle.pid)
        process.terminate()
        process.wait()
        idle.communicate()
    benchmark.extra_info |= {
        "P, MiB": round(floor_resident, 1),
        "resident beyond P": round(resident - floor_resident, 1),
        "private beyond P": round(private - floor_private, 1),
        "target": limit,
    }
    print(
        f"\n{name}: P ({floor_resident:.1f} MiB) + {resident - floor_resident:.1f} MiB resident,"
        f" + {private - floor_private:.1f} MiB private; target: {limit} MiB resident"
    )
    benchmark.pedantic(lambda: held(os.getpid()), rounds=1)  # type: ignore[no-untyped-call]
