"""A guest's device in many states of its kernel: each refusal is one line that says what to do.

Written from what the package promises, without a look at the code: whatever fails, the device is
as it was, nothing stays open, and no process loses the device that it uses.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from support.leaks import open_fds

from ivshmem import DeviceGone, guest
from ivshmem.errors import IvshmemError
from ivshmem.guest import pci, uio, vfio
from ivshmem.guest.device import Access
from ivshmem.testing.fake_pci import FakePci
from ivshmem.testing.fake_vfio import CALLS, FakeVfio

A, GROUP = "0000:00:04.0", 7
ENABLE = "echo Y > "


class Machine(NamedTuple):
    """A guest, with one device that the tests below put into a state."""

    pci: FakePci
    kernel: FakeVfio
    patch: pytest.MonkeyPatch

    def has(self, driver: str = "", *, iommu: bool = True) -> None:
        """The device with a driver, in an IOMMU's group or without one."""
        path = self.pci.add(A, driver=driver, group=GROUP if iommu else None)
        if driver:
            self.pci.takes[driver] = lambda _: True
        if driver.startswith("uio"):
            (path / "uio" / "uio0").mkdir(parents=True)
        if driver == "vfio-pci" and not iommu:
            self.pci.set_group(A, 0, made_by_vfio=True)
        self.pci.bound = self._bound if not iommu else self.pci.bound
        self.pci.unbound = self._unbound if not iommu else self.pci.unbound
        self.kernel.add_group(GROUP) if iommu else self.kernel.add_group(0, iommu=False)

    def _bound(self, address: str, driver: str) -> None:
        if driver == "vfio-pci":
            self.pci.set_group(address, 0, made_by_vfio=True)

    def _unbound(self, address: str, driver: str) -> None:
        if driver == "vfio-pci":
            self.pci.end_group(address)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    kernel = FakeVfio(tmp_path / "dev", monkeypatch)
    kernel.poke(0, 8, (5).to_bytes(4, "little"))
    vfio.NOIOMMU.write_text("N\n")
    machine = FakePci(tmp_path / "pci", monkeypatch)
    for driver in ("vfio-pci", "pci-stub", "uio_ivshmem", "uio_pci_generic"):
        machine.add_driver(driver)  # which takes no device that it is not told to
    monkeypatch.setattr(uio, "DEV", tmp_path)
    (tmp_path / "uio0").touch()
    yield Machine(machine, kernel, monkeypatch)
    kernel.close()


def refusal(machine: Machine, access: Access | None) -> str:
    """What opening the device says; it changes nothing."""
    driver, override, before = machine.pci.driver(A), machine.pci.override(A), open_fds()
    with pytest.raises((OSError, IvshmemError)) as error:
        guest.open(access=access)
    text = str(error.value)
    assert "\n" not in text
    assert (machine.pci.driver(A), machine.pci.override(A)) == (driver, override)
    assert open_fds() == before
    return text


# -- states of a machine, and the remedy that each refusal names -----------------------------------


def nothing(_: Machine) -> None:
    """The state of the machine is all."""


def mode_on(machine: Machine) -> None:
    vfio.NOIOMMU.write_text("Y\n")


def no_mode(machine: Machine) -> None:
    vfio.NOIOMMU.unlink()


def no_types(machine: Machine) -> None:
    machine.kernel.types = set()


def busy(machine: Machine) -> None:
    machine.kernel.busy = True


def no_right(machine: Machine) -> None:
    vfio.NOIOMMU.write_text("Y\n")
    machine.kernel.rawio = False


def no_remapping(machine: Machine) -> None:
    machine.kernel.remaps = False


def mates_in_the_way(machine: Machine) -> None:
    machine.kernel.viable = False


def refuses(file: str, code: int) -> Callable[[Machine], None]:
    def state(machine: Machine) -> None:
        machine.pci.refuse = {f"devices/{A}/{file}": code}

    return state


def cannot_open(name: str, code: int) -> Callable[[Machine], None]:
    """Opening a file of that name fails, below /dev and in sysfs."""

    def state(machine: Machine) -> None:
        real = os.open

        def opens(path: object, *args: object, **kwargs: object) -> int:
            if os.path.basename(str(path)) == name:
                raise OSError(code, os.strerror(code), str(path))
            return real(path, *args, **kwargs)  # type: ignore[arg-type]

        machine.patch.setattr(os, "open", opens)

    return state


def as_user(state: Callable[[Machine], None]) -> Callable[[Machine], None]:
    def both(machine: Machine) -> None:
        state(machine)
        machine.patch.setattr(os, "geteuid", lambda: 1000)

    return both


RW = "mount -o remount,rw /sys"
STATES = [
    # driver, behind an IOMMU, what else, access, what the message names
    ("vfio-pci", False, busy, None, "another process has the device open"),
    ("vfio-pci", False, busy, "noiommu", "ivshmem guest serve"),
    ("vfio-pci", False, no_right, None, "--cap-add SYS_RAWIO"),
    ("vfio-pci", False, no_right, "noiommu", "CAP_SYS_RAWIO"),
    ("", False, no_right, "noiommu", "--cap-add SYS_RAWIO"),
    ("vfio-pci", False, no_types, None, ENABLE),
    ("vfio-pci", False, no_types, "noiommu", ENABLE),
    ("vfio-pci", False, nothing, "vfio", "-device intel-iommu"),
    ("vfio-pci", False, nothing, "sysfs", "open it by noiommu"),
    ("vfio-pci", False, nothing, "uio", "open it by noiommu"),
    ("", False, nothing, "noiommu", ENABLE),
    ("", False, no_mode, "noiommu", "-device intel-iommu"),
    ("", False, nothing, "vfio", ENABLE),
    ("", False, no_mode, "vfio", "-device intel-iommu"),
    ("", False, mode_on, "uio", "open it by noiommu"),
    ("pci-stub", False, nothing, None, "driver/unbind"),
    ("pci-stub", False, nothing, "sysfs", "driver/unbind"),
    ("pci-stub", False, nothing, "noiommu", ENABLE),
    ("pci-stub", False, mode_on, "sysfs", "open it by noiommu"),
    ("uio_ivshmem", False, nothing, "sysfs", "open it by uio"),
    ("uio_ivshmem", False, nothing, "noiommu", ENABLE),
    ("uio_ivshmem", False, nothing, "vfio", ENABLE),
    ("uio_pci_generic", False, nothing, None, "driver/unbind"),
    ("uio_pci_generic", False, nothing, "uio", "no UIO driver for ivshmem has the device"),
    ("vfio-pci", True, busy, None, "ivshmem guest serve"),
    ("vfio-pci", True, busy, "vfio", "another process has the device open"),
    ("vfio-pci", True, nothing, "sysfs", "open it by vfio"),
    ("vfio-pci", True, nothing, "noiommu", "open it by vfio"),
    ("", True, nothing, "noiommu", "open it by vfio"),
    ("", True, mode_on, "noiommu", "open it by vfio"),
    ("", True, no_remapping, "vfio", "intremap=on"),
    ("vfio-pci", True, no_remapping, None, "intremap=on"),
    ("", True, mates_in_the_way, "vfio", "-device pcie-root-port"),
    ("vfio-pci", True, mates_in_the_way, None, "-device pcie-root-port"),
    ("", True, no_types, "vfio", "modprobe vfio_iommu_type1"),
    ("pci-stub", True, nothing, "sysfs", "open it by vfio"),
    ("uio_ivshmem", True, nothing, "sysfs", "open it by vfio"),
    ("", True, refuses("driver_override", errno.EROFS), None, RW),
    ("", True, refuses("driver_override", errno.EROFS), "vfio", RW),
    ("pci-stub", True, refuses("driver_override", errno.EROFS), "vfio", RW),
    ("uio_pci_generic", True, refuses("driver_override", errno.EROFS), "vfio", RW),
    ("", False, refuses("enable", errno.EROFS), None, RW),
    ("", False, refuses("enable", errno.EROFS), "sysfs", RW),
    ("", False, cannot_open("resource0", errno.EROFS), "sysfs", RW),
    ("", True, refuses("driver_override", errno.EACCES), None, "outside of the container"),
    ("", True, refuses("driver_override", errno.EPERM), "vfio", "outside of the container"),
    ("", False, refuses("enable", errno.EACCES), None, "outside of the container"),
    ("", False, cannot_open("resource0", errno.EACCES), "sysfs", "outside of the container"),
    ("", True, as_user(refuses("driver_override", errno.EACCES)), None, "chown its group to you"),
    ("", False, as_user(refuses("enable", errno.EACCES)), None, "run as root"),
    ("", False, as_user(cannot_open("resource0", errno.EACCES)), "sysfs", "run as root"),
    ("vfio-pci", True, as_user(cannot_open("7", errno.EACCES)), None, "chown USER "),
    ("vfio-pci", False, as_user(cannot_open("noiommu-0", errno.EACCES)), None, "run as root"),
    ("vfio-pci", True, as_user(cannot_open("vfio", errno.EACCES)), None, "chown USER "),
    ("", True, cannot_open("vfio", errno.ENOENT), "vfio", "modprobe vfio"),
    ("", True, cannot_open("vfio", errno.ENODEV), "vfio", "modprobe vfio"),
    ("uio_ivshmem", True, as_user(cannot_open("uio0", errno.EACCES)), None, "chown USER "),
    ("uio_ivshmem", False, as_user(cannot_open("uio0", errno.EACCES)), "uio", "chown USER "),
]  # fmt: skip


@pytest.mark.parametrize(("driver", "iommu", "state", "access", "remedy"), STATES)
def test_a_refusal_names_the_remedy(
    machine: Machine,
    driver: str,
    iommu: bool,
    state: Callable[[Machine], None],
    access: Access | None,
    remedy: str,
) -> None:
    machine.has(driver, iommu=iommu)
    state(machine)
    assert remedy in refusal(machine, access)


# -- any call of vfio fails with any error ---------------------------------------------------------

ERRORS = [
    errno.EPERM, errno.EACCES, errno.EIO, errno.ENODEV, errno.ENOMEM, errno.EINVAL, errno.EBUSY
]  # fmt: skip


@pytest.mark.sampled(6)
@pytest.mark.parametrize("iommu", [True, False])
@pytest.mark.parametrize("before", ["", "pci-stub", "vfio-pci"])
@pytest.mark.parametrize("call", sorted({*CALLS.values()} - {"CHECK_EXTENSION"}))
def test_a_call_that_fails_changes_nothing(
    machine: Machine, call: str, before: str, iommu: bool
) -> None:
    """The device has the driver that it had, and can be opened next time."""
    machine.has(before, iommu=iommu)
    mode_on(machine)
    access: Access = "vfio" if iommu else "noiommu"
    for code in ERRORS:
        machine.kernel.fail = {call: code}
        assert str(machine.kernel.dev) in refusal(machine, access), "what refuses"
    machine.kernel.fail = {}
    with guest.open(access=access) as device:
        assert device.id == 5
    assert machine.pci.driver(A) == before


# -- nobody loses the device that it uses ----------------------------------------------------------


@pytest.mark.sampled(3)
@pytest.mark.parametrize("driver", ["uio_ivshmem", "uio_pci_generic"])
@pytest.mark.parametrize("iommu", [True, False])
@pytest.mark.parametrize("access", ["vfio", "noiommu", "measure"])
def test_a_user_by_uio_keeps_the_device(
    machine: Machine, tmp_path: Path, driver: str, iommu: bool, access: str
) -> None:
    machine.has(driver, iommu=iommu)
    mode_on(machine)
    code = "import sys; file = open(sys.argv[1]); print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", code, str(tmp_path / "uio0")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as user:
        assert user.stdout is not None
        user.stdout.readline()
        if access == "measure":
            for speed in guest.measure(seconds=0.0):
                assert "\n" not in speed.error
        else:
            assert refusal(machine, access)  # type: ignore[arg-type]
        assert machine.pci.driver(A) == driver
        assert machine.pci.writes == []
        user.communicate()


# -- unplugged: DeviceGone, from each call and every time ------------------------------------------

WAITS: list[Callable[[guest.GuestDevice], object]] = [
    lambda device: device.wait(0),
    lambda device: device.wait(1, 0),
    lambda device: device.wait(),
    lambda device: device.wait(timeout=0),
    lambda device: device.next_event(),
    lambda device: device.next_event(0),
    lambda device: next(device.events()),
    lambda device: list(device.events(0)),
]


@pytest.mark.parametrize("iommu", [True, False])
@pytest.mark.parametrize("wait", WAITS)
def test_a_device_that_is_unplugged(
    machine: Machine, wait: Callable[[guest.GuestDevice], object], iommu: bool
) -> None:
    machine.has("vfio-pci", iommu=iommu)
    with guest.open() as device:
        machine.kernel.interrupt(4, 0)  # VFIO_PCI_REQ_IRQ_INDEX
        for _ in range(2):
            with pytest.raises(DeviceGone, match=f"^{A}: the device was unplugged: close it$"):
                wait(device)


def test_the_states_are_seen_as_they_are(machine: Machine) -> None:
    """The fakes, too: each kind of group is what `guest list` says of it."""
    machine.has("vfio-pci", iommu=False)
    device = pci.look(A)
    assert (device.iommu_group, device.noiommu_group) == (None, 0)
