"""The command lines of QEMU's own manual, as they stand there, with real guests.

Source: QEMU's docs/system/devices/ivshmem.rst. Its placeholders (path, shm-size, vectors ..) are
filled in, and nothing else is changed.
"""

import os
import shlex
import signal
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.mounts import huge_pages, mounted

import ivshmem

from .harness import MakeGuest

# The lines of the manual are to work with every QEMU.
pytestmark = pytest.mark.qemu

SCRIPTS = Path(sysconfig.get_path("scripts"))

SHOW = """
    from ivshmem import guest
    with guest.open() as device, memoryview(device.region) as memory:
        print("SEES", device.id, len(memory), flush=True)
        input()
        memory[:5] = b"guest"
"""


@pytest.fixture
def name() -> Iterator[str]:
    """A POSIX name that nobody uses, and that is gone afterwards."""
    name = f"ivshmem-seed-{os.getpid()}"
    yield name
    assert not Path("/dev/shm", name).exists()


def run_server(line: str) -> None:
    """Run a line of the manual; the server it starts goes into the background by itself."""
    command, *arguments = shlex.split(line)
    assert command == "ivshmem-server"
    result = subprocess.run([SCRIPTS / command, *arguments], timeout=60, check=False)
    assert result.returncode == 0


def end_server(pidfile: Path) -> None:
    """SIGTERM, and wait until it has removed its pid file, the last thing it does."""
    os.kill(int(pidfile.read_text()), signal.SIGTERM)
    give_up = time.monotonic() + 30
    while pidfile.exists():
        assert time.monotonic() < give_up, "the server does not end"
        time.sleep(0.01)


def test_plain_device_on_a_posix_name(guest: MakeGuest, name: str) -> None:
    line = (
        "-device ivshmem-plain,memdev=hostmem"
        f" -object memory-backend-file,size=1M,share,mem-path=/dev/shm/{name},id=hostmem"
    )
    a = guest(SHOW, args=shlex.split(line))
    assert a.expect("SEES") == f"SEES 0 {1 << 20}"
    a.send("")
    assert a.wait() == 0
    with ivshmem.Region.attach(name=name, size="1M") as region:
        assert bytes(memoryview(region)[:5]) == b"guest"
        region.unlink()


def test_server_and_doorbell_device(guest: MakeGuest, name: str, tmp_path: Path) -> None:
    pidfile, path, size, vectors = tmp_path / "pid", tmp_path / "socket", "1M", 2
    run_server(f"ivshmem-server -p {pidfile} -S {path} -m {name} -l {size} -n {vectors}")
    try:
        assert Path("/dev/shm", name).stat().st_size == 1 << 20
        a = guest(
            SHOW,
            args=shlex.split(
                f"-device ivshmem-doorbell,vectors={vectors},chardev=id"
                f" -chardev socket,path={path},id=id"
            ),
        )
        assert a.expect("SEES") == f"SEES 0 {1 << 20}"
        with ivshmem.connect(path, timeout=30) as client:
            assert (client.id, client.vectors, client.peers) == (1, vectors, [0])
            a.send("")
            assert a.wait() == 0
            assert bytes(memoryview(client.region)[:5]) == b"guest"
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
