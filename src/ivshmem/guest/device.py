"""A guest's device as an endpoint, in each of the ways that lead to one.

Knows: BAR0 and BAR2 of the ivshmem device (QEMU, docs/specs/ivshmem-spec.rst), and which way has
what. Does not know: sysfs, vfio and UIO in detail; who the other peers are, which no device tells.

Invariants:
1. A device is given back as it was found: its driver, and whatever was opened.
2. The driver is changed back only after everything of the device is unmapped and closed, also by
   forked children: until then the kernel would wait, and nothing could interrupt it.
3. Registers are accessed by single 32-bit loads and stores only.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NoReturn, TypeAlias

from .. import _fds, _memory, safe_files
from ..endpoint import Endpoint, Event, IdChanged
from ..errors import DeviceGone, NoInterrupts, NoSuchDevice, NoSuchPeer, NoSuchVector
from ..pages import PAGE
from ..protocol import MAX_ID, MAX_VECTORS
from ..region import Region
from . import pci, uio
from .vfio import Unusable, Vfio, group_path, is_held, noiommu_enabled

# Registers of BAR0, by offset.
IVPOSITION, DOORBELL, REGISTER_BYTES = 8, 12, 256

Access: TypeAlias = Literal["vfio", "noiommu", "uio", "sysfs"]
Memory: TypeAlias = Literal["vfio", "uio", "resource2", "resource2_wc"]

# What vfio, UIO and resource2 map is device memory, on which arm64 allows aligned accesses only,
# and memcpy makes others.
_UNALIGNED_IS_FINE = platform.machine() in ("x86_64", "i686")

# The file of sysfs to map the memory by, if none is chosen.
RESOURCE: Memory = "resource2" if _UNALIGNED_IS_FINE else "resource2_wc"

_VFIO = "vfio-pci"  # the driver

# How QEMU gives a guest what vfio needs.
IOMMU_HINT = (
    "give QEMU `-machine q35,kernel-irqchip=split -device intel-iommu,intremap=on`, and the"
    " guest's kernel `intel_iommu=on`"
)


def open_device(
    address: str | None = None, *, access: Access | None = None, memory: Memory | None = None
) -> GuestDevice:
    """Open the only ivshmem device of this machine, or the one at a PCI address, as an endpoint.

    Args:
        address: such as "0000:00:04.0", or "00:04.0".
        access: "vfio" (interrupts; needs an IOMMU in the guest), "noiommu" (vfio without one, where
            the kernel has that mode), "uio" (where a UIO driver for ivshmem has the device; one
            vector) or "sysfs" (no interrupts, no driver). None: the first that works here; where
            none has interrupts, `wait` says why.
        memory: how the shared memory is mapped: through "vfio" or "uio", or by sysfs's "resource2"
            (all three uncached: stores are seen by others at once and in order, bulk copies are
            slow where the host lets the guest's memory type count) or "resource2_wc" (faster bulk
            writes, which others see at the latest at the next `ring`). None: the way of access's
            own, resp. "resource2". `measure` tells which is fastest here.

    Raises:
        NoSuchDevice: there is none at `address`; or several, and no address was given.
        OSError: no permission (root has it), somebody else has it open (EBUSY), or the way asked
            for does not exist here; the message says what is missing. The device is then as before.
    """
    device = choose(address)
    if access is not None:
        return (_PLAIN_WAYS if device.variant == "plain" else _WAYS)[access](device, memory)
    return _open_best(device, memory)


def choose(address: str | None) -> pci.Device:
    """The device at an address, or the only one.

    Raises:
        NoSuchDevice: there is none, or several to choose from.
    """
    found = pci.devices()
    wanted = [d for d in found if address is None or _normal(address) == d.address]
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


def _normal(address: str) -> str:
    """An address in sysfs's form, from the short forms that lspci and people use."""
    address = address.lower()
    if address.count(":") == 1:
        address = f"0000:{address}"
    return address if "." in address else f"{address}.0"


def _open_best(device: pci.Device, memory: Memory | None) -> GuestDevice:
    if device.variant == "plain":
        # Without interrupts sysfs does as well, and leaves drivers alone; but see lockdown(7), and
        # who was given the device by vfio has it so.
        if device.iommu_group is not None and (device.driver == _VFIO or pci.locked_down()):
            return PlainVfioDevice(device, memory)
        return SysfsDevice(device, memory)
    if uio.name(device) is not None and device.driver != "uio_pci_generic":
        return UioDevice(device, memory)
    try:
        if device.iommu_group is not None:
            return VfioDevice(device, memory)
        if noiommu_enabled():
            return NoIommuDevice(device, memory)
        why = f"this guest has no IOMMU, which vfio needs: {IOMMU_HINT}"
    except Unusable as error:
        if device.driver == _VFIO:  # sysfs is no way out then
            raise
        why = f"vfio cannot be used: {error.strerror}"
    return SysfsDevice(device, memory, why=why)


class GuestDevice(Endpoint):
    """A guest's ivshmem device; made by `open`. All that an Endpoint has.

    It cannot tell who the other peers are: `ring` raises for what no peer can be, and to ring a
    peer that is not there does nothing. `events` yields interrupts, and IdChanged: the id is that
    of the virtual machine, which is what the server gives it where it is migrated to. Nothing tells
    of that, so `events` looks once a second, and `wait` does not notice.

    When the device is unplugged, waiting raises DeviceGone; the kernel waits with the removal until
    the device is closed here. (In the ways "sysfs" and "uio" nobody tells; and memory that was
    mapped by sysfs is then gone: touching it is SIGBUS.)

    Attributes:
        device: what it is, and which driver it had before.
        access: the way it was opened.
        memory: how the region is mapped.
    """

    id = -1  # until it is read
    _every = 1.0
    access: Access
    memory: Memory

    def __init__(self, device: pci.Device, memory: Memory | None) -> None:
        self.device = device
        self._pid = os.getpid()
        self._resources = contextlib.ExitStack()
        if not device.size:
            raise OSError(errno.ENXIO, NO_ROOM, device.address)
        try:
            self._open(memory)
            self.id = self._registers.load(IVPOSITION) if device.variant == "doorbell" else 0
            if self.id > MAX_ID:
                reason = "its registers cannot be read: is it being unplugged?"
                raise OSError(errno.EIO, reason, device.address)
            vectors = MAX_VECTORS if device.vectors is None else device.vectors
            self._ring_by(self._registers, DOORBELL, vectors)
        except BaseException:
            self.close()
            raise

    def _open(self, memory: Memory | None) -> None:
        """Set _registers, region and memory; and vectors, where there are any."""
        raise NotImplementedError

    # -- for the ways -----------------------------------------------------------------------------

    def _undo(self, action: Callable[[], object]) -> None:
        """Do this at the end, after what is registered later; not in a forked child."""
        # Nothing of this refers to the device, or one that is forgotten would stay until there is
        # a garbage collection.
        pid = self._pid

        def undo() -> None:
            if os.getpid() == pid:
                try:
                    try:
                        action()
                    except KeyboardInterrupt:
                        action()  # half done is worst, and done twice is as done once
                        raise
                except OSError as error:
                    if error.errno not in (errno.ENOENT, errno.ENODEV):  # the device is unplugged
                        raise

        self._resources.callback(undo)

    def _map_registers(self, fd: int, offset: int, *, mapped: bool = True) -> None:
        self._registers = _memory.Registers(fd, offset, REGISTER_BYTES, mapped=mapped)
        self._resources.callback(self._registers.close)

    def _map_memory(self, file: _fds.FdArray, offset: int, memory: Memory, name: str) -> None:
        """The region over an open file, whose descriptor it has from now on."""
        with safe_files.closed_on_error(file):
            self.region = Region(
                file[0],
                self.device.size,
                owner=file,
                offset=offset,
                source="device",
                name=name,
                page_size=PAGE,
            )
        self.memory = memory

    def _map_resource(self, memory: Memory) -> None:
        path = self.device.path / memory
        if memory not in ("resource2", "resource2_wc"):
            raise ValueError(f"{self.access} cannot map the memory by {memory!r}: {_MEMORIES}")
        with _explained(self.device, str(path)):
            file = _fds.FdArray()
            file.open(str(path), os.O_RDWR)
            self._map_memory(file, 0, memory, str(path))

    # -- Endpoint's hooks -------------------------------------------------------------------------

    def current_id(self) -> int:
        """The id that this peer has now: `id` may not have heard of a migration yet.

        Raises:
            ClosedError: the device is closed.
        """
        if self.device.variant != "doorbell":
            return self.id
        found = self._registers.load(IVPOSITION)
        return found if found <= MAX_ID else self.id  # it has none yet, or is being unplugged

    def _next_news(self) -> Event | None:
        before, self.id = self.id, self.current_id()
        return None if self.id == before else IdChanged(before, self.id)

    def _missing(self, peer: int, vector: int) -> NoReturn:
        if self.device.variant == "plain":
            raise NoInterrupts(_PLAIN)
        if not 0 <= peer <= MAX_ID:
            raise NoSuchPeer(f"peer {peer}: ids are 0 to {MAX_ID}")
        there = self.device.vectors or f"at most {MAX_VECTORS}"
        raise NoSuchVector(f"vector {vector}: the device has {there} vectors")

    def close(self) -> None:
        """Give the device back: unmap, close, restore the driver. May be called twice.

        Raises:
            BufferError: a view of the memory is alive: that stays mapped, and the device here,
                until it is gone and close() is called again.
        """
        try:
            super().close()
        except BufferError:
            raise
        except BaseException:
            self._resources.close()
            raise
        self._resources.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"id {self.id}, {self.vectors} vectors"
        device = getattr(self, "device", None)  # a constructor that failed did not come to it
        where = f" at {device.address} by {self.access}" if isinstance(device, pci.Device) else ""
        return f"<ivshmem.guest.GuestDevice{where}, {state}>"


class VfioDevice(GuestDevice):
    """By vfio: registers, memory and every vector."""

    access: Access = "vfio"
    _iommu = True

    def _open(self, memory: Memory | None) -> None:
        if not pci.load_driver(_VFIO):
            raise Unusable(errno.ENODEV, "this kernel has no vfio-pci: load or install that module")
        # Until the group is open, somebody else could take the driver away.
        with pci.locked(self.device):
            group = self._bind()
            self._vfio = Vfio(self.device.address, group, iommu=self._iommu)
        self._resources.callback(self._vfio.close)
        self._set_command(pci.COMMAND_MEMORY)
        registers = self._vfio.region(pci.REGISTERS)
        # A BAR that does not begin a page is not mapped: the page is not this device's alone.
        self._map_registers(self._vfio.device, registers.offset, mapped=registers.mappable)
        memory = memory or ("vfio" if _UNALIGNED_IS_FINE else RESOURCE)
        if memory == "vfio":
            offset = self._vfio.region(pci.MEMORY).offset
            self._map_memory(
                _fds.FdArray.copy(self._vfio.device), offset, "vfio", self.device.address
            )
        else:
            self._map_resource(memory)
        self._listen()

    def _bind(self) -> int:
        """Let vfio-pci have the device until the end; returns its group."""
        loan = _Loan(self.device)
        self._undo(loan.give_back)
        try:
            loan.restore = pci.bind(self.device, _VFIO)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            raise Unusable(
                errno.EINVAL,
                f"vfio-pci does not take the device without an IOMMU: {IOMMU_HINT}",
                self.device.address,
            ) from None
        group = pci.look(self.device.address).iommu_group
        if group is None:
            raise Unusable(errno.EINVAL, f"no IOMMU group: {IOMMU_HINT}", self.device.address)
        loan.group = group_path(group, iommu=self._iommu)
        return group

    def _set_command(self, bits: int) -> None:
        self._vfio.set_config(pci.COMMAND, self._vfio.config(pci.COMMAND) | bits)

    def _listen(self) -> None:
        if not (count := self._vfio.vectors()):
            return
        fds = []
        for _ in range(count):
            fds.append(os.eventfd(0, os.EFD_CLOEXEC))
            self._add_vector(fds[-1])
        self._vfio.listen(fds)
        # vfio has cleared the bit, and without it no interrupt reaches the processor.
        self._set_command(pci.COMMAND_MASTER)
        removal = _fds.FdArray.eventfds(1)
        self._resources.callback(removal.close)
        self._vfio.listen_for_removal(removal[0])
        self._watch(removal[0], urgent=True)
        try:
            relay = _fds.Relay(removal[0], fds)
        except OSError:  # none left, or none in this kernel: waiting takes more system calls then
            for vector in range(count):
                self.wait(vector, 0)  # half a relay that is closed rings, too
        else:
            self._listen_alone(relay)

    def _news(self) -> NoReturn:
        raise DeviceGone(f"{self.device.address}: the device was unplugged: close it")


class _Loan:
    """A device that vfio-pci has for a while."""

    def __init__(self, device: pci.Device) -> None:
        self.device = device
        self.group: Path | None = None
        self.restore: Callable[[], None] | None = None

    def give_back(self) -> None:
        """Let the former driver have it, unless somebody else has the group open now.

        That may be a forked child, or whoever was quicker: vfio-pci stays then.
        """
        if self.restore is not None:
            with pci.locked(self.device):
                if self.group is None or not is_held(self.group):
                    self.restore()


class NoIommuDevice(VfioDevice):
    """By vfio without an IOMMU, which taints the kernel, and which stock kernels do not offer."""

    access: Access = "noiommu"
    _iommu = False


class UioDevice(GuestDevice):
    """By the UIO driver that has the device: registers, memory and one vector for all."""

    access: Access = "uio"

    def _open(self, memory: Memory | None) -> None:
        if (name := uio.name(self.device)) is None:
            raise OSError(
                errno.ENODEV,
                "no UIO driver for ivshmem has the device; stock kernels have none: use vfio",
                self.device.address,
            )
        fd = uio.open_device(name)
        self._listen_uio(fd)
        registers = uio.find_map(self.device, name, pci.bar_start(self.device, pci.REGISTERS))
        self._map_registers(fd, registers)
        if memory in (None, "uio"):
            offset = uio.find_map(self.device, name, pci.bar_start(self.device, pci.MEMORY))
            self._map_memory(_fds.FdArray.copy(fd), offset, "uio", str(uio.DEV / name))
        else:
            self._map_resource(memory)


class _Deaf(GuestDevice):
    """A device without interrupts: what waits for them raises, instead of waiting for ever."""

    def _deaf(self) -> NoReturn:
        raise NoInterrupts(_PLAIN)


class SysfsDevice(_Deaf):
    """By sysfs: registers and memory, without a driver and without interrupts."""

    access: Access = "sysfs"

    def __init__(self, device: pci.Device, memory: Memory | None, *, why: str = "") -> None:
        need = "" if device.iommu_group is not None else f", which needs an IOMMU: {IOMMU_HINT}"
        self._why = why or f"by way of sysfs there are none: open it by vfio{need}"
        super().__init__(device, memory)

    def _open(self, memory: Memory | None) -> None:
        device = self.device
        if device.driver:
            # To unbind vfio-pci while somebody has the device open would wait for that somebody.
            instead = f", or as root: echo {device.address} > {device.path}/driver/unbind"
            raise OSError(
                errno.EBUSY,
                f"the driver {device.driver} has the device: open it by vfio"
                + ("" if device.driver == _VFIO else instead),
                device.address,
            )
        with _explained(device, str(device.path)):
            with pci.locked(device):
                pci.enable(device, True)
                self._undo(lambda: pci.enable(device, False))
            # The kernel counts who enabled the device, and acts on the first only.
            if not pci.command(device) & pci.COMMAND_MEMORY:
                pci.set_command(device, pci.COMMAND_MEMORY)
            path = device.path / "resource0"
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                # sysfs maps the page that the BAR is in.
                self._map_registers(fd, pci.bar_start(device, pci.REGISTERS) % PAGE)
            finally:
                os.close(fd)
        self._map_resource(memory or RESOURCE)

    def _deaf(self) -> NoReturn:
        if self.device.variant == "plain":
            super()._deaf()
        raise NoInterrupts(f"no interrupts here: {self._why}")


class PlainVfioDevice(_Deaf, VfioDevice):
    """A plain device by vfio: memory only."""


class PlainNoIommuDevice(_Deaf, NoIommuDevice):
    """A plain device by vfio without an IOMMU: memory only."""


_WAYS: dict[Access, type[GuestDevice]] = {
    "vfio": VfioDevice,
    "noiommu": NoIommuDevice,
    "uio": UioDevice,
    "sysfs": SysfsDevice,
}
_PLAIN_WAYS: dict[Access, type[GuestDevice]] = {
    **_WAYS,
    "vfio": PlainVfioDevice,
    "noiommu": PlainNoIommuDevice,
}

_MEMORIES = "resource2 and resource2_wc are for all ways, vfio and uio for their own"

NO_ROOM = (
    "the kernel found no room for its memory: plug it in before the guest boots, or give its port"
    " room (-device pcie-root-port,..,pref64-reserve=2G)"
)

_PLAIN = (
    "a plain device has no doorbells and no interrupts: give the guest ivshmem-doorbell, with a"
    " server (`ivshmem serve` on the host)"
)


@contextlib.contextmanager
def _explained(device: pci.Device, path: str) -> Iterator[None]:
    """Say of what sysfs refuses why, and what mends it."""
    try:
        yield
    except PermissionError as error:
        if mode := pci.locked_down():
            reason = (
                f"the kernel is locked down ({mode}), which forbids this to root, too: use vfio, or"
                " boot without Secure Boot and lockdown="
            )
        elif os.geteuid():
            reason = "only root may: run as root"
        else:
            reason = f"{error.strerror}: not allowed to root either, perhaps by kernel lockdown"
        raise OSError(error.errno, reason, error.filename or path) from None
    except OSError as error:
        if error.errno == errno.EINVAL and error.filename is None:
            now = pci.look(device.address).driver or "a driver"
            reason = f"{now} has claimed it: unbind that, or choose another way to map the memory"
            raise OSError(error.errno, reason, path) from None
        if error.filename is None:
            raise OSError(error.errno, error.strerror, path) from None
        raise
