"""A device by sysfs, over files that stand for it: what it refuses, and where the registers are."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.leaks import open_fds, shared_mappings
from support.waiting import in_child

from ivshmem import NoInterrupts, Region, guest
from ivshmem.guest.device import DOORBELL, IVPOSITION
from ivshmem.testing.fake_pci import FakePci

A = "0000:00:04.0"
MIB = 1 << 20


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakePci:
    return FakePci(tmp_path / "pci", monkeypatch)


@pytest.mark.parametrize("inside", [0, 0x100, 0xF00])
def test_registers_inside_a_page(machine: FakePci, inside: int) -> None:
    """sysfs maps the page that the BAR is in."""
    path = machine.add(A, start=0x10001000 + inside)
    with (path / "resource0").open("r+b") as file:
        file.seek(inside + IVPOSITION)
        file.write(struct.pack("<I", 9))
    before, mappings = open_fds(), shared_mappings()
    with guest.open() as device:
        assert (device.id, device.access, device.memory) == (9, "sysfs", "resource2")
        assert (path / "enable").read_text() == "1\n"
        device.ring(4, 1)
        with memoryview(device.region) as memory:
            assert len(memory) == MIB
            memory[5] = 1
    assert (path / "enable").read_text() == "0\n"
    assert (open_fds(), shared_mappings()) == (before, mappings)
    registers = (path / "resource0").read_bytes()
    assert struct.unpack_from("<I", registers, inside + DOORBELL) == (4 << 16 | 1,)
    assert (path / "resource2").read_bytes()[5] == 1


def test_memory_decoding_is_switched_on(machine: FakePci) -> None:
    """Whoever switched it off; other bits stay."""
    path = machine.add(A)
    with (path / "config").open("r+b") as file:
        file.seek(4)
        file.write(b"\0\4")
    guest.open().close()
    assert (path / "config").read_bytes()[4:6] == b"\2\4"


def test_a_user_opens_what_root_has_enabled(machine: FakePci) -> None:
    """The kernel lets only root enable a device; `guest setup` has done it, and gives the files."""
    path = machine.add(A)
    machine.refuse[f"devices/{A}/enable"] = errno.EPERM
    with pytest.raises(PermissionError):
        guest.open()
    (path / "enable").write_text("1\n")
    with (path / "config").open("r+b") as file:
        file.seek(4)
        file.write(b"\2\0")
    with guest.open() as device:
        assert device.access == "sysfs"
    assert (path / "enable").read_text() == "1\n"


def test_a_driver_has_it(machine: FakePci) -> None:
    machine.add(A, driver="pci-stub")
    with pytest.raises(OSError, match="the driver pci-stub has the device: as root: echo") as error:
        guest.open()
    assert error.value.errno == errno.EBUSY
    assert machine.writes == []


@pytest.mark.parametrize("file", ["resource0", "resource2"])
def test_what_is_missing_is_named(machine: FakePci, file: str) -> None:
    path = machine.add(A)
    (path / file).unlink()
    before, mappings = open_fds(), shared_mappings()
    with pytest.raises(FileNotFoundError) as error:
        guest.open()
    assert error.value.filename == str(path / file)
    assert (path / "enable").read_text() == "0\n"
    assert (open_fds(), shared_mappings()) == (before, mappings)


def test_no_permission(machine: FakePci, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.add(A)
    machine.refuse[f"devices/{A}/enable"] = errno.EACCES
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(PermissionError, match="only root may: run as root"):
        guest.open()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(
        PermissionError, match="not allowed to root here, perhaps by a container or kernel lock"
    ):
        guest.open()


@pytest.fixture
def sealed() -> Iterator[Path]:
    """A file that may be opened for writing, and not be mapped so: as sysfs's under lockdown."""
    fd = os.memfd_create("memory", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, MIB)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    yield Path(f"/proc/self/fd/{fd}")
    os.close(fd)


@pytest.mark.parametrize("file", ["resource0", "resource2"])
def test_lockdown(machine: FakePci, sealed: Path, file: str) -> None:
    path = machine.add(A)
    (path / file).unlink()
    (path / file).symlink_to(sealed)
    (machine.root / "lockdown").write_text("none integrity [confidentiality]\n")
    before, mappings = open_fds(), shared_mappings()
    with pytest.raises(PermissionError, match=r"the kernel is locked down \(confidentiality\)"):
        guest.open()
    assert (path / "enable").read_text() == "0\n"
    assert (open_fds(), shared_mappings()) == (before, mappings)


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (
            errno.EINVAL,
            "the driver pci-stub has claimed the memory, .*: boot the guest with iomem=relaxed",
        ),
        (errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_memory_that_cannot_be_mapped(
    machine: FakePci, monkeypatch: pytest.MonkeyPatch, code: int, text: str
) -> None:
    """mmap(2) names no file, and its EINVAL says nothing to anybody."""
    path = machine.add(A)

    def refuse(*_: object, **__: object) -> None:
        machine.write(machine.root / "drivers" / "pci-stub" / "bind", A)  # while we look
        raise OSError(code, os.strerror(code))

    machine.add_driver("pci-stub", lambda _: True)
    monkeypatch.setattr(Region, "_over", refuse)
    before, mappings = open_fds(), shared_mappings()
    with pytest.raises(OSError, match=text) as error:
        guest.open()
    assert (error.value.errno, error.value.filename) == (code, str(path / "resource2"))
    assert (path / "enable").read_text() == "0\n"
    assert (open_fds(), shared_mappings()) == (before, mappings)


def test_memory_of_another_kind(machine: FakePci) -> None:
    machine.add(A)
    for memory in ("vfio", "uio"):
        with pytest.raises(ValueError, match=f"sysfs cannot map the memory by '{memory}'"):
            guest.open(memory=memory)
    with guest.open(memory="resource2_wc") as device:
        assert device.memory == "resource2_wc"


def test_a_forgotten_device(machine: FakePci) -> None:
    path = machine.add(A)
    before = open_fds()
    with pytest.warns(ResourceWarning, match="unclosed <ivshmem.guest.GuestDevice at"):
        guest.open()
    assert (path / "enable").read_text() == "0\n"
    assert open_fds() == before


def test_unplugged_before_it_is_closed(machine: FakePci) -> None:
    machine.add(A)
    device = guest.open()
    machine.unplug(A)
    device.close()


def test_given_back_once(machine: FakePci) -> None:
    """Others count on the kernel's count of users."""
    path = machine.add(A)
    device = guest.open()
    with guest.open() as other:
        assert (path / "enable").read_text() == "2\n"
        with memoryview(device.region), pytest.raises(BufferError):
            device.close()
        assert (path / "enable").read_text() == "2\n"
        device.close()
        device.close()
        assert (path / "enable").read_text() == "1\n"
        other.ring(0)
    assert (path / "enable").read_text() == "0\n"


def test_closing_in_a_forked_child(machine: FakePci) -> None:
    path = machine.add(A)
    with guest.open() as device:
        in_child(device.close)
        assert (path / "enable").read_text() == "1\n"


def test_no_interrupts(machine: FakePci) -> None:
    machine.add(A)
    with guest.open() as device:
        for call in (
            device.wait,
            lambda: device.wait(0, 0),
            lambda: next(device.events()),
            device.fileno,
        ):
            with pytest.raises(NoInterrupts, match="this guest has no IOMMU, which vfio needs"):
                call()
