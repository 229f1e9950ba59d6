"""Rates of channels: computed from arrivals, or from positions.

Knows: means, intervals and windows, and their words. Does not know: where messages come from;
clocks.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from ..channel import ChannelInfo
from ..channel.info import POSITIONS
from ..errors import IvshmemError
from ..memory.sizes import roughly


class Arrivals:
    """What a thread notes, and another one reports.

    Args:
        window: how many arrivals count.
    """

    def __init__(self, window: int) -> None:
        self._arrivals: deque[tuple[float, int, int]] = deque(maxlen=window + 1)
        self._total = self._reported = self._lost = 0
        self.error: IvshmemError | None = None

    def add(self, when: float, size: int, lost: int) -> None:
        """Note a message of so many bytes, before which so many were lost."""
        self._arrivals.append((when, size, lost))
        self._total += 1
        self._lost += lost

    def report(self, _info: ChannelInfo, _now: float) -> dict[str, Any]:
        """Return the facts of the window; its rates are None if no message came since the last.

        Raises:
            IvshmemError: the thread ended by it.
        """
        if self.error is not None:
            raise self.error
        total, lost = self._total, self._lost
        arrivals = list(self._arrivals)
        fresh, self._reported = total != self._reported, total
        facts: dict[str, Any] = {"window": max(len(arrivals) - 1, 0), "lost": lost}
        seconds = arrivals[-1][0] - arrivals[0][0] if arrivals else 0.0
        sizes = [size for _, size, _ in arrivals]
        mean = sum(sizes) / len(sizes) if sizes else None
        rate = None
        if fresh and seconds > 0:
            rate = sum(1 + lost for _, _, lost in arrivals[1:]) / seconds
        intervals = [later[0] - sooner[0] for sooner, later in pairwise(arrivals) if not later[2]]
        facts.update(rate=rate, fresh=fresh)
        facts.update(_spread(intervals, ("min", "max", "std")))
        facts["bandwidth"] = None if rate is None or mean is None else rate * mean
        facts["size"] = {
            "mean": mean,
            "min": min(sizes, default=None),
            "max": max(sizes, default=None),
        }
        return facts


class Positions:
    """What is known of a channel whose messages are not taken."""

    def __init__(self) -> None:
        self._before: tuple[float, int, int] | None = None

    def report(self, info: ChannelInfo, now: float) -> dict[str, Any]:
        """Return the rates since the last report; None at the first."""
        before, self._before = self._before, (now, info.published, info.unfinished)
        facts: dict[str, Any] = {"rate": None, "done": None, "waiting": info.unfinished}
        if before is not None and now > before[0]:
            put = (info.published - before[1]) % POSITIONS
            done = max(put - (info.unfinished - before[2]), 0)
            facts.update(rate=put / (now - before[0]), done=done / (now - before[0]))
        return facts


def _spread(numbers: Sequence[float], names: tuple[str, str, str]) -> dict[str, Any]:
    if not numbers:
        return dict.fromkeys(names)
    mean = sum(numbers) / len(numbers)
    deviation = math.sqrt(sum((each - mean) ** 2 for each in numbers) / len(numbers))
    return dict(zip(names, (min(numbers), max(numbers), deviation), strict=True))


class Rates:
    """What passed through all channels of a region between two looks."""

    def __init__(self) -> None:
        self._before: dict[tuple[str, float], ChannelInfo] = {}
        self._looked = 0.0

    def next(self, found: Iterable[ChannelInfo], now: float) -> list[dict[str, Any]]:
        """Return what a table shows of each channel; rates are None where none is known yet."""
        before, self._before = self._before, {(info.name, info.created): info for info in found}
        seconds, self._looked = now - self._looked, now
        rows = []
        for key, info in self._before.items():
            earlier = before.get(key)
            rate = lost_rate = None
            if earlier is not None and seconds > 0 and info.kind != "bytes":
                rate = (info.published - earlier.published) % POSITIONS / seconds
                # A reader that left takes its count along.
                lost_rate = max(lost(info) - lost(earlier), 0) / seconds
            rows.append(
                {
                    "name": info.name,
                    "kind": info.kind,
                    "rate": rate,
                    "lost_rate": lost_rate,
                    "waiting": waiting(info),
                    "writers": info.connections if info.kind == "bytes" else len(info.writers),
                    "readers": len(info.readers),
                    "published": info.published,
                }
            )
        return rows


def waiting(info: ChannelInfo) -> int:
    """Return how many messages the slowest reader has yet to take, or a queue has."""
    return max([info.unfinished, *(reader.waiting for reader in info.readers)])


def lost(info: ChannelInfo) -> int:
    """Return how many messages were overwritten before the readers that are there took them."""
    return sum(reader.lost for reader in info.readers)


def rate_line(facts: dict[str, Any]) -> str:
    """Return one report as words: how often messages come."""
    if facts["rate"] is None:
        return "no new messages"
    line = per_second(facts["rate"])
    if "done" in facts:
        return f"{line}, {per_second(facts['done'])} done, {facts['waiting']} waiting"
    if facts["min"] is not None:
        line += (
            f", interval min {_interval(facts['min'])}, max {_interval(facts['max'])},"
            f" std dev {_interval(facts['std'])}"
        )
    return line + _window(facts)


def bandwidth_line(facts: dict[str, Any]) -> str:
    """Return one report as words: how many bytes come."""
    if facts["rate"] is None:
        return "no new messages"
    size = facts["size"]
    return (
        f"{roughly(round(facts['bandwidth']))}/s, {per_second(facts['rate'])}, message mean"
        f" {roughly(round(size['mean']))}, min {roughly(size['min'])}, max {roughly(size['max'])}"
        f"{_window(facts)}"
    )


def _window(facts: dict[str, Any]) -> str:
    lost_here = f", {facts['lost']} not seen" if facts["lost"] else ""
    return f", window {facts['window']}{lost_here}"


def per_second(rate: float) -> str:
    """Return a rate with three digits or more."""
    return f"{rate:.0f}/s" if rate >= 1000 else f"{rate:.3g}/s"


def _interval(seconds: float) -> str:
    """Return a time with its unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.4g} {unit}"
    return f"{seconds / 1e-6:.3g} us"
