"""Devices of two guests are unplugged and plugged back in turn, while the other one stays.

The chardev goes with the device, so the server sees each leave. A QEMU that is told of one dies
when its own device is unplugged; with `hold_leaves` none is told.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.waiting import until

import ivshmem

from .harness import Guest, GuestError, MakeGuest
from .host import TIMEOUT
from .qmp import QmpError

# What QEMU does with a leave, and with news while it unplugs, differs from version to version.
pytestmark = pytest.mark.qemu

CYCLES = 50
IDLE = "print('READY', flush=True); input()"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ivshmem.Server]:
    with ivshmem.Server(tmp_path / "socket", "1M", vectors=2).start() as server:
        yield server


def plug(guest: Guest, path: str) -> None:
    address = {"type": "unix", "data": {"path": path}}
    backend = {"type": "socket", "data": {"addr": address, "server": False}}
    guest.qmp("chardev-add", id="bells", backend=backend)
    guest.qmp("device_add", driver="ivshmem-doorbell", id="shm", chardev="bells", vectors=2)


def unplug(guest: Guest) -> None:
    guest.qmp("device_del", id="shm")
    guest.qmp_event("DEVICE_DELETED", device="shm", timeout=TIMEOUT)
    guest.qmp("chardev-remove", id="bells")
    # QEMU 7.2 dies when one is plugged in at once, though nobody has left: it frees the old one
    # after that event, by RCU, and says so to nobody. A refused device_add waits for that.
    with pytest.raises(QmpError, match="memdev"):
        guest.qmp("device_add", driver="ivshmem-plain")


def unplug_and_look(guest: Guest) -> None:
    unplug(guest)
    guest.qmp("query-status")


def two(guest: MakeGuest, server: ivshmem.Server) -> list[Guest]:
    guests = [guest(IDLE, name=name) for name in "ab"]
    for each in guests:
        each.expect("READY")
        plug(each, server.path)
    return guests


def until_peers(server: ivshmem.Server, count: int) -> list[int]:
    """Their ids, as soon as so many are connected."""
    until(lambda: len(server.peers) == count)
    return [peer.id for peer in server.peers]


@pytest.mark.nightly
def test_fifty_cycles(guest: MakeGuest, server: ivshmem.Server) -> None:
    server.hold_leaves(True)
    guests = two(guest, server)
    with ivshmem.connect(server.path, timeout=TIMEOUT) as host:
        for number in range(CYCLES):
            each = guests[number % 2]
            unplug(each)
            until_peers(server, 2)
            plug(each, server.path)
            ids = until_peers(server, 3)
        reports = {report.peer.id: report for report in server.report()}
        assert all(reports[i].leaves_told == 0 for i in ids if i != host.id)
        assert reports[host.id].leaves_told == CYCLES, "a client of ours is told"
        assert set(host.peers) == set(ids) - {host.id}
        for each in guests:
            unplug(each)
        until_peers(server, 1)
    for each in guests:
        each.send("end")
        assert each.wait() == 0


@pytest.mark.nightly
def test_without_holding(guest: MakeGuest, server: ivshmem.Server) -> None:
    """It is QEMU's fault, and still there: when this fails, the reason to hold leaves is gone."""
    one, other = two(guest, server)
    unplug(one)
    until_peers(server, 1)
    with pytest.raises(GuestError, match="the guest ended"):
        unplug_and_look(other)
    one.send("end")
    assert one.wait() == 0
