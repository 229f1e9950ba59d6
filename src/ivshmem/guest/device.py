"""Internal: a guest's device as an endpoint, in each of the ways that lead to one.

Knows: BAR0 and BAR2 of the ivshmem device (QEMU, docs/specs/ivshmem-spec.rst), and which way has
which parts. Does not know: sysfs, vfio and UIO in detail; the other peers, which no device tells.

Invariants:
1. A device is given back as it was found: with its driver, and with everything closed.
2. The driver is changed back only after everything of the device is unmapped and closed, by forked
   children too. Before that the kernel would wait, and nothing could interrupt it. If this process
   has several devices of one IOMMU group open, all get their drivers back with the last one.
3. Registers are accessed only by single 32-bit loads and stores.
4. A changed id is believed only if the device still decodes memory. After the device was unplugged,
   or its driver released it, registers read as 0, which is a valid id.
5. No driver is taken from a process that uses it.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from typing import Literal, NoReturn, TypeAlias, TypeVar

from ..errors import (
    DeviceGone,
    GroupHeld,
    NoInterrupts,
    NoSuchPeer,
    NoSuchVector,
    VfioUnusable,
)
from ..memory.pages import PAGE
from ..memory.region import Region
from ..native import descriptors
from ..native import mapping as _memory
from ..peer.endpoint import Endpoint, Event, IdChanged
from ..protocol.limits import MAX_ID, MAX_VECTORS
from ..system import processes, safe_files
from ..text import counted
from . import pci, uio, vfio
from .vfio import Vfio

_D = TypeVar("_D", bound="GuestDevice")  # typing.Self comes with Python 3.11

# Registers of BAR0, by offset.
IVPOSITION, DOORBELL, REGISTER_BYTES = 8, 12, 256

Access: TypeAlias = Literal["vfio", "noiommu", "uio", "sysfs"]
Memory: TypeAlias = Literal["vfio", "uio", "resource2", "resource2_wc"]

# vfio, UIO and resource2 map device memory. On it arm64 allows only aligned accesses, and memcpy
# makes others.
_UNALIGNED_IS_FINE = os.uname().machine in ("x86_64", "i686")

# The file of sysfs that maps the memory by default.
RESOURCE: Memory = "resource2" if _UNALIGNED_IS_FINE else "resource2_wc"

VFIO_PCI = "vfio-pci"  # the driver

# The options of QEMU and of the kernel that give a guest what vfio needs.
IOMMU_HINT = (
    "give QEMU `-machine q35,kernel-irqchip=split -device intel-iommu,intremap=on`, and the"
    " guest's kernel `intel_iommu=on`"
)


def no_iommu(switched_off: bool) -> str:
    """Say what a guest without an IOMMU lacks; `switched_off`: its kernel could work without."""
    text = f"this guest has no IOMMU, which vfio needs: {IOMMU_HINT}"
    if not switched_off:
        return text
    return f"{text}; or let vfio work without one, which taints the kernel: `{vfio.ENABLE_NOIOMMU}`"


def _advice(device: pci.Device) -> str:
    """Say how else a device can be opened, if sysfs cannot open it or gives only the memory."""
    if device.iommu_group is not None:
        return "open it by vfio"
    if device.noiommu_group is not None or vfio.noiommu_enabled():
        return "open it by noiommu"
    return "open it by uio" if uio.name(device) is not None else ""


class GuestDevice(Endpoint):
    """A guest's ivshmem device as an endpoint; made by `open`.

    It does not know the other peers. `ring` raises only for ids and vectors that no peer can have;
    to ring a peer that does not exist has no effect. `events` yields interrupts and IdChanged: the
    id belongs to the virtual machine, and after a migration it is the one that the other server
    gives. No descriptor tells of a changed id, so `events` looks once a second; `wait` does not
    notice it.

    When the device is unplugged, waiting raises DeviceGone, and so does current_id(). By vfio the
    kernel delays the removal until the device is closed here. By UIO it does not: the memory then
    reads as 0. By "sysfs" nothing tells of it, and an access to the memory is a SIGBUS.

    `close` gives the device back. It waits at most 5 seconds if another process changes the
    device's driver at that moment. Ctrl-C ends that wait, after the device was given back.

    Attributes:
        device: what it is, and which driver it had before.
        access: the way it was opened.
        memory: how the region is mapped.
    """

    id = -1  # until it is read
    _poll_seconds = 1.0
    access: Access
    memory: Memory

    def __new__(cls: type[_D], *_: object, **__: object) -> _D:
        if cls is GuestDevice:
            raise TypeError("a GuestDevice is made by ivshmem.guest.open")
        return super().__new__(cls)

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
        """Call `action` at the end, after those registered later; not in a forked child."""
        # Nothing here refers to the device: a device that the program forgot would otherwise stay
        # until a garbage collection.
        pid = self._pid

        def undo() -> None:
            if os.getpid() == pid:
                try:
                    try:
                        action()
                    except KeyboardInterrupt:
                        # Idempotent, so repeat it: a half-finished undo would leave the device
                        # without a driver.
                        action()
                        raise
                except OSError as error:
                    if error.errno not in (errno.ENOENT, errno.ENODEV):  # the device is unplugged
                        raise

        self._resources.callback(undo)

    def _map_registers(self, fd: int, offset: int, *, mapped: bool = True) -> None:
        self._registers = _memory.Registers(fd, offset, REGISTER_BYTES, mapped=mapped)
        self._resources.callback(self._registers.close)

    def _map_memory(
        self, file: descriptors.FdArray, offset: int, memory: Memory, name: str
    ) -> None:
        """Make the region over an open file; it owns the descriptor from now on."""
        with safe_files.closed_on_error(file):
            self.region = Region._over(
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
            file = descriptors.FdArray()
            file.open(str(path), os.O_RDWR)
            self._map_memory(file, 0, memory, str(path))

    # -- Endpoint's hooks -------------------------------------------------------------------------

    def current_id(self) -> int:
        """Return the id that this peer has now; `id` changes only when IdChanged is taken.

        Raises:
            ClosedError: the device is closed.
            DeviceGone: it was unplugged, or another process has its driver now.
        """
        if self.device.variant != "doorbell":
            return self.id
        found = self._registers.load(IVPOSITION)
        if found == self.id or found > MAX_ID:  # it has none yet, or is being unplugged
            return self.id
        return found if self._decodes() else self.id

    def _decodes(self) -> bool:
        """Whether the device decodes memory; if not, reads of registers return anything.

        Raises:
            DeviceGone: it never will again.
        """
        decodes: bool | None = None
        with pci.unless_unplugged():
            decodes = bool(pci.command(self.device) & pci.COMMAND_MEMORY)
        return self._gone() if decodes is None else decodes

    def _gone(self) -> NoReturn:
        raise DeviceGone(f"{self.device.address}: the device was unplugged: close it")

    def _next_peer_event(self) -> Event | None:
        before, self.id = self.id, self.current_id()
        return None if self.id == before else IdChanged(before, self.id)

    def _look_for(self, peer: int, vector: int) -> NoReturn:
        if self.device.variant == "plain":
            raise NoInterrupts(_PLAIN)
        if not 0 <= peer <= MAX_ID:
            raise NoSuchPeer(f"peer {peer}: ids are 0 to {MAX_ID}")
        there = counted(self.device.vectors or MAX_VECTORS, "vector")
        most = "" if self.device.vectors else "at most "
        raise NoSuchVector(f"vector {vector}: the device has {most}{there}")

    def close(self) -> None:
        """Give the device back: unmap, close, restore the driver. May be called twice.

        This can take seconds; see GuestDevice.

        Raises:
            BufferError: a view of the memory is alive. The memory stays mapped, and the device is
                kept, until the view is released and close() is called again.
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
        state = "closed" if self.closed else f"id {self.id}, {counted(self.vectors, 'vector')}"
        device = getattr(self, "device", None)  # a constructor that failed did not come to it
        where = f" at {device.address} by {self.access}" if isinstance(device, pci.Device) else ""
        return f"<ivshmem.guest.GuestDevice{where}, {state}>"


class VfioDevice(GuestDevice):
    """By vfio: registers, memory and every vector."""

    access: Access = "vfio"
    _iommu = True

    def _open(self, memory: Memory | None) -> None:
        if not pci.load_driver(VFIO_PCI):
            raise VfioUnusable(
                errno.ENODEV, "this kernel has no vfio-pci: load or install that module"
            )
        self._check()
        loan = _Borrowed(self.device)
        self._undo(loan.give_back)
        # Until the group is open, another process could take the driver away.
        with pci.locked(self.device):
            group = self._bind(loan)
            try:
                self._vfio = loan.vfio = Vfio(self.device.address, group, iommu=self._iommu)
            except BaseException as error:
                loan.restore()
                if isinstance(error, GroupHeld):
                    raise self._held(error) from None
                raise
        self._resources.callback(self._vfio.close)
        self._set_command(pci.COMMAND_MEMORY)
        registers = self._vfio.region(pci.REGISTERS)
        # A BAR that does not begin a page is not mapped: the page is not this device's alone.
        self._map_registers(self._vfio.device, registers.offset, mapped=registers.mappable)
        memory = memory or ("vfio" if _UNALIGNED_IS_FINE else RESOURCE)
        if memory == "vfio":
            offset = self._vfio.region(pci.MEMORY).offset
            self._map_memory(
                descriptors.FdArray.copy(self._vfio.device), offset, "vfio", self.device.address
            )
        else:
            self._map_resource(memory)
        self._listen()

    def _check(self) -> None:
        """Raise VfioUnusable before anything is changed, if vfio cannot have the device."""
        if self.device.iommu_group is None:
            raise VfioUnusable(errno.EINVAL, no_iommu(vfio.has_noiommu()), self.device.address)

    def _bind(self, loan: _Borrowed) -> int:
        """Give vfio-pci the device until the end; return its group."""
        device = self.device
        if users := uio.users_of(device):
            reason = (
                f"{processes.described(users)} uses it through UIO: stop that, or open it by uio"
            )
            raise OSError(errno.EBUSY, reason, device.address)
        try:
            with _explained(device, str(device.path / "driver_override"), mapping=False):
                loan.restore = pci.bind(device, VFIO_PCI)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            raise VfioUnusable(errno.EINVAL, error.strerror, error.filename) from None
        now = pci.look(device.address)
        group = now.iommu_group if self._iommu else now.noiommu_group
        if group is None:
            loan.restore()
            raise VfioUnusable(errno.EINVAL, "vfio-pci has made no group for it", device.address)
        return group

    def _held(self, error: GroupHeld) -> OSError:
        """Say which process has the group open, and what can be done."""
        who = processes.described(processes.pids_with_open(error.filename))
        mates = [a for a, driver in pci.group_mates(self.device).items() if driver == VFIO_PCI]
        if not mates:
            reason = (
                f"another process has the device open ({who}): stop it, or let it be `ivshmem"
                " guest serve`, to which many can connect"
            )
        else:
            reason = (
                f"another process ({who}) has IOMMU group {self.device.iommu_group} open, in which"
                f" {' and '.join(mates)} is, too: open both in one process, or give each device a"
                " port of its own (-device pcie-root-port,id=port1,chassis=1, and bus=port1)"
            )
        return OSError(errno.EBUSY, reason, error.filename)

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
        removal = descriptors.FdArray.eventfds(1)
        self._resources.callback(removal.close)
        self._vfio.listen_for_removal(removal[0])
        self._watch_news(removal[0], urgent=True)
        try:
            relay = descriptors.Relay(removal[0], fds)
        except OSError:  # none left, or none in this kernel: waiting takes more system calls then
            for vector in range(count):
                self.wait(vector, 0)  # half a relay that is closed rings, too
        else:
            self._listen_alone(relay)

    def _read_news(self) -> NoReturn:  # the only news that vfio has: the device is unplugged
        self._gone()

    def _decodes(self) -> bool:
        return bool(self._vfio.config(pci.COMMAND) & pci.COMMAND_MEMORY)


class _Borrowed:
    """A device that vfio-pci has until it is given back."""

    def __init__(self, device: pci.Device) -> None:
        self.device = device
        self.vfio: Vfio | None = None
        self.restore: Callable[[], None] = lambda: None

    def give_back(self) -> None:
        """Give the device to its former driver, unless another process has the group open now.

        That may be a forked child, or a process that was quicker: then vfio-pci keeps the device.
        While this process has other devices of the group open, it cannot tell; closing the last one
        gives all of them back. Can be repeated, if it was interrupted.
        """
        if self.vfio is None:  # it was never open
            return
        group = self.vfio.group
        if self._restore not in group.afterwards:
            group.afterwards.append(self._restore)
        while group.afterwards and not group.devices:
            group.afterwards[-1]()
            group.afterwards.pop()

    def _restore(self) -> None:
        assert self.vfio is not None
        with pci.locked(self.device), pci.unless_unplugged():
            if not vfio.is_held(self.vfio.path):
                self.restore()


class NoIommuDevice(VfioDevice):
    """By vfio without an IOMMU; this taints the kernel, and stock kernels do not offer it."""

    access: Access = "noiommu"
    _iommu = False

    def _check(self) -> None:
        device = self.device
        if device.iommu_group is not None:
            reason = "it is behind an IOMMU: open it by vfio"
        elif device.noiommu_group is not None or vfio.noiommu_enabled():
            return
        elif vfio.has_noiommu():
            reason = (
                "vfio's no-IOMMU mode is off; it lets the device write to all memory, and taints"
                f" the kernel: as root, `{vfio.ENABLE_NOIOMMU}`"
            )
        else:
            reason = f"this kernel's vfio has no no-IOMMU mode; {no_iommu(False)}"
        raise VfioUnusable(errno.EINVAL, reason, device.address)


class UioDevice(GuestDevice):
    """By the UIO driver that has the device: registers, memory and one vector for all."""

    access: Access = "uio"

    def _open(self, memory: Memory | None) -> None:
        if (name := uio.name(self.device)) is None:
            use = _advice(self.device)
            raise OSError(
                errno.ENODEV,
                f"no UIO driver for ivshmem has the device{f': {use}' if use else ''}",
                self.device.address,
            )
        # Under the lock no other process of this package takes the device from its driver.
        with pci.locked(self.device), _explained_uio(name):
            fd = self._uio = uio.open_device(name)
        if self.device.variant == "doorbell":
            self._listen_uio(fd)
        else:
            self._resources.callback(os.close, fd)
        start = pci.bar_start(self.device, pci.REGISTERS)
        registers = uio.find_map(self.device, name, start)
        try:
            self._map_registers(fd, registers)
        except OSError as error:
            if error.errno == errno.ENODEV and start % PAGE:
                reason = (
                    f"its registers begin inside a page, at {start:#x}, and UIO maps whole pages"
                    f" only: boot the guest with {_ALIGNED}"
                )
            elif error.errno == errno.EINVAL:
                reason = (
                    f"the driver {self.device.driver} gives out less than the whole page that its"
                    " registers are in, and UIO maps whole pages only: change its uio_mem.size"
                )
            else:
                raise
            raise OSError(error.errno, reason, str(uio.DEV / name)) from None
        if memory in (None, "uio"):
            offset = uio.find_map(self.device, name, pci.bar_start(self.device, pci.MEMORY))
            self._map_memory(descriptors.FdArray.copy(fd), offset, "uio", str(uio.DEV / name))
        else:
            self._map_resource(memory)

    def _read_news(self) -> NoReturn:  # a read said EIO: the driver has lost the device
        self._gone()

    def _decodes(self) -> bool:
        if uio.is_gone(self._uio):
            self._gone()
        return super()._decodes()


class _WithoutInterrupts(GuestDevice):
    """A device without interrupts: waiting for one raises, instead of waiting for ever."""

    def _check_can_wait(self) -> NoReturn:
        raise NoInterrupts(_PLAIN)


class SysfsDevice(_WithoutInterrupts):
    """By sysfs: registers and memory, without a driver and without interrupts."""

    access: Access = "sysfs"

    def __init__(self, device: pci.Device, memory: Memory | None, *, why: str = "") -> None:
        use = _advice(device) or no_iommu(vfio.has_noiommu())
        self._why = why or f"by way of sysfs there are none: {use}"
        super().__init__(device, memory)

    def _open(self, memory: Memory | None) -> None:
        device = self.device
        if device.driver:
            # Unbinding vfio-pci would wait for a process that has the device open.
            unbind = f"as root: echo {device.address} > {device.path}/driver/unbind"
            ways = [way for way in (_advice(device), unbind) if way]
            if device.driver == VFIO_PCI:
                ways.remove(unbind)
            raise OSError(
                errno.EBUSY,
                f"the driver {device.driver} has the device: {', or '.join(ways)}",
                device.address,
            )
        with _explained(device, str(device.path)):
            with pci.locked(device):
                self._enable()
            # The kernel counts the processes that enabled the device, and acts only on the first.
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

    def _enable(self) -> None:
        device = self.device
        try:
            pci.enable(device, True)
        except PermissionError:
            # Only root may. Others may use what is enabled already: by `guest setup`, for instance.
            if not pci.is_enabled(device):
                raise
        else:
            self._undo(lambda: pci.enable(device, False))

    def _check_can_wait(self) -> NoReturn:
        if self.device.variant == "plain":
            super()._check_can_wait()
        raise NoInterrupts(f"no interrupts here: {self._why}")


class PlainUioDevice(_WithoutInterrupts, UioDevice):
    """A plain device by UIO: memory only."""


class PlainVfioDevice(_WithoutInterrupts, VfioDevice):
    """A plain device by vfio: memory only."""


class PlainNoIommuDevice(_WithoutInterrupts, NoIommuDevice):
    """A plain device by vfio without an IOMMU: memory only."""


WAYS: dict[Access, type[GuestDevice]] = {
    "vfio": VfioDevice,
    "noiommu": NoIommuDevice,
    "uio": UioDevice,
    "sysfs": SysfsDevice,
}
PLAIN_WAYS: dict[Access, type[GuestDevice]] = {
    **WAYS,
    "uio": PlainUioDevice,
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


# A kernel option that makes the registers of each ivshmem device begin a page.
_ALIGNED = f"pci=resource_alignment=12@pci:{pci.VENDOR_ID:04x}:{pci.DEVICE_ID:04x}"


@contextlib.contextmanager
def _explained_uio(name: str) -> Iterator[None]:
    """Name the remedy if the UIO device cannot be opened."""
    try:
        yield
    except PermissionError as error:
        reason = (
            f"{error.strerror}: run as root, or let root give it to you:"
            f" chown USER {uio.DEV / name}"
        )
        raise OSError(error.errno, reason, error.filename) from None


@contextlib.contextmanager
def _explained(device: pci.Device, path: str, *, mapping: bool = True) -> Iterator[None]:
    """Name the reason and the remedy if sysfs refuses; `mapping`: a lockdown would forbid it."""
    try:
        yield
    except PermissionError as error:
        if mapping and (mode := pci.locked_down()):
            reason = (
                f"the kernel is locked down ({mode}), which forbids this to root, too: use vfio, or"
                " boot without Secure Boot and lockdown="
            )
        elif os.geteuid():
            reason = "only root may: run as root"
            if not mapping:
                reason += ", or let root bind vfio-pci and chown its group to you (/dev/vfio/N)"
        else:
            reason = (
                f"{error.strerror}: not allowed to root here, perhaps by a container or kernel"
                " lockdown: run it outside of the container"
            )
        raise OSError(error.errno, reason, error.filename or path) from None
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno == errno.EROFS:
            reason = "sysfs is mounted read-only, as in a container: mount -o remount,rw /sys"
        elif error.errno == errno.ENOENT and path.endswith("resource2_wc"):
            reason = (
                "this kernel maps nothing write-combined (it has no PAT: booted with nopat?): use"
                " memory='resource2'"
            )
        elif error.errno == errno.EINVAL and error.filename is None:
            reason = _claimed(device)
        raise OSError(error.errno, reason, error.filename or path) from None


def _claimed(device: pci.Device) -> str:
    """Say why the kernel does not map memory by sysfs that a driver has claimed, and the remedy."""
    now = pci.look(device.address)
    ways = ["boot the guest with iomem=relaxed"]
    if (use := _advice(now)) and not use.endswith("uio"):
        ways.insert(0, use)
    return (
        f"the driver {now.driver or 'that had it'} has claimed the memory, and this kernel lets"
        f" nobody map it by sysfs then: {', or '.join(ways)}"
    )
