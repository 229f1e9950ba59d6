"""How far a long piece of work is: a bar on a terminal, plain lines elsewhere.

Knows: terminals. Does not know: what is done.

Invariant: the work never waits for whoever reads (writing.py).
"""

from __future__ import annotations

import os
import shutil
from typing import TextIO

from ..system.uncopied import Uncopied
from .tables import cut
from .writing import Aside

_WIDTH = 24  # of the bar, in columns


class ProgressBar(Uncopied):
    """Shows on `stream` what share is done, and of what; a context manager, that wipes the bar.

    Args:
        quiet: show nothing.
    """

    def __init__(self, stream: TextIO, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._bar = stream.isatty() and os.environ.get("TERM") != "dumb"
        self._out = Aside(stream)
        self._drawn = False
        self._before = ""

    def show(self, share: float | None, what: str) -> None:
        """`share` (0 to 1) is done, and now comes `what`; None: nobody knows how much there is."""
        if self._quiet:
            return
        if self._bar:
            bar = ""
            if share is not None:
                full = round(_WIDTH * min(share, 1))
                bar = f"[{'#' * full}{'.' * (_WIDTH - full)}] {share:4.0%}  "
            columns = shutil.get_terminal_size().columns
            line = cut(f"{bar}{what}", columns - 1)
            self._out.write(f"\r{line}\033[K", passing=True)
            self._drawn = True
        elif what != self._before:
            self._out.write(f"{'' if share is None else f'{share:4.0%}  '}{what}\n")
        self._before = what

    def say(self, line: str) -> None:
        """Write a line of its own, also if quiet."""
        self._clear()
        self._out.write(f"{line}\n")

    def wipe(self) -> None:
        """Make room for other lines; wait for that, but no longer than a second."""
        self._clear()
        self._out.settle()

    def _clear(self) -> None:
        if self._drawn:
            self._out.write("\r\033[K", passing=True)
            self._drawn = False

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *error: object) -> None:
        self.wipe()
        self._out.close()
