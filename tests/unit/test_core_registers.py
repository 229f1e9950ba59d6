"""Registers, Signaller, and Doorbells over them: what a guest's device is made of.

A memfd stands for the device. That a load or a store is one access of 32 bits cannot be seen there;
tests/vm proves it with the real one.
"""

from __future__ import annotations

import fcntl
import os
import struct
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.leaks import open_fds, shared_mappings
from support.limits import free_fds
from support.peer import Eventfds, memory_fd
from support.waiting import PATIENCE, Background, in_child

from ivshmem import ClosedError, DeviceGone, Interrupt, NoSuchPeer, NoSuchVector
from ivshmem._core import Doorbells
from ivshmem.native.descriptors import FdArray, Signaller
from ivshmem.native.mapping import Registers

PAGE = os.sysconf("SC_PAGE_SIZE")
BAR = 256  # bytes of registers
FULL = (1 << 64) - 2


@pytest.fixture
def fd() -> Iterator[int]:
    """Three pages of a device."""
    fd = memory_fd(3 * PAGE)
    yield fd
    os.close(fd)


def word(fd: int, offset: int) -> int:
    value: int = struct.unpack("<I", os.pread(fd, 4, offset))[0]
    return value


# -- Registers ------------------------------------------------------------------------------------

both_kinds = pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "by pread and pwrite"])
# The start of a page; the middle of the first page and of another; the very end of the file.
each_offset = pytest.mark.parametrize("offset", [0, 256, 2 * PAGE + 0x100, 3 * PAGE - BAR])


@both_kinds
@each_offset
def test_load_and_store(fd: int, mapped: bool, offset: int) -> None:
    """Little-endian words at their places, and nothing beside them."""
    registers = Registers(fd, offset, BAR, mapped=mapped)
    for at in (0, 4, 12, BAR - 4):
        registers.store(at, 0x01020304 + at)
        assert word(fd, offset + at) == 0x01020304 + at
        assert registers.load(at) == 0x01020304 + at
    os.pwrite(fd, b"\xfe\xff\xff\xff", offset + 8)
    assert registers.load(8) == 0xFFFFFFFE, "unsigned"
    data = os.pread(fd, 3 * PAGE, 0)
    used = {offset + at + i for at in (0, 4, 8, 12, BAR - 4) for i in range(4)}
    assert not any(byte for at, byte in enumerate(data) if at not in used)
    registers.close()


@both_kinds
@pytest.mark.parametrize("at", [-4, -1, 1, 2, 3, 6, BAR - 3, BAR, BAR + 4, 1 << 40, sys.maxsize])
def test_no_such_register(fd: int, mapped: bool, at: int) -> None:
    registers = Registers(fd, PAGE + 256, BAR, mapped=mapped)
    for call in (lambda: registers.load(at), lambda: registers.store(at, 1)):
        with pytest.raises(IndexError, match=f"no register at {at}: there are 256 bytes"):
            call()
    assert not any(os.pread(fd, 3 * PAGE, 0))
    registers.close()


@both_kinds
def test_values_that_are_no_32_bits(fd: int, mapped: bool) -> None:
    registers = Registers(fd, 0, BAR, mapped=mapped)
    registers.store(0, 0xFFFFFFFF)
    assert registers.load(0) == 0xFFFFFFFF
    for value in (-1, 1 << 32):
        with pytest.raises(OverflowError):
            registers.store(0, value)
    text: Any = "1"
    with pytest.raises(TypeError):
        registers.store(0, text)
    assert registers.load(0) == 0xFFFFFFFF
    registers.close()


@both_kinds
def test_closed_registers(fd: int, mapped: bool) -> None:
    before = shared_mappings()
    registers = Registers(fd, 256, BAR, mapped=mapped)
    assert (shared_mappings() != before) == mapped
    registers.close()
    registers.close()
    assert shared_mappings() == before
    for call in (lambda: registers.load(0), lambda: registers.store(0, 1)):
        with pytest.raises(ClosedError, match="the device is closed"):
            call()


def test_mapped_registers_need_no_descriptor() -> None:
    fd = memory_fd()
    registers = Registers(fd, 0, BAR)
    os.close(fd)
    registers.store(12, 7)
    assert registers.load(12) == 7
    before = shared_mappings()
    del registers  # forgotten ones are unmapped
    assert sum(before.values()) == sum(shared_mappings().values()) + 1


def test_registers_that_cannot_be_had(fd: int) -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        Registers(-1, 0, BAR)
    no_memory = os.eventfd(0)
    with pytest.raises(OSError, match="No such device"):
        Registers(no_memory, 0, BAR)
    os.close(no_memory)
    closed = Registers(no_memory, 0, BAR, mapped=False)
    for call in (lambda: closed.load(0), lambda: closed.store(0, 1)):
        with pytest.raises(OSError, match="Bad file descriptor"):
            call()
    closed.close()


# -- Signaller ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 128, 200])
def test_signal(count: int) -> None:
    signaller = Signaller()
    with Eventfds() as fds:
        made = fds.make(count)
        others = fds.make(1)
        signaller.signal(made)
        assert [os.eventfd_read(fd) for fd in made] == [1] * count
        for _ in range(3):
            signaller.signal(tuple(made))
        assert [os.eventfd_read(fd) for fd in made] == [3] * count
        with pytest.raises(BlockingIOError):
            os.eventfd_read(others[0])
    signaller.close()


def test_the_same_eventfd_twice() -> None:
    signaller = Signaller()
    with Eventfds() as fds:
        (fd,) = fds.make()
        signaller.signal([fd] * 70)
        assert os.eventfd_read(fd) == 70
    signaller.close()


def test_a_full_counter_holds_nobody() -> None:
    """What a hostile client does to a plain write: full, and O_NONBLOCK cleared."""

    def signal_them() -> None:
        signaller = Signaller()
        with Eventfds() as fds:
            full, other = fds.make(2)
            fcntl.fcntl(full, fcntl.F_SETFL, 0)
            os.eventfd_write(full, FULL)
            for number in range(1, 101):
                signaller.signal([full, other])
                assert os.eventfd_read(other) == number or number > 1
            # The kernel lets its own signal fill the counter to the brim, and not wrap it.
            assert os.eventfd_read(full) in (FULL, FULL + 1)
            signaller.signal([full])
            assert os.eventfd_read(full) == 1, "it works again"
        signaller.close()

    # In a child: one that hangs is then not this process.
    child = Background(lambda: in_child(signal_them))
    child.result()


def test_what_cannot_be_signalled() -> None:
    """An error at the wrong one; those before it were signalled, and the signaller stays usable."""
    signaller = Signaller()
    reader, writer = os.pipe()
    text: Any = "x"
    with Eventfds() as fds:
        before, after = fds.make(2)
        os.close(writer)
        with pytest.raises(OSError, match="Invalid argument"):
            signaller.signal([before, reader, after])  # no eventfd
        for wrong, kind in ((text, TypeError), (-1, OverflowError)):
            with pytest.raises(kind):
                signaller.signal([before, wrong, after])
        assert os.eventfd_read(before) == 1, "not where the list itself is wrong"
        for _ in range(200):  # more than it has requests
            with pytest.raises(OSError, match="Bad file descriptor"):
                signaller.signal([before, writer])
        assert os.eventfd_read(before) == 200
        with pytest.raises(BlockingIOError):
            os.eventfd_read(after)
        signaller.signal([before, after])
        assert [os.eventfd_read(fd) for fd in (before, after)] == [1, 1]
    os.close(reader)
    signaller.close()


def test_closed_signaller() -> None:
    before = open_fds()
    signaller = Signaller()
    with Eventfds() as fds:
        (fd,) = fds.make()
        in_child(signaller.close)  # a forked child's copy
        signaller.signal([fd])
        assert os.eventfd_read(fd) == 1
        signaller.close()
        signaller.close()
        with pytest.raises(ClosedError, match="the signaller is closed"):
            signaller.signal([fd])
        with pytest.raises(BlockingIOError):
            os.eventfd_read(fd)
    assert open_fds() == before


def test_no_descriptor_for_a_signaller() -> None:
    def fail() -> None:
        before = open_fds()
        with free_fds(0), pytest.raises(OSError, match="Too many open files"):
            Signaller()
        assert open_fds() == before

    in_child(fail)


def test_a_forgotten_signaller() -> None:
    before = open_fds()
    for _ in range(50):
        Signaller()
    assert open_fds() == before


# -- Doorbells by a register ----------------------------------------------------------------------

DOORBELL = 12
PEER_LIMIT = 65535


class Device(Doorbells):
    """An endpoint as a guest's device is one: it rings by a register and is told of its end."""

    def __init__(self, fd: int, *, mapped: bool = True, offset: int = 0, vectors: int = 4) -> None:
        self.listened = FdArray.eventfds(2)
        for i in range(2):
            self._add_vector(os.dup(self.listened[i]))
        self.removal = FdArray.eventfds(1)
        self.registers_of_it = Registers(fd, offset, BAR, mapped=mapped)
        self._ring_by(self.registers_of_it, DOORBELL, vectors)

    def _read_news(self) -> None:
        raise DeviceGone("it was unplugged")

    def _look_for(self, peer: int, vector: int) -> None:
        if not 0 <= peer <= PEER_LIMIT:
            raise NoSuchPeer(f"peer {peer}")
        raise NoSuchVector(f"vector {vector}")

    def end(self) -> None:
        self.close()
        self.registers_of_it.close()
        self.listened.close()
        self.removal.close()


@pytest.fixture
def device(fd: int) -> Iterator[Device]:
    device = Device(fd)
    yield device
    device.end()


@both_kinds
@pytest.mark.parametrize("offset", [0, PAGE + 0x100])
def test_ring_stores_peer_and_vector(fd: int, mapped: bool, offset: int) -> None:
    device = Device(fd, mapped=mapped, offset=offset)
    for peer, vector in ((0, 1), (1, 0), (7, 3), (65535, 2), (0, 0)):
        device.ring(peer, vector)
        assert word(fd, offset + DOORBELL) == peer << 16 | vector
    device.ring(9)
    assert word(fd, offset + DOORBELL) == 9 << 16
    os.pwrite(fd, bytes(4), offset + DOORBELL)
    assert not any(os.pread(fd, 3 * PAGE, 0)), "nothing else was written"
    device.end()


def test_whom_no_register_can_ring(fd: int, device: Device) -> None:
    for peer in (-1, 65536, 1 << 40):
        with pytest.raises(NoSuchPeer, match=f"peer {peer}"):
            device.ring(peer)
    for vector in (-1, 4, 65536, 1 << 40):
        with pytest.raises(NoSuchVector, match=f"vector {vector}"):
            device.ring(1, vector)
    strange: list[Any] = ["x", None, 1.5, []]
    for wrong in strange:
        with pytest.raises(TypeError):
            device.ring(wrong)
    assert not any(os.pread(fd, 3 * PAGE, 0)), "nobody was rung"


def test_a_device_without_vectors_rings_nobody(fd: int) -> None:
    device = Device(fd, vectors=0)
    with pytest.raises(NoSuchVector):
        device.ring(0, 0)
    assert not any(os.pread(fd, 3 * PAGE, 0))
    device.end()


def test_a_ring_that_the_system_refuses(fd: int) -> None:
    """Behind pwrite a device that is gone is an error; it is not taken for success."""
    reader, writer = os.pipe()
    device = Device(reader, mapped=False)
    with pytest.raises(OSError, match="Illegal seek"):
        device.ring(0)
    device.end()
    os.close(reader)
    os.close(writer)


def test_closed_device(fd: int, device: Device) -> None:
    device.close()
    with pytest.raises(ClosedError, match="the endpoint is closed"):
        device.ring(1)
    assert not any(os.pread(fd, 3 * PAGE, 0))


def test_closed_registers_are_not_rung(fd: int, device: Device) -> None:
    """The descriptor may be another file's by now."""
    device.registers_of_it.close()
    with pytest.raises(ClosedError, match="the device is closed"):
        device.ring(1)
    assert not any(os.pread(fd, 3 * PAGE, 0))


# Each way of waiting, for vector 1: with a time limit, and its result for one ring.
WAITS: list[tuple[Callable[[Device, float | None], object], object]] = [
    (lambda d, t: d.wait(1, t), 1),
    (lambda d, t: d.wait(timeout=t), Interrupt(1, 1)),
    (lambda d, t: d._wait_event(t), Interrupt(1, 1)),
]
each_wait = pytest.mark.parametrize(("wait", "one"), WAITS, ids=["one vector", "any", "event"])
Wait = Callable[[Device, float | None], object]


@each_wait
@pytest.mark.parametrize("timeout", [0, 0.001, PATIENCE, None])
def test_what_is_urgent_ends_each_wait(
    device: Device, wait: Wait, one: object, timeout: float | None
) -> None:
    device._watch_news(device.removal[0], urgent=True)
    if timeout is not None and timeout < 1:
        assert not wait(device, timeout), "nothing has happened yet"
    device.removal.signal(0)
    for _ in range(2):
        with pytest.raises(DeviceGone, match="it was unplugged"):
            wait(device, timeout)


@each_wait
def test_what_is_urgent_wakes_who_waits(device: Device, wait: Wait, one: object) -> None:
    device._watch_news(device.removal[0], urgent=True)
    waiting = Background(lambda: wait(device, None))
    waiting.wait_until_asleep()
    device.removal.signal(0)
    with pytest.raises(DeviceGone):
        waiting.result()


def test_an_interrupt_that_came_before_is_not_lost(device: Device) -> None:
    device._watch_news(device.removal[0], urgent=True)
    device.listened.signal(1)
    device.removal.signal(0)
    assert device.wait(1, 0) == 1
    with pytest.raises(DeviceGone):
        device.wait(1, 0)


def test_what_is_not_urgent_does_not_disturb_the_wait_for_one_vector(device: Device) -> None:
    device._watch_news(device.removal[0])
    device.removal.signal(0)
    assert device.wait(1, 0) is None
    assert device.wait(1, 0.01) is None
    waiting = Background(lambda: device.wait(1, None))
    waiting.wait_until_asleep()
    device.listened.signal(1)
    assert waiting.result() == 1


@each_wait
def test_what_is_no_more_watched_is_not_urgent(device: Device, wait: Wait, one: object) -> None:
    device._watch_news(device.removal[0], urgent=True)
    assert not wait(device, 0)
    device._unwatch_news()
    device.removal.signal(0)
    assert not wait(device, 0)
    device.listened.signal(1)
    assert wait(device, PATIENCE) == one
