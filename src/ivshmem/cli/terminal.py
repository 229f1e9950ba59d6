"""What standard output is: how wide, and whether colours may go there.

Knows: terminals, and the variables by which people say what they want. Does not know: what is
printed.
"""

from __future__ import annotations

import os
import shutil
import sys


def columns() -> int | None:
    """Return how wide the terminal is; None: it is none, and lines are as long as they are."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def coloured() -> bool:
    """Say whether text may be coloured (no-color.org; CLICOLOR=0 says the same)."""
    wanted = not os.environ.get("NO_COLOR") and os.environ.get("CLICOLOR") != "0"
    return wanted and os.environ.get("TERM") != "dumb" and sys.stdout.isatty()
