"""The module logging, imported when the first line is written.

Knows: loggers by name, levels. Does not know: what is logged.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

TYPE_CHECKING = False
if TYPE_CHECKING:
    import logging
    from types import ModuleType
    from typing import Any

# The levels as logging numbers them, and what programs are told.
DEBUG, INFO, WARNING, ERROR = 10, 20, 30, 40
LEVELS = {DEBUG: "debug", INFO: "info", WARNING: "warning", ERROR: "error", 50: "critical"}


def log_of(name: str) -> logging.Logger:
    """The logger of that name, as `logging.getLogger` has it; `logging` is not imported yet."""
    return _Log(name)  # type: ignore[return-value]


class _Log:
    """Finds what a logger has when it is wanted: a line names the function that wrote it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(load().getLogger(self._name), attribute)


_to_do: list[Callable[[], object]] = []


def load() -> ModuleType:
    """Import `logging`, and call what waits for that.

    To be called as soon as there is time for it. A line can tell that no descriptor is left, and
    then no module can be read.
    """
    import logging  # here: that it comes late is what this module is for

    while _to_do:
        _to_do.pop()()
    return logging


def when_loaded(act: Callable[[], object]) -> None:
    """Call `act` before the first line of the log; now, if a program has imported `logging`."""
    _to_do.append(act)
    if "logging" in sys.modules:
        load()


def no_more(act: Callable[[], object]) -> None:
    """Undo `when_loaded`, if it has not called `act` yet."""
    if act in _to_do:
        _to_do.remove(act)
