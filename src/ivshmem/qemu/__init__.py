"""What QEMU and libvirt have to be told."""

from .cmdline import doorbell, libvirt_doorbell, libvirt_plain, plain, shell

__all__ = ["doorbell", "libvirt_doorbell", "libvirt_plain", "plain", "shell"]
