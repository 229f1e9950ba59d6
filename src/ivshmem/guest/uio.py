"""Internal: UIO: registers, memory and one interrupt of a device whose kernel driver serves them.

Knows: /dev/uioN and its maps (Linux, Documentation/driver-api/uio-howto.rst).
Does not know: what the maps lead to.

The UIO drivers for ivshmem are not part of the kernel's sources.
"""

from __future__ import annotations

import errno
import os
import select
from pathlib import Path

from ..memory.pages import PAGE
from ..system import processes
from .pci import Device

DEV = Path("/dev")


# A driver of stock kernels; it serves neither the interrupts nor the memory of this device.
GENERIC = "uio_pci_generic"


def name(device: Device) -> str | None:
    """Return the UIO device ("uio0") that a driver for ivshmem made; None: there is none."""
    if device.driver == GENERIC:
        return None
    return next((path.name for path in sorted((device.path / "uio").glob("uio*"))), None)


def users_of(device: Device) -> list[int]:
    """Return the processes that have the device open through UIO, as far as we may see them."""
    files = [DEV / path.name for path in (device.path / "uio").glob("uio*")]
    return [pid for file in files for pid in processes.pids_with_open(file)]


def is_gone(fd: int) -> bool:
    """Whether the driver of an open UIO device has lost the device. Takes no interrupt."""
    poll = select.poll()
    poll.register(fd, 0)
    return bool(poll.poll(0))  # POLLERR and POLLHUP come unasked


def open_device(uio: str) -> int:
    """Open a UIO device; the descriptor is the caller's, and readable after an interrupt.

    Raises:
        OSError: as of open(2).
    """
    return os.open(DEV / uio, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)


def find_map(device: Device, uio: str, start: int) -> int:
    """Return the offset of the descriptor at which physical address `start` can be mapped.

    Raises:
        OSError: ENODEV, the driver does not map it.
    """
    for path in sorted((device.path / "uio" / uio / "maps").glob("map*")):
        first, inside = (int((path / file).read_text(), 16) for file in ("addr", "offset"))
        if first + inside == start:
            return int(path.name.removeprefix("map")) * PAGE + start % PAGE
    raise OSError(
        errno.ENODEV, f"the driver {device.driver} maps nothing at {start:#x}", str(DEV / uio)
    )
