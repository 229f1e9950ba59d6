"""Guests without an IOMMU whose vfio does without one: a kernel that stock distributions lack.

kernels.noiommu() builds it, which takes minutes the first time. The same by fakes, in each test
run: tests/unit/test_guest_left.py.
"""

import pytest

import ivshmem

from . import image
from .harness import MakeGuest
from .host import SLOW, TIMEOUT, doorbell

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(3600)]  # the kernel may have to be built


# What the programs below begin with.
BEGIN = r"""
import contextlib, io, os, re, signal, subprocess, sys
from checks import PATIENCE, PCI, driver, refused
from ivshmem import NoInterrupts, guest
from ivshmem.cli.main import main

(found,) = guest.devices()
address = found.address
assert (found.driver, found.iommu_group, found.noiommu_group) == ("", None, None), found
ENABLE = "echo Y > /sys/module/vfio/parameters/enable_unsafe_noiommu_mode"

def typed(line):
    subprocess.run(["sh", "-c", line], check=True)

def ivshmem_(*words, status=0):
    # In this process: to start another Python takes seconds here.
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        assert main(list(words)) == status, (words, said.getvalue())
    return said.getvalue()

def doctor(status=0):
    return ivshmem_("doctor", "--guest", address, status=status)

def listed():
    return re.split("  +", ivshmem_("guest", "list").rstrip())[-2:]

def works():
    with guest.open() as device:
        assert (device.access, device.memory, device.vectors) == ("noiommu", "vfio", 4), device
        for vector in range(4):
            device.ring(device.id, vector)
            assert device.wait(vector, PATIENCE) == 1

class User:
    '''Another process, which has the device open until it is killed.'''

    def __init__(self):
        code = "from ivshmem import guest; d = guest.open(); print(d.access, flush=True); input()"
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, "-c", code], **pipes)
        assert self.process.stdout.readline() == "noiommu\n"
        self.pid = self.process.pid

    def ends(self, by=None):
        if by is not None:
            self.process.send_signal(by)
        self.process.wait(PATIENCE)
        self.process.stdin.close()
        self.process.stdout.close()
"""


def program(text: str) -> str:
    return BEGIN + "\n".join(line.removeprefix(" " * 8) for line in text.splitlines())


def test_the_mode_is_switched_on(
    guest: MakeGuest, server: ivshmem.Server, host: ivshmem.Client, kernel: image.Image
) -> None:
    """What each way says of a mode that is off; the command that it names; and then it works."""
    a = guest(
        program(r"""
        assert listed() == ["-", "-"], listed()
        with guest.open() as device:
            assert device.access == "sysfs"
            device.region.write(0, b"guest!")
            with refused(NoInterrupts, ENABLE):
                device.wait(0, 0)
        with refused(OSError, "vfio's no-IOMMU mode is off", ENABLE):
            guest.open(access="noiommu")
        with refused(OSError, "this guest has no IOMMU, which vfio needs", ENABLE):
            guest.open(access="vfio")
        said = doctor(status=1)
        assert ENABLE in said, said
        assert driver(address) == ""

        typed(ENABLE)
        works()
        assert guest.devices() == [found], "given back"
        said = doctor()
        assert "none, but vfio's no-IOMMU mode is on" in said and "4 of 4 vectors" in said, said
        said = ivshmem_("guest", "measure")
        assert said.startswith("vfio          read"), said
        with guest.open() as device:
            print("LISTENS", device.id, flush=True)
            assert device.wait(2, PATIENCE) == 1
            assert device.region.read(6, 5) == b"host!"
            device.ring(0, 3)
        """),
        args=doorbell(server),
        boot=kernel,
    )
    number = int(a.expect("LISTENS", SLOW).split()[1])
    assert host.region.read(0, 6) == b"guest!"
    host.region.write(6, b"host!")
    host.ring(number, 2)
    assert host.wait(3, TIMEOUT), a.report()
    assert a.wait(SLOW) == 0


def test_the_driver_has_it_already(
    guest: MakeGuest, server: ivshmem.Server, kernel: image.Image
) -> None:
    """Left by kill -9, bound by an administrator, open elsewhere, kept by a forked child."""
    a = guest(
        program(r"""
        typed(ENABLE)

        def left():
            '''vfio-pci has the device, and no process has the device open.'''
            assert driver(address) == "vfio-pci"
            (now,) = guest.devices()
            assert (now.driver, now.iommu_group) == ("vfio-pci", None), now
            group = f"no IOMMU (vfio's group {now.noiommu_group})"
            assert listed() == ["vfio-pci", group], listed()
            works()
            assert driver(address) == "vfio-pci", "as it was"

        # Killed.
        user = User()
        user.ends(by=signal.SIGKILL)
        left()
        said = doctor()
        assert "no process has the device open" in said and "4 of 4 vectors" in said, said
        assert "intel-iommu" not in said, said
        with refused(OSError, "the driver vfio-pci has the device: open it by noiommu"):
            guest.open(access="sysfs")

        # By hand.
        typed(f"echo {address} > {found.path}/driver/unbind; echo > {found.path}/driver_override")
        assert guest.devices() == [found]
        typed(f"echo vfio-pci > {found.path}/driver_override")
        typed(f"echo {address} > {PCI}/drivers_probe")
        left()

        # A second opener, of this process and of another; the remedy, typed, ends the first.
        with guest.open() as device:
            with refused(OSError, "this process has the device open already"):
                guest.open()
            device.ring(device.id, 1)
            assert device.wait(1, PATIENCE) == 1
        user = User()
        with refused(OSError, f"another process has the device open (process {user.pid})"):
            guest.open()
        said = doctor(status=1)
        assert f"pid {user.pid} (" in said and "has the device open" in said, said
        assert "no process has the device open" not in said and "intel-iommu" not in said, said
        (remedy,) = re.findall(rf"kill {user.pid}$", said, re.MULTILINE)
        typed(remedy)
        user.ends()
        left()

        # A forked child that keeps it.
        device = guest.open()
        told, tell = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(tell)
            os.read(told, 1)
            os._exit(0)
        device.close()
        with refused(OSError, f"another process has the device open (process {child})"):
            guest.open()
        said = doctor(status=1)
        assert f"pid {child} (" in said, said
        os.close(tell)
        os.waitpid(child, 0)
        left()

        # The mode is switched off while the driver has the device.
        typed(ENABLE.replace("Y", "N"))
        for access in (None, "noiommu"):
            with refused(OSError, "vfio's no-IOMMU mode is off: as root", ENABLE):
                guest.open(access=access)
        said = doctor(status=1)
        assert ENABLE in said and "intel-iommu" not in said, said
        typed(ENABLE)
        left()
        """),
        args=doorbell(server),
        boot=kernel,
    )
    assert a.wait(SLOW) == 0


def test_root_without_the_right(
    guest: MakeGuest, server: ivshmem.Server, kernel: image.Image
) -> None:
    """A container's root may lack CAP_SYS_RAWIO: the message names it, and nothing is changed."""
    a = guest(
        program(r"""
        typed(ENABLE)
        CODE = "from ivshmem import guest; print(guest.open(access=%r).access)"

        def opened(access, *prefix):
            words = [*prefix, sys.executable, "-c", CODE % (access,)]
            done = subprocess.run(words, capture_output=True, text=True)
            lines = (done.stdout + done.stderr).splitlines()
            return done.returncode, lines[-1]

        without = "setpriv", "--bounding-set=-sys_rawio", "--inh-caps=-sys_rawio"
        status, said = opened("noiommu", *without)
        assert status == 1 and "CAP_SYS_RAWIO" in said and "--cap-add SYS_RAWIO" in said, said
        assert guest.devices() == [found], "as it was"
        assert opened("noiommu") == (0, "noiommu")
        assert opened(None) == (0, "noiommu")

        # The device stays with vfio-pci: no other way is left to try.
        user = User()
        user.ends(by=signal.SIGKILL)
        status, said = opened(None, *without)
        assert status == 1 and "CAP_SYS_RAWIO" in said, said
        assert driver(address) == "vfio-pci"
        works()
        """),
        args=doorbell(server),
        boot=kernel,
    )
    assert a.wait(SLOW) == 0
