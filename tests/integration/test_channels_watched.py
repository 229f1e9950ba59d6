"""Descriptors of channels' ends, which a program watches by poll: with rings, and without.

Those that sleep look by themselves once in 1000 seconds. Where no ring can come, the thread of the
beat looks each millisecond, but only while a program watches.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.channel_waits import Pair
from support.waiting import PATIENCE, Background, until

import ivshmem
from ivshmem import ClosedError, Directory, Region, Server, channel, testing
from ivshmem.channel import CallFailed, Channels
from ivshmem.channel.watching import Watcher
from ivshmem.tracing.watcher import RingWatcher, Rung

NEVER: dict[str, Any] = {"beat": 1000.0, "lease": 10000.0}
NOTHING = "nothing"


def now(call: Callable[[Pair], Any], pair: Pair) -> Any:
    """What a call that does not wait returns; NOTHING: it would have to wait."""
    try:
        found = call(pair)
    except (TimeoutError, BlockingIOError):
        return NOTHING
    return NOTHING if found is None else found


class Watched(NamedTuple):
    """An end that a program can watch."""

    end: Callable[[Pair], Any]
    call: Callable[[Pair], Any]  # does not wait
    act: Callable[[Pair], Any]  # what the other side does
    expected: Any  # what `call` returns then
    fill: Callable[[Pair], Any] = lambda _: None  # done first, so that `call` finds nothing


def stream(pair: Pair) -> Any:
    pair.accepted.settimeout(0)
    return pair.accepted


def reply(pair: Pair) -> None:
    pair.reply()
    pair.calls[0].result()


WATCHED = {
    "messages": Watched(
        lambda p: p.reader, lambda p: p.reader.get(0), lambda p: p.writer.put(b"a"), b"a"
    ),
    "room for a message": Watched(
        lambda p: p.writer,
        lambda p: p.writer.put(b"b", 0),
        lambda p: p.reader.get(),
        0,
        lambda p: p.writer.put(b"a"),
    ),
    "a queue": Watched(
        lambda p: p.taker, lambda p: p.taker.get(0), lambda p: p.giver.put(b"a"), b"a"
    ),
    "room in a queue": Watched(
        lambda p: p.giver,
        lambda p: p.giver.put(b"b", 0),
        lambda p: p.taker.get(),
        0,
        lambda p: p.giver.put(b"a"),
    ),
    "a value": Watched(
        lambda p: p.looker, lambda p: p.looker.wait_changed(0), lambda p: p.setter.put(b"a"), b"a"
    ),
    "a server of calls": Watched(
        lambda p: p.server,
        lambda p: next((bytes(call) for call in [p.server.take(0)] if call), None),
        Pair.begin,
        b"call",
    ),
    "a call": Watched(
        lambda p: p.calls[0], lambda p: p.calls[0].result(0), Pair.reply, b"reply", Pair.begin
    ),
    "room for a call": Watched(
        lambda p: p.caller, lambda p: bool(p.caller.submit(b"b", 0)), reply, True, Pair.begin
    ),
    "a listener": Watched(
        lambda p: p.listener,
        lambda p: next((one.recv(8) for one in [p.listener.accept(0)] if one), None),
        Pair.greet,
        b"hello",
    ),
    "bytes": Watched(stream, lambda p: p.accepted.recv(8), lambda p: p.stream.send(b"a"), b"a"),
}


class Place:
    """Two processes at a region, as far as channels can tell."""

    def __init__(self, how: str, opened: ExitStack) -> None:
        if how == "a region":
            region = opened.enter_context(Region.create("4M"))
            places: list[Any] = [region, region]
        else:
            vectors = 0 if how == "no interrupts" else 1
            server = opened.enter_context(testing.server("4M", vectors=vectors))
            places = [
                opened.enter_context(ivshmem.connect(server.path, timeout=PATIENCE))
                for _ in range(2)
            ]
            region = places[0].region
        Directory.create(region, channels="2M").close()
        self.one, self.two = (
            opened.enter_context(channel.open(place, **NEVER)) for place in places
        )
        self.pair = Pair(self.one, self.two)


@pytest.fixture(params=["a region", "no interrupts", "rings"])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with ExitStack() as opened:
        yield Place(request.param, opened)


@pytest.fixture
def pair(place: Place) -> Pair:
    return place.pair


def is_readable(fd: int, timeout: float) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(1000 * timeout))


def quiet(fd: int, call: Callable[[Pair], Any], pair: Pair) -> None:
    until(lambda: now(call, pair) == NOTHING and not is_readable(fd, 0), "nothing there")


@pytest.mark.parametrize("what", WATCHED)
def test_who_watches_a_descriptor_wakes(pair: Pair, what: str) -> None:
    case = WATCHED[what]
    case.fill(pair)
    fd = case.end(pair).fileno()
    quiet(fd, case.call, pair)
    case.act(pair)
    found = NOTHING
    while found == NOTHING:  # it may be readable without a reason
        assert is_readable(fd, PATIENCE)
        found = now(case.call, pair)
    assert found == case.expected


# -- connections, at which a program may wait for room and for bytes ------------------------------


def send_now(pair: Pair) -> Any:
    return pair.stream.send(b"a")


def recv_now(pair: Pair) -> Any:
    return pair.stream.recv(8)


@pytest.fixture
def full(pair: Pair) -> Pair:
    """The connection's one end can send nothing, and does not wait."""
    pair.fill(pair.stream)
    pair.stream.settimeout(0)
    return pair


def refill(pair: Pair) -> None:
    pair.fill(pair.stream)
    pair.stream.settimeout(0)


def test_a_watcher_that_waits_for_room(full: Pair) -> None:
    """It leaves unread what has come, and hears of the room alone."""
    full.accepted.send(b"unread")
    watched = full.stream.fileno()
    for _ in range(3):
        quiet(watched, send_now, full)
        full.accepted.recv(64)
        assert is_readable(watched, PATIENCE)
        assert full.stream.send(bytes(64)) > 0
        refill(full)
    assert full.stream.recv(8) == b"unread"


@pytest.mark.parametrize("first", ["send", "receive"])
@pytest.mark.parametrize("comes", ["room", "bytes"])
def test_a_watcher_that_waits_for_both(full: Pair, first: str, comes: str) -> None:
    """Whichever it tried last, it hears of the other, also of what came before it tried."""
    watched = full.stream.fileno()
    calls = [send_now, recv_now] if first == "send" else [recv_now, send_now]
    for early in (True, False):
        for call in calls:
            assert now(call, full) == NOTHING
        if early:  # between the two
            assert now(calls[0], full) == NOTHING
        full.accepted.recv(64) if comes == "room" else full.accepted.send(b"b")
        if early and (comes == "room") == (first == "send"):
            assert now(calls[1], full) == NOTHING
        assert is_readable(watched, PATIENCE)
        if comes == "room":
            assert full.stream.send(bytes(64)) == 64
        else:
            assert full.stream.recv(8) == b"b"


@pytest.mark.parametrize("place", ["rings"], indirect=True)
def test_what_a_watcher_leaves_does_not_keep_it_busy(full: Pair) -> None:
    """It received before, and now wants room: it hears once of what came since."""
    watched = full.stream.fileno()
    assert now(recv_now, full) == NOTHING
    full.accepted.send(b"unread")
    quiet(watched, send_now, full)


# -- calls under way, which share the slot of their caller ----------------------------------------


@pytest.fixture
def calls(place: Place) -> Iterator[tuple[Any, Any]]:
    """A caller that can have many calls under way, and their server."""
    room = place.one.create_calls("many", limit=8)
    other: Any = place.two.open("many")
    with room.server() as server, other.caller() as caller:
        yield caller, server


def wakes(call: Any) -> None:
    while True:
        assert is_readable(call.fileno(), PATIENCE)
        try:
            call.result(0)
        except TimeoutError:
            continue
        return


def test_each_call_has_its_descriptor(calls: tuple[Any, Any]) -> None:
    """Neither a call that ends nor a thread that waits at the same caller takes another's ring."""
    caller, server = calls
    watched = [caller.submit(b"%d" % i) for i in range(3)]
    for call in watched:
        call.fileno()
    with pytest.raises(TimeoutError):
        watched[2].result(0.01)
    waited = caller.submit(b"w")
    waiting = Background(waited.result)
    waiting.wait_until_asleep()
    taken = [server.take() for _ in range(4)]
    taken[3].reply(b"w")
    assert waiting.result() == b"w"
    for i in (1, 0, 2):
        sleeping = Background(lambda i=i: wakes(watched[i]))  # type: ignore[misc]
        sleeping.wait_until_asleep()
        taken[i].reply(b"%d" % i)
        sleeping.result()
        assert watched[i].result() == b"%d" % i
        assert is_readable(watched[i].fileno(), 0)  # it stays so


def test_a_thread_that_asks_takes_no_ring_from_who_watches(calls: tuple[Any, Any]) -> None:
    caller, server = calls
    call = caller.submit(b"a")
    fd = call.fileno()
    with pytest.raises(TimeoutError):
        call.result(0)
    server.take().reply(b"b")
    until(call.done, "a reply")
    assert is_readable(fd, PATIENCE)
    assert call.result(0) == b"b"


def test_a_call_that_is_over_before_it_is_watched(calls: tuple[Any, Any]) -> None:
    caller, server = calls
    call = caller.submit(b"a")
    server.take().reply(b"b")
    assert call.result() == b"b"
    assert is_readable(call.fileno(), 0)


def polls(channels: Channels) -> bool:
    """Whether the thread of the beat looks each millisecond."""
    status = Path(f"/proc/self/task/{channels._thread.native_id}/status")

    def sleeps() -> int:
        text = status.read_text()
        return int(text.split("\nvoluntary_ctxt_switches:")[1].split()[0])

    before = sleeps()
    time.sleep(0.05)
    return sleeps() - before > 3


@pytest.mark.parametrize("place", ["a region"], indirect=True)
@pytest.mark.parametrize("end", ["reply", "cancel", "close", "forget", "caller"])
def test_to_watch_a_call_ends_with_it(place: Place, calls: tuple[Any, Any], end: str) -> None:
    caller, server = calls
    call = caller.submit(b"a")
    assert not polls(place.two)
    fd = call.fileno()
    until(lambda: polls(place.two), "looks each millisecond")
    if end == "reply":
        server.take().reply(b"b")
        wakes(call)
    elif end == "cancel":
        call.cancel()
        assert is_readable(fd, PATIENCE)
        with pytest.raises(CallFailed):
            call.result(0)
    elif end == "close":
        call.close()
        assert call.closed
        with pytest.raises(ClosedError, match="this PendingCall of 'many' is closed"):
            call.fileno()
    elif end == "forget":
        del call
    else:
        caller.close()
        assert is_readable(fd, PATIENCE)
        with pytest.raises(ClosedError):
            call.result(0)
    until(lambda: not polls(place.two), "rest")


@pytest.mark.parametrize("what", WATCHED)
@pytest.mark.parametrize("place", ["a region"], indirect=True)
def test_an_end_that_is_closed_is_not_polled(place: Place, what: str) -> None:
    case = WATCHED[what]
    case.fill(place.pair)
    end = case.end(place.pair)
    end.fileno()
    both = (place.one, place.two)
    of_end = until(lambda: next((each for each in both if polls(each)), None), "a look")
    end.close()
    until(lambda: not polls(of_end), "rest")


def test_a_watcher_is_rung_after_a_silence_only(socket_path: str) -> None:
    """A writer that it slowed would make a system call for each message."""
    with Server(socket_path, "1M", channels="512K").start(), ExitStack() as stack:
        both = []
        for _ in range(2):
            client = stack.enter_context(ivshmem.connect(socket_path, timeout=PATIENCE))
            both.append(stack.enter_context(channel.open(client)))
        log = both[0].create_messages("log", limit=8, slots=64)
        writer = stack.enter_context(log.writer())
        found: Any = both[1].open("log")
        watcher = stack.enter_context(Watcher(found))
        rings = stack.enter_context(RingWatcher(socket_path))
        until(lambda: list(rings.watch(0.01)) or True)
        watching = Background(lambda: [watcher.take(PATIENCE) for _ in range(100)])
        watching.wait_until_asleep()
        count = 0
        for number in range(100):
            writer.put(str(number).encode())
            count += sum(isinstance(event, Rung) for event in rings.watch(0.003))
        seen: Any = watching.result()
        assert [each.data for each in seen if each] == [str(i).encode() for i in range(100)]
        assert watcher.lost == 0
        assert 1 <= count <= 20  # one, and one for each time that this machine stood still
