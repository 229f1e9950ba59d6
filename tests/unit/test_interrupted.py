"""Ctrl-C at each line of what opens files and memory: every descriptor has one owner.

A KeyboardInterrupt is raised by a trace function before one line after another. A descriptor
that is closed twice shows, since other files take the numbers that are free before the frames of
the exception go, and with them the owners that they hold.
"""

from __future__ import annotations

import gc
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
from support.ctrl_c import finalizes, finalizing_quietly
from support.leaks import open_fds

import ivshmem
import ivshmem.memory.image
from ivshmem import Region
from ivshmem.cli import pid_file
from ivshmem.guest.device import GuestDevice
from ivshmem.migration import Options, Plan, Step, Vm
from ivshmem.migration.state_file import StateFile
from ivshmem.native import descriptors
from ivshmem.system import new_files

# The interpreter ignores what is raised while it finalizes an object.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

# The modules that own descriptors.
MODULES = (
    "cli/pid_file",
    "guest/device",
    "guest/choice",
    "memory/image",
    "migration/state_file",
    "memory/region",
    "system/safe_files",
    "system/new_files",
)
FILES = {f"{os.path.dirname(ivshmem.__file__)}/{module}.py" for module in MODULES}
SIZE = 1 << 16
PLAN = Plan((Vm("a", "/a", "/a2", "unix:/u"),), Options(), (), (Step("migrate", "a"),), ())


class Interrupter:
    """Raises KeyboardInterrupt before line number `at` that those modules run."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in FILES or finalizes(frame):
            return None
        if event in ("call", "line"):
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self


def interrupted(call: Callable[[], object], at: int) -> bool:
    """Whether the call was interrupted; whatever it did, no file of ours was closed by it."""
    fillers: list[int] = []
    try:
        sys.settrace(Interrupter(at))
        try:
            call()
        finally:
            sys.settrace(None)
        return False
    except KeyboardInterrupt:
        fillers = [os.open("/dev/null", os.O_RDONLY) for _ in range(6)]  # takes the free numbers
        return True
    finally:
        for filler in fillers:
            assert os.readlink(f"/proc/self/fd/{filler}") == "/dev/null"
        kept.extend(fillers)


kept: list[int] = []  # of the last call, until its frames are gone


def at_each_line(call: Callable[[], object], after: Callable[[], object]) -> int:
    """Interrupt a call before each line; returns how many it runs."""
    gc.collect()
    before = open_fds()
    for at in range(1, 20_000):
        with finalizing_quietly(), warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # of a region nobody was given
            again = interrupted(call, at)
        for filler in kept:  # the exception is gone, and so are its frames
            assert os.readlink(f"/proc/self/fd/{filler}") == "/dev/null", f"closed twice at {at}"
            os.close(filler)
        kept.clear()
        if open_fds() != before:
            gc.collect()  # an exception that was interrupted while it was handled is in a cycle
        assert open_fds() == before, f"left open at {at}"
        after()
        if not again:
            return at
    raise AssertionError("it does not end")


WAYS: dict[str, Callable[[Path], object]] = {
    "anonymous": lambda _: Region.create(SIZE).close(),
    "file": lambda place: Region.create(SIZE, path=place / "new").close(),
    "replaced": lambda place: Region.create(SIZE, path=place / "old", replace=True).close(),
    "adopted": lambda place: Region.create(SIZE, path=place / "empty").close(),
    "directory": lambda place: Region.create(SIZE, directory=place).close(),
    "attached": lambda place: Region.attach(path=place / "old").close(),
    "refused": lambda place: refused(place / "odd"),
    "image": lambda place: ivshmem.memory.image.read_info(place / "image"),
    "state": lambda place: StateFile.create(place / "state", PLAN).__exit__(),
    "loaded": lambda place: StateFile.load(place / "former").__exit__(),
    "pid file": lambda place: with_pid_file(place / "pid"),
    "device": lambda place: device(place / "old"),
}


def refused(path: Path) -> None:
    with pytest.raises(ivshmem.RegionError):
        Region.attach(path=path)


def with_pid_file(path: Path) -> None:
    with pid_file.held(str(path)):
        pass


def device(path: Path) -> None:
    self: Any = SimpleNamespace(device=SimpleNamespace(size=SIZE))
    file = descriptors.FdArray()
    file.open(str(path), os.O_RDWR)
    GuestDevice._map_memory(self, file, 0, "vfio", "a device")
    self.region.close()


@pytest.mark.sampled(6)
@pytest.mark.parametrize("way", WAYS)
def test_interrupted_anywhere(way: str, tmp_path: Path) -> None:
    names = {"old", "empty", "odd", "image", "former"}
    region = Region.create(SIZE, path=tmp_path / "old")
    ivshmem.save(region, tmp_path / "image")
    region.close()
    (tmp_path / "empty").touch()
    (tmp_path / "odd").write_bytes(b"odd")
    StateFile.create(tmp_path / "former", PLAN).__exit__()

    def after() -> None:
        """No draft is left, and what has a name is whole."""
        found = set(os.listdir(tmp_path))
        assert found <= names | {"new", "state", "pid"}
        assert (tmp_path / "old").stat().st_size == SIZE
        assert (tmp_path / "empty").stat().st_size in (0, SIZE)
        os.truncate(tmp_path / "empty", 0)
        for name in found - names:
            assert name == "pid" or (tmp_path / name).stat().st_size
            (tmp_path / name).unlink()

    assert at_each_line(lambda: WAYS[way](tmp_path), after) > 20


def test_from_a_descriptor() -> None:
    """It is owned once; before the first line it is its caller's."""
    memory = os.memfd_create("test")
    os.ftruncate(memory, SIZE)
    for at in range(1, 1000):
        copy = os.dup(memory)
        with finalizing_quietly(), warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            again = interrupted(lambda: Region.from_fd(copy).close(), at)  # noqa: B023
        for filler in kept:
            assert os.readlink(f"/proc/self/fd/{filler}") == "/dev/null", f"closed twice at {at}"
            os.close(filler)
        kept.clear()
        if copy in open_fds():
            os.close(copy)
        if not again:
            break
    assert at > 20
    os.close(memory)


def test_a_draft_with_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the file system has no files without names, an interrupt leaves none either."""
    monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY | os.O_CREAT)

    def make() -> None:
        with new_files.NewFile(tmp_path / "it") as draft:
            os.write(draft.file[0], b"whole")
            draft.publish()
        draft.file.close()

    def after() -> None:
        found = os.listdir(tmp_path)
        # What an interrupt in the middle of the cleaning up leaves, the next draft removes.
        assert set(found) <= {"it", ".it.ivshmem-0"}
        if "it" in found:
            assert (tmp_path / "it").read_bytes() == b"whole"
            (tmp_path / "it").unlink()

    assert at_each_line(make, after) > 20
