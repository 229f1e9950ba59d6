"""The floor in C, and how a figure of ours stands to it."""

import faulthandler
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from . import floor

HERE = Path(__file__).parent

# Times that each side is measured, in turn, so that a machine whose speed drifts drifts for both.
ROUNDS = 7

Measure = Callable[[], float]
Baseline = Callable[..., float]  # a case of baseline.c: nanoseconds
Compare = Callable[[Measure, list[str]], tuple[float, float]]
Build = Callable[..., None]  # source, program, further flags


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The figures that bench/README.md quotes: ours, and the median of its ratios to C."""
    session = getattr(config, "_benchmarksession", None)
    for bench in session.benchmarks if session else ():
        figures = ", ".join(f"{key} {value}" for key, value in bench.extra_info.items())
        terminalreporter.write_line(f"{bench.name}: {figures}")


@pytest.fixture(autouse=True)
def single_thread() -> None:
    """Send pytest's watchdog away: in a process with a second thread system calls take longer."""
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="session")
def build() -> Build:
    """Compiles a C file of this folder into a program, or with "-shared" into a library."""

    def run(source: str, program: Path, *flags: str) -> None:
        try:
            floor.build(source, program, *flags)
        except floor.NoCompiler as error:
            pytest.skip(str(error))

    return run


@pytest.fixture(scope="session")
def baseline(tmp_path_factory: pytest.TempPathFactory, build: Build) -> Baseline:
    """Runs a case of baseline.c and returns its nanoseconds."""
    program = tmp_path_factory.mktemp("baseline") / "baseline"
    build("baseline.c", program)

    def run(*arguments: object) -> float:
        command = [str(program), *map(str, arguments)]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    return run


@pytest.fixture
def compare(baseline: Baseline) -> Compare:
    """Measures ours and the floor in turn: (median nanoseconds of ours, median of the ratios)."""

    def run(ours: Measure, case: list[str]) -> tuple[float, float]:
        figures, ratios = [], []
        for _ in range(ROUNDS):
            figures.append(ours())
            ratios.append(figures[-1] / baseline(*case))
        return statistics.median(figures), statistics.median(ratios)

    return run
