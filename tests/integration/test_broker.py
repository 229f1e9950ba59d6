"""One endpoint shared by several processes, over real sockets.

A host's client stands for the guest's device, which is an endpoint like it; tests/vm/test_broker.py
has the real one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest
from support.children import NOBODY, Child, python
from support.waiting import PATIENCE, until

import ivshmem
from ivshmem import channel, testing
from ivshmem.guest import Broker
from ivshmem.native.descriptors import FdArray

VECTORS = 2

# Says which of its vectors is rung, and rings peer 0 back on the same.
ECHO = """
    import sys
    import ivshmem
    with ivshmem.connect(sys.argv[1], timeout=60) as client:
        print("READY", client.id, client.vectors, client.peers)
        while (event := client.wait(None, 60)) is not None:
            print("RUNG", event.vector)
            client.ring(0, event.vector)
"""

# Makes every write to its eventfds wait: counters full, and O_NONBLOCK cleared for all who share.
HOSTILE = """
    import fcntl, os, sys
    import ivshmem
    client = ivshmem.connect(sys.argv[1], timeout=60)
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}") != "anon_inode:[eventfd]":
                continue
        except FileNotFoundError:
            continue
        fd = int(name)
        os.set_blocking(fd, False)
        try:
            os.eventfd_write(fd, 2**64 - 2)
        except BlockingIOError:
            pass
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_NONBLOCK)
    print("READY")
    sys.stdin.readline()
"""


class Scene(NamedTuple):
    """Somebody far away (id 0), the broker for id 1, and the real server between them."""

    far: ivshmem.Client
    broker: Broker

    def child(self, stack: ExitStack, code: str, *, user: int | None = None) -> Child:
        return stack.enter_context(python(code, self.broker.path, user=user))


@pytest.fixture
def scene(directory: Path) -> Iterator[Scene]:
    with (
        testing.server("1M", vectors=VECTORS) as server,
        ivshmem.connect(server.path) as far,
        ivshmem.connect(server.path) as device,
        Broker(device, directory / "guest", peers=[0]).start() as broker,
    ):
        yield Scene(far, broker)


def test_the_id_is_another_after_a_migration(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients are hung up on, and those who connect again have the new one."""
    with ExitStack() as stack:
        server = stack.enter_context(testing.server("1M", vectors=2))
        device = stack.enter_context(ivshmem.connect(server.path))
        broker = Broker(device, directory / "guest", peers=[5, 6])
        stack.enter_context(broker.start())
        client = stack.enter_context(ivshmem.connect(broker.path))
        assert (client.id, broker.remote) == (0, [5, 6])
        monkeypatch.setattr(device, "current_id", lambda: 6)
        assert any(isinstance(e, ivshmem.Disconnected) for e in client.events(PATIENCE))
        again = stack.enter_context(ivshmem.connect(broker.path))
        assert again.id == 6
        until(lambda: again.peers == [5])
        assert [peer.id for peer in broker.peers] == [6]


def test_interrupts_reach_every_client_and_rings_go_through(scene: Scene) -> None:
    with ExitStack() as stack:
        children = [scene.child(stack, ECHO) for _ in range(3)]
        for child in children:
            child.expect("READY 1 2 [0]")
        for vector in (1, 0, 1):
            scene.far.ring(1, vector)
            for child in children:
                child.expect(f"RUNG {vector}")
            assert scene.far.wait(vector, PATIENCE)


def test_the_memory_is_the_same(scene: Scene) -> None:
    with ivshmem.connect(scene.broker.path) as client:
        with memoryview(client.region) as here, memoryview(scene.far.region) as there:
            here[:4] = b"near"
            assert bytes(there[:4]) == b"near"


def test_clients_do_not_see_one_another(scene: Scene) -> None:
    with ivshmem.connect(scene.broker.path) as a, ivshmem.connect(scene.broker.path) as b:
        assert (a.id, a.peers) == (b.id, b.peers) == (1, [0])
        assert a.peer_events() == []


def test_a_killed_client_harms_nobody(scene: Scene) -> None:
    with ExitStack() as stack:
        children = [scene.child(stack, ECHO) for _ in range(3)]
        for child in children:
            child.expect("READY 1 2 [0]")
        children[1].kill()
        until(lambda: len(scene.broker.peers) == 2)
        scene.far.ring(1, 1)
        for child in (children[0], children[2]):
            child.expect("RUNG 1")
        assert scene.far.wait(1, PATIENCE)


def test_a_hostile_client_holds_up_nobody(scene: Scene) -> None:
    with ExitStack() as stack:
        hostile = scene.child(stack, HOSTILE)
        hostile.expect("READY")
        friend = scene.child(stack, ECHO)
        friend.expect("READY 1 2 [0]")
        for _ in range(3):
            for vector in range(VECTORS):
                scene.far.ring(1, vector)
                friend.expect(f"RUNG {vector}")
                assert scene.far.wait(vector, PATIENCE)


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_a_client_of_another_user(scene: Scene) -> None:
    os.chmod(scene.broker.path, 0o666)  # noqa: S103
    with ExitStack() as stack:
        child = scene.child(stack, ECHO, user=NOBODY)
        child.expect("READY 1 2 [0]")
        scene.far.ring(1, 0)
        child.expect("RUNG 0")


def test_peers_in_the_directory_are_offered_as_they_come_and_go(directory: Path) -> None:
    with (
        testing.server("1M", vectors=VECTORS) as server,
        ivshmem.connect(server.path) as far,
        ivshmem.connect(server.path) as device,
        Broker(device, directory / "guest").start() as broker,
        ivshmem.connect(broker.path) as client,
    ):
        assert client.peers == []
        with ivshmem.Directory.create(far) as names:
            with names.publish("far"):
                assert client.next_event(PATIENCE) == ivshmem.PeerJoined(far.id)
                client.ring(far.id, 1)
                assert far.wait(1, PATIENCE)
            assert client.next_event(PATIENCE) == ivshmem.PeerLeft(far.id)
        with pytest.raises(ivshmem.NoSuchPeer):
            client.ring(far.id, 1)


def test_peers_that_use_channels_are_offered(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So clients wake them, and need not be told of them otherwise."""
    monkeypatch.setattr("ivshmem.guest.broker._LOOK_SECONDS", 0.02)
    with (
        testing.server("1M", vectors=VECTORS) as server,
        ivshmem.connect(server.path) as far,
        ivshmem.connect(server.path) as device,
    ):
        ivshmem.Directory.create(far, channels="64K").close()
        with (
            channel.open(far.region),  # it polls, so its id is none to ring
            Broker(device, directory / "guest").start() as broker,
            ivshmem.connect(broker.path) as client,
            channel.open(client),  # with the broker's own id
        ):
            with channel.open(far, vector=1):
                assert client.next_event(PATIENCE) == ivshmem.PeerJoined(far.id)
                client.ring(far.id, 1)
                assert far.wait(1, PATIENCE)
                assert broker.remote == [far.id]
            assert client.next_event(PATIENCE) == ivshmem.PeerLeft(far.id)


def test_two_clients_of_one_broker_exchange_messages(directory: Path) -> None:
    """Neither can ring the other; both find out, and look by themselves."""
    with ExitStack() as stack:
        server = stack.enter_context(testing.server("1M", vectors=VECTORS))
        device = stack.enter_context(ivshmem.connect(server.path))
        ivshmem.Directory.create(device, channels="64K").close()
        broker = stack.enter_context(Broker(device, directory / "guest").start())
        own = stack.enter_context(ivshmem.connect(broker.path))
        channels = stack.enter_context(channel.open(own, beat=0.2, lease=10))
        calls = channels.create_calls("a", limit=8)
        code = """
            import sys
            import ivshmem
            from ivshmem import channel
            with ivshmem.connect(sys.argv[1]) as client:
                with channel.open(client, beat=0.2, lease=10) as channels:
                    with channels.open("a").server() as server:
                        print("READY")
                        server.serve(bytes, 60)
        """
        child = stack.enter_context(python(code, broker.path))
        child.expect("READY")
        assert [place.id for place in channels.places()] == [device.id] * 2
        with calls.caller() as caller:
            assert caller.call(b"x", PATIENCE) == b"x"  # at the latest after a beat of both
            times = []
            for _ in range(5):
                began = time.monotonic()
                assert caller.call(b"x", PATIENCE) == b"x"
                times.append(time.monotonic() - began)
            assert min(times) < 0.1  # long before a beat


def test_memory_that_cannot_be_handed_on(directory: Path) -> None:
    class Device(ivshmem.Endpoint):
        id = 1

    file = FdArray()
    file.memfd("test", 0)
    os.truncate(file[0], 8192)
    with Device() as device:
        device.region = ivshmem.Region._over(
            file[0], 4096, owner=file, offset=4096, source="device", page_size=4096
        )
        with pytest.raises(ValueError, match="cannot be handed on: open the device with memory="):
            Broker(device, directory / "guest")
    assert not (directory / "guest").exists()


def test_ids_that_no_peer_has(directory: Path) -> None:
    with (
        testing.server("4K") as server,
        ivshmem.connect(server.path) as device,
    ):
        with pytest.raises(ValueError, match="peer 65536: ids are 0 to 65535"):
            Broker(device, directory / "guest", peers=[3, 65536])
    assert not (directory / "guest").exists()


def test_an_unplugged_device_ends_it(directory: Path) -> None:
    class Unplugged(ivshmem.Endpoint):
        id = 1

        def _next_peer_event(self) -> None:
            raise ivshmem.DeviceGone("the device was unplugged")

    with Unplugged() as device:
        device._add_vector(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
        device.region = ivshmem.Region.create("4K")
        device._ring_self(1)
        with Broker(device, directory / "guest", peers=[3]) as broker:
            device.ring(1, 0)
            with pytest.raises(ivshmem.DeviceGone):
                broker.serve_forever()
