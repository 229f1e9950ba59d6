"""What two processes say to each other over each kind of channel; each checks all that it gets.

One leads and one follows; then they change places, so that each kind passes in both directions.
One conversation at a time: another follower would answer the leader's calls, and hold it up.
A message is its number, a checksum, and bytes that follow from the number.
"""

from __future__ import annotations

import contextlib
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from ivshmem import RegionError, channel
from ivshmem.channel import Channels

PATIENCE = 60.0  # seconds; reached only when a test fails
BEAT, LEASE = 2.0, 60.0  # long: whoever sleeps until its next beat is found to be slow
COUNT = 200  # messages each way
SLOTS = 16
JOBS, CONTENTS, CALLS = 12, 20, 8  # the replies to all jobs have room at once
LIMIT = 420
STREAM = bytes(range(250)) * 200  # several times what a connection holds

_PATTERN = bytes(range(251)) * 3


def message(number: int) -> bytes:
    body = _PATTERN[number % 251 :][: number % 400]
    return struct.pack("<II", number, zlib.crc32(body)) + body


def number_in(data: Any) -> int:
    """The number of a message, all of which was checked."""
    number = int.from_bytes(bytes(data)[:4], "little")
    assert bytes(data) == message(number), number
    return number


def join(place: Any, name: str) -> Channels:
    return channel.open(place, name=name, beat=BEAT, lease=LEASE)


def make(channels: Channels) -> None:
    for name in ("out", "back"):
        channels.create_messages(name, limit=LIMIT, slots=SLOTS, writers=2, readers=3)
    channels.create_queue("jobs", limit=LIMIT, slots=4)
    channels.create_value("value", limit=LIMIT)
    channels.create_calls("calls", limit=LIMIT, slots=4)
    channels.create_bytes("bytes", buffer=1 << 13, connections=2)


def converse(channels: Channels, leads: bool, turn: int) -> None:
    """Lead and follow, or follow and lead; at the other end `leads` is the opposite.

    Args:
        turn: another one each time, by which the contents of the value differ.
    """
    for now_leads in (leads, not leads):
        (_lead if now_leads else _follow)(channels, 1000 * turn)
        turn += 1


def _lead(channels: Any, first: int) -> None:
    with channels.open("back").reader("block") as back:
        with channels.open("calls").caller() as caller:
            _call(caller)
        with channels.open("out").writer() as out:
            for i in range(COUNT):
                _write(out, message(first + i), by_loan=i % 3 == 0)
            for i in range(COUNT):
                assert back.get(PATIENCE) == message(first + i), i
        with channels.open("jobs").writer() as jobs:
            for i in range(JOBS):
                jobs.put(message(first + i), PATIENCE)
            done = [number_in(back.get(PATIENCE)) - first for _ in range(JOBS)]
            done.remove(1)
            assert done == [0, *range(2, JOBS)]
        with channels.open("value").writer() as value:
            for i in range(CONTENTS):
                value.put(message(first + i))
            assert back.get(PATIENCE) == b"saw the last"
        with channels.open("bytes").listen() as listener:
            with listener.accept(PATIENCE) as stream:
                stream.settimeout(PATIENCE)
                stream.sendall(STREAM)
                assert _received(stream) == STREAM[::-1]


def _follow(channels: Any, first: int) -> None:
    with contextlib.ExitStack() as ends:
        out = ends.enter_context(channels.open("out").reader("block"))
        back = ends.enter_context(channels.open("back").writer())
        with channels.open("calls").server() as server:
            _serve(server)
        for i in range(COUNT):
            assert _read(out, by_view=i % 2 == 0) == message(first + i), i
        for i in range(COUNT):
            back.put(message(first + i), PATIENCE)
        with channels.open("jobs").reader() as jobs:
            for job in _work(jobs):
                back.put(job, PATIENCE)
        with channels.open("value").reader() as value:
            last, content = -1, value.get()
            while last != first + CONTENTS - 1:
                number = first - 1 if content is None else number_in(content)
                assert number >= last, "it went back"
                last = number
                if last != first + CONTENTS - 1:
                    content = value.wait_changed(PATIENCE)
                    assert content is not None
            back.put(b"saw the last", PATIENCE)
        with channels.open("bytes").connect(wait_for_listener=True, timeout=PATIENCE) as stream:
            stream.settimeout(PATIENCE)
            data = bytearray()
            while len(data) < len(STREAM):
                data += stream.recv(1 << 16)
            stream.sendall(data[::-1])
            stream.shutdown(1)
            assert stream.recv(1) == b""


def _write(writer: channel.Writer, data: bytes, by_loan: bool) -> None:
    if not by_loan:
        writer.put(data, PATIENCE)
        return
    loan = writer.loan(len(data))
    with memoryview(loan) as memory:
        memory[:] = data
    loan.publish(PATIENCE)


def _read(reader: Any, by_view: bool) -> Any:
    if not by_view:
        return reader.get(PATIENCE)
    with reader.view(PATIENCE) as view:
        return bytes(view)


def _work(jobs: Any) -> Iterator[bytes]:
    """Take all jobs, in turn in each of the ways in which that can be done."""
    for i in range(JOBS + 1):
        if i == 1:
            with contextlib.suppress(KeyError), jobs.take(PATIENCE):
                raise KeyError  # so that number 1 is given back; it comes again when it likes
        elif i % 2:
            yield jobs.get(PATIENCE)
        else:
            with jobs.take(PATIENCE) as job:
                assert job.redelivered == (number_in(job) % 1000 == 1)
                yield bytes(job)


def _call(caller: channel.Caller) -> None:
    """Calls one by one, and then many at once; says how long the quickest one took."""
    times = []
    for i in range(CALLS):
        began = time.monotonic()
        assert caller.call(message(i), PATIENCE) == message(i)[::-1]
        times.append(time.monotonic() - began)
    # The first waited for the server to come.
    assert min(times[1:]) < BEAT / 4, f"neither a ring nor a look came: {times}"
    print(f"CALLED {min(times[1:]) * 1e3:.2f} ms", flush=True)
    pending = [caller.submit(message(i), PATIENCE) for i in range(4)]
    for i, each in enumerate(pending):
        assert each.result(PATIENCE) == message(i)[::-1]


def _serve(server: Any) -> None:
    for _ in range(CALLS + 4):
        call = server.take(PATIENCE)
        assert call.reply(bytes(call)[::-1])


def _received(stream: channel.Stream) -> bytes:
    """All that comes until the other end sends no more."""
    data = bytearray()
    while part := stream.recv(1 << 16):
        data += part
    return bytes(data)


# -- a peer that may only read --------------------------------------------------------------------


def watch(channels: Any, first: int, ready: Callable[[], object]) -> None:
    """Read, with a mapping that allows no more, what a leader writes; what is missed is counted."""
    assert channels.readonly
    with channels.open("out").reader() as reader, channels.open("value").reader() as value:
        ready()
        got, number = 0, -1
        while number != first + COUNT - 1:
            number = number_in(reader.get(PATIENCE))
            got += 1
            assert number == first + got + reader.lost - 1
        content = value.get()
        while content is None or number_in(content) != first + CONTENTS - 1:
            content = value.wait_changed(PATIENCE)
            assert content is not None
    for name, ends in (
        ("out", ("writer",)),
        ("jobs", ("writer", "reader")),
        ("value", ("writer",)),
        ("calls", ("caller", "server")),
        ("bytes", ("listen", "connect")),
    ):
        for end in ends:
            said = "nothing"
            try:
                getattr(channels.open(name), end)()
            except RegionError as error:
                said = str(error)
            assert "the region is mapped for reading only" in said, (name, end, said)
