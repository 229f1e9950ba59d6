"""Fixtures for pytest. A test module or a conftest.py loads them so:

    pytest_plugins = ["ivshmem.testing.fixtures"]

`ivshmem_server` is a running server with one vector, `ivshmem_servers` makes any number of them,
`ivshmem_device` is a fake device with one vector, and `ivshmem_hostile_peer` connects a hostile
peer to the server of `ivshmem_server`. What they make is closed after the test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from ..server.server import Server
from .fake_device import FakeDevice, fake_device
from .hostile_peer import HostilePeer
from .servers import server


@pytest.fixture
def ivshmem_servers() -> Iterator[Callable[..., Server]]:
    """Makes running servers; the arguments are those of `testing.server`."""
    with ExitStack() as stack:

        def make(*arguments: object, **options: object) -> Server:
            return stack.enter_context(server(*arguments, **options))  # type: ignore[arg-type]

        yield make


@pytest.fixture
def ivshmem_server(ivshmem_servers: Callable[..., Server]) -> Server:
    """A running server: 64 KiB, one vector."""
    return ivshmem_servers()


@pytest.fixture
def ivshmem_device() -> Iterator[FakeDevice]:
    """A fake device: 1 MiB, one vector; `guest.open()` opens it."""
    with fake_device() as device:
        yield device


@pytest.fixture
def ivshmem_hostile_peer(ivshmem_server: Server) -> Iterator[HostilePeer]:
    """A hostile peer of `ivshmem_server`."""
    with HostilePeer(ivshmem_server.path, ivshmem_server.vectors) as peer:
        yield peer
