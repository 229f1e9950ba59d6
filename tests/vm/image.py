"""The kernel and the initramfs that a test guest boots.

Knows: Debian's kernel package, modules and what they depend on, the cache.
Does not know: QEMU's command line, or what the guest is for.

Neither is compressed: of the 4.4 seconds that Debian's own bzImage takes to reach init, its
decompressor takes 2.4, emulated as it is. QEMU enters an ELF kernel by its PVH note.
"""

import fcntl
import functools
import hashlib
import lzma
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from support.emulator import QEMU

from . import newc
from .newc import Newc

INIT = Path(__file__).parent / "inside" / "init"

# What a guest needs for its program's channel; what it needs to reach the host's files; what vfio
# needs on top; a network card, for measurements; drivers that take any PCI device they are told to.
# The modules that these depend on are added.
MODULES = {
    "base": ("virtio_pci", "virtio_console"),
    "files": ("9pnet_virtio", "9p", "overlay"),
    "vfio": ("irqbypass", "vfio_virqfd", "vfio_iommu_type1", "vfio_pci"),
    "net": ("virtio_net",),
    "drivers": ("uio_pci_generic", "pci_stub"),
}
# Modules that some kernels lack: built in, or merged into another (vfio_virqfd, in newer ones).
OPTIONAL = {"overlay", "irqbypass", "vfio_virqfd"}

APPLETS = ("sh", "mkdir", "mount", "insmod", "usleep", "env", "chroot", "poweroff")

# What must be installed, as Debian names it, for each program needed.
PACKAGES = {
    QEMU: "qemu-system-x86",
    "apt-get": "apt",
    "dpkg-deb": "dpkg",
    "setpriv": "util-linux",
}


@dataclass(frozen=True)
class Image:
    """What QEMU's -kernel and -initrd take; `modules`: whether there are any to load."""

    kernel: Path
    initrd: Path
    modules: bool = True


def missing() -> str | None:
    """One line on what must be installed before a guest can boot, or None."""
    packages = [package for program, package in PACKAGES.items() if not shutil.which(program)]
    if _busybox() is None:
        packages.append("busybox-static")
    if packages:
        return f"vm tests need: apt-get install {' '.join(packages)}"
    if kernel_package() is None:
        return "vm tests need Debian's package lists (no linux-image-amd64 known): apt-get update"
    return None


@functools.cache
def prepare() -> Image:
    """The image to boot: from the cache, or fetched and built, which takes some seconds.

    Raises:
        RuntimeError: something is missing, or the package cannot be fetched. Nothing half-done
            stays in the cache.
    """
    package, busybox = kernel_package(), _busybox()
    if package is None or busybox is None:
        raise RuntimeError(missing())
    kept = cache()
    recipe = hashlib.sha256()
    for source in (Path(__file__), Path(newc.__file__), INIT, busybox):
        recipe.update(source.read_bytes())
    with locked(kept / "lock"):
        deb = fetched(kept, package)
        built = kept / f"{deb.stem}-{recipe.hexdigest()[:12]}"
        if not built.exists():
            _build(deb, busybox, built)
    return Image(built / "kernel", built / "initrd")


def cache() -> Path:
    """The folder where what takes long to make is kept."""
    kept = Path(os.environ.get("IVSHMEM_VM_CACHE") or Path.home() / ".cache" / "ivshmem-vm")
    kept.mkdir(parents=True, exist_ok=True)
    return kept


def _busybox() -> Path | None:
    """A statically linked busybox: the initramfs has no libraries."""
    found = shutil.which("busybox")
    # A dynamic executable names its loader (program header PT_INTERP) at the start of the file.
    return Path(found) if found and b"/ld-linux" not in Path(found).read_bytes()[:4096] else None


@functools.cache
def kernel_package() -> str | None:
    """The newest kernel's package; not the cloud variant, which lacks 9p, and not rt or dbg."""
    depends = subprocess.run(
        ["apt-cache", "depends", "linux-image-amd64"], capture_output=True, text=True, check=False
    )
    names = re.findall(r"Depends: (linux-image-\d\S*-amd64)$", depends.stdout, re.MULTILINE)
    real = [name for name in names if not re.search(r"-(cloud|rt|dbg)\b", name)]
    return real[0] if real else None


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Two test runs at once: the second waits and then finds what the first has built."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """A folder to work in, and a path in it that becomes `target` in one step if all goes well."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="tmp-") as work:
        yield Path(work) / "new"
        (Path(work) / "new").rename(target)


def fetched(cache: Path, package: str) -> Path:
    """The file of a Debian package, from the cache or from the archive.

    Raises:
        RuntimeError: it cannot be fetched.
    """
    have = sorted(cache.glob(f"{package}_*.deb"))
    if have:
        return have[-1]
    with tempfile.TemporaryDirectory(dir=cache, prefix="tmp-") as work:
        # Run by root, apt would drop to a user who may not write here, and complain.
        user = ["-o", "APT::Sandbox::User=root"] if os.geteuid() == 0 else []
        run("apt-get", *user, "-q", "download", package, cwd=work)
        (deb,) = Path(work).glob("*.deb")
        return deb.rename(cache / deb.name)


def _build(deb: Path, busybox: Path, target: Path) -> None:
    with appearing(target) as new, tempfile.TemporaryDirectory(dir=target.parent) as unpacked:
        run("dpkg-deb", "-x", str(deb), unpacked)
        (vmlinuz,) = Path(unpacked).glob("boot/vmlinuz-*")
        new.mkdir()
        (new / "kernel").write_bytes(_uncompressed(vmlinuz.read_bytes()))
        (new / "initrd").write_bytes(_initramfs(busybox, ModuleTree(Path(unpacked))))


def run(*command: str, cwd: str | None = None) -> None:
    """Run a program to its end.

    Raises:
        RuntimeError: it failed; the message has what it wrote to stderr.
    """
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: status {done.returncode}\n{done.stderr.strip()}")


def _uncompressed(bzimage: bytes) -> bytes:
    """The ELF kernel inside a bzImage; or the bzImage, which boots too, if it can't be unpacked."""
    sectors = bzimage[0x1F1]
    offset, length = struct.unpack_from("<II", bzimage, 0x248)  # payload_offset, _length
    start = (sectors + 1) * 512 + offset
    payload = bzimage[start : start + length]
    # The kernel's build appends the unpacked size; a decompressor object stops before that.
    if payload.startswith(b"\xfd7zXZ"):
        return lzma.LZMADecompressor().decompress(payload)
    if payload.startswith(b"\x28\xb5\x2f\xfd") and shutil.which("zstd"):
        zstd = subprocess.run(
            ["zstd", "-dcq"], input=payload[:-4], capture_output=True, check=False
        )
        return zstd.stdout if zstd.returncode == 0 else bzimage
    return bzimage


class ModuleTree:
    """The modules of an unpacked package. It has no modules.dep: that is made at installation."""

    def __init__(self, root: Path) -> None:
        files = (
            *root.glob("lib/modules/*/kernel/**/*.ko*"),
            *root.glob("usr/lib/modules/*/kernel/**/*.ko*"),
        )
        self._files = {_canonical(path.name.split(".ko")[0]): path for path in files}
        lists = (
            *root.glob("lib/modules/*/modules.builtin"),
            *root.glob("usr/lib/modules/*/modules.builtin"),
        )
        self._built_in = {
            _canonical(Path(line).name.split(".ko")[0])
            for path in lists
            for line in path.read_text().split()
        }

    def read(self, name: str) -> bytes:
        """The module itself: busybox's insmod wants it uncompressed."""
        path = self._files[name]
        data = path.read_bytes()
        return lzma.decompress(data) if path.suffix == ".xz" else data

    def closure(self, names: Iterable[str]) -> list[str]:
        """These modules and all that they depend on, in the order to load them."""
        order: list[str] = []
        for name in map(_canonical, names):
            if name in self._files:
                depends = re.search(rb"\0depends=([^\0]+)\0", self.read(name))
                needed = depends[1].decode().split(",") if depends else []
                order += [module for module in (*self.closure(needed), name) if module not in order]
            elif name not in OPTIONAL and name not in self._built_in:
                raise RuntimeError(f"the kernel package has no module {name}")
        return order


def _canonical(module: str) -> str:
    return module.replace("-", "_")


def bare_initramfs() -> bytes:
    """An initramfs for a kernel that has built in what a guest needs."""
    busybox = _busybox()
    if busybox is None:
        raise RuntimeError(missing())
    return _initramfs(busybox, None)


def _initramfs(busybox: Path, modules: ModuleTree | None) -> bytes:
    archive = Newc()
    for folder in ("bin", "dev", "modules", *(f"modules/{name}" for name in MODULES)):
        archive.folder(folder)
    archive.file("bin/busybox", busybox.read_bytes(), executable=True)
    for applet in APPLETS:
        archive.link(f"bin/{applet}", "busybox")
    for name, wanted in MODULES.items():
        for number, module in enumerate(modules.closure(wanted) if modules is not None else ()):
            assert modules is not None
            archive.file(f"modules/{name}/{number:02}-{module}.ko", modules.read(module))
    archive.file("init", INIT.read_bytes(), executable=True)
    return archive.finish()
