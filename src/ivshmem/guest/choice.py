"""Internal: which device of a guest is opened, and in which way, if the user does not say.

Knows: the order of the ways, and what is missing where none has interrupts.
Does not know: how a device is opened (device.py).
"""

from __future__ import annotations

from ..errors import NoSuchDevice, VfioUnusable
from . import pci, uio, vfio
from .device import (
    PLAIN_WAYS,
    VFIO_PCI,
    WAYS,
    Access,
    GuestDevice,
    Memory,
    SysfsDevice,
    no_iommu,
)


def open_device(
    address: str | None = None, *, access: Access | None = None, memory: Memory | None = None
) -> GuestDevice:
    """Open the only ivshmem device of this machine, or the one at a PCI address, as an endpoint.

    Args:
        address: such as "0000:00:04.0", or "00:04.0".
        access: "vfio" (has interrupts; needs an IOMMU in the guest), "noiommu" (vfio without an
            IOMMU, if the kernel has that mode), "uio" (if a UIO driver for ivshmem has the device;
            one vector) or "sysfs" (no interrupts, no driver). None: "uio" if such a driver has the
            device; else "vfio" or "noiommu" if they are there; else "sysfs". A plain device, which
            has no interrupts, is opened by "sysfs" before these two, except under lockdown or if
            vfio has it. If there are no interrupts, `wait` raises NoInterrupts, which says why.
        memory: how the shared memory is mapped. Through "vfio" or "uio", or by sysfs's "resource2":
            these are uncached, so that peers see stores at once and in order; bulk copies are slow
            if the host applies the guest's memory type. Or by "resource2_wc": bulk writes are
            faster, and peers see them at the latest at the next `ring`. None: the way that `access`
            has, or else "resource2". `measure` tells which is the fastest here.

    Returns:
        The device; close it, or use it in a `with` statement, to give it back.

    Raises:
        NoSuchDevice: there is none at `address`; or there are several, and no address was given.
        OSError: no permission (root has it), a process uses the device already (EBUSY), or this way
            does not exist here; the message says what is missing. The device is as it was before.

    One process at a time can open the devices of one IOMMU group (several devices on one
    pcie-to-pci-bridge, for instance).
    """
    device = choose(address)
    if access is not None:
        return (PLAIN_WAYS if device.variant == "plain" else WAYS)[access](device, memory)
    return _open_best(device, memory)


def choose(address: str | None) -> pci.Device:
    """Return the device at an address, or the only one.

    Raises:
        NoSuchDevice: there is none, or several to choose from.
    """
    found = pci.devices()
    wanted = [d for d in found if address is None or full_address(address) == d.address]
    if len(wanted) == 1:
        return wanted[0]
    there = ", ".join(d.address for d in found)
    if not found:
        raise NoSuchDevice(
            "no ivshmem device in this machine: give QEMU the arguments that `ivshmem qemu` prints"
            " on the host"
        )
    if address is None:
        raise NoSuchDevice(f"there are several ivshmem devices, name one: {there}")
    raise NoSuchDevice(f"no ivshmem device at {address}; there is {there}")


def full_address(address: str) -> str:
    """Return an address in sysfs's form, from a short form as lspci prints it."""
    address = address.lower()
    if address.count(":") == 1:
        address = f"0000:{address}"
    return address if "." in address else f"{address}.0"


def best_way(device: pci.Device) -> Access:
    """Return the way that `open` tries first, if none is chosen."""
    if uio.name(device) is not None:
        return "uio"
    # For a device without interrupts sysfs does as well, and changes no driver. But lockdown(7)
    # forbids it, and a user who was given the device by vfio can use it only by vfio.
    plain = device.variant == "plain" and device.driver != VFIO_PCI
    if device.iommu_group is not None:
        return "sysfs" if plain and not pci.locked_down() else "vfio"
    if device.noiommu_group is not None or (vfio.noiommu_enabled() and not plain):
        return "noiommu"
    return "sysfs"


def _open_best(device: pci.Device, memory: Memory | None) -> GuestDevice:
    way = best_way(device)
    if device.variant == "plain":
        return PLAIN_WAYS[way](device, memory)
    if way == "sysfs":
        return SysfsDevice(device, memory, why=no_iommu(vfio.has_noiommu()))
    try:
        return WAYS[way](device, memory)
    except VfioUnusable as error:
        if device.driver == VFIO_PCI:  # then sysfs cannot open it either
            raise
        why = f"vfio cannot be used: {error.strerror}"
    return SysfsDevice(device, memory, why=why)
