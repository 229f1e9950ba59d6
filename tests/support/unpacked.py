"""A program of Debian's newest suite, unpacked into a folder: it runs beside the machine's own.

Nothing is installed: the machine's own programs and libraries stay as they are. What is in the
folder is used again for 30 days. If Debian's newest suite cannot be unpacked today, an older copy
of it is used, or the stable suite; stderr says so. Needs root, mmdebstrap and patchelf.

Knows: Debian's suites and mirrors, what a program needs that is not where it was built for.
Does not know: the program. `tests/vm/newest_qemu.py` and `tests/support/pythons.py` do.
"""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from pathlib import Path

SUITES = ("sid", "trixie")  # the newest one, and the stable one as a substitute
TOOLS = ("mmdebstrap", "patchelf")
FRESH = 30 * 86400.0  # seconds
LIMIT = 900.0  # seconds for fetching: it takes 90 here, most of which is the download
LIBRARIES = "usr/lib/x86_64-linux-gnu"


class CannotError(Exception):
    """Why it cannot be done, in one line."""


class Program(ABC):
    """What is unpacked.

    Attributes:
        name: of the script, before its messages.
        packages: what mmdebstrap includes; their dependencies come with them.
    """

    name: str
    packages: tuple[str, ...]

    @abstractmethod
    def path(self, root: Path) -> Path:
        """Where the program is, below the folder of a suite."""

    @abstractmethod
    def version(self, root: Path) -> str:
        """What it says of itself; "" if it does not run, or is not what we need."""

    def settle(self, new: Path, target: Path) -> None:
        """Have the program in `new` find in `target`, where it will be, all that it looks for.

        It gets its own loader and C library. Started by way of the loader, the process would have
        the loader's name.
        """
        libraries = target / LIBRARIES
        run(
            *("patchelf", "--set-interpreter", str(target / "usr/lib64/ld-linux-x86-64.so.2")),
            *("--force-rpath", "--set-rpath", f"{libraries}:{libraries}/systemd"),
            str(self.path(new)),
        )


def main(program: Program, arguments: list[str]) -> int:
    """Print the program's path and nothing else; return the exit status.

    Args:
        arguments: one, the folder, which is made if it is missing.
    """
    if len(arguments) != 1:
        print(f"usage: {sys.argv[0]} FOLDER", file=sys.stderr)
        return 2
    try:
        root = newest(program, Path(arguments[0]).absolute())
    except CannotError as error:
        print(f"{program.name}: {error}", file=sys.stderr)
        return 1
    print(f"{program.name}: {program.version(root)}", file=sys.stderr)
    print(program.path(root))
    return 0


def newest(program: Program, folder: Path) -> Path:
    """The root in which the program is, of the newest suite that can be unpacked."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two runs at once: the second finds the first's
        return _newest(program, folder)


def _newest(program: Program, folder: Path) -> Path:
    reason = ""
    for suite in SUITES:
        root = folder / suite
        works = bool(program.version(root))
        if works and time.time() - program.path(root).stat().st_ctime < FRESH:
            return root
        try:
            unpack(program, suite, root)
            return root
        except CannotError as error:
            print(f"{program.name}: {suite} cannot be unpacked: {error}", file=sys.stderr)
            reason = reason or f"{suite}: {error}"
        if works:
            print(f"{program.name}: {root} is used, though it is old", file=sys.stderr)
            return root
    raise CannotError(f"neither {' nor '.join(SUITES)} can be unpacked ({reason})")


def unpack(program: Program, suite: str, target: Path) -> None:
    """Put a suite's program into a folder, in the place of what is there.

    Raises:
        CannotError: nothing has changed.
    """
    if missing := [tool for tool in TOOLS if not shutil.which(tool)]:
        raise CannotError(f"apt-get install {' '.join(missing)}")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="tmp-") as work:
        new = Path(work) / "new"
        run(
            *("mmdebstrap", "--variant=extract", f"--include={','.join(program.packages)}"),
            # A mirror can be a snapshot of a former day.
            '--aptopt=Acquire::Check-Valid-Until "false"',
            '--aptopt=APT::Install-Recommends "false"',
            *("--skip=cleanup,check/empty", suite, str(new), mirror()),
        )
        shutil.rmtree(new / "var")  # the packages, and lists of all that there are
        program.settle(new, target)
        old = Path(work) / "old"
        if target.exists():
            target.rename(old)
        new.rename(target)
        if not program.version(target):
            target.rename(new)
            if old.exists():
                old.rename(target)
            raise CannotError("it was unpacked, and does not run here")


def mirror() -> str:
    """Where this machine's own packages come from.

    Raises:
        CannotError: apt does not know.
    """
    wanted = ("Created-By: Packages", "Label: Debian")
    listed = done("apt-get", "indextargets", "--format", "$(SITE)", *wanted)
    sites = [line for line in listed.stdout.split() if "://" in line]
    if not sites:
        raise CannotError("apt knows no mirror of Debian: apt-get update")
    return sites[0]


def done(*command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, and keep what it says on both streams."""
    return subprocess.run(
        command,
        cwd=cwd,
        timeout=LIMIT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )


def run(*command: str, cwd: Path | None = None) -> None:
    """Run a command.

    Raises:
        CannotError: with the last line of what it said.
    """
    try:
        ended = done(*command, cwd=cwd)
    except subprocess.TimeoutExpired:
        raise CannotError(f"{command[0]} did not end within {LIMIT:g} seconds") from None
    if ended.returncode:
        lines = [line for line in ended.stdout.splitlines() if line.startswith(("E:", "error"))]
        last = (lines or ended.stdout.splitlines() or ["no word"])[-1]
        raise CannotError(f"{command[0]}: status {ended.returncode}: {last}")
