"""What QEMU and libvirt have to be told."""

from .cmdline import (
    check_ident,
    doorbell,
    ident_of,
    iommu,
    libvirt_doorbell,
    libvirt_iommu,
    libvirt_plain,
    plain,
    shell,
    shell_lines,
    slot_of,
)

__all__ = [
    "check_ident",
    "doorbell",
    "ident_of",
    "iommu",
    "libvirt_doorbell",
    "libvirt_iommu",
    "libvirt_plain",
    "plain",
    "shell",
    "shell_lines",
    "slot_of",
]
