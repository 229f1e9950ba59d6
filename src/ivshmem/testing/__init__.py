"""Tests of programs that share memory: a server, a hostile peer, a fake device.

    server               runs a server with a temporary socket while a block runs
    HostilePeer          does to a server and its peers what no honest peer does
    leave_during_set_up  connects, and leaves at any point of the set-up
    fake_device          lets `guest.open()` find a device on any machine, without a guest
    ivshmem.testing.fixtures    the same as fixtures of pytest; the rest needs no pytest

A program's answer to rings is tested with a real server, in one process:

    import ivshmem
    from ivshmem import testing

    with testing.server(vectors=2) as server, ivshmem.connect(server.path) as a:
        with ivshmem.connect(server.path) as b:
            a.ring(b.id, 1)
            assert b.wait(1, timeout=5) == 1
        with testing.HostilePeer(server.path, vectors=2) as peer:
            peer.fill_counters([a.id])
            peer.scribble(b"rubbish")
            a.ring_nowait(a.id)
            assert a.wait(0, timeout=5) is not None

    from ivshmem import guest

    with testing.fake_device(vectors=2) as fake, guest.open() as device:
        fake.interrupt(1)
        assert device.wait(timeout=5) == (1, 1)
        device.ring(7, 1)
        assert fake.take_ring() == (7, 1)
"""

from .fake_device import FakeDevice, fake_device
from .hostile_peer import HostilePeer, leave_during_set_up
from .servers import server

__all__ = ["FakeDevice", "HostilePeer", "fake_device", "leave_during_set_up", "server"]
