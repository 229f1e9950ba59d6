"""The area for channels in a region: where the directory of names places it, and says so."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable, Iterator

import pytest
from support.waiting import until

import ivshmem
from ivshmem import Directory, Region, RegionError
from ivshmem.native import areas
from ivshmem.peer import channel_area, names_table
from ivshmem.peer.limits import AREA_START, LEAST_AREA

SIZE = 1 << 20
NAMES = 64 * 128  # bytes of a directory of 63 slots


@pytest.fixture
def region() -> Iterator[Region]:
    with Region.create(SIZE) as region:
        yield region


def trailer(region: Region) -> bytes:
    return region.read(region.size - 128, 128)


def forged(slots: int, area: int, size: int, *, version: int = 1) -> bytes:
    raw = struct.pack("<8s8xIII4xQQ80x", b"IVSHNAME", 0, version, slots, area, size)
    return raw[:16] + struct.pack("<I", zlib.crc32(raw[:8] + raw[20:])) + raw[20:]


class TestMaking:
    def test_the_bytes_of_the_trailer_and_of_the_header(self, region: Region) -> None:
        """The layouts of docs/reference/file-formats.md, byte by byte."""
        Directory.create(region, channels="64K")
        offset = SIZE - NAMES - 0x10000
        assert trailer(region) == bytes.fromhex(
            "4956 5348 4e41 4d45 0000 0000 0000 0000"  # IVSHNAME
            "d6e7 f039 0100 0000 3f00 0000 0000 0000"  # CRC-32, version, slots
            "00e0 0e00 0000 0000 0000 0100 0000 0000" + "00" * 80  # offset 0xee000, size
        )
        assert offset == 0xEE000
        assert region.read(offset, 48) == bytes.fromhex(
            "5356 4d48 4348 4e4c 0100 0000 1000 0000"  # SVMHCHNL, version, places
            "0800 0000 0d00 0000 0010 0000 0000 0000"  # records, units, bytes of a unit
            "0000 0100 0000 0000 b660 af2a 0000 0000"  # bytes of the area, CRC-32
        )

    @pytest.mark.parametrize("size", [LEAST_AREA, LEAST_AREA + 1, 100_000, SIZE - NAMES - 8192])
    def test_it_lies_before_the_names(self, region: Region, size: int) -> None:
        with memoryview(region) as memory:
            memory[:] = b"\xa5" * SIZE
        directory = Directory.create(region, channels=size)
        assert directory.slots == 63
        where = directory.channels
        assert where is not None
        assert len(where) == size
        assert where.start % 4096 == 0
        assert where.start >= AREA_START
        assert directory.start - 4096 < where.stop <= directory.start == SIZE - NAMES
        assert region.read(0, where.start) == b"\xa5" * where.start
        area = areas.area_of(region, where.start)
        assert area is not None
        assert area.size == size
        assert areas.find_area(region) == area
        assert Directory.open(region).channels == where

    def test_its_tables_grow_with_it(self) -> None:
        with Region.create("64M") as region:
            Directory.create(region, channels="48M")
            area = areas.find_area(region)
            assert area is not None
            assert (area.places, area.records, area.unit) == (256, 256, 8192)
            assert area.units * area.unit > (48 << 20) - (1 << 18)  # the rest is tables

    def test_twice_is_once(self, region: Region) -> None:
        with Directory.create(region, 31, channels="128K") as first, first.publish("a", id=1):
            where = first.channels
            assert where is not None
            region.write(where.start + 4096, b"a place")
            before = region.read(where.start, len(where))
            for channels in (None, 0x20000, "128K"):
                again = Directory.create(region, channels=channels)
                assert again.channels == where
                assert [entry.name for entry in again.entries()] == ["a"]
            assert region.read(where.start, len(where)) == before
            with pytest.raises(RegionError, match="128K for channels already, not 64K"):
                Directory.create(region, channels="64K")

    def test_names_that_are_there_stay(self, region: Region) -> None:
        with Directory.create(region, 31, beat=0.002) as first, first.publish("a", id=1):
            where = Directory.create(region, channels="64K").channels
            assert where is not None
            assert [entry.name for entry in first.entries()] == ["a"]
            until(lambda: first.channels == where)  # it looks at each beat

    def test_a_header_that_is_lost_is_made_again(self, region: Region) -> None:
        where = Directory.create(region, channels="64K").channels
        assert where is not None
        region.write(where.start, bytes(8))
        assert Directory.open(region).channels == where
        assert areas.area_of(region, where.start) is None
        assert Directory.create(region, channels="64K").channels == where
        assert areas.area_of(region, where.start) is not None

    def test_a_trailer_that_is_lost_comes_back_with_it(self, region: Region) -> None:
        with Directory.create(region, channels="64K", beat=0.002) as table:
            table.publish("a", id=1)
            before = trailer(region)
            region.write(SIZE - 128, b"\xff" * 128)
            until(lambda: trailer(region) == before)

    def test_a_trailer_that_is_half_written_is_not_overwritten(self, region: Region) -> None:
        """By a peer that knows of no area, while another one sets it aside."""
        with Directory.create(region, 31, beat=60, lease=200) as table, table.publish("a", id=1):
            region.write(SIZE - 128 + 16, bytes(4))  # its checksum
            half = trailer(region)
            table._beat_once()
            assert trailer(region) == half
            region.write(SIZE - 128, forged(31, 8192, 16384))
            table._beat_once()
            assert table.channels == range(8192, 24576)
            region.write(SIZE - 128, half)
            for _ in range(2):
                table._beat_once()
            assert trailer(region) == forged(31, 8192, 16384)

    @pytest.mark.parametrize(
        ("size", "channels", "message"),
        [
            (SIZE, LEAST_AREA - 1, "has room for 16K to 1008K"),
            (SIZE, SIZE - NAMES - 8191, "has room for 16K to 1008K"),
            (SIZE, 0, "0 bytes for channels: a region of 1M has room for 16K to 1008K"),
            (SIZE, 1 << 70, "has room for"),
            (16384, LEAST_AREA, "no room for channels in a region of 16K"),
            (SIZE, "much", "not a size"),
            (SIZE, -1, "cannot be negative"),
        ],
    )
    def test_what_does_not_fit(self, size: int, channels: int | str, message: str) -> None:
        """Nothing is made then, not even the names."""
        with Region.create(size) as region:
            with pytest.raises(RegionError, match=message):
                Directory.create(region, channels=channels)
            assert names_table.trailer_of(region) is None

    def test_of_a_region_that_is_read_only(self, region: Region) -> None:
        Directory.create(region)
        with Region.from_fd(region.readonly_fd(), readonly=True) as readonly:
            with pytest.raises(RegionError, match="reading only"):
                Directory.create(readonly, channels="64K")
            where = Directory.create(region, channels="64K").channels
            assert Directory.create(readonly, channels="64K").channels == where
            assert where is not None
            assert areas.sweep(readonly, where.start) == 0

    def test_a_process_that_is_killed_while_it_makes_one_leaves_none(
        self, region: Region, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def dies(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(channel_area, "write_trailer", dies)
            with pytest.raises(KeyboardInterrupt):
                Directory.create(region, channels="64K")
        assert Directory.open(region).channels is None
        assert areas.find_area(region) is None
        assert Directory.create(region, channels="128K").channels is not None


class TestHostileTrailers:
    @pytest.mark.parametrize(
        ("area", "size"),
        [
            (0, 0),
            (0, 0x10000),
            (4096, 0x10000),
            (8192, 0),
            (8193, 0x10000),
            (8192, SIZE - NAMES - 8191),
            (SIZE - NAMES, 1),
            (SIZE, 0x10000),
            (2**64 - 4096, 8192),
            (8192, 2**64 - 8192),
            (8192, 2**64 - 1),
        ],
    )
    def test_an_area_that_cannot_be_there_is_none(
        self, region: Region, area: int, size: int
    ) -> None:
        region.write(SIZE - 128, forged(63, area, size))
        assert Directory.open(region).channels is None
        assert areas.find_area(region) is None

    @pytest.mark.parametrize("word", range(6))
    def test_a_header_whose_words_are_wrong(self, region: Region, word: int) -> None:
        where = Directory.create(region, channels="64K").channels
        assert where is not None
        at = where.start + 8 * word
        right = region.read(at, 8)
        for value in (bytes(8), b"\xff" * 8, os.urandom(8)):
            region.write(at, value)
            assert areas.area_of(region, where.start) is None
        region.write(at, right)
        assert areas.area_of(region, where.start) is not None

    @pytest.mark.parametrize(
        "values",
        [
            {"places": 0}, {"places": 1025}, {"records": 0}, {"records": 1025}, {"units": 0},
            {"units": 8193}, {"unit": 0}, {"unit": 2048}, {"unit": 12288}, {"unit": 1 << 63},
            {"size": 0}, {"size": 4096}, {"size": SIZE}, {"size": 2**64 - 4096}, {"units": 16},
        ],
    )  # fmt: skip
    def test_a_header_with_impossible_numbers(self, region: Region, values: dict[str, int]) -> None:
        where = Directory.create(region, channels="64K").channels
        assert where is not None
        numbers = {"places": 16, "records": 8, "units": 13, "unit": 4096, "size": 65536}
        assert header(**numbers) == region.read(where.start, 48)
        region.write(where.start, header(**numbers | values))
        assert areas.area_of(region, where.start) is None

    @pytest.mark.parametrize("offset", [0, 4096, 8193, SIZE, SIZE - 8, 2**63, 2**64 - 4096])
    def test_offsets_that_cannot_be(self, region: Region, offset: int) -> None:
        assert areas.area_of(region, offset) is None
        assert areas.sweep(region, offset) == 0
        with pytest.raises(RegionError, match="no area of 65536 bytes"):
            areas.make_area(region, offset, 65536)


def header(*, places: int, records: int, units: int, unit: int, size: int) -> bytes:
    raw = struct.pack("<8sIIIIQQ", b"SVMHCHNL", 1, places, records, units, unit, size)
    return raw + struct.pack("<Q", zlib.crc32(raw))


def test_sweeping_frees_all_places(region: Region) -> None:
    where = Directory.create(region, channels="64K").channels
    assert where is not None
    live = 7 << 24 | 1 << 20 | 3  # number 7, live, epoch 3
    for place in (0, 5, 15):
        region.atomic_u64(where.start + 4096 + 128 * place).store(live)
    assert areas.sweep(region, where.start) == 3
    for place in range(16):
        number = region.atomic_u64(where.start + 4096 + 128 * place).load()
        assert number == (3 if place in (0, 5, 15) else 0)  # the epoch stays
    assert areas.sweep(region, where.start) == 0


def test_a_closed_region() -> None:
    region = Region.create(SIZE)
    region.close()
    calls: list[Callable[[], object]] = [
        lambda: areas.make_area(region, 8192, 65536),
        lambda: areas.area_of(region, 8192),
        lambda: areas.find_area(region),
        lambda: areas.sweep(region, 8192),
    ]
    for call in calls:
        with pytest.raises(ivshmem.ClosedError):
            call()
