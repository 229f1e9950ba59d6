"""The package's log, as News writes it.

Knows: logging. Does not know: where the lines go. It is a module of its own because a server
listens before it imports logging.
"""

from __future__ import annotations

import logging

from ..server import log_events
from ..system.text import paragraph, plain
from ..system.uncopied import Uncopied

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .log_writer import LogWriter


class Handler(Uncopied, logging.Handler):
    """Gives lines of the log to `news`."""

    def __init__(self, news: LogWriter, level: int) -> None:
        super().__init__(level)
        self._news = news

    def emit(self, record: logging.LogRecord) -> None:
        fields = log_events.fields_of(record)
        self._news.tell_logged(record.created, record.levelno, _text(record), fields)


def hear(news: LogWriter, level: int) -> logging.Handler:
    """Have the package's log, from `level` on, told by `news`, until the handler is removed."""
    handler = Handler(news, level)
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
