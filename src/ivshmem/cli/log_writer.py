"""What a server has to say to a person or a log, without ever waiting for a reader.

Knows: a stream that may be full or gone; what is said of a peer. Does not know: the form of a line
(server/log_formatters.py does), what events there are (log_events.py lists them).
"""

from __future__ import annotations

import contextlib
import time

from ..lasting import supervisor
from ..server import log_events
from ..system import late_logging
from ..system.uncopied import Uncopied
from ..text import counted, paragraph

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TextIO

    from ..server.report import Peer

_log = late_logging.log_of("ivshmem.serve")


class LogWriter(Uncopied):
    """Writes the package's log to the descriptor of `stream`, while its block runs.

    Lines go through a bounded queue to a thread (logging.handlers, see log_queue.py). A terminal
    that was stopped with Ctrl-S, or a pipe that nobody reads, costs lines and not the server's
    time; when the reader is back, a line says how many were lost. The queue is set up when the
    first line comes, or when `logging` is imported: a server listens before that.

    Args:
        level: the least that is written.
        form: "text", or "json": an object on each line, which log_events.py explains.
    """

    def __init__(self, stream: TextIO, level: int, form: str = "text") -> None:
        self._level = level
        self._fd = stream.fileno()
        self._form = form
        self._undo = contextlib.ExitStack()

    def _begin(self) -> None:
        from .log_queue import queued  # here, since it imports logging

        self._undo.enter_context(queued(self._fd, self._level, self._form))

    def __enter__(self) -> LogWriter:
        late_logging.when_loaded(self._begin)
        return self

    def __exit__(self, *error: object) -> None:
        late_logging.no_more(self._begin)
        self._undo.close()


def say_as(form: str, text: str) -> None:
    """Write a line to stderr where there is no LogWriter, in the same form; never wait for it."""
    if form == "json":
        fields = log_events.fields_in({})
        text = paragraph(text[-2000:])
        supervisor.say(log_events.json_line(time.time(), late_logging.ERROR, text, fields))
    else:
        supervisor.say(f"ivshmem: {text}")


def tell_peer(verb: str, peer: Peer, region: str = "") -> None:
    """Log that a peer "joined" or "left"; `region`: which one, where there are several."""
    where = f"{region}: " if region else ""
    fields = log_events.fields(
        verb,
        region=region,
        peer=peer.id,
        pid=peer.pid,
        uid=peer.uid,
        gid=peer.gid,
        process=peer.process,
        vectors=peer.vectors,
        since=peer.since,
        seconds=None if verb == "joined" else round(time.time() - peer.since, 3),
    )
    _log.info(
        "%speer %d %s: %s (pid %d), %s",
        *(where, peer.id, verb, peer.process, peer.pid, counted(peer.vectors, "vector")),
        extra=fields,
    )
