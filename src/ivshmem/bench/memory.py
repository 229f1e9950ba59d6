"""What memory costs: copies in and out of a region, and pages, small and huge.

Knows: how to touch pages. Does not know: shared memory of others, which it never writes to.
"""

from __future__ import annotations

import os
import random
from itertools import cycle
from operator import itemgetter

from ..memory import pages
from ..memory.region import Region
from ..memory.sizes import format_size
from . import statements
from .result import ROUNDS, Measuring, Result, ResultGroup, turns
from .roundtrip import Measured

COPIES = (4 << 10, 1 << 20)

_LARGEST, _SMALLEST = 64 << 20, 4 << 20  # bytes in pages of either size
_CHUNK = 2 << 20  # bytes that are touched at once
_READS = 1000  # at once
_BATCHES = 16  # of different addresses


# -- copies ---------------------------------------------------------------------------------------


def copies(seconds: float) -> Measuring:
    """Copy out of a region and into it, and compare with copies between two private buffers.

    Yields after each measurement: what share of all is done, and the group so far.
    """
    group = ResultGroup("copy")
    plan: list[tuple[Result, str, int]] = []
    for size in COPIES:
        name = format_size(size)
        plain = group.add(f"memcpy, {name}, private memory", size=size)
        plan += [
            (plain, "private[:] = source", size),
            (group.add(f"region.read_into, {name}", plain, size), "read_into(0, private)", size),
            (group.add(f"region.write, {name}", plain, size), "write(0, source)", size),
        ]
    with (
        Region.create(max(COPIES), prealloc=True) as region,
        memoryview(bytearray(max(COPIES))) as private,
        memoryview(bytearray(os.urandom(max(COPIES)))) as source,
        statements.pinned(),
    ):
        for done in turns(seconds):
            yield done, group
            for result, statement, size in plan:
                with private[:size] as here, source[:size] as there:
                    names: dict[str, object] = {"private": here, "source": there}
                    names |= {"read_into": region.read_into, "write": region.write}
                    result.add(*statements.measure(statement, names, seconds / ROUNDS / len(plan)))
    yield 1.0, group


# -- pages ----------------------------------------------------------------------------------------


def huge_pages(seconds: float) -> Measuring:
    """Touch memory for the first time, and read it at random, in small pages and in huge ones.

    Yields as `copies` does. If huge pages are not available, the group's note says why.
    """
    size, why = _affordable()
    group = ResultGroup("huge pages", note=why)
    touches: list[Result] = []
    reads: list[Result] = []
    names = ["small pages"] if why else ["small pages", "huge pages"]
    for what, results in ("first touch of 2M", touches), (f"{_READS} random reads", reads):
        for name in names:
            results.append(group.add(f"{what}, {name}", results[0] if results else None))
    kinds = list(zip([False, True], touches, reads, strict=False))
    places = [
        itemgetter(*(random.randrange(size // 8) for _ in range(_READS)))  # noqa: S311
        for _ in range(_BATCHES)
    ]
    # Making and touching the memory takes about as long as reading it.
    share = seconds / ROUNDS / len(kinds) / 2
    with statements.pinned():
        # In a virtual machine, the host may have to find the memory when it is first touched.
        for huge, _, _ in kinds:
            Region.create(size, hugepages=huge, prealloc=True).close()
        for done in turns(seconds):
            yield done, group
            for huge, touched, was_read in kinds:
                with Region.create(size, hugepages=huge) as region, memoryview(region) as memory:
                    touched.add(*_touched(memory))
                    with memory.cast("Q") as numbers:
                        known: dict[str, object] = {"numbers": numbers, "places": cycle(places)}
                        was_read.add(*statements.measure("next(places)(numbers)", known, share))
    yield 1.0, group


def _touched(memory: memoryview) -> Measured:
    names: dict[str, object] = {
        "memory": memory,
        "at": 0,
        "chunk": _CHUNK,
        "page": pages.PAGE,
        "zeros": bytes(_CHUNK // pages.PAGE),
    }
    statement = "memory[at : at + chunk : page] = zeros; at += chunk"
    return statements.measure_exactly(statement, names, len(memory) // _CHUNK)


def _affordable() -> tuple[int, str]:
    """How much memory to use, and why not in huge pages ("" if they are available)."""
    free = os.sysconf("SC_AVPHYS_PAGES") * pages.PAGE
    largest = _LARGEST
    while largest > max(free // 4, _SMALLEST):
        largest //= 2
    if not pages.huge_page_sizes():
        return largest, "this kernel has no huge pages"
    why = ""
    size = largest
    while size >= _SMALLEST:
        try:
            Region.create(size, hugepages=True).close()
            return size, ""
        except (OSError, ValueError) as error:
            why = why or getattr(error, "strerror", None) or str(error)
        size //= 2
    return largest, why
