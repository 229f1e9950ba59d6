"""The wheels of `make wheels`, also for aarch64 and for an interpreter without a GIL, in dist.

Knows: when they are stale. Does not know: what is tested with them.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import zipfile
from pathlib import Path

from support import debian, free_threaded, unpacked

HOME = debian.HOME
CROSS = ("aarch64-linux-gnu-gcc", "qemu-aarch64", "mmdebstrap")
_MADE_OF = ("src/", "systemd/", "packages/", "pyproject.toml", "setup.py", "README.md", "Makefile")


def missing() -> str:
    """What this machine lacks to build and run all of them; "" if it has all."""
    if any(shutil.which(tool) is None for tool in CROSS):
        return "apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user mmdebstrap"
    return ""


NAMES = ("python3.14t", "python3.13t")


def interpreter() -> str:
    """One without a GIL: the one that IVSHMEM_FREE_THREADED names, one on PATH, or our own build.

    Raises:
        unpacked.CannotError: it cannot be built.
    """
    kept = debian.cache_folder().with_name("free-threaded")
    there = os.environ.get("IVSHMEM_FREE_THREADED") or next(
        filter(None, map(shutil.which, NAMES)), ""
    )
    return there or str(free_threaded.make(kept))


def folder() -> Path:
    """The folder with the wheels; built if this source was not built yet.

    Raises:
        unpacked.CannotError: they cannot be built.
    """
    free = interpreter()
    digest = hashlib.sha256(free.encode())
    for name in sorted(debian.sources()):
        if name.startswith(_MADE_OF):
            digest.update(name.encode() + hashlib.sha256((HOME / name).read_bytes()).digest())
    target, known = HOME / "dist", HOME / "build/wheels.digest"
    known.parent.mkdir(exist_ok=True)
    with known.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two workers at once: the second finds the first's
        fresh = known.exists() and known.read_text() == digest.hexdigest()
        if not (fresh and list(target.glob("*.whl"))):
            unpacked.run("make", "wheels", "AARCH64=1", f"FREE_THREADED={free}", cwd=HOME)
            known.write_text(digest.hexdigest())
    return target


def wheel(pattern: str) -> Path:
    """The wheel whose tags fit a pattern, such as `cp313-cp313t-*`."""
    (found,) = folder().glob(f"ivshmem-*-{pattern}.whl")
    return found


def extracted(pattern: str, target: Path) -> Path:
    """A folder for PYTHONPATH with the files of a wheel."""
    with zipfile.ZipFile(wheel(pattern)) as archive:
        archive.extractall(target)
    return target
