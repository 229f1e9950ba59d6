"""What another process spoils: a word while a call waits for it, or a record. Calls raise."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from typing import Any

import pytest
from support.channel_records import Record
from support.channel_waits import FULL, WAITS, Pair
from support.loops import LOOPS, TaskSteps
from support.waiting import Background, until

from ivshmem import ClosedError, Directory, Region, channel
from ivshmem.channel import ChannelCorrupt, ChannelExists, NoSuchChannel, channels, records
from ivshmem.errors import IvshmemError
from ivshmem.native.areas import find_area

SIZE = 1 << 19
OFTEN: dict[str, Any] = {"beat": 0.001, "lease": 100.0}  # who sleeps looks again at each beat
LOOKS = 0.02  # seconds
# Calls that follow a position of the other side's. The others look at words that say what they are:
# one that is odd is as if it were not there.
CORRUPTED = {"a message", "room for a message", "bytes", "room for bytes", "the end of bytes"}


@contextlib.contextmanager
def pair_of(region: Region, begin: bytes) -> Iterator[Pair]:
    """Both ends of channels in memory that is as it was at the beginning."""
    region.write(0, begin)
    with channel.open(region, **OFTEN) as one, channel.open(region, **OFTEN) as two:
        yield Pair(one, two)


def load(region: Region, at: int) -> int:
    return int.from_bytes(region.read(at, 8), "little")


def words_of(region: Region) -> list[int]:
    area = find_area(region)
    assert area is not None
    words = memoryview(region.read(area.offset, area.size)).cast("Q")
    return [area.offset + 8 * i for i, word in enumerate(words) if word]


def spoils(region: Region, begin: bytes, what: str, at: int, seconds: float) -> bool:
    """Whether a call that waits finds that this word is impossible, within so many seconds."""
    with pair_of(region, begin) as pair:
        if what in FULL:
            FULL[what](pair)
        waiting = Background(lambda: WAITS[what][0](pair))
        waiting.wait_until_asleep()
        word = load(region, at) or 1
        give_up = time.monotonic() + seconds
        while waiting.running and time.monotonic() < give_up:
            # Again and again: at its beat the word's owner stores what is right.
            region.write(at, (word ^ 1 << 62).to_bytes(8, "little"))
            time.sleep(0.0005)
    # A call that still waits ends now, as its channels are closed.
    try:
        waiting.result()
    except ChannelCorrupt:
        return True
    except (IvshmemError, OSError):
        pass
    return False


@pytest.mark.sampled(6)
@pytest.mark.parametrize("what", WAITS)
def test_a_call_that_waits(what: str) -> None:
    call, end, expected = WAITS[what]
    with Region.create(SIZE) as region:
        Directory.create(region, channels=SIZE // 2).close()
        begin = region.read(0, SIZE)
        with pair_of(region, begin) as pair:
            if what in FULL:
                FULL[what](pair)
            # What the other side stores to end the call: it can just as well store nonsense there.
            before = {at: load(region, at) for at in words_of(region)}
            waiting = Background(lambda: call(pair))
            end(pair)
            assert waiting.result() == expected
            changed = [at for at in words_of(region) if load(region, at) != before.get(at)]
        found = [at for at in changed if spoils(region, begin, what, at, LOOKS)]
        if what in CORRUPTED and not found:  # the machine is busy
            found = [at for at in changed if spoils(region, begin, what, at, 1.0)]
    assert bool(found) == (what in CORRUPTED)


# -- records --------------------------------------------------------------------------------------


@pytest.fixture
def region() -> Iterator[Region]:
    with Region.create(SIZE) as region:
        Directory.create(region, channels=SIZE // 2).close()
        yield region


def test_a_record_that_says_another_kind(region: Region) -> None:
    """Its state and its CRC are right: a writer of messages finds a channel of bytes there."""
    with channel.open(region) as channels:
        found = channels.create_messages("name", limit=64)
        Record(region, "name").tell(
            kind=5,
            overflow=0,
            writers=1,
            readers=1,
            slots=1 << 16,
            loans=1,
            views=1,
            limit=1,
            units=40,
        )
        assert [info.kind for info in channels.list()] == ["bytes"]  # so what it says is allowed
        for end in (found.writer, found.reader):
            with pytest.raises(ClosedError, match="'name' was removed"):
                end()


def test_a_record_that_says_another_limit(region: Region) -> None:
    with channel.open(region) as channels:
        found = channels.create_queue("name", limit=64)
        Record(region, "name").tell(limit=32)
        with pytest.raises(ClosedError, match="'name' was removed"):
            found.reader()


@pytest.mark.parametrize("at", [80, 120, 140, 391, 392])
def test_a_record_whose_crc_does_not_fit(region: Region, at: int) -> None:
    """Its name stays taken, and its memory set aside, until it is removed by force."""
    with channel.open(region, name="maker") as channels:
        free = records.room(channels._member)
        found = channels.create_messages("name", limit=64)
        Record(region, "name").flip(at)
        (spoiled,) = channels.spoiled()
        assert (spoiled.record, spoiled.name) == (0, "name")
        assert "'maker'" in spoiled.maker
        assert channels.list() == []
        for call in (
            lambda: channels.open("name"),
            lambda: channels.create_messages("name", limit=64),
            lambda: channels.create_messages("name", limit=64, exist_ok=True),
            lambda: channels.remove("name"),
            found.remove,
        ):
            with pytest.raises(ChannelCorrupt, match="'name': its record, number 0, is spoiled"):
                call()
        with pytest.raises(ClosedError, match="was removed"):
            found.reader()
        channels.remove("name", force=True)
        assert channels.spoiled() == ()
        assert records.room(channels._member) == free
        with channels.create_messages("name", limit=64).writer() as writer:
            writer.put(b"x")


def test_a_record_whose_name_is_spoiled(region: Region) -> None:
    """It is removed by its number. A channel of its former name can be made beside it."""
    with channel.open(region) as channels:
        channels.create_messages("name", limit=64)
        Record(region, "name").flip(16)
        with pytest.raises(NoSuchChannel):
            channels.open("name")
        channels.create_messages("name", limit=64)
        (spoiled,) = channels.spoiled()
        assert spoiled.name == "oame"
        with pytest.raises(NoSuchChannel, match="record 1 is not that"):
            channels.remove_spoiled(1)
        channels.remove_spoiled(spoiled.record)
        assert channels.spoiled() == ()
        assert [info.name for info in channels.list()] == ["name"]


def test_a_creator_that_is_stopped(region: Region, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others that create the channel do not wait for ever, and are told for whom."""
    monkeypatch.setattr(channels, "_PATIENCE", 0.0)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    maker = channel.open(region, beat=40.0, lease=100.0, name="maker")
    other = channel.open(region, beat=0.001, lease=0.02)
    with maker, other:
        maker.create_messages("name", limit=64)
        Record(region, "name").begin_again()
        who = r"which place 0 \(process \d+, 'maker'\) is just making"
        with pytest.raises(ChannelExists, match=who):
            other.create_messages("name", limit=64)
        until(lambda: other.places()[0].state == "silent", "the maker shows no sign of life")
        for exist_ok in (False, True):
            with pytest.raises(ChannelExists, match=f"{who}; it shows no sign .* --place 0`"):
                other.create_messages("name", limit=64, exist_ok=exist_ok)
        other.free_place(0)
        other.create_messages("name", limit=64)


# -- words that lead tasks astray -----------------------------------------------------------------


def head_of(region: Region, position: int) -> int:
    """Where the head is of the only writer, which is at this position and the first in its slot."""
    (at,) = [at for at in words_of(region) if load(region, at) == position << 24 | 1]
    return at


def move(region: Region, at: int, distance: int) -> None:
    """Let a position in memory be another one."""
    region.write(at, (load(region, at) + (distance << 24)).to_bytes(8, "little"))


@pytest.mark.parametrize("distance", [1 << 27, 1 << 28, 1 << 39])
def test_what_a_reader_keeps_for_long_is_unfinished(region: Region, distance: int) -> None:
    """The writer passes over it, up to positions that a claim has no bits for."""
    with channel.open(region) as channels:
        jobs = channels.create_queue("jobs", limit=8, slots=4)
        with jobs.writer() as writer, jobs.reader() as reader:
            writer.put(b"long")
            taken = reader.take()
            assert taken is not None
            with taken:
                for _ in range(6):
                    writer.put(b"short")
                    assert reader.get(0) == b"short"
                move(region, head_of(region, 8), distance)
                assert channels.list()[0].unfinished == 1
            assert channels.list()[0].unfinished == 0


@pytest.mark.parametrize("loop", LOOPS)
def test_a_task_does_not_look_all_the_time(region: Region, loop: str) -> None:
    """A spoiled head announces a message that no reader finds: the task sleeps nevertheless."""

    async def wait() -> tuple[int, float, bytes | None]:
        began = time.monotonic()
        counted = TaskSteps(asyncio.get_running_loop())
        assert await asyncio.create_task(reader.get_async(0.2)) is None
        steps, seconds = counted.steps, time.monotonic() - began
        waiting = asyncio.create_task(reader.get_async(10))
        await asyncio.sleep(0.05)
        writer.put(b"it comes")
        return steps, seconds, await waiting

    with channel.open(region) as channels:
        messages = channels.create_messages("log", limit=8, slots=4, writers=2)
        with messages.writer() as writer, messages.reader() as reader:
            for _ in range(3):
                writer.put(b"x")
            of_no_writer = head_of(region, 3) + 64
            assert [reader.get(0) for _ in range(3)] == [b"x"] * 3
            region.write(of_no_writer, (5 << 24 | 7).to_bytes(8, "little"))
            running = LOOPS[loop]()
            steps, seconds, found = running.run_until_complete(wait())
            running.close()
    assert steps < 2 * (64 + seconds / 0.001)  # it takes thousands if it never sleeps
    assert found == b"it comes"
