"""Round trips between two processes, by every way there is, in turns: `python -m bench.roundtrips`.

Knows: the order of measurements, and the command line. Does not know: how one way works (ways.py),
what is made of the durations (report.py).

Every way is measured once, then every way again, and so on, so that a machine whose speed drifts
drifts for all; a ratio is the median of the ratios of the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn, TextIO

from ivshmem.bench.cores import Pinning, cores_for
from ivshmem.bench.roundtrip import Measured, Pair, measure
from ivshmem.errors import WorkerFailed

from . import floor, report
from .ways import FLOOR, OURS, PEERS, Way, floors

TRIPS = 20_000  # in one measurement, at most
SECONDS = 0.1  # for one measurement, roughly
ROUNDS = 5

# What is measured: both ends on one core; each on its own; wherever the kernel puts them; each on
# its own, while a third process keeps the echo end's busy.
SETUPS: dict[str, Pinning] = {"same": "same", "two": "two", "free": "free", "busy": "two"}

# Ends when its parent has.
_BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n for _ in range(10**5): 0"


@contextlib.contextmanager
def busy(core: set[int]) -> Iterator[int]:
    """A process that keeps a core busy; yields its id."""
    with subprocess.Popen([sys.executable, "-c", _BUSY], start_new_session=True) as process:
        try:
            os.sched_setaffinity(process.pid, core)
            yield process.pid
        finally:
            process.kill()


class Suite:
    """The measurements of some ways.

    Attributes:
        failures: a line for each way that ended in the middle; it is left out from there on.
    """

    def __init__(
        self, ways: Sequence[Way], *, trips: int, seconds: float, rounds: int, news: TextIO
    ) -> None:
        self.ways = ways
        self.failures: list[str] = []
        self._trips = trips
        self._seconds = seconds
        self._rounds = rounds
        self._news = news

    def run(self, setup: str) -> dict[str, list[Measured]]:
        """Measure in one of SETUPS; the rounds of each way, those that failed excluded."""
        cores = cores_for(SETUPS[setup])
        with contextlib.ExitStack() as stack:
            known = [stack.enter_context(busy(cores[1]))] if setup == "busy" else []
            pairs = {}
            for way in self.ways:
                self._say(f"{setup}: starting", way)
                with self._failing(setup, way):
                    ends = stack.enter_context(way.ends())
                    pairs[way.name] = stack.enter_context(Pair(*ends, cores))
            measured: dict[str, list[Measured]] = {name: [] for name in pairs}
            for number in range(1, self._rounds + 1):
                line = f"{setup}: round {number} of {self._rounds}"
                if not self._news.isatty():
                    print(line, file=self._news, flush=True)
                for way in self.ways:
                    if way.name in pairs:
                        self._say(line, way)
                        with self._failing(setup, way):
                            pair = pairs.pop(way.name)
                            each = measure(pair, self._trips, self._seconds, known)
                            measured[way.name].append(each)
                            pairs[way.name] = pair
            self._clear()
        return {name: rounds for name, rounds in measured.items() if name in pairs}

    @contextlib.contextmanager
    def _failing(self, setup: str, way: Way) -> Iterator[None]:
        try:
            yield
        except WorkerFailed as error:
            self._clear()
            self.failures.append(f"{way.name} ({setup}): {error}")
            print(f"left out: {self.failures[-1]}", file=sys.stderr)

    def _say(self, line: str, way: Way) -> None:
        if self._news.isatty():
            print(f"\r\x1b[K{line}, {way.name}", end="", file=self._news, flush=True)

    def _clear(self) -> None:
        if self._news.isatty():
            print("\r\x1b[K", end="", file=self._news, flush=True)


def chosen(ways: Sequence[Way], wanted: str | None) -> list[Way]:
    """Those whose name contains one of the words, which commas separate, and their floors."""
    if wanted is None:
        return list(ways)
    words = [word.strip().lower() for word in wanted.split(",") if word.strip()]
    for word in words:
        if not any(word in way.name.lower() for way in ways):
            raise SystemExit(f"no way has {word!r} in its name; --list lists them")
    found = [way for way in ways if any(word in way.name.lower() for word in words)]
    names = {FLOOR, *(way.name for way in found), *(way.like for way in found)}
    return [way for way in ways if way.name in names]


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.roundtrips", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add(
        "--pinning",
        metavar="SETUP",
        action="append",
        choices=[*SETUPS],
        help="same, two, free "
        "or busy (a third process on one of the two cores); may be repeated; default: all",
    )
    add(
        "--ways",
        metavar="WORDS",
        help="only those with one of these, separated by commas, in their names, and C",
    )
    add("--trips", type=int, default=TRIPS, help=f"in one measurement, at most ({TRIPS})")
    add("--seconds", type=float, default=SECONDS, help=f"for one measurement ({SECONDS:g})")
    add("--rounds", type=int, default=ROUNDS, help=f"measurements of each way ({ROUNDS})")
    add("--json", metavar="FILE", type=Path, help="write the results, for pytest-benchmark compare")
    add("--picture", metavar="FILE", type=Path, help="draw the distributions: .svg or .png")
    add(
        "--table",
        metavar="FILE",
        type=Path,
        help="measure nothing: print what --json wrote, as Markdown, and with --picture draw it",
    )
    add("--list", action="store_true", help="list the ways, and what is missing for them")
    return parser


def obtain(options: argparse.Namespace) -> tuple[report.Results, list[str]]:
    """The results, measured or read, and what failed."""
    if options.table:
        return json.loads(options.table.read_text()), []
    with tempfile.TemporaryDirectory(prefix="ivb") as directory:
        program = Path(directory) / "baseline"
        floor.build("baseline.c", program)
        ways = chosen([*floors(program), *OURS, *PEERS], options.ways)
        for way in ways:
            if reason := way.missing():
                print(f"left out: {way.name}: {reason}", file=sys.stderr)
        suite = Suite(
            [way for way in ways if not way.missing()],
            trips=options.trips,
            seconds=options.seconds,
            rounds=options.rounds,
            news=sys.stderr,
        )
        results = report.empty()
        for setup in options.pinning or SETUPS:
            like = {way.name: way.like for way in ways if way.like}
            report.add(results, setup, suite.run(setup), FLOOR, like)
        return results, suite.failures


def _terminated(_number: int, _frame: object) -> NoReturn:
    raise SystemExit(143)  # by way of all `with` blocks, so that no process is left


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 1 if a way failed, or could not be measured at all."""
    parser = arguments()
    options = parser.parse_args(argv)
    if min(options.trips, options.rounds) < 1 or options.seconds <= 0:
        parser.error("--trips, --rounds and --seconds are more than 0")
    if options.list:
        for way in [*floors(Path()), *OURS, *PEERS]:
            print(f"{way.name:45} {way.missing() or ''}".rstrip())
        return 0
    signal.signal(signal.SIGTERM, _terminated)
    try:
        results, failures = obtain(options)
        print(report.markdown(results))
        if options.json:
            options.json.write_text(json.dumps(results, indent=1) + "\n")
        if options.picture:
            from . import picture

            picture.draw(results, options.picture)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except (OSError, ValueError, ImportError, floor.NoCompiler) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
