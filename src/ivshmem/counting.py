"""One and many, in words.

Knows: the regular plural of an English noun. Does not know: what is counted.
"""

from __future__ import annotations


def counted(number: float, what: str) -> str:
    """Say how many there are of something: 1 peer, 0 peers, 2.5 seconds."""
    shown = str(number) if isinstance(number, int) else f"{number:g}"
    return f"{shown} {what}" if number == 1 else f"{shown} {what}s"
