"""Inside a guest: from the device on the PCI bus to an interrupt that it sends to itself.

Knows: what stands between a program and the device, and who can take it away: a command in the
guest, or an option of the QEMU that runs it. Does not know: how a device is opened.

Invariants:
1. A device is opened only if nothing speaks against it: no driver loses it but those that `open`
   takes it from, too, for as long as it is open; no other program is disturbed, and the kernel
   switches nothing on that was off.
2. What is judged from outside is not taken for granted: the interrupt to oneself is the proof.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from ..errors import IvshmemError
from ..guest import pci, uio, vfio
from ..guest.choice import best_way, open_device
from ..guest.device import Access, GuestDevice
from ..memory.sizes import format_size
from ..peer import default_paths
from ..qemu import cmdline
from ..system import processes
from ..system.time_limits import left_until
from ..text import counted, quoted
from . import open_files
from .check import (
    Check,
    CheckStep,
    Finding,
    as_root,
    failed,
    ok,
    our_command,
    run,
    skipped,
    warning,
)

SECONDS = 2.0  # for all interrupts to come back

_COMMAND_LINE = Path("/proc/cmdline")
_DMAR = Path("/sys/firmware/acpi/tables/DMAR")  # the firmware's word on Intel's IOMMU
_IRQ_CHIPS = Path("/sys/kernel/irq")
_MODULES = Path("/sys/module")
_UNSAFE = _MODULES / "vfio_iommu_type1/parameters/allow_unsafe_interrupts"

# QEMU's options for a guest that can have interrupts in user space.
_IOMMU = {
    "x86_64": "-machine q35,kernel-irqchip=split -device intel-iommu,intremap=on",
    "aarch64": "-machine virt,gic-version=3,iommu=smmuv3",
}.get(platform.machine(), "-device virtio-iommu-pci")

# How Debian calls an architecture.
_DEBIAN = {"x86_64": "amd64", "aarch64": "arm64"}

# Drivers that a device may have while another one of its IOMMU group is given to a program: they
# leave memory alone.
_HARMLESS = ("pci-stub", "pcieport", "shpchp", "vfio")

_PLAIN = "not needed: a plain device has no interrupts"


def examine_guest(address: str | None = None) -> Iterator[Check]:
    """Check each ivshmem device of this machine, or the one at a PCI address."""
    devices = pci.devices()
    wanted = [d for d in devices if address in (None, d.address, d.address.removeprefix("0000:"))]
    for device in wanted:
        yield from run(device.address, DeviceSteps(device).steps())
    if not wanted:
        yield from run("guest", [CheckStep("device", lambda: _missing(devices, address))])


def _missing(devices: list[pci.Device], address: str | None) -> Finding:
    if devices:
        there = ", ".join(device.address for device in devices)
        fix = our_command("doctor", "--guest", devices[0].address)
        return failed(f"no ivshmem device at {address}; this machine has {there}", fix)
    options = cmdline.shell(cmdline.doorbell(default_paths.OF_ROOT, 1))
    return failed(
        "no ivshmem device in this machine (run `ivshmem serve` on the host first)", options
    )


class DeviceSteps:
    """The checks of one device, and what they hand on to each other."""

    def __init__(self, device: pci.Device) -> None:
        self.device = device
        self._locked = pci.locked_down()
        self._shared = False
        self._master = False
        self._silent: list[int] = []
        self._vectors = 0

    def steps(self) -> list[CheckStep]:
        before = [
            CheckStep("device", self._device),
            CheckStep("permission", self._permission),
            CheckStep("memory decoding", self._decoding),
            CheckStep("lockdown", self._lockdown),
            CheckStep("driver", self._driver),
            CheckStep("IOMMU", self._iommu),
            CheckStep("IOMMU group", self._group, ("IOMMU",)),
            CheckStep("vfio", self._vfio),
            CheckStep("interrupt remapping", self._remapping, ("IOMMU",)),
            CheckStep("free", self._free, ("permission", "driver")),
        ]
        return [
            *before,
            CheckStep("opening", self._opening, tuple(step.name for step in before)),
            CheckStep("bus master", self._bus_master, ("opening",)),
            CheckStep("self-interrupt", self._self_interrupt, ("opening", "bus master")),
        ]

    @property
    def _access(self) -> Access:
        """The way in which it would be opened if nothing were in the way."""
        way = best_way(self.device)
        if way == "sysfs" and (self.device.variant == "doorbell" or self._locked):
            return "vfio"  # what is missing for that is what this is about
        return way

    def _without_vfio(self) -> Finding | None:
        """Why what concerns vfio does not concern this device."""
        if self._access == "uio":
            return skipped(f"not needed: the UIO driver {self.device.driver} has the device")
        return skipped(_PLAIN) if self._access == "sysfs" else None

    # -- what is there ----------------------------------------------------------------------------

    def _device(self) -> Finding:
        device = self.device
        if not device.size:
            return failed(
                "the kernel found no address space for its memory",
                "-device pcie-root-port,id=port,chassis=1,pref64-reserve=2G",
            )
        kind = "plain"
        if device.variant == "doorbell":
            number = "?" if device.vectors is None else device.vectors
            kind = f"doorbell, {number} vector{'' if number == 1 else 's'}"
        return ok(f"{kind}, {format_size(device.size)}")

    def _permission(self) -> Finding:
        device = self.device
        needed = [device.path / name for name in ("driver_override", "enable", "config")]
        needed += [device.path / "resource2", pci.SYSFS / "drivers_probe"]
        lacking = [path for path in needed if not _may_write(path)]
        who = "root" if os.geteuid() == 0 else f"user {os.geteuid()}"
        if not lacking:
            return ok(who)
        group = self._group_path(device)
        if device.driver == "vfio-pci" and group is not None and _may_write(group):
            return ok(f"{who}, with access to {group}")
        if (name := uio.name(device)) is not None and _may_write(uio.DEV / name):
            return ok(f"{who}, with access to {uio.DEV / name}")
        mapped = device.path / "resource0"
        enabled = not device.driver and pci.is_enabled(device)
        if enabled and all(map(_may_write, (mapped, device.path / "resource2"))):
            return ok(f"{who}, with access to {mapped}")
        if os.geteuid() == 0:
            return failed(
                f"root may not write {lacking[0]}: is this a container?", "mount -o remount,rw /sys"
            )
        return failed(
            f"{who} may not write {lacking[0]}",
            as_root(our_command("doctor", "--guest", device.address)),
        )

    def _decoding(self) -> Finding:
        device = self.device
        bits = pci.command(device)
        if bits & pci.COMMAND_MEMORY:
            return ok(f"on (command register {bits:#06x})")
        off = f"off (command register {bits:#06x})"
        if device.driver:
            return ok(f"{off}; its driver, {device.driver}, controls it")
        if (device.path / "enable").read_text().strip() == "0":
            return failed(f"{off}: not enabled yet", as_root(f"echo 1 > {device.path}/enable"))
        if self._locked and device.iommu_group is not None:
            return ok(f"{off}; only vfio may switch it on, because the kernel is locked down")
        # The kernel acts only when the first user enables a device, and one has.
        return failed(
            f"{off}, although the device is enabled: a program has cleared the bit", self._set(bits)
        )

    def _set(self, bits: int) -> str:
        """The command that switches memory decoding on behind the kernel's back."""
        if shutil.which("setpci"):
            return as_root(f"setpci -s {self.device.address} COMMAND=2:2")
        low = (bits | pci.COMMAND_MEMORY) & 0xFF
        return as_root(
            f"printf '\\{low:03o}' |"
            f" dd of={self.device.path}/config bs=1 seek={pci.COMMAND} conv=notrunc status=none"
        )

    def _lockdown(self) -> Finding:
        if not self._locked:
            known = pci.LOCKDOWN.exists() or os.geteuid() == 0
            return (
                ok("none")
                if known
                else skipped("unknown: securityfs is not mounted, only root can mount it")
            )
        what = f"{self._locked}: sysfs cannot map the device"
        if self.device.iommu_group is None and self._access == "vfio":
            return failed(f"{what}, and vfio needs an IOMMU", _IOMMU)
        return ok(f"{what}, but {self._access} can")

    def _driver(self) -> Finding:
        driver = self.device.driver
        if not driver:
            return ok("none")
        if driver == "vfio-pci" and self._access in ("vfio", "noiommu"):
            return ok(driver)
        if self._access == "uio":
            return ok(f"{driver}: one vector")
        if self._access in ("vfio", "noiommu") and self.device.variant == "doorbell":
            return warning(f"{driver} has the device; it is given back after each use")
        return failed(
            f"{driver} has the device",
            as_root(f"echo {self.device.address} > {self.device.path}/driver/unbind"),
        )

    # -- what vfio needs --------------------------------------------------------------------------

    def _iommu(self) -> Finding:
        if (reason := self._without_vfio()) is not None:
            return reason
        if self.device.iommu_group is not None:
            return ok(f"group {self.device.iommu_group}")
        if self._access == "noiommu":
            return warning("none, but vfio's no-IOMMU mode is on")
        if vfio.has_noiommu():
            return failed(
                "none, and vfio's no-IOMMU mode is off (it lets the device write to all memory,"
                " and taints the kernel)",
                as_root(vfio.ENABLE_NOIOMMU),
            )
        what = "" if self._locked else ", so no interrupts (memory and ringing work with sysfs)"
        if _DMAR.exists():
            fix = _kernel_fix("intel_iommu=on")
            return failed(f"the kernel does not use it{what}; reboot after", fix)
        return failed(f"none{what}", _IOMMU)

    def _group(self) -> Finding:
        if (reason := self._without_vfio()) is not None:
            return reason
        mates = {
            address: driver
            for address, driver in pci.group_mates(self.device).items()
            if driver and not driver.startswith(_HARMLESS)
        }
        if not mates:
            return ok("no other driver uses the group")
        held = ", ".join(f"{driver} has {address}" for address, driver in mates.items())
        unbind = "; ".join(
            f"echo {address} > {pci.SYSFS}/devices/{address}/driver/unbind" for address in mates
        )
        return failed(f"a program cannot use the group while {held}", as_root(unbind))

    def _vfio(self) -> Finding:
        if (reason := self._without_vfio()) is not None:
            return reason
        there = {
            "vfio-pci": (pci.SYSFS / "drivers" / "vfio-pci").is_dir(),
            "vfio_iommu_type1": self._access == "noiommu"
            or (_MODULES / "vfio_iommu_type1").is_dir(),
        }
        missing = [module for module, is_there in there.items() if not is_there]
        if not missing:
            return ok("vfio-pci is available")
        if not all(map(_loadable, missing)):
            package = f"linux-image-{platform.release()}"
            if (Path("/lib/modules") / platform.release()).is_dir():  # another kernel, then
                package = f"linux-image-{_DEBIAN.get(platform.machine(), platform.machine())}"
            return failed(
                f"this kernel has no {' and no '.join(missing)}",
                as_root(f"apt-get install {package}"),
            )
        if there["vfio-pci"]:  # vfio asks for the other one only when it is loaded itself
            return failed(f"{missing[0]} is not loaded", as_root(f"modprobe {missing[0]}"))
        return ok("not loaded yet; opening the device loads it")

    def _remapping(self) -> Finding:
        if (reason := self._without_vfio()) is not None:
            return reason
        if self._access == "noiommu":
            return skipped("vfio without an IOMMU")
        if platform.machine() not in ("x86_64", "i686"):
            return skipped("unknown on this architecture until the device is opened")
        chips = {_text(path / "chip_name") for path in _IRQ_CHIPS.glob("[0-9]*")}
        if any(chip.startswith("IR-") for chip in chips):
            return ok("on")
        if _text(_UNSAFE) in ("Y", "1"):
            return ok("off, but vfio does not need it (allow_unsafe_interrupts)")
        if _remaps_by_dmar():
            fix = _kernel_fix("intremap=on")
            return failed("the kernel does not use it, and vfio needs it; reboot after", fix)
        return failed("off, and vfio needs it", _IOMMU)

    # -- the proof --------------------------------------------------------------------------------

    @staticmethod
    def _group_path(device: pci.Device) -> Path | None:
        """The file that stands for its group; None if there is no group."""
        if device.iommu_group is not None:
            return vfio.group_path(device.iommu_group)
        if device.noiommu_group is not None:
            return vfio.group_path(device.noiommu_group, iommu=False)
        return None

    def _free(self) -> Finding:
        device = pci.look(self.device.address)
        if self._access == "uio":
            return self._free_of_uio(device)
        if self._access == "sysfs":
            return skipped(_PLAIN)
        group = self._group_path(device)
        held = group is not None and vfio.is_held(group)
        mates = [a for a, driver in pci.group_mates(device).items() if driver == "vfio-pci"]
        if group is None or not held or not (mates or device.driver == "vfio-pci"):
            return ok("no process has the device open")
        found = open_files.processes_with_file(group)
        who = " and ".join(map(str, found)) or processes.described([])
        if any(_is_broker(holder) for holder in found) and not mates:
            self._shared = True
            return warning(f"{who} shares the device: connect to its socket")
        if mates:
            return failed(
                f"{who} has IOMMU group {device.iommu_group} open, which also contains"
                f" {' and '.join(mates)}: open both in that process, or give each device a port of"
                " its own",
                "-device pcie-root-port,id=port1,chassis=1"
                " -device ivshmem-doorbell,bus=port1,vectors=1,chardev=ivshmem",
            )
        if os.getpid() in [holder.pid for holder in found]:
            return failed("this process has the device open: close it first")
        pids = " ".join(str(holder.pid) for holder in found)
        return failed(f"{who} has the device open", as_root(f"kill {pids}") if pids else "")

    def _free_of_uio(self, device: pci.Device) -> Finding:
        """Others may have it open, too, but a ring would look like one of a peer to them."""
        name = uio.name(device)
        found = open_files.processes_with_file(uio.DEV / name) if name else []
        if not found:
            return ok("no process has the device open")
        self._shared = True
        return warning(f"{' and '.join(map(str, found))} has the device open, and is not disturbed")

    def _opening(self) -> Finding:
        if self._shared:
            return skipped("another process uses the device")
        access = self._access
        try:
            with open_device(self.device.address, access=access) as endpoint:
                self._master = bool(pci.command(self.device) & pci.COMMAND_MASTER)
                if self.device.variant == "doorbell":
                    self._ring(endpoint)
                return ok(
                    f"opened with {access}, id {endpoint.id}, {format_size(endpoint.region.size)}"
                )
        except (IvshmemError, OSError) as error:
            return failed(getattr(error, "strerror", None) or str(error))

    def _ring(self, endpoint: GuestDevice) -> None:
        """Ring every vector of our own; note those that stay silent."""
        self._vectors = endpoint.vectors
        deadline = time.monotonic() + SECONDS
        for vector in range(endpoint.vectors):
            endpoint.ring(endpoint.id, vector)
        self._silent = [
            vector
            for vector in range(endpoint.vectors)
            if not endpoint.wait(vector, left_until(deadline))
        ]

    def _bus_master(self) -> Finding:
        if self.device.variant == "plain":
            return skipped(_PLAIN)
        if not self._vectors:
            return skipped("not opened")
        if self._master:
            return ok("on while the device is open")
        return failed(
            "off although the device is open, so no interrupt arrives",
            as_root(f"setpci -s {self.device.address} COMMAND=4:4"),
        )

    def _self_interrupt(self) -> Finding:
        if self.device.variant == "plain":
            return skipped(_PLAIN)
        if not self._vectors:
            return skipped("not opened")
        total, silent = self._vectors, self._silent
        if not silent:
            return ok(f"{total} of {counted(total, 'vector')}")
        heard = total - len(silent)
        what = (
            f"{heard} of {counted(total, 'vector')}: nothing on {', '.join(map(str, silent[:8]))}"
        )
        if heard and silent == list(range(heard, total)):
            # A server gives the same number to everybody; QEMU leaves the rest unconnected.
            return failed(
                f"{what}; the server has {heard}",
                f"vectors={heard} in QEMU's option -device ivshmem-doorbell",
            )
        return failed(
            f"{what}; the server did not connect them: on the host, before QEMU starts",
            f"ivshmem serve --vectors {total}",
        )


def _remaps_by_dmar() -> bool:
    """Whether the firmware says that the IOMMU could remap interrupts (VT-d specification, 8.1)."""
    try:
        return bool(_DMAR.read_bytes()[37] & 1)
    except (OSError, IndexError):
        return False


def _kernel_fix(parameter: str) -> str:
    """What gives the kernel a parameter, from the next boot on, by the boot loader in use."""
    name = parameter.partition("=")[0]
    if shutil.which("grubby"):
        return as_root(f"grubby --update-kernel=ALL --args={parameter}")
    if shutil.which("update-grub"):
        line = f'GRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX {parameter}"'
        folder = "/etc/default/grub.d"
        return as_root(
            f"mkdir -p {folder} && echo {quoted(line)} > {folder}/iommu.cfg && update-grub"
        )
    words = [w for w in _text(_COMMAND_LINE).split() if w.partition("=")[0] != name]
    return f"-append {quoted(' '.join([*words, parameter]))}"


def _is_broker(holder: open_files.FoundProcess) -> bool:
    """Whether the process is `ivshmem guest serve`."""
    words = holder.arguments
    return any(words[at : at + 2] == ["guest", "serve"] for at in range(len(words)))


def _loadable(module: str) -> bool:
    """Whether modprobe finds the module; it is not loaded."""
    try:
        done = subprocess.run(["modprobe", "--dry-run", "--quiet", module], check=False)
    except FileNotFoundError:
        return False
    return done.returncode == 0


def _may_write(path: Path) -> bool:
    return os.access(path, os.W_OK, effective_ids=True)


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
