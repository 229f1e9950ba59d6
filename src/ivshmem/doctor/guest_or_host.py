"""Whether this machine is better looked at as a guest or as a host."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ..guest import pci

DMI_VENDOR = Path("/sys/class/dmi/id/sys_vendor")


def is_guest(socket: str, qemu: str) -> bool:
    """A machine with an ivshmem device is a guest; so is one of QEMU's with nothing to host guests.

    Args:
        socket: where a server would listen.
        qemu: the program that would run guests.
    """
    if pci.devices():
        return True
    if os.path.lexists(socket) or shutil.which(qemu):
        return False
    try:
        return DMI_VENDOR.read_text().strip() == "QEMU"
    except OSError:
        return False
