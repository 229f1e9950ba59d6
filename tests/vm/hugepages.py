"""Huge pages for a test, put back as they were found. Needs root."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def reserved(count: int, size: int) -> Iterator[None]:
    """`count` free huge pages of `size` bytes while the block runs."""
    knobs = Path(f"/sys/kernel/mm/hugepages/hugepages-{size // 1024}kB")
    before = int((knobs / "nr_hugepages").read_text())
    free = int((knobs / "free_hugepages").read_text())
    try:
        (knobs / "nr_hugepages").write_text(str(before + max(count - free, 0)))
        got = int((knobs / "free_hugepages").read_text())
        assert got >= count, f"the kernel found {got} huge pages, not {count}: memory is short"
        yield
    finally:
        (knobs / "nr_hugepages").write_text(str(before))


@contextmanager
def mounted(path: Path, size: int) -> Iterator[Path]:
    """A hugetlbfs with pages of `size` bytes, mounted on `path` while the block runs."""
    path.mkdir()
    mount = ["mount", "-t", "hugetlbfs", "-o", f"pagesize={size >> 20}M", "none", str(path)]
    subprocess.run(mount, check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)
