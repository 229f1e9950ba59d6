"""Internal: vfio: a PCI device's registers, memory and interrupts for a program (linux/vfio.h).

Knows: the ioctls and their structures, with an IOMMU and without. Does not know: ivshmem.

Invariants:
1. The device is not touched before its group is viable and its container has an IOMMU.
2. All vectors are set in one SET_IRQS: vfio cannot add vectors to those that are enabled (EINVAL).
3. A process opens a group once, for all devices in it, and closes it with the last device. A forked
   child opens groups of its own, and closes its copies of the parent's.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import GroupHeld, VfioUnusable
from ..native import descriptors
from ..system.uncopied import Uncopied

DEV = Path("/dev/vfio")
NOIOMMU = Path("/sys/module/vfio/parameters/enable_unsafe_noiommu_mode")
ENABLE_NOIOMMU = f"echo Y > {NOIOMMU}"
UNSAFE_INTERRUPTS = "echo Y > /sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts"

# ioctl numbers: _IO(';', 100 + n)
_GET_API_VERSION, _CHECK_EXTENSION, _SET_IOMMU, _GROUP_GET_STATUS = range(0x3B64, 0x3B68)
_GROUP_SET_CONTAINER = 0x3B68
_GROUP_GET_DEVICE_FD = 0x3B6A
_GET_REGION_INFO, _GET_IRQ_INFO, _SET_IRQS = range(0x3B6C, 0x3B6F)

_TYPE1, _TYPE1V2, _NO_IOMMU = 1, 3, 8
_GROUP_VIABLE = 1
_REGION_MMAP = 4
_IRQ_MSIX, _IRQ_REQUEST = 2, 4
_DATA_EVENTFD, _ACTION_TRIGGER = 4, 32

CONFIG = 7  # the region that is the configuration space; 0 to 5 are the BARs

_NOIOMMU_PREFIX = "noiommu-"
_NO_RAWIO = (
    "vfio without an IOMMU is for processes with CAP_SYS_RAWIO: run as root, and let the container"
    " or service keep that capability (docker run --cap-add SYS_RAWIO)"
)


def _to_be_permitted(path: Path) -> str:
    """Say what allows a user to open a file of vfio's."""
    if path.name.startswith(_NOIOMMU_PREFIX):
        return _NO_RAWIO
    return f"only its owner may open it: run as root, or let root do `chown USER {path}`"


def _call(path: Path, fd: int, request: int, argument: int | bytearray = 0) -> int:
    """Call ioctl(2); an error says that vfio refused it, and for which group."""
    try:
        return fcntl.ioctl(fd, request, argument)
    except OSError as error:
        raise OSError(error.errno, f"vfio refuses: {error.strerror}", str(path)) from None


class VfioRegion(NamedTuple):
    """Where a part of the device is in the device's descriptor; in bytes."""

    offset: int
    size: int
    mappable: bool


class _IommuGroup(Uncopied):
    """An IOMMU group that this process has open, with a container of its own.

    Attributes:
        fd: the descriptor.
        devices: the addresses of its devices that are open.
        afterwards: what the caller does after it closed the last device.
    """

    def __init__(self, path: Path, iommu: bool) -> None:
        self.path = path
        self.devices: set[str] = set()
        self.afterwards: list[Callable[[], object]] = []
        self._fds = descriptors.FdArray()
        try:
            container = self._open(DEV / "vfio")
            self.fd = self._open(path)
            self._attach(container, iommu)
        except BaseException:
            self._fds.close()
            raise

    def close(self) -> None:
        """Close the group. It cannot be used after that; the next call makes another one."""
        self._fds.close()
        for key in [key for key, group in _groups.items() if group is self]:
            del _groups[key]

    def _open(self, path: Path) -> int:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            if error.errno == errno.EBUSY:
                reason = "another process has the device open"
                raise GroupHeld(errno.EBUSY, reason, str(path)) from None
            if error.errno in (errno.ENOENT, errno.ENODEV):
                reason = (
                    "no such vfio device in this kernel: as root, `modprobe vfio-pci`; a container"
                    f" must be given {DEV}, too"
                )
                raise VfioUnusable(errno.ENODEV, reason, str(path)) from None
            if error.errno == errno.EPERM and path.name.startswith(_NOIOMMU_PREFIX):
                raise VfioUnusable(errno.EPERM, _NO_RAWIO, str(path)) from None
            if error.errno == errno.EACCES:
                raise OSError(errno.EACCES, _to_be_permitted(path), str(path)) from None
            raise
        self._fds.take(fd)
        return fd

    def _attach(self, container: int, iommu: bool) -> None:
        if (version := _call(self.path, container, _GET_API_VERSION)) != 0:
            raise VfioUnusable(
                errno.ENOTSUP, f"vfio has API version {version}, not 0", str(self.path)
            )
        status = bytearray(struct.pack("II", 8, 0))
        _call(self.path, self.fd, _GROUP_GET_STATUS, status)
        if not struct.unpack("II", status)[1] & _GROUP_VIABLE:
            raise VfioUnusable(
                errno.EPERM,
                "other devices of its IOMMU group have drivers: unbind those, or plug the device"
                " into a port of its own (-device pcie-root-port)",
                str(self.path),
            )
        try:
            number = bytearray(struct.pack("i", container))
            _call(self.path, self.fd, _GROUP_SET_CONTAINER, number)
            _call(self.path, container, _SET_IOMMU, self._kind(container, iommu))
        except PermissionError:
            raise VfioUnusable(
                errno.EPERM,
                "the IOMMU does not remap interrupts: give QEMU `-device intel-iommu,intremap=on`"
                " and kernel-irqchip=split, or allow interrupts without remapping"
                f" (`{UNSAFE_INTERRUPTS}`)"
                if iommu
                else _NO_RAWIO,
                str(self.path),
            ) from None
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise
            raise VfioUnusable(
                error.errno,
                "vfio has no driver for its IOMMU: modprobe vfio_iommu_type1"
                if iommu
                else f"vfio's no-IOMMU mode is off: as root, `{ENABLE_NOIOMMU}`",
                str(self.path),
            ) from None

    def _kind(self, container: int, iommu: bool) -> int:
        if not iommu:
            return _NO_IOMMU
        return _TYPE1V2 if _call(self.path, container, _CHECK_EXTENSION, _TYPE1V2) else _TYPE1


# The groups that this process has open. A forked child finds no groups of its own here, and a lock
# that none of its threads holds. The lock is reentrant, because garbage collection closes, too.
_groups: weakref.WeakValueDictionary[tuple[int, Path], _IommuGroup] = weakref.WeakValueDictionary()
_locks: dict[int, contextlib.AbstractContextManager[bool]] = {}


def _locked() -> contextlib.AbstractContextManager[bool]:
    return _locks.setdefault(os.getpid(), threading.RLock())


class Vfio(Uncopied):
    """One device, opened through its group, which one process at a time can have open.

    Attributes:
        device: the descriptor.
        group: the IOMMU group, which all its open devices share.

    Raises:
        VfioUnusable: vfio cannot be used with this device here; the message says what is missing.
        GroupHeld: another process has the group open (EBUSY).
        OSError: EBUSY, this process has the device open; EACCES. Nothing is left open.
    """

    def __init__(self, address: str, group: int, *, iommu: bool = True) -> None:
        self._fds = descriptors.FdArray()
        self._address = address
        self._open = False
        self.path = group_path(group, iommu=iommu)
        with _locked():
            key = os.getpid(), self.path
            if (shared := _groups.get(key)) is None:
                shared = _IommuGroup(self.path, iommu)
                _groups[key] = shared
            elif address in shared.devices:
                raise OSError(errno.EBUSY, "this process has the device open already", address)
            self.group = shared
            try:
                # A bytearray: of immutable bytes fcntl makes a copy, and returns that instead.
                name = bytearray(address.encode() + b"\0")
                self.device = _call(self.path, shared.fd, _GROUP_GET_DEVICE_FD, name)
                self._fds.take(self.device)
                shared.devices.add(address)
            except BaseException:
                self._release()
                raise
            self._open = True

    def close(self) -> None:
        """Close the device; its interrupts end. May be called twice."""
        with _locked():
            if self._open:
                self._open = False
                self._release()

    def _release(self) -> None:
        self._fds.close()
        self.group.devices.discard(self._address)
        if not self.group.devices:
            self.group.close()

    def region(self, index: int) -> VfioRegion:
        """Return where BAR `index`, or CONFIG, is in `device`."""
        info = bytearray(struct.pack("IIIIQQ", 32, 0, index, 0, 0, 0))
        _call(self.path, self.device, _GET_REGION_INFO, info)
        _, flags, _, _, size, offset = struct.unpack("IIIIQQ", info)
        return VfioRegion(offset, size, bool(flags & _REGION_MMAP))

    def config(self, at: int) -> int:
        """Return 16 bits of the configuration space."""
        data = os.pread(self.device, 2, self.region(CONFIG).offset + at)
        return int.from_bytes(data, "little")

    def set_config(self, at: int, value: int) -> None:
        """Set 16 bits of the configuration space."""
        os.pwrite(self.device, value.to_bytes(2, "little"), self.region(CONFIG).offset + at)

    def vectors(self) -> int:
        """Return how many MSI-X vectors the device has."""
        info = bytearray(struct.pack("IIII", 16, 0, _IRQ_MSIX, 0))
        _call(self.path, self.device, _GET_IRQ_INFO, info)
        count: int = struct.unpack("IIII", info)[3]
        return count

    def listen(self, eventfds: Sequence[int]) -> None:
        """Make the kernel count the interrupts of vector n in eventfds[n], for all vectors."""
        self._set_eventfds(_IRQ_MSIX, eventfds)

    def listen_for_removal(self, eventfd: int) -> None:
        """Make the kernel signal `eventfd` when the device is being unplugged.

        The kernel then waits until the device is closed and nothing of it is mapped.
        """
        with contextlib.suppress(OSError):  # EINVAL: this kernel does not signal it
            self._set_eventfds(_IRQ_REQUEST, [eventfd])

    def _set_eventfds(self, index: int, fds: Sequence[int]) -> None:
        size = 20 + 4 * len(fds)
        head = struct.pack("IIIII", size, _DATA_EVENTFD | _ACTION_TRIGGER, index, 0, len(fds))
        data = bytearray(head + struct.pack(f"{len(fds)}i", *fds))
        _call(self.path, self.device, _SET_IRQS, data)


def group_path(group: int, *, iommu: bool = True) -> Path:
    """Return the path of an IOMMU group."""
    return DEV / (f"{group}" if iommu else f"{_NOIOMMU_PREFIX}{group}")


def is_held(path: Path) -> bool:
    """Whether a process has a group open: a forked child of this one, for instance.

    If that cannot be found out (EMFILE), the answer is yes.
    """
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return error.errno not in (errno.ENOENT, errno.ENODEV)
    return False


def has_noiommu() -> bool:
    """Whether the kernel's vfio is loaded and can open devices without an IOMMU."""
    return NOIOMMU.exists()


def noiommu_enabled() -> bool:
    """Whether this kernel opens devices without an IOMMU (an unsafe mode, off by default)."""
    try:
        return NOIOMMU.read_text().strip() in ("Y", "1")
    except OSError:
        return False
