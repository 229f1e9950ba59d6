"""A guest with a system of its own on a disk: systemd, udev and kmod, and it can be rebooted.

Knows: how a root of Debian becomes a disk that boots, how commands are run there. Does not know:
what is tried in it, or the ivshmem device: tests give that in `args`.

The other guests (harness.py) have no system: they are up in seconds, and this one in a minute.
Needs root and mmdebstrap.
"""

import json
import os
import shutil
import socket
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support import debian
from support.emulator import QEMU

from . import image
from .machine import BASE, IOMMU, KERNEL_ARGS, PLAIN, main_memory
from .newc import Newc
from .process import spawn
from .wire import Deadline, Wire

BOOT = 400.0  # seconds: it takes 40 of an idle processor
COMMAND = 180.0
_PORT = "vm-agent"
_DISK = "1G"

# Of the kernel's modules, those that the system loads by itself.
_WANTED = (
    "virtio_pci",
    "virtio_console",
    "vfio_iommu_type1",
    "vfio_pci",
    "virtio_blk",
    "ext4",
    "isofs",
)
_FOR_THE_DISK = ("virtio_pci", "virtio_blk", "crc32c_generic", "ext4")

_INIT = """#!/bin/busybox sh
PATH=/bin
mkdir -p /proc /sys /dev /root
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
for module in /modules/*; do insmod "$module"; done
until mount -t ext4 /dev/vda /root; do usleep 10000; done
umount /proc /sys
mount --move /dev /root/dev
exec switch_root /root /sbin/init
"""

_UNIT = """[Unit]
Description=Runs what the test asks for

[Service]
Type=exec
ExecStart=/usr/bin/python3 /root/agent.py
Restart=no

[Install]
WantedBy=multi-user.target
"""

# It reads requests, one a line, and answers with a line.
_AGENT = """
import glob, json, os, subprocess, time

def port():
    while True:
        for name in glob.glob("/sys/class/virtio-ports/*/name"):
            if open(name).read().strip() == "vm-agent":
                return "/dev/" + name.split("/")[-2]
        time.sleep(0.05)

with open(port(), "r+b", buffering=0) as wire:
    subprocess.run(["udevadm", "settle"])
    wire.write(b'{"hello": 1}\\n')
    pending = b""
    while True:
        while b"\\n" not in pending:
            data = wire.read(65536)
            if not data:
                time.sleep(0.05)  # the host's end is not open yet
            pending += data or b""
        line, _, pending = pending.partition(b"\\n")
        request = json.loads(line)
        path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        done = subprocess.run(
            ["/usr/bin/env", "-C", "/", *request["command"]],
            input=request["stdin"].encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={"PATH": path, "LANG": "C.UTF-8", "HOME": "/root"},
        )
        answer = {"status": done.returncode, "output": done.stdout.decode(errors="replace")}
        data = json.dumps(answer).encode() + b"\\n"
        while data:
            data = data[wire.write(data):]
"""


@dataclass(frozen=True)
class Done:
    """What a command in the guest printed on both streams, and its exit status."""

    status: int
    output: str


def require() -> None:
    """Skip a test, or fail it in CI, where disks cannot be made."""
    for name in ("mmdebstrap", "mkfs.ext4"):
        if not shutil.which(name) or os.geteuid() != 0:
            reason = f"needs root, and apt-get install {name} (mkfs.ext4: e2fsprogs)"
            if os.environ.get("CI"):
                pytest.fail(reason, pytrace=False)
            pytest.skip(reason)


def make_disk(
    folder: Path, suite: str, files: dict[str, bytes], kind: str = "guest"
) -> tuple[image.Image, Path]:
    """A suite's kernel, and a disk of its system with these files, in a folder.

    Args:
        kind: of the root, as debian.root() takes it.

    Raises:
        RuntimeError, unpacked.CannotError: something is missing.
    """
    busybox = image._busybox()
    if busybox is None:
        raise RuntimeError(image.missing())
    deb = debian.kernel(debian.cache_folder(), suite)
    release = deb.name.partition("_")[0].removeprefix("linux-image-")
    with (
        debian.root(debian.cache_folder(), suite, kind) as place,
        tempfile.TemporaryDirectory(dir=folder) as work,
    ):
        image.run("dpkg-deb", "-x", str(deb), work)
        kernel = folder / "kernel"
        (vmlinuz,) = Path(work).glob("boot/vmlinuz-*")
        kernel.write_bytes(image._uncompressed(vmlinuz.read_bytes()))
        tree = image.ModuleTree(Path(work))
        archive = Newc()
        for name in ("bin", "dev", "modules"):
            archive.folder(name)
        archive.file("bin/busybox", busybox.read_bytes(), executable=True)
        for applet in ("sh", "mkdir", "mount", "umount", "insmod", "usleep", "switch_root"):
            archive.link(f"bin/{applet}", "busybox")
        for number, module in enumerate(tree.closure(_FOR_THE_DISK)):
            archive.file(f"modules/{number:02}-{module}.ko", tree.read(module))
        archive.file("init", _INIT.encode(), executable=True)
        initrd = folder / "initrd"
        initrd.write_bytes(archive.finish())
        _add_modules(place, Path(work), tree, release)
        _add(place, "root/agent.py", _AGENT.encode())
        _add(place, "etc/systemd/system/agent.service", _UNIT.encode())
        wants = place / "etc/systemd/system/multi-user.target.wants"
        wants.mkdir(parents=True, exist_ok=True)
        (wants / "agent.service").symlink_to("/etc/systemd/system/agent.service")
        for name, data in files.items():
            _add(place, name, data)
        disk = folder / "disk"
        image.run("mkfs.ext4", "-q", "-d", str(place), str(disk), _DISK)
    return image.Image(kernel, initrd), disk


def _add(place: Path, name: str, data: bytes) -> None:
    (place / name).parent.mkdir(parents=True, exist_ok=True)
    (place / name).write_bytes(data)
    if data.startswith(b"#!"):
        (place / name).chmod(0o755)


def _add_modules(place: Path, unpacked: Path, tree: image.ModuleTree, release: str) -> None:
    """Some modules where modprobe finds them, with what they depend on."""
    (source,) = (path for path in unpacked.glob("**/lib/modules/*") if path.name == release)
    target = place / "lib/modules" / release
    target.mkdir(parents=True, exist_ok=True)
    for name in ("modules.order", "modules.builtin", "modules.builtin.modinfo"):
        if (source / name).exists():
            shutil.copy(source / name, target)
    for module in tree.closure(_WANTED):
        (target / f"{module}.ko").write_bytes(tree.read(module))
    image.run("chroot", str(place), "depmod", release)


class InstalledGuest:
    """A virtual machine that boots from a disk. Owns QEMU; the disk keeps what it writes."""

    def __init__(
        self, boot: image.Image, disk: Path, args: Sequence[str], *, iommu: bool = True
    ) -> None:
        self.folder = disk.parent
        self._exit = ExitStack()
        agent, far = socket.socketpair()
        self._wire = Wire(agent)
        self._exit.callback(self._wire.close)
        kernel = [*KERNEL_ARGS, *(["intel_iommu=on"] if iommu else []), "systemd.show_status=0"]
        command = [
            *(QEMU, *(word for word in BASE if word != "-no-reboot")),
            *(IOMMU if iommu else PLAIN),
            *main_memory("512M"),
            *("-smp", "2", "-kernel", str(boot.kernel), "-initrd", str(boot.initrd)),
            *("-append", " ".join(kernel)),
            *("-drive", f"file={disk},format=raw,if=none,id=disk,cache=unsafe"),
            *("-device", "virtio-blk-pci,drive=disk"),
            *("-serial", f"file:{self.folder}/console"),
            *("-chardev", f"socket,id=agent,fd={far.fileno()}"),
            *("-device", f"virtserialport,chardev=agent,name={_PORT}"),
            *args,
        ]
        with far, (self.folder / "qemu").open("wb") as output:
            self._process = spawn(command, (far.fileno(),), output)
        self._exit.callback(self._kill)

    def boot(self, seconds: float = BOOT) -> None:
        """Wait until it is up; also after a reboot."""
        assert self._answer(seconds) == {"hello": 1}

    def run(self, *command: str, stdin: str = "", user: str = "") -> Done:
        """Run a command to its end, as root or as another user."""
        words = ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups"] if user else []
        request = {"command": [*words, *command], "stdin": stdin}
        self._wire.send(json.dumps(request), Deadline(COMMAND))
        answer = self._answer(COMMAND)
        return Done(answer["status"], answer["output"])

    def ok(self, *command: str, stdin: str = "", user: str = "") -> str:
        """The same; it must succeed. Return what it printed."""
        done = self.run(*command, stdin=stdin, user=user)
        assert done.status == 0, f"{command}: {done.status}\n{done.output}"
        return done.output

    def reboot(self) -> None:
        """Boot again, the orderly way."""
        self.run("sh", "-c", "(sleep 0.5; systemctl reboot) >/dev/null 2>&1 &")
        self.boot()

    def reset(self) -> None:
        """Boot again as after a power failure."""
        self.run("sh", "-c", "sync; (sleep 0.2; echo b >/proc/sysrq-trigger) >/dev/null 2>&1 &")
        self.boot()

    def _answer(self, seconds: float) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = json.loads(self._wire.readline(Deadline(seconds)))
            return answer
        except (TimeoutError, EOFError, ValueError) as error:
            said = [
                (self.folder / name).read_text(errors="replace").splitlines()[-40:]
                for name in ("console", "qemu")
            ]
            lines = "\n".join(line for part in said for line in part)
            raise AssertionError(f"the guest does not answer ({error!r})\n{lines}") from None

    def _kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        self._exit.close()

    def __enter__(self) -> "InstalledGuest":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
