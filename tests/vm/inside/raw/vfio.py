"""The ivshmem device by way of vfio: id, doorbell, memory and interrupts. Needs an IOMMU.

Knows: binding to vfio-pci, the ioctls of <linux/vfio.h>, MSI-X through eventfds.
Does not know: sysfs mappings; sysfs.py has those.
"""

import fcntl
import mmap
import os
import select
import struct
from pathlib import Path
from types import TracebackType

from .sysfs import DOORBELL, ID, PCI_DEVICES, find

# ioctl numbers: _IO(';', 100 + n)
(GET_API_VERSION, SET_IOMMU, GROUP_GET_STATUS, GROUP_SET_CONTAINER) = (
    0x3B64,
    0x3B66,
    0x3B67,
    0x3B68,
)
(GROUP_GET_DEVICE_FD, GET_REGION_INFO, GET_IRQ_INFO, SET_IRQS) = (0x3B6A, 0x3B6C, 0x3B6D, 0x3B6E)
TYPE1V2_IOMMU = 3
GROUP_VIABLE = 1
REGION_MMAP = 4
CONFIG_REGION, MSIX_IRQ = 7, 2
IRQ_SET_EVENTFD_TRIGGER = 1 << 2 | 1 << 5  # DATA_EVENTFD | ACTION_TRIGGER

PCI_COMMAND, PCI_COMMAND_MASTER = 4, 4


def bind(address: str) -> str:
    """Gives the device to vfio-pci; returns its IOMMU group's number."""
    device = PCI_DEVICES / address
    (device / "driver_override").write_text("vfio-pci")
    if not (device / "driver").exists():
        Path("/sys/bus/pci/drivers_probe").write_text(address)
    driver = (device / "driver").resolve().name
    assert driver == "vfio-pci", f"{address} is bound to {driver}"
    return (device / "iommu_group").resolve().name


class VfioDevice:
    """One device, by default the first. `memory` is the region, `vectors` how many it has."""

    def __init__(self, address: str | None = None) -> None:
        address = address or find()[0]
        group = bind(address)
        self._container = os.open("/dev/vfio/vfio", os.O_RDWR | os.O_CLOEXEC)
        self._group = os.open(f"/dev/vfio/{group}", os.O_RDWR | os.O_CLOEXEC)
        assert fcntl.ioctl(self._container, GET_API_VERSION) == 0
        status = bytearray(struct.pack("II", 8, 0))
        fcntl.ioctl(self._group, GROUP_GET_STATUS, status)
        assert status[4] & GROUP_VIABLE, f"group {group}: not all of its devices are bound to vfio"
        fcntl.ioctl(self._group, GROUP_SET_CONTAINER, bytearray(struct.pack("i", self._container)))
        fcntl.ioctl(self._container, SET_IOMMU, TYPE1V2_IOMMU)
        # A bytearray, as from immutable bytes Python returns the buffer and drops the fd.
        self._device = fcntl.ioctl(
            self._group, GROUP_GET_DEVICE_FD, bytearray(address.encode() + b"\0")
        )

        self._registers_map = self._map(0)
        self._registers = memoryview(self._registers_map)[:256].cast("I")
        self.memory = self._map(2)
        self._eventfds = self._interrupts()
        self.vectors = len(self._eventfds)
        self._set_bus_master()

    def __enter__(self) -> "VfioDevice":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def id(self) -> int:
        return self._registers[ID]

    def ring(self, peer: int, vector: int = 0) -> None:
        self._registers[DOORBELL] = peer << 16 | vector

    def wait(self, vector: int = 0, timeout: float | None = None) -> bool:
        """Whether an interrupt came; those that came since the last wait count as one."""
        fd = self._eventfds[vector]
        if not select.select([fd], [], [], timeout)[0]:
            return False
        os.eventfd_read(fd)
        return True

    def close(self) -> None:
        self._registers.release()
        self._registers_map.close()
        self.memory.close()
        for fd in (*self._eventfds, self._device, self._group, self._container):
            os.close(fd)

    def _region(self, index: int) -> tuple[int, int, int]:
        """Flags, size, offset in the device's fd."""
        info = bytearray(struct.pack("IIIIQQ", 32, 0, index, 0, 0, 0))
        fcntl.ioctl(self._device, GET_REGION_INFO, info)
        _, flags, _, _, size, offset = struct.unpack("IIIIQQ", info)
        return flags, size, offset

    def _map(self, bar: int) -> mmap.mmap:
        flags, size, offset = self._region(bar)
        assert flags & REGION_MMAP, f"vfio does not map BAR{bar}: flags {flags:#x}"
        return mmap.mmap(self._device, max(size, mmap.PAGESIZE), offset=offset)

    def _interrupts(self) -> list[int]:
        """An eventfd for each vector, set all at once: vfio can't add to those that are enabled."""
        info = bytearray(struct.pack("IIII", 16, 0, MSIX_IRQ, 0))
        fcntl.ioctl(self._device, GET_IRQ_INFO, info)
        count = struct.unpack("IIII", info)[3]
        fds = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(count)]
        head = struct.pack("IIIII", 20 + 4 * count, IRQ_SET_EVENTFD_TRIGGER, MSIX_IRQ, 0, count)
        fcntl.ioctl(self._device, SET_IRQS, bytearray(head + struct.pack(f"{count}i", *fds)))
        return fds

    def _set_bus_master(self) -> None:
        """vfio clears the bit, and without it MSI-X reaches no CPU."""
        offset = self._region(CONFIG_REGION)[2] + PCI_COMMAND
        (command,) = struct.unpack("<H", os.pread(self._device, 2, offset))
        os.pwrite(self._device, struct.pack("<H", command | PCI_COMMAND_MASTER), offset)
