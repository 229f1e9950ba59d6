"""What users test their programs with: the server, the hostile peer, the fake device, fixtures."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from support.waiting import PATIENCE, until

import ivshmem
from ivshmem import DeviceGone, IdChanged, Interrupt, NoInterrupts, guest, testing

pytest_plugins = ["ivshmem.testing.fixtures"]


def example() -> str:
    """The code in the package's docstring: what is indented, from its first import on."""
    text = testing.__doc__ or ""
    lines = text[text.index("    import ivshmem") :].splitlines()
    return textwrap.dedent("\n".join(line for line in lines if line.startswith("    ") or not line))


def test_the_example_in_the_docstring() -> None:
    exec(example(), {})  # noqa: S102


def test_it_needs_no_pytest() -> None:
    code = "import sys; sys.modules['pytest'] = None\n" + example()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


# -- servers --------------------------------------------------------------------------------------


def test_a_server_leaves_nothing() -> None:
    with testing.server("4K", 3, names=False) as server:
        path = server.path
        assert server.serving
        assert (server.region.size, server.vectors) == (4096, 3)
        assert os.stat(os.path.dirname(path)).st_mode & 0o777 == 0o700
    assert server.closed
    assert not os.path.exists(os.path.dirname(path))


def test_it_leaves_nothing_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), testing.server() as server:
        raise ZeroDivisionError
    assert server.closed
    assert not os.path.exists(os.path.dirname(server.path))
    with pytest.raises(ValueError, match="vectors"), testing.server(vectors=5000):
        pass


def test_the_fixtures(
    ivshmem_server: ivshmem.Server,
    ivshmem_servers: Callable[..., ivshmem.Server],
    ivshmem_device: testing.FakeDevice,
    ivshmem_hostile_peer: testing.HostilePeer,
) -> None:
    assert ivshmem_servers("8K", vectors=2).vectors == 2
    with ivshmem.connect(ivshmem_server.path, timeout=PATIENCE) as client, guest.open() as device:
        assert client.peers == [ivshmem_hostile_peer.id]
        assert device.region.size == ivshmem_device.size


def test_the_fixtures_in_a_user_s_project(tmp_path: Path) -> None:
    (tmp_path / "test_user.py").write_text(
        textwrap.dedent("""
            import ivshmem
            pytest_plugins = ["ivshmem.testing.fixtures"]

            def test_ring(ivshmem_server):
                with ivshmem.connect(ivshmem_server.path) as client:
                    client.ring(client.id)
                    assert client.wait(0, timeout=5) == 1
        """)
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "1 passed" in done.stdout, done.stdout + done.stderr


# -- the hostile peer -----------------------------------------------------------------------------


def test_what_a_hostile_peer_does(
    ivshmem_server: ivshmem.Server, ivshmem_hostile_peer: testing.HostilePeer
) -> None:
    hostile = ivshmem_hostile_peer
    with ivshmem.connect(ivshmem_server.path, timeout=PATIENCE) as client:
        hostile.take_messages()
        assert sorted(hostile.doorbells) == sorted([hostile.id, client.id])
        hostile.ring([client.id], times=3)
        assert client.wait(0, PATIENCE) == 3
        client.ring(client.id)
        assert hostile.steal_rings([client.id]) == 1
        assert client.wait(0, 0) is None
        hostile.fill_counters([client.id])
        client.ring_nowait(client.id)
        assert client.wait(0, PATIENCE) == (1 << 63) - 1, "as much as a count can be"
        hostile.clear_nonblock([client.id])
        flags = Path(f"/proc/self/fdinfo/{hostile.doorbells[client.id][0]}").read_text()
        (line,) = (line for line in flags.splitlines() if line.startswith("flags:"))
        assert not int(line.split()[1], 8) & os.O_NONBLOCK
        hostile.scribble(b"ab", offset=1, length=5)
        assert client.region.read(0, 7) == b"\0ababa\0"
        assert hostile.punch_hole()
        assert client.region.read(0, 7) == bytes(7)
        assert not hostile.truncate(), "an anonymous region is sealed"
    until(lambda: hostile.take_messages() >= 0 and client.id not in hostile.doorbells)


def test_a_hostile_peer_never_waits(
    ivshmem_server: ivshmem.Server, ivshmem_hostile_peer: testing.HostilePeer
) -> None:
    """Whoever cleared O_NONBLOCK, of which all have one: a full counter must not hold up a test."""
    hostile = ivshmem_hostile_peer
    with ivshmem.connect(ivshmem_server.path, timeout=PATIENCE) as client:
        hostile.take_messages()

        def attack() -> None:
            for act in (hostile.fill_counters, hostile.ring, hostile.steal_rings):
                hostile.clear_nonblock()
                act([client.id])

        hostile.fill_counters([client.id])
        thread = threading.Thread(target=attack, daemon=True)
        thread.start()
        thread.join(PATIENCE)
        assert not thread.is_alive()


def test_rubbish_for_a_server(ivshmem_servers: Callable[..., ivshmem.Server]) -> None:
    server = ivshmem_servers(vectors=0)
    with testing.HostilePeer(server.path, vectors=0) as hostile:
        hostile.send_rubbish()
    for messages in range(4):  # version, id, memory
        testing.leave_during_set_up(server.path, messages)
    with ivshmem.connect(server.path, timeout=PATIENCE, vectors=0):
        until(lambda: len(server.peers) == 1)
    with pytest.raises(TimeoutError):
        testing.leave_during_set_up(server.path, 4, timeout=0.01)


def test_a_file_that_is_not_sealed(tmp_path: Path) -> None:
    with (
        ivshmem.Region.create("64K", path=tmp_path / "memory") as region,
        testing.server(region) as server,
        testing.HostilePeer(server.path) as hostile,
    ):
        assert hostile.truncate(4096)
        assert (tmp_path / "memory").stat().st_size == 4096


# -- the fake device ------------------------------------------------------------------------------


def test_a_device_rings_and_is_interrupted(ivshmem_device: testing.FakeDevice) -> None:
    fake = ivshmem_device
    (found,) = guest.devices()
    assert (found.address, found.size, found.vectors) == (fake.address, 1 << 20, 1)
    with pytest.raises(RuntimeError, match=r"guest\.open"):
        fake.interrupt()
    with guest.open() as device:
        assert (device.id, device.access, device.vectors) == (0, "vfio", 1)
        assert fake.take_ring() is None
        device.ring(9)
        assert fake.take_ring() == (9, 0)
        assert fake.take_ring() is None
        device.region.write(0, b"shared")
        with fake.memory as memory:
            assert memory[:6] == b"shared"
        waiting = threading.Thread(target=lambda: fake.interrupt(0))
        waiting.start()
        assert device.wait(timeout=PATIENCE) == Interrupt(0, 1)
        waiting.join()
        with pytest.raises(ValueError, match="vector 1"):
            fake.interrupt(1)
    assert guest.devices()[0].driver == "", "it was given back"


def test_a_device_that_migrates_and_is_unplugged(ivshmem_device: testing.FakeDevice) -> None:
    with guest.open() as device:
        ivshmem_device.migrate(5)
        assert device.next_event(PATIENCE) == IdChanged(0, 5)
        assert device.peer_events() == []
        ivshmem_device.unplug()
        with pytest.raises(DeviceGone):
            device.wait(0, PATIENCE)


def test_a_plain_device() -> None:
    with testing.fake_device("64K", vectors=0) as fake, guest.open() as device:
        assert device.device.variant == "plain"
        with pytest.raises(NoInterrupts):
            device.wait(timeout=0)
        with fake.memory as memory:
            memory[:2] = b"ok"
        assert device.region.read(0, 2) == b"ok"


def test_a_device_is_there_for_the_block_only() -> None:
    before = guest.devices()
    with testing.fake_device():
        assert [device.address for device in guest.devices()] == ["0000:00:04.0"]
    assert guest.devices() == before


@pytest.mark.parametrize("size", [0, 5000, 1 << 30])
def test_sizes_that_it_cannot_have(size: int) -> None:
    with pytest.raises(ValueError, match=r"cannot have|at most"), testing.fake_device(size):
        pass
