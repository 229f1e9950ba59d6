"""Which cores the two ends of a measurement run on.

Knows: affinity. Does not know: what runs.
"""

from __future__ import annotations

import os
from typing import Literal, get_args

# Both ends on one core, each on a core of its own, or wherever the kernel puts them.
Pinning = Literal["same", "two", "free"]
PINNINGS: tuple[Pinning, ...] = get_args(Pinning)


def usable_cores() -> list[int]:
    """Those that this process may use."""
    return sorted(os.sched_getaffinity(0))


def cores_for(pinning: Pinning) -> tuple[set[int], set[int]]:
    """The cores of the one end and those of the other, out of those this process may use.

    Raises:
        ValueError: "two" with only one core.
    """
    usable = usable_cores()
    if pinning == "free":
        return set(usable), set(usable)
    if pinning == "same":
        return {usable[-1]}, {usable[-1]}
    if len(usable) < 2:
        raise ValueError("two cores are needed, and this process may use only one (taskset)")
    return {usable[0]}, {usable[-1]}
