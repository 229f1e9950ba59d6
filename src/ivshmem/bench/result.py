"""What was measured in the same rounds, and how it compares.

Knows: rounds, ratios, which rounds count. Does not know: how anything is measured, how it is shown.
"""

from __future__ import annotations

import platform
import statistics
import time
from array import array
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

from .cores import usable_cores
from .noise import Noise
from .percentiles import Sample

ROUNDS = 7  # at most


@dataclass
class Result:
    """One thing that was measured, a few times.

    Attributes:
        what: its name in tables.
        size: bytes that each duration is about; 0: it is not about bytes.
        rounds: durations in nanoseconds.
        noises: of each round, which processes disturbed it.
    """

    what: str
    size: int = 0
    rounds: list[array[int]] = field(default_factory=list)
    noises: list[Noise] = field(default_factory=list)

    def add(self, durations: array[int], noise: Noise) -> None:
        """One more round."""
        self.rounds.append(durations)
        self.noises.append(noise)

    @property
    def spoilt(self) -> bool:
        """Whether every round was disturbed: then the disturbed ones count."""
        return all(noise.spoilt for noise in self.noises)

    def sample(self) -> Sample:
        """The durations of all rounds that count."""
        return Sample(
            duration
            for durations, noise in zip(self.rounds, self.noises, strict=True)
            if self.spoilt or not noise.spoilt
            for duration in durations
        )

    def ratio(self, yardstick: Result) -> float:
        """How many times the yardstick's p50 this one's is: the median of rounds that both share.

        Each round's is taken on its own, since the machine's speed changes from one to the next.
        """
        ratios = [
            (
                mine.spoilt or its.spoilt,
                statistics.median(here) / max(statistics.median(there), 1),
            )
            for here, there, mine, its in zip(
                self.rounds, yardstick.rounds, self.noises, yardstick.noises, strict=True
            )
        ]
        quiet = [ratio for spoilt, ratio in ratios if not spoilt]
        return statistics.median(quiet or [ratio for _, ratio in ratios])

    def summary(self, yardstick: Result | None) -> dict[str, Any]:
        """For a program to read."""
        sample = self.sample()
        values: dict[str, Any] = {
            "what": self.what,
            "count": len(sample),
            "nanoseconds": sample.summary(),
            "ratio": None if yardstick is None else round(self.ratio(yardstick), 4),
            "rounds": len(self.rounds),
            "spoilt_rounds": sum(noise.spoilt for noise in self.noises),
        }
        if self.size:
            values["bytes"] = self.size
            values["gigabytes_per_second"] = round(self.size / max(sample.percentile(50), 1), 3)
        return values


@dataclass
class ResultGroup:
    """What was measured in the same seconds.

    Attributes:
        results: (name of the yardstick among them, or None; the result).
        note: why something is not here.
    """

    title: str
    results: list[tuple[Result | None, Result]] = field(default_factory=list)
    note: str = ""

    def add(self, what: str, yardstick: Result | None = None, size: int = 0) -> Result:
        """A new result, to be filled."""
        result = Result(what, size)
        self.results.append((yardstick, result))
        return result

    def noises(self) -> Iterator[Noise]:
        for _, result in self.results:
            yield from result.noises

    def summary(self) -> dict[str, Any]:
        """For a program to read."""
        return {
            "title": self.title,
            "results": [
                {**result.summary(yardstick), "yardstick": yardstick.what if yardstick else None}
                for yardstick, result in self.results
            ],
            "note": self.note or None,
        }


# What measures a group yields after each step what share of all is over, and the group so far. If
# it is not exhausted it has to be closed, since it may have started processes.
Measuring: TypeAlias = Generator[tuple[float, ResultGroup], None, None]


def turns(seconds: float) -> Iterator[float]:
    """Rounds, until another one would take longer than that; at least one.

    Yields at the beginning of each what share of all is over.
    """
    start = time.monotonic()
    for turn in range(ROUNDS):
        elapsed = time.monotonic() - start
        if turn and elapsed + elapsed / turn > seconds:
            return
        yield turn / ROUNDS


def disturbers(groups: list[ResultGroup]) -> list[tuple[str, float]]:
    """The processes that spoilt rounds, and the most that each took of a core; the worst first."""
    worst: dict[str, float] = {}
    for group in groups:
        for noise in group.noises():
            for culprit in noise.culprits if noise.spoilt else ():
                worst[culprit.who] = max(worst.get(culprit.who, 0), culprit.share)
    return sorted(worst.items(), key=lambda each: -each[1])


def machine() -> dict[str, Any]:
    """Where this is measured."""
    return {
        "kernel": platform.release(),
        "processor": _processor(),
        "cores": len(usable_cores()),
        "python": platform.python_version(),
        "ivshmem": version("ivshmem"),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":  # arm64 has none
            return value.strip()
    return platform.machine()
