"""User data for cloud-init, which brings the guest kit into a new guest and sets it up.

Knows: cloud-config (https://cloudinit.readthedocs.io), and which file of `guest bundle` it takes.
Does not know: what `guest setup` does.

The kit comes by the disk image: user data is limited on many platforms (16 KiB, for instance), and
the bundle has a MiB. A guest that runs under QEMU on a host with this package can have the image.
It is a virtio disk: the kernel of Debian's cloud images has no driver for the CD drive of a q35.
"""

from __future__ import annotations

from ..text import command
from .guest_bundle import LABEL, PROGRAM

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_PLACE = "/run/ivshmem-kit"
_GRUB = "/etc/default/grub.d/ivshmem.cfg"


def user_data(setup: Sequence[str], *, iommu: bool) -> str:
    """The text of a cloud-config.

    Args:
        setup: more words for `ivshmem guest setup`.
        iommu: let the guest's kernel use an IOMMU, which takes a reboot.
    """
    printed = "`ivshmem qemu --iommu`" if iommu else "`ivshmem qemu`"
    words = ["guest", "setup", "--yes", *(("--access", "vfio") if iommu else ()), *setup]
    text = f"""#cloud-config
# What gives this guest the kit, on the host:
#   ivshmem guest bundle -o ivshmem.iso
# and these arguments of QEMU, beside those of {printed}:
#   -drive file=ivshmem.iso,if=virtio,readonly=on,format=raw
runcmd:
  - mkdir -p {_PLACE}
  - mount -o ro LABEL={LABEL} {_PLACE}
  - python3 {_PLACE}/{PROGRAM} {command(words)}
  - umount {_PLACE}
"""
    if iommu:
        text += f"""  - update-grub
write_files:
  - path: {_GRUB}
    content: |
      GRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX intel_iommu=on"
power_state:
  mode: reboot
  message: for the IOMMU
"""
    return text
