"""Internal: a kernel's vfio, of files and a function in the place of ioctl(2).

Knows: linux/vfio.h, and is as strict as the kernel. Does not know: PCI drivers, ivshmem.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from pathlib import Path
from typing import Any, NoReturn

from ..guest import vfio
from ..guest.pci import MEMORY
from ..system.uncopied import Uncopied
from .patches import Patcher

# As <linux/vfio.h> and <linux/pci.h> have them; written down once more, not taken from the package.
CALLS = {
    0x3B64: "GET_API_VERSION",
    0x3B65: "CHECK_EXTENSION",
    0x3B66: "SET_IOMMU",
    0x3B67: "GROUP_GET_STATUS",
    0x3B68: "GROUP_SET_CONTAINER",
    0x3B6A: "GROUP_GET_DEVICE_FD",
    0x3B6C: "DEVICE_GET_REGION_INFO",
    0x3B6D: "DEVICE_GET_IRQ_INFO",
    0x3B6E: "DEVICE_SET_IRQS",
}
TYPE1, TYPE1V2, NOIOMMU = 1, 3, 8
CONFIG, MSIX, REQUEST = 7, 2, 4
SPACING = 24  # bits: region n begins at n << 24 in the device's file, and has at most so much


class FakeVfio(Uncopied):
    """Takes the place of /dev/vfio and its ioctls until the patcher undoes it.

    It owns the device's file, until `close`.

    Attributes:
        calls: the names of all ioctls, in order.
        version, viable, types, remaps, rawio: what the kernel answers.
        mappable: regions that can be mapped.
        vectors, eventfds: of the device; a duplicate for each (interrupt index, number) set.
        command: the command register as it was at each SET_IRQS.
        addresses: of the devices in its groups.
        asks: whether the kernel has the interrupt that asks for the device back.
        fail: (call's name or number in the order of calls, error number) to fail with.
        busy: somebody else has the group open.
    """

    def __init__(
        self, root: Path, patcher: Patcher, *, size: int = 1 << 20, memory_first: bool = False
    ) -> None:
        self._memory_first = memory_first
        self.dev = root / "vfio"
        self.dev.mkdir(parents=True)
        (self.dev / "vfio").touch()
        self.calls: list[str] = []
        self.version, self.viable, self.remaps, self.rawio = 0, True, True, True
        self.types = {TYPE1, TYPE1V2}
        self.mappable = {0, 2}
        self.sizes = {0: 256, 1: 4096, 2: size, CONFIG: 256}
        self.vectors, self.asks, self.busy = 2, True, False
        self.fail: dict[str | int, int] = {}
        self.eventfds: dict[tuple[int, int], int] = {}
        self.command: list[int] = []
        self.addresses = {"0000:00:04.0"}
        self.file = os.memfd_create("device")
        os.truncate(self.file, (CONFIG + 2) << SPACING)
        self._containers: dict[int, int] = {}  # descriptor -> IOMMU type, 0 for none yet
        self._groups: dict[int, int] = {}  # descriptor -> container, -1 for none yet
        self._open = os.open
        patcher.setattr(vfio, "DEV", self.dev)
        patcher.setattr(vfio, "NOIOMMU", root / "enable_unsafe_noiommu_mode")
        patcher.setattr(os, "open", self.open)
        patcher.setattr(fcntl, "ioctl", self.ioctl)

    def add_group(self, number: int, *, iommu: bool = True) -> Path:
        path = self.dev / (f"{number}" if iommu else f"noiommu-{number}")
        os.close(self._open(path, os.O_CREAT | os.O_WRONLY))
        if not iommu:
            self.types = {NOIOMMU}
        return path

    def place_of(self, region: int) -> int:
        """Where a region begins in the device's file; with `memory_first` the memory is at 0."""
        if not self._memory_first:
            return region << SPACING
        return 0 if region == MEMORY else (region + 1) << SPACING

    def poke(self, region: int, at: int, data: bytes) -> None:
        os.pwrite(self.file, data, self.place_of(region) + at)

    def peek(self, region: int, at: int, count: int = 4) -> int:
        data = os.pread(self.file, count, self.place_of(region) + at)
        return int.from_bytes(data, "little")

    def interrupt(self, index: int, number: int) -> None:
        os.eventfd_write(self.eventfds[index, number], 1)

    def close(self) -> None:
        os.close(self.file)
        self._end_interrupts()

    def _end_interrupts(self) -> None:
        while self.eventfds:
            os.close(self.eventfds.popitem()[1])

    # -- system calls -----------------------------------------------------------------------------

    def open(self, path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        inside = isinstance(path, Path) and path.parent == self.dev
        if inside and path.name != "vfio":
            held = _is_open(path)
            if path.exists() and path.name.startswith("noiommu-") and not self.rawio:
                raise PermissionError(errno.EPERM, "Operation not permitted", path)
            if path.exists() and (self.busy or held):
                raise OSError(errno.EBUSY, "Device or resource busy", path)
        fd = self._open(path, flags, *args, **kwargs)
        if inside:
            assert flags == os.O_RDWR | os.O_CLOEXEC
            if path.name == "vfio":
                self._containers[fd] = 0
            else:
                self._groups[fd] = -1
        return fd

    def ioctl(self, fd: int, request: int, arg: Any = 0) -> int:
        name = CALLS[request]
        number = len(self.calls)
        self.calls.append(name)
        for key in (name, number):
            if key in self.fail:
                _refuse(self.fail[key])
        method = getattr(self, f"_{name.lower()}")
        assert isinstance(arg, (int, bytearray)), "of bytes Python hands the kernel a copy"
        result: int = method(fd, arg)
        return result

    def _get_api_version(self, fd: int, arg: int) -> int:
        assert fd in self._containers
        assert arg == 0
        return self.version

    def _check_extension(self, fd: int, arg: int) -> int:
        assert fd in self._containers
        return int(arg in self.types)

    def _set_iommu(self, fd: int, arg: int) -> int:
        if fd not in self._groups.values():
            _refuse(errno.EINVAL)
        if arg not in self.types:  # its driver is not loaded, or the mode is off
            _refuse(errno.ENODEV)
        if arg != NOIOMMU and not self.remaps:
            _refuse(errno.EPERM)
        self._containers[fd] = arg
        return 0

    def _group_get_status(self, fd: int, arg: bytearray) -> int:
        (size,) = struct.unpack_from("I", arg)
        if size < 8 or len(arg) < 8:
            _refuse(errno.EINVAL)
        flags = int(self.viable) | (2 if self._groups[fd] >= 0 else 0)
        struct.pack_into("I", arg, 4, flags)
        return 0

    def _group_set_container(self, fd: int, arg: bytearray) -> int:
        (container,) = struct.unpack("i", arg)
        if container not in self._containers or self._groups[fd] >= 0:
            _refuse(errno.EINVAL)
        self._groups[fd] = container
        return 0

    def _group_get_device_fd(self, fd: int, arg: bytearray) -> int:
        if not self.viable or self._containers.get(self._groups[fd], 0) == 0:
            _refuse(errno.EINVAL)
        if bytes(arg) not in {address.encode() + b"\0" for address in self.addresses}:
            _refuse(errno.ENODEV)
        self.poke(CONFIG, 4, b"\0\0")  # the device is reset, and may no longer master the bus
        self._end_interrupts()
        return self._open(f"/proc/self/fd/{self.file}", os.O_RDWR | os.O_CLOEXEC)

    def _device_get_region_info(self, fd: int, arg: bytearray) -> int:
        size, _, index = struct.unpack_from("III", arg)
        if size < 32 or len(arg) < 32 or index not in self.sizes:
            _refuse(errno.EINVAL)
        flags = 1 | 2 | (4 if index in self.mappable else 0)
        struct.pack_into(
            "IIIIQQ", arg, 0, 32, flags, index, 0, self.sizes[index], self.place_of(index)
        )
        return 0

    def _device_get_irq_info(self, fd: int, arg: bytearray) -> int:
        size, _, index = struct.unpack_from("III", arg)
        if size < 16 or len(arg) < 16:
            _refuse(errno.EINVAL)
        count = {MSIX: self.vectors, REQUEST: 1}.get(index, 0)
        struct.pack_into("IIII", arg, 0, 16, 1 | 8, index, count)
        return 0

    def _device_set_irqs(self, fd: int, arg: bytearray) -> int:
        size, flags, index, start, count = struct.unpack_from("IIIII", arg)
        if size != len(arg) or size != 20 + 4 * count or flags != 4 | 32 or start:
            _refuse(errno.EINVAL)
        if index == REQUEST and not self.asks:
            _refuse(errno.EINVAL)
        if count > {MSIX: self.vectors, REQUEST: 1}.get(index, 0) or (index, 0) in self.eventfds:
            _refuse(errno.EINVAL)  # the kernel cannot add vectors to those that are enabled
        self.command.append(self.peek(CONFIG, 4, 2))
        for number, eventfd in enumerate(struct.unpack_from(f"{count}i", arg, 20)):
            self.eventfds[index, number] = os.dup(eventfd)
        return 0


def _is_open(path: Path) -> bool:
    """Whether this process has the file open."""
    with os.scandir("/proc/self/fd") as fds:
        for fd in fds:
            with contextlib.suppress(OSError):  # scandir's own, which is closed by now
                if os.readlink(fd.path) == str(path):
                    return True
    return False


def _refuse(number: int) -> NoReturn:
    raise OSError(number, os.strerror(number))
