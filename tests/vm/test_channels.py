"""Channels between real guests and the host, each kind in both directions: inside/talk.py.

By day the guests that stay: by vfio, with the memory uncached and write-combining, and behind a
broker. By night the other ways into a guest.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


# Arguments: the access. It answers "out" in "back"; nothing but an interrupt ends its sleeps.
WATCHES = """
import asyncio, select, sys
import talk
from ivshmem import channel, guest

async def answer(reader, writer, count):
    async def one():
        for _ in range(count):
            message = await reader.get_async(talk.PATIENCE)
            await writer.put_async(message, talk.PATIENCE)
        return True
    async def other():
        return await idle.wait_changed_async(talk.PATIENCE)
    both = asyncio.gather(one(), other())
    print("LISTENS", flush=True)
    print("HEARD", *await both, flush=True)

def watch(reader, writer, count):
    poll = select.poll()
    poll.register(reader.fileno(), select.POLLIN)
    print("LISTENS", flush=True)
    while count:
        if (message := reader.get(0)) is None:
            assert poll.poll(1000 * talk.PATIENCE), count
            continue
        writer.put(message, talk.PATIENCE)
        count -= 1

(found, *_) = sorted(guest.devices(), key=lambda each: each.variant != "doorbell")
with guest.open(found.address, access=sys.argv[1]) as device:
    with channel.open(device, name="guest", beat=1000, lease=10000) as channels:
        idle = channels.open("value").reader()
        with channels.open("out").reader("block") as reader:
            with channels.open("back").writer() as writer:
                asyncio.run(answer(reader, writer, 5))
                watch(reader, writer, 5)
"""


def hold_answers(channels: Channels, a: Run) -> None:
    """The host's part: one message after the other, each after the guest sleeps again."""
    out, back = (channels.open(name, "messages") for name in ("out", "back"))
    assert isinstance(out, channel.Messages)
    assert isinstance(back, channel.Messages)
    value = channels.open("value", "value")
    assert isinstance(value, channel.Value)
    with out.writer() as writer, back.reader("block") as reader, value.writer() as setter:
        for how in ("asyncio", "poll"):
            a.expect("LISTENS")
            for number in range(5):
                time.sleep(0.05)
                writer.put(talk.message(number))
                assert reader.get(TIMEOUT) == talk.message(number), how
            if how == "asyncio":
                setter.put(talk.message(7))
                assert a.expect("HEARD").startswith("HEARD True b")
    assert a.wait() == 0


@pytest.mark.nightly
def test_asyncio_and_descriptors_by_vfio(pair: Pair, pair_host: ivshmem.Client) -> None:
    with at_host(pair_host, "512K") as channels:
        hold_answers(channels, pair.a.run(WATCHES, "vfio"))


@pytest.mark.nightly
def test_asyncio_and_descriptors_by_uio(
    manual: Manual, manual_host: ivshmem.Client, driver: Path
) -> None:
    """The descriptor of a UIO device is no eventfd; its edge wakes loops all the same."""
    load = f"import checks\nchecks.load_module({str(driver)!r})\n"
    unload = "checks.unload_module('uio_doorbell')\n"
    with at_host(manual_host, "512K") as channels:
        hold_answers(channels, manual.guest.run(load + WATCHES + unload, "uio"))


# The device drops each interrupt, as it does until its driver turns MSI-X on.
WITHOUT_MSIX = """
import asyncio, select, struct
import talk
from ivshmem import channel, guest

def msix(address, on):
    with open(f"/sys/bus/pci/devices/{address}/config", "r+b", buffering=0) as config:
        space = config.read(256)
        at = space[0x34]
        while space[at] != 0x11:
            at = space[at + 1]
            assert at, "no MSI-X"
        (control,) = struct.unpack_from("<H", space, at + 2)
        config.seek(at + 2)
        config.write(struct.pack("<H", control & 0x7fff | on << 15))
        return control >> 15

(found, *_) = sorted(guest.devices(), key=lambda each: each.variant != "doorbell")
with guest.open(found.address, access="vfio") as device:
    with channel.open(device, name="guest", beat=0.2, lease=10) as channels:
        with channels.open("out").reader("block") as reader:
            with channels.open("back").writer() as writer:
                assert msix(found.address, 0)
                poll = select.poll()
                def block():
                    return reader.get(talk.PATIENCE)
                def task():
                    return asyncio.run(reader.get_async(talk.PATIENCE))
                def watch():
                    fd = reader.fileno()
                    poll.register(fd, select.POLLIN)
                    while (message := reader.get(0)) is None:
                        assert poll.poll(1000 * talk.PATIENCE)
                    return message
                for way in (block, task, watch):
                    print("LISTENS", flush=True)
                    writer.put(way(), talk.PATIENCE)
                assert not msix(found.address, 1), "it was off all the time"
"""


@pytest.mark.nightly
def test_before_msix_is_on(pair: Pair, pair_host: ivshmem.Client) -> None:
    """The host rings, and no interrupt comes: each way to sleep looks by itself once a beat."""
    with at_host(pair_host, "512K") as channels:
        out, back = (channels.open(name, "messages") for name in ("out", "back"))
        assert isinstance(out, channel.Messages)
        assert isinstance(back, channel.Messages)
        with out.writer() as writer, back.reader("block") as reader:
            a = pair.a.run(WITHOUT_MSIX)
            for number in range(3):
                a.expect("LISTENS")
                time.sleep(0.1)
                writer.put(talk.message(number))
                assert reader.get(TIMEOUT) == talk.message(number)
            assert a.wait() == 0


# -- arrays -------------------------------------------------------------------------------------

# The guest has no numpy: it fills a loan, and looks at a view, both in place.
ARRAYS = """
import talk
from ivshmem import guest

(found, *_) = sorted(guest.devices(), key=lambda each: each.variant != "doorbell")
with guest.open(found.address) as device, talk.join(device, "guest") as channels:
    with channels.open("to host").writer() as writer, channels.open("to guest").reader() as reader:
        print("THERE", flush=True)
        for number in range(3):
            with writer.loan() as loan, memoryview(loan).cast("B") as memory:
                for i in range(0, len(memory), 4):
                    memory[i : i + 4] = (number * 1000 + i).to_bytes(4, "little")
            with reader.view(talk.PATIENCE) as view, memoryview(view).cast("B") as memory:
                assert len(memory) == 4 * 12 * 64
                for i in range(0, len(memory), 4):
                    assert int.from_bytes(memory[i : i + 4], "little") == number * 7 + i // 4
"""


def test_arrays_share_the_memory_of_a_guest(pair: Pair, pair_host: ivshmem.Client) -> None:
    """What the host receives from a guest, and what it sends there, is the region itself."""
    numpy = pytest.importorskip("numpy")
    shape, dtype = (12, 64), "<i4"
    with at_host(pair_host, "512K") as channels:
        few: dict[str, Any] = {"slots": 2, "writers": 1, "readers": 1, "views": 1}
        to_host = channels.create_messages("to host", dtype=dtype, shape=shape, **few)
        to_guest = channels.create_messages("to guest", dtype=dtype, shape=shape, **few)
        region = numpy.frombuffer(pair_host.region, dtype="u1")
        steps = numpy.arange(12 * 64, dtype=dtype).reshape(shape)
        with to_host.reader("block") as reader, to_guest.writer() as writer:
            a = pair.a.run(ARRAYS)
            a.expect("THERE")
            for number in range(3):
                view = reader.view(TIMEOUT)
                assert view is not None
                with view:
                    received = view.array
                    assert numpy.shares_memory(received, region)
                    assert not received.flags.writeable
                    assert (received == number * 1000 + 4 * steps).all()
                    del received
                with writer.loan() as loan:
                    sent = loan.array
                    assert numpy.shares_memory(sent, region)
                    sent[:] = number * 7 + steps
                    del sent
            assert a.wait() == 0
        del region


# -- guests alone ----------------------------------------------------------------------------------

MAKES = """
import time
import talk
from ivshmem import channel, guest

with guest.open() as device, channel.open(device, name="maker", beat=0.2, lease=2) as channels:
    queue = channels.create_queue("jobs", limit=8, slots=4, readers=1)
    more = channels.create_queue("more", limit=8, slots=4)
    with queue.writer() as writer, more.reader() as reader:
        writer.put(b"job")
        print("MADE", flush=True)
        assert reader.get(talk.PATIENCE) == b"begun"

        def other():
            return [(each.place, each.state) for each in channels.places() if each.name == "takes"]
        while [state for _, state in other()] == ["at work"]:
            time.sleep(0.05)
        ((place, state),) = other()
        assert state == "silent"
        time.sleep(3)
        assert other() == [(place, "silent")], "no proof is to be had here"
        try:
            queue.reader()
        except channel.ChannelError as error:
            print("SET ASIDE", flush=True)
        assert channels.free_place(place)
        assert other() == []
        with queue.reader() as mine, mine.take(talk.PATIENCE) as job:
            assert bytes(job) == b"job" and job.redelivered
"""

TAKES = """
import os, signal
import talk
from ivshmem import channel, guest

if (pid := os.fork()) == 0:
    try:
        device = guest.open()
        channels = channel.open(device, name="takes", beat=0.2, lease=2)
        job = channels.open("jobs").reader().take(talk.PATIENCE)
        channels.open("more").writer().put(b"begun")
    finally:
        os.kill(os.getpid(), signal.SIGKILL)
os.waitpid(pid, 0)
"""


@pytest.mark.nightly
def test_guests_alone(pair: Pair, pair_host: ivshmem.Client) -> None:
    """No process of the host takes part: a death is known by the lease, and proven by nobody.

    What the dead one may still store into is set aside until somebody says that it is gone.
    """
    ivshmem.Directory.create(pair_host.region, channels="512K").close()
    a = pair.a.run(MAKES)
    a.expect("MADE")
    b = pair.b.run(TAKES)
    a.expect("SET ASIDE")
    assert (a.wait(), b.wait()) == (0, 0)


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
