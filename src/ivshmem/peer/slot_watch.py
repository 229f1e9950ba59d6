"""The slots of a table of names, and which of their owners are alive.

Knows: copying a slot, when it last showed a sign of life, when its owner counts as dead.
Does not know: what an entry is published for, and by which thread (directory.py); the format of a
slot (names_table.py).

Invariants:
1. Shared bytes are copied once, and only the copy is looked at.
2. A slot is taken and freed only by compare-exchange of its owner.
3. There is no lock: the caller holds its own during each call.
"""

from __future__ import annotations

import time

from ..memory.region import Region
from ..native import mapping
from ..system.named_tuple import NamedTuple
from .limits import SLOT_BYTES
from .names_table import OWNER, SLOT, Entry, copy_slot, parse, start_of


class Slot(NamedTuple):
    """A slot as it was when its 128 bytes were copied."""

    number: int
    owner: int  # 0: free
    entry: Entry | None  # None: free, being written, or not valid
    alive: bool | None  # False: dead


class _OwnerWatch:
    """When a slot last showed a sign of life, by this process's clock: peers share no clock."""

    __slots__ = ("beat", "moved", "owner", "since")

    def __init__(self, owner: int, beat: int, since: float) -> None:
        self.owner = owner
        self.beat = beat
        self.since = since
        self.moved = False  # a sign of life was seen since it is watched


class WatchedSlots:
    """The slots of one table, each watched from the first `look` on.

    Args:
        beat, lease: seconds between signs of life, and without one until an owner counts as dead.

    Attributes:
        start: the offset in the region where the table begins.
    """

    def __init__(self, region: Region, slots: int, beat: float, lease: float) -> None:
        self._region = region
        self.start = start_of(region.size, slots)
        self._beat = beat
        self._lease = lease
        self._watch: list[_OwnerWatch | None] = [None] * slots
        self._looked = 0.0  # when that was last done

    def look(
        self, connected: frozenset[int] | None, own: set[tuple[int, int]], *, regularly: bool
    ) -> list[Slot]:
        """Copy the table, and note which entries showed a sign of life since the last look.

        Args:
            connected: the ids of the peers that are connected; None: they are unknown.
            own: number and owner of the caller's slots, which are alive.
            regularly: a thread looks at every beat.
        """
        now = time.monotonic()
        if regularly and now - self._looked > self._lease / 2:
            # This process was stopped, and perhaps the others were too. No entry counts as dead
            # because we did not look.
            for watch in self._watch:
                if watch is not None:
                    watch.since = now
        self._looked = now
        return [self._examine(n, now, own, connected) for n in range(len(self._watch))]

    def _examine(
        self, number: int, now: float, own: set[tuple[int, int]], connected: frozenset[int] | None
    ) -> Slot:
        raw = copy_slot(self._region, self.start + number * SLOT_BYTES)
        owner, beat = SLOT.unpack(raw)[:2]
        if not owner:
            self._watch[number] = None
            return Slot(number, 0, None, None)
        watch = self._watch[number]
        if watch is None or watch.owner != owner:
            watch = self._watch[number] = _OwnerWatch(owner, beat, now)
        elif watch.beat != beat:
            watch.beat, watch.since, watch.moved = beat, now, True
        entry = parse(raw)
        lease = self._lease
        if entry is not None and connected is not None and entry.id not in connected:
            # The peer has left, or the server has not announced it yet. (A broker's clients hear
            # of a peer through the directory itself, which can be a second late.)
            lease = min(lease, 2 * self._beat)
        if (number, owner) in own:
            alive: bool | None = True
        elif now - watch.since > lease:
            alive = False
        else:
            alive = True if watch.moved else None
        if entry is not None:
            entry = Entry(entry.id, entry.name, entry.role, entry.vector_range, alive)
        return Slot(number, owner, entry, alive)

    def word(self, number: int, offset: int) -> mapping.AtomicU64:
        return self._region.atomic_u64(self.start + number * SLOT_BYTES + offset)

    def claim(self, number: int, owner: int) -> bool:
        """Take a slot for this owner if it is still free."""
        return self.word(number, OWNER).compare_exchange(0, owner) == 0

    def free(self, number: int, owner: int) -> None:
        """Free a slot if it still has this owner."""
        if owner:
            self.word(number, OWNER).compare_exchange(owner, 0)
