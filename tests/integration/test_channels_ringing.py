"""Channels between clients of a server: who rings whom, and who wakes.

Those that sleep look by themselves once in 1000 seconds: a call that ends was ended by a ring.
"""

from __future__ import annotations

import asyncio
import os
import resource
import select
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from support.channel_waits import FULL, WAITS, Pair
from support.waiting import PATIENCE, Background, until

import ivshmem
from ivshmem import Directory, channel, testing
from ivshmem.channel import Channels, ServerLost, identity

NEVER: dict[str, Any] = {"beat": 1000.0, "lease": 10000.0}


class Place:
    """A region of a server. `join` is one more process in it, as far as channels can tell."""

    def __init__(self, path: str, opened: ExitStack) -> None:
        self.path = path
        self._opened = opened

    def client(self, **how: Any) -> ivshmem.Client:
        return self._opened.enter_context(ivshmem.connect(self.path, timeout=PATIENCE, **how))

    def join(self, readonly: bool = False, **how: Any) -> Channels:
        client = self.client(readonly=readonly)
        return self._opened.enter_context(channel.open(client, **{**NEVER, **how}))


@pytest.fixture
def place() -> Iterator[Place]:
    with ExitStack() as opened:
        server = opened.enter_context(testing.server("4M", vectors=2))
        with ivshmem.connect(server.path) as client:
            Directory.create(client.region, channels="2M").close()
        yield Place(server.path, opened)


@pytest.mark.parametrize("what", WAITS)
def test_each_sleep_is_ended_by_a_ring(place: Place, what: str) -> None:
    call, end, expected = WAITS[what]
    pair = Pair(place.join(), place.join())
    if what in FULL:
        FULL[what](pair)
    waiting = Background(lambda: call(pair))
    waiting.wait_until_asleep()
    end(pair)
    assert waiting.result() == expected


def test_a_busy_stream_rings_nobody(place: Place) -> None:
    client = place.client()
    with channel.open(client, **NEVER) as one:
        messages = one.create_messages("a", limit=8)
        reader = messages.reader("overwrite")
        writer: Any = place.join().open("a").writer()  # type: ignore[attr-defined]
        for _ in range(1000):
            writer.put(b"a")
            assert reader.get(0) == b"a"
        assert client.wait(0, timeout=0) is None


def test_one_vector_serves_threads_tasks_and_the_program(place: Place) -> None:
    """Nobody takes another's ring: two threads at two channels, a task, and the user's wait()."""
    client = place.client()
    with channel.open(client, **NEVER) as own:
        other = place.join()
        readers = {}
        writers: dict[str, Any] = {}
        for name in ("thread", "other thread", "task"):
            readers[name] = own.create_messages(name, limit=8).reader("block")
            writers[name] = other.open(name).writer()  # type: ignore[attr-defined]
        threads = [Background(readers[name].get) for name in ("thread", "other thread")]
        task = Background(lambda: asyncio.run(readers["task"].get_async()))
        program = Background(lambda: client.wait(0, timeout=PATIENCE))
        for each in (*threads, task, program):
            each.wait_until_asleep()
        for name, writer in writers.items():
            writer.put(name[:8].encode())
        assert [each.result() for each in threads] == [b"thread", b"other th"]
        assert task.result() == b"task"
        assert program.result() is not None


def test_a_program_that_waits_for_the_vector_all_the_time(place: Place) -> None:
    """Its wait() takes the count of each ring; the ends of channels hear of the ring, too."""
    client = place.client()
    with channel.open(client, **NEVER) as own:
        reader = own.create_messages("a", limit=8).reader("block")
        writer: Any = place.join().open("a").writer()  # type: ignore[attr-defined]
        over = False

        def program() -> None:
            while not over:
                client.wait(0, timeout=0.001)

        taking = Background(program)
        for i in range(200):
            waiting = Background(reader.get)
            writer.put(b"%d" % i)
            assert waiting.result() == b"%d" % i
        over = True
        taking.result()


def test_a_descriptor_hears_of_rings(place: Place) -> None:
    reader = place.join().create_messages("a", limit=8).reader("block")
    writer: Any = place.join().open("a").writer()  # type: ignore[attr-defined]
    watched = reader.fileno()
    for i in range(3):
        assert not select.select([watched], [], [], 0)[0]
        writer.put(b"%d" % i)
        assert select.select([watched], [], [], PATIENCE)[0]
        assert reader.get(0) == b"%d" % i
        assert reader.get(0) is None


# -- places that are freed ------------------------------------------------------------------------


def server_that_stands_still(path: str) -> int:
    """A process that takes a call, and then does nothing; return its PID."""
    pid = os.fork()
    if pid == 0:
        try:
            with ivshmem.connect(path) as client, channel.open(client) as own:
                call = own.open("calls").server().take()  # type: ignore[attr-defined]
                own.create_value("taken", limit=1)
                signal.pause()
                call.reply()
        finally:
            os._exit(1)
    return pid


@pytest.mark.parametrize("how", ["beat", "join", "user"])
def test_whoever_frees_a_place_rings_the_others(place: Place, how: str) -> None:
    """A caller sleeps for long. It hears of its server's death by the one that finds it."""
    own = place.join()
    calls = own.create_calls("calls", limit=8)
    caller = calls.caller()
    pid = server_that_stands_still(place.path)
    pending = caller.submit(b"a")
    until(lambda: len(own.list()) == 2, "a server that has taken the call")
    number = next(each.place for each in own.places() if each.process == pid)
    waiting = Background(pending.result)
    waiting.wait_until_asleep()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert waiting.running
    if how == "beat":
        place.join(beat=0.01, lease=0.05)
    elif how == "join":
        place.join()  # it has never seen a beat: it looks at those whose entry it could take
    else:
        place.join().free_place(number)
    with pytest.raises(ServerLost):
        waiting.result()


# -- processes that can only read -----------------------------------------------------------------


def wake_ups(call: Callable[[], object]) -> tuple[object, int]:
    """What a call in a thread returned, and how often the thread slept."""
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
    result = call()
    return result, resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw - before


@pytest.mark.parametrize("kind", ["messages", "value"])
@pytest.mark.parametrize("always", [False, True])
def test_a_reader_that_can_only_read(place: Place, kind: str, always: bool) -> None:
    own = place.join()
    if kind == "messages":
        writer = own.create_messages("a", limit=8, ring_always=always).writer()
    else:
        writer = own.create_value("a", limit=8, ring_always=always).writer()
    reader: Any = place.join(readonly=True).open("a").reader()  # type: ignore[attr-defined]
    get = reader.get if kind == "messages" else reader.wait_changed
    waiting = Background(lambda: wake_ups(get))
    waiting.wait_until_asleep()
    time.sleep(0.1)  # in which one that polls wakes up a hundred times
    writer.put(b"a")
    result: Any = waiting.result()
    assert result[0] == b"a"
    assert (result[1] < 10) is always


def test_a_reader_that_can_only_read_polls_while_a_guest_writes(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest rings nobody that it does not know. Such a reader finds that out at its next beat."""
    place.join().create_messages("a", limit=8, ring_always=True)
    with monkeypatch.context() as patched:
        patched.setattr(identity, "machine", lambda: 12345)
        guest = place.join()
    reader: Any = place.join(True, beat=0.01, lease=0.1).open("a").reader()  # type: ignore[attr-defined]
    waiting = Background(lambda: wake_ups(reader.get))
    waiting.wait_until_asleep()
    writer: Any = guest.open("a").writer()  # type: ignore[attr-defined]
    time.sleep(0.2)
    writer.put(b"a")
    result: Any = waiting.result()
    assert result[0] == b"a"
    assert result[1] > 50
