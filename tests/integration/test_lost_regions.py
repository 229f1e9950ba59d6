"""A successor that cannot have a region closes its descriptors once, and serves the others."""

from __future__ import annotations

import contextlib
import os
import resource
from pathlib import Path

import pytest

from ivshmem import Region
from ivshmem.config import RegionConfig, ServiceConfig
from ivshmem.lasting.journal import Journal
from ivshmem.service.service import Service
from ivshmem.service.succession import Inheritance
from ivshmem.system.listener import Listener


def test_its_descriptors_are_closed_once(directory: Path, tmp_path: Path) -> None:
    regions = {
        name: RegionConfig(str(directory / name), size=4096, file=str(tmp_path / name))
        for name in ("a", "b", "c")
    }
    with contextlib.closing(Journal()) as journal, Service(ServiceConfig()) as second:
        with Service(ServiceConfig(regions)) as first:
            first.open()
            journal.rewrite(first.snapshot())
            copies = {fd: os.dup(fd) for fd in first.descriptors}
            os.truncate(tmp_path / "b", 0)
            Inheritance(journal, "it died", copies.get, list(copies.values())).go_on(second)
            first.abandon()
        assert set(second.regions) == {"a", "c"}
        # What was closed twice may have been another region's the second time.
        for name, served in second.regions.items():
            assert os.fstat(served.region.fileno()).st_ino == (tmp_path / name).stat().st_ino
            assert served.listener.socket.getsockname() == str(directory / name)
            assert os.fstat(served.fd)


def test_a_socket_that_came_twice_is_closed_once(directory: Path) -> None:
    """From the service manager, and from the process before."""
    path = str(directory / "socket")
    config = ServiceConfig({"a": RegionConfig(path, size=4096)})
    with contextlib.closing(Journal()) as journal:
        with Service(config) as first:
            first.open()
            journal.rewrite(first.snapshot())
            copies = {fd: os.dup(fd) for fd in first.descriptors}
            listener = Listener.adopt(os.dup(first.regions["a"].listener.socket.fileno()))
            with Service(ServiceConfig(), listeners={path: listener}) as second:
                Inheritance(journal, "it died", copies.get, list(copies.values())).go_on(second)
                first.abandon()
                assert set(second.regions) == {"a"}
    os.unlink(path)


def test_memory_that_cannot_be_mapped_yet_stays_open(tmp_path: Path) -> None:
    """The next process may have room for it, and finds the descriptor by its number."""
    file = tmp_path / "memory"
    file.touch()
    os.truncate(file, 1 << 34)
    fd = os.open(file, os.O_RDWR)
    before = resource.getrlimit(resource.RLIMIT_AS)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (1 << 33, before[1]))
        with pytest.raises(OSError, match=r"cannot be mapped|do not fit"):
            Region.from_fd(fd, keep_on_error=True)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert os.fstat(fd).st_ino == file.stat().st_ino
    with Region.from_fd(fd, keep_on_error=True) as region:
        assert region.fileno() == fd
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
