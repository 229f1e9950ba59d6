"""What the thread that keeps names does when something fails, and what it may never do."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypedDict

import pytest
from support.waiting import PATIENCE, Background, until

from ivshmem import ClosedError, Directory, Region
from ivshmem.peer import names_table
from ivshmem.peer.endpoint import Endpoint, Event


class Quick(TypedDict):
    beat: float
    lease: float


QUICK: Quick = {"beat": 0.002, "lease": 0.02}


class Flaky(Endpoint):
    """A device whose registers, and a client whose server, can fail now and then."""

    id = 3

    def __init__(self, region: Region) -> None:
        self.region = region
        self.trouble: Exception | None = None
        self.troubled = 0
        self.current = 3

    def _read_news(self) -> None: ...

    def _next_peer_event(self) -> Event | None:
        return None

    def fail(self) -> None:
        if self.trouble is not None:
            self.troubled += 1
            raise self.trouble

    def current_id(self) -> int:
        self.fail()
        return self.current


class Told(Flaky):
    """One that is told who is connected, which fails as well."""

    connected = True
    vectors = 1

    @property
    def peers(self) -> list[int]:
        self.fail()
        return []


@pytest.fixture(params=[Flaky, Told])
def endpoint(request: pytest.FixtureRequest) -> Iterator[Flaky]:
    with request.param(Region.create("4K")) as made:
        yield made


def beats(region: Region) -> int:
    """Of the first slot."""
    return region.atomic_u64(2048 + 8).load()


def beats_on(region: Region) -> None:
    before = beats(region)
    until(lambda: beats(region) > before + 2, "a sign of life")


ERRORS = [OSError(5, "Input/output error"), ValueError("no number"), RuntimeError(), MemoryError()]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_name_outlives_an_error(
    endpoint: Flaky, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ivshmem.directory")
    with Directory.create(endpoint, **QUICK) as table:
        mine = table.publish("a")
        beats_on(endpoint.region)
        endpoint.trouble = error
        until(lambda: endpoint.troubled > 5)
        if isinstance(endpoint, Told):
            until(lambda: mine.lost, "a word about it")
            assert type(error).__name__ in mine.lost
        else:
            beats_on(endpoint.region)  # with the id that it had
        endpoint.trouble = None
        endpoint.current = 7
        until(lambda: mine.id == 7, "the id that it has now")
        beats_on(endpoint.region)
        assert mine.lost == ""
        assert [(entry.name, entry.id) for entry in table.entries() if entry.id == 7] or isinstance(
            endpoint, Told
        )
        until(lambda: "all is well again" in caplog.text)
    found = [record for record in caplog.records if type(error).__name__ in record.getMessage()]
    assert len(found) == 1, "said once, not at every beat"
    assert found[0].levelno == logging.WARNING


def test_one_that_fails_takes_no_other_along(endpoint: Flaky) -> None:
    """Of two names, the one with an id of its own needs no register."""
    with Directory.create(endpoint, **QUICK) as table:
        table.publish("follows")
        table.publish("fixed", id=5)
        if isinstance(endpoint, Told):
            return
        endpoint.trouble = OSError(5, "Input/output error")
        until(lambda: endpoint.troubled > 3)
        before = endpoint.region.atomic_u64(2048 + 128 + 8).load()
        until(lambda: endpoint.region.atomic_u64(2048 + 128 + 8).load() > before + 2)
        endpoint.trouble = None


@pytest.mark.parametrize("what", ["region", "endpoint", "directory"])
def test_it_ends_with_what_it_keeps(endpoint: Flaky, what: str) -> None:
    table = Directory.create(endpoint, **QUICK)
    table.publish("a")
    (keeper,) = [t for t in threading.enumerate() if t.name == "ivshmem-directory"]
    closes: dict[str, Callable[[], None]] = {
        "region": endpoint.region.close,
        "endpoint": endpoint.close,
        "directory": table.close,
    }
    closes[what]()
    keeper.join(PATIENCE)
    assert not keeper.is_alive()
    table.close()


class Unviewable:
    """A region that lends nobody a view of itself."""

    def __init__(self, region: Region) -> None:
        self._region = region

    def __getattr__(self, name: str) -> Any:
        return getattr(self._region, name)


def test_the_memory_is_never_exported() -> None:
    """Without a GIL, another thread's close() would meet the view and raise BufferError."""
    with Region.create("4K") as region:
        place: Any = Unviewable(region)
        with pytest.raises(TypeError):
            memoryview(place)
        with Directory.create(place, **QUICK) as table, table.publish("a", "role", id=1) as mine:
            beats_on(region)
            assert table.lookup("a").role == "role"
            region.write(2048, bytes(4096 - 2048))  # everything, the trailer too
            until(lambda: table.entries() and mine.lost == "")
            until(lambda: names_table.trailer_of(region) is not None)
            with Directory.open(place, **QUICK) as other:
                assert [entry.name for entry in other.entries()] == ["a"]


# -- time limits ----------------------------------------------------------------------------------


@pytest.fixture
def claimed() -> Iterator[Region]:
    """Somebody entered "a", and nobody knows whether they live."""
    with Region.create("4K") as region:
        Directory.create(region)
        region.write(2048, names_table.pack(77, 9, "a", "", range(1)))
        yield region


@pytest.mark.parametrize("timeout", [0, 0.05, -1])
def test_publishing_takes_a_time_limit(claimed: Region, timeout: float) -> None:
    with Directory.open(claimed) as table:  # the usual lease: 5 seconds
        begun = time.monotonic()
        with pytest.raises(TimeoutError, match=r"'a' is the name of peer 9.* not known yet"):
            table.publish("a", id=1, timeout=timeout)
        assert time.monotonic() - begun < 2
        assert not table._publications
        assert table.publish("b", id=1, timeout=timeout).lost == ""


def test_without_one_it_takes_the_lease(claimed: Region) -> None:
    with Directory.open(claimed, **QUICK) as table:
        assert table.publish("a", id=1).lost == ""
    with Directory.open(claimed, **QUICK) as table, table.publish("c", id=2, timeout=1e9):
        pass


def test_closing_ends_who_waits(claimed: Region) -> None:
    calls: list[Callable[[Directory], object]] = [
        lambda table: table.publish("a", id=1),
        lambda table: table.wait_for("x", None),
    ]
    for call in calls:
        table = Directory.open(claimed)
        waiting = Background(partial(call, table))
        table.close()
        with pytest.raises(ClosedError):
            waiting.result()
    with pytest.raises(TimeoutError, match="no entry 'x'"):
        Directory.open(claimed).wait_for("x", 0.01)
