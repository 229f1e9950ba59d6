"""The tables: which rows stand together, what each is compared with, and what was aimed at.

Knows: rows, ratios, aims, Markdown. Does not know: how a row is measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ivshmem.bench.percentiles import Sample
from ivshmem.bench.roundtrip import Measured

from ..report import counted
from ..ways import FLOOR, Floor, Way
from . import in_c, loops, ours, peers
from .exchange import Exchange

STREAM, SLOW_STREAM = 9600, 960  # messages in a turn


@dataclass(frozen=True)
class Row:
    """A way in a table.

    Attributes:
        way: which.
        like: the label of the row that it is compared with; "": none.
        aim: the ratio that it is meant to reach at most; None: none.
        each: messages of a turn, by which durations are divided.
    """

    way: Way
    like: str = ""
    aim: float | None = None
    each: int = 1

    @property
    def settings(self) -> str:
        return str(getattr(self.way, "settings", ""))


@dataclass(frozen=True)
class Table:
    """Rows that are measured in turn.

    Attributes:
        setup: how their ends are pinned: "two" or "same".
        latency: whether each duration is told of by percentiles, in microseconds; else
            nanoseconds of a message are told.
    """

    title: str
    setup: str
    rows: Sequence[Row]
    latency: bool


def _exchanges(
    kinds: Sequence[type[Exchange]], like: str, aims: dict[str, float], **sizes: int
) -> list[Row]:
    each = sizes.get("count", 1)
    return [Row(kind(**sizes), like, aims.get(kind.label), each) for kind in kinds]


_RING, _HEADER, _PUT_GET = in_c.Ring.label, in_c.Header.label, ours.PutGet.label


def streams() -> list[Table]:
    """64 bytes, as many as the reader takes."""
    rows = [
        *_exchanges([in_c.Ring], "", {}, count=STREAM),
        *_exchanges([in_c.Header], _RING, {_HEADER: 2}, count=STREAM),
        *_exchanges(
            [ours.PutGet, ours.Rows, ours.Lists],
            _HEADER,
            {_PUT_GET: 3.5, ours.Rows.label: 1.5},
            count=STREAM,
        ),
        *_exchanges(
            [
                *(peers.Tachyon, peers.TachyonBatches, peers.IceoryxMessages, peers.Zmq),
                *(peers.Pipe, peers.SimpleQueue, peers.Zenoh),
            ],
            _PUT_GET,
            {},
            count=SLOW_STREAM,
        ),
    ]
    return [Table("Streams of 64 B", "two", rows, latency=False)]


def round_trips() -> list[Table]:
    """64 bytes there and back, spinning where a library can."""
    rows = [
        *_exchanges([in_c.Ring], "", {}),
        *_exchanges([in_c.Header], _RING, {}),
        *_exchanges([ours.PutGet], _HEADER, {_PUT_GET: 2}),
        *_exchanges([peers.Tachyon, peers.IceoryxMessages], _PUT_GET, {}),
    ]
    return [Table("Round trips of 64 B, spinning", "two", rows, latency=True)]


def sleeping(baseline: Floor, gently: Floor) -> list[Table]:
    """64 bytes there and back; both ends sleep.

    Args:
        baseline: the floor in C.
        gently: the same in C with a ring that never waits, as a channel's does.
    """
    aims = {"two": 1.1, "same": 1.3}
    return [
        Table(
            f"Round trips of 64 B, sleeping, {_SAID[setup]}",
            setup,
            [
                Row(baseline),
                Row(gently, FLOOR),
                Row(ours.Blocking(), FLOOR, aims[setup]),
                Row(ours.Adaptive(), FLOOR, aims[setup]),
                *(Row(kind(), FLOOR) for kind in _SLEEPERS),
            ],
            latency=True,
        )
        for setup in ("two", "same")
    ]


_SAID = {"two": "each end on a core of its own", "same": "both ends on one core"}
_SLEEPERS = (peers.Zmq, peers.Pipe, peers.SimpleQueue, peers.Zenoh)


def event_loops() -> list[Table]:
    """64 bytes there and back, in event loops."""
    return [
        Table(
            f"Round trips of 64 B in event loops, {_SAID[setup]}",
            setup,
            [
                row
                for loop in loops.present()
                for floor in [loops.Bare(loop)]
                for row in (
                    Row(floor),
                    Row(loops.Gently(loop), floor.name),
                    Row(loops.Awaited(loop), floor.name, 1.3),
                )
            ],
            latency=True,
        )
        for setup in ("two", "same")
    ]


def large() -> list[Table]:
    """1 MiB there, and a short answer, one after the other."""
    rows = [
        *_exchanges([in_c.Ring], "", {}, size=1 << 20),
        *_exchanges(
            [in_c.Header, ours.PutInto, ours.PutView, ours.PutGet], _RING, {}, size=1 << 20
        ),
        *_exchanges(
            [peers.Tachyon, peers.IceoryxMessages, peers.Zmq, peers.Pipe, peers.Zenoh],
            _RING,
            {},
            size=1 << 20,
        ),
    ]
    return [Table("1 MiB there, 64 B back, between two cores", "two", rows, latency=True)]


# -- figures ---------------------------------------------------------------------------------------

Figures = dict[str, Any]


def figures(table: Table, measured: dict[str, list[Measured]]) -> list[Figures]:
    """What each row came to; rows that could not be measured are missing."""
    found = []
    each = {row.way.name: row.each for row in table.rows}
    for row in table.rows:
        name = row.way.name
        if name not in measured:
            continue
        others = measured.get(row.like, measured[name])
        numbers = counted(measured[name], others)
        sample = Sample(d for i in numbers for d in measured[name][i].durations)
        medians = [Sample(measured[name][i].durations).percentile(50) / row.each for i in numbers]
        line: Figures = {
            "way": name,
            "settings": row.settings,
            "ns": {p: sample.percentile(at) / row.each for p, at in _PERCENTILES.items()},
            "median": statistics.median(medians),  # of the rounds; a quick one has more turns
            "least": min(medians),
            "rounds": len(measured[name]),
            "counted": len(numbers),
        }
        if row.like in measured:
            floors = [Sample(others[i].durations).percentile(50) / each[row.like] for i in numbers]
            line["to"] = row.like
            line["ratio"] = statistics.median(a / b for a, b in zip(medians, floors, strict=True))
            line["aim"] = row.aim
        found.append(line)
    return found


_PERCENTILES = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "p99.9": 99.9}


def markdown(table: Table, lines: Sequence[Figures]) -> str:
    """The table, and what settings its rows have."""
    latency = table.latency
    columns = [*_PERCENTILES] if latency else ["ns, median", "least"]
    said = [f"**{table.title}**{', in microseconds' if latency else ''}", ""]
    said += [f"| way | {' | '.join(columns)} | ratio | to | aim | rounds | settings |"]
    said += ["|---" * (len(columns) + 6) + "|"]
    for line in lines:
        if latency:
            values = [short(line["ns"][name] / 1000) for name in _PERCENTILES]
        else:
            values = [short(line["median"]), short(line["least"])]
        ratio = f"{line['ratio']:.2f}" if "ratio" in line else ""
        aim = f"{line['aim']:g}" if line.get("aim") else ""
        cells = [line["way"], *values, ratio, line.get("to", ""), aim]
        cells += [f"{line['counted']} of {line['rounds']}", line["settings"]]
        said.append(f"| {' | '.join(cells)} |")
    return "\n".join(said)


def short(number: float) -> str:
    return f"{number:.2f}" if number < 10 else f"{number:.0f}"
