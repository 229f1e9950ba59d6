"""What a server has to say to a person or a log, without ever waiting for a reader.

Knows: a stream that may be full or gone. Does not know: what is said.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from typing import TextIO

_LINES = 1000  # kept for a reader that does not read
_SECONDS = 1.0  # that the end waits for one


class News(logging.Handler):
    """Writes lines to `stream` by a thread of its own; a context manager.

    A terminal that was stopped with Ctrl-S, or a pipe that nobody reads, costs lines and not the
    server's time; how many were lost is said when the reader is back. The package's log, from
    `level` on, comes here, too.
    """

    def __init__(self, stream: TextIO, level: int) -> None:
        super().__init__(level)
        self._stream = stream
        self._lines: queue.Queue[str | None] = queue.Queue(_LINES)
        self._lost = 0
        self._thread = threading.Thread(target=self._write, name="ivshmem-news", daemon=True)

    def tell(self, line: str) -> None:
        """Write a line some time soon."""
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._lost += 1

    def emit(self, record: logging.LogRecord) -> None:
        self.tell(f"ivshmem: {self.format(record)}")

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            lost, self._lost = self._lost, 0
            with contextlib.suppress(OSError, ValueError):  # nobody reads any more
                if lost:
                    self._stream.write(f"ivshmem: {lost} lines were lost: nobody read them\n")
                self._stream.write(f"{line}\n")
                self._stream.flush()

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
