"""A service manager that does not read delays who joins, and nobody else."""

from __future__ import annotations

import contextlib
import gc
import os
import select
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.peer import RawPeer
from support.serving import running
from support.waiting import PATIENCE, until

from ivshmem.config import RegionConfig, ServiceConfig
from ivshmem.errors import JournalError
from ivshmem.lasting.fd_store import FdStore
from ivshmem.lasting.journal import Journal
from ivshmem.system.systemd import Notifier

BOUND = 5.0  # seconds for a join on a busy machine; the manager may take 30


class Manager:
    """A service manager's socket, which is read when the test says so."""

    def __init__(self, directory: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(directory / "notify"))
        self.kept: list[str] = []
        self.dropped: list[str] = []

    def read(self) -> None:
        """Take what is there."""
        while select.select([self.socket], [], [], 0)[0]:
            data, fds, _, _ = socket.recv_fds(self.socket, 4096, 10)
            for fd in fds:
                os.close(fd)
            fields = dict(line.split("=", 1) for line in data.decode().split("\n"))
            if "FDSTORE" in fields:
                assert len(fds) == 1
                self.kept.append(fields["FDNAME"])
            elif "FDSTOREREMOVE" in fields:
                self.dropped.append(fields["FDNAME"])


@pytest.fixture
def manager(directory: Path) -> Iterator[Manager]:
    made = Manager(directory)
    with made.socket:
        yield made


@contextlib.contextmanager
def storing(manager: Manager) -> Iterator[tuple[Notifier, FdStore, Journal]]:
    notifier = Notifier(manager.socket.getsockname())
    journal = Journal()
    store = FdStore(notifier, journal)
    try:
        yield notifier, store, journal
    finally:
        manager.read()
        store.close()
        notifier.close()
        journal.close()


def fill(notifier: Notifier) -> None:
    while notifier.status("full"):
        pass


def test_who_joins_waits_for_the_manager_and_nobody_else_does(
    directory: Path, manager: Manager
) -> None:
    with storing(manager) as (notifier, store, journal):
        join_and_leave(directory, manager, notifier, store, journal)
        gc.collect()  # what has the journal's memory


def join_and_leave(
    directory: Path, manager: Manager, notifier: Notifier, store: FdStore, journal: Journal
) -> None:
    regions = {name: RegionConfig(str(directory / name), size=4096) for name in "ab"}
    with (
        running(ServiceConfig(regions), journal=journal) as runs,
        contextlib.ExitStack() as stack,
    ):

        def peer(name: str) -> RawPeer:
            return stack.enter_context(RawPeer(str(directory / name)))

        runs.call(lambda: runs.service.watch(store.fileno(), store.step))
        stack.callback(runs.call, lambda: runs.service.unwatch(store.fileno()))
        olds: dict[str, list[RawPeer]] = {"a": [], "b": []}
        for name in "aabb":
            olds[name].append(peer(name).set_up(1))
            manager.read()
        fill(notifier)
        newcomers = {"1/2": peer("a"), "2/2": peer("b")}
        servers = [served.server for served in runs.service.regions.values()]
        until(lambda: all("service manager" in server.paused for server in servers))
        for leaver, witness in olds.values():
            leaver.close()
            witness.take_until(lambda witness=witness: witness.left)  # type: ignore[misc]
        assert [len(server.report()) for server in servers] == [1, 1]
        assert not any(newcomer.readable(0) for newcomer in newcomers.values())
        give_up = time.monotonic() + PATIENCE
        while newcomers:
            manager.read()
            for name, newcomer in list(newcomers.items()):
                if newcomer.readable(0.001):
                    manager.read()
                    assert manager.kept.count(name) == 2  # its socket and its vector
                    newcomers.pop(name).set_up(1)
            assert time.monotonic() < give_up, (manager.kept, manager.dropped)
        assert {"1/0", "2/0"} <= set(manager.dropped)
        assert [server.paused for server in servers] == ["", ""]


def test_a_newcomer_that_gives_up_leaves_its_place(directory: Path, manager: Manager) -> None:
    with storing(manager) as (notifier, store, journal):
        give_up(directory, manager, notifier, store, journal)
        gc.collect()


def give_up(
    directory: Path, manager: Manager, notifier: Notifier, store: FdStore, journal: Journal
) -> None:
    config = ServiceConfig({"a": RegionConfig(str(directory / "a"), size=4096)})
    with running(config, journal=journal) as runs:
        runs.call(lambda: runs.service.watch(store.fileno(), store.step))
        fill(notifier)
        (served,) = runs.service.regions.values()
        with RawPeer(str(directory / "a")):
            until(lambda: "service manager" in served.server.paused)
        with RawPeer(str(directory / "a")) as peer:
            while not peer.readable(0.01):
                manager.read()
            assert peer.set_up(1).id == 0
        manager.read()
        assert manager.dropped[:1] == ["1/0"]
        runs.call(lambda: runs.service.unwatch(store.fileno()))


def test_a_region_that_ends_leaves_nothing_with_the_manager(
    directory: Path, manager: Manager
) -> None:
    with storing(manager) as (_, store, journal):
        end(directory, manager, journal)
        gc.collect()
        assert store.settled()


def end(directory: Path, manager: Manager, journal: Journal) -> None:
    config = ServiceConfig({"a": RegionConfig(str(directory / "a"), size=4096)})
    with running(config, journal=journal) as runs:
        with RawPeer(str(directory / "a")) as peer:
            peer.set_up(1)
            manager.read()
            runs.call(lambda: runs.service.change(ServiceConfig({})))
            assert peer.take() is None
        manager.read()
        assert sorted(manager.dropped) == ["1/", "1/0"]


def test_a_manager_that_is_gone_is_given_up_at_once(directory: Path) -> None:
    path = str(directory / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as gone:
        gone.bind(path)
        notifier = Notifier(path)
    journal = Journal()
    with contextlib.closing(journal), notifier:
        store = FdStore(notifier, journal)
        store.keep("1/1", [0])
        assert store.settled()
        store.close()
        with pytest.raises(JournalError, match="given up"):
            Journal(os.dup(journal.fileno()))


def test_order_is_kept(manager: Manager) -> None:
    with storing(manager) as (notifier, store, _):
        fill(notifier)
        began = time.monotonic()
        store.keep("1/1", [0, 1])
        store.drop("1/1")
        store.keep("1/2", [0])
        assert time.monotonic() - began < BOUND
        assert not select.select([store], [], [], 0)[0]
        manager.read()
        assert manager.kept == []
        assert select.select([store], [], [], BOUND)[0]
        store.step()
        store.keep("1/3", [0])
        manager.read()
        assert manager.kept == ["1/1", "1/1", "1/2", "1/3"]
        assert manager.dropped == ["1/1"]
        assert not select.select([store], [], [], 0.1)[0]


def test_the_rest_is_sent_at_the_end(manager: Manager) -> None:
    with storing(manager) as (notifier, store, _):
        fill(notifier)
        store.keep("1/1", [0])
        manager.read()
        store.close()
        manager.read()
        assert manager.kept == ["1/1"]
