"""Debian's Python for arm64, in a folder: qemu-user runs it, and wheels are built by its headers.

    python tests/support/arm64.py FOLDER    prints the folder with the headers

Nothing is installed. The folder is used again for 30 days. Needs root and mmdebstrap; to run
something in it, also qemu-user.

Knows: where a compiler for arm64 finds Python.h; how a program runs in there. Does not know: the
package.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # it is run by its path

from support import unpacked

SUITE, PYTHON = "bookworm", "python3.11"
# What the tests in debian/rules import.
PACKAGES = (
    "python3 libpython3-dev python3-hypothesis python3-numpy python3-pytest python3-pytest-timeout"
)
EMULATOR = "qemu-aarch64"
_LIBRARIES = "/usr/lib/aarch64-linux-gnu"  # numpy's are below it, where an installation links them


def root(folder: Path) -> Path:
    """The root of an arm64 system, with HEADERS.

    Raises:
        unpacked.CannotError: it cannot be unpacked.
    """
    if not shutil.which("mmdebstrap"):
        raise unpacked.CannotError("apt-get install mmdebstrap")
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / SUITE
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two runs at once: the second finds the first's
        if target.exists() and time.time() - target.stat().st_ctime < unpacked.FRESH:
            return target
        with tempfile.TemporaryDirectory(dir=folder, prefix="tmp-") as work:
            new = Path(work) / "new"
            unpacked.run(
                *("mmdebstrap", "--variant=extract", "--architectures=arm64"),
                f"--include={','.join(PACKAGES.split())}",
                '--aptopt=Acquire::Check-Valid-Until "false"',
                '--aptopt=APT::Install-Recommends "false"',
                *("--skip=cleanup,check/empty", SUITE, str(new), unpacked.mirror()),
            )
            shutil.rmtree(new / "var")
            # Apart from the headers of the C library: a cross compiler has its own.
            for part in (PYTHON, f"aarch64-linux-gnu/{PYTHON}"):
                shutil.copytree(new / "usr/include" / part, new / "headers" / part)
            shutil.rmtree(target, ignore_errors=True)
            new.rename(target)
    return target


def ran(
    place: Path, *arguments: str | Path, path: Path, cwd: Path, seconds: float = 1200
) -> subprocess.CompletedProcess[str]:
    """Run the Python of a root, with a folder in its path; stdout has both outputs."""
    paths = f"{_LIBRARIES}/blas:{_LIBRARIES}/lapack"
    emulated = (EMULATOR, "-L", place, "-E", f"LD_LIBRARY_PATH={paths}", place / "usr/bin" / PYTHON)
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return subprocess.run(
        [*emulated, "-B", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=seconds,
        cwd=cwd,
        env={**kept, "PYTHONPATH": str(path)},
    )


def cache_folder() -> Path:
    """Where the root is kept."""
    kept = os.environ.get("IVSHMEM_VM_CACHE") or Path.home() / ".cache" / "ivshmem-vm"
    return Path(kept) / "arm64"


if __name__ == "__main__":
    try:
        print(root(Path(sys.argv[1]).absolute()) / "headers")
    except unpacked.CannotError as error:
        sys.exit(f"arm64: {error}")
