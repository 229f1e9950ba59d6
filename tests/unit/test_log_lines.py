"""Lines of the log: in a program's own handlers, and through the queue of the command line."""

from __future__ import annotations

import io
import json
import logging
import os
import threading
from collections.abc import Iterator

import pytest
from support.waiting import until

import ivshmem
from ivshmem import testing
from ivshmem.cli import log_queue
from ivshmem.server import log_events


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    """The package's logger; no line gets to pytest's handlers."""
    logger = logging.getLogger("ivshmem")
    before = logger.level
    logger.propagate = False
    yield logger
    logger.propagate = True
    logger.setLevel(before)


def test_a_program_s_own_handler(logger: logging.Logger) -> None:
    """As JsonFormatter's docstring shows."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(ivshmem.JsonFormatter())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with testing.server(gate=lambda *_: 1 / 0) as server:
            with pytest.raises(ivshmem.ServerGone):
                ivshmem.connect(server.path, timeout=5)
            until(lambda: "refused" in stream.getvalue())
    finally:
        logger.removeHandler(handler)
    failed, refused = map(json.loads, stream.getvalue().splitlines())
    assert failed["level"] == "error"
    assert "ZeroDivisionError" in failed["text"], "the traceback is a part of the text"
    assert refused["event"] == "refused"
    assert refused["pid"] == os.getpid()


def test_a_record_of_another_program() -> None:
    record = logging.LogRecord("x", logging.CRITICAL, "", 0, "%d\n%s", (1, "\x1b[2J"), None)
    found = json.loads(ivshmem.JsonFormatter().format(record))
    assert found.pop("time").endswith("Z")
    assert found == {"level": "critical", "event": "log", "text": r"1\n\x1b[2J"}


@pytest.mark.parametrize("form", ["text", "json"])
def test_lines_that_nobody_reads_are_counted(
    logger: logging.Logger, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who logs does not wait; when there is a reader again, it is told how many are missing."""
    monkeypatch.setattr(log_queue, "_LINES", 10)
    reader, writer = os.pipe()
    begun = threading.active_count()
    with open(reader, "rb") as pipe, open(writer, "wb", 0) as end:
        with log_queue.queued(writer, logging.INFO, form):
            # The pipe takes 64 KiB, the thread has one line, the queue ten.
            for number in range(2000):
                logger.info("%d %s", number, "x" * 100)
            # One that cannot be formatted is counted, too; pytest's own handlers would raise.
            (queue,) = (each for each in logger.handlers if isinstance(each, log_queue._LineQueue))
            queue.handle(logging.LogRecord("ivshmem", 20, "", 0, "%d", ("x",), None))
            lines = [pipe.readline()]
            while b"lines were lost" not in lines[-1]:
                logger.info("more", extra=log_events.fields("log"))
                lines.append(pipe.readline())
            if form == "json":
                lost = json.loads(lines[-1])
                assert lost["event"] == "lost"
                count = lost["lines"]
            else:
                assert lines[-1].startswith(b"ivshmem: ")
                count = int(lines[-1].split()[1])
            numbered = sum(b"x" * 100 in line for line in lines)
            assert 0 < count <= 2001 + len(lines)
            assert numbered < 2000
            os.set_blocking(reader, False)
            while pipe.read(1 << 20):
                pass
        end.close()
    assert threading.active_count() == begun


def test_a_thread_that_is_stuck_holds_up_nobody(
    logger: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_queue, "_SECONDS", 0.05)
    reader, writer = os.pipe()
    with open(writer, "wb", 0):
        with open(reader, "rb", 0):
            with log_queue.queued(writer, logging.INFO, "text"):
                for _ in range(2000):
                    logger.info("x" * 100)
            assert any("_monitor" in each.name for each in threading.enumerate())
            logging.shutdown()  # as at the exit: it takes the locks of all handlers
        # The reader is gone, so what the thread writes from now on fails at once, and it ends.
        until(lambda: not any("_monitor" in each.name for each in threading.enumerate()))
