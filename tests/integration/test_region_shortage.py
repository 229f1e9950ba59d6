"""Not enough: space, memory, huge pages. Found out at creation, with the numbers and what fixes it.

And huge pages where there are enough, 2 MiB and 1 GiB, by memfd and from a hugetlbfs mount.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.leaks import resources
from support.mounts import HUGE, free_huge_pages, huge_pages, mounted, root

from ivshmem import Region, RegionError
from ivshmem.memory.pages import huge_page_sizes, page_size_of
from ivshmem.memory.sizes import format_size

pytestmark = [
    pytest.mark.serial,  # it counts the machine's huge pages, which other tests reserve
    pytest.mark.skipif(not root, reason="needs root to mount and to reserve huge pages"),
]

MIB, GIB = 1 << 20, 1 << 30


# -- space ----------------------------------------------------------------------------------------


@pytest.fixture
def tiny() -> Iterator[Path]:
    """A tmpfs of 1 MiB."""
    with mounted("tmpfs", "size=1M") as place:
        yield place


@pytest.mark.parametrize("kind", ["path", "directory"])
def test_not_enough_space(tiny: Path, kind: str) -> None:
    before = resources()
    place = {kind: tiny / "memory" if kind == "path" else tiny}
    with pytest.raises(OSError) as caught:
        Region.create("4M", **place)  # type: ignore[arg-type]
    assert str(caught.value) == (
        "[Errno 28] 4M are needed, 1.0M of 1.0M are free: make room, or if it is a tmpfs, as root:"
        f" mount -o remount,size=4M {tiny}: '{place[kind]}'"
    )
    assert os.listdir(tiny) == []
    assert os.statvfs(tiny).f_bfree == os.statvfs(tiny).f_blocks
    assert not resources().beyond(before)


def test_the_command_that_fixes_it(tiny: Path) -> None:
    """Some of the space is taken already; then exactly enough is made."""
    with Region.create("512K", path=tiny / "first"):
        with pytest.raises(OSError) as caught:
            Region.create("8M", path=tiny / "second")
        command = re.search(r"mount -o remount,size=\S+ \S+", str(caught.value).rstrip(":"))
        assert command
        assert os.listdir(tiny) == ["first"]
        assert os.system(command[0].rstrip(":")) == 0  # noqa: S605
        Region.create("8M", path=tiny / "second").close()


def test_exactly_enough_space(tiny: Path) -> None:
    with Region.create("1M", path=tiny / "memory") as region, memoryview(region) as view:
        view[:] = bytes([1]) * MIB


def test_attaching_to_a_file_with_holes_and_no_space(tiny: Path) -> None:
    """With prealloc it is found out at once."""
    before = resources()
    with (tiny / "memory").open("wb") as file:
        file.truncate(4 * MIB)
    with pytest.raises(OSError, match="4M"):
        Region.attach(path=tiny / "memory", prealloc=True)
    assert not resources().beyond(before)


def test_more_memory_than_is_available_now() -> None:
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    available += int(fields["SwapFree"].split()[0]) * 1024
    size = 1 << (available * 2).bit_length()
    before = resources()
    with pytest.raises(OSError, match=r"of memory do not fit: this machine has .* available"):
        Region.create(size, prealloc=True)
    assert not resources().beyond(before)


# -- huge pages -----------------------------------------------------------------------------------


@pytest.fixture(params=[2 * MIB, GIB], ids=["2M", "1G"])
def page(request: pytest.FixtureRequest) -> int:
    size: int = request.param
    if size not in huge_page_sizes():
        pytest.skip(f"this machine has no huge pages of {format_size(size)}")
    return size


COUNT = {2 * MIB: 2, GIB: 1}  # the kernel takes a second to clear a large one


@pytest.fixture
def reserved(page: int) -> Iterator[int]:
    """Pages that nobody uses; skips where memory is too fragmented for a large one."""
    with huge_pages(page, COUNT[page]) as got:
        if got < COUNT[page]:
            pytest.skip(f"no {COUNT[page]} huge pages of {format_size(page)} can be had now")
        yield page


def check(region: Region, page: int) -> None:
    """It is in huge pages, reserved at once and used when touched."""
    size = COUNT[page] * page
    info = region.info()
    assert (info.size, info.page_size) == (size, page)
    assert (info.resident, info.huge) == (0, 0)
    with memoryview(region) as view:
        view[0] = 1
        assert region.info().resident == region.info().huge == page
        view[-1] = 2
    assert region.info().resident == region.info().huge == size
    with Region.from_fd(os.dup(region.fileno())) as again, memoryview(again) as view:
        assert again.page_size == page
        assert (view[0], view[-1]) == (1, 2)


def test_memfd(reserved: int) -> None:
    free = free_huge_pages(reserved)
    wanted = format_size(reserved) if reserved == GIB else True  # the default size
    with Region.create(COUNT[reserved] * reserved, hugepages=wanted) as region:
        assert free_huge_pages(reserved) == free - COUNT[reserved], "not reserved"
        check(region, reserved)
        assert region.info().sealed
        for size in (0, reserved // 2, 2 * reserved):
            if size != region.size:
                with pytest.raises(OSError):
                    os.ftruncate(region.fileno(), size)
    assert free_huge_pages(reserved) == free
    with Region.create(reserved, hugepages=reserved) as region:
        assert region.page_size == reserved


@pytest.mark.parametrize("kind", ["path", "directory"])
def test_hugetlbfs(reserved: int, kind: str) -> None:
    free = free_huge_pages(reserved)
    size = COUNT[reserved] * reserved
    with mounted("hugetlbfs", f"pagesize={format_size(reserved)}") as place:
        where = {kind: place / "memory" if kind == "path" else place}
        with Region.create(size, hugepages=reserved, **where) as region:  # type: ignore[arg-type]
            check(region, reserved)
            assert os.listdir(place) == (["memory"] if kind == "path" else [])
            if kind == "path":
                with Region.attach(path=place / "memory") as again, memoryview(again) as view:
                    assert again.page_size == reserved
                    assert view[0] == 1
                assert region.unlink()
        assert os.listdir(place) == []
    assert free_huge_pages(reserved) == free


def test_hugetlbfs_without_saying_so(reserved: int) -> None:
    with mounted("hugetlbfs", f"pagesize={format_size(reserved)}") as place:
        assert page_size_of(str(place)) == reserved
        with Region.create(reserved, directory=place) as region:
            assert region.page_size == reserved


def test_prealloc(reserved: int) -> None:
    size = COUNT[reserved] * reserved
    with Region.create(size, hugepages=reserved, prealloc=True) as region:
        assert region.info().resident == region.info().huge == size


def lack(page: int) -> int:
    """A size for which there are not enough huge pages."""
    return int(1 << free_huge_pages(page).bit_length()) * page


@pytest.mark.parametrize("source", ["memfd", "path", "directory"])
@pytest.mark.parametrize("prealloc", [False, True])
def test_not_enough_huge_pages(page: int, source: str, prealloc: bool) -> None:
    before = resources()
    with ExitStack() as stack:
        place = {}
        if source != "memfd":
            mount = stack.enter_context(mounted("hugetlbfs", f"pagesize={format_size(page)}"))
            place = {source: mount / "memory" if source == "path" else mount}
        free = free_huge_pages(page)
        size = lack(page)
        with pytest.raises(OSError) as caught:
            Region.create(size, hugepages=page, prealloc=prealloc, **place)  # type: ignore[arg-type]
        if place:
            assert os.listdir(mount) == []
    knob = HUGE / f"hugepages-{page // 1024}kB" / "nr_hugepages"
    total = int(knob.read_text())
    assert str(caught.value) == (
        f"[Errno 12] {size // page} huge pages of {format_size(page)} are needed, {free} of {total}"
        f" are free; as root: echo {total + size // page - free} > {knob}"
    )
    assert not resources().beyond(before)
    assert free_huge_pages(page) == free


def test_a_page_is_the_least(page: int) -> None:
    with pytest.raises(RegionError, match=f"at least one page \\({format_size(page)}\\)"):
        Region.create(page // 2, hugepages=page)


@pytest.mark.parametrize("wanted", ["4M", 4096, "3M"])
def test_no_such_huge_pages(wanted: int | str) -> None:
    with pytest.raises(RegionError, match=r"this machine has no huge pages of .*; it offers .*2M"):
        Region.create("64M", hugepages=wanted)


def test_huge_pages_where_there_are_none(tiny: Path) -> None:
    with pytest.raises(RegionError) as caught:
        Region.create("512K", directory=tiny, hugepages="2M")
    assert str(caught.value) == (
        f"{tiny} has pages of 4K, not huge pages of 2M: name a hugetlbfs mount of that page size,"
        " or no place at all for a memfd"
    )


def test_transparent_huge_pages_are_no_huge_pages() -> None:
    """Where the kernel makes them by itself, an ordinary memfd still has ordinary pages."""
    knob = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    if not knob.exists():
        pytest.skip("this kernel has no transparent huge pages")
    before = re.search(r"\[(\w+)\]", knob.read_text())
    assert before
    knob.write_text("always")
    try:
        with Region.create("4M") as region:
            assert region.page_size == 4096
            with memoryview(region) as view:
                view[0] = 1
            info = region.info()
            assert info.resident >= info.huge
            with Region.from_fd(os.dup(region.fileno())) as again:
                assert again.page_size == 4096
                assert again.info().huge <= again.info().resident == info.resident
    finally:
        knob.write_text(before[1])
