"""Who is taken for a QEMU is not told that others left, if the server was asked for that."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.peer import RawPeer
from support.serving import running
from support.waiting import until

import ivshmem
from ivshmem import testing
from ivshmem.config import RegionConfig, ServiceConfig

VECTORS = 2
COMM = Path("/proc/self/comm")


@contextlib.contextmanager
def called(name: str) -> Iterator[None]:
    """This process's name, which is all that tells a QEMU."""
    before = COMM.read_text().removesuffix("\n")
    COMM.write_text(name)
    try:
        yield
    finally:
        COMM.write_text(before)


@pytest.fixture
def server() -> Iterator[ivshmem.Server]:
    with testing.server("4K", vectors=VECTORS) as server:
        yield server


def qemu(path: str) -> RawPeer:
    with called("qemu-system-x86"):
        return RawPeer(path).set_up(VECTORS)


def leaves(server: ivshmem.Server) -> dict[int, tuple[int, int]]:
    return {r.peer.id: (r.leaves_told, r.leaves_held) for r in server.report()}


def test_told_and_not_told(server: ivshmem.Server) -> None:
    server.hold_leaves(True)
    with qemu(server.path) as guest, RawPeer(server.path).set_up(VECTORS) as host:
        with qemu(server.path):
            pass
        host.take_until(lambda: host.left == {2})
        # What comes after the leave has come, and the leave has not.
        with RawPeer(server.path).set_up(VECTORS) as last:
            guest.take_until(lambda: guest.counts.get(last.id) == VECTORS)
            assert last.id == 3, "an id that somebody holds for living is not given out"
            assert not guest.left
            assert leaves(server) == {0: (0, 1), 1: (1, 0), 3: (0, 0)}


def test_from_now_on(server: ivshmem.Server) -> None:
    """What was told before cannot be undone; what was not taken yet, is not told any more."""
    with qemu(server.path) as guest, qemu(server.path) as lazy:
        with RawPeer(server.path).set_up(VECTORS):
            guest.take_until(lambda: guest.counts.get(2) == VECTORS)
        guest.take_until(lambda: guest.left == {2})
        server.hold_leaves(True)
        with RawPeer(server.path).set_up(VECTORS) as visitor:
            assert visitor.id == 3
        until(lambda: leaves(server).keys() == {0, 1})
        assert leaves(server) == {0: (1, 1), 1: (1, 1)}
        server.hold_leaves(False)
        with qemu(server.path) as late:
            with RawPeer(server.path).set_up(VECTORS):
                pass
            late.take_until(lambda: len(late.left) == 1)
        until(lambda: leaves(server).keys() == {0, 1})
        assert leaves(server) == {0: (1, 3), 1: (1, 3)}
        for peer in (guest, lazy):
            peer.drain()
            assert peer.left == {2}


def test_a_setting_that_can_change(tmp_path: Path) -> None:
    def config(hold: bool) -> ServiceConfig:
        region = RegionConfig(
            str(tmp_path / "socket"), size=4096, vectors=VECTORS, hold_leaves=hold
        )
        return ServiceConfig({"a": region})

    with running(config(False)) as runs:
        server = runs.service.regions["a"].server
        with qemu(server.path):
            assert runs.change(config(True)) == ["region a: hold_leaves changed"]
            with qemu(server.path):
                pass
            until(lambda: leaves(server) == {0: (0, 1)})
