"""Internal: this machine's ivshmem devices, their configuration space and drivers, through sysfs.

Knows: where Linux keeps PCI devices, how a driver is changed. Does not know: what registers mean.

Invariants:
1. A driver is changed only by `bind`; the function that it returns puts the former driver back.
2. No device is unbound while a process may have it open through vfio: the kernel would wait for
   that process without end. To look and to act is one step, under `locked`.
3. An `iommu_group` is a group of an IOMMU. The group that vfio makes for a device without an IOMMU
   is called `noiommu_group`.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from ..system import locks
from ..system.named_tuple import NamedTuple

SYSFS = Path("/sys/bus/pci")
LOCKDOWN = Path("/sys/kernel/security/lockdown")

VENDOR_ID, DEVICE_ID = 0x1AF4, 0x1110
REGISTERS, MSIX_TABLE, MEMORY = range(3)  # what the device has in BAR0, BAR1, BAR2

# The configuration space (PCI Local Bus Specification 3.0, chapter 6).
COMMAND = 4
COMMAND_MEMORY, COMMAND_MASTER = 2, 4
_CAPABILITIES, _HEADER = 0x34, 64
_MSIX = 0x11

# How vfio names the groups that it makes for devices without an IOMMU; other groups have no name.
_NOIOMMU_NAME = "vfio-noiommu"

_LOCK_SECONDS = 5.0  # to bind a driver takes milliseconds


class Device(NamedTuple):
    """An ivshmem device, as it was at the time of the call.

    Attributes:
        address: on the PCI bus, such as "0000:00:04.0".
        size: of the shared memory, bytes.
        variant: "plain" (memory only) or "doorbell".
        vectors: of a doorbell device; 0 of a plain one; None: only root can see it.
        driver: the kernel driver that has it; "": none.
        iommu_group: its number; None: there is no IOMMU.
        noiommu_group: the number of the group that vfio-pci made for the device, if it has no
            IOMMU; else None.
    """

    address: str
    size: int
    variant: Literal["plain", "doorbell"]
    vectors: int | None
    driver: str
    iommu_group: int | None
    noiommu_group: int | None = None

    @property
    def path(self) -> Path:
        """Its directory in sysfs."""
        return SYSFS / "devices" / self.address


def devices() -> list[Device]:
    """List the ivshmem devices of this machine, by address; on most hosts there are none."""
    found = []
    for path in sorted((SYSFS / "devices").glob("*")):
        with unless_unplugged():
            if (_hex(path / "vendor"), _hex(path / "device")) == (VENDOR_ID, DEVICE_ID):
                found.append(look(path.name))
    return found


@contextlib.contextmanager
def unless_unplugged() -> Iterator[None]:
    """Leave the block if the device is unplugged: its files are gone, or accesses fail."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENODEV):
            raise


@contextlib.contextmanager
def locked(device: Device) -> Iterator[None]:
    """Keep two processes from changing the device's driver at once.

    The lock is on the device's directory in sysfs. Any user can take it, so waiting for it has a
    limit; after that the race is possible that the lock prevents.
    """
    with locks.locked(device.path, _LOCK_SECONDS):
        yield


def look(address: str) -> Device:
    """Return the device at an address, as it is now.

    Raises:
        FileNotFoundError: there is none.
    """
    path = SYSFS / "devices" / address
    sizes = [end - start + 1 if end else 0 for start, end in _bars(path)]
    doorbell = sizes[MSIX_TABLE] > 0
    group = _link(path / "iommu_group")
    number = int(group) if group else None
    made_up = _text(path / "iommu_group" / "name") == _NOIOMMU_NAME
    return Device(
        address,
        sizes[MEMORY],
        "doorbell" if doorbell else "plain",
        _msix_vectors((path / "config").read_bytes()) if doorbell else 0,
        _link(path / "driver"),
        None if made_up else number,
        number if made_up else None,
    )


def bar_start(device: Device, bar: int) -> int:
    """Return the physical address of a BAR; a small BAR need not begin a page."""
    return _bars(device.path)[bar][0]


def _bars(path: Path) -> list[tuple[int, int]]:
    lines = (path / "resource").read_text().splitlines()
    return [(int(start, 16), int(end, 16)) for start, end, _ in map(str.split, lines)]


def _msix_vectors(config: bytes) -> int | None:
    """Return the size of the MSI-X table; None: the kernel shows only the header."""
    if len(config) <= _HEADER:
        return None
    at = config[_CAPABILITIES]
    for _ in range(48):  # no more fit in, so that a list that is a circle ends, too
        if not _HEADER <= at <= len(config) - 4:
            break
        kind = config[at]
        if kind == _MSIX:
            return (int.from_bytes(config[at + 2 : at + 4], "little") & 0x7FF) + 1
        at = config[at + 1]
    return 0


# -- obstacles ------------------------------------------------------------------------------------


def command(device: Device) -> int:
    """Return the command register of the configuration space."""
    with (device.path / "config").open("rb") as file:
        file.seek(COMMAND)
        return int.from_bytes(file.read(2), "little")


def set_command(device: Device, bits: int) -> None:
    """Set bits of the command register.

    Raises:
        OSError: EACCES, or EPERM under kernel lockdown.
    """
    path = device.path / "config"
    fd = _open(path, os.O_WRONLY)
    try:
        os.pwrite(fd, (command(device) | bits).to_bytes(2, "little"), COMMAND)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(fd)


def locked_down() -> str:
    """Return why the kernel keeps even root from the hardware: "integrity", "confidentiality".

    "": it does not. "unknown": it does, and securityfs is not mounted, so that only a try as root
    showed it.
    """
    try:
        text = LOCKDOWN.read_text()
    except OSError:
        return "unknown" if any(map(_mapping_is_forbidden, devices())) else ""
    mode = text.partition("[")[2].partition("]")[0]
    return "" if mode == "none" else mode


def _mapping_is_forbidden(device: Device) -> bool:
    """Whether a process that may open the memory may not map it; the mapping ends at once."""
    try:
        fd = _open(device.path / "resource2", os.O_RDWR)
    except OSError:
        return False
    try:
        mmap.mmap(fd, mmap.PAGESIZE).close()
    except PermissionError:
        return True
    except OSError:
        return False  # EINVAL: a driver has claimed it
    finally:
        os.close(fd)
    return False


def group_mates(device: Device) -> dict[str, str]:
    """Return the other devices of its IOMMU group, with their drivers; vfio needs all free."""
    members = (device.path / "iommu_group" / "devices").glob("*")
    others = sorted(path for path in members if path.name != device.address)
    return {path.name: _link(path / "driver") for path in others}


# -- drivers --------------------------------------------------------------------------------------


def load_driver(driver: str) -> bool:
    """Load the driver's module if necessary; return whether this kernel has the driver."""
    place = SYSFS / "drivers" / driver
    if not place.is_dir():
        import subprocess  # here: the driver is there as a rule, and a guest imports slowly

        with contextlib.suppress(FileNotFoundError):  # a guest without modprobe
            subprocess.run(["modprobe", driver], check=False, capture_output=True)
    return place.is_dir()


def bind(device: Device, driver: str) -> Callable[[], None]:
    """Give the device to `driver`, and take it from another one; return what undoes this.

    Call both under `locked`.

    Raises:
        OSError: the driver does not take it; the former driver has it again.
    """
    now = look(device.address)
    if now.driver == driver:
        return lambda: None
    override = driver_override(device)

    def restore() -> None:
        unbind(device, driver, now.driver, override)

    # The override first, both ways: a process that may not write it changes nothing.
    try:
        _write(device.path / "driver_override", driver)
        if now.driver:
            _unbind(device, now.driver)
        with contextlib.suppress(OSError):  # the check below shows whether it worked
            _write(SYSFS / "drivers_probe", device.address)
        if _link(device.path / "driver") != driver:
            raise OSError(errno.EINVAL, f"{driver} does not take the device", device.address)
    except BaseException:
        with contextlib.suppress(OSError):
            restore()
        raise
    return restore


def driver_override(device: Device) -> str:
    """Return the name of the only driver that may take the device; "": any that fits."""
    text = (device.path / "driver_override").read_text().strip()
    return "" if text == "(null)" else text


def unbind(device: Device, driver: str, former: str, override: str) -> None:
    """Take the device from `driver`, and give it to the `former` one, if it had one.

    Call it under `locked`, and only if no process has the device open through vfio.

    Args:
        override: the driver_override to set.
    """
    _write(device.path / "driver_override", override or "\n")
    _unbind(device, driver)
    if former:
        _write(SYSFS / "drivers" / former / "bind", device.address)


def _unbind(device: Device, driver: str) -> None:
    """Take the device from this driver, but not from another one that got it since."""
    with unless_unplugged():  # ENODEV: the driver does not have it
        _write(SYSFS / "drivers" / driver / "unbind", device.address)


# -- files of sysfs -------------------------------------------------------------------------------


def _open(path: Path, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC)  # neither created nor truncated, unlike by open()


def _write(path: Path, text: str) -> None:
    fd = _open(path, os.O_WRONLY)
    try:
        os.write(fd, text.encode())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(fd)


def enable(device: Device, on: bool) -> None:
    """Count this process among those that use the device without a driver, or end that.

    For the first process the kernel switches memory decoding on.

    Raises:
        OSError: to be counted: EBUSY, a driver has it; EACCES.
    """
    try:
        _write(device.path / "enable", "1" if on else "0")
    except OSError as error:
        if on or error.errno != errno.EBUSY:  # EBUSY: a driver has the device now
            raise


def is_enabled(device: Device) -> bool:
    """Return whether a process uses the device without a driver, or has enabled it for others."""
    return _text(device.path / "enable") not in ("", "0")


def _text(path: Path) -> str:
    """Return the text of a file; "": there is no file."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _hex(path: Path) -> int:
    return int(path.read_text(), 16)


def _link(path: Path) -> str:
    """Return the name of a symbolic link's target; "": there is no link."""
    try:
        return os.path.basename(os.readlink(path))
    except FileNotFoundError:
        return ""
