"""Real guests whose device has a UIO driver, which is ours: kernel/uio_doorbell.c.

One interrupt stands for all vectors there, a driver can let go of the device at any time, and the
kernel lets nobody else map what the driver has claimed.
"""

from pathlib import Path

import pytest

import ivshmem

from .harness import MakeGuest
from .host import SLOW, TIMEOUT, doorbell, pluggable
from .residents import Manual
from .test_guest_device import plug

pytestmark = pytest.mark.timeout(3 * SLOW)


# What the programs below begin with.
BEGIN = """
import os, subprocess, sys, time
from checks import PATIENCE, PCI, command, driver, in_child, load_module, refused, until
from checks import unload_module
import ivshmem
from ivshmem import DeviceGone, IdChanged, Interrupt, guest

load_module(sys.argv[1])
(found,) = [each for each in guest.devices() if each.variant == "doorbell"]
address = found.address
assert (found.driver, found.variant) == ("uio_doorbell", "doorbell"), found

def ivshmem_(*words, status=0):
    command = [sys.executable, "-m", "ivshmem", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == status, (words, done)
    return done.stdout + done.stderr
"""


def program(text: str) -> str:
    return BEGIN + "\n".join(line.removeprefix(" " * 8) for line in text.splitlines())


@pytest.mark.nightly
def test_memory_and_interrupts(manual: Manual, manual_host: ivshmem.Client, driver: Path) -> None:
    """Each vector arrives, as one for all; and the driver has the device all the time."""
    host = manual_host
    a = manual.guest.run(
        program("""
        with guest.open(address) as device, memoryview(device.region) as memory:
            assert (device.access, device.memory, device.id, device.vectors) == ("uio", "uio", 0, 1)
            assert bytes(memory[:5]) == b"host!"
            memory[-6:] = b"guest!"
            for way in (
                lambda: device.wait(0, PATIENCE),
                lambda: device.wait(timeout=PATIENCE).rings,
                lambda: next(device.events(PATIENCE)).rings,
            ):
                for vector in range(4):
                    print("LISTENS", flush=True)
                    assert way() == 1
                    assert device.wait(timeout=0) is None
                    device.ring(int(sys.argv[2]), vector)
            device.ring(device.id, 2)
            assert device.wait(0, PATIENCE) == 1, "ringing oneself"
            assert list(device.events(0)) == []
        assert found in guest.devices()
        unload_module("uio_doorbell")
        assert driver(address) == ""
        """),
        driver,
        host.id,
    )
    with memoryview(host.region) as memory:
        memory[:5] = b"host!"
        for number in range(3 * 4):
            a.expect("LISTENS")
            host.ring(0, number % 4)
            assert host.wait(timeout=TIMEOUT) == (number % 4, 1), a.report()
        assert bytes(memory[-6:]) == b"guest!"
    assert a.wait(SLOW) == 0


@pytest.mark.nightly
def test_nobody_takes_the_driver_away(
    guest: MakeGuest, server: ivshmem.Server, host: ivshmem.Client, driver: Path
) -> None:
    """A program uses the device; measuring, vfio and doctor leave it that, and do not ring it."""
    a = guest(
        program("""
        CODE = "from ivshmem import guest; d = guest.open(); print(d.access, flush=True);" \\
            "print(d.wait(0, 600), flush=True); print(d.wait(0, 600), flush=True)"
        user = subprocess.Popen([sys.executable, "-c", CODE], stdout=subprocess.PIPE, text=True)
        assert user.stdout.readline() == "uio\\n"
        busy = f"process {user.pid} uses it through UIO: stop that, or open it by uio"
        with refused(OSError, busy):
            guest.open(access="vfio")
        said = ivshmem_("guest", "measure")
        assert "\\nuio           read" in said, said
        assert said.startswith(f"vfio          {busy}"), said
        assert said.count("lets nobody map it by sysfs then: open it by vfio, or boot") == 2, said
        said = ivshmem_("doctor", "--guest", address)
        assert f"pid {user.pid} (" in said, said
        assert "has the device open, and is not disturbed" in said, said
        assert driver(address) == "uio_doorbell"
        assert user.poll() is None
        print("RING", flush=True)
        assert user.stdout.readline() == "1\\n", "what was heard is the host, and nobody else"
        user.kill()
        user.wait()

        # Nobody has it now, so vfio may, and gives it back.
        with guest.open(access="vfio") as device:
            assert (device.access, device.vectors) == ("vfio", 4)
            device.ring(device.id, 3)
            assert device.wait(3, PATIENCE) == 1
        assert driver(address) == "uio_doorbell"
        said = ivshmem_("guest", "measure")
        assert "\\nuio           read" in said and said.startswith("vfio          read"), said
        said = ivshmem_("doctor", "--guest", address)
        assert "1 of 1 vector" in said, said
        """),
        argv=[str(driver)],
        args=doorbell(server),
        iommu=True,
        modules=["drivers"],
    )
    a.expect("RING", SLOW)
    host.ring(1, 2)
    assert a.wait(SLOW) == 0


@pytest.mark.nightly
def test_sharing_it(
    guest: MakeGuest, server: ivshmem.Server, host: ivshmem.Client, driver: Path
) -> None:
    """Not beside a driver that has claimed the memory, unless the kernel is told to relax."""
    a = guest(
        program("""
        remedy = "lets nobody map it by sysfs then: boot the guest with iomem=relaxed"
        said = ivshmem_("guest", "serve", "-S", "/tmp/s", status=1)
        assert remedy in said and "open it by" not in said, said
        said = ivshmem_("guest", "serve", "-S", "/tmp/s", "--memory", "uio", status=1)
        assert "boots with iomem=relaxed" in said, said
        assert not os.path.exists("/tmp/s")
        """),
        argv=[str(driver)],
        args=doorbell(server),
        modules=["drivers"],
    )
    assert a.wait(SLOW) == 0
    b = guest(
        program("""
        with (
            guest.open(memory="resource2") as device,
            guest.Broker(device, "/tmp/socket", peers=[0]).start(),
            ivshmem.connect("/tmp/socket", timeout=60) as client,
        ):
            assert (device.access, device.vectors) == ("uio", 1)
            assert (client.vectors, client.peers) == (4, [0]), client
            client.region.write(0, b"client")
            client.ring(0, 3)
            print("RANG", flush=True)
            assert client.wait(3, PATIENCE) == 1
            assert client.wait(0, PATIENCE) == 1, "one interrupt stands for any vector"
        """),
        name="relaxed",
        argv=[str(driver)],
        args=doorbell(server),
        modules=["drivers"],
        kernel_args=["iomem=relaxed"],
    )
    b.expect("RANG", SLOW)
    assert host.wait(3, TIMEOUT), b.report()
    assert host.region.read(0, 6) == b"client"
    host.ring(host.peers[-1], 1)
    assert b.wait(SLOW) == 0


@pytest.mark.nightly
def test_a_driver_that_is_unbound(
    guest: MakeGuest, server: ivshmem.Server, host: ivshmem.Client, driver: Path
) -> None:
    """Whoever waits is told, in each way; the registers, which read as 0 then, are no id."""
    a = guest(
        program("""
        import threading
        bind = PCI / "drivers" / "uio_doorbell"
        WAITS = [
            lambda device: device.wait(0),
            lambda device: device.wait(0, PATIENCE),
            lambda device: device.wait(),
            lambda device: next(device.events()),
        ]
        for wait in WAITS:
            device = guest.open()
            assert device.id == 1
            said = []
            def waits():
                with refused(DeviceGone, address, "was unplugged: close it"):
                    wait(device)
                said.append("gone")
            thread = threading.Thread(target=waits)
            thread.start()
            (bind / "unbind").write_text(address)
            thread.join(PATIENCE)
            assert said == ["gone"]
            for again in (
                lambda: device.wait(0, 0), lambda: wait(device), lambda: list(device.events(0)),
            ):
                with refused(DeviceGone):
                    again()
            assert device.id == 1
            device.close()
            (bind / "bind").write_text(address)
            until(lambda: guest.devices() == [found])
        """),
        argv=[str(driver)],
        args=doorbell(server),
        modules=["drivers"],
    )
    assert a.wait(SLOW) == 0


INSIDE_A_PAGE = (
    BEGIN.partition("(found,)")[0]
    + """
from ivshmem.guest import pci

remedy = sys.argv[2]
print("READY", flush=True)
until(lambda: [d.driver for d in guest.devices()] == ["uio_doorbell"] * 2)
starts = [pci.bar_start(d, pci.REGISTERS) % 4096 for d in guest.devices()]
last = guest.devices()[1].address
if remedy in open("/proc/cmdline").read():
    assert starts == [0, 0], starts
    with guest.open(last) as device:
        assert device.access == "uio"
        device.ring(device.id, 0)
        assert device.wait(0, PATIENCE) == 1
else:
    assert starts[1] != 0, starts
    with refused(OSError, "its registers begin inside a page", remedy):
        guest.open(last)
"""
)


@pytest.mark.nightly
def test_registers_inside_a_page(guest: MakeGuest, server: ivshmem.Server, driver: Path) -> None:
    """UIO maps whole pages, and two functions that are plugged in share one; the remedy helps."""
    remedy = "pci=resource_alignment=12@pci:1af4:1110"
    for name, kernel_args in (("shared", []), ("aligned", [remedy])):
        a = guest(
            INSIDE_A_PAGE,
            name=name,
            argv=[str(driver), remedy],
            args=["-device", "pcie-root-port,id=port0,chassis=1"],
            iommu=True,
            modules=["drivers"],
            kernel_args=kernel_args,
        )
        a.expect("READY")
        # Function 0 comes last: it is what makes the guest look.
        plug(a, server, 0, bus="port0", addr="0.1")
        plug(a, server, 1, bus="port0", addr="0.0", multifunction=True)
        assert a.wait(SLOW) == 0


@pytest.mark.nightly
def test_unplugged(
    guest: MakeGuest, server: ivshmem.Server, host: ivshmem.Client, driver: Path
) -> None:
    """As by unbinding. In about half of the runs QEMU 7.2 crashes, which a guest cannot help."""
    a = guest(
        program("""
        device = guest.open()
        print("WAITS", flush=True)
        with refused(DeviceGone, address, "was unplugged: close it"):
            while True:
                assert not isinstance(device.next_event(), IdChanged)
        print("TOLD", flush=True)
        device.close()
        """),
        argv=[str(driver)],
        args=pluggable(server),
        iommu=True,
        modules=["drivers"],
    )
    a.expect("WAITS")
    a.qmp("device_del", id="shm0")
    try:
        a.expect("TOLD")
        assert a.wait(SLOW) == 0
    except AssertionError:
        if (signal := a.crashed()) is None:
            raise
        pytest.skip(f"QEMU ended by signal {signal}, as 7.2 does")
