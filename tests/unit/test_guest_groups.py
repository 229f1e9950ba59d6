"""Several devices in one IOMMU group, which a process opens once for all of them.

In real guests: tests/vm/test_groups.py.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.leaks import open_fds

from ivshmem import guest
from ivshmem.guest import vfio
from ivshmem.guest.vfio import Vfio
from ivshmem.system import processes
from ivshmem.testing.fake_pci import FakePci
from ivshmem.testing.fake_vfio import FakeVfio

A, B = "0000:01:01.0", "0000:01:02.0"
GROUP = 7


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeVfio]:
    kernel = FakeVfio(tmp_path / "dev", monkeypatch)
    kernel.addresses = {A, B}
    kernel.add_group(GROUP)
    yield kernel
    kernel.close()


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: FakeVfio) -> FakePci:
    machine = FakePci(tmp_path / "pci", monkeypatch)
    machine.add_driver("vfio-pci")
    machine.add(A, vectors=0, group=GROUP, driver="pci-stub")
    machine.add(B, vectors=0, group=GROUP)
    kernel.vectors = 0
    return machine


def drivers(machine: FakePci) -> tuple[str, str]:
    return machine.driver(A), machine.driver(B)


@pytest.mark.parametrize("first", [A, B])
def test_two_in_one_process(machine: FakePci, kernel: FakeVfio, first: str) -> None:
    """One group, one container; closed, and given back, with the last of them."""
    before = open_fds()
    devices = {address: guest.open(address, access="vfio") for address in (A, B)}
    assert kernel.calls.count("GROUP_SET_CONTAINER") == 1
    assert kernel.calls.count("GROUP_GET_DEVICE_FD") == 2
    assert drivers(machine) == ("vfio-pci", "vfio-pci")
    devices.pop(first).close()
    # It cannot be unbound while the group is open: that would wait for who has it.
    assert drivers(machine) == ("vfio-pci", "vfio-pci")
    with guest.open(first, access="vfio") as again:
        assert again.region.size == 1 << 20
    (last,) = devices.values()
    assert last.region.read(0, 4) == bytes(4)
    last.close()
    assert drivers(machine) == ("pci-stub", "")
    assert open_fds() == before


def test_the_same_device_twice(machine: FakePci, kernel: FakeVfio) -> None:
    with guest.open(A, access="vfio"):
        for _ in range(2):
            with pytest.raises(OSError, match="this process has the device open already") as error:
                guest.open(A, access="vfio")
            assert (error.value.errno, error.value.filename) == (errno.EBUSY, A)
    assert drivers(machine) == ("pci-stub", "")


def test_closing_twice_does_not_count_twice(kernel: FakeVfio) -> None:
    first, second = Vfio(A, GROUP), Vfio(B, GROUP)
    first.close()
    again = Vfio(A, GROUP)
    first.close()
    second.close()
    assert again.region(0).size == 256
    assert vfio.is_held(again.path)
    again.close()
    assert not vfio.is_held(again.path)


def test_a_device_that_cannot_be_opened_leaves_the_group_to_the_other(kernel: FakeVfio) -> None:
    first = Vfio(A, GROUP)
    kernel.fail = {"GROUP_GET_DEVICE_FD": errno.EIO}
    with pytest.raises(OSError, match="Input/output error"):
        Vfio(B, GROUP)
    assert vfio.is_held(first.path)
    kernel.fail = {}
    second = Vfio(B, GROUP)
    first.close()
    second.close()
    assert not vfio.is_held(first.path)


def test_one_that_is_forgotten(machine: FakePci, kernel: FakeVfio) -> None:
    """Garbage collection closes it, at any moment: here while another one is opened."""
    with guest.open(B, access="vfio"):
        with pytest.warns(ResourceWarning, match="unclosed"):
            guest.open(A, access="vfio")
        with guest.open(A, access="vfio"):
            pass
    assert drivers(machine) == ("pci-stub", "")


def test_a_forked_child_has_groups_of_its_own(machine: FakePci, kernel: FakeVfio) -> None:
    """It does not take the parent's for its own; nor does it wait for a lock that nobody has."""
    device = guest.open(A, access="vfio")
    with vfio._locked():  # another thread of the parent, as it were
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                calls = len(kernel.calls)
                with pytest.raises(OSError, match=r"another process .* has IOMMU group 7 open"):
                    guest.open(B, access="vfio")
                assert len(kernel.calls) == calls
                device.close()  # its copy
                status = 0
            finally:
                os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    assert drivers(machine) == ("vfio-pci", "")
    device.close()
    assert drivers(machine) == ("pci-stub", "")


def test_another_process_has_the_group(machine: FakePci, kernel: FakeVfio, tmp_path: Path) -> None:
    """Named, with the device that is in the way; what the attempt changed is changed back."""
    code = "import sys; file = open(sys.argv[1]); print(flush=True); sys.stdin.read()"
    path = vfio.group_path(GROUP)
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        kernel.busy = True
        alone = f"another process has the device open .process {other.pid}.: stop it, or let it be"
        with pytest.raises(OSError, match=alone) as error:
            guest.open(B, access="vfio")
        assert error.value.errno == errno.EBUSY
        assert drivers(machine) == ("pci-stub", "")
        machine._bind(B, "vfio-pci")
        text = (
            f"another process .process {other.pid}. has IOMMU group {GROUP} open, in which {B} is,"
            " too: open both in one process, or give each device a port of its own"
        )
        with pytest.raises(OSError, match=text):
            guest.open(A, access="vfio")
        assert drivers(machine) == ("pci-stub", "vfio-pci")
        assert processes.pids_with_open(path) == [other.pid]
        other.communicate()
    assert (
        processes.described(processes.pids_with_open(path))
        == "a process that cannot be seen from here"
    )
