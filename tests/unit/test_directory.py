"""The directory of names: its format, who may have a name, who is dead, and hostile bytes."""

from __future__ import annotations

import contextlib
import gc
import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.waiting import Background, in_child, until

import ivshmem
from ivshmem import Directory, Entry, Region
from ivshmem.peer import directory, names_table, slot_watch

QUICK: dict[str, Any] = {
    "beat": 0.002,
    "lease": 0.02,
}  # seconds; nobody who is alive is to be seen alive with it


@pytest.fixture
def region() -> Iterator[Region]:
    with Region.create("4K") as made:
        yield made


class Clock:
    """Stands for the module `time`."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    for module in (directory, slot_watch):
        monkeypatch.setattr(module, "time", made)
    return made


def put(region: Region, number: int, data: bytes, slots: int = 15) -> None:
    """Write into a slot what a peer might."""
    with memoryview(region) as memory:
        start = len(memory) - 128 * (slots + 1 - number)
        memory[start : start + len(data)] = data


def get(region: Region, number: int, slots: int = 15) -> bytes:
    with memoryview(region) as memory:
        start = len(memory) - 128 * (slots + 1 - number)
        return bytes(memory[start : start + 128])


def entry(peer: int, name: str, owner: int = 77, role: str = "", vectors: int = 1) -> bytes:
    return names_table.pack(owner, peer, name, role, range(vectors))


def beat(region: Region, number: int) -> None:
    region.atomic_u64(region.size - 128 * (16 - number) + 8).fetch_add(1)


def names(table: Directory) -> list[str]:
    return [found.name for found in table.entries()]


class TestFormat:
    def test_a_slot_byte_by_byte(self) -> None:
        raw = names_table.pack(0x1122334455667788, 0x0102, "näme", "role", range(3, 5))
        body = bytes.fromhex("0201 0300 0200 000000000000")
        body += b"n\xc3\xa4me".ljust(48, b"\0") + b"role".ljust(32, b"\0") + bytes(16)
        owner = bytes.fromhex("8877665544332211")
        assert raw == owner + bytes(8) + struct.pack("<I", zlib.crc32(owner + body)) + body
        assert names_table.parse(raw) == Entry(0x0102, "näme", "role", range(3, 5), None)

    def test_the_trailer_byte_by_byte(self, region: Region) -> None:
        with Directory.create(region) as table:
            assert (table.slots, table.start) == (15, 2048)
        magic, rest = b"IVSHNAME", struct.pack("<II", 1, 15) + bytes(100)
        crc = struct.pack("<I", zlib.crc32(magic + rest))
        assert get(region, 15) == magic + bytes(8) + crc + rest
        assert not any(memoryview(region)[: 4096 - 128])

    @pytest.mark.parametrize(
        ("size", "slots"),
        [(4096, 15), (8192, 31), (16384, 63), (1 << 20, 63), (1 << 40, 63), (256, 1), (0, 1)],
    )
    def test_slots_if_nobody_says(self, size: int, slots: int) -> None:
        assert names_table.default_slots(size) == slots

    def test_the_beat_may_change(self) -> None:
        raw = entry(1, "a")
        assert names_table.parse(raw[:8] + b"12345678" + raw[16:]) == names_table.parse(raw)

    @pytest.mark.sampled(3)
    @pytest.mark.parametrize("position", [*range(8), *range(16, 128)])
    def test_nothing_else_may(self, position: int) -> None:
        raw = bytearray(entry(1, "a", vectors=2))
        raw[position] ^= 0x10
        assert names_table.parse(bytes(raw)) is None

    @pytest.mark.parametrize(
        "change",
        [
            {"owner": 0},
            {"name": b""},
            {"name": b"x" * 48},
            {"name": b"a\0b"},
            {"name": b"\xff"},
            {"name": b"a\x1b[2J"},
            {"name": "a\u202eb".encode()},
            {"name": "a\u200bb".encode()},
            {"name": b" a"},
            {"name": b"a "},
            {"name": b"\xed\xa0\x80"},
            {"role": b"\n"},
            {"role": b"y" * 32},
            {"first": 2048, "count": 1},
            {"first": 65535, "count": 65535},
            {"first": 0, "count": 2049},
        ],
    )
    def test_fields_that_are_wrong_in_spite_of_the_checksum(self, change: dict[str, int]) -> None:
        fields = {"owner": 1, "id": 9, "first": 0, "count": 1, "name": b"a", "role": b"", **change}
        assert names_table.parse(forged(**fields)) is None

    def test_the_largest_that_are_right(self) -> None:
        found = names_table.parse(
            forged(owner=1, id=65535, first=0, count=2048, name=b"n" * 47, role=b"r" * 31)
        )
        assert found == Entry(65535, "n" * 47, "r" * 31, range(2048), None)


def forged(**fields: object) -> bytes:
    values = [fields[key] for key in ("id", "first", "count", "name", "role")]
    raw = struct.pack("<QQIHHH6x48s32s16x", fields["owner"], 0, 0, *values)
    crc = zlib.crc32(raw[:8] + raw[20:])
    return raw[:16] + struct.pack("<I", crc) + raw[20:]


class TestMaking:
    def test_none_is_there(self, region: Region) -> None:
        with pytest.raises(ivshmem.NoDirectory, match="ivshmem serve --names"):
            Directory.open(region)

    def test_the_users_bytes_stay(self, region: Region) -> None:
        memory = memoryview(region)
        memory[:] = b"\xa5" * 4096
        with Directory.create(region, 7) as table, table.publish("a", id=1):
            assert table.start == 3072
            assert bytes(memory[:3072]) == b"\xa5" * 3072
        memory.release()

    def test_twice_is_once(self, region: Region) -> None:
        with Directory.create(region, 3) as first, first.publish("a", id=1):
            for slots in (3, None):
                assert names(Directory.create(region, slots)) == ["a"]
            with pytest.raises(ivshmem.RegionError, match="already, of 3 slots, not 4"):
                Directory.create(region, 4)
        assert Directory.open(region).slots == 3

    def test_what_was_there_before_is_no_entry(self, region: Region) -> None:
        with memoryview(region) as memory:
            memory[:] = b"\xa5" * 4096
        with Directory.create(region) as table:
            assert table.entries() == []
            with table.publish("a", id=1):
                assert names(table) == ["a"]

    def test_entries_outlive_a_lost_trailer(self, region: Region) -> None:
        with Directory.create(region) as table, table.publish("a", id=1):
            put(region, 15, bytes(128))
            assert names(Directory.create(region)) == ["a"]

    @pytest.mark.parametrize("slots", [0, -1, 4096, 1 << 70])
    def test_numbers_that_are_not_allowed(self, region: Region, slots: int) -> None:
        with pytest.raises(ivshmem.RegionError, match="allowed are 1 to 4095"):
            Directory.create(region, slots)

    def test_it_must_fit(self, region: Region) -> None:
        assert Directory.create(region, 31).start == 0
        with Region.create("4K") as other, pytest.raises(ivshmem.RegionError, match="takes 4224"):
            Directory.create(other, 32)

    def test_another_version(self, region: Region) -> None:
        raw = struct.pack("<8s8xIII100x", b"IVSHNAME", 0, 2, 15)
        crc = struct.pack("<I", zlib.crc32(raw[:8] + raw[20:]))
        put(region, 15, raw[:16] + crc + raw[20:])
        for make in (Directory.open, Directory.create):
            with pytest.raises(ivshmem.NoDirectory, match="version 2"):
                make(region)

    @pytest.mark.parametrize("slots", [0, 32, 4096, 0xFFFFFFFF])
    def test_a_number_of_slots_that_cannot_be(self, region: Region, slots: int) -> None:
        raw = struct.pack("<8s8xIII100x", b"IVSHNAME", 0, 1, slots)
        crc = struct.pack("<I", zlib.crc32(raw[:8] + raw[20:]))
        put(region, 15, raw[:16] + crc + raw[20:])
        with pytest.raises(ivshmem.NoDirectory):
            Directory.open(region)

    def test_readonly(self, shm_name: str) -> None:
        with Region.create("4K", name=shm_name) as writable:
            with Region.attach(name=shm_name, readonly=True) as region:
                with pytest.raises(ivshmem.RegionError, match="no directory can be made"):
                    Directory.create(region)
                with Directory.create(writable) as table, table.publish("a", id=1):
                    reader = Directory.create(region)
                    assert names(reader) == ["a"]
                    with pytest.raises(ivshmem.RegionError, match="nothing can be published"):
                        reader.publish("b", id=2)

    def test_an_odd_region(self) -> None:
        fd = os.memfd_create("odd")
        os.truncate(fd, 5000)
        with Region.from_fd(fd) as region:
            with pytest.raises(ivshmem.RegionError, match="at a multiple of 128"):
                Directory.create(region)
            with pytest.raises(ivshmem.NoDirectory):
                Directory.open(region)
        fd = os.memfd_create("tiny")
        os.truncate(fd, 100)
        with Region.from_fd(fd) as region, pytest.raises(ivshmem.NoDirectory):
            Directory.open(region)

    def test_a_closed_region(self, region: Region) -> None:
        region.close()
        for make in (Directory.open, Directory.create):
            with pytest.raises(ivshmem.ClosedError):
                make(region)

    def test_a_lease_that_a_beat_would_miss(self, region: Region) -> None:
        with pytest.raises(ValueError, match="too short"):
            Directory.create(region, beat=1, lease=2)

    def test_a_lease_that_no_clock_reaches(self, region: Region) -> None:
        for lease in (86401, 1e11, float("inf")):
            with pytest.raises(ValueError, match="86400 s or less"):
                Directory.create(region, beat=1, lease=lease)
        with Directory.create(region, beat=43199, lease=86400) as table:
            table.publish("a", id=0)
            assert table.lookup("a").name == "a"


class TestNames:
    def test_publish_find_withdraw(self, region: Region) -> None:
        with Directory.create(region) as table:
            other = Directory.open(region)
            with table.publish("a", "role", range(2, 4), id=5) as mine:
                assert table.lookup("a") == Entry(5, "a", "role", range(2, 4), True)
                assert other.lookup("a") == Entry(5, "a", "role", range(2, 4), None)
                assert mine.lost == ""
            assert other.entries() == []
            mine.withdraw()

    def test_nobody_of_that_name(self, region: Region) -> None:
        with Directory.create(region) as table:
            with pytest.raises(ivshmem.NoSuchName, match=r"'x' .*\(it has none\)"):
                table.lookup("x")
            with table.publish("a", id=1), table.publish("b", id=1):
                with pytest.raises(LookupError, match=r"\(there: a, b\)"):
                    table.lookup("x")
                with pytest.raises(TimeoutError, match=r"'x' .*\(there: a, b\).* 0\.01 s"):
                    table.wait_for("x", 0.01)

    def test_a_long_list_is_cut(self) -> None:
        with Region.create("16K") as region, Directory.create(region) as table:
            for number in range(25):
                put(region, number, entry(1, f"n{number:02}", number + 1), 63)
            with pytest.raises(ivshmem.NoSuchName, match="n18, n19 and 5 more"):
                table.lookup("x")

    def test_lookup_waits(self, region: Region) -> None:
        with Directory.create(region) as table:
            looking = Background(lambda: table.wait_for("late", None))
            table.publish("late", id=3)
            assert looking.result() == Entry(3, "late", "", range(0), True)

    def test_close_ends_waiting(self, region: Region) -> None:
        with Directory.create(region) as table:
            looking = Background(lambda: table.wait_for("never", None))
            table.close()
            with pytest.raises(ivshmem.ClosedError):
                looking.result()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("",), "1 to 47 bytes"),
            (("ä" * 24,), "1 to 47 bytes"),
            (("a\n",), "printable"),
            (("a ",), "no space"),
            (("\ud800",), "printable"),
            (("a", "r" * 32), "0 to 31 bytes"),
            (("a", "\0"), "printable"),
            (("a", "", range(2049)), "0 to 2048"),
            (("a", "", range(-1, 3)), "0 to 2048"),
            (("a", "", range(0, 8, 2)), "are a range"),
            (("a", "", range(5, 3)), "are a range"),
        ],
    )
    def test_what_cannot_be_published(
        self, region: Region, arguments: tuple[str, str, range], message: str
    ) -> None:
        with Directory.create(region) as table:
            with pytest.raises(ValueError, match=message):
                table.publish(*arguments, id=1)
            assert not any(get(region, 0))

    @pytest.mark.parametrize("peer", [-1, 65536])
    def test_ids_that_cannot_be(self, region: Region, peer: int) -> None:
        with Directory.create(region) as table, pytest.raises(ValueError, match="0 to 65535"):
            table.publish("a", id=peer)

    def test_a_region_has_no_id(self, region: Region) -> None:
        with Directory.create(region) as table, pytest.raises(ValueError, match="has no id"):
            table.publish("a")

    def test_a_name_is_taken_once(self, region: Region) -> None:
        with Directory.create(region) as table, table.publish("a", id=1):
            for peer in (1, 2):
                with pytest.raises(ivshmem.NameTaken, match="'a' is the name of peer 1"):
                    table.publish("a", id=peer)
            assert names(table) == ["a"]

    def test_the_same_id_has_several_names(self, region: Region) -> None:
        with Directory.create(region) as one, Directory.open(region) as two:
            one.publish("a", id=1)
            two.publish("b", id=1)
            assert names(one) == names(two) == ["a", "b"]

    def test_full(self, region: Region) -> None:
        with Directory.create(region, 2) as table:
            first = table.publish("a", id=1)
            table.publish("b", id=1)
            with pytest.raises(ivshmem.DirectoryFull, match="the directory is full, with 2 slots"):
                table.publish("c", id=1)
            first.withdraw()
            table.publish("c", id=1)
            assert names(table) == ["b", "c"]

    def test_two_who_enter_it_in_the_same_moment(
        self, region: Region, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Between the look and the entry somebody else has written the same."""
        write, look = Directory._write, Directory._look

        def meanwhile(self: Directory, publication: ivshmem.Publication) -> None:
            write(self, publication)
            put(region, 9, entry(2, "a"))

        def beating(self: Directory, connected: frozenset[int] | None) -> list[slot_watch.Slot]:
            beat(region, 9)
            return look(self, connected)

        monkeypatch.setattr(Directory, "_write", meanwhile)
        monkeypatch.setattr(Directory, "_look", beating)
        with Directory.create(region) as table:
            with pytest.raises(ivshmem.NameTaken, match="name of peer 2"):
                table.publish("a", id=1)
            monkeypatch.undo()
            assert not any(get(region, 0)[:8])
            assert names(table) == ["a"]


class TestLiving:
    def test_an_entry_is_watched(self, region: Region, clock: Clock) -> None:
        table = Directory.create(region)
        put(region, 0, entry(1, "a"))

        def alive() -> list[bool | None]:
            return [found.alive for found in table.entries()]

        assert alive() == [None]
        clock.now += 4.9
        assert alive() == [None]
        beat(region, 0)
        assert alive() == [True]
        clock.now += 4.9
        assert alive() == [True]
        clock.now += 0.2
        assert alive() == []
        with pytest.raises(ivshmem.NoSuchName):
            table.lookup("a")
        beat(region, 0)
        assert alive() == [True]

    def test_another_owner_is_somebody_else(self, region: Region, clock: Clock) -> None:
        table = Directory.create(region)
        put(region, 0, entry(1, "a"))
        table.entries()
        clock.now += 60
        put(region, 0, entry(1, "a", owner=78))
        assert names(table) == ["a"]

    def test_opening_begins_to_watch(self, region: Region, clock: Clock) -> None:
        Directory.create(region)
        put(region, 0, entry(1, "a"))
        table = Directory.open(region)
        clock.now += 60
        assert table.entries() == []

    def test_the_dead_are_removed_and_their_names_are_free(self, region: Region) -> None:
        with Directory.create(region, 2, **QUICK) as table:
            put(region, 0, entry(1, "a"), 2)
            put(region, 1, b"\xff" * 128, 2)
            table.publish("a", id=2)
            assert [(e.name, e.id) for e in table.entries()] == [("a", 2)]
            table.publish("b", id=2)
            put(region, 1, entry(1, "c"), 2)  # over somebody, who comes back when it is dead
            until(lambda: names(table) == ["a", "b"])

    def test_who_was_stopped_thinks_nobody_dead(self, region: Region, clock: Clock) -> None:
        with Directory.create(region, beat=60, lease=200) as table:
            put(region, 1, entry(1, "a"))
            table.publish("b", id=2)
            clock.now += 1000
            assert names(table) == ["a", "b"]
            clock.now += 99
            assert names(table) == ["a", "b"]
            clock.now += 99
            assert names(table) == ["a", "b"]
            clock.now += 3
            assert names(table) == ["b"]

    @pytest.mark.parametrize(
        "harm",
        [
            lambda region: put(region, 0, bytes(128)),
            lambda region: put(region, 0, b"\xff" * 128),
            lambda region: put(region, 0, entry(9, "x", owner=5)),
            lambda region: put(region, 0, get(region, 0)[:40] + b"!"),
        ],
        ids=["zeros", "ones", "somebody else", "a byte"],
    )
    def test_what_was_written_over_comes_back(
        self, region: Region, harm: Callable[[Region], None]
    ) -> None:
        with Directory.create(region, beat=0.002, lease=5) as table:
            mine = table.publish("a", "role", range(3), id=1)
            harm(region)
            until(lambda: Entry(1, "a", "role", range(3), True) in table.entries())
            until(lambda: mine.lost == "")

    def test_so_does_the_trailer(self, region: Region) -> None:
        with Directory.create(region, beat=0.002) as table:
            table.publish("a", id=1)
            put(region, 15, b"\xff" * 128)
            until(lambda: names_table.trailer_of(region) == (15, None))

    def test_a_copy_of_a_slot_goes_away(self, region: Region) -> None:
        with Directory.create(region, beat=0.002, lease=0.5) as table:
            table.publish("a", id=1)
            put(region, 3, get(region, 0))
            assert names(table) == ["a", "a"]
            until(lambda: names(table) == ["a"])
            assert table.lookup("a").alive

    def test_lost_and_found(self, region: Region) -> None:
        """Somebody else has got the name; when that one goes, it comes back."""
        with Directory.create(region, beat=0.002, lease=5) as table:
            mine = table.publish("a", id=1)
            put(region, 0, bytes(128))
            with Directory.open(region, beat=0.002) as other:
                try:
                    theirs = other.publish("a", id=2)
                except ivshmem.NameTaken:  # it came back at once
                    return
                until(lambda: mine.lost)
                assert mine.lost == "'a' is the name of peer 2: choose another"
                theirs.withdraw()
                until(lambda: not mine.lost)
                assert other.lookup("a").id == 1


class Follower(ivshmem.Endpoint):
    """Stands for a client, which is told who is connected."""

    vectors = 2
    peers: Sequence[int] = (1,)
    connected = True

    def __init__(self, region: Region) -> None:
        self.region = region
        self.id = 3


class TestEndpoints:
    @pytest.fixture
    def follower(self, region: Region) -> Iterator[Follower]:
        with Follower(region) as made:
            yield made

    def test_id_and_vectors_are_the_endpoints(self, follower: Follower) -> None:
        with Directory.create(follower) as table:
            table.publish("a")
            table.publish("b", vector_range=range(1, 2))
            assert table.entries() == [
                Entry(3, "a", "", range(2), True),
                Entry(3, "b", "", range(1, 2), True),
            ]
            with pytest.raises(ValueError, match="the endpoint has 2 vectors"):
                table.publish("c", vector_range=range(3))

    def test_who_has_left_is_not_listed(self, region: Region, follower: Follower) -> None:
        table = Directory.create(follower)
        put(region, 0, entry(1, "a"))
        put(region, 1, entry(3, "b"))
        put(region, 2, entry(4, "c"))
        assert names(table) == ["a", "b"]
        follower.peers = [4]
        assert names(table) == ["b", "c"]
        follower.connected = False  # what it knows of peers is old
        assert names(table) == ["a", "b", "c"]

    def test_without_vectors_nobody_is_announced(self, region: Region, follower: Follower) -> None:
        table = Directory.create(follower)
        put(region, 0, entry(4, "a"))
        follower.vectors = 0
        assert names(table) == ["a"]

    def test_a_restart_takes_over_its_name(self, region: Region, follower: Follower) -> None:
        with Directory.create(follower) as table:
            put(region, 0, entry(3, "a"))
            put(region, 1, entry(3, "b"))
            table.publish("a")
            assert names(table) == ["a", "b"]
            assert table.lookup("a").alive
            # Who has ids that tell nobody apart waits until it is dead.
            follower.vectors = 0
            waiting = Background(lambda: table.publish("b"))
            assert waiting.running
            table.close()
            with pytest.raises(ivshmem.ClosedError):
                waiting.result()

    def test_the_name_of_one_who_left_is_soon_free(
        self, region: Region, follower: Follower
    ) -> None:
        with Directory.create(follower, beat=0.01, lease=60) as table:
            put(region, 0, entry(4, "a"))
            assert table.publish("a").lost == ""

    def test_not_so_if_it_beats(self, region: Region, follower: Follower) -> None:
        """A broker's clients are told of peers later than the directory tells them."""
        with Directory.create(region, beat=0.01) as other, other.publish("a", id=4):
            with Directory.open(follower, beat=0.1) as table:
                assert table.entries() == []
                with pytest.raises(ivshmem.NameTaken, match="peer 4"):
                    table.publish("a")


class TestEnding:
    def test_closed(self, region: Region) -> None:
        table = Directory.create(region)
        mine = table.publish("a", id=1)
        table.close()
        table.close()
        mine.withdraw()
        assert not any(get(region, 0)[:8])
        assert repr(table) == "<ivshmem.Directory, closed>"
        for call in (table.entries, lambda: table.publish("b", id=1), lambda: table.lookup("a")):
            with pytest.raises(ivshmem.ClosedError, match="the directory is closed"):
                call()

    def test_the_region_is_closed_first(self, region: Region) -> None:
        with Directory.create(region, beat=0.002) as table:
            mine = table.publish("a", id=1)
            (keeper,) = keepers()
            region.close()
            keeper.join(10)
            assert not keeper.is_alive()
            with pytest.raises(ivshmem.ClosedError, match="the memory is closed"):
                table.entries()
            mine.withdraw()

    def test_forgotten(self, region: Region) -> None:
        def forget() -> None:
            Directory.create(region, beat=0.01).publish("a", id=1)
            until(collected)

        def collected() -> bool:
            """A keeper has hold of it while it beats, and so one collection may come too early."""
            gc.collect()
            return not keepers()

        with pytest.warns(ResourceWarning, match="unclosed <ivshmem.Directory, 15 slots"):
            forget()
        assert not any(get(region, 0)[:8])

    def test_who_only_reads_has_nothing_to_close(self, region: Region) -> None:
        Directory.create(region)
        assert Directory.open(region).entries() == []
        assert not keepers()

    def test_a_forked_child_leaves_it_alone(self, region: Region) -> None:
        with Directory.create(region) as table, table.publish("a", id=1) as mine:

            def child() -> None:
                for call in (table.entries, lambda: table.publish("b", id=1)):
                    with pytest.raises(RuntimeError, match="forked child"):
                        call()
                mine.withdraw()
                table.close()

            before = get(region, 0)
            in_child(child)
            assert get(region, 0)[16:] == before[16:]
            assert names(table) == ["a"]

    def test_no_thread_to_be_had(self, region: Region, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        with Directory.create(region) as table:
            monkeypatch.setattr(threading.Thread, "start", refuse)
            with pytest.raises(RuntimeError, match="new thread"):
                table.publish("a", id=1)
            monkeypatch.undo()
            assert table.entries() == []
            table.publish("a", id=1)

    def test_one_thread_for_all(self, region: Region) -> None:
        with Directory.create(region) as table:
            for name in "abc":
                table.publish(name, id=1)
            assert len(keepers()) == 1
        assert not keepers()


def keepers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "ivshmem-directory"]


# -- hostile bytes --------------------------------------------------------------------------------

SLOTS = 3
small = st.binary(max_size=50)
slots = st.one_of(
    st.binary(min_size=128, max_size=128),
    st.builds(
        forged,
        owner=st.integers(0, 2**64 - 1),
        id=st.integers(0, 65535),
        first=st.one_of(st.integers(0, 65535), st.just(0)),
        count=st.one_of(st.integers(0, 65535), st.just(1)),
        name=st.one_of(small, st.text(max_size=20).map(str.encode), st.just(b"mine")),
        role=st.one_of(small, st.just(b"")),
    ),
)


def check(found: Entry) -> None:
    assert 0 <= found.id <= 65535
    assert 1 <= len(found.name.encode()) <= 47
    assert len(found.role.encode()) <= 31
    assert (found.name + found.role).isprintable()
    assert found.vector_range.step == 1
    assert 0 <= found.vector_range.start <= found.vector_range.stop <= 2048
    assert found.alive in (True, None)


@given(st.lists(slots, min_size=SLOTS, max_size=SLOTS))
def test_any_bytes_in_the_table(table_bytes: list[bytes]) -> None:
    with Region.create("4K") as region, Directory.create(region, SLOTS) as table:
        for number, data in enumerate(table_bytes):
            put(region, number, data, SLOTS)
        for found in table.entries():
            check(found)
            assert table.lookup(found.name).name == found.name


@settings(max_examples=50)
@given(st.lists(slots, min_size=SLOTS, max_size=SLOTS))
def test_publishing_among_any_bytes(table_bytes: list[bytes]) -> None:
    """They do not beat, so they go away."""

    def enter(table: Directory) -> ivshmem.Publication | None:
        # Where this process stands still for two leases, it cannot know yet who lives.
        with contextlib.suppress(ivshmem.DirectoryFull, ivshmem.NameTaken):
            return table.publish("mine", id=1)
        return None

    with Region.create("4K") as region, Directory.create(region, SLOTS, **QUICK) as table:
        for number, data in enumerate(table_bytes):
            put(region, number, data, SLOTS)
        until(lambda: enter(table))
        until(lambda: [(e.name, e.id) for e in table.entries()] == [("mine", 1)])


@given(st.binary(min_size=128, max_size=128))
def test_any_bytes_in_the_trailer(trailer: bytes) -> None:
    with Region.create("4K") as region:
        put(region, 15, trailer)
        with pytest.raises(ivshmem.NoDirectory):
            Directory.open(region)


@pytest.mark.nightly
@settings(max_examples=30)
@given(st.randoms(use_true_random=False))
def test_flips_while_publishing_and_listing(random: object) -> None:
    """By a peer that never lets go, several times for each look."""
    assert hasattr(random, "randrange")
    with Region.create("4K") as region, Directory.create(region, SLOTS, **QUICK) as table:
        memory = memoryview(region)
        start = table.start
        published = []
        for step in range(20):
            for _ in range(5):
                memory[start + random.randrange(SLOTS * 128)] ^= 1 << random.randrange(8)
            for found in table.entries():
                check(found)
            if step in (2, 8, 14):
                with contextlib.suppress(ivshmem.DirectoryFull):  # flips made it seem so
                    published.append(table.publish(f"n{step}", id=step).name)
        memory.release()
        until(lambda: names(table) == sorted(published))
