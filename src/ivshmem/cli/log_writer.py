"""What a server has to say to a person or a log, without ever waiting for a reader.

Knows: a stream that may be full or gone; lines for people, and JSON for programs. Does not know:
what events there are (log_events.py lists them).

Invariants:
1. Nothing here writes through a buffered stream of Python's: a thread that is stuck in such a
   write holds the stream's lock, for which the interpreter waits at its exit.
2. Only threads that the exit does not wait for write to what may block.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque

from ..lasting import supervisor
from ..server import log_events
from ..system import late_logging
from ..system.uncopied import Uncopied
from ..text import counted, paragraph, plain

TYPE_CHECKING = False
if TYPE_CHECKING:
    import logging
    from collections.abc import Mapping
    from typing import TextIO

    from ..server.report import Peer

_LINES = 1000  # kept for a reader that does not read
_SECONDS = 1.0  # that the end waits for one


class LogWriter(Uncopied):
    """Writes lines to the descriptor of `stream` by a thread of its own; a context manager.

    A terminal that was stopped with Ctrl-S, or a pipe that nobody reads, costs lines and not the
    server's time; how many were lost is said when the reader is back. The package's log, from
    `level` on, comes here, too, from its first line on.

    Args:
        form: "text", or "json": an object on each line, which log_events.py explains.
    """

    def __init__(self, stream: TextIO, level: int, form: str = "text") -> None:
        self._level = level
        self._fd = stream.fileno()
        self._json = form == "json"
        self._lines: deque[str] = deque()
        self._lost = 0
        self._changed = threading.Condition()
        self._ended = False
        self._handler: logging.Handler | None = None
        self._thread = threading.Thread(target=self._write, name="ivshmem-news", daemon=True)

    def tell(self, line: str, event: str = log_events.DEFAULT_EVENT, **fields: object) -> None:
        """Write a line some time soon: this one for people, the event and its fields as JSON."""
        line = plain(line)
        if self._json:
            found = log_events.fields_in(log_events.fields(event, **fields))
            line = json_line(time.time(), late_logging.INFO, line, found)
        self._put(line)

    def tell_logged(self, when: float, level: int, text: str, fields: Mapping[str, object]) -> None:
        """Write a line of the log; `text` is plain, or a paragraph."""
        if self._json:
            self._put(json_line(when, level, text, fields))
        else:
            self._put(f"ivshmem: {text}")

    def _put(self, line: str) -> None:
        with self._changed:
            if len(self._lines) < _LINES:
                self._lines.append(line)
                self._changed.notify()
            else:
                self._lost += 1

    def _write(self) -> None:
        while True:
            with self._changed:
                while not self._lines and not self._ended:
                    self._changed.wait()
                if not self._lines:
                    return
                line = self._lines.popleft()
                lost, self._lost = self._lost, 0
            if lost:
                line = f"{self._missing(lost)}\n{line}"
            with contextlib.suppress(OSError):  # nobody reads any more
                write_all(self._fd, line)

    def _missing(self, lines: int) -> str:
        text = f"{lines} lines were lost: stderr was not read"
        if not self._json:
            return f"ivshmem: {text}"
        return json_line(time.time(), late_logging.WARNING, text, {"event": "lost", "lines": lines})

    def __enter__(self) -> LogWriter:
        late_logging.when_loaded(self._hear)
        self._thread.start()
        return self

    def _hear(self) -> None:
        from .hearing import hear  # here, since it imports logging

        self._handler = hear(self, self._level)

    def __exit__(self, *error: object) -> None:
        late_logging.no_more(self._hear)
        if self._handler is not None:
            late_logging.load().getLogger("ivshmem").removeHandler(self._handler)
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._thread.join(_SECONDS)


def write_all(fd: int, text: str, end: str = "\n") -> None:
    """Write a text and its end to a descriptor; for as long as it takes.

    Raises:
        OSError: as of write(2).
    """
    data = memoryview((text + end).encode(errors="backslashreplace"))
    while data:
        try:
            data = data[os.write(fd, data) :]
        except BlockingIOError:  # another process has made it so
            time.sleep(0.05)


def show(text: str, fd: int = 1, end: str = "\n") -> None:
    """Write a text to a descriptor, and wait for its reader no longer than a second.

    Raises:
        OSError: as of write(2).
    """
    errors: list[OSError] = []

    def write() -> None:
        try:
            write_all(fd, text, end)
        except OSError as error:
            errors.append(error)

    thread = threading.Thread(target=write, name="ivshmem-show", daemon=True)
    thread.start()
    thread.join(_SECONDS)
    for error in errors:
        raise error


def say_as(form: str, text: str) -> None:
    """Write a line to stderr where there is no News, in the same form, if that is not to wait."""
    if form == "json":
        fields = log_events.fields_in({})
        supervisor.say(json_line(time.time(), late_logging.ERROR, paragraph(text[-2000:]), fields))
    else:
        supervisor.say(f"ivshmem: {text}")


def tell_peer(news: LogWriter, verb: str, peer: Peer, region: str = "") -> None:
    """Say that a peer "joined" or "left"; `region`: which one, where there are several."""
    vectors = counted(peer.vectors, "vector")
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
    import json  # here: most logs are for people

    moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(when))
    head = {
        "time": f"{moment}.{int(when * 1000) % 1000:03}Z",
        "level": late_logging.LEVELS.get(level, str(level)),
        **{
            name: plain(value) if isinstance(value, str) else value
            for name, value in fields.items()
        },
        "text": text,
    }
    return json.dumps(head, separators=(",", ":"), default=str)
