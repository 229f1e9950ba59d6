"""Random bytes, and zeros, all over the area while ends use it: only documented errors come."""

from __future__ import annotations

import contextlib
import functools
import random
import time
from collections.abc import Callable
from typing import Any

import pytest

from ivshmem import Directory, Region, channel
from ivshmem.errors import IvshmemError

DOCUMENTED = (IvshmemError, TimeoutError, BufferError, OSError)


def _ends(channels: channel.Channels) -> list[Callable[[], Any]]:
    messages = channels.create_messages("a", limit=64, slots=4, overflow=("block", "overwrite"))
    discarding = channels.create_messages("b", limit=64, slots=4, overflow="discard")
    queue = channels.create_queue("c", limit=64, slots=4)
    value = channels.create_value("d", limit=64)
    calls = channels.create_calls("e", limit=64, slots=4)
    room = channels.create_bytes("f", buffer=64)
    listener, stream = room.listen(), room.connect()
    other = listener.accept(0)
    assert other is not None
    stream.settimeout(0)
    other.settimeout(0)
    caller, server = calls.caller(), calls.server()

    def view(reader: channel.Reader) -> None:
        seen = reader.view(0)
        if seen is not None:
            with seen:
                bytes(seen)

    def take(reader: channel.QueueReader) -> None:
        taken = reader.take(0)
        if taken is not None:
            with taken:
                bytes(taken)

    def call() -> None:
        pending = caller.submit(b"x", 0)
        served = server.take(0)
        if served is not None:
            served.reply(b"y")
        pending.result(0)

    made: list[Callable[[], Any]] = [call, channels.list, channels.places]
    for each in (messages, discarding):
        made += [functools.partial(each.writer().put, b"x" * 30, 0) for _ in range(2)]
        for reader in (each.reader(), each.reader()):
            made.append(functools.partial(reader.get, 0))
            made.append(functools.partial(view, reader))
    work, worker, setter, watcher = queue.writer(), queue.reader(), value.writer(), value.reader()
    made += [
        lambda: messages.reader().close(),
        lambda: messages.writer().close(),
        lambda: work.put(b"x" * 30, 0),
        lambda: worker.get(0),
        lambda: take(worker),
        lambda: setter.put(b"y" * 30, 0),
        watcher.get,
        lambda: watcher.wait_changed(0),
        lambda: stream.send(b"z" * 10),
        lambda: other.recv(64),
        lambda: channels.open("a"),
        lambda: room.connect().close(),
        lambda: listener.accept(0),
        lambda: channels.create_messages("g", limit=8).remove(),
    ]
    return made


@pytest.mark.parametrize(
    "rounds", [pytest.param(12), pytest.param(3000, marks=pytest.mark.nightly)]
)
def test_any_bytes(rounds: int) -> None:
    draw = random.Random(rounds)  # noqa: S311
    calls = 0
    for turn in range(rounds):
        with Region.create("2M") as region:
            Directory.create(region, channels="1M").close()
            with channel.open(region, beat=0.002, lease=0.01) as channels:
                made = _ends(channels)
                first = region.size - (1 << 20)  # the area is near the end of the region
                used = [i for i in range(0, region.size, 8) if region.read(i, 8) != bytes(8)]
                end = time.monotonic() + 0.02
                while time.monotonic() < end:
                    for _ in range(draw.randrange(4)):
                        where = (
                            draw.choice(used)
                            if draw.random() < 0.8
                            else draw.randrange(first, region.size - 8, 8)
                        )
                        old = int.from_bytes(region.read(where, 8), "little")
                        new = draw.choice([
                            0, draw.getrandbits(64), (1 << 64) - 1, old ^ 1 << draw.randrange(64),
                            old + (1 << 24), old - (1 << 24),
                        ])  # fmt: skip
                        if turn % 4 == 0 and draw.random() < 0.01:
                            region.write(0, bytes(region.size))
                        region.write(where, (new % (1 << 64)).to_bytes(8, "little"))
                    for call in draw.choices(made, k=20):
                        calls += 1
                        with contextlib.suppress(*DOCUMENTED):
                            call()
    assert calls > rounds * 20
