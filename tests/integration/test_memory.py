"""Words and copies of memory that several processes and threads use at once."""

from __future__ import annotations

import os
from typing import Literal

import pytest
from support.children import python
from support.waiting import Background, until

from ivshmem import Region

ADDITIONS = 100_000
TURNS = 20_000

both_widths = pytest.mark.parametrize("bits", [32, 64])

# What both ends run. They begin together, when the second word says so.
ADD = """
def add(region, bits, order, count):
    word = getattr(region, f"atomic_u{bits}")(64)
    ready = region.atomic_u64(0)
    ready.fetch_add(1)
    while ready.load() < 2:
        pass
    for _ in range(count):
        word.fetch_add(3, order)
"""

# A counter that only who has the lock reads and writes, and not as a word.
LOCK = """
import os

def take_turns(region, bits, count):
    lock = getattr(region, f"atomic_u{bits}")(64)
    ready = region.atomic_u64(0)
    ready.fetch_add(1)
    while ready.load() < 2:
        pass
    for _ in range(count):
        while lock.compare_exchange(0, 1, "acquire"):
            os.sched_yield()
        counter = int.from_bytes(region.read(128, 16), "little")
        region.write(128, (counter + 1).to_bytes(16, "little"))
        lock.store(0)
"""

CHILD = """
name, bits, *rest = sys.argv[1:]
with ivshmem.Region.attach(name=name) as region:
    print("READY")
    {call}
"""


@both_widths
@pytest.mark.parametrize("order", ["relaxed", "seq_cst"])
def test_no_addition_is_lost(
    shm_name: str, bits: int, order: Literal["relaxed", "seq_cst"]
) -> None:
    code = ADD + CHILD.format(call=f"add(region, int(bits), rest[0], {ADDITIONS})")
    names: dict[str, object] = {}
    exec(ADD, names)  # noqa: S102
    add = names["add"]
    assert callable(add)
    with (
        Region.create(4096, name=shm_name) as region,
        python("import ivshmem, sys\n" + code, shm_name, str(bits), order) as child,
    ):
        child.expect("READY")
        add(region, bits, order, ADDITIONS)
        child.finish()
        assert region.atomic_u64(64).load() == 2 * 3 * ADDITIONS


@both_widths
def test_a_lock_between_processes(shm_name: str, bits: int) -> None:
    code = LOCK + CHILD.format(call=f"take_turns(region, int(bits), {TURNS})")
    names: dict[str, object] = {}
    exec(LOCK, names)  # noqa: S102
    take_turns = names["take_turns"]
    assert callable(take_turns)
    with (
        Region.create(4096, name=shm_name) as region,
        python("import ivshmem, sys\n" + code, shm_name, str(bits)) as child,
    ):
        child.expect("READY")
        take_turns(region, bits, TURNS)
        child.finish()
        assert int.from_bytes(region.read(128, 16), "little") == 2 * TURNS


def test_closing_under_a_copy() -> None:
    """It fails while another thread copies, and the copy comes to its end."""
    data = os.urandom(1 << 20) * 64

    def refused() -> bool:
        """Closing at once; where the copy was over by then, there will be another try."""
        region = Region.create(len(data))
        # memcpy may keep the first and the last bytes for the end.
        early = region.atomic_u64(1 << 20)
        copy = Background(lambda: region.write(0, data))
        until(early.load, "the beginning of the copy")
        try:
            region.close()
        except BufferError:
            assert not region.closed
        assert copy.result() == len(data)
        if region.closed:
            return False
        assert region.read(0, len(data)) == data
        region.close()
        return True

    assert until(refused, "a close in the middle of a copy")


def test_closing_while_others_use_words() -> None:
    """They see the end of it, and nothing worse."""
    region = Region.create(4096)
    word = region.atomic_u64(0)

    def add() -> None:
        while True:
            word.fetch_add(1)

    threads = [Background(add) for _ in range(3)]
    until(word.load, "an addition")
    region.close()
    for thread in threads:
        with pytest.raises(ValueError, match="the memory is closed"):
            thread.result()
