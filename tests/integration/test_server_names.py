"""`Server(names=...)`: a directory of names, as `ivshmem serve --names` makes it."""

from __future__ import annotations

import pytest
from support.waiting import PATIENCE

import ivshmem
from ivshmem import Directory, NoDirectory, Region, RegionError, Server


@pytest.mark.parametrize(("names", "slots"), [(True, 63), (7, 7)])
def test_peers_find_one_another(socket_path: str, names: int, slots: int) -> None:
    with (
        Server(socket_path, "1M", names=names).start() as server,
        ivshmem.connect(socket_path, timeout=PATIENCE) as client,
    ):
        assert server.directory is not None
        assert server.directory.slots == slots
        with Directory.open(client) as directory, directory.publish("db"):
            assert directory.slots == slots
            assert [entry.name for entry in server.directory.entries()] == ["db"]
    assert server.directory.entries is not None


def test_without(socket_path: str) -> None:
    with Server(socket_path) as server:
        assert server.directory is None
        with pytest.raises(NoDirectory):
            Directory.open(server.region)


def test_one_that_is_there_is_used(socket_path: str) -> None:
    with Region.create("64K") as region:
        Directory.create(region, 5)
        with Server(socket_path, region, names=True) as server:
            assert server.directory is not None
            assert server.directory.slots == 5
        with pytest.raises(RegionError, match="has a directory already"):
            Server(socket_path, region, names=6)


@pytest.mark.parametrize("names", [0, -1, 5000, 4095])
def test_what_does_not_fit(socket_path: str, names: int) -> None:
    with pytest.raises(RegionError):
        Server(socket_path, 4096, names=names)


def test_no_number(socket_path: str) -> None:
    with pytest.raises(TypeError):
        Server(socket_path, names="many")  # type: ignore[arg-type]
