#!/usr/bin/env python3
"""Unpacks the newest QEMU that Debian has into a folder, and prints the path of its program.

    QEMU=$(python3 tests/vm/newest_qemu.py FOLDER) && make test QEMU="$QEMU"

Nothing is installed: the machine's own QEMU and libraries stay as they are. What is in FOLDER is
used again for 30 days. If Debian's newest suite cannot be unpacked today, an older copy of it
does, or the QEMU of Debian 13; stderr says so. Needs root, mmdebstrap and patchelf; only the
path goes to stdout.

Knows: Debian's mirrors and packages, what a program needs that is not where it was built for.
Does not know: what anybody does with a QEMU.
"""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROGRAM = "qemu-system-x86_64"
SUITES = ("sid", "trixie")  # the newest one, and the stable one that does instead
PACKAGES = ("qemu-system-x86", "qemu-system-data", "seabios", "ipxe-qemu")
TOOLS = ("mmdebstrap", "patchelf")
FRESH = 30 * 86400.0  # seconds
LIMIT = 900.0  # seconds for fetching: it takes 90 here, most of which is the download


class CannotError(Exception):
    """Why it cannot be done, in one line."""


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print(f"usage: {sys.argv[0]} FOLDER", file=sys.stderr)
        return 2
    folder = Path(arguments[0]).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two runs at once: the second finds the first's
            found = newest(folder)
    except CannotError as error:
        print(f"newest_qemu: {error}", file=sys.stderr)
        return 1
    print(f"newest_qemu: {_version(found)}", file=sys.stderr)
    print(found)
    return 0


def newest(folder: Path) -> Path:
    """The program, of the newest suite that can be had."""
    reason = ""
    for suite in SUITES:
        kept = folder / suite
        works = _works(kept)
        if works and _age(kept) < FRESH:
            return _program(kept)
        try:
            unpack(suite, kept)
            return _program(kept)
        except CannotError as error:
            print(f"newest_qemu: {suite} cannot be unpacked: {error}", file=sys.stderr)
            reason = reason or f"{suite}: {error}"
        if works:
            print(f"newest_qemu: {kept} does, though it is old", file=sys.stderr)
            return _program(kept)
    raise CannotError(f"neither {' nor '.join(SUITES)} can be unpacked ({reason})")


def unpack(suite: str, target: Path) -> None:
    """Put a suite's QEMU into a folder, in the place of what is there.

    Raises:
        CannotError: nothing has changed.
    """
    if missing := [tool for tool in TOOLS if not shutil.which(tool)]:
        raise CannotError(f"apt-get install {' '.join(missing)}")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="tmp-") as work:
        new = Path(work) / "new"
        _run(
            *("mmdebstrap", "--variant=extract", f"--include={','.join(PACKAGES)}"),
            # A mirror can be a snapshot of a former day.
            '--aptopt=Acquire::Check-Valid-Until "false"',
            '--aptopt=APT::Install-Recommends "false"',
            *("--skip=cleanup,check/empty", suite, str(new), _mirror()),
        )
        shutil.rmtree(new / "var")  # the packages, and lists of all that there are
        _settle(new, target)
        old = Path(work) / "old"
        if target.exists():
            target.rename(old)
        new.rename(target)
        if not _works(target):
            target.rename(new)
            if old.exists():
                old.rename(target)
            raise CannotError("it was unpacked, and does not run here")


def _settle(new: Path, target: Path) -> None:
    """Have the program find in `target` all that it looks for in /usr."""
    program = _program(new)
    libraries = target / "usr/lib/x86_64-linux-gnu"
    # Its own loader and C library. Started by way of the loader, the process would have its name.
    _run(
        *("patchelf", "--set-interpreter", str(target / "usr/lib64/ld-linux-x86-64.so.2")),
        *("--force-rpath", "--set-rpath", f"{libraries}:{libraries}/systemd", str(program)),
    )
    # QEMU looks for firmware and modules below this folder beside the program, if it is there: as
    # it does when it is run from where it was built. Those of the host's QEMU would end it.
    bundle = program.parent / "qemu-bundle"
    bundle.mkdir()
    (bundle / "usr").symlink_to("../../../usr")


def _mirror() -> str:
    """Where this machine's own packages come from."""
    wanted = ("Created-By: Packages", "Label: Debian")
    listed = _done("apt-get", "indextargets", "--format", "$(SITE)", *wanted)
    sites = [line for line in listed.stdout.split() if "://" in line]
    if not sites:
        raise CannotError("apt knows no mirror of Debian: apt-get update")
    return sites[0]


def _done(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        timeout=LIMIT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )


def _run(*command: str) -> None:
    try:
        done = _done(*command)
    except subprocess.TimeoutExpired:
        raise CannotError(f"{command[0]} did not end within {LIMIT:g} seconds") from None
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if line.startswith(("E:", "error"))]
        last = (lines or done.stdout.splitlines() or ["no word"])[-1]
        raise CannotError(f"{command[0]}: status {done.returncode}: {last}")


def _program(kept: Path) -> Path:
    return kept / "usr/bin" / PROGRAM


def _version(program: Path) -> str:
    shown = _done(str(program), "--version")
    return shown.stdout.partition("\n")[0] if not shown.returncode else ""


def _works(kept: Path) -> bool:
    """Whether the program runs, and has the device that this is about."""
    program = _program(kept)
    if not program.exists() or not _version(program):
        return False
    devices = _done(str(program), "-device", "help")
    return devices.returncode == 0 and "ivshmem-doorbell" in devices.stdout


def _age(kept: Path) -> float:
    return time.time() - _program(kept).stat().st_ctime


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
