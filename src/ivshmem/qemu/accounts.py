"""The users and the group that QEMU has under libvirt, by distribution."""

from __future__ import annotations

# The users as whom libvirt runs QEMU: Debian's, Fedora's. Both are in the group kvm.
LIBVIRT_USERS = ("libvirt-qemu", "qemu")
LIBVIRT_GROUP = "kvm"
