"""What a server has done, in memory that outlives it, for its successor.

Knows: a file in memory, records, which of them are whole. Does not know: what a record says.

Invariants:
1. A record is there whole or not at all, whenever the process is killed.
2. What was being sent at that moment is known, too: the outbox is in the same memory.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Sequence

from ..errors import JournalError
from ..native import mapping, wire
from ..system.uncopied import Uncopied
from ..text import counted

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypeAlias

    Record: TypeAlias = list[Any]  # whose, what, and the rest

# The file: the outbox, whose first word `end` tells how far the records go; what this is, and in
# which version; and two halves, of which one holds a state and the records since, as lines of JSON.
_ABOUT, _START, _HALF = 0x8000, 0x10000, 1 << 28
_SIZE = _START + 2 * _HALF
_VERSION = b"ivshmem journal 1\n"
_SPOILT = b"ivshmem journal -\n"
_OTHER = "is another version's"
assert wire.OUTBOX_BYTES <= _ABOUT

# `end`: the upper half counts the rewritings, whose lowest bit says which half of the file is
# meant; the lower half is an offset in it.
_OFFSET_BITS = 32

_LONG = 1 << 20  # bytes of records from which on a state is written anew, if they are more than it


class Journal(Uncopied):
    """A journal in a memory file.

    Args:
        fd: of the file, which is owned from now on; it may be empty, or of a process that was
            killed while it began it. None: a new one.

    Raises:
        JournalError: the file is none of this version's.
        OSError: as of memfd_create(2) and mmap(2).
    """

    def __init__(self, fd: int | None = None) -> None:
        self._fd = os.memfd_create("ivshmem-journal") if fd is None else fd
        try:
            size = os.fstat(self._fd).st_size
            if size == 0:
                os.ftruncate(self._fd, _SIZE)
            elif size != _SIZE:
                raise JournalError(f"the journal has another size: it {_OTHER}")
            self._memory = mapping.Mapping(self._fd, _SIZE)
        except BaseException:
            os.close(self._fd)
            raise
        self._end = self._memory.atomic_u64(0)
        self._rewritten = 0  # the size that the state had
        # A successor in another process needs a process that keeps descriptors for it, in groups by
        # name. A group is kept before a record mentions it, and dropped before its descriptors are
        # closed.
        self.keep: Callable[[str, Sequence[int]], object] = _nothing
        self.drop: Callable[[str], object] = _nothing
        # Whether all that was to be kept or dropped has been.
        self.settled: Callable[[], bool] = lambda: True
        if self._end.load() == 0:
            self._memory.write(_ABOUT, _VERSION)
            self._end.store(1 << _OFFSET_BITS)
        elif (about := self._memory.read(_ABOUT, len(_VERSION))) != _VERSION:
            self._memory.close()
            os.close(self._fd)
            spoilt = about == _SPOILT
            raise JournalError(f"the journal {'was given up' if spoilt else _OTHER}")
        self.outbox = wire.Outbox(self._memory)

    def fileno(self) -> int:
        return self._fd

    def append(self, record: Record) -> None:
        """Add a record, which also says how what was being sent has ended.

        Raises:
            OSError: ENOSPC, there is no room before the next `rewrite`.
        """
        end = self._end.load()
        data = _line(record)
        self._put(end, data)
        self._end.store(end + len(data))

    def rewrite(self, state: object) -> None:
        """Put a state in the place of all records."""
        generation = (self._end.load() >> _OFFSET_BITS) + 1
        data = _line(state)
        self._put(generation << _OFFSET_BITS, data)
        self._end.store(generation << _OFFSET_BITS | len(data))
        self._rewritten = len(data)

    def _put(self, end: int, data: bytes) -> None:
        offset = end & ((1 << _OFFSET_BITS) - 1)
        if offset + len(data) > _HALF:
            raise OSError(errno.ENOSPC, "the journal is full")
        self._memory.write(_START + (end >> _OFFSET_BITS & 1) * _HALF + offset, data)

    @property
    def long(self) -> bool:
        """Whether it would profit from a `rewrite`."""
        records = (self._end.load() & ((1 << _OFFSET_BITS) - 1)) - self._rewritten
        return records > max(_LONG, self._rewritten)

    def read(self) -> tuple[Any, list[Record]]:
        """The state last written (None: never), and the records since.

        Raises:
            JournalError: they are not lines of JSON.
        """
        import json  # here: only a successor reads

        end = self._end.load()
        half, size = end >> _OFFSET_BITS & 1, end & ((1 << _OFFSET_BITS) - 1)
        if size > _HALF:
            raise JournalError(
                f"the journal is damaged: it ends {counted(size - _HALF, 'byte')} too far"
            )
        lines = self._memory.read(_START + half * _HALF, size).splitlines()
        try:
            read = [json.loads(line) for line in lines]
        except (ValueError, RecursionError):
            raise JournalError("the journal is damaged: it is not JSON") from None
        if end >> _OFFSET_BITS == 1:
            return None, read
        if not read:
            raise JournalError("the journal is damaged: it has no state")
        return read[0], read[1:]

    def spoil(self) -> None:
        """Mark it as useless for a successor: not all descriptors that it names were kept."""
        self._memory.write(_ABOUT, _SPOILT)

    def close(self) -> None:
        """Close the file, which exists as long as other processes have it open."""
        if self._fd >= 0:
            del self.outbox  # it holds the memory
            self._memory.close()
            os.close(self._fd)
            self._fd = -1


def _line(value: object) -> bytes:
    import json  # here: most servers have no journal, and would listen later

    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


class Section:
    """The part of a journal that is about one thing; without a journal nothing is kept.

    Args:
        number: of the section; each of its records begins with that.
    """

    def __init__(self, journal: Journal | None = None, number: int = 0) -> None:
        self._journal = journal
        self.number = number
        self.outbox = wire.Outbox() if journal is None else journal.outbox

    def note(self, *fields: Any) -> None:
        """Add a record."""
        if self._journal is not None:
            self._journal.append([self.number, *fields])

    def keep(self, fds: Sequence[int], item: int | None = None) -> None:
        """Have the descriptors kept of an item of this section; None: of the section itself."""
        if self._journal is not None:
            self._journal.keep(group_name(self.number, item), fds)

    @property
    def settled(self) -> bool:
        """Whether everything that was to be kept is kept: only then may others rely on it."""
        return self._journal is None or self._journal.settled()

    def drop(self, item: int | None = None) -> None:
        """Undo `keep`."""
        if self._journal is not None:
            self._journal.drop(group_name(self.number, item))


def group_name(section: int, item: int | None = None) -> str:
    """Name the descriptors of a section, or of one of its items; no other group has that name."""
    return f"{section:x}/" if item is None else f"{section:x}/{item:x}"


def is_group_name(name: str) -> bool:
    """Whether `group_name` could have made this name."""
    return re.fullmatch("[0-9a-f]+/[0-9a-f]*", name) is not None


def _nothing(*_arguments: object) -> None:
    pass
