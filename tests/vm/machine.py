"""What a guest is told at its start: QEMU's command line, and inside/init's orders.

Knows: QEMU's options and why each is there, the kernel's parameters, the contract with inside/init.
Does not know: processes, sockets, or the ivshmem device.
"""

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from support.emulator import QEMU

from . import carried, image

# On the program's PYTHONPATH.
INSIDE = Path(__file__).parent / "inside"

# The program's lines must arrive while it runs, and bytecode would fill the guest's memory. As
# options they concern this program alone: what it starts has a user's environment.
OPTIONS = ("-u", "-B")

# cryptomgr.notests: the self-tests take 0.3 s.
# mitigations=off: they protect nothing here, and take a tenth of the time until Python starts.
# panic=-1 together with -no-reboot: a guest that panics ends QEMU.
KERNEL_ARGS = (
    "console=ttyS0",
    "quiet",
    "panic=-1",
    "cryptomgr.notests",
    "no_timer_check",
    "mitigations=off",
)

# TCG: KVM inside a VM hangs on the machines that we test on.
# "max" and not the default CPU: Python starts in 0.4 s on it, in 1.4 s on qemu64.
BASE = (
    *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
    *("-accel", "tcg,thread=multi", "-cpu", "max"),
    *("-device", "virtio-serial-pci"),
)
FILES = (
    *("-virtfs", "local,path=/,mount_tag=hostroot,security_model=none,readonly=on,multidevs=remap"),
)
PLAIN = ("-machine", "pc")
IOMMU = ("-machine", "q35,kernel-irqchip=off", "-device", "intel-iommu,intremap=on")


@dataclass(frozen=True)
class Machine:
    """The hardware; Guest explains the fields."""

    args: Sequence[str]
    memory: str
    cpus: int
    iommu: bool
    kernel_args: Sequence[str]
    modules: Sequence[str]
    migratable: bool = False
    incoming: str | None = None
    boot: image.Image | None = None

    def command(self, folder: Path, program: int, monitor: int) -> list[str]:
        """QEMU's command line: logs go to the folder; the two fds are connected sockets."""
        boot = self.boot or image.prepare()
        initrd = boot.initrd
        if self.migratable:
            initrd = folder / "initrd"
            carried.write(initrd, boot.initrd)
        return [
            *(
                QEMU,
                *BASE,
                *(() if self.migratable else FILES),
                *(IOMMU if self.iommu else PLAIN),
            ),
            *main_memory(self.memory),
            *("-smp", str(self.cpus)),
            *("-kernel", str(boot.kernel), "-initrd", str(initrd)),
            *("-append", self._kernel_line(folder)),
            *("-serial", f"file:{folder}/console"),
            *("-chardev", f"socket,id=vm-monitor,fd={monitor}"),
            *("-mon", "chardev=vm-monitor,mode=control"),
            *("-qmp", f"unix:{folder}/qmp,server=on,wait=off"),
            *_port("vm-program", f"socket,fd={program}"),
            *_port("vm-stderr", f"file,path={folder}/stderr"),
            *_port("vm-status", f"file,path={folder}/status"),
            *(("-incoming", self.incoming) if self.incoming is not None else ()),
            *self.args,
        ]

    def _kernel_line(self, folder: Path) -> str:
        sets, iommu = (["vfio"], ["intel_iommu=on"]) if self.iommu else ([], [])
        # What the kernel does not know it hands to init, as environment.
        if self.migratable:
            python, path = carried.program()
            orders = [f'vm_python="{python}"', f'vm_path="{":".join(map(str, path))}"']
        else:
            sets = ["files", *sets]
            orders = [f'vm_folder="{folder}"']
        if self.boot is None or self.boot.modules:
            orders.append(f'vm_modules="{" ".join(["base", *sets, *self.modules])}"')
        return " ".join([*KERNEL_ARGS, *iommu, *orders, *self.kernel_args])


def main_memory(size: str) -> list[str]:
    """The guest's own memory, as an object of its own that comes before any other.

    QEMU 10.2 and newer under TCG abort while they migrate a device with master=on whose memory
    comes before the main one.
    """
    return [
        *("-m", size, "-object", f"memory-backend-ram,id=main-memory,size={size}"),
        *("-machine", "memory-backend=main-memory"),
    ]


def _port(name: str, chardev: str) -> list[str]:
    """A virtio-serial port, which inside/init finds by its name.

    Not a second UART: a port has flow control, nothing echoes, and no byte is special.
    """
    device = f"virtserialport,chardev={name},name={name}"
    return ["-chardev", f"{chardev},id={name}", "-device", device]


def write_orders(
    folder: Path, python: str, program: Path, argv: Sequence[str], env: Mapping[str, str]
) -> None:
    """Writes what inside/init reads: the command that runs the program in the guest."""
    full = {
        "PATH": os.defpath,
        "HOME": "/root",
        "LANG": "C.UTF-8",
        **env,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(INSIDE), env.get("PYTHONPATH")])),
    }
    words = [f"{key}={value}" for key, value in full.items()]
    command = ["env", "-i", *words, "/bin/chroot", "/root", python, *OPTIONS, str(program), *argv]
    (folder / "run").write_text(f"set -- {shlex.join(command)}\n")
