"""Time limits as callers give them: seconds, or None for no limit.

Knows: which values are refused. Does not know: what is waited for.
"""

from __future__ import annotations

import time


def seconds_of(timeout: float) -> float:
    """Return a time limit as a float; whatever float() takes is one, a Decimal for instance.

    Raises:
        ValueError: it is not a number. No time is later than that, so nothing would ever end.
        TypeError: it is text, which float() would take, or no number at all.
    """
    refused = f"timeout: seconds are a number, not {timeout!r}"
    if isinstance(timeout, str | bytes):
        raise TypeError(refused)
    try:
        seconds = float(timeout)
    except TypeError:
        raise TypeError(refused) from None
    if seconds != seconds:
        raise ValueError("timeout is not a number")
    return seconds


def deadline_of(timeout: float | None) -> float | None:
    """Return when `timeout` seconds are over, by time.monotonic(); None: never.

    Raises:
        ValueError, TypeError: as of seconds_of.
    """
    return None if timeout is None else time.monotonic() + seconds_of(timeout)


def left_until(deadline: float) -> float:
    """Return the seconds until `deadline`, by time.monotonic(); never less than 0."""
    return max(deadline - time.monotonic(), 0.0)
