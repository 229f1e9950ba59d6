"""The package's log, through a bounded queue to a thread that writes it.

Knows: logging.handlers. Does not know: what is logged, the form of a line.

Invariants:
1. Who logs never waits for a reader, and no lock is held while a line is written: at the exit,
   logging takes the lock of each handler.
2. The exit waits for the thread for a second at most: it can be stuck in write(2).
"""

from __future__ import annotations

import contextlib
import logging
import queue
import time
from collections.abc import Iterator
from logging.handlers import QueueHandler, QueueListener

from ..server import log_events
from ..server.log_formatters import JsonFormatter, TextFormatter
from ..system.uncopied import Uncopied
from .writing import write_all

_LINES = 1000  # kept for a reader that does not read
_SECONDS = 1.0  # that the end waits for a reader


@contextlib.contextmanager
def queued(fd: int, level: int, form: str) -> Iterator[None]:
    """While the block runs, write what the package logs to a descriptor, from `level` on."""
    formatter = JsonFormatter() if form == "json" else TextFormatter()
    # SimpleQueue.put can interrupt itself, in a signal handler; Queue.put would wait for itself.
    lines: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    handler = _LineQueue(lines)
    handler.setLevel(level)
    handler.setFormatter(formatter)
    listener = _LineWriter(lines, _Descriptor(fd, handler))
    logger = logging.getLogger("ivshmem")
    listener.start()
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        listener.stop()


class _LineQueue(Uncopied, QueueHandler):
    """Formats records, and puts them into a queue if there is room; counts the others."""

    def __init__(self, lines: queue.SimpleQueue[logging.LogRecord]) -> None:
        super().__init__(lines)
        self._lines = lines
        self._lost = 0

    def enqueue(self, record: logging.LogRecord) -> None:
        """Called with the handler's lock held."""
        if self._lines.qsize() < _LINES:
            self._lines.put(record)
        else:
            self._lost += 1

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Count a record that cannot be formatted. logging itself would write to stderr."""
        self._lost += 1

    def take_lost(self) -> str:
        """Return a line that says how many lines were lost since the last call; "": none."""
        self.acquire()
        try:
            lost, self._lost = self._lost, 0
        finally:
            self.release()
        if not lost:
            return ""
        record = logging.makeLogRecord(
            {
                "levelno": logging.WARNING,
                "msg": f"{lost} lines were lost: nobody read them",
                "created": time.time(),
                **log_events.fields("lost", lines=lost),
            }
        )
        return self.format(record)


class _LineWriter(Uncopied, QueueListener):
    """Takes lines from the queue in a daemon thread, for which the exit waits a second at most."""

    def stop(self) -> None:
        """Let the thread end when it has written what is in the queue."""
        self.enqueue_sentinel()
        if self._thread is not None:
            self._thread.join(_SECONDS)
            self._thread = None


class _Descriptor(Uncopied, logging.Handler):
    """Writes lines, which are formatted already, to a descriptor; without a lock."""

    def __init__(self, fd: int, source: _LineQueue) -> None:
        super().__init__()
        self._fd = fd
        self._source = source

    def createLock(self) -> None:  # noqa: N802
        """Have none: only one thread writes, and it can be stuck."""
        self.lock = None

    def handle(self, record: logging.LogRecord) -> bool:
        """Write a line, and before it how many were lost."""
        line = record.getMessage()
        if lost := self._source.take_lost():
            line = f"{lost}\n{line}"
        with contextlib.suppress(OSError):  # nobody reads any more
            write_all(self._fd, line)
        return True
