"""The guard of all tests notices what a test leaves behind."""

from __future__ import annotations

import mmap
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
from bench import in_memory
from support.leaks import OWN, SHM, Guard, names_in


def a_mapping() -> mmap.mmap:
    """Of a file; Python keeps a descriptor beside it."""
    with tempfile.TemporaryFile() as file:
        file.truncate(mmap.PAGESIZE)
        return mmap.mmap(file.fileno(), 0)


def anonymous_memory() -> mmap.mmap:
    return mmap.mmap(-1, mmap.PAGESIZE)


def a_descriptor() -> IO[bytes]:
    return open(os.devnull, "rb")


def a_name() -> Path:
    path = SHM / f"{OWN}left"
    path.touch()
    return path


KINDS: dict[Callable[[], Any], str] = {
    a_mapping: "mapping",
    anonymous_memory: "mapping",
    a_descriptor: "descriptor",
    a_name: "name in /dev/shm",
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("leave", KINDS)
def test_what_a_test_leaves_is_noticed(leave: Callable[[], Any]) -> None:
    guard = Guard()
    for _ in range(2):  # the second time the guard knows what was here before
        guard.begin()
        assert guard.left() == []
        guard.begin()
        left = leave()
        assert KINDS[leave] in [each.partition(":")[0] for each in guard.left()]
        left.unlink() if isinstance(left, Path) else left.close()
        assert guard.left() == []


def test_garbage_is_collected_first() -> None:
    guard = Guard()
    guard.begin()
    circle: list[Any] = [a_mapping()]
    circle.append(circle)
    del circle
    assert guard.left() == []


def test_private_memory_is_no_matter() -> None:
    guard = Guard()
    guard.begin()
    memory = bytearray(64 << 20)
    assert guard.left() == []
    assert len(memory) == 64 << 20


def test_temporary_names_in_memory_tell_whose_they_are() -> None:
    """Elsewhere a name that comes while a test runs would count as the test's."""
    root = Path(__file__).parents[2]
    made = re.compile(r"Temporary\w+\(|mkd?s?temp\(")
    files = [*(root / "bench").rglob("*.py"), *(root / "tests").rglob("*.py")]
    found = [
        f"{file.relative_to(root)}: {line.strip()}"
        for file in files
        for line in file.read_text().splitlines()
        if made.search(line) and re.search(r"dir=(SHM|\"/dev/shm)", line)
    ]
    assert [each.partition(":")[0] for each in found] == ["bench/in_memory.py"]
    with in_memory.folder() as folder:
        assert folder in [os.path.join(SHM, name) for name in names_in()]
        assert re.match(rf"ivshmem-bench-{os.getpid()}-", os.path.basename(folder))


def test_as_many_pages_can_be_others() -> None:
    """The test of the next module does not get the blame for a mapping that has been closed."""
    with anonymous_memory():
        guard = Guard()
        guard.begin()
        with a_mapping():
            guard.changed()
            guard.begin()
            guard.left()  # lists the mappings
        with anonymous_memory(), a_descriptor():
            guard.changed()
            guard.begin()
            assert guard.left() == []
