"""The command lines of QEMU's own manual, as they stand there, with real guests.

Those of the first two tests are in residents.py: the guest is one for several tests.
"""

import os
import shlex
from pathlib import Path

import pytest
from support.mounts import huge_pages, mounted

import ivshmem

from .harness import MakeGuest
from .manual import end_server, run_server
from .residents import Manual

# The lines of the manual are to work with every QEMU.
pytestmark = pytest.mark.qemu

SHOW = """
    import sys
    from ivshmem import guest
    variant = sys.argv[1]
    (found,) = [each for each in guest.devices() if each.variant == variant]
    with guest.open(found.address) as device, memoryview(device.region) as memory:
        print("SEES", device.id, len(memory), flush=True)
        input()
        memory[:5] = b"guest"
"""


def test_plain_device_on_a_posix_name(manual: Manual) -> None:
    a = manual.guest.run(SHOW, "plain")
    assert a.expect("SEES") == f"SEES 0 {1 << 20}"
    a.send("")
    assert a.wait() == 0
    with ivshmem.Region.attach(name=manual.name, size="1M") as region:
        assert bytes(memoryview(region)[:5]) == b"guest"


def test_server_and_doorbell_device(manual: Manual, manual_host: ivshmem.Client) -> None:
    a = manual.guest.run(SHOW, "doorbell")
    assert a.expect("SEES") == f"SEES 0 {1 << 20}"
    assert (manual_host.vectors, manual_host.peers) == (4, [0])
    a.send("")
    assert a.wait() == 0
    assert bytes(memoryview(manual_host.region)[:5]) == b"guest"


@pytest.mark.nightly
def test_a_device_that_comes_and_goes(guest: MakeGuest, tmp_path: Path) -> None:
    pidfile, path = tmp_path / "pid", tmp_path / "socket"
    run_server(f"ivshmem-server -p {pidfile} -S {path} -m ivshmem-seed-{os.getpid()} -l 1M -n 2")
    try:
        line = f"-device ivshmem-doorbell,vectors=2,chardev=id -chardev socket,path={path},id=id"
        a = guest(SHOW, args=shlex.split(line), argv=["doorbell"])
        assert a.expect("SEES") == f"SEES 0 {1 << 20}"
        with ivshmem.connect(path, timeout=30) as client:
            assert (client.id, client.vectors, client.peers) == (1, 2, [0])
            a.send("")
            assert a.wait() == 0
            assert client.next_event(30) == ivshmem.PeerLeft(0)
    finally:
        end_server(pidfile)
    assert not path.exists()


@pytest.mark.nightly
def test_hugepages_for_a_plain_device(guest: MakeGuest) -> None:
    with huge_pages(2 << 20, 512), mounted("hugetlbfs", "pagesize=2M") as mount:
        a = guest(
            SHOW,
            args=shlex.split(
                f"-object memory-backend-file,size=1G,mem-path={mount}/my-shmem-file,share,id=mb1"
                " -device ivshmem-plain,memdev=mb1"
            ),
            argv=["plain"],
        )
        assert a.expect("SEES") == f"SEES 0 {1 << 30}"
        a.send("")
        assert a.wait() == 0
        with ivshmem.Region.attach(path=mount / "my-shmem-file") as region:
            assert bytes(memoryview(region)[:5]) == b"guest"
            assert region.info().huge == 2 << 20
            region.unlink()


@pytest.mark.nightly
def test_server_with_a_hugepages_mount_point(guest: MakeGuest, tmp_path: Path) -> None:
    pidfile, path = tmp_path / "pid", tmp_path / "socket"
    with huge_pages(2 << 20, 8), mounted("hugetlbfs", "pagesize=2M") as mount:
        run_server(f"ivshmem-server -p {pidfile} -S {path} -m {mount} -l 16M -n 1")
        try:
            a = guest(
                SHOW,
                args=shlex.split(
                    "-device ivshmem-doorbell,vectors=1,chardev=id"
                    f" -chardev socket,path={path},id=id"
                ),
                argv=["doorbell"],
            )
            assert a.expect("SEES") == f"SEES 0 {16 << 20}"
            with ivshmem.connect(path, timeout=30) as client:
                assert client.region.page_size == 2 << 20
                a.send("")
                assert a.wait() == 0
                assert bytes(memoryview(client.region)[:5]) == b"guest"
        finally:
            end_server(pidfile)
        assert list(mount.iterdir()) == []
