"""Finding devices and changing their drivers, over files that stand for sysfs.

With what hardware and users bring about there: capability lists that are circles, devices that
vanish during that, drivers that do not take what they are told to.
"""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.leaks import open_fds
from support.waiting import Background, until

from ivshmem import NoSuchDevice
from ivshmem.guest import pci
from ivshmem.guest.choice import choose
from ivshmem.guest.pci import Device
from ivshmem.testing.fake_pci import MIB, MSIX, FakePci, config_space

A, B = "0000:00:04.0", "0000:00:05.0"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakePci:
    return FakePci(tmp_path / "pci", monkeypatch)


# -- finding --------------------------------------------------------------------------------------


def test_devices(machine: FakePci) -> None:
    assert pci.devices() == []
    machine.add(B, size=1 << 34, vectors=0, group=12)
    machine.add(A, vectors=2048, driver="vfio-pci")
    machine.add("0000:00:03.0", ids=(0x1AF4, 0x1041))
    machine.add("0000:00:02.0", ids=(0x8086, 0x1110))
    assert pci.devices() == [
        Device(A, MIB, "doorbell", 2048, "vfio-pci", None),
        Device(B, 1 << 34, "plain", 0, "", 12),
    ]
    assert pci.look(B).path == machine.root / "devices" / B
    with pytest.raises(FileNotFoundError):
        pci.look("0000:00:06.0")


@pytest.mark.parametrize("file", ["vendor", "device", "resource", "config"])
def test_a_device_that_vanishes_while_we_look(machine: FakePci, file: str) -> None:
    machine.add(A)
    gone = machine.add(B)
    (gone / file).unlink()
    assert [device.address for device in pci.devices()] == [A]


def test_a_machine_without_pci(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pci, "SYSFS", tmp_path / "nowhere")
    assert pci.devices() == []


@pytest.mark.parametrize("start", [0xFEBF1000, 0x10001100, 0xFFFFFFFFFFFFF000])
def test_bar_start(machine: FakePci, start: int) -> None:
    machine.add(A, start=start)
    device = pci.look(A)
    assert pci.bar_start(device, pci.REGISTERS) == start
    assert pci.bar_start(device, pci.MEMORY) == 0x100000000


def test_which_device_is_meant(machine: FakePci) -> None:
    with pytest.raises(NoSuchDevice, match="no ivshmem device in this machine: give QEMU"):
        choose(None)
    machine.add(A)
    assert choose(None) == choose(A) == choose("00:04.0") == pci.look(A)
    with pytest.raises(NoSuchDevice, match=f"no ivshmem device at {B}; there is {A}$"):
        choose(B)
    machine.add(B)
    machine.add("0001:00:04.0")
    with pytest.raises(NoSuchDevice, match=f"several .*, name one: {A}, {B}, 0001:00:04.0$"):
        choose(None)
    assert choose("00:05.0").address == B
    assert choose("0001:00:04.0").address == "0001:00:04.0"
    for wrong in ("", "0:04.0", "4.0", "01:00:04.0"):
        with pytest.raises(NoSuchDevice, match=f"no ivshmem device at {wrong}; there is"):
            choose(wrong)


# -- the list of capabilities ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "vectors"),
    [
        (config_space((0x40, MSIX, 0)), 2),
        (config_space((0x40, 1, 0x50), (0x50, 5, 0xFC), (0xFC, MSIX, 0)), 2),
        (config_space((0xFC, 1, 0x40), (0x40, MSIX, 0)), 2),  # backwards
        (config_space((0x40, MSIX, 0x40)), 2),  # a circle that is never gone round
        (config_space((0x40, 1, 0x40)), 0),
        (config_space((0x40, 1, 0x50), (0x50, 5, 0x40)), 0),
        (config_space((0x40, 1, 0)), 0),
        (config_space(), 0),
        (config_space(first=0x04), 0),  # into the header
        (config_space(first=0xFF), 0),
        (config_space((0x40, 1, 0xFD)), 0),  # the end is cut
        (config_space((0x40, 1, 0x34)), 0),
        (config_space((0x40, MSIX, 0), size=68), 2),
        (config_space((0x40, MSIX, 0), size=67), 0),
        (config_space((0x40, 1, 0x80), (0x80, MSIX, 0), size=128), 0),
        (config_space((0x40, MSIX, 0), size=4096), 2),
        (config_space((0x40, MSIX, 0), size=64), None),  # what others than root see
        (b"", None),
    ],
)
def test_vectors(config: bytes, vectors: int | None, machine: FakePci) -> None:
    path = machine.add(A)
    (path / "config").write_bytes(config)
    assert pci.look(A).vectors == vectors


def test_as_many_capabilities_as_there_is_room_for() -> None:
    places = range(0x40, 0x100, 4)
    one = [(at, MSIX if at == 0xFC else 1, (at + 4) % 256) for at in places]
    assert len(one) == 48
    assert pci._msix_vectors(config_space(*one)) == 2
    backwards = [(at, MSIX if at == 0x40 else 1, at - 4) for at in places]
    assert pci._msix_vectors(config_space(*backwards, first=0xFC)) == 2


@pytest.mark.parametrize("count", [1, 2, 128, 2048])
def test_how_many_vectors(machine: FakePci, count: int) -> None:
    machine.add(A, vectors=count)
    assert pci.look(A).vectors == count


@given(st.binary(min_size=65, max_size=300), st.integers(0, 255), st.integers(0, 255))
def test_whatever_the_device_says(data: bytes, first: int, kind: int) -> None:
    """No configuration space makes it fail, or go round for ever."""
    config = bytearray(data)
    config[0x34] = first
    if first < len(config):
        config[first] = kind
    vectors = pci._msix_vectors(bytes(config))
    assert vectors is not None
    assert 0 <= vectors <= 2048


@given(st.lists(st.integers(0x10, 0x3F), min_size=1, max_size=48, unique=True), st.data())
def test_a_list_of_any_length_is_walked_to_its_end(places: list[int], data: st.DataObject) -> None:
    """All 48 that there is room for; a circle back to any of them ends, too."""
    at = [4 * place for place in places]
    kinds = [1] * len(at)
    circle = data.draw(st.sampled_from([0, *at]))
    links = [*at[1:], circle]
    assert pci._msix_vectors(config_space(*zip(at, kinds, links, strict=True))) == 0
    kinds[-1] = MSIX
    assert pci._msix_vectors(config_space(*zip(at, kinds, links, strict=True))) == 2


# -- what stands in the way -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        ("none [integrity] confidentiality\n", "integrity"),
        ("none integrity [confidentiality]\n", "confidentiality"),
        ("[none] integrity confidentiality\n", ""),
        ("\n", ""),
        ("", ""),
        ("[none", ""),
    ],
)
def test_lockdown(machine: FakePci, text: str, mode: str) -> None:
    (machine.root / "lockdown").write_text(text)
    assert pci.locked_down() == mode


@pytest.fixture
def sealed() -> Iterator[Path]:
    """A file that may be opened for writing, and not be mapped so: as sysfs's under lockdown."""
    fd = os.memfd_create("memory", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, MIB)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    yield Path(f"/proc/self/fd/{fd}")
    os.close(fd)


def test_lockdown_that_nothing_tells_of(machine: FakePci, sealed: Path) -> None:
    """securityfs is not mounted: mapping the memory shows it."""
    before = open_fds()
    assert pci.locked_down() == ""
    memory = machine.add(A) / "resource2"
    assert pci.locked_down() == ""
    memory.unlink()
    assert pci.locked_down() == "", "a file that cannot be opened says nothing"
    memory.symlink_to("/dev/null")
    assert pci.locked_down() == "", "nor one that cannot be mapped for another reason"
    memory.unlink()
    memory.symlink_to(sealed)
    assert pci.locked_down() == "unknown"
    (machine.root / "lockdown").write_text("[none] integrity confidentiality\n")
    assert pci.locked_down() == "", "what the kernel says is believed"
    assert open_fds() == before


def test_command_register(machine: FakePci) -> None:
    path = machine.add(A)
    device = pci.look(A)
    assert pci.command(device) == 0
    before = (path / "config").read_bytes()
    pci.set_command(device, pci.COMMAND_MEMORY)
    pci.set_command(device, pci.COMMAND_MASTER | 0x400)
    assert pci.command(device) == 0x406
    assert (path / "config").read_bytes() == before[:4] + b"\x06\x04" + before[6:]
    (path / "config").unlink()
    with pytest.raises(FileNotFoundError):
        pci.set_command(device, 2)


def test_a_command_register_that_may_not_be_written(
    machine: FakePci, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = machine.add(A) / "config"
    fds = open_fds()

    def refuse(*_: object) -> int:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "pwrite", refuse)
    with pytest.raises(PermissionError) as error:
        pci.set_command(pci.look(A), 2)
    assert error.value.filename == str(path)
    assert open_fds() == fds


def test_group_mates(machine: FakePci) -> None:
    machine.add(A, group=3)
    device = pci.look(A)
    assert pci.group_mates(device) == {}
    machine.add(B, group=3, driver="uio_pci_generic")
    machine.add("0000:00:06.0", group=3)
    machine.add("0000:00:07.0", group=4)
    assert pci.group_mates(device) == {B: "uio_pci_generic", "0000:00:06.0": ""}
    machine.add("0000:00:08.0")
    assert pci.group_mates(pci.look("0000:00:08.0")) == {}


# -- drivers --------------------------------------------------------------------------------------


def test_a_driver_that_is_there_is_not_loaded(
    machine: FakePci, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.add_driver("vfio-pci")
    monkeypatch.setattr(subprocess, "run", None)
    assert pci.load_driver("vfio-pci")


@pytest.mark.parametrize("comes", [True, False])
def test_a_driver_is_loaded(
    machine: FakePci, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, comes: bool
) -> None:
    """By modprobe, whose word is not taken: what counts is whether the driver is there."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    tool = tmp_path / "modprobe"
    action = f'mkdir "{machine.root}/drivers/$1"' if comes else "echo no such module >&2"
    tool.write_text(f"#!/bin/sh\n[ $# = 1 ] && {action}\nexit {int(comes)}\n")
    tool.chmod(0o755)
    assert pci.load_driver("vfio-pci") == comes
    assert (machine.root / "drivers" / "vfio-pci").is_dir() == comes


def test_a_machine_without_modprobe(
    machine: FakePci, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not pci.load_driver("vfio-pci")


# Who had the device: its driver, and what driver_override said.
FORMER = [("", "(null)"), ("uio_pci_generic", "(null)"), ("pci-stub", "pci-stub"), ("", "stub")]


@pytest.mark.parametrize(("driver", "override"), FORMER)
def test_bind_and_restore(machine: FakePci, driver: str, override: str) -> None:
    """In this order: the override, away from the one, offered to the other; and so back again."""
    machine.add_driver("vfio-pci")
    path = f"devices/{A}"
    machine.add(A, driver=driver, override=override)
    restore = pci.bind(pci.look(A), "vfio-pci")
    assert machine.driver(A) == "vfio-pci"
    assert machine.writes == [
        (f"{path}/driver_override", "vfio-pci"),
        *([(f"drivers/{driver}/unbind", A)] if driver else []),
        ("drivers_probe", A),
    ]
    machine.writes.clear()
    restore()
    assert (machine.driver(A), machine.override(A)) == (driver, override)
    assert machine.writes == [
        (f"{path}/driver_override", "\n" if override == "(null)" else override),
        ("drivers/vfio-pci/unbind", A),
        *([(f"drivers/{driver}/bind", A)] if driver else []),
    ]


def test_binding_what_is_bound_changes_nothing(machine: FakePci) -> None:
    machine.add(A, driver="vfio-pci", override="vfio-pci")
    pci.bind(pci.look(A), "vfio-pci")()
    assert machine.writes == []
    assert machine.driver(A) == "vfio-pci"


def test_the_driver_counts_that_is_there_now(machine: FakePci) -> None:
    """Not the one that was there when the device was looked at."""
    machine.add(A)
    device = pci.look(A)
    machine.add_driver("vfio-pci")
    machine.takes["pci-stub"] = lambda _: True
    (machine.root / "drivers" / "pci-stub").mkdir()
    machine.write(machine.root / "drivers_probe", A)
    assert machine.driver(A) == "pci-stub"
    restore = pci.bind(device, "vfio-pci")
    assert machine.driver(A) == "vfio-pci"
    restore()
    assert machine.driver(A) == "pci-stub"


@pytest.mark.parametrize(("driver", "override"), FORMER)
def test_a_driver_that_does_not_take_it(machine: FakePci, driver: str, override: str) -> None:
    """Without an IOMMU vfio-pci's probe fails: who had the device before has it again."""
    machine.add(A, driver=driver, override=override)  # there is no driver called vfio-pci
    with pytest.raises(OSError, match="vfio-pci does not take the device") as error:
        pci.bind(pci.look(A), "vfio-pci")
    assert (error.value.errno, error.value.filename) == (errno.EINVAL, A)
    assert (machine.driver(A), machine.override(A)) == (driver, override)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENODEV, errno.EBUSY])
def test_an_error_of_the_probe_is_the_same(machine: FakePci, number: int) -> None:
    machine.add_driver("vfio-pci")
    machine.add(A, driver="uio_pci_generic")
    machine.refuse["drivers_probe"] = number
    with pytest.raises(OSError, match="vfio-pci does not take the device"):
        pci.bind(pci.look(A), "vfio-pci")
    assert machine.driver(A) == "uio_pci_generic"


@pytest.mark.parametrize("file", [f"devices/{A}/driver_override", "drivers/uio_pci_generic/unbind"])
def test_what_may_not_be_written(machine: FakePci, file: str) -> None:
    machine.add_driver("vfio-pci")
    machine.add(A, driver="uio_pci_generic")
    machine.refuse[file] = errno.EACCES
    with pytest.raises(PermissionError) as error:
        pci.bind(pci.look(A), "vfio-pci")
    assert error.value.filename == str(machine.root / file)
    assert (machine.driver(A), machine.override(A)) == ("uio_pci_generic", "(null)")


def test_another_driver_that_has_it_meanwhile_keeps_it(
    machine: FakePci, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody is quicker, between our look and our act: nothing is taken from vfio-pci."""
    machine.add_driver("vfio-pci")
    machine.add(A, driver="uio_pci_generic")
    look = pci.look

    def slow_look(address: str) -> pci.Device:
        seen = look(address)
        monkeypatch.setattr(pci, "look", look)
        pci.bind(seen, "vfio-pci")
        machine.writes.clear()
        return seen

    monkeypatch.setattr(pci, "look", slow_look)
    pci.bind(look(A), "vfio-pci")
    assert machine.driver(A) == "vfio-pci"
    assert ("drivers/vfio-pci/unbind", A) not in machine.writes


def test_two_processes_take_turns(machine: FakePci, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nobody waits without end: any user can take the lock."""
    device = pci.look(machine.add(A).name)
    entered: list[str] = []

    def second() -> None:
        with pci.locked(device):
            entered.append("second")

    with pci.locked(device):
        waiting = Background(second)
        until(lambda: waiting.native_id)
        entered.append("first")
    waiting.result()
    assert entered == ["first", "second"]
    monkeypatch.setattr(pci, "_LOCK_SECONDS", 0.01)
    with pci.locked(device), pci.locked(device):
        pass


def test_restoring_what_is_unplugged(machine: FakePci) -> None:
    """An error that the caller can tell: the path is gone."""
    machine.add_driver("vfio-pci")
    machine.add(A, driver="uio_pci_generic")
    restore = pci.bind(pci.look(A), "vfio-pci")
    machine.unplug(A)
    with pytest.raises(FileNotFoundError):
        restore()


def test_enable(machine: FakePci) -> None:
    machine.add(A)
    device = pci.look(A)
    pci.enable(device, True)
    pci.enable(device, False)
    assert machine.writes == [(f"devices/{A}/enable", "1"), (f"devices/{A}/enable", "0")]
    machine.refuse[f"devices/{A}/enable"] = errno.EBUSY
    with pytest.raises(OSError, match="busy"):
        pci.enable(device, True)


def test_writing_to_files(tmp_path: Path) -> None:
    """One write, to what exists; the error has the path; nothing is created and nothing leaks."""
    before = open_fds()
    path = tmp_path / "file"
    with pytest.raises(FileNotFoundError) as error:
        pci._write(path, "x")
    assert str(error.value.filename) == str(path)
    assert not path.exists()
    path.write_text("0123456789")
    pci._write(path, "abc")
    assert path.read_text() == "abc3456789", "not truncated"
    with pytest.raises(OSError, match="No space left") as full:
        pci._write(Path("/dev/full"), "x")
    assert full.value.filename == "/dev/full"
    assert open_fds() == before
