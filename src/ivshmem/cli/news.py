"""What a server has to say to a person or a log, without ever waiting for a reader.

Knows: a stream that may be full or gone; lines for people, and JSON for programs. Does not know:
what events there are (logs.py lists them).
"""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import threading
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import TextIO

from .. import logs
from ..engine import Peer
from ..plain import paragraph, plain

_LINES = 1000  # kept for a reader that does not read
_SECONDS = 1.0  # that the end waits for one


class News(logging.Handler):
    """Writes lines to `stream` by a thread of its own; a context manager.

    A terminal that was stopped with Ctrl-S, or a pipe that nobody reads, costs lines and not the
    server's time; how many were lost is said when the reader is back. The package's log, from
    `level` on, comes here, too.

    Args:
        form: "text", or "json": an object on each line, which logs.py explains.
    """

    def __init__(self, stream: TextIO, level: int, form: str = "text") -> None:
        super().__init__(level)
        self._stream = stream
        self._json = form == "json"
        self._lines: queue.Queue[str | None] = queue.Queue(_LINES)
        self._lost = 0
        self._thread = threading.Thread(target=self._write, name="ivshmem-news", daemon=True)

    def tell(self, line: str, event: str = logs.DEFAULT_EVENT, **fields: object) -> None:
        """Write a line some time soon: this one for people, the event and its fields as JSON."""
        line = plain(line)
        if self._json:
            found = logs.fields_in(logs.fields(event, **fields))
            line = json_line(time.time(), logging.INFO, line, found)
        self._put(line)

    def emit(self, record: logging.LogRecord) -> None:
        text = self._text(record)
        if self._json:
            self._put(json_line(record.created, record.levelno, text, logs.fields_of(record)))
        else:
            self._put(f"ivshmem: {text}")

    def _text(self, record: logging.LogRecord) -> str:
        """The message on one line, and a traceback below it, which cannot be taken for messages."""
        text = plain(record.getMessage())
        if not record.exc_info:
            return text
        return paragraph(f"{text}\n{logging.Formatter().formatException(record.exc_info)}")

    def _put(self, line: str) -> None:
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._lost += 1

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            lost, self._lost = self._lost, 0
            with contextlib.suppress(OSError, ValueError):  # nobody reads any more
                if lost:
                    self._stream.write(f"{self._missing(lost)}\n")
                self._stream.write(f"{line}\n")
                self._stream.flush()

    def _missing(self, lines: int) -> str:
        text = f"{lines} lines were lost: nobody read them"
        if not self._json:
            return f"ivshmem: {text}"
        return json_line(time.time(), logging.WARNING, text, {"event": "lost", "lines": lines})

    def __enter__(self) -> News:
        logger = logging.getLogger("ivshmem")
        logger.addHandler(self)
        logger.setLevel(self.level)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        logging.getLogger("ivshmem").removeHandler(self)
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(None)
            self._thread.join(_SECONDS)


def tell_peer(news: News, verb: str, peer: Peer, region: str = "") -> None:
    """Say that a peer "joined" or "left"; `region`: which one, where there are several."""
    vectors = "1 vector" if peer.vectors == 1 else f"{peer.vectors} vectors"
    where = f"{region}: " if region else ""
    stayed = None if verb == "joined" else round(time.time() - peer.since, 3)
    news.tell(
        f"{where}peer {peer.id} {verb}: {peer.process} (pid {peer.pid}), {vectors}",
        verb,
        region=region,
        peer=peer.id,
        pid=peer.pid,
        uid=peer.uid,
        gid=peer.gid,
        process=peer.process,
        vectors=peer.vectors,
        since=peer.since,
        seconds=stayed,
    )


def json_line(when: float, level: int, text: str, fields: Mapping[str, object]) -> str:
    """A line for programs; its text may have several lines, a traceback for instance.

    JSON itself writes out whatever is not ASCII, but a program that reads it prints the text.
    """
    moment = datetime.fromtimestamp(when, timezone.utc).isoformat(timespec="milliseconds")
    head = {
        "time": moment.replace("+00:00", "Z"),
        "level": logging.getLevelName(level).lower(),
        **{
            name: plain(value) if isinstance(value, str) else value
            for name, value in fields.items()
        },
        "text": text,
    }
    return json.dumps(head, separators=(",", ":"), default=str)
