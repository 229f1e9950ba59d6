"""A directory of names in memory that others write at any moment.

The moments that count are those between two copies: a script says what is written before which
copy. The clock is the script's, too, and so is what is random in an owner's word.
"""

from __future__ import annotations

import contextlib
import os
import struct
import time as real_time
import zlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from random import Random
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import ivshmem
from ivshmem.memory.region import Region
from ivshmem.peer import directory as module
from ivshmem.peer import names_table, slot_watch
from ivshmem.peer.directory import Directory, Publication
from ivshmem.peer.endpoint import Endpoint
from ivshmem.peer.limits import AREA_START, MAGIC, MAX_SLOTS, SLOT_BYTES
from ivshmem.peer.names_table import DEFAULT_SLOTS, NAME_BYTES, ROLE_BYTES, VERSION, Entry
from ivshmem.protocol.limits import MAX_ID, MAX_VECTORS
from ivshmem.system import time_limits

from .script import Grammar, Op
from .target import Finding, Scripted

_AHEAD = 4096  # bytes at the region's begin that are looked at
_SIZES = (4096, 8192, 16384, 1 << 20)
_BEAT, _LEASE = 0.02, 0.05
_TRAILER = struct.Struct("<8s8xIII4xQQ80x")
_SLOT = struct.Struct("<QQIHHH6x48s32s16x")

FORMS = {
    "open": "b",  # on what: a region, an endpoint, a client
    "create": "bw",  # on what, slots
    "entries": "",
    "lookup": "b",  # name
    "publish": "bbb",  # name, role, id
    "withdraw": "b",  # which of the published
    "beat": "",  # what the thread does
    "time": "b",  # hundredths of a second that go by
    "close": "",
    "trailer": "wbbww",  # slots, version; whether its checksum is right; area: offset, size
    "slot": "bbqwwws",  # which, bits of what is right, owner, id, first vector, vectors, name
    "move": "bq",  # slot, what its beat becomes
    "owner": "bq",  # slot, whose it becomes
    "copy": "bb",  # slot, to where
    "bytes": "ws",  # how far from the end, what
    "zero": "",
    "later": "b",  # the next operation, if it writes, happens before so many copies have been made
    "peers": "bb",  # who is connected: ids from one on, how many
    "start": "bb",  # where it stands first: size, whether all is opened for reading only
}
_WRITES = {"trailer", "slot", "move", "owner", "copy", "bytes", "zero", "peers", "time"}

NAMES = (
    *("a", "b", "", "sensor", "x" * NAME_BYTES, "x" * (NAME_BYTES + 1), "ä" * 23, " a", "a\n"),
    *("\x1b[2J", "\u202e", "a\0b", "\ud800", "\U0001f600", "a b"),
)
_RIGHT_SUM, _TERMINATED = 1, 2  # bits of a slot


class _Peer(Endpoint):
    """An endpoint without anybody behind it."""

    id = 3

    def __init__(self, region: Region) -> None:
        self.region = region
        self.number = 2

    @property
    def vectors(self) -> int:
        return self.number

    def __repr__(self) -> str:
        return "a peer"


class _Follower(_Peer):
    """One that is told who is there."""

    connected = True

    def __init__(self, region: Region) -> None:
        super().__init__(region)
        self.peers = [0, 1, 2]


class _Quiet(Directory):
    """Without a thread: the script says when it beats."""

    def _start_keeper(self) -> None:
        self._thread = cast(Any, SimpleNamespace(join=lambda _: None))


class Clock:
    """The time, which goes on when somebody waits for it."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.waits = 0

    def monotonic(self) -> float:
        return self.now

    def wait(self, seconds: float) -> bool:
        self.waits += 1
        self.now += max(seconds, 1e-4)
        if self.waits > 5000:
            raise Finding("a call waits for ever")
        return False

    def set(self) -> None:
        """A thread would end."""


class Player:
    """One input: operations of ours, and of others in between."""

    def __init__(self, script: Sequence[Op], region: Region, readonly: Region) -> None:
        self.script = script
        self.writable = region
        self.region = readonly if self._begins_readonly() else region
        self.clock = Clock()
        self.numbers = Random(len(script))  # noqa: S311
        self.directories: list[_Quiet] = []
        self.publications: list[Publication] = []
        self.peer = _Peer(self.region)
        self.follower = _Follower(self.region)
        self.later: deque[tuple[int, Op]] = deque()  # after how many copies, what is written
        self.copies = 0
        self.limit = 0
        self.shadow = bytearray(_AHEAD)  # the first bytes, as others have written them

    def _begins_readonly(self) -> bool:
        return bool(self.script) and self.script[0].name == "start" and self.script[0].args[1] == 1

    def play(self) -> None:
        self.writable.write(0, bytes(self.region.size))
        try:
            with self._instead():
                wait = None
                for op in self.script:
                    if op.name == "later":
                        wait = _number(op)
                    elif op.name in _WRITES and wait is not None:
                        self.later.append((self.copies + wait, op))
                        wait = None
                    else:
                        self._do(op)
        finally:
            for directory in self.directories:
                directory.close()
            for endpoint in (self.peer, self.follower):
                # The memory is the target's.
                endpoint.region = None  # type: ignore[assignment]
                endpoint.close()

    def _do(self, op: Op) -> None:
        self.limit = self.copies + 160 * (self.region.size // SLOT_BYTES)
        try:
            getattr(self, f"_op_{op.name}")(*op.args)
        except (ivshmem.IvshmemError, ValueError, TimeoutError) as error:
            if not isinstance(error, _DOCUMENTED.get(op.name, ())):
                raise
            text = str(error)
            if not text or not text.isprintable():
                raise Finding(f"what {op} says is not one line: {text!r}") from error
        ahead = min([*(each.start for each in self.directories), _AHEAD])
        if self.writable.read(0, ahead) != self.shadow[:ahead]:
            raise Finding(f"{op} wrote before the directory")

    def _most_slots(self) -> int:
        return max([each.slots for each in self.directories], default=DEFAULT_SLOTS)

    # -- what it takes for clock, thread and chance -----------------------------------------------

    @contextlib.contextmanager
    def _instead(self) -> Iterator[None]:
        copy = names_table.copy_slot

        def copied(region: Region, offset: int) -> bytes:
            self.copies += 1
            while self.later and self.later[0][0] < self.copies:
                self._write(self.later.popleft()[1])
            if self.copies > self.limit:
                raise Finding("a call goes on for ever")
            return copy(region, offset)

        system = SimpleNamespace(getpid=os.getpid, urandom=self.numbers.randbytes)
        threads = SimpleNamespace(
            RLock=contextlib.nullcontext,
            Event=lambda: self.clock,
            Thread=None,
            current_thread=lambda: None,
        )
        with (
            mock.patch.object(module, "copy_slot", copied),
            mock.patch.object(slot_watch, "copy_slot", copied),
            mock.patch.object(module, "os", system),
            mock.patch.object(module, "time", self.clock),
            mock.patch.object(slot_watch, "time", self.clock),
            mock.patch.object(time_limits, "time", self.clock),
            mock.patch.object(module, "threading", threads),
        ):
            yield

    # -- ours -------------------------------------------------------------------------------------

    def _place(self, which: int) -> Endpoint | Region:
        return (self.region, self.peer, self.follower)[which % 3]

    def _made(self, directory: Directory) -> None:
        self.directories.append(cast(_Quiet, directory))
        if not 1 <= directory.slots <= MAX_SLOTS or directory.start < 0:
            raise Finding(f"{directory}")
        area = directory.channels
        if area is not None and not (
            AREA_START <= area.start < area.stop <= directory.start and area.start % 4096 == 0
        ):
            raise Finding(f"{directory}: {area} for channels")

    def _op_open(self, which: int) -> None:
        if len(self.directories) < 4:
            self._made(_Quiet.open(self._place(which), beat=_BEAT, lease=_LEASE))

    def _op_create(self, which: int, slots: int) -> None:
        if len(self.directories) < 4:
            wanted = slots % 100 or None
            self._made(_Quiet.create(self._place(which), wanted, beat=_BEAT, lease=_LEASE))

    def _op_entries(self) -> None:
        for directory in self.directories:
            entries = directory.entries()
            names = [entry.name for entry in entries]
            if names != sorted(names) or len(entries) > directory.slots:
                raise Finding(f"{entries}")
            for entry in entries:
                self._check(entry)

    def _check(self, entry: Entry) -> None:
        if not (
            0 <= entry.id <= MAX_ID
            and 1 <= len(entry.name.encode()) <= NAME_BYTES
            and len(entry.role.encode()) <= ROLE_BYTES
            and entry.name.isprintable()
            and entry.role.isprintable()
            and entry.name == entry.name.strip(" ")
            and 0 <= entry.vector_range.start <= entry.vector_range.stop <= MAX_VECTORS
            and entry.vector_range.step == 1
            and entry.alive is not False
        ):
            raise Finding(f"{entry}")

    def _op_lookup(self, name: int) -> None:
        for directory in self.directories:
            wanted = NAMES[name % len(NAMES)]
            entry = directory.wait_for(wanted, 0.01 * (name >> 4))
            self._check(entry)
            if entry.name != wanted:
                raise Finding(f"{wanted!r} was looked up, and {entry} found")

    def _op_publish(self, name: int, role: int, peer: int) -> None:
        if self.directories:
            directory = self.directories[name // len(NAMES) % len(self.directories)]
            texts = NAMES[name % len(NAMES)], NAMES[role % len(NAMES)]
            made = directory.publish(*texts, id=None if peer > 200 else peer)
            self.publications.append(made)

    def _op_withdraw(self, which: int) -> None:
        if self.publications:
            self.publications[which % len(self.publications)].withdraw()

    def _op_beat(self) -> None:
        for directory in self.directories:
            if directory._thread is not None:
                directory._keep()

    def _op_close(self) -> None:
        if self.directories:
            self.directories[-1].close()
            repr(self.directories[-1])

    def _op_later(self, _: int) -> None:
        pass  # seen to in `play`

    def _op_start(self, *_: int) -> None:
        pass

    # -- others' ----------------------------------------------------------------------------------

    def _write(self, op: Op) -> None:
        getattr(self, f"_op_{op.name}")(*op.args)

    def _start(self) -> int:
        slots = self._most_slots()
        return max(self.region.size - (slots + 1) * SLOT_BYTES, 0)

    def _put(self, offset: int, data: bytes) -> None:
        data = data[: self.region.size - offset]
        self.writable.write(offset, data)
        if offset < _AHEAD:
            self.shadow[offset : offset + len(data)] = data
            del self.shadow[_AHEAD:]

    def _at(self, slot: int) -> int:
        return min(self._start() + slot % 64 * SLOT_BYTES, self.region.size - SLOT_BYTES)

    def _op_trailer(self, slots: int, version: int, right: int, area: int, area_size: int) -> None:
        number = VERSION if version < 200 else version
        # Odd numbers are near the end of what 64 bits hold.
        sizes = [
            (unit * size) ^ -(size & 1) % 2**64 for unit, size in ((2048, area), (512, area_size))
        ]
        data = bytearray(_TRAILER.pack(MAGIC, 0, number, slots, *sizes))
        if right < 200:
            data[16:20] = _sum(data)
        self._put(self.region.size - SLOT_BYTES, bytes(data))

    def _op_slot(
        self, slot: int, right: int, owner: int, peer: int, first: int, count: int, name: bytes
    ) -> None:
        end = b"\0" if right & _TERMINATED else b"\xff"
        texts = name[:48].ljust(48, end), name[48:80].ljust(32, b"\0")
        data = bytearray(_SLOT.pack(owner % 2**64, 0, 0, peer, first, count, *texts))
        if right & _RIGHT_SUM:
            data[16:20] = _sum(data)
        self._put(self._at(slot), bytes(data))

    def _op_move(self, slot: int, beat: int) -> None:
        self._put(self._at(slot) + 8, (beat % 2**64).to_bytes(8, "little"))

    def _op_owner(self, slot: int, owner: int) -> None:
        self._put(self._at(slot), (owner % 2**64).to_bytes(8, "little"))

    def _op_copy(self, slot: int, other: int) -> None:
        self._put(self._at(other), self.writable.read(self._at(slot), SLOT_BYTES))

    def _op_bytes(self, back: int, data: bytes) -> None:
        # Not before the directory: that nobody else writes there is what is checked.
        self._put(max(self.region.size - back, self._start()), data)

    def _op_zero(self) -> None:
        start = self._start()
        self._put(start, bytes(self.region.size - start))

    def _op_peers(self, first: int, count: int) -> None:
        self.follower.peers = list(range(first, first + count % 16))
        self.follower.connected = count < 128
        self.peer.number = first % 4

    def _op_time(self, hundredths: int) -> None:
        self.clock.now += hundredths / 100


# What each of ours may raise, by its documentation.
_DOCUMENTED: Mapping[str, tuple[type[Exception], ...]] = {
    "open": (ivshmem.NoDirectory, ivshmem.ClosedError),
    "create": (ivshmem.RegionError, ivshmem.NoDirectory, ivshmem.ClosedError),
    "entries": (ivshmem.ClosedError,),
    "lookup": (TimeoutError, ivshmem.ClosedError),
    "publish": (
        ivshmem.NameTaken,
        ivshmem.DirectoryFull,
        ivshmem.RegionError,
        ivshmem.ClosedError,
        ValueError,
    ),
    "withdraw": (),
    "beat": (),
    "close": (),
}


def _sum(data: bytes | bytearray) -> bytes:
    return zlib.crc32(bytes(data[:8] + data[20:])).to_bytes(4, "little")


def _number(op: Op) -> int:
    (value,) = op.args
    assert isinstance(value, int)
    return value


def slot(which: int, name: bytes, *, owner: int = 77, peer: int = 2, vectors: int = 1) -> Op:
    return Op("slot", (which, _RIGHT_SUM | _TERMINATED, owner, peer, 0, vectors, name))


class DirectoryTarget(Scripted):
    """What peers write into a directory of names."""

    name = "directory"
    modules = ("peer/directory", "peer/names_table", "peer/slot_watch")
    share = 4
    grammar = Grammar(
        FORMS,
        [
            [Op("create", (1, 7))],
            [Op("create", (2, 7)), Op("publish", (0, 2, 255)), slot(0, b"b"), Op("entries")],
            [Op("trailer", (7, 0, 0, 0, 0)), Op("open", (0,))],
            [],
        ],
        [name.encode(errors="surrogatepass") for name in NAMES],
    )

    def set_up(self) -> None:
        self._regions: list[tuple[Region, Region]] = []
        for size in _SIZES:
            region = self.undo.enter_context(Region.create(size))
            again = Region.from_fd(region.readonly_fd(), readonly=True)
            self._regions.append((region, self.undo.enter_context(again)))

    def play(self, script: Sequence[Op]) -> None:
        size = 0
        if script and script[0].name == "start":
            first = script[0].args[0]
            assert isinstance(first, int)
            size = len(_SIZES) - 1 if first == 255 else first % (len(_SIZES) - 1)
        began = real_time.monotonic()
        Player(script, *self._regions[size]).play()
        if real_time.monotonic() - began > 20:
            raise Finding("it took more than 20 seconds")

    def scripts(self) -> Sequence[Sequence[Op]]:
        one, two = Op("create", (1, 7)), Op("open", (2,))
        both = [one, two, Op("publish", (0, 2, 255)), Op("publish", (16, 2, 5))]
        return [
            [*both, Op("entries"), Op("lookup", (0,)), Op("beat"), Op("withdraw", (0,))],
            [*both, Op("time", (9,)), Op("beat"), Op("entries"), Op("close"), Op("entries")],
            [*both, Op("later", (1,)), Op("zero"), Op("beat"), Op("entries"), Op("beat")],
            [*both, Op("later", (9,)), slot(2, b"a", owner=5), Op("publish", (1, 2, 4))],
            [one, *[slot(n, b"n%d" % n, owner=n + 1) for n in range(7)], Op("publish", (0, 0, 9))],
            [one, slot(1, b"a", peer=9), Op("move", (1, 5)), Op("entries"), Op("time", (1,))],
            [Op("trailer", (31, 0, 0, 0, 0)), Op("open", (0,)), slot(3, b"b"), Op("lookup", (17,))],
            [
                Op("start", (255, 0)),
                Op("trailer", (4095, 0, 0, 0, 0)),
                Op("open", (1,)),
                Op("entries"),
            ],
            [
                Op("start", (0, 1)),
                Op("trailer", (9, 0, 0, 0, 0)),
                Op("open", (2,)),
                Op("publish", (0, 2, 1)),
            ],
            [Op("trailer", (31, 255, 0, 0, 0)), Op("open", (0,)), Op("create", (0, 9))],
            [Op("start", (255, 0)), Op("trailer", (31, 0, 0, 4, 16)), Op("open", (0,))],
            [Op("start", (255, 0)), Op("trailer", (31, 0, 0, 4, 17)), Op("open", (0,))],
        ]
