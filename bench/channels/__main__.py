"""Messages, beside C and other libraries: `python -m bench.channels`.

Knows: the order of tables, and the command line. Does not know: how a row is measured.

The ways of a table are measured in turn, several times; a ratio is the median of the ratios of the
rounds. A round that other processes disturbed is left out, as long as three others remain.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from .. import floor
from ..report import machine, machine_line
from ..roundtrips import Suite
from ..ways import FLOOR, Floor
from . import geometries, in_c, local, polling, readers, system_calls, tables

ROUNDS, SECONDS, TURNS = 7, 0.2, 20_000


class Report:
    """Prints tables as they are made, and keeps the figures."""

    def __init__(self, options: argparse.Namespace, baseline: Path) -> None:
        self.options = options
        self.baseline = baseline  # the compiled program
        self.figures: dict[str, Any] = {}
        self.failures: list[str] = []

    def exchanged(self, made: Sequence[tables.Table]) -> None:
        """Measure tables of ways between two processes."""
        for table in made:
            for row in table.rows:
                if reason := row.way.missing():
                    print(f"left out: {row.way.name}: {reason}", file=sys.stderr)
            suite = Suite(
                [row.way for row in table.rows if not row.way.missing()],
                trips=self.options.turns,
                seconds=self.options.seconds,
                rounds=self.options.rounds,
                news=sys.stderr,
            )
            lines = tables.figures(table, suite.run(table.setup))
            self.failures += suite.failures
            self.figures[table.title] = lines
            print(tables.markdown(table, lines), end="\n\n", flush=True)

    def in_turn(
        self,
        title: str,
        made: Callable[[], AbstractContextManager[dict[str, local.Round]]],
        floors: dict[str, str],
        aims: dict[str, float],
    ) -> None:
        """Measure rows within this process."""
        with made() as rows, local.pinned():
            found: dict[str, list[float]] = {name: [] for name in rows}
            for each in rows.values():
                each()
            for _ in range(self.options.rounds):
                for name, each in rows.items():
                    found[name].append(each())
        self._simple(title, found, floors, aims)

    def _simple(
        self,
        title: str,
        found: dict[str, list[float]],
        floors: dict[str, str],
        aims: dict[str, float],
    ) -> None:
        self.figures[title] = found
        print(
            f"**{title}**\n\n| | ns, median | least | ratio | to | aim |\n|---|---|---|---|---|---|"
        )
        for name, values in found.items():
            to = floors.get(name, "")
            ratios = [a / b for a, b in zip(values, found[to], strict=True)] if to else []
            ratio = f"{statistics.median(ratios):.2f}" if to else ""
            aim = f"{aims[name]:g}" if name in aims else ""
            print(
                f"| {name} | {tables.short(statistics.median(values))} |"
                f" {tables.short(min(values))} | {ratio} | {to} | {aim} |"
            )
        print(flush=True)

    # -- the tables --------------------------------------------------------------------------------

    def streams(self) -> None:
        self.exchanged(tables.streams())
        nothing = local.empty_call()
        self.figures["a call that does nothing"] = nothing
        print(f"A loop around `len(data)`, which does nothing: {nothing:.0f} ns a call.\n")

    def spinning(self) -> None:
        self.exchanged(tables.round_trips())

    def sleeping(self) -> None:
        gently = Floor("C: eventfd, ring that never waits", "gently", self.baseline)
        self.exchanged(tables.sleeping(Floor(FLOOR, "block", self.baseline), gently))

    def loops(self) -> None:
        self.exchanged(tables.event_loops())

    def large(self) -> None:
        self.exchanged(tables.large())

    def copies(self) -> None:
        once, twice = "C: one memcpy", "C: two memcpy"
        self.in_turn(
            "1 MiB, both ends in one process",
            local.copies,
            {"put, get_into": twice, "put, view": once, "put, get as bytes": twice},
            {"put, get_into": 1.05, "put, view": 1.05},
        )

    def loans(self) -> None:
        names = [f"loan, publish, view of {size}" for size in local.LOANED]
        ring = "ring of a doorbell"
        self.in_turn(
            "Loans, both ends in one process",
            local.loans,
            dict.fromkeys(names, ring),
            dict.fromkeys(names, 10.0),
        )

    def readers(self) -> None:
        found: dict[str, list[float]] = {}
        least: dict[str, list[int]] = {}
        with readers.crowd() as crowd:
            for _ in range(self.options.rounds):
                for count in readers.READERS:
                    name = f"put, {count} reader{'s' if count > 1 else ''}"
                    took, read = crowd.round(count, 2 * self.options.messages)
                    found.setdefault(name, []).append(took)
                    least.setdefault(name, []).append(read)
        first, *others = found
        self._simple(
            "A writer alone on a core, readers that overwrite on another",
            found,
            dict.fromkeys(others, first),
            dict.fromkeys(others, 1.25),
        )
        for name, counts in least.items():
            print(f"{name}: each reader read at least {min(counts)} messages of a round.")
            if min(counts) <= readers.SLOTS:
                self.failures.append(f"{name}: a reader read nothing during a round")
                print(f"failed: {self.failures[-1]}", file=sys.stderr)
        print(flush=True)

    def calls(self) -> None:
        found = system_calls.count(self.options.messages)
        self.figures["system calls"] = found
        said = ", ".join(f"{name} {calls}" for name, calls in sorted(found.items()))
        print(
            f"**System calls for {self.options.messages:,} streamed messages**: "
            f"{sum(found.values())} of both ends with all their threads (aim 100): {said}.\n"
        )

    def memory(self) -> None:
        found = geometries.used()
        self.figures["memory"] = [one._asdict() for one in found]
        print("**Memory**\n\n| | payload | size | touched |\n|---|---|---|---|")
        for one in found:
            print(f"| `{one.words}` | {one.payload} | {one.size} | {one.touched} |")
        print(flush=True)

    def polling(self) -> None:
        found = polling.waited()
        self.figures["polling"] = found
        print("**Without interrupts**\n\n| | |\n|---|---|")
        for name, figure in found.items():
            shown = f"{figure:.2%}" if name.endswith("core") else f"{figure * 1e6:.0f} µs"
            print(f"| {name.removesuffix(' seconds')} | {shown} |")
        print(flush=True)


TABLES = (
    *("streams", "spinning", "sleeping", "loops", "large"),
    *("copies", "loans", "readers", "calls", "memory", "polling"),
)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.channels", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of each way ({ROUNDS})")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help=f"for a way in a round ({SECONDS:g})"
    )
    parser.add_argument("--turns", type=int, default=TURNS, help=f"in a round, at most ({TURNS})")
    parser.add_argument(
        "--messages",
        type=int,
        default=system_calls.MESSAGES,
        help=f"of calls; half of those of a round of readers ({system_calls.MESSAGES})",
    )
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args(words)
    for name in options.tables:
        if name not in TABLES:
            parser.error(f"no table {name!r}: {', '.join(TABLES)}")
    print(machine_line(machine()), end="\n\n", flush=True)
    with tempfile.TemporaryDirectory(prefix="ivb") as directory:
        program = Path(directory) / "baseline"
        try:
            floor.build("baseline.c", program)
            in_c.InC.program = Path(directory) / "channel"
            in_c.build(in_c.InC.program)
            report = Report(options, program)
            for name in options.tables or TABLES:
                getattr(report, name)()
        except (OSError, floor.NoCompiler, system_calls.NoStrace) as error:
            print(f"bench: {error}", file=sys.stderr)
            return 1
    if options.json:
        options.json.write_text(json.dumps(report.figures, indent=1) + "\n")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
