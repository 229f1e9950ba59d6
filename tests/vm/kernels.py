"""Kernels and modules that Debian does not have: built here, and kept in the cache.

Knows: Debian's packages of headers and sources, the kernel's build. Does not know: what the guests
do with them.
"""

import ctypes.util
import functools
import hashlib
import inspect
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from . import image

SOURCES = Path(__file__).parent / "kernel"
DRIVER = SOURCES / "uio_doorbell.c"
CONFIG = SOURCES / "noiommu.config"

# Of Debian, beside those of image.PACKAGES.
FOR_MODULES = {"gcc": "gcc", "make": "make"}
FOR_KERNELS = {**FOR_MODULES, "flex": "flex", "bison": "bison", "bc": "bc", "xz": "xz-utils"}

# The kernel's objtool comes built with the headers, and is compiled with a kernel.
LIBELF = "elf"
LIBELF_HEADER = Path("/usr/include/libelf.h")


def missing_for_modules() -> str | None:
    """One line on what must be installed to build a module, or None."""
    there = ctypes.util.find_library(LIBELF) is not None
    return _missing("a UIO driver", FOR_MODULES, *([] if there else ["libelf1"]))


def missing_for_kernels() -> str | None:
    """One line on what must be installed to build a kernel, or None."""
    there = LIBELF_HEADER.exists()
    return _missing("a no-IOMMU kernel", FOR_KERNELS, *([] if there else ["libelf-dev"]))


def _missing(what: str, needed: dict[str, str], *more: str) -> str | None:
    packages = [package for program, package in needed.items() if not shutil.which(program)]
    packages += more
    return f"to build {what}: apt-get install {' '.join(packages)}" if packages else None


def _recipe(source: Path, *steps: Callable[..., object]) -> str:
    """Changes when the result of these steps may be another one."""
    text = "".join(inspect.getsource(step) for step in steps)
    return hashlib.sha256(source.read_bytes() + text.encode()).hexdigest()[:12]


@functools.cache
def uio_driver() -> Path:
    """The module uio_doorbell.ko for the kernel that image.prepare() boots; takes some seconds.

    Raises:
        RuntimeError: a package cannot be fetched, or the build fails.
    """
    kept, kernel = image.cache(), image.kernel_package()
    if kernel is None:
        raise RuntimeError(image.missing())
    release = kernel.removeprefix("linux-image-")
    common = f"linux-headers-{release.removesuffix('-amd64')}-common"
    names = (f"linux-headers-{release}", common, _kbuild(f"linux-headers-{release}"))
    target = kept / f"uio_doorbell-{release}-{_recipe(DRIVER, _build_module)}"
    with image.locked(kept / "lock-module"):
        if not target.exists():
            debs = [image.fetched(kept, name) for name in names]
            with image.appearing(target) as new, tempfile.TemporaryDirectory(dir=kept) as work:
                for deb in debs:
                    image.run("dpkg-deb", "-x", str(deb), work)
                new.mkdir()
                _build_module(Path(work) / "usr/src", release, new)
    return target / "uio_doorbell.ko"


def _kbuild(headers: str) -> str:
    """The package with the kernel's build programs for these headers."""
    done = subprocess.run(
        ["apt-cache", "depends", headers], capture_output=True, text=True, check=False
    )
    words = done.stdout.split()
    return next(word for word in words if word.startswith("linux-kbuild-"))


def _build_module(sources: Path, release: str, target: Path) -> None:
    headers = sources / f"linux-headers-{release}"
    common = sources / f"linux-headers-{release.removesuffix('-amd64')}-common"
    # It names the place where the package would be installed.
    (headers / "Makefile").write_text(f"include {common}/Makefile\n")
    work = sources / "module"
    work.mkdir()
    shutil.copy(DRIVER, work)
    (work / "Kbuild").write_text(f"obj-m := {DRIVER.stem}.o\n")
    image.run("make", "-s", "-C", str(headers), f"M={work}", "CC=gcc", "modules")
    shutil.copy(work / f"{DRIVER.stem}.ko", target)


@functools.cache
def noiommu() -> image.Image:
    """A kernel with vfio's no-IOMMU mode, and an initramfs; takes minutes, if it is not kept.

    Raises:
        RuntimeError: the sources cannot be fetched, or the build fails.
    """
    kept, kernel = image.cache(), image.kernel_package()
    if kernel is None:
        raise RuntimeError(image.missing())
    package = "linux-source-" + ".".join(kernel.split("-")[2].split(".")[:2])
    with image.locked(kept / "lock-noiommu"):
        deb = image.fetched(kept, package)
        target = kept / f"{deb.stem}-noiommu-{_recipe(CONFIG, _build_kernel)}"
        if not target.exists():
            with image.appearing(target) as new, tempfile.TemporaryDirectory(dir=kept) as work:
                image.run("dpkg-deb", "-x", str(deb), work)
                (archive,) = Path(work).glob("usr/src/linux-source-*.tar.xz")
                sources = Path(work) / "linux"
                sources.mkdir()
                image.run("tar", "-xf", str(archive), "-C", str(sources), "--strip-components=1")
                new.mkdir()
                _build_kernel(sources, new)
    initramfs = image.bare_initramfs()
    initrd = target / f"initrd-{hashlib.sha256(initramfs).hexdigest()[:12]}"
    if not initrd.exists():
        initrd.write_bytes(initramfs)
    return image.Image(target / "kernel", initrd, modules=False)


def _build_kernel(sources: Path, target: Path) -> None:
    make = ("nice", "make", "-s", "-C", str(sources), "ARCH=x86_64", f"-j{os.cpu_count() or 1}")
    image.run(*make, "tinyconfig")
    merge = (str(sources / "scripts/kconfig/merge_config.sh"), "-m", ".config", str(CONFIG))
    image.run(*merge, cwd=str(sources))
    image.run(*make, "olddefconfig")
    settings = (sources / ".config").read_text().splitlines()
    wanted = [line for line in CONFIG.read_text().splitlines() if line.startswith("CONFIG_")]
    if lost := [line for line in wanted if line not in settings]:
        raise RuntimeError(f"this kernel cannot be built with {' '.join(lost)}")
    image.run(*make, "vmlinux")
    shutil.copy(sources / "vmlinux", target / "kernel")
