"""vfio over files that stand for the kernel's: no-IOMMU mode, and every way to be refused.

Nothing of this can be had from a stock kernel; what can is in tests/vm.
"""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.leaks import open_fds, shared_mappings
from support.limits import free_fds
from support.waiting import PATIENCE, Background

from ivshmem import DeviceGone, Interrupt, NoInterrupts, NoSuchVector, guest
from ivshmem.errors import VfioUnusable
from ivshmem.guest import vfio
from ivshmem.guest.vfio import Vfio
from ivshmem.testing.fake_pci import FakePci
from ivshmem.testing.fake_vfio import CONFIG, MSIX, NOIOMMU, REQUEST, TYPE1, FakeVfio

A = "0000:00:04.0"
GROUP = 7


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeVfio]:
    kernel = FakeVfio(tmp_path / "dev", monkeypatch)
    yield kernel
    kernel.close()


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakePci:
    return FakePci(tmp_path / "pci", monkeypatch)


# -- one device -----------------------------------------------------------------------------------


def test_open(kernel: FakeVfio) -> None:
    """In the order that the kernel asks for, and nothing is left open."""
    path = kernel.add_group(GROUP)
    before = open_fds()
    device = Vfio(A, GROUP)
    assert device.path == path
    assert kernel.calls == [
        "GET_API_VERSION",
        "GROUP_GET_STATUS",
        "GROUP_SET_CONTAINER",
        "CHECK_EXTENSION",
        "SET_IOMMU",
        "GROUP_GET_DEVICE_FD",
    ]
    assert len(open_fds()) == len(before) + 3
    assert not any(os.get_inheritable(fd) for fd in set(open_fds()) - set(before))
    device.close()
    device.close()
    assert open_fds() == before


@pytest.mark.parametrize("types", [{TYPE1}, {3}, {TYPE1, 3}])
def test_each_kind_of_iommu(kernel: FakeVfio, types: set[int]) -> None:
    kernel.add_group(GROUP)
    kernel.types = types
    device = Vfio(A, GROUP)
    assert list(kernel._containers.values()) == [max(types)]
    device.close()


def test_open_without_an_iommu(kernel: FakeVfio) -> None:
    path = kernel.add_group(0, iommu=False)
    assert path.name == "noiommu-0"
    device = Vfio(A, 0, iommu=False)
    assert device.path == path
    assert list(kernel._containers.values()) == [NOIOMMU]
    device.close()


def unusable(text: str, **answers: object) -> tuple[dict[str, object], str]:
    return answers, text


@pytest.mark.parametrize(
    ("answers", "text"),
    [
        unusable("vfio has API version 1, not 0", version=1),
        unusable("other devices of its IOMMU group have drivers: unbind those", viable=False),
        unusable("does not remap interrupts: give QEMU .*allow_unsafe_interrupts", remaps=False),
        unusable("does not remap interrupts", fail={"GROUP_SET_CONTAINER": errno.EPERM}),
    ],
)
def test_what_makes_it_unusable(kernel: FakeVfio, answers: dict[str, object], text: str) -> None:
    """The message says what to do, with the group's path; and nothing stays open."""
    path = kernel.add_group(GROUP)
    for name, value in answers.items():
        setattr(kernel, name, value)
    before = open_fds()
    with pytest.raises(VfioUnusable, match=text) as error:
        Vfio(A, GROUP)
    assert error.value.filename == str(path)
    assert open_fds() == before
    assert "GROUP_GET_DEVICE_FD" not in kernel.calls


def test_no_iommu_mode_is_for_the_privileged(kernel: FakeVfio) -> None:
    kernel.add_group(0, iommu=False)
    kernel.rawio = False
    before = open_fds()
    with pytest.raises(VfioUnusable, match="is for processes with CAP_SYS_RAWIO"):
        Vfio(A, 0, iommu=False)
    assert open_fds() == before


@pytest.mark.parametrize("missing", ["vfio", str(GROUP)])
def test_what_the_kernel_does_not_have(kernel: FakeVfio, missing: str) -> None:
    kernel.add_group(GROUP)
    (kernel.dev / missing).unlink()
    before = open_fds()
    with pytest.raises(VfioUnusable, match="no such vfio device in this kernel") as error:
        Vfio(A, GROUP)
    assert (error.value.errno, error.value.filename) == (errno.ENODEV, str(kernel.dev / missing))
    assert open_fds() == before


def test_somebody_else_has_it(kernel: FakeVfio) -> None:
    """Not VfioUnusable: to fall back to another way would take the device from who has it."""
    path = kernel.add_group(GROUP)
    kernel.busy = True
    before = open_fds()
    with pytest.raises(OSError, match="another process has the device open") as error:
        Vfio(A, GROUP)
    assert not isinstance(error.value, VfioUnusable)
    assert (error.value.errno, error.value.filename) == (errno.EBUSY, str(path))
    assert open_fds() == before


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("code", [errno.EIO, errno.EBUSY, errno.EINVAL])
def test_whatever_call_fails(kernel: FakeVfio, number: int, code: int) -> None:
    kernel.add_group(GROUP)
    kernel.fail = {number: code}
    before = open_fds()
    with pytest.raises(OSError) as error:
        Vfio(A, GROUP)
    assert error.value.errno == code
    assert not isinstance(error.value, VfioUnusable)
    assert len(kernel.calls) == number + 1
    assert open_fds() == before


@pytest.mark.parametrize("free", range(3))
def test_no_descriptor_is_left(kernel: FakeVfio, free: int) -> None:
    kernel.add_group(GROUP)
    before = open_fds()
    with free_fds(free), pytest.raises(OSError, match="Too many open files"):
        Vfio(A, GROUP)
    assert open_fds() == before


def test_regions_and_configuration(kernel: FakeVfio) -> None:
    kernel.add_group(GROUP)
    kernel.mappable = {2}
    device = Vfio(A, GROUP)
    assert device.region(0) == (0, 256, False)
    assert device.region(2) == (2 << 24, 1 << 20, True)
    assert device.region(vfio.CONFIG).size == 256
    with pytest.raises(OSError, match="Invalid argument"):
        device.region(9)
    kernel.poke(CONFIG, 2, b"\x11\x22\x33\x44\x55\x66")
    assert device.config(4) == 0x4433
    device.set_config(4, 0x0406)
    assert kernel.peek(CONFIG, 0, 8) == 0x6655_0406_2211_0000
    device.close()


@pytest.mark.parametrize("count", [0, 1, 2, 64])
def test_interrupts(kernel: FakeVfio, count: int) -> None:
    """Vector n is counted in the n-th eventfd."""
    kernel.add_group(GROUP)
    kernel.vectors = count
    device = Vfio(A, GROUP)
    assert device.vectors() == count
    fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(count)]
    device.listen(fds)
    for number in range(count):
        kernel.interrupt(MSIX, number)
        assert os.eventfd_read(fds[number]) == 1
        for fd in fds:
            with pytest.raises(BlockingIOError):
                os.eventfd_read(fd)
    if count:
        with pytest.raises(OSError, match="Invalid argument"):
            device.listen(fds)
    for fd in fds:
        os.close(fd)
    device.close()


@pytest.mark.parametrize("asks", [True, False])
def test_removal(kernel: FakeVfio, asks: bool) -> None:
    kernel.add_group(GROUP)
    kernel.asks = asks
    device = Vfio(A, GROUP)
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    device.listen_for_removal(fd)  # a kernel that does not ask is no error
    if asks:
        kernel.interrupt(REQUEST, 0)
        assert os.eventfd_read(fd) == 1
    assert bool(kernel.eventfds) == asks
    os.close(fd)
    device.close()


def test_who_has_the_group_open(kernel: FakeVfio) -> None:
    path = kernel.add_group(GROUP)
    before = open_fds()
    assert not vfio.is_held(path)
    assert not vfio.is_held(kernel.dev / "8"), "it is gone"
    device = Vfio(A, GROUP)
    assert vfio.is_held(path)
    device.close()
    assert not vfio.is_held(path)
    assert open_fds() == before


@pytest.mark.parametrize(
    ("text", "enabled"), [("Y\n", True), ("1\n", True), ("N\n", False), ("0\n", False), ("", False)]
)
def test_whether_the_mode_is_on(kernel: FakeVfio, text: str, enabled: bool) -> None:
    assert not vfio.noiommu_enabled(), "stock kernels have no such file"
    vfio.NOIOMMU.write_text(text)
    assert vfio.noiommu_enabled() == enabled


# -- the guest's device by it ---------------------------------------------------------------------


def add_noiommu(machine: FakePci, kernel: FakeVfio, *, vectors: int = 2, driver: str = "") -> None:
    """A device that has a group only while vfio-pci has it, as in no-IOMMU mode."""
    machine.add_driver("vfio-pci")
    machine.add(A, vectors=vectors, driver=driver)
    vfio.NOIOMMU.write_text("Y\n")
    kernel.vectors = vectors
    kernel.poke(0, 8, (5).to_bytes(4, "little"))

    def bound(address: str, driver: str) -> None:
        if driver == "vfio-pci":
            machine.set_group(address, 0, made_by_vfio=True)
            kernel.add_group(0, iommu=False)

    def unbound(address: str, driver: str) -> None:
        if driver == "vfio-pci":
            machine.end_group(address)

    machine.bound, machine.unbound = bound, unbound


@pytest.fixture
def noiommu(machine: FakePci, kernel: FakeVfio) -> FakePci:
    add_noiommu(machine, kernel, driver="uio_pci_generic")
    return machine


@pytest.mark.parametrize("access", [None, "noiommu"])
def test_a_device_in_no_iommu_mode(
    noiommu: FakePci, kernel: FakeVfio, access: guest.device.Access | None
) -> None:
    """Registers, memory and interrupts as with an IOMMU; and all is as before at the end."""
    before, mappings = open_fds(), shared_mappings()
    with guest.open(access=access) as device:
        assert (device.access, device.memory, device.id, device.vectors) == (
            "noiommu",
            "vfio",
            5,
            2,
        )
        assert noiommu.driver(A) == "vfio-pci"
        assert kernel.command == [2, 6], "memory decoding, interrupts, and the bus-master bit"
        assert kernel.peek(CONFIG, 4, 2) == 6
        device.ring(3, 1)
        assert kernel.peek(0, 12) == 3 << 16 | 1
        with pytest.raises(NoSuchVector, match="vector 2: the device has 2 vectors"):
            device.ring(3, 2)
        for vector in range(2):
            kernel.interrupt(MSIX, vector)
            assert device.wait(timeout=PATIENCE) == Interrupt(vector, 1)
        with memoryview(device.region) as memory:
            assert len(memory) == 1 << 20
            memory[:4] = b"host"
            assert kernel.peek(2, 0) == int.from_bytes(b"host", "little")
    assert noiommu.driver(A) == "uio_pci_generic"
    assert {fd for fd in open_fds() if fd not in kernel.eventfds.values()} == set(before)
    assert shared_mappings() == mappings


def test_registers_that_are_not_mapped(noiommu: FakePci, kernel: FakeVfio) -> None:
    """Where vfio does not map them, and it would be wrong to try: the page is others', too."""
    kernel.mappable = {2}
    before = sum(shared_mappings().values())
    with guest.open() as device:
        made = sum(shared_mappings().values()) - before
        assert made == 2, "the memory, the kernel's ring of a relay, and nothing else"
        assert device.id == 5
        device.ring(9, 0)
        assert kernel.peek(0, 12) == 9 << 16
        os.pwrite(kernel.file, bytes(4), 12)
        assert kernel.peek(0, 0, 256) == 5 << 64, "and nothing else was written"


WAITS: list[Callable[[guest.GuestDevice], object]] = [
    lambda device: device.wait(0),
    lambda device: device.wait(0, 0),
    lambda device: device.wait(timeout=0),
    lambda device: device.wait(),
    lambda device: next(device.events()),
    lambda device: next(device.events(timeout=0)),
]


@pytest.mark.parametrize("wait", WAITS)
def test_a_device_that_is_asked_back(
    noiommu: FakePci, kernel: FakeVfio, wait: Callable[[guest.GuestDevice], object]
) -> None:
    with guest.open() as device:
        kernel.interrupt(REQUEST, 0)
        for _ in range(2):
            with pytest.raises(DeviceGone, match=f"{A}: the device was unplugged: close it"):
                wait(device)


def test_asked_back_while_a_thread_waits(noiommu: FakePci, kernel: FakeVfio) -> None:
    with guest.open() as device:
        waiting = Background(lambda: device.wait(1))
        waiting.wait_until_reading()
        kernel.interrupt(REQUEST, 0)
        with pytest.raises(DeviceGone):
            waiting.result()
        noiommu.unplug(A)  # close() does not mind


def test_a_kernel_that_does_not_ask(noiommu: FakePci, kernel: FakeVfio) -> None:
    kernel.asks = False
    with guest.open() as device:
        assert device.wait(1, 0) is None
        kernel.interrupt(MSIX, 1)
        assert device.wait(1, PATIENCE) == 1


def test_somebody_keeps_the_group(noiommu: FakePci, kernel: FakeVfio) -> None:
    """A forked child, say: then the driver stays, for the kernel would wait for it to let go."""
    device = guest.open()
    kernel.busy = True
    device.close()
    assert noiommu.driver(A) == "vfio-pci"


def test_a_forgotten_device(noiommu: FakePci, kernel: FakeVfio) -> None:
    """It is given back as soon as nobody has it, and not when garbage is collected next."""
    with pytest.warns(ResourceWarning, match="unclosed <ivshmem.guest.GuestDevice at"):
        guest.open()
    assert noiommu.driver(A) == "uio_pci_generic"
    assert str(kernel.dev) not in str(open_fds())


def test_the_former_driver_comes_last(noiommu: FakePci, kernel: FakeVfio) -> None:
    """When the device is unbound, nothing of it is open or mapped here."""
    seen: list[tuple[bool, int]] = []

    def unbound(address: str, driver: str) -> None:
        seen.append((str(kernel.dev) in str(open_fds()), mappings() - before))

    def mappings() -> int:
        return sum(shared_mappings().values())

    before = mappings()
    with guest.open() as device:
        noiommu.unbound = unbound
        assert mappings() == before + 3, "registers, memory, and the ring of a relay"
        view = memoryview(device.region)
        with pytest.raises(BufferError):
            device.close()
        assert (seen, noiommu.driver(A)) == ([], "vfio-pci")
        view.release()
    assert seen == [(False, 0)]
    assert noiommu.driver(A) == "uio_pci_generic"


def test_whatever_call_fails_the_device_is_given_back(noiommu: FakePci, kernel: FakeVfio) -> None:
    guest.open().close()
    total = len(kernel.calls)
    assert total > 10
    assert kernel.calls[-1] == "DEVICE_SET_IRQS"
    for number in range(total - 1):  # the last one is about removal: without it, it goes
        before = set(open_fds()) - set(kernel.eventfds.values())
        kernel.calls.clear()
        kernel.fail = {number: errno.EIO}
        with pytest.raises(OSError, match="Input/output error"):
            guest.open()
        assert len(kernel.calls) == number + 1
        assert noiommu.driver(A) == "uio_pci_generic"
        assert set(open_fds()) - set(kernel.eventfds.values()) == before
    kernel.calls.clear()
    kernel.fail = {total - 1: errno.EIO}
    with guest.open() as device:
        kernel.interrupt(MSIX, 1)
        assert device.wait(timeout=PATIENCE) == Interrupt(1, 1)


@pytest.mark.parametrize("answer", ["viable", "rawio"])
def test_where_it_is_unusable_sysfs_it_is(machine: FakePci, kernel: FakeVfio, answer: str) -> None:
    """With the reason in what waiting raises; asked for by name it is an error."""
    add_noiommu(machine, kernel)
    setattr(kernel, answer, False)
    reason = "have drivers" if answer == "viable" else "CAP_SYS_RAWIO"
    with guest.open() as device:
        assert device.access == "sysfs"
        with pytest.raises(NoInterrupts, match=f"vfio cannot be used: .*{reason}"):
            device.wait(0, 0)
    with pytest.raises(VfioUnusable, match=reason):
        guest.open(access="noiommu")
    assert machine.driver(A) == ""


def test_a_mode_that_is_off(
    machine: FakePci, kernel: FakeVfio, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.add_driver("vfio-pci")
    machine.add(A)
    with guest.open() as device:
        assert device.access == "sysfs"
        with pytest.raises(NoInterrupts, match="this guest has no IOMMU, which vfio needs"):
            device.wait(0, 0)
    assert kernel.calls == []
    with pytest.raises(VfioUnusable, match="this guest has no IOMMU, which vfio needs: give QEMU"):
        guest.open(access="vfio")
    with pytest.raises(
        VfioUnusable, match="this kernel's vfio has no no-IOMMU mode; this guest has no"
    ):
        guest.open(access="noiommu")
    vfio.NOIOMMU.write_text("N\n")
    switch = f"`echo Y > {vfio.NOIOMMU}`"
    monkeypatch.setattr(vfio, "ENABLE_NOIOMMU", switch.strip("`"))
    with pytest.raises(VfioUnusable, match=f"vfio's no-IOMMU mode is off; .*: as root, {switch}"):
        guest.open(access="noiommu")
    with guest.open() as device, pytest.raises(NoInterrupts, match=f"or let vfio .*: {switch}"):
        device.wait(0, 0)
    assert machine.writes == [(f"devices/{A}/enable", word) for word in "1010"]
    subprocess.run(["sh", "-c", vfio.ENABLE_NOIOMMU], check=True)
    assert vfio.noiommu_enabled()


def test_a_plain_device(machine: FakePci, kernel: FakeVfio) -> None:
    add_noiommu(machine, kernel, vectors=0)
    with guest.open(access="noiommu") as device:
        assert (device.id, device.vectors) == (0, 0)
        for call in (
            lambda: device.ring(0),
            lambda: device.wait(timeout=0),
            lambda: device.wait(0, 0),
            lambda: next(device.events(0)),
            device.fileno,
        ):
            with pytest.raises(NoInterrupts, match="a plain device has no doorbells"):
                call()
    assert machine.driver(A) == ""


@pytest.mark.parametrize("locked", [True, False])
@pytest.mark.parametrize("driver", ["", "vfio-pci"])
def test_which_way_a_plain_device_is_opened(
    machine: FakePci, kernel: FakeVfio, locked: bool, driver: str
) -> None:
    """By sysfs, which leaves drivers alone; unless that is closed, or vfio-pci has it anyway."""
    machine.add_driver("vfio-pci")
    machine.add(A, vectors=0, group=GROUP, driver=driver)
    kernel.add_group(GROUP)
    kernel.vectors = 0
    mode = "none [integrity]" if locked else "[none] integrity"
    (machine.root / "lockdown").write_text(mode)
    with guest.open() as device:
        assert device.access == ("vfio" if locked or driver else "sysfs")
    assert machine.driver(A) == driver


def test_what_vfio_pci_has_is_not_tried_by_sysfs(machine: FakePci, kernel: FakeVfio) -> None:
    """It would say "use vfio"; what vfio said is the news."""
    machine.add(A, group=GROUP, driver="vfio-pci")
    kernel.add_group(GROUP)
    kernel.remaps = False
    with pytest.raises(VfioUnusable, match="does not remap interrupts"):
        guest.open()


def test_no_driver_of_that_name(machine: FakePci, kernel: FakeVfio) -> None:
    machine.add(A, group=GROUP)
    with pytest.raises(VfioUnusable, match="this kernel has no vfio-pci"):
        guest.open(access="vfio")
    with guest.open() as device:
        with pytest.raises(NoInterrupts, match="vfio cannot be used: this kernel has no vfio-pci"):
            device.fileno()
