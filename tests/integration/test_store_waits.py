"""A service manager that does not read delays no join; what it was not told, it is told later."""

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

from ivshmem.config import RegionConfig, ServiceConfig
from ivshmem.journal import Journal
from ivshmem.notify import Notifier
from ivshmem.store import Store

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
def storing(manager: Manager) -> Iterator[tuple[Notifier, Store, Journal]]:
    notifier = Notifier(manager.socket.getsockname())
    journal = Journal()
    store = Store(notifier, journal)
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


def test_joins_are_answered_while_the_manager_does_not_read(
    directory: Path, manager: Manager
) -> None:
    with storing(manager) as (notifier, store, journal):
        join_and_leave(directory, manager, notifier, store, journal)
        gc.collect()  # what has the journal's memory


def join_and_leave(
    directory: Path, manager: Manager, notifier: Notifier, store: Store, journal: Journal
) -> None:
    regions = {name: RegionConfig(str(directory / name), size=4096) for name in "ab"}
    with (
        contextlib.ExitStack() as stack,
        running(ServiceConfig(regions), journal=journal) as runs,
    ):
        runs.service.watch(store.fileno(), store.step)
        fill(notifier)
        for name in "abab":
            began = time.monotonic()
            stack.enter_context(RawPeer(str(directory / name))).set_up(1)
            assert time.monotonic() - began < BOUND
        with RawPeer(str(directory / "a")) as leaver:
            leaver.set_up(1)
        manager.read()
        wanted = {"1/0", "1/1", "1/2", "2/0", "2/1"}
        give_up = time.monotonic() + 30
        while not (wanted <= set(manager.kept) and "1/2" in manager.dropped):
            assert time.monotonic() < give_up, (manager.kept, manager.dropped)
            select.select([manager.socket], [], [], 1)
            manager.read()
        assert all(manager.kept.count(name) == 2 for name in wanted)  # a socket and a vector
        runs.call(lambda: runs.service.unwatch(store.fileno()))


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
