"""A device without an IOMMU that vfio-pci has: left by kill -9, by a child, or bound by hand.

Its group is one that vfio has made up. In a real kernel: tests/vm/test_noiommu.py.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ivshmem import guest
from ivshmem.cli.main import main
from ivshmem.doctor.guest import DeviceSteps
from ivshmem.errors import VfioUnusable
from ivshmem.guest import pci, uio, vfio
from ivshmem.guest.choice import best_way
from ivshmem.testing.fake_pci import FakePci
from ivshmem.testing.fake_vfio import FakeVfio

A = "0000:00:04.0"


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeVfio]:
    kernel = FakeVfio(tmp_path / "dev", monkeypatch)
    kernel.add_group(0, iommu=False)
    kernel.poke(0, 8, (5).to_bytes(4, "little"))
    yield kernel
    kernel.close()


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: FakeVfio) -> FakePci:
    machine = FakePci(tmp_path / "pci", monkeypatch)
    machine.add(A, driver="vfio-pci")
    machine.set_group(A, 0, made_by_vfio=True)
    vfio.NOIOMMU.write_text("Y\n")
    return machine


def test_it_is_no_group_of_an_iommu(machine: FakePci, capsys: pytest.CaptureFixture[str]) -> None:
    (device,) = guest.devices()
    assert (device.iommu_group, device.noiommu_group) == (None, 0)
    assert main(["guest", "list"]) == 0
    _, line = capsys.readouterr().out.splitlines()
    assert line.endswith("  vfio-pci  no IOMMU (vfio's group 0)")


def test_it_is_opened(machine: FakePci, kernel: FakeVfio) -> None:
    """Whatever the mode is now: vfio-pci has it."""
    for mode in ("Y\n", "N\n"):
        vfio.NOIOMMU.write_text(mode)
        with guest.open() as device:
            assert (device.access, device.id, device.vectors) == ("noiommu", 5, 2)
        assert machine.driver(A) == "vfio-pci", "as it was"
    with pytest.raises(OSError, match="this guest has no IOMMU, which vfio needs"):
        guest.open(access="vfio")
    with pytest.raises(OSError, match="the driver vfio-pci has the device: open it by noiommu: '"):
        guest.open(access="sysfs")


def test_the_mode_was_switched_off_since(machine: FakePci, kernel: FakeVfio) -> None:
    """vfio has no driver for its made up group then; what is named is not the IOMMU's driver."""
    kernel.types = set()
    with pytest.raises(VfioUnusable, match="vfio's no-IOMMU mode is off: as root, `echo Y > "):
        guest.open()


def test_a_second_opener(machine: FakePci, kernel: FakeVfio) -> None:
    kernel.busy = True
    with pytest.raises(OSError, match="another process has the device open") as error:
        guest.open()
    assert error.value.errno == errno.EBUSY
    assert machine.driver(A) == "vfio-pci"


def test_what_the_doctor_says(machine: FakePci, kernel: FakeVfio) -> None:
    """It has no IOMMU and needs none; and is not free while a process has the device open."""

    def look() -> dict[str, tuple[str, str, str]]:
        steps = {step.name: step.check for step in DeviceSteps(pci.look(A)).steps()}
        wanted = ("driver", "IOMMU", "IOMMU group", "interrupt remapping", "free")
        return {name: tuple(steps[name]()) for name in wanted}  # type: ignore[misc]

    found = look()
    assert found["driver"] == ("ok", "vfio-pci", "")
    assert found["IOMMU"] == ("warning", "none, but vfio's no-IOMMU mode is on", "")
    assert found["IOMMU group"][0] == "ok"
    assert found["interrupt remapping"] == ("skipped", "vfio without an IOMMU", "")
    assert found["free"] == ("ok", "no process has the device open", "")
    code = "import sys; file = open(sys.argv[1]); print(flush=True); sys.stdin.read()"
    path = str(vfio.group_path(0, iommu=False))
    with subprocess.Popen(
        [sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        kernel.busy = True
        state, said, fix = look()["free"]
        assert (state, fix) == ("failed", f"kill {other.pid}")
        assert said.startswith(f"pid {other.pid} (")
        assert said.endswith(" has the device open")
        other.communicate()


def test_the_doctor_does_not_advise_to_kill_oneself(machine: FakePci, kernel: FakeVfio) -> None:
    with guest.open():
        (step,) = [s for s in DeviceSteps(pci.look(A)).steps() if s.name == "free"]
        assert tuple(step.check()) == (
            "failed",
            "this process has the device open: close it first",
            "",
        )


def test_a_mode_that_is_off(machine: FakePci, kernel: FakeVfio) -> None:
    """The doctor names what switches it on, instead of an IOMMU that the host may not have."""
    (machine.root / "devices" / A / "driver").unlink()
    machine.end_group(A)
    vfio.NOIOMMU.write_text("N\n")
    (step,) = [s for s in DeviceSteps(pci.look(A)).steps() if s.name == "IOMMU"]
    state, said, fix = step.check()
    assert (state, fix) == ("failed", vfio.ENABLE_NOIOMMU)
    assert "vfio's no-IOMMU mode" in said


# -- a driver that a process uses by UIO ----------------------------------------------------------


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has /dev/uio0 open."""
    monkeypatch.setattr(uio, "DEV", tmp_path)
    (tmp_path / "uio0").touch()
    code = "import sys; file = open(sys.argv[1]); print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "uio0")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.communicate()


@pytest.mark.parametrize("driver", ["uio_ivshmem", "uio_pci_generic"])
def test_a_driver_in_use_is_not_taken(
    machine: FakePci, kernel: FakeVfio, user: subprocess.Popen[bytes], driver: str
) -> None:
    """Neither by vfio that was asked for, nor by a measurement; afterwards it is free to take."""
    link = machine.root / "devices" / A / "driver"
    link.unlink()
    machine.end_group(A)
    machine.add_driver(driver)
    link.symlink_to(machine.root / "drivers" / driver)
    (machine.root / "devices" / A / "uio" / "uio0").mkdir(parents=True)
    machine.set_group(A, 7)
    vfio.NOIOMMU.write_text("N\n")
    text = f"process {user.pid} uses it through UIO: stop that, or open it by uio"
    with pytest.raises(OSError, match=text) as error:
        guest.open(access="vfio")
    assert error.value.errno == errno.EBUSY
    speeds = {speed.memory: speed for speed in guest.measure(seconds=0.001)}
    assert list(speeds) == ["vfio", "uio", "resource2", "resource2_wc"]
    assert text in speeds["vfio"].error
    assert machine.driver(A) == driver
    assert not [path for path, _ in machine.writes if path.endswith(("unbind", "override"))]
    (step,) = [s for s in DeviceSteps(pci.look(A)).steps() if s.name == "free"]
    if driver == "uio_ivshmem":
        state, said, _ = step.check()
        assert (state, said.startswith(f"pid {user.pid} ")) == ("warning", True)
        assert said.endswith(" has the device open, and is not disturbed")


def test_one_rule_for_all(
    machine: FakePci, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `open` does is what the doctor looks at: the generic driver does not serve."""
    monkeypatch.setattr(uio, "DEV", tmp_path)
    for number, (driver, group, way) in enumerate(
        [
            ("uio_pci_generic", 7, "vfio"),
            ("uio_pci_generic", None, "noiommu"),
            ("uio_ivshmem", 7, "uio"),
            ("uio_ivshmem", None, "uio"),
            ("", 7, "vfio"),
            ("", None, "noiommu"),
        ]
    ):
        address = f"0000:00:1{number}.0"
        path = machine.add(address, driver=driver, group=group)
        if driver:
            (path / "uio" / "uio0").mkdir(parents=True)
        device = pci.look(address)
        assert best_way(device) == DeviceSteps(device)._access == way, (driver, group)


# -- refusals that name what removes them ---------------------------------------------------------


def test_sysfs_that_cannot_be_written(
    machine: FakePci, kernel: FakeVfio, monkeypatch: pytest.MonkeyPatch
) -> None:
    (machine.root / "devices" / A / "driver").unlink()
    machine.end_group(A)
    machine.set_group(A, 7)
    kernel.add_group(7)
    override = f"devices/{A}/driver_override"
    for code, text in (
        (errno.EROFS, "sysfs is mounted read-only, as in a container: mount -o remount,rw /sys"),
        (errno.EACCES, "not allowed to root here, .*: run it outside of the container"),
    ):
        machine.refuse = {override: code}
        with pytest.raises(OSError, match=text) as error:
            guest.open()
        assert error.value.errno == code
        assert error.value.filename == str(machine.root / override)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(PermissionError, match="only root may: run as root, or let root bind"):
        guest.open()


def test_memory_that_no_pat_maps(machine: FakePci, kernel: FakeVfio) -> None:
    path = machine.root / "devices" / A / "resource2_wc"
    path.unlink()
    with pytest.raises(OSError, match=r"maps nothing write-combined .*: use memory='resource2'"):
        guest.open(memory="resource2_wc")
    with guest.open(memory="resource2") as device:
        assert device.memory == "resource2"


def test_nothing_could_be_measured(
    machine: FakePci, kernel: FakeVfio, capsys: pytest.CaptureFixture[str]
) -> None:
    kernel.busy = True
    assert main(["guest", "measure"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        "vfio", "uio", "resource2", "resource2_wc", "no"
    ]  # fmt: skip
    assert lines[-1] == "no way to map the memory works here: see `ivshmem doctor`"


def test_python_keeps_its_open() -> None:
    code = "from ivshmem.guest import *; open('/dev/null').close(); print(devices)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.startswith("<function devices")
    assert guest.open is guest.open_device
