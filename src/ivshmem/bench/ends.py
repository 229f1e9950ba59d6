"""What the two ends of a round trip do: the package's calls, and plain eventfds to compare with.

Knows: how two clients of a server of ours find one another. Does not know: clocks.

These run in processes of their own, as the factories of worker.py. The server's memory is ours
alone.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from typing import Any

from ..errors import WorkerFailed
from ..peer.client import Client, connect
from ..server.server import Server
from .roundtrip import python_end
from .worker import Steps

_MEMORY = 1 << 16  # bytes of the server's
_PLACE = 1024  # bytes of each pair: ids, words, who sleeps; each on cache lines of its own
_LINE = 128


@contextlib.contextmanager
def eventfds(_role: str, there: int, here: int) -> Iterator[Steps]:
    """Two inherited eventfds, by the functions in `os`."""
    names = {"write": os.eventfd_write, "read": os.eventfd_read, "there": there, "here": here}
    yield Steps("write(there, 1)", "read(here)", names)


@contextlib.contextmanager
def client(role: str, path: str, place: int, wait: str) -> Iterator[Steps]:
    """A client; `wait` is a statement that knows `wait`. Each pair has a place of its own."""
    with joined(role, path, place) as (endpoint, peer):
        names: dict[str, Any] = {"ring": endpoint.ring, "wait": endpoint.wait, "peer": peer}
        yield Steps("ring(peer)", wait, names)


@contextlib.contextmanager
def word(role: str, path: str, place: int) -> Iterator[Steps]:
    """A word in the shared memory for each direction; who sleeps says so, and only then is rung."""
    with joined(role, path, place) as (endpoint, peer):
        at = [place * _PLACE + line * _LINE for line in (2, 3, 4, 5)]
        first, second, first_sleeps, second_sleeps = map(endpoint.region.atomic_u32, at)
        ends = (first, first_sleeps, second, second_sleeps)
        there, there_sleeps, here, here_sleeps = ends if role == "ping" else ends[2:] + ends[:2]
        names: dict[str, Any] = {
            "clear": here.store,
            "set_there": there.store,
            "asleep": there_sleeps.load,
            "ring": endpoint.ring,
            "peer": peer,
            "wait_word": endpoint.wait_word,
            "here": here,
            "sleeping": here_sleeps,
        }
        yield Steps(
            'clear(0); set_there(1, "seq_cst"); asleep("seq_cst") and ring(peer)',
            "wait_word(here, 0, sleeping=sleeping)",
            names,
        )


@contextlib.contextmanager
def joined(role: str, path: str, place: int) -> Iterator[tuple[Client, int]]:
    """A client that knows the other one of its place."""
    with connect(path) as endpoint:
        ids = [endpoint.region.atomic_u64(place * _PLACE + line * _LINE) for line in (0, 1)]
        mine, other = ids if role == "ping" else ids[::-1]
        mine.store(endpoint.id + 1)
        # Not by events(): what those need would make each ring dearer.
        while not (peer := other.load()):
            time.sleep(0.001)
        yield endpoint, peer - 1


@contextlib.contextmanager
def server(_role: str, path: str) -> Iterator[Steps]:
    """No end of anything, but the server for those above, which lives as long as its parent."""
    with Server(path, _MEMORY).start():
        yield Steps("pass", "pass", {})


@contextlib.contextmanager
def serving(path: str) -> Iterator[None]:
    """A server for `client` and `word` in a process of its own.

    Raises:
        WorkerFailed: it did not start.
    """
    end = python_end("echo", f"{__name__}:server", path)
    with subprocess.Popen(
        end.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        try:
            assert process.stdout is not None
            if not process.stdout.readline():
                raise WorkerFailed("the server for the measurement did not start")
            yield
        finally:
            process.terminate()
