"""events(timeout=) ends in time, however much happens: here each event brings another one."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator

import pytest

from ivshmem import Interrupt, PeerJoined
from ivshmem.peer.endpoint import Endpoint, Event

ENOUGH = 200_000  # events, of which none ends by itself


class Busy(Endpoint):
    """News come over a pipe, and as many as it is told."""

    id = 0

    def __init__(self, vectors: int) -> None:
        for _ in range(vectors):
            self._add_vector(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        self._ring_self(0)
        self.reader, self.writer = os.pipe()
        self._watch_news(self.reader)
        self.joined = itertools.count()
        self.queue: list[Event] = []

    def _read_news(self) -> None:
        os.read(self.reader, 1)
        self.queue.append(PeerJoined(next(self.joined)))

    def _next_peer_event(self) -> Event | None:
        return self.queue.pop(0) if self.queue else None

    def tell(self) -> None:
        os.write(self.writer, b"!")

    def close(self) -> None:
        if not self.closed:
            super().close()
            os.close(self.reader)
            os.close(self.writer)


@pytest.fixture(params=[1, 3])
def busy(request: pytest.FixtureRequest) -> Iterator[Busy]:
    made = Busy(request.param)
    yield made
    made.close()


@pytest.mark.sampled(6)
@pytest.mark.parametrize("timeout", [0, 1e-9, 0.05])
@pytest.mark.parametrize("what", ["rings", "news", "both"])
def test_it_ends_though_something_happens_all_the_time(
    busy: Busy, timeout: float, what: str
) -> None:
    def again() -> None:
        if what != "news":
            busy.ring(0, 0)
        if what != "rings" and not busy.queue:
            busy.tell()

    again()
    begun = time.monotonic()
    seen = 0
    for seen, _ in enumerate(busy.events(timeout), 1):
        assert seen < ENOUGH, "it goes on and on"
        again()
    assert seen >= 1
    assert time.monotonic() - begun < 20


def test_what_is_there_now_is_all_told(busy: Busy) -> None:
    """Also while one vector is rung again and again: the kernel tells of them by turns."""
    for vector in range(busy.vectors):
        busy.ring(0, vector)
    busy.tell()
    found: set[Event] = set()
    for event in busy.events(0):
        found.add(event)
        busy.ring(0, 0)
    assert PeerJoined(0) in found
    assert {event.vector for event in found if isinstance(event, Interrupt)} == set(
        range(busy.vectors)
    )


def test_nothing_is_lost_at_the_limit(busy: Busy) -> None:
    rings = 0
    for _ in range(50):
        for event in busy.events(1e-9):
            assert isinstance(event, Interrupt)
            rings += event.rings
        busy.ring(0, 0)
        busy.ring(0, 0)
    assert rings + (busy.wait(0, 0) or 0) == 100


def test_a_quiet_time(busy: Busy) -> None:
    assert list(busy.events(0)) == []
    begun = time.monotonic()
    assert list(busy.events(0.02)) == []
    assert time.monotonic() - begun >= 0.02
