"""A device by UIO: over files that stand for its maps, and a pseudo terminal for its interrupts.

Real guests with a driver of that kind are in tests/vm/test_uio.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import select
import struct
import time
import tty
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from support.leaks import open_fds, shared_mappings
from support.waiting import PATIENCE, Background, once_asleep, until

from ivshmem import (
    ClosedError,
    DeviceGone,
    Directory,
    IdChanged,
    Interrupt,
    NoSuchVector,
    connect,
    guest,
)
from ivshmem._core import Doorbells
from ivshmem.aio import open_async
from ivshmem.guest import device as ways
from ivshmem.guest import pci, uio
from ivshmem.native.descriptors import FdArray
from ivshmem.testing.fake_pci import FakePci

A = "0000:00:04.0"
PAGE = os.sysconf("SC_PAGE_SIZE")
MIB = 1 << 20


class Counter:
    """The kernel's side of /dev/uioN, whose count starts anywhere.

    A pseudo terminal: when its other end is gone, poll wakes and read says EIO, as of a UIO device
    whose driver has lost its device. (Of a socket, read says that it is at its end.)
    """

    def __init__(self, count: int = 0) -> None:
        self.count = count
        self._theirs, self._ours = os.openpty()
        tty.setraw(self._ours)
        os.set_blocking(self._theirs, False)
        self.gone = False

    def open(self) -> int:
        """What open(2) of the device gives."""
        return os.dup(self._theirs)

    def interrupt(self, times: int = 1) -> None:
        """The count goes on; one that was not read yet is replaced, as it is no queue."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._theirs, 4)
        self.count = (self.count + times) & 0xFFFFFFFF
        os.write(self._ours, struct.pack("=I", self.count))
        # A terminal's bytes come a moment later; a thread that waits may have taken them by then.
        select.select([self._theirs], [], [], 0.01)

    def end(self) -> None:
        """The device is unplugged, or its driver unbound."""
        os.close(self._ours)
        self.gone = True

    def close(self) -> None:
        if not self.gone:
            self.end()
        os.close(self._theirs)


class Listener(Doorbells):
    """An endpoint that has one vector, which is a UIO device's."""

    def __init__(self, counter: Counter) -> None:
        self._listen_uio(counter.open())

    def _read_news(self) -> NoReturn:
        raise DeviceGone


@pytest.fixture
def counter() -> Iterator[Counter]:
    counter = Counter()
    yield counter
    counter.close()


@pytest.fixture
def listener(counter: Counter) -> Iterator[Listener]:
    listener = Listener(counter)
    yield listener
    listener.close()


# -- counting -------------------------------------------------------------------------------------

WAITS: list[tuple[Callable[[Listener, float | None], object], Callable[[int], object]]] = [
    (lambda d, t: d.wait(0, t), lambda rings: rings or None),
    (lambda d, t: d.wait(timeout=t), lambda rings: Interrupt(0, rings) if rings else None),
    (lambda d, t: d._wait_event(t), lambda rings: Interrupt(0, rings) if rings else None),
]
each_wait = pytest.mark.parametrize(("wait", "result"), WAITS, ids=["one", "any", "event"])
Wait = Callable[[Listener, float | None], object]
Result = Callable[[int], object]


@each_wait
def test_rings_since_the_last_look(
    counter: Counter, listener: Listener, wait: Wait, result: Result
) -> None:
    assert wait(listener, 0) == result(0)
    assert wait(listener, 0.001) == result(0)
    for times in (1, 2, 1000, 1):
        counter.interrupt(times)
        assert wait(listener, PATIENCE) == result(times)
        assert wait(listener, 0) == result(0)
    assert listener.vectors == 1
    with pytest.raises(NoSuchVector, match="vector 1: this endpoint has 1 vector"):
        listener.wait(1, 0)


@each_wait
@pytest.mark.parametrize("start", [0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFFE])
def test_a_count_that_wraps(start: int, wait: Wait, result: Result) -> None:
    """It is 32 bits, in the kernel even with a sign; what came before the open does not count."""
    counter = Counter(start - 1)
    listener = Listener(counter)
    counter.interrupt()
    assert wait(listener, 0) == result(1)
    for times in (1, 3, 0x7FFFFFFF):
        counter.interrupt(times)
        assert wait(listener, 0) == result(times)
    listener.close()
    counter.close()


@each_wait
def test_who_waits_is_woken(
    counter: Counter, listener: Listener, wait: Wait, result: Result
) -> None:
    waiting = Background(lambda: wait(listener, None))
    waiting.wait_until_asleep()
    counter.interrupt()
    assert waiting.result() == result(1)


@each_wait
def test_close_sends_waiters_home(
    counter: Counter, listener: Listener, wait: Wait, result: Result
) -> None:
    waiting = Background(lambda: wait(listener, None))
    waiting.wait_until_asleep()
    listener.close()
    with pytest.raises(ClosedError):
        waiting.result()


def test_fileno(counter: Counter, listener: Listener) -> None:
    assert select.select([listener.fileno()], [], [], 0)[0] == []
    for times in (1, 2):
        counter.interrupt(times)
        assert select.select([listener.fileno()], [], [], PATIENCE)[0] == [listener.fileno()]
        assert listener.wait(timeout=0) == Interrupt(0, times)
    assert select.select([listener.fileno()], [], [], 0)[0] == []


@each_wait
def test_what_is_no_uio_device(wait: Wait, result: Result, tmp_path: Path) -> None:
    """An error, not an endless loop: what is at its end is readable all the time."""
    reader, writer = os.pipe()
    os.close(writer)

    class Wrong(Doorbells):
        def __init__(self) -> None:
            self._listen_uio(reader)

    wrong = Wrong()
    with pytest.raises(OSError, match="the descriptor of this vector is not a UIO device"):
        wait(wrong, PATIENCE)  # type: ignore[arg-type]
    wrong.close()


@each_wait
def test_a_driver_that_has_lost_the_device(
    counter: Counter, listener: Listener, wait: Wait, result: Result
) -> None:
    """It is told as that, and again each time; to a thread that waits already, too."""
    waiting = Background(lambda: wait(listener, None))
    waiting.wait_until_asleep()
    counter.end()
    with pytest.raises(DeviceGone):
        waiting.result()
    for timeout in (0, 0.001, None):
        with pytest.raises(DeviceGone):
            wait(listener, timeout)


# -- finding --------------------------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakePci:
    monkeypatch.setattr(uio, "DEV", tmp_path)
    return FakePci(tmp_path / "pci", monkeypatch)


def add_maps(path: Path, *maps: tuple[int, int], name: str = "uio0") -> None:
    """Maps of a UIO device, each with its address and the offset inside of the first page."""
    for number, (address, offset) in enumerate(maps):
        folder = path / "uio" / name / "maps" / f"map{number}"
        folder.mkdir(parents=True)
        (folder / "addr").write_text(f"{address:#x}\n")
        (folder / "offset").write_text(f"{offset:#x}\n")


def test_name(machine: FakePci) -> None:
    path = machine.add(A)
    device = pci.look(A)
    assert uio.name(device) is None
    (path / "uio").mkdir()
    assert uio.name(device) is None
    add_maps(path, (0, 0), name="uio12")
    assert uio.name(device) == "uio12"


def test_maps(machine: FakePci) -> None:
    """Found by physical address, however the driver tells of a BAR inside a page."""
    path = machine.add(A)
    device = pci.look(A)
    add_maps(
        path, (0xFEBF1000, 0), (0x100000000, 0), (0x10001100, 0), (0x20002000, 0x300), (0x5000, 0)
    )
    assert uio.find_map(device, "uio0", 0xFEBF1000) == 0
    assert uio.find_map(device, "uio0", 0x100000000) == PAGE
    assert uio.find_map(device, "uio0", 0x10001100) == 2 * PAGE + 0x100
    assert uio.find_map(device, "uio0", 0x20002300) == 3 * PAGE + 0x300
    with pytest.raises(OSError, match="maps nothing at 0x20002000") as error:
        uio.find_map(device, "uio0", 0x20002000)
    assert error.value.errno == errno.ENODEV


def test_open_device(machine: FakePci, tmp_path: Path) -> None:
    (tmp_path / "uio0").touch()
    fd = uio.open_device("uio0")
    assert not os.get_blocking(fd)
    assert not os.get_inheritable(fd)
    os.write(fd, b"for writing, too")
    os.close(fd)
    with pytest.raises(FileNotFoundError):
        uio.open_device("uio1")


# -- the guest's device by it ---------------------------------------------------------------------


@pytest.fixture
def memory(machine: FakePci, counter: Counter, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A device with a UIO driver: its registers in the first page of this file, then its memory."""
    path = machine.add(A, driver="uio_ivshmem", vectors=4)
    config = path / "config"
    config.write_bytes(config.read_bytes()[:4] + b"\2\0" + config.read_bytes()[6:])  # it decodes
    add_maps(path, (0xFEBF1000, 0), (0x100000000, 0))
    file = os.memfd_create("device")
    os.ftruncate(file, PAGE + MIB)
    os.pwrite(file, struct.pack("<I", 6), ways.IVPOSITION)

    # A socket cannot be mapped, so the maps are the file's.
    def map_registers(self: ways.UioDevice, fd: int, offset: int) -> None:
        ways.GuestDevice._map_registers(self, file, offset)

    def map_memory(self: ways.UioDevice, socket: FdArray, *rest: str) -> None:
        socket.close()
        ways.GuestDevice._map_memory(self, FdArray.copy(file), *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(uio, "open_device", lambda _: counter.open())
    monkeypatch.setattr(ways.UioDevice, "_map_registers", map_registers)
    monkeypatch.setattr(ways.UioDevice, "_map_memory", map_memory)
    yield file
    os.close(file)


def migrate(memory: int, peer: int) -> None:
    """The other QEMU's server has given another id."""
    os.pwrite(memory, struct.pack("<I", peer), ways.IVPOSITION)


def test_an_id_that_changes(machine: FakePci, memory: int, counter: Counter) -> None:
    with guest.open() as device:
        assert device.next_event(0) is None
        migrate(memory, 7)
        assert (device.id, device.current_id()) == (6, 7)
        assert list(device.events(0)) == [IdChanged(6, 7)]
        assert device.id == 7
        migrate(memory, 0xFFFFFFFF)  # there is none yet, or it is being unplugged
        assert device.next_event(0) is None
        migrate(memory, 65536)
        assert device.next_event(0) is None
        assert device.id == device.current_id() == 7


def test_registers_of_a_device_that_is_gone(
    machine: FakePci, memory: int, counter: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They read as 0, which would be an id: nobody is told of that one."""
    monkeypatch.setattr(ways.GuestDevice, "_poll_seconds", 0.01)
    with guest.open() as device:
        migrate(memory, 0)
        counter.end()
        for look in (
            device.current_id,
            lambda: device.next_event(0),
            lambda: next(device.events()),
            lambda: device.wait(0),
            lambda: device.wait(timeout=0),
        ):
            with pytest.raises(DeviceGone, match=f"{A}: the device was unplugged: close it"):
                look()
        assert device.id == 6


def test_registers_of_a_device_that_is_switched_off(
    machine: FakePci, memory: int, counter: Counter
) -> None:
    """As long as it does not decode memory, they read as 0 or as anything else."""
    config = machine.root / "devices" / A / "config"
    on = config.read_bytes()
    with guest.open() as device:
        migrate(memory, 0)
        config.write_bytes(on[:4] + b"\0\0" + on[6:])
        assert device.current_id() == 6
        assert device.next_event(0) is None
        config.write_bytes(on)
        assert device.next_event(0) == IdChanged(6, 0)
        migrate(memory, 3)
        machine.unplug(A)
        with pytest.raises(DeviceGone, match="was unplugged"):
            device.next_event(0)


def test_an_id_that_changes_while_somebody_waits(
    machine: FakePci, memory: int, counter: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing tells of it, so whoever waits for events looks now and then."""
    monkeypatch.setattr(ways.GuestDevice, "_poll_seconds", 0.01)
    with guest.open() as device:
        with once_asleep(lambda: migrate(memory, 8)):
            assert device.next_event() == IdChanged(6, 8)
        with once_asleep(counter.interrupt):
            assert device.next_event(PATIENCE) == Interrupt(0, 1)
        started = time.monotonic()
        assert device.next_event(0.1) is None
        assert time.monotonic() - started >= 0.1


def test_an_id_that_changes_in_asyncio(
    machine: FakePci, memory: int, counter: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ways.GuestDevice, "_poll_seconds", 0.01)

    async def main() -> None:
        async with open_async() as device:
            asyncio.get_running_loop().call_later(0.03, migrate, memory, 9)
            assert await asyncio.wait_for(anext(device), PATIENCE) == IdChanged(6, 9)
            await asyncio.sleep(0.03)  # nobody waits: nobody looks
            migrate(memory, 10)
            assert await asyncio.wait_for(anext(device), PATIENCE) == IdChanged(9, 10)
            assert device.id == 10

    asyncio.run(main())


def test_a_name_follows_its_id(machine: FakePci, memory: int, counter: Counter) -> None:
    with guest.open() as device, Directory.create(device, 4) as names:
        names.publish("mine")
        names.publish("another's", id=3)
        migrate(memory, 11)
        assert names._keep()
        assert {entry.name: entry.id for entry in names.entries()} == {"mine": 11, "another's": 3}
        assert device.next_event(0) == IdChanged(6, 11)


@pytest.mark.parametrize("access", [None, "uio"])
def test_open(
    machine: FakePci, memory: int, counter: Counter, access: guest.device.Access | None
) -> None:
    """Registers, memory and one vector; the driver keeps the device."""
    before, mappings = open_fds(), shared_mappings()
    with guest.open(access=access) as device:
        assert (device.access, device.memory, device.id, device.vectors) == ("uio", "uio", 6, 1)
        device.ring(9, 3)  # others have the four that the device has
        assert struct.unpack("<I", os.pread(memory, 4, ways.DOORBELL)) == (9 << 16 | 3,)
        with pytest.raises(NoSuchVector, match="vector 4: the device has 4 vectors"):
            device.ring(9, 4)
        counter.interrupt()
        assert device.wait(0, 0) == 1
        counter.interrupt(2)
        assert next(device.events()) == Interrupt(0, 2)
        with memoryview(device.region) as view:
            assert len(view) == MIB
            view[-1] = 7
        assert os.pread(memory, 1, PAGE + MIB - 1) == b"\7"
    assert (open_fds(), shared_mappings()) == (before, mappings)
    assert machine.driver(A) == "uio_ivshmem"
    assert machine.writes == []


def test_a_broker_hands_the_one_interrupt_to_every_vector(
    machine: FakePci,
    memory: int,
    counter: Counter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Clients have as many vectors as the peers that they ring, though one is heard here."""
    monkeypatch.delattr(ways.UioDevice, "_map_memory")
    path = tmp_path / "s"
    with (
        guest.open(memory="resource2") as device,
        guest.Broker(device, path, peers=[9]).start() as shared,
        connect(path) as client,
        connect(path) as other,
    ):
        assert (device.vectors, shared.vectors, client.vectors, client.peers) == (1, 4, 4, [9])
        client.ring(9, 3)
        rung = struct.pack("<I", 9 << 16 | 3)
        until(lambda: os.pread(memory, 4, ways.DOORBELL) == rung)
        counter.interrupt()
        for one in (client, other):
            for vector in range(4):
                assert one.wait(vector, PATIENCE) == 1
            assert one.wait(timeout=0) is None


def test_memory_by_sysfs(machine: FakePci, memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(ways.UioDevice, "_map_memory")
    with guest.open(memory="resource2") as device:
        assert (device.access, device.memory) == ("uio", "resource2")
        with memoryview(device.region) as view:
            view[0] = 9
    assert (machine.root / "devices" / A / "resource2").read_bytes()[0] == 9
    before = open_fds()
    with pytest.raises(ValueError, match="uio cannot map the memory by 'vfio'"):
        guest.open(memory="vfio")
    assert open_fds() == before


@pytest.mark.parametrize("missing", range(2))
def test_a_driver_that_does_not_map_it(machine: FakePci, memory: int, missing: int) -> None:
    (machine.root / "devices" / A / f"uio/uio0/maps/map{missing}/addr").write_text("0x77000\n")
    before, mappings = open_fds(), shared_mappings()
    with pytest.raises(OSError, match="the driver uio_ivshmem maps nothing at 0x"):
        guest.open()
    assert (open_fds(), shared_mappings()) == (before, mappings)


def test_no_uio_driver(machine: FakePci) -> None:
    """What is advised instead is there."""
    path = machine.add(A)
    text = "no UIO driver for ivshmem has the device"
    with pytest.raises(OSError, match=f"{text}: '{A}'$"):
        guest.open(access="uio")
    machine.set_group(A, 7)
    with pytest.raises(OSError, match=f"{text}: open it by vfio"):
        guest.open(access="uio")
    assert path.exists()


def test_uio_pci_generic_is_not_meant(machine: FakePci) -> None:
    """It has a UIO device, with neither interrupts nor memory for this one."""
    path = machine.add(A, driver="uio_pci_generic")
    add_maps(path, (0, 0))
    with pytest.raises(OSError, match="the driver uio_pci_generic has the device"):
        guest.open()  # by sysfs, as there is no IOMMU
