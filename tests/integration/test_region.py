"""Shared memory from every source: made, attached, sealed, refused, and nothing left behind.

Huge pages and a lack of space are test_region_shortage's.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.children import python
from support.leaks import SHM, open_fds, resources
from support.limits import free_fds
from support.peer import memory_fd
from support.waiting import PATIENCE

from ivshmem import ClosedError, Region, RegionError
from ivshmem.memory.region import posix_path

PAGE = mmap.PAGESIZE
MIB = 1 << 20


# -- each way of making one -----------------------------------------------------------------------


def use(region: Region) -> None:
    """It is zeroed, can be written, and is seen by others of the same file."""
    with memoryview(region) as view:
        assert view.nbytes == region.size
        assert not any(view[:: PAGE // 2])
        view[0], view[-1] = 1, 2
        with Region.from_fd(os.dup(region.fileno())) as again, memoryview(again) as mirror:
            assert (mirror[0], mirror[-1]) == (1, 2)


def test_anonymous() -> None:
    with Region.create("1M") as region:
        use(region)
        info = region.info()
        assert info == (
            MIB, PAGE, "anonymous", None, MIB, 0, False, True, None,
        )  # fmt: skip
        assert repr(region) == "<ivshmem.Region anonymous, 1M>"
        assert "memfd:" in os.readlink(f"/proc/self/fd/{region.fileno()}")
        assert not os.get_inheritable(region.fileno())
        assert not os.access(f"/proc/self/fd/{region.fileno()}", os.X_OK) or os.geteuid() == 0
        assert not region.unlink()
    assert repr(region) == "<ivshmem.Region anonymous, closed>"


def test_a_terabyte_of_holes() -> None:
    """To say what is in memory of it takes no time: only what there is, is looked at."""
    fd = os.memfd_create("large")
    os.ftruncate(fd, 1 << 40)
    os.pwrite(fd, b"here", 1 << 39)
    with Region.from_fd(fd) as region:
        started = time.monotonic()
        assert region.info().resident == PAGE
        assert list(region.extents()) == [(1 << 39, (1 << 39) + PAGE)]
        assert list(region.extents(1 << 39, (1 << 39) + 5)) == [(1 << 39, (1 << 39) + 5)]
        assert list(region.extents((1 << 39) + PAGE)) == []
        assert time.monotonic() - started < 5


def test_posix_name(shm_name: str) -> None:
    with Region.create("1M", name=shm_name) as region:
        use(region)
        status = (SHM / shm_name).stat()
        assert status.st_size == MIB
        assert stat.S_IMODE(status.st_mode) == 0o600
        info = region.info()
        assert (info.source, info.name, info.sealed) == ("posix", shm_name, False)
        assert info.resident == MIB, "a tmpfs's pages are taken at once, or they might be missing"
    assert (SHM / shm_name).exists(), "a name outlives the region"
    (SHM / shm_name).unlink()


def test_posix_name_with_a_slash(shm_name: str) -> None:
    """As shm_open(3) and QEMU's tools write it; another program finds it by either."""
    with Region.create(PAGE, name="/" + shm_name) as region:
        with Region.attach(name=shm_name) as again:
            assert os.path.sameopenfile(region.fileno(), again.fileno())
        assert region.unlink()


def test_unlink_without_a_free_descriptor(shm_name: str) -> None:
    with Region.create(PAGE, name=shm_name) as region:
        with free_fds(0):
            assert region.unlink()
        assert not (SHM / shm_name).exists()
        (SHM / shm_name).write_bytes(b"another's")
        with free_fds(0):
            assert not region.unlink()
        (SHM / shm_name).unlink()


def test_file(directory: Path) -> None:
    path = directory / "memory"
    with Region.create("1M", path=path, mode=0o640) as region:
        use(region)
        assert path.stat().st_size == MIB
        assert path.stat().st_blocks * 512 >= MIB, "space is taken at once"
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        assert (region.info().source, region.info().name) == ("file", str(path))
    data = path.read_bytes()
    assert (data[0], data[-1]) == (1, 2)


def test_directory(directory: Path) -> None:
    with Region.create("1M", directory=directory) as region:
        use(region)
        assert os.listdir(directory) == []
        assert (region.info().source, region.info().name) == ("directory", str(directory))
        assert not region.unlink()


@pytest.mark.parametrize("source", ["anonymous", "name", "path", "directory"])
def test_prealloc(directory: Path, shm_name: str, source: str) -> None:
    place: dict[str, object] = {
        "anonymous": {},
        "name": {"name": shm_name},
        "path": {"path": directory / "memory"},
        "directory": {"directory": directory},
    }[source]  # type: ignore[assignment]
    with Region.create("2M", prealloc=True, **place) as region:  # type: ignore[arg-type]
        assert region.info().resident == 2 * MIB
        region.unlink()
    with Region.create("2M") as lazy:
        assert lazy.info().resident == 0
        lazy.populate()
        assert lazy.info().resident == 2 * MIB


def test_only_one_place(directory: Path, shm_name: str) -> None:
    with pytest.raises(RegionError, match="name, path and directory exclude each other"):
        Region.create(PAGE, name=shm_name, directory=directory)
    with pytest.raises(RegionError, match="give either a name or a path to attach to"):
        Region.attach()
    with pytest.raises(RegionError, match="give either a name or a path to attach to"):
        Region.attach(name=shm_name, path=directory / "x")


# -- sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "nearest"),
    [
        (0, "4K"), (1, "4K"), (4095, "4K"), (4097, "4K"), (6143, "4K"), (6145, "8K"),
        ("2.75M", "2M"), ("3.25M", "4M"), ("5M", "4M"), ("7M", "8M"), ("2.5E", "2E"),
    ],
)  # fmt: skip
def test_no_power_of_two(size: int | str, nearest: str) -> None:
    with pytest.raises(RegionError) as caught:
        Region.create(size)
    assert str(caught.value).startswith("a region cannot have ")
    assert "it must be a power of two and at least one page (4K); the nearest that works is " in (
        str(caught.value)
    )
    assert str(caught.value).endswith(f" {nearest}")


def test_both_neighbours_are_as_near() -> None:
    with pytest.raises(RegionError, match=r"nearest that works is (4|8)K"):
        Region.create(6144)


@pytest.mark.parametrize("size", ["8E", "16E", "1024E", "7E", "7.5E"])
def test_more_than_an_address_space(size: str) -> None:
    with pytest.raises(RegionError, match="the largest is 4E"):
        Region.create(size)


@pytest.mark.parametrize("size", ["4E", "1P", "64T"])
@pytest.mark.parametrize("source", ["anonymous", "name", "path"])
def test_more_than_the_machine_has(directory: Path, shm_name: str, size: str, source: str) -> None:
    before = resources()
    place = {"name": {"name": shm_name}, "path": {"path": directory / "memory"}}.get(source, {})
    with pytest.raises(OSError) as caught:
        Region.create(size, **place)  # type: ignore[arg-type]
    assert size in str(caught.value)
    assert any(word in str(caught.value) for word in ("choose a smaller size", "make room"))
    assert not resources().beyond(before)
    assert os.listdir(directory) == []


# -- seals ----------------------------------------------------------------------------------------


def test_nobody_can_truncate_anonymous_memory() -> None:
    """Else every peer that touches it would die of SIGBUS."""
    with Region.create("1M") as region:
        ours = os.open(f"/proc/self/fd/{region.fileno()}", os.O_RDWR)
        for size in (0, PAGE, MIB - 1, MIB + 1, 2 * MIB):
            for fd in (region.fileno(), ours):
                with pytest.raises(PermissionError):
                    os.ftruncate(fd, size)
        with pytest.raises(PermissionError):
            os.posix_fallocate(ours, 0, 2 * MIB)
        with pytest.raises(PermissionError):
            fcntl.fcntl(ours, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)  # sealed against sealing
        os.close(ours)
        assert os.fstat(region.fileno()).st_size == MIB
        assert region.info().sealed


# -- attaching ------------------------------------------------------------------------------------


def test_attach_keeps_the_contents(directory: Path) -> None:
    path = directory / "memory"
    path.write_bytes(b"x" * 8192)
    with Region.attach(path=path) as region:
        assert region.size == 8192
        with memoryview(region) as view:
            assert bytes(view) == b"x" * 8192
            view[0] = ord("y")
        assert region.info().source == "file"
    assert path.read_bytes() == b"y" + b"x" * 8191


@pytest.mark.parametrize("size", [8192, "8K", None])
def test_attach_with_the_size_it_has(directory: Path, size: int | str | None) -> None:
    (directory / "memory").write_bytes(bytes(8192))
    Region.attach(path=directory / "memory", size=size).close()


def test_attach_with_another_size(directory: Path) -> None:
    path = directory / "memory"
    path.write_bytes(bytes(4096))
    with pytest.raises(RegionError) as caught:
        Region.attach(path=path, size="1M")
    assert str(caught.value) == (
        f"{path} has 4K, not the 1M asked for: ask for its size, or replace it"
    )
    assert path.stat().st_size == 4096


@pytest.mark.parametrize("size", [100, 4097, 12288])
def test_attach_to_what_no_guest_could_use(directory: Path, size: int) -> None:
    path = directory / "memory"
    path.write_bytes(bytes(size))
    with pytest.raises(RegionError, match=f"{path} cannot have .*: it must be a power of two"):
        Region.attach(path=path)


def test_attach_to_nothing(directory: Path, shm_name: str) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        Region.attach(name=shm_name)
    assert caught.value.filename == f"/dev/shm/{shm_name}"
    with pytest.raises(FileNotFoundError):
        Region.attach(path=directory / "none")


def test_attach_to_no_file(directory: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(directory / "socket"))
    for path, kind in (("/dev/zero", "device"), (directory, "directory"), ("socket", "socket")):
        with pytest.raises(RegionError) as caught:
            Region.attach(path=directory / path)
        assert str(caught.value) == (
            f"{directory / path}: it is a {kind}, not a regular file: choose another path"
        )


def test_attach_to_a_fifo_does_not_hang(directory: Path) -> None:
    os.mkfifo(directory / "fifo")
    with python(
        """
        import sys, ivshmem
        for readonly in (False, True):
            try:
                ivshmem.Region.attach(path=sys.argv[1], readonly=readonly)
            except ivshmem.RegionError as error:
                print("refused")
        """,
        str(directory / "fifo"),
    ) as child:
        child.expect("refused")
        child.process.wait(PATIENCE)
        child.expect("refused")


def test_read_only(directory: Path) -> None:
    path = directory / "memory"
    path.write_bytes(b"x" * 4096)
    path.chmod(0o400)
    with Region.attach(path=path, readonly=True, prealloc=True) as region:
        assert region.readonly
        assert region.info().readonly
        with memoryview(region) as view:
            assert view.readonly
            assert view[5] == ord("x")
        assert not as_array(region, np.uint8).flags.writeable
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pwrite(region.fileno(), b"y", 0)
    assert path.read_bytes() == b"x" * 4096


def test_prealloc_of_what_exists(directory: Path) -> None:
    path = directory / "memory"
    with path.open("wb") as file:
        file.truncate(MIB)
    with Region.attach(path=path, prealloc=True) as region:
        assert region.info().resident == MIB


# -- creating over something ----------------------------------------------------------------------


def test_name_exists(shm_name: str) -> None:
    with Region.create(PAGE, name=shm_name) as region, memoryview(region) as view:
        view[0] = 9
        with pytest.raises(FileExistsError) as caught:
            Region.create(PAGE, name=shm_name)
        assert "exists already: attach to it or replace it (--existing" in str(caught.value)
        assert caught.value.filename == f"/dev/shm/{shm_name}"
        with Region.attach(name=shm_name) as again, memoryview(again) as mirror:
            assert mirror[0] == 9
        region.unlink()


@pytest.mark.parametrize("kind", ["directory", "link"])
def test_something_else_exists(directory: Path, kind: str) -> None:
    path = directory / "memory"
    path.mkdir() if kind == "directory" else path.symlink_to("nowhere")
    with pytest.raises(FileExistsError):
        Region.create(PAGE, path=path)
    assert path.is_dir() or path.is_symlink()


def test_replace(directory: Path) -> None:
    """Who has the old one keeps it."""
    path = directory / "memory"
    with Region.create(PAGE, path=path) as old, memoryview(old) as view:
        view[0] = 9
        with Region.create(2 * PAGE, path=path, replace=True) as new, memoryview(new) as other:
            assert other[0] == 0
            assert path.stat().st_size == 2 * PAGE
            other[0] = 8
            assert view[0] == 9
            assert not old.unlink(), "the path is the new one's"
            assert new.unlink()
            assert not new.unlink()
    with Region.create(PAGE, path=path, replace=True) as region:
        assert path.exists()
        region.unlink()


def test_open_creates_or_attaches(directory: Path, shm_name: str) -> None:
    for place in ({"name": shm_name}, {"path": directory / "memory"}):
        region = Region.open("1M", **place)
        assert region.created
        with region, memoryview(region) as view:
            view[7] = 1
        region = Region.open("1M", **place)
        assert not region.created
        with region, memoryview(region) as view:
            assert view[7] == 1
        with pytest.raises(RegionError, match="has 1M, not the 2M asked for"):
            Region.open("2M", **place)


def test_open_of_a_link_to_nowhere_ends(directory: Path) -> None:
    """It exists and it does not: neither attached to nor created."""
    (directory / "link").symlink_to("nowhere")
    with python(
        """
        import sys, ivshmem
        try:
            ivshmem.Region.open(4096, path=sys.argv[1])
        except OSError as error:
            print(error.filename)
        """,
        str(directory / "link"),
    ) as child:
        child.expect(str(directory / "link"))


def test_unlink_only_what_is_its_own(directory: Path) -> None:
    path = directory / "memory"
    with Region.create(PAGE, path=path) as region:
        path.unlink()
        assert not region.unlink()
        path.write_text("precious")
        assert not region.unlink()
        assert path.read_text() == "precious"
    with pytest.raises(ClosedError):
        region.unlink()


def test_attached_regions_can_be_unlinked(shm_name: str) -> None:
    Region.create(PAGE, name=shm_name).close()
    with Region.attach(name=shm_name) as region:
        assert region.unlink()
        assert not (SHM / shm_name).exists()
        use(region)


@pytest.mark.parametrize("name", ["", "/", "a/b", "//a", ".", "..", "a\0b", "x" * 256, "/../tmp/x"])
def test_no_posix_name(name: str) -> None:
    with pytest.raises(RegionError, match="is not a POSIX shared memory name"):
        Region.create(PAGE, name=name)
    with pytest.raises(RegionError, match="is not a POSIX shared memory name"):
        Region.attach(name=name)


def test_posix_paths() -> None:
    assert posix_path("a") == posix_path("/a") == "/dev/shm/a"
    assert posix_path("x" * 255) == "/dev/shm/" + "x" * 255


def test_directory_is_missing(directory: Path) -> None:
    for place in ({"path": directory / "no" / "memory"}, {"directory": directory / "no"}):
        with pytest.raises(FileNotFoundError) as caught:
            Region.create(PAGE, **place)  # type: ignore[arg-type]
        assert str(directory / "no") in str(caught.value)
    (directory / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        Region.create(PAGE, directory=directory / "file")


# -- from a descriptor ----------------------------------------------------------------------------


def test_from_descriptor_owns_it() -> None:
    fd = memory_fd(2 * PAGE)
    with Region.from_fd(fd) as region:
        assert region.fileno() == fd
        assert (region.info().source, region.info().name) == ("descriptor", None)
        assert not region.info().sealed
        assert repr(region) == "<ivshmem.Region descriptor, 8K>"
    assert fd not in open_fds()


@pytest.mark.parametrize(
    "make", [lambda: os.eventfd(0), lambda: memory_fd(0), lambda: os.open("/", os.O_RDONLY)]
)
def test_from_a_descriptor_that_is_no_memory(make: Callable[[], int]) -> None:
    """It is owned, and so closed, also when this fails."""
    fd = make()
    with pytest.raises(RegionError, match="the descriptor is not shared memory"):
        Region.from_fd(fd)
    assert fd not in open_fds()


def test_from_a_descriptor_for_writing_only(directory: Path) -> None:
    (directory / "memory").write_bytes(bytes(4096))
    fd = os.open(directory / "memory", os.O_WRONLY)
    with pytest.raises(PermissionError):
        Region.from_fd(fd)
    assert fd not in open_fds()


def test_from_a_descriptor_for_reading_only(directory: Path) -> None:
    (directory / "memory").write_bytes(b"x" * 4096)
    with Region.from_fd(os.open(directory / "memory", os.O_RDONLY)) as region:
        assert region.readonly
        with memoryview(region) as view:
            assert view[0] == ord("x")
    with Region.from_fd(os.open(directory / "memory", os.O_RDWR), readonly=True) as region:
        assert region.readonly


# -- looking at it --------------------------------------------------------------------------------


def as_array(region: Any, kind: Any) -> Any:
    """numpy's stubs know the buffer protocol from Python 3.12 on only."""
    return np.frombuffer(region, kind)


def test_numpy_without_a_copy() -> None:
    with Region.create("1M") as region:
        array = as_array(region, np.uint32)
        assert array.shape == (MIB // 4,)
        assert array.ctypes.data == region.address
        array[5] = 0x01020304
        with memoryview(region) as view:
            assert bytes(view[20:24]) == (0x01020304).to_bytes(4, "little")
        with pytest.raises(BufferError, match="release memoryviews and arrays first"):
            region.close()
        del array


def test_close_in_use_changes_nothing() -> None:
    region = Region.create(PAGE)
    view = memoryview(region)
    with pytest.raises(BufferError):
        region.close()
    assert not region.closed
    assert region.info().size == PAGE
    view[0] = 1
    view.release()
    region.close()
    assert region.closed


def test_with_and_a_view_left_over() -> None:
    """The error of the block is not hidden by the one of closing."""
    region = Region.create(PAGE)
    view = memoryview(region)
    with pytest.raises(BufferError) as caught, region:
        raise KeyError("first")
    assert isinstance(caught.value.__context__, KeyError)
    view.release()
    region.close()


def test_closed() -> None:
    region = Region.create(PAGE)
    fd = region.fileno()
    region.close()
    region.close()
    assert fd not in open_fds()
    for call in (region.fileno, region.info, lambda: memoryview(region)):
        with pytest.raises(ClosedError, match="closed"):
            call()
    assert region.size == PAGE


def forget(_region: Region) -> None:
    """Nobody else has it."""


def test_forgotten() -> None:
    before = resources()
    with pytest.warns(ResourceWarning, match="unclosed <ivshmem.Region anonymous, 4K>"):
        forget(Region.create(PAGE))
    assert not resources().beyond(before)


def test_forgotten_under_a_view() -> None:
    """The memory stays as long as somebody looks at it."""
    views = [memoryview(Region.create(PAGE))]
    views[0][0] = 1
    assert views[0][0] == 1
    with pytest.warns(ResourceWarning, match="unclosed"):
        views.pop().release()
