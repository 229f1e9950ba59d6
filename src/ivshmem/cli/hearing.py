"""The package's log, given to what writes lines.

Knows: logging. Does not know: where the lines go. It is a module of its own because a server
listens before it imports logging.
"""

from __future__ import annotations

import logging

from ..server import log_events
from ..system.uncopied import Uncopied
from ..text import paragraph, plain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Protocol

    class Writer(Protocol):
        """What writes lines, as log_writer.LogWriter does."""

        def tell_logged(
            self, when: float, level: int, text: str, fields: Mapping[str, object]
        ) -> None: ...


class Handler(Uncopied, logging.Handler):
    """Gives lines of the log to a writer."""

    def __init__(self, writer: Writer, level: int) -> None:
        super().__init__(level)
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        fields = log_events.fields_of(record)
        self._writer.tell_logged(record.created, record.levelno, _text(record), fields)


def hear(writer: Writer, level: int) -> logging.Handler:
    """Have the package's log, from `level` on, told by `writer`, until the handler is removed."""
    handler = Handler(writer, level)
    logger = logging.getLogger("ivshmem")
    logger.addHandler(handler)
    logger.setLevel(level)
    return handler


def _text(record: logging.LogRecord) -> str:
    """The message on one line, and a traceback below it, which cannot be taken for messages."""
    text = plain(record.getMessage())
    if not record.exc_info:
        return text
    return paragraph(f"{text}\n{logging.Formatter().formatException(record.exc_info)}")
