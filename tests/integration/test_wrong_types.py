"""What is no name, mode, range, directory or configuration: an error that says what to pass."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ivshmem
from ivshmem import Directory, Listener, Region, aio, config, testing

# What is wrong on purpose.
FIVE: Any = 5
TEXT: Any = "rw"

CALLS: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "a name": (lambda _: Region.open("4K", name=FIVE), TypeError, "name is text, not 5"),
    "a region's mode": (
        lambda at: Region.create("4K", path=at / "r", mode=TEXT),
        TypeError,
        "mode: expected a number, for example 0o660, not 'rw'",
    ),
    "a mode to open": (lambda at: Region.open("4K", path=at, mode=TEXT), TypeError, "mode: "),
    "a mode with more": (
        lambda at: Region.open("4K", path=at / "r", mode=0o1777),
        ValueError,
        "mode 0o1777: 0 to 0o777 are allowed",
    ),
    "a socket's mode": (lambda at: Listener(at / "s", mode=TEXT), TypeError, "mode: expected"),
    "a place": (lambda _: Directory.open(FIVE), TypeError, "an endpoint or a region, not on 5"),
    "a place to make": (lambda _: Directory.create(FIVE), TypeError, "or a region, not on 5"),
    "a configuration": (lambda _: config.parse(TEXT, "f"), TypeError, "the bytes of a conf"),
    "an endpoint": (lambda _: aio.AsyncEndpoint(FIVE), TypeError, "a Client or a GuestDevice"),
    "many vectors": (lambda _: enter(testing.fake_device(vectors=5000)), ValueError, "0 to 2048"),
    "fewer than none": (lambda _: enter(testing.fake_device(vectors=-1)), ValueError, "-1 vectors"),
    "a part of one": (lambda _: enter(testing.fake_device(vectors=1.5)), TypeError, "integer"),  # type: ignore[arg-type]
}


def enter(manager: Any) -> None:
    with manager:
        pass


@pytest.mark.parametrize("what", CALLS)
def test_it_is_refused(tmp_path: Path, what: str) -> None:
    call, kind, text = CALLS[what]
    with pytest.raises(kind, match=text):
        call(tmp_path)
    assert not [*tmp_path.iterdir()]


def test_publishing() -> None:
    with Region.create("4K") as region, Directory.create(region) as names:
        with pytest.raises(TypeError, match="name: expected text, not 5"):
            names.publish(FIVE, id=1)
        with pytest.raises(TypeError, match="role: expected text, not 5"):
            names.publish("a", FIVE, id=1)
        with pytest.raises(TypeError, match=r"vector_range: expected a range, not \[0, 1\]"):
            names.publish("a", vector_range=[0, 1], id=1)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="a beat every -1 s: more than 0 seconds"):
            Directory.open(region, beat=-1)
        with pytest.raises(TypeError, match="lease: seconds are a number, not 'rw'"):
            Directory.open(region, lease=TEXT)
        assert names.entries() == []


def test_an_asynchronous_endpoint_is_not_a_directory() -> None:
    async def main(path: str) -> None:
        async with aio.connect_async(path) as client:
            wrong: Any = client
            with pytest.raises(TypeError, match=r"not on <.*>: pass its `endpoint`"):
                Directory.open(wrong)
            calls: list[Callable[[], Any]] = [
                lambda: aio.publish_async(wrong, "a"),
                lambda: aio.wait_for_async(wrong, "a"),
                lambda: aio.close_async(wrong),
            ]
            for call in calls:
                with pytest.raises(TypeError, match=r"expected a Directory, as Directory\.open"):
                    await call()
            assert client.connected

    with testing.server(names=True) as server:
        asyncio.run(main(server.path))


def test_a_hostile_peer_that_wants_more_vectors_than_there_are() -> None:
    with (
        testing.server(vectors=2) as server,
        pytest.raises(TimeoutError, match=r"gave 2 of 5 vectors in 0\.05 seconds"),
    ):
        testing.HostilePeer(server.path, vectors=5, timeout=0.05)
    with pytest.raises(OSError):
        ivshmem.connect(server.path)
