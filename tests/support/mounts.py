"""File systems and huge pages that a test makes for itself, and takes away again. Needs root."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

HUGE = Path("/sys/kernel/mm/hugepages")


@contextlib.contextmanager
def mounted(kind: str, options: str) -> Iterator[Path]:
    """A file system of that kind at a new directory."""
    place = Path(tempfile.mkdtemp(prefix="ivt", dir="/tmp"))
    subprocess.run(["mount", "-t", kind, "-o", options, "ivt", str(place)], check=True)
    try:
        yield place
    finally:
        # Lazily: a test that leaks must not leave the mount behind as well.
        subprocess.run(["umount", "--lazy", str(place)], check=True)
        place.rmdir()


@contextlib.contextmanager
def huge_pages(size: int, count: int) -> Iterator[int]:
    """Reserve `count` more pages of `size` bytes; yields how many of them there are.

    Other programs may reserve pages at the same time, so only the difference is put back.
    """
    knob = HUGE / f"hugepages-{size // 1024}kB" / "nr_hugepages"
    if not knob.exists():
        yield 0
        return
    got = _change(knob, count)
    for _ in range(3):
        if got >= count:
            break
        _gather_memory()
        got += _change(knob, count - got)
    try:
        yield got
    finally:
        _change(knob, -got)


def _gather_memory() -> None:
    """Let the kernel drop what it only caches, and move the rest together: see proc_sys_vm(5)."""
    os.sync()
    for name, value in (("drop_caches", "3"), ("compact_memory", "1")):
        with contextlib.suppress(OSError):
            Path("/proc/sys/vm", name).write_text(value)


def _change(knob: Path, difference: int) -> int:
    with knob.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = int(knob.read_text())
        with contextlib.suppress(OSError):
            knob.write_text(str(max(before + difference, 0)))
        return int(knob.read_text()) - before


def free_huge_pages(size: int) -> int:
    """How many pages nobody has or has reserved."""
    knobs = HUGE / f"hugepages-{size // 1024}kB"
    free, reserved = (
        int((knobs / name).read_text()) for name in ("free_hugepages", "resv_hugepages")
    )
    return free - reserved


root = os.geteuid() == 0
