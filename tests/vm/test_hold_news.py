"""A real QEMU is sent no news while its device is being unplugged, and all of them afterwards.

QEMU uses freed memory if any comes when the guest has let go of the device, and the device is still
there: 10.0 and newer by its own tracker; 7.2 ends in the first or second try below.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
from support.served import Served
from support.waiting import until

import ivshmem
from ivshmem import control, migration
from ivshmem.migration import Options, Vm

from .bare import Bare, device
from .host import TIMEOUT
from .qmp import QmpError

# What QEMU does with news while it unplugs differs from version to version.
pytestmark = pytest.mark.qemu

CYCLES = 8


@pytest.fixture
def served(directory: Path) -> Iterator[Served]:
    with Served(str(directory / "s"), 2) as served:
        yield served


def reports(served: Served) -> dict[int, ivshmem.PeerReport]:
    return {report.peer.pid: report for report in served.server().report()}


def unplug(qemu: Bare) -> None:
    qemu.qmp("device_del", id="shm0")
    until(lambda: not qemu.devices)
    until(lambda: removed(qemu))
    # See tests/vm/test_hold_leaves.py: QEMU 7.2 dies when a device comes at once.
    with pytest.raises(QmpError, match="memdev"):
        qemu.qmp("device_add", driver="ivshmem-plain", bus="port0")


def removed(qemu: Bare) -> bool:
    """Whether the chardev is gone; the device's end, a moment later, lets go of it."""
    try:
        qemu.qmp("chardev-remove", id="m0")
    except QmpError:
        return False
    return True


def test_unplugged_while_others_come_and_go(served: Served, directory: Path) -> None:
    """By hand: the peers' joins would come at any moment of it."""
    server = served.server()
    server.hold_leaves(True)
    ends = threading.Event()
    path = control.default_path(server.path)

    def come_and_go() -> None:
        while not ends.is_set():
            with ivshmem.connect(server.path, timeout=TIMEOUT):
                pass

    with Bare(directory, "a") as qemu, control.ControlClient(path, TIMEOUT) as client:
        busy = threading.Thread(target=come_and_go)
        busy.start()
        try:
            for _ in range(CYCLES):
                qemu.plug("doorbell", server.path)
                until(lambda: qemu.process.pid in reports(served))
                client.hold(reports(served)[qemu.process.pid].peer.id)
                unplug(qemu)
                until(lambda: qemu.process.pid not in reports(served))
        finally:
            ends.set()
            busy.join()


def test_without_holding(served: Served, directory: Path) -> None:
    """It is QEMU's fault, and still there: news that come after DEVICE_DELETED end QEMU 7.2.

    The device frees what it knows of peers then, and its chardev is read for some moments more.
    """
    server = served.server()
    server.hold_leaves(True)
    with Bare(directory, "a") as qemu:
        major = qemu.qmp("query-version")["qemu"]["major"]
        if major > 7:
            pytest.skip(f"QEMU {major}: 11.1.3 survived 130 unplugs of this kind")
        with pytest.raises(EOFError):
            told_while_it_goes(server, qemu, range(CYCLES))
        assert qemu.process.wait(TIMEOUT) < 0


def told_while_it_goes(server: ivshmem.Server, qemu: Bare, cycles: range) -> None:
    """Have the peer sent two joins in the moment in which its device has gone."""
    for _ in cycles:
        qemu.plug("doorbell", server.path)
        until(lambda: server.peers)
        (peer,) = server.peers
        until(partial(server.hold, peer.id))
        with (
            ivshmem.connect(server.path, timeout=TIMEOUT),
            ivshmem.connect(server.path, timeout=TIMEOUT),
        ):
            qemu.qmp("device_del", id="shm0")
            until(lambda: not qemu.devices)
            server.release(peer.id)
            until(lambda: removed(qemu))
        with pytest.raises(QmpError, match="memdev"):  # as in `unplug`
            qemu.qmp("device_add", driver="ivshmem-plain", bus="port0")
        until(lambda: not server.peers)


def test_migrate_holds_them_until_the_guest_has_let_go(directory: Path) -> None:
    with ExitStack() as undo:
        sides = [undo.enter_context(Served(str(directory / each), 2)) for each in ("s", "d")]
        here, there = (side.server().path for side in sides)

        def bare(name: str, *args: str, **how: bool) -> Bare:
            return undo.enter_context(Bare(directory, name, args, **how))

        master = bare("a", *device("doorbell", here))
        master_there = bare("a-there", *device("doorbell", there, ",master=on"), waits=True)
        other = bare("b", *device("doorbell", here, ""), obliging=False)
        other_there = bare("b-there", waits=True, obliging=False)
        vms = [
            Vm("a", str(master.monitor), str(master_there.monitor), f"unix:{directory}/a.uri"),
            Vm("b", str(other.monitor), str(other_there.monitor), f"unix:{directory}/b.uri"),
        ]
        plan = asyncio.run(migration.prepare(vms, Options(unplug_seconds=TIMEOUT)))
        failed: list[BaseException] = []

        def move() -> None:
            try:
                asyncio.run(migration.migrate(plan, state=directory / "state"))
            except BaseException as error:
                failed.append(error)

        moving = threading.Thread(target=move)
        moving.start()
        try:
            until(lambda: reports(sides[0])[other.process.pid].held)
            with ivshmem.connect(here, timeout=TIMEOUT) as host:
                # The master is told that somebody joined, and this one is not.
                until(lambda: reports(sides[0])[master.process.pid].pending == 0)
                assert reports(sides[0])[other.process.pid].pending == 2
                assert reports(sides[0])[other.process.pid].held

                def let_go() -> bool:
                    """The guest lets go, if it was asked to by then; so it is reset again."""
                    other.qmp("system_reset")
                    time.sleep(0.2)
                    return other.process.pid not in reports(sides[0])

                until(let_go)
                assert host.id not in (0, 1)
        finally:
            moving.join()
        assert not failed, failed
        assert other.status == master.status == "postmigrate"
        assert other_there.devices == ["shm0"]
        assert not any(report.held for report in sides[1].server().report())
