"""Many latencies, and what to say about them.

Knows: percentiles. Does not know: what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

PERCENTILES = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "p99.9": 99.9, "max": 100.0}


class Sample:
    """Latencies in nanoseconds, in ascending order.

    Raises:
        ValueError: there are none.
    """

    __slots__ = ("nanoseconds",)

    def __init__(self, nanoseconds: Iterable[int]) -> None:
        self.nanoseconds = sorted(nanoseconds)
        if not self.nanoseconds:
            raise ValueError("nothing was measured")

    def __len__(self) -> int:
        return len(self.nanoseconds)

    def percentile(self, percent: float) -> int:
        """The least latency that `percent` of all (0 to 100) do not exceed, by nearest rank."""
        rank = math.ceil(len(self) * percent / 100)
        return self.nanoseconds[max(rank, 1) - 1]

    def summary(self) -> dict[str, int]:
        """Nanoseconds by the names in PERCENTILES."""
        return {name: self.percentile(percent) for name, percent in PERCENTILES.items()}
