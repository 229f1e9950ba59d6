"""Copies, loans and views of large messages, in one process.

Knows: what is done with each message, and the floor: memcpy, and the ring of a doorbell. Does not
know: how figures are shown.

Both ends are in one process, so that nothing but the copies is measured: between two cores the time
depends on which caches they share.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import cycle, repeat
from pathlib import Path
from typing import Any

import ivshmem
from ivshmem import channel
from ivshmem.bench.cores import cores_for

from .. import floor, in_memory
from ..ways import serving

SIZE = 1 << 20  # bytes of a message that is copied
LOANED = {"4 KiB": 4 << 10, "1 MiB": 1 << 20, "64 MiB": 64 << 20}
COPIES, CALLS = 50, 2000  # in a round
SLOTS = 2  # and two cells for loans: as many as memcpy takes in turn

Round = Callable[[], float]  # nanoseconds of each


@contextlib.contextmanager
def pinned() -> Iterator[None]:
    """Keep this thread on one core, and give it back what it had."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores_for("same")[0])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _timed(call: Callable[[], object], count: int) -> Round:
    def once() -> float:
        begun = time.perf_counter_ns()
        for _ in repeat(None, count):
            call()
        return (time.perf_counter_ns() - begun) / count

    return once


def empty_call() -> float:
    """Nanoseconds of Python's loop around a call that does nothing: below it no `put` can be."""
    data, size = bytes(64), len
    rounds = []
    with pinned():
        for _ in range(9):
            begun = time.perf_counter_ns()
            for _ in repeat(None, 100_000):
                size(data)
            rounds.append((time.perf_counter_ns() - begun) / 100_000)
    return statistics.median(rounds)


def _library(directory: Path) -> Any:
    """memory.c, compiled."""
    path = directory / "memory.so"
    floor.build("memory.c", path, "-shared", "-fPIC")
    library = ctypes.CDLL(str(path))
    library.copy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long]
    library.copy.restype = ctypes.c_double
    return library


@contextlib.contextmanager
def copies() -> Iterator[dict[str, Round]]:
    """The rounds of copies of a message, by the names of rows."""
    with in_memory.folder() as name:
        library = _library(Path(name))
        source, into = bytearray(os.urandom(SIZE)), bytearray(SIZE)
        addresses = [
            ctypes.addressof((ctypes.c_char * SIZE).from_buffer(each)) for each in (source, into)
        ]
        with contextlib.ExitStack() as stack:
            region = stack.enter_context(ivshmem.Region.create("32M", path=f"{name}/memory"))
            ivshmem.Directory.create(region, channels="8M").close()
            channels = stack.enter_context(channel.open(region))
            made = channels.create_messages("copies", limit=SIZE, slots=SLOTS, readers=1, writers=1)
            reader: Any = stack.enter_context(made.reader("block"))
            writer: Any = stack.enter_context(made.writer())
            cells = [region.address + (16 << 20) + i * SIZE for i in range(SLOTS + 1)]
            turns = cycle(cells)

            def memcpy(times: int) -> float:
                took = 0.0
                for _ in repeat(None, COPIES):
                    cell = next(turns)
                    took += library.copy(cell, addresses[0], SIZE, 1)
                    if times == 2:
                        took += library.copy(addresses[1], cell, SIZE, 1)
                return took / COPIES

            def put_get_into() -> None:
                writer.put(source)
                reader.get_into(into)

            def put_view() -> None:
                writer.put(source)
                reader.view().release()

            def put_get() -> None:
                writer.put(source)
                reader.get()

            yield {
                "C: two memcpy": lambda: memcpy(2),
                "put, get_into": _timed(put_get_into, COPIES),
                "C: one memcpy": lambda: memcpy(1),
                "put, view": _timed(put_view, COPIES),
                "put, get as bytes": _timed(put_get, COPIES),
            }


@contextlib.contextmanager
def loans() -> Iterator[dict[str, Round]]:
    """The rounds of loan, publish and view, by the names of rows; first the ring of a doorbell."""
    with contextlib.ExitStack() as stack:
        name = stack.enter_context(in_memory.folder())
        socket = Path(name) / "socket"
        stack.enter_context(serving(socket))
        clients = [stack.enter_context(ivshmem.connect(socket)) for _ in range(2)]
        bell = clients[0].doorbell(clients[1].id, 0)
        rows: dict[str, Round] = {"ring of a doorbell": _timed(bell.ring, CALLS)}
        region = stack.enter_context(ivshmem.Region.create("512M", path=f"{name}/memory"))
        ivshmem.Directory.create(region, channels="300M").close()
        channels = stack.enter_context(channel.open(region))
        for label, size in LOANED.items():
            made = channels.create_messages(label, limit=size, slots=SLOTS, readers=1, writers=1)
            reader: Any = stack.enter_context(made.reader("block"))
            writer: Any = stack.enter_context(made.writer())
            rows[f"loan, publish, view of {label}"] = _timed(_looked_at(writer, reader), CALLS)
        yield rows


def _looked_at(writer: Any, reader: Any) -> Callable[[], None]:
    loan, view = writer.loan, reader.view

    def once() -> None:
        loan().publish()
        view().release()

    return once
