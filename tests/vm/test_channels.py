"""Channels between real guests and the host, each kind in both directions: inside/talk.py.

By day the guests that stay: by vfio, with the memory uncached and write-combining, and behind a
broker. By night the other ways into a guest.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import ivshmem
from ivshmem import channel
from ivshmem.channel import Channels
from ivshmem.qemu import cmdline

from . import image
from .harness import Guest, MakeGuest
from .host import TIMEOUT, doorbell
from .inside import talk
from .resident import Run
from .residents import Manual, Pair

# Arguments: the way into the device, how its memory is mapped ("": by default), a name, and what
# to do: "lead" and "follow" begin the two halves of a conversation, of this number.
GUEST = """
import sys
import talk
from ivshmem import guest

access, memory, name, *turns = sys.argv[1:]
(found, *_) = sorted(guest.devices(), key=lambda each: each.variant != "doorbell")
with guest.open(found.address, access=access or None, memory=memory or None) as device:
    with talk.join(device, name) as channels:
        print("JOINED", device.access, device.memory, device.vectors, flush=True)
        for turn in turns:
            role, number = turn.split(":")
            talk.converse(channels, role == "lead", int(number))
            print("SAID", turn, flush=True)
"""

# Two clients of one broker: with each other, and then each with the host.
BROKER = r"""
import os, sys
import ivshmem, talk
from ivshmem import guest
from ivshmem.channel.channels import _mapping_of

def client(name, *turns):
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.close(tell)
        os.read(told, 1)  # the broker is there
        with ivshmem.connect("/tmp/socket", timeout=60) as own:
            # Whether its memory is resource2 or resource2_wc it cannot tell.
            assert _mapping_of(own, own.region) == "write-combining"
            with talk.join(own, name) as channels:
                for leads, number in turns:
                    talk.converse(channels, leads, number)
                    os.write(1, f"{name} SAID {number}\n".encode())
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status)

told, tell = os.pipe()
one = client("one", (True, 20), (False, 22))
two = client("two", (False, 20))
with guest.open(access="vfio", memory="resource2") as device:
    with guest.Broker(device, "/tmp/socket").start():
        os.close(tell)
        for pid in (two, one):
            assert os.waitpid(pid, 0)[1] == 0
"""


@pytest.fixture(autouse=True)
def reports(request: pytest.FixtureRequest) -> Iterator[None]:
    """What guests that stay said, for a test that failed: it may be they that gave up."""
    yield
    for name in {"pair", "manual"}.intersection(request.fixturenames):
        guests = request.getfixturevalue(name)
        for each in (guests.a, guests.b) if name == "pair" else (guests.guest,):
            print(each._guest.report())


@contextmanager
def at_host(endpoint: ivshmem.Endpoint | ivshmem.Region, room: str) -> Iterator[Channels]:
    region = endpoint.region if isinstance(endpoint, ivshmem.Endpoint) else endpoint
    ivshmem.Directory.create(region, channels=room).close()
    with talk.join(endpoint, "host") as channels:
        talk.make(channels)
        yield channels


def vectors(channels: Channels) -> dict[str, int | None]:
    return {place.name: place.vector for place in channels.places()}


def test_two_guests_and_the_host(pair: Pair, pair_host: ivshmem.Client) -> None:
    """By vfio; one guest has the memory uncached, and the other one write-combining."""
    with at_host(pair_host, "512K") as channels:
        a = pair.a.run(GUEST, "vfio", "vfio", "a", "follow:2", "lead:4")
        assert a.expect("JOINED") == "JOINED vfio vfio 4"
        talk.converse(channels, True, 2)
        b = pair.b.run(GUEST, "vfio", "resource2_wc", "b", "follow:4", "lead:6")
        assert b.expect("JOINED") == "JOINED vfio resource2_wc 4"
        assert vectors(channels) == {"host": 0, "a": 0, "b": 0}
        b.expect("SAID follow:4")
        talk.converse(channels, False, 6)
        assert (a.wait(), b.wait()) == (0, 0)


def test_clients_of_one_broker(pair: Pair, pair_host: ivshmem.Client) -> None:
    """They have one id, and cannot ring each other: they look by themselves."""
    with at_host(pair_host, "512K") as channels:
        a = pair.a.run(BROKER)
        a.expect("one SAID 20")
        talk.converse(channels, True, 22)
        assert a.wait() == 0


def test_a_host_that_may_only_read(pair: Pair, pair_host: ivshmem.Client) -> None:
    with at_host(pair_host, "512K") as channels:
        with ivshmem.connect(pair.server.path, readonly=True) as peer, channel.open(peer) as own:
            begun = threading.Event()
            failed: list[BaseException] = []

            def watch() -> None:
                try:
                    talk.watch(own, 30_000, begun.set)
                except BaseException as error:
                    failed.append(error)
                    begun.set()

            watcher = threading.Thread(target=watch)
            watcher.start()
            assert begun.wait(TIMEOUT)
            a = pair.a.run(GUEST, "vfio", "", "a", "lead:30")
            talk.converse(channels, False, 30)
            assert a.wait() == 0
            watcher.join(TIMEOUT)
            assert failed == []
            assert not watcher.is_alive()


def finish(channels: Channels, a: Guest | Run, opened: str, vector: int | None) -> None:
    """The host's part in the conversation of number 2, and what can be said of the guest."""
    assert a.expect("JOINED") == f"JOINED {opened}"
    assert vectors(channels)["guest"] == vector
    talk.converse(channels, True, 2)
    assert a.wait() == 0


TURN = ["guest", "follow:2"]


@pytest.mark.nightly
def test_a_plain_device_and_a_process_that_has_its_file(guest: MakeGuest, tmp_path: Path) -> None:
    """Without a server and without interrupts: both ends poll."""
    with ivshmem.Region.create("1M", path=tmp_path / "memory") as region:
        with at_host(region, "512K") as channels:
            args = cmdline.plain(str(tmp_path / "memory"), region.size)
            a = guest(GUEST, argv=["", "", *TURN], args=args)
            finish(channels, a, "sysfs resource2 0", None)


@pytest.mark.nightly
def test_by_sysfs(manual: Manual, manual_host: ivshmem.Client) -> None:
    """The guest polls, and rings the host."""
    with at_host(manual_host, "512K") as channels:
        finish(channels, manual.guest.run(GUEST, "sysfs", "", *TURN), "sysfs resource2 0", None)


@pytest.mark.nightly
def test_by_uio(manual: Manual, manual_host: ivshmem.Client, driver: Path) -> None:
    """One interrupt stands for all vectors, and its descriptor is no eventfd."""
    load = f"import checks\nchecks.load_module({str(driver)!r})\n"
    unload = "checks.unload_module('uio_doorbell')\n"
    with at_host(manual_host, "512K") as channels:
        a = manual.guest.run(load + GUEST + unload, "uio", "", *TURN)
        finish(channels, a, "uio uio 1", 0)


@pytest.mark.nightly
@pytest.mark.timeout(3600)  # the kernel may have to be built
def test_by_vfio_without_an_iommu(
    guest: MakeGuest, server: ivshmem.Server, host: ivshmem.Client, kernel: image.Image
) -> None:
    enable = (
        "from pathlib import Path\n"
        "Path('/sys/module/vfio/parameters/enable_unsafe_noiommu_mode').write_text('Y')\n"
    )
    with at_host(host, "512K") as channels:
        argv = ["noiommu", "", *TURN]
        a = guest(enable + GUEST, argv=argv, args=doorbell(server), boot=kernel)
        finish(channels, a, "noiommu vfio 4", 0)
