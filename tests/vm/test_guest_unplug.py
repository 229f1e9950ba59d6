"""A guest's device is unplugged while it is in use: who waits is told, nobody hangs.

No peer may leave before: QEMU crashes in device_del once it was told of one (see
docs/howto/unplug.md).
"""

import pytest

import ivshmem

from .harness import MakeGuest
from .host import TIMEOUT, pluggable

# QEMU decides how a device goes, and what its vfio user is told.
pytestmark = pytest.mark.qemu


@pytest.mark.nightly
def test_unplugged_while_waiting(
    guest: MakeGuest, server: ivshmem.Server, host: ivshmem.Client
) -> None:
    """In each way of waiting; and the kernel waits for memory that somebody looks at."""
    a = guest(
        """
        import asyncio, select, threading
        from checks import PATIENCE, driver, refused, until
        from ivshmem import DeviceGone, guest

        def by_select(device):
            assert select.select([device], [], [], PATIENCE)[0]
            return next(device.events(timeout=0))

        WAITS = [
            lambda device: device.wait(1),
            lambda device: device.wait(1, PATIENCE),
            lambda device: device.wait(),
            lambda device: next(device.events()),
            by_select,
        ]
        found = guest.devices()
        assert len(found) == len(WAITS)
        for number, wait in enumerate(WAITS):
            device = guest.open(found[number].address)
            assert driver(device.device.address) == "vfio-pci"
            view = memoryview(device.region)
            print("WAITS", flush=True)
            with refused(DeviceGone, device.device.address, "was unplugged: close it"):
                wait(device)
            for again in (
                lambda: device.wait(0, 0), lambda: device.wait(timeout=0), lambda: wait(device)
            ):
                with refused(DeviceGone):
                    again()
            # It is still here: for the memory's sake, which others see still.
            with refused(BufferError, "in use by 1 views"):
                device.close()
            view[number] += 1
            assert device.device.path.exists()
            print("KEEPS", flush=True)
            assert input() == "let go"
            view.release()
            device.close()
            until(lambda: not device.device.path.exists(), "the end of the removal")
            assert guest.devices() == found[number + 1:]
        assert input() == "end"
        """,
        args=[word for number in range(5) for word in pluggable(server, number)],
        iommu=True,
    )
    for number in range(5):
        a.expect("WAITS")
        a.qmp("device_del", id=f"shm{number}")
        a.expect("KEEPS", timeout=TIMEOUT)
        a.send("let go")
        a.qmp_event("DEVICE_DELETED", device=f"shm{number}")
    assert host.peers == [1, 2, 3, 4, 5], "QEMU keeps the sockets"
    with memoryview(host.region) as memory:
        assert bytes(memory[:6]) == bytes([1, 1, 1, 1, 1, 0])
    a.send("end")
    assert a.wait() == 0
