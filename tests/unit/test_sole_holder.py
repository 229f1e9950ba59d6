"""Whether no other process has a file: what a new server asks of old memory."""

from __future__ import annotations

import mmap
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.waiting import Background, until

from ivshmem import Region
from ivshmem.system.sole_holder import alone_with


@pytest.fixture
def region(shm_name: str) -> Iterator[Region]:
    """One that exists, as a new server finds it."""
    Region.create("4K", name=shm_name).close()
    with Region.attach(name=shm_name) as region:
        yield region


def sleeps_in_open(thread_id: int) -> bool:
    number = Path(f"/proc/self/task/{thread_id}/syscall").read_text().split()[0]
    return number == {"x86_64": "257", "aarch64": "56"}[platform.machine()]


def is_alone(region: Region) -> bool:
    with alone_with(region.fileno()) as alone:
        return alone


def test_a_region_of_our_own(region: Region) -> None:
    """Its own descriptor and mapping do not count."""
    assert is_alone(region)
    assert is_alone(region)


@pytest.mark.parametrize("flags", [os.O_RDWR, os.O_RDONLY], ids=["to write", "to read"])
def test_another_open_file(region: Region, shm_name: str, flags: int) -> None:
    fd = os.open(f"/dev/shm/{shm_name}", flags)
    assert not is_alone(region)
    os.close(fd)
    assert is_alone(region)


def test_a_mapping_without_a_descriptor(region: Region, shm_name: str) -> None:
    """As a QEMU has it."""
    fd = os.open(f"/dev/shm/{shm_name}", os.O_RDWR)
    mapping = mmap.mmap(fd, 4096)
    os.close(fd)
    assert not is_alone(region)
    mapping.close()
    assert is_alone(region)


def test_a_mapping_of_another_process(region: Region, shm_name: str) -> None:
    code = """if True:
        import mmap, os, sys
        fd = os.open(sys.argv[1], os.O_RDWR)
        mapping = mmap.mmap(fd, 4096)
        os.close(fd)
        print("ready", flush=True)
        sys.stdin.read()
        """
    command = [sys.executable, "-c", code, f"/dev/shm/{shm_name}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        assert not is_alone(region)
        process.kill()
        process.wait()
        assert is_alone(region)


def test_it_cannot_be_told_of_an_anonymous_one() -> None:
    with Region.create("4K") as region:
        assert not is_alone(region)


def test_a_newcomer_waits_until_the_block_ends(region: Region, shm_name: str) -> None:
    """And does not end this process, as the kernel's usual signal would."""
    assert signal.getsignal(signal.SIGIO) == signal.SIG_DFL
    path = Path(f"/dev/shm/{shm_name}")
    with alone_with(region.fileno()) as alone:
        assert alone
        opening = Background(path.read_bytes)
        until(lambda: sleeps_in_open(opening.native_id))
        assert opening.running
    assert opening.result() == bytes(4096)
