"""Lines of the log: as JSON for programs, as text for people.

Knows: logging.Formatter. Does not know: where lines go. It is a module of its own because a server
listens before it imports logging.
"""

from __future__ import annotations

import logging

from ..text import paragraph, plain
from .log_events import fields_of, json_line

_PEERS = frozenset({"joined", "left"})


class JsonFormatter(logging.Formatter):
    """Formats a record as a JSON object on one line, as `ivshmem serve --log-format json` does.

    A program that embeds a server gives it to any handler of its own:

        handler = logging.StreamHandler()
        handler.setFormatter(ivshmem.JsonFormatter())
        logging.getLogger("ivshmem").addHandler(handler)

    Each object has "time" (UTC), "level", "event" and "text", and the fields of its event: the peer
    that joined, for instance. The reference lists the events (docs/reference/log-events.md).
    Records of other loggers have the event "log". A traceback is a part of "text". What is not
    printable is escaped, so that no line can be taken for two.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without an end."""
        return json_line(record.created, record.levelno, text_of(record), fields_of(record))


class TextFormatter(logging.Formatter):
    """Formats a record as `ivshmem serve` does by default."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; the lines of a traceback follow it, indented."""
        text = text_of(record)
        return text if fields_of(record)["event"] in _PEERS else f"ivshmem: {text}"


def text_of(record: logging.LogRecord) -> str:
    """The message on one line, and a traceback below it, which cannot be taken for messages."""
    text = plain(record.getMessage())
    if not record.exc_info:
        return text
    return paragraph(f"{text}\n{logging.Formatter().formatException(record.exc_info)}")
