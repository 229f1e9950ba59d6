"""Two devices in one IOMMU group, as libvirt places them: both on one bridge."""

import pytest

import ivshmem
from ivshmem.qemu import cmdline

from .harness import MakeGuest
from .host import SLOW


@pytest.mark.nightly
def test_two_on_one_bridge(guest: MakeGuest, server: ivshmem.Server) -> None:
    """One process has both; another is told which one is in the way, and how to place them."""
    doorbells = []
    for number in range(2):
        chardev, socket, option, device = cmdline.doorbell(server.path, 4, ident=f"c{number}")
        doorbells += [chardev, socket, option, f"{device},bus=bridge"]
    a = guest(
        """
        import os, subprocess, sys
        from checks import PATIENCE, driver, in_child, refused
        from ivshmem import guest

        one, two = guest.devices()
        assert one.iommu_group == two.iommu_group

        def works(device):
            for vector in range(4):
                device.ring(device.id, vector)
                assert device.wait(vector, PATIENCE) == 1

        for first, second in ((one, two), (two, one)):
            with guest.open(second.address) as b:
                with guest.open(first.address) as a:
                    assert {a.id, b.id} == {0, 1}
                    works(a)
                    works(b)
                    a.ring(b.id, 3)
                    assert b.wait(3, PATIENCE) == 1
                works(b)
                with guest.open(first.address) as a:
                    works(a)
            assert guest.devices() == [one, two], "both have their drivers, which is none"

        def refusal(device, other):
            with refused(
                OSError, f"another process (process {os.getppid()}", "has IOMMU group",
                f"open, in which {other.address} is, too: open both in one process, or give each",
                "-device pcie-root-port,id=port1,chassis=1",
            ):
                guest.open(device.address)

        with guest.open(one.address) as a:
            in_child(lambda: refusal(two, one))
            assert driver(two.address) == "", "as it was before"
            words = [sys.executable, "-m", "ivshmem", "doctor", "--guest", two.address]
            done = subprocess.run(words, capture_output=True, text=True)
            assert done.returncode == 1, done
            assert "kill" not in done.stdout, done
            assert f"open, which also contains {one.address}: open both" in done.stdout, done
            assert "-device pcie-root-port,id=port1,chassis=1" in done.stdout, done
            works(a)

        # A forked child that lives on keeps the group, so the drivers stay until it has ended.
        told, tell = os.pipe()
        a, b = guest.open(one.address), guest.open(two.address)
        child = os.fork()
        if child == 0:
            os.close(tell)
            os.read(told, 1)
            os._exit(0)
        a.close()
        b.close()
        assert [driver(d.address) for d in (one, two)] == ["vfio-pci"] * 2
        os.close(tell)
        os.waitpid(child, 0)
        with guest.open(one.address) as a, guest.open(two.address) as b:
            works(a)
            works(b)
        """,
        args=["-device", "pcie-pci-bridge,id=bridge", *doorbells],
        iommu=True,
    )
    assert a.wait(SLOW) == 0


@pytest.mark.nightly
def test_what_is_printed_keeps_them_apart(guest: MakeGuest, server: ivshmem.Server) -> None:
    """QEMU places devices without an address so that each has a group of its own."""
    arguments = [w for n in range(2) for w in cmdline.doorbell(server.path, 4, ident=f"c{n}")]
    a = guest(
        """
        from ivshmem import guest
        one, two = guest.devices()
        assert one.iommu_group != two.iommu_group, (one, two)
        """,
        args=arguments,
        iommu=True,
    )
    assert a.wait(SLOW) == 0
