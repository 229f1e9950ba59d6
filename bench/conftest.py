"""The floor in C, and how a figure of ours stands to it."""

import shutil
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent

# Times that each side is measured, in turn, so that a machine whose speed drifts drifts for both.
ROUNDS = 7

Measure = Callable[[], float]
Compare = Callable[[Measure, list[str]], tuple[float, float]]
Build = Callable[[str, Path], None]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The figures that bench/README.md quotes: ours, and the median of its ratios to C."""
    session = getattr(config, "_benchmarksession", None)
    for bench in session.benchmarks if session else ():
        figures = ", ".join(f"{key} {value}" for key, value in bench.extra_info.items())
        terminalreporter.write_line(f"{bench.name}: {figures}")


@pytest.fixture(scope="session")
def build() -> Build:
    """Compiles a C file of this folder into a program."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler for the floor: apt-get install gcc")

    def run(source: str, program: Path) -> None:
        subprocess.run([compiler, "-O2", "-Wall", "-o", program, HERE / source], check=True)

    return run


@pytest.fixture(scope="session")
def baseline(tmp_path_factory: pytest.TempPathFactory, build: Build) -> Callable[..., float]:
    """Runs a case of baseline.c and returns its nanoseconds."""
    program = tmp_path_factory.mktemp("baseline") / "baseline"
    build("baseline.c", program)

    def run(*arguments: object) -> float:
        command = [str(program), *map(str, arguments)]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    return run


@pytest.fixture
def compare(baseline: Callable[..., float]) -> Compare:
    """Measures ours and the floor in turn: (median nanoseconds of ours, median of the ratios)."""

    def run(ours: Measure, floor: list[str]) -> tuple[float, float]:
        figures, ratios = [], []
        for _ in range(ROUNDS):
            figures.append(ours())
            ratios.append(figures[-1] / baseline(*floor))
        return statistics.median(figures), statistics.median(ratios)

    return run
