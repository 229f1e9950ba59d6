"""Processes that create channels at the same time, and are killed while they do."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.waiting import PATIENCE, until

from ivshmem import Directory, Region, channel
from ivshmem.channel import Channels, records

# Creates and removes channels until its time is over, and looks whether each has what was put into
# it. All of them create one name, too: there is one channel of that name, or none.
CREATOR = r"""
import random, sys, time
from ivshmem import Region, channel

path, seed, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
choose, end = random.Random(seed), time.monotonic() + seconds
created = refused = number = 0
own = {}
with Region.attach(path=path) as region, channel.open(region) as channels:
    print("begins", flush=True)
    while time.monotonic() < end:
        number += 1
        size = choose.choice((8, 500, 5_000, 20_000, 60_000))
        try:
            made = channels.create_value(f"{seed}-{number}", limit=size)
        except channel.ChannelError as error:
            assert str(error).startswith("no room"), error
            refused += 1
        else:
            created += 1
            content = choose.randbytes(size)
            with made.writer() as writer:
                writer.put(content)
            own[made.name] = made, content
        try:
            channels.create_messages("of all", limit=4000)
        except channel.ChannelExists:
            pass
        except channel.ChannelError as error:
            assert str(error).startswith("no room"), error
        names = [info.name for info in channels.list()]
        assert len(set(names)) == len(names), names
        assert set(own) <= set(names)
        if "of all" in names and choose.randrange(4) == 0:
            try:
                channels.remove("of all", force=True)
            except channel.NoSuchChannel:
                pass
        for name, (made, content) in own.items():
            with made.reader() as reader:
                assert reader.get() == content, name
        while len(own) > choose.randrange(8):
            name = choose.choice(list(own))
            del own[name]
            channels.remove(name, force=True)
    for name in own:
        channels.remove(name, force=True)
print(created, refused)
"""


def started(path: Path, seed: int, seconds: float) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", CREATOR, str(path), str(seed), str(seconds)]
    made = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert made.stdout is not None
    if not made.stdout.readline():
        pytest.fail(made.communicate()[1])
    return made


def all_is_free(channels: Channels, before: tuple[int, ...]) -> bool:
    for info in channels.list():
        channels.remove(info.name, force=True)
    return records.room(channels._member) == before


@pytest.mark.parametrize("seconds", [1, pytest.param(60, marks=pytest.mark.nightly)])
def test_what_several_create_at_once_never_overlaps(directory: Path, seconds: float) -> None:
    """Neither in memory, nor in name; and some are killed at any moment: nothing stays of them."""
    path = directory / "region"
    choose = random.Random(seconds)  # noqa: S311 - moments
    with Region.create("2M", path=path) as region:
        Directory.create(region, channels="512K").close()
        with channel.open(region) as channels:
            before = records.room(channels._member)
            living = [started(path, seed, seconds) for seed in range(1, 4)]
            end = time.monotonic() + seconds
            kills = 0
            while time.monotonic() < end:
                with started(path, 100 + kills, 60) as dying:
                    time.sleep(choose.random() * 0.05)
                    dying.kill()
                kills += 1
            for each in living:
                said, errors = each.communicate(timeout=PATIENCE)
                assert each.returncode == 0, errors
                created, _ = map(int, said.split())
                assert created > 10 * seconds, "it had no room, or no time"
            assert kills
            until(lambda: all_is_free(channels, before), "that all memory is free")
