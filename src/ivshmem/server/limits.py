"""How long messages are held back. It stands here so that a command line is read at once."""

from __future__ import annotations

LINGER = 60.0  # seconds that a peer's messages are held after the one who asked for that is gone
LONGEST_LINGER = 1e6  # seconds that a hold may be asked for
