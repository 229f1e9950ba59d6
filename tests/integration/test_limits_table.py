"""Time limits of every kind at each call that waits: a clear error or a wait; it works after."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import pytest

import ivshmem
from ivshmem import Directory, connect

REFUSED = (TypeError, ValueError, OverflowError)
# What is over at once, what is refused, what waits long: for the last, what is waited for is there.
AT_ONCE: dict[str, Any] = {
    "0": 0,
    "0.0": 0.0,
    "-0.0": -0.0,
    "tiny": 1e-300,
    "a nanosecond": 1e-9,
    "False": False,
    "Fraction": Fraction(1, 10**9),
}
NEGATIVE: dict[str, Any] = {"-1": -1, "-1e-9": -1e-9, "-huge": -1e300, "-inf": -math.inf}
WRONG: dict[str, Any] = {"NaN": math.nan, "str": "1", "bytes": b"1", "list": [1], "complex": 1j}
LONG: dict[str, Any] = {
    "None": None,
    "inf": math.inf,
    "1e300": 1e300,
    "1e10": 1e10,
    "2**63": 2**63,
    "True": True,
    "5": 5,
}
CALLS: dict[str, Callable[[Any, Any], object]] = {
    "wait": lambda client, limit: client.wait(0, timeout=limit),
    "wait any": lambda client, limit: client.wait(timeout=limit),
    "wait some": lambda client, limit: client.wait([0, 1], timeout=limit),
    "next_event": lambda client, limit: client.next_event(limit),
    "events": lambda client, limit: next(client.events(timeout=limit), None),
}


@pytest.fixture
def client(server: Callable[..., ivshmem.Server], socket_path: str) -> Iterator[ivshmem.Client]:
    server(1 << 16, 2)
    with connect(socket_path) as made:
        yield made


def works(client: ivshmem.Client) -> None:
    client.ring(client.id, 1)
    assert client.wait(1, timeout=30)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("limit", [*AT_ONCE, *NEGATIVE])
def test_over_at_once(client: ivshmem.Client, call: str, limit: str) -> None:
    value = {**AT_ONCE, **NEGATIVE}[limit]
    begun = time.monotonic()
    assert not CALLS[call](client, value)
    assert time.monotonic() - begun < 5
    works(client)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("limit", WRONG)
def test_wrong(client: ivshmem.Client, call: str, limit: str) -> None:
    with pytest.raises(REFUSED):
        CALLS[call](client, WRONG[limit])
    works(client)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("limit", LONG)
def test_long(client: ivshmem.Client, call: str, limit: str) -> None:
    client.ring(client.id)
    assert CALLS[call](client, LONG[limit])
    works(client)


@pytest.mark.parametrize("limit", [*AT_ONCE, *NEGATIVE])
def test_names_at_once(client: ivshmem.Client, limit: str) -> None:
    value = {**AT_ONCE, **NEGATIVE}[limit]
    with Directory.create(client) as names:
        with pytest.raises(TimeoutError):
            names.wait_for("nobody", value)
        with names.publish("me", timeout=30):
            with pytest.raises(ivshmem.NameTaken):
                names.publish("me", timeout=value)
            assert names.wait_for("me", value).id == client.id


@pytest.mark.parametrize("limit", WRONG)
def test_names_wrong(client: ivshmem.Client, limit: str) -> None:
    with Directory.create(client) as names:
        with pytest.raises(REFUSED):
            names.wait_for("nobody", WRONG[limit])
        with names.publish("other"), pytest.raises(REFUSED):
            names.publish("other", timeout=WRONG[limit])
        with names.publish("me", timeout=30):
            assert names.lookup("me").id == client.id


@pytest.mark.parametrize("limit", LONG)
def test_names_long(client: ivshmem.Client, limit: str) -> None:
    with Directory.create(client) as names, names.publish("me", timeout=LONG[limit]):
        assert names.wait_for("me", LONG[limit]).id == client.id


@pytest.mark.sampled(3)
@pytest.mark.parametrize("wait", [False, True])
@pytest.mark.parametrize("limit", [*WRONG, *LONG])
def test_connect(client: ivshmem.Client, limit: str, wait: bool) -> None:
    value = {**WRONG, **LONG}[limit]
    try:
        connect(client.path, timeout=value, wait_for_server=wait).close()
    except REFUSED:
        assert limit in WRONG
    else:
        assert limit in LONG


@pytest.mark.sampled(3)
@pytest.mark.parametrize("wait", [False, True])
@pytest.mark.parametrize("limit", [*AT_ONCE, *NEGATIVE, *WRONG])
def test_connect_to_nobody(directory: Any, limit: str, wait: bool) -> None:
    value = {**AT_ONCE, **NEGATIVE, **WRONG}[limit]
    begun = time.monotonic()
    with pytest.raises((OSError, *REFUSED)) as caught:
        connect(directory / "s", timeout=value, wait_for_server=wait)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - begun < 5
