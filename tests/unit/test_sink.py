"""A new file that is written record by record, and what is in its place before."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from ivshmem.system.sink import Sink


def test_a_new_file_is_made_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    sink = Sink(str(path), replace=True)
    sink.write(b"record")
    assert path.read_bytes() == b"record"
    sink.remove()
    assert not path.exists()


def test_a_file_that_was_there_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"longer before")
    with pytest.raises(FileExistsError):
        Sink(str(path))
    assert path.read_bytes() == b"longer before"
    sink = Sink(str(path), replace=True)
    sink.write(b"record")
    sink.remove()
    assert path.read_bytes() == b"record"


@pytest.mark.parametrize("made_by_the_first", [True, False])
def test_two_at_once(tmp_path: Path, made_by_the_first: bool) -> None:
    path = tmp_path / "file"
    if not made_by_the_first:
        path.touch()
    first = Sink(str(path), replace=True)
    first.write(b"first")
    with pytest.raises(OSError, match="another process writes it") as caught:
        Sink(str(path), replace=True)
    assert caught.value.filename == str(path)
    first.write(b", whole")
    first.close()
    assert path.read_bytes() == b"first, whole"
    last = Sink(str(path), replace=True)
    assert path.read_bytes() == b"first, whole"
    last.write(b"last")
    last.close()
    assert path.read_bytes() == b"last"


@pytest.mark.timeout(20)
@pytest.mark.parametrize("read", [False, True], ids=["unread", "read"])
def test_a_fifo_is_refused_at_once(tmp_path: Path, read: bool) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK) if read else -1
    try:
        with pytest.raises(OSError, match="not a regular file: choose another") as caught:
            Sink(str(path), replace=True)
    finally:
        if read:
            os.close(reader)
    assert caught.value.errno == errno.ENXIO
    assert path.is_fifo()


def test_a_device_stays() -> None:
    before = os.stat("/dev/null")
    with pytest.raises(OSError, match="not a regular file"):
        Sink("/dev/null", replace=True)
    assert os.stat("/dev/null").st_rdev == before.st_rdev
