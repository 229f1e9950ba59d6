"""How far a long measurement is: a bar on a terminal, plain lines elsewhere.

Knows: terminals. Does not know: what is measured.
"""

from __future__ import annotations

import os
import shutil
from typing import TextIO

from .tables import cut

_WIDTH = 24  # of the bar, in columns


class ProgressBar:
    """Shows on `stream` what share is done, and of what; a context manager, that wipes the bar.

    Args:
        quiet: show nothing.
    """

    def __init__(self, stream: TextIO, *, quiet: bool = False) -> None:
        self._stream = stream
        self._quiet = quiet
        self._bar = stream.isatty() and os.environ.get("TERM") != "dumb"
        self._drawn = False
        self._before = ""

    def show(self, share: float, what: str) -> None:
        """`share` (0 to 1) is done, and now comes `what`."""
        if self._quiet:
            return
        if self._bar:
            full = round(_WIDTH * min(share, 1))
            line = f"[{'#' * full}{'.' * (_WIDTH - full)}] {share:4.0%}  {what}"
            columns = shutil.get_terminal_size().columns
            self._stream.write(f"\r{cut(line, columns - 1)}\033[K")
            self._drawn = True
        elif what != self._before:
            self._stream.write(f"{share:4.0%}  {what}\n")
        self._before = what
        self._stream.flush()

    def wipe(self) -> None:
        """Make room for other lines."""
        if self._drawn:
            self._stream.write("\r\033[K")
            self._stream.flush()
            self._drawn = False

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *error: object) -> None:
        self.wipe()
