"""Copies and atomic words beside C on the same memory; what each kind of pages brings."""

from __future__ import annotations

import ctypes
import os
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from ivshmem import Region
from ivshmem.memory import pages
from ivshmem.native.mapping import AtomicU64

from .conftest import Build

ROUNDS = 15  # in turn: short, and many
COUNT = 100_000  # operations on a word in each

SIZES = {"64B": 64, "4K": 4 << 10, "64K": 64 << 10, "1M": 1 << 20, "64M": 64 << 20}
LONG = 32 << 20  # bytes copied in each round, but at least one copy and at most COUNT

AREA = 256 << 20  # bytes of a region whose pages are looked at
JUMPS = 200_000  # loads
PAGE_ROUNDS = 7


@pytest.fixture(scope="session")
def floor(tmp_path_factory: pytest.TempPathFactory, build: Build) -> ctypes.CDLL:
    """memory.c."""
    path = tmp_path_factory.mktemp("memory") / "memory.so"
    build("memory.c", path, "-shared", "-fPIC")
    library = ctypes.CDLL(str(path))
    address, size, count = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long
    for name, arguments in {
        "copy": [address, address, size, count],
        "load": [address, count],
        "store": [address, count],
        "fetch_add": [address, count],
        "compare_exchange": [address, count],
        "touch": [address, size],
        "jump": [address, size, count],
    }.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, ctypes.c_double
    library.collapse.argtypes = [address, size]
    return library


def nanoseconds(work: Callable[[int], None], count: int) -> float:
    start = time.perf_counter_ns()
    work(count)
    return (time.perf_counter_ns() - start) / count


def beside(
    ours: Callable[[int], None], theirs: Callable[[int], float], count: int
) -> dict[str, float]:
    """Both in turn: median nanoseconds of ours, and median of the ratios."""
    ours(1)
    theirs(1)
    figures = [(nanoseconds(ours, count), theirs(count)) for _ in range(ROUNDS)]
    return {
        "ns_each": round(statistics.median(mine for mine, _ in figures)),
        "ratio_to_c": round(statistics.median(mine / floor for mine, floor in figures), 2),
    }


# -- copies ---------------------------------------------------------------------------------------


def read(region: Region, data: bytearray, count: int) -> None:
    call, size = region.read, len(data)
    for _ in repeat(None, count):
        call(0, size)


def read_into(region: Region, data: bytearray, count: int) -> None:
    call = region.read_into
    for _ in repeat(None, count):
        call(0, data)


def write(region: Region, data: bytearray, count: int) -> None:
    call = region.write
    for _ in repeat(None, count):
        call(0, data)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("work", [read, read_into, write])
def bench_copy(
    benchmark: BenchmarkFixture,
    floor: ctypes.CDLL,
    work: Callable[[Region, bytearray, int], None],
    size: str,
) -> None:
    data = bytearray(os.urandom(SIZES[size]))
    count = max(1, min(LONG // len(data), COUNT))
    with Region.create(max(len(data), 4096), prealloc=True) as region:
        buffer = (ctypes.c_char * len(data)).from_buffer(data)
        theirs = ctypes.addressof(buffer), region.address
        to, source = reversed(theirs) if work is write else theirs
        ours = partial(work, region, data)
        benchmark.extra_info.update(beside(ours, partial(floor.copy, to, source, len(data)), count))
        benchmark(ours, max(1, count // 100))


# -- words ----------------------------------------------------------------------------------------


def load(word: AtomicU64, count: int) -> None:
    call = word.load
    for _ in repeat(None, count):
        call()


def store(word: AtomicU64, count: int) -> None:
    call = word.store
    for _ in repeat(None, count):
        call(5)


def fetch_add(word: AtomicU64, count: int) -> None:
    call = word.fetch_add
    for _ in repeat(None, count):
        call(5)


def compare_exchange(word: AtomicU64, count: int) -> None:
    call = word.compare_exchange
    for _ in repeat(None, count):
        call(1, 1)


@pytest.mark.parametrize("work", [load, store, fetch_add, compare_exchange])
def bench_word(
    benchmark: BenchmarkFixture, floor: ctypes.CDLL, work: Callable[[AtomicU64, int], None]
) -> None:
    with Region.create(4096, prealloc=True) as region:
        ours = partial(work, region.atomic_u64(0))
        theirs = partial(getattr(floor, work.__name__), region.address)
        benchmark.extra_info.update(beside(ours, theirs, COUNT))
        benchmark(ours, 1000)


# -- pages ----------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """A way to have a region's pages; `collapse`: made of small ones by MADV_COLLAPSE."""

    hugepages: bool = False
    prealloc: bool = False
    collapse: bool = False


class Costs(NamedTuple):
    """Nanoseconds for each 4 KiB, but for `jump`: for each load."""

    ready: float  # until all is there: creating, and touching each page for the first time
    touch: float  # that first time alone
    attach: float  # another process's share: mapping what exists, and touching each page
    jump: float  # a load from anywhere, which waits for the one before
    copy: float  # all of it, from one end to the other
    unmap: float


SMALL = Kind()
KINDS = {
    "prealloc": Kind(prealloc=True),
    "transparent": Kind(prealloc=True, collapse=True),
    "hugetlb": Kind(hugepages=True),
    "hugetlb-prealloc": Kind(hugepages=True, prealloc=True),
}


def costs(kind: Kind, floor: ctypes.CDLL, buffer: bytearray) -> Costs:
    """Measure once."""
    start = time.perf_counter_ns()
    with Region.create(AREA, hugepages=kind.hugepages, prealloc=kind.prealloc) as region:
        if kind.collapse and floor.collapse(region.address, AREA):
            pytest.skip("this kernel makes no transparent huge pages of a memfd")
        touch = floor.touch(region.address, AREA)
        ready = time.perf_counter_ns() - start
        start = time.perf_counter_ns()
        with Region.from_fd(os.dup(region.fileno())) as other:
            floor.touch(other.address, AREA)
            attach = time.perf_counter_ns() - start
        jump = floor.jump(region.address, AREA, JUMPS)
        start = time.perf_counter_ns()
        for offset in range(0, AREA, len(buffer)):
            region.read_into(offset, buffer)
        copy = time.perf_counter_ns() - start
        start = time.perf_counter_ns()
    unmap = time.perf_counter_ns() - start
    each = AREA // 4096
    return Costs(ready / each, touch, attach / each, jump, copy / each, unmap / each)


@pytest.fixture
def huge_pages() -> Iterator[None]:
    """As many as are needed, and afterwards as many as before."""
    size = pages.huge_page_size(True)
    number = Path(pages.HUGE_PAGES, f"hugepages-{size // 1024}kB", "nr_hugepages")
    before = number.read_text()
    try:
        number.write_text(str(int(before) + AREA // size))
    except OSError as error:
        pytest.skip(f"only root can reserve huge pages: {error}")
    try:
        if int(number.read_text()) < int(before) + AREA // size:
            pytest.skip("the memory is too scattered to reserve huge pages")
        yield
    finally:
        number.write_text(before)


@pytest.mark.parametrize("name", KINDS)
def bench_pages(
    benchmark: BenchmarkFixture, request: pytest.FixtureRequest, floor: ctypes.CDLL, name: str
) -> None:
    kind = KINDS[name]
    if kind.hugepages:
        request.getfixturevalue("huge_pages")
    buffer = bytearray(1 << 20)
    rounds = [(costs(SMALL, floor, buffer), costs(kind, floor, buffer)) for _ in range(PAGE_ROUNDS)]
    for figure in Costs._fields:
        small, ours = (
            [getattr(costs, figure) for costs in side] for side in zip(*rounds, strict=True)
        )
        benchmark.extra_info[f"{figure}_ns"] = round(statistics.median(ours), 1)
        benchmark.extra_info[f"{figure}_to_small"] = round(
            statistics.median(mine / floor for mine, floor in zip(ours, small, strict=True)), 2
        )
    benchmark.pedantic(costs, (kind, floor, buffer), rounds=1)  # type: ignore[no-untyped-call]
