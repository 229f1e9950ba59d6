"""Real guests share memory and doorbells with each other and with host processes, by our server."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.mounts import huge_pages as reserve
from support.mounts import mounted

import ivshmem
from ivshmem.qemu import cmdline

from .harness import MakeGuest
from .host import TIMEOUT, Events, doorbell, until
from .residents import Pair

ECHO = """
    from ivshmem import guest
    with guest.open() as device, memoryview(device.region) as memory:
        print("READY", device.id, device.vectors, len(memory), flush=True)
        for line in iter(input, "end"):
            vector, peer = map(int, line.split())
            for _ in range(ROUNDS):
                assert device.wait(vector, timeout=60)
                memory[0] = (memory[0] + 1) % 256
                device.ring(peer, vector)
"""


@pytest.fixture
def huge_pages() -> Iterator[None]:
    """Eight more huge pages of 2 MiB."""
    with reserve(2 << 20, 8) as got:
        assert got == 8, "memory is short"
        yield


@pytest.fixture
def hugetlbfs(huge_pages: None) -> Iterator[Path]:
    with mounted("hugetlbfs", "pagesize=2M") as path:
        yield path


@pytest.mark.nightly
def test_host_and_guest_ring_each_other(
    guest: MakeGuest, server: ivshmem.Server, host: ivshmem.Client, events: Events
) -> None:
    rounds = 200
    a = guest(ECHO.replace("ROUNDS", str(rounds)), args=doorbell(server), iommu=True)
    assert a.expect("READY") == f"READY 1 4 {1 << 20}"
    assert [(p.id, p.pid) for p in events.joined] == [(0, os.getpid()), (1, a.pid)]
    assert host.peers == [1]
    a.send(f"2 {host.id}")
    with memoryview(host.region) as memory:
        for number in range(rounds):
            assert memory[0] == number % 256
            host.ring(1, 2)
            assert host.wait(2, TIMEOUT) == 1, a.report()
        assert memory[0] == rounds % 256
    assert host.wait(timeout=0) is None  # nothing on any other vector
    a.send("end")
    assert a.wait() == 0
    assert ivshmem.PeerLeft(1) in until(host, ivshmem.PeerLeft(1))
    assert [p.id for p in events.left] == [1]


def test_two_guests_ring_each_other_while_the_host_watches(
    pair: Pair, pair_host: ivshmem.Client
) -> None:
    program = """
        import sys
        from ivshmem import guest
        other, host = map(int, sys.argv[1:])
        with guest.open() as device, memoryview(device.region) as memory:
            print("READY", device.id, flush=True)
            input()
            first = device.id < other
            for number in range(50):
                if first:
                    memory[number] = number
                    device.ring(other, 1)
                assert device.wait(1, timeout=60), number
                assert memory[number] == number
                if not first:
                    device.ring(other, 1)
            device.ring(host, 3)
        """
    a, b = pair.a.run(program, 2, pair_host.id), pair.b.run(program, 1, pair_host.id)
    assert [each.expect("READY") for each in (a, b)] == ["READY 1", "READY 2"]
    assert pair_host.peers == [1, 2]
    for each in (a, b):
        each.send("begin")
    rings = 0
    while rings < 2:
        rang = pair_host.wait(3, TIMEOUT)
        assert rang, a.report()
        rings += rang
    with memoryview(pair_host.region) as memory:
        assert bytes(memory[:50]) == bytes(range(50))
    assert [each.wait() for each in (a, b)] == [0, 0]


@pytest.mark.nightly
def test_a_guest_that_powers_off_is_seen_leaving(
    guest: MakeGuest, server: ivshmem.Server, host: ivshmem.Client
) -> None:
    """And the other one is not touched by it."""
    a = guest(ECHO.replace("ROUNDS", "1"), args=doorbell(server), iommu=True, name="a")
    a.expect("READY 1")
    until(host, ivshmem.PeerJoined(1))  # who came and went between two looks is not mentioned
    b = guest(ECHO.replace("ROUNDS", "1"), args=doorbell(server), iommu=True, name="b")
    b.expect("READY 2")
    a.send("end")
    assert a.wait() == 0
    until(host, ivshmem.PeerLeft(1))
    assert host.peers == [2]
    b.send("1 0")
    host.ring(2, 1)
    assert host.wait(1, TIMEOUT) == 1, b.report()
    b.send("end")
    assert b.wait() == 0
    until(host, ivshmem.PeerLeft(2))


@pytest.mark.nightly
def test_a_guest_reads_the_id_that_the_server_gave(
    guest: MakeGuest, server: ivshmem.Server, events: Events
) -> None:
    with ExitStack() as others:
        for _ in range(5):
            others.enter_context(ivshmem.connect(server.path, timeout=TIMEOUT))
        a = guest(
            """
            from ivshmem import guest
            with guest.open() as device:
                print("ID", device.id, flush=True)
            """,
            args=doorbell(server),
        )
        assert a.expect("ID") == "ID 5"
        assert events.joined[5].pid == a.pid
        assert events.joined[5].process.startswith("qemu-system")
        assert a.wait() == 0


@pytest.mark.nightly
def test_guests_that_come_and_go_do_no_harm_to_one_that_stays(
    guest: MakeGuest, server: ivshmem.Server, host: ivshmem.Client
) -> None:
    stays = guest(ECHO.replace("ROUNDS", "1"), args=doorbell(server), iommu=True, name="stays")
    stays.expect("READY 1")
    ids = []
    for round_ in range(10):
        comes = guest(
            """
            # Of ten guests, the half second counts that the library takes to import here.
            from raw.sysfs import SysfsDevice
            with SysfsDevice() as device:
                print("ID", device.id, flush=True)
                input()
            """,
            args=doorbell(server),
            name=f"comes {round_}",
        )
        ids.append(int(comes.expect("ID").split()[1]))
        assert host.peers == [1, ids[-1]]
        if round_ % 2:
            comes.kill()
        else:
            comes.send("")
            assert comes.wait() == 0
        until(host, ivshmem.PeerLeft(ids[-1]))
        stays.send(f"{round_ % 4} 0")
        host.ring(1, round_ % 4)
        assert host.wait(round_ % 4, TIMEOUT) == 1, stays.report()
    # The one that stays was told of each of them, so none of their ids was given twice.
    assert ids == list(range(2, 12))
    stays.send("end")
    assert stays.wait() == 0


@pytest.mark.nightly
def test_memory_and_doorbells_outlive_the_server(
    guest: MakeGuest, server: ivshmem.Server, host: ivshmem.Client
) -> None:
    a = guest(ECHO.replace("ROUNDS", "10"), args=doorbell(server), iommu=True)
    a.expect("READY 1")
    assert host.peers == [1]
    server.close()
    until(host, ivshmem.Disconnected("the server ended the connection"))
    a.send("0 0")
    for _ in range(10):
        host.ring(1, 0)
        assert host.wait(0, TIMEOUT) == 1, a.report()
    a.send("end")
    assert a.wait() == 0


@pytest.mark.nightly
def test_plain_device_on_a_file(guest: MakeGuest, tmp_path: Path) -> None:
    path = tmp_path / "memory"
    with ivshmem.Region.create("1M", path=path) as region, memoryview(region) as memory:
        memory[:5] = b"host!"
        command = [sys.executable, "-m", "ivshmem", "qemu", "--json", "--file", str(path)]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        a = guest(
            """
            from ivshmem import guest
            with guest.open() as device, memoryview(device.region) as memory:
                print("SAW", bytes(memory[:5]).decode(), len(memory), flush=True)
                memory[-6:] = b"guest!"
                print("WROTE", flush=True)
                input()
                print("SAW", bytes(memory[:5]).decode(), flush=True)
            """,
            args=json.loads(printed),
        )
        assert a.expect("SAW") == f"SAW host! {1 << 20}"
        a.expect("WROTE")
        assert bytes(memory[-6:]) == b"guest!"
        memory[:5] = b"again"
        a.send("")
        assert a.expect("SAW") == "SAW again"
        assert a.wait() == 0


HUGE = """
    from ivshmem import guest
    with guest.open() as device, memoryview(device.region) as memory:
        print("SIZE", len(memory), bytes(memory[:4]).decode(), flush=True)
        memory[-4:] = b"done"
"""


@pytest.mark.nightly
def test_huge_pages_from_a_memfd_by_the_server(
    guest: MakeGuest, tmp_path: Path, huge_pages: None
) -> None:
    with (
        ivshmem.Region.create("8M", hugepages="2M") as region,
        ivshmem.Server(tmp_path / "socket", region).start() as server,
        memoryview(region) as memory,
    ):
        memory[:4] = b"huge"
        a = guest(HUGE, args=doorbell(server))
        assert a.expect("SIZE") == f"SIZE {8 << 20} huge"
        assert a.wait() == 0
        assert bytes(memory[-4:]) == b"done"
        assert region.info().huge == region.info().resident == 4 << 20  # its first and last page


@pytest.mark.nightly
def test_huge_pages_from_a_mount_by_qemu(guest: MakeGuest, tmp_path: Path, hugetlbfs: Path) -> None:
    path = hugetlbfs / "region"
    with ivshmem.Region.create("8M", path=path) as region, memoryview(region) as memory:
        memory[:4] = b"huge"
        a = guest(HUGE, args=cmdline.plain(str(path), region.size))
        assert a.expect("SIZE") == f"SIZE {8 << 20} huge"
        assert a.wait() == 0
        assert bytes(memory[-4:]) == b"done"
        region.unlink()
