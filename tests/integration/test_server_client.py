"""A server and its clients: joining, leaving, ringing, waiting, events, each way of running one.

Also: callbacks that raise, a server that goes, fork, and what a client says of its own state.
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
import selectors
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.leaks import open_fds
from support.limits import open_files
from support.peer import RawPeer, eventfd_id
from support.waiting import (
    PATIENCE,
    Background,
    idle_child,
    in_child,
    interrupt_when_asleep,
    once_asleep,
    signals,
    until,
)

import ivshmem
from ivshmem import (
    ClosedError,
    Disconnected,
    Interrupt,
    NoSuchPeer,
    NoSuchVector,
    PeerJoined,
    PeerLeft,
    Server,
    testing,
)

MakeServer = Callable[..., Server]
Connect = Callable[..., ivshmem.Client]


@pytest.fixture
def connect(socket_path: str) -> Iterator[Connect]:
    """Connects clients to `socket_path`; closes them."""
    with ExitStack() as clients:

        def make(path: str = socket_path, **kwargs: object) -> ivshmem.Client:
            kwargs.setdefault("timeout", PATIENCE)
            return clients.enter_context(ivshmem.connect(path, **kwargs))  # type: ignore[arg-type]

        yield make


# -- joining, ringing, leaving --------------------------------------------------------------------


def test_an_only_client(server: MakeServer, connect: Connect, socket_path: str) -> None:
    server("64K", vectors=3)
    client = connect()
    assert client.id == 0
    assert client.vectors == 3
    assert client.peers == []
    assert client.connected
    assert not client.closed
    assert client.region.size == 65536
    assert client.path == socket_path
    assert repr(client) == f"<ivshmem.Client at {socket_path}, id 0, 3 vectors>"
    assert client.wait(timeout=0) is None
    assert client.next_event(0) is None
    assert list(client.events(timeout=0)) == []


@pytest.mark.parametrize("vectors", [0, 2])
def test_an_only_client_is_told_that_it_has_all(
    server: MakeServer, connect: Connect, monkeypatch: pytest.MonkeyPatch, vectors: int
) -> None:
    """By the end of what it could send: it need not guess from silence."""
    monkeypatch.setattr("ivshmem.peer.client.SETTLE", 1e9)
    server(vectors=vectors)
    assert connect().vectors == vectors


def test_memory_is_shared(server: MakeServer, connect: Connect) -> None:
    serving = server()
    one, other, reader = connect(), connect(), connect(readonly=True)
    with memoryview(one.region) as a, memoryview(other.region) as b:
        a[100:105] = b"hello"
        assert bytes(b[100:105]) == b"hello"
        with memoryview(serving.region) as c, memoryview(reader.region) as d:
            assert bytes(c[100:105]) == bytes(d[100:105]) == b"hello"
            assert d.readonly
    assert reader.region.readonly


def test_ring_and_wait(server: MakeServer, connect: Connect) -> None:
    """Twenty real clients ring each other's every vector; nothing goes astray."""
    server(vectors=3)
    clients = [connect() for _ in range(20)]
    assert [c.id for c in clients] == list(range(20))
    for client in clients:
        until(lambda c=client: len(c.peers) == 19)  # type: ignore[misc]
        assert client.peers == [n for n in range(20) if n != client.id]
    for target in clients:
        for vector in range(3):
            for client in clients[: target.id + vector + 1]:
                client.ring(target.id, vector)
    for target in clients:
        for vector in range(3):
            assert target.wait(vector, PATIENCE) == min(target.id + vector + 1, 20)
            assert target.wait(vector, 0) is None


def test_doorbells_are_the_vectors_of_their_peers(server: MakeServer, connect: Connect) -> None:
    server(vectors=4)
    client = connect()
    with RawPeer(client.path) as peer:
        peer.set_up(4)
        until(lambda: client.peers == [1])
        ours = {eventfd_id(fd) for fd, name in open_fds().items() if "eventfd" in name}
        assert set(peer.vectors[0] + peer.vectors[1]) <= ours
        assert len(set(peer.vectors[0] + peer.vectors[1])) == 8


def test_rung_at_once(server: MakeServer, connect: Connect) -> None:
    """When a client is connected the others can ring it: they were told of it before."""
    server(vectors=1)
    eldest = connect()
    with ExitStack() as crowd:
        for _ in range(60):
            crowd.enter_context(RawPeer(eldest.path)).set_up(1)
        # A server without privileges has at most a dozen messages on the way to each peer: the
        # eldest must have read of the crowd.
        until(lambda: len(eldest.peers) == 60)
        for _ in range(100):
            with connect() as newcomer:
                eldest.ring(newcomer.id)
                assert newcomer.wait(0, PATIENCE) == 1


def test_wrong_numbers(server: MakeServer, connect: Connect) -> None:
    server(vectors=2)
    client = connect()
    with pytest.raises(NoSuchPeer, match=r"peer 7 is not connected .*nobody"):
        client.ring(7)
    other = connect()
    until(lambda: client.peers)
    with pytest.raises(NoSuchPeer, match=r"peer 7 is not connected .*1"):
        client.ring(7)
    with pytest.raises(NoSuchVector, match="vector 2: peer 1 has 2 vectors"):
        client.ring(other.id, 2)
    with pytest.raises(NoSuchVector, match="vector 9: peer 0 has 2 vectors"):
        client.ring(client.id, 9)
    with pytest.raises(NoSuchVector, match="vector 2: this endpoint has 2 vectors"):
        client.wait(2, 0)


def test_no_vectors(server: MakeServer, connect: Connect) -> None:
    serving = server(vectors=0)
    one, other = connect(), connect()
    assert one.vectors == 0
    assert len(serving.peers) == 2
    with pytest.raises(NoSuchPeer):
        one.ring(other.id)
    assert one.wait(timeout=0) is None


def test_the_most_vectors(server: MakeServer, connect: Connect) -> None:
    with open_files(16384):
        server(vectors=2048)
        one = connect()
        assert one.vectors == 2048
        other = connect()
        assert other.peers == [0]
        until(lambda: one.peers == [1])
        one.ring(other.id, 2047)
        assert other.wait(timeout=PATIENCE) == Interrupt(2047, 1)
        one.close()
        other.close()


@pytest.mark.parametrize("vectors", [-1, 2049, 70000])
def test_wrong_number_of_vectors(socket_path: str, vectors: int) -> None:
    with pytest.raises(ValueError, match=f"{vectors} vectors: allowed are 0 to 2048"):
        Server(socket_path, vectors=vectors)


# -- events ---------------------------------------------------------------------------------------


def test_events(server: MakeServer, connect: Connect) -> None:
    server(vectors=2)
    client = connect()
    other = connect()
    assert client.next_event(PATIENCE) == PeerJoined(1)
    other.ring(0, 1)
    other.ring(0, 1)
    assert client.next_event(PATIENCE) == Interrupt(1, 2)
    other.close()
    assert client.next_event(PATIENCE) == PeerLeft(1)
    assert client.next_event(0) is None


def test_events_as_an_iterator(server: MakeServer, connect: Connect) -> None:
    serving = server()
    client = connect()
    other = connect()
    seen = []
    for event in client:
        seen.append(event)
        if isinstance(event, PeerJoined):
            other.close()
        elif isinstance(event, PeerLeft):
            Background(serving.close).result()
        elif isinstance(event, Disconnected):
            break
    assert [type(event) for event in seen] == [PeerJoined, PeerLeft, Disconnected]


def test_who_was_there_first_is_no_event(server: MakeServer, connect: Connect) -> None:
    server()
    connect()
    second = connect()
    assert second.peers == [0]
    assert second.next_event(0) is None


def test_a_peer_that_came_and_went_is_not_mentioned(server: MakeServer, connect: Connect) -> None:
    serving = server()
    client = connect()
    for _ in range(10):
        connect().close()
    until(lambda: len(serving.peers) == 1)
    watcher = connect()
    until(lambda: client.peers == [watcher.id])
    assert client.next_event(0) == PeerJoined(watcher.id)
    assert client.next_event(0) is None


def test_unread_news_take_bounded_memory(server: MakeServer, connect: Connect) -> None:
    serving = server()
    client = connect()
    other = connect()
    until(lambda: client.peers)
    for _ in range(100):
        connect().close()
        until(lambda: len(serving.peers) == 2)
        until(lambda: client.peers == [other.id])  # the server knows it before it has told
    assert len(client._queue) <= 2
    assert client.peer_events() == [PeerJoined(other.id)]


def test_interrupt_and_unfinished_news(server: MakeServer, connect: Connect) -> None:
    """Of what is there now, nothing is missed: events(0) does not end at news without an event."""
    server(vectors=1)
    one = connect()
    other = connect()
    until(lambda: one.peers)
    assert one.next_event(0) == PeerJoined(other.id)
    for _ in range(50):
        with RawPeer(one.path) as guest:
            guest.set_up(1)
            other.ring(one.id)
            assert Interrupt(0, 1) in list(one.events(timeout=0))
        until(lambda: one.peers == [other.id])
        one.peer_events()


def test_events_end_with_time(server: MakeServer, connect: Connect) -> None:
    server()
    client = connect()
    begin = time.monotonic()
    with signals() as handled:
        assert list(client.events(timeout=0.2)) == []
    assert 0.2 <= time.monotonic() - begin < PATIENCE
    assert len(handled) > 3


def test_events_end_with_close(server: MakeServer, connect: Connect) -> None:
    server()
    client = connect()
    reading = Background(lambda: list(client.events()))
    reading.wait_until_asleep()
    client.close()
    assert reading.result() == []


@pytest.mark.parametrize("timeout", [None, PATIENCE * 4])
def test_ctrl_c(server: MakeServer, connect: Connect, timeout: float | None) -> None:
    server()
    client = connect()
    calls: list[Callable[[], object]] = [
        lambda: list(client.events(timeout)),
        lambda: client.next_event(timeout),
        lambda: client.wait(0, timeout),
        lambda: client.wait(timeout=timeout),
    ]
    for call in calls:
        with pytest.raises(KeyboardInterrupt), interrupt_when_asleep():
            call()
    client.ring(client.id)
    assert client.next_event(PATIENCE) == Interrupt(0, 1)


def test_news_come_in_while_waiting(server: MakeServer, connect: Connect) -> None:
    """wait() is for interrupts; a peer that joins during it is known afterwards."""
    server()
    client = connect()
    waiting = Background(lambda: client.wait(timeout=PATIENCE))
    waiting.wait_until_asleep()
    other = connect()
    other.ring(client.id)
    assert waiting.result() == Interrupt(0, 1)
    assert client.peers == [other.id]


def test_client_in_an_event_loop(server: MakeServer, connect: Connect) -> None:
    server(vectors=2)
    client = connect()

    async def run() -> list[ivshmem.Event]:
        seen: list[ivshmem.Event] = []
        done = asyncio.Event()
        other = connect()

        def readable() -> None:
            for event in client.events(timeout=0):
                seen.append(event)
                if isinstance(event, PeerJoined):
                    other.ring(0, 1)
                elif isinstance(event, Interrupt):
                    other.close()
                elif isinstance(event, PeerLeft):
                    done.set()

        asyncio.get_running_loop().add_reader(client.fileno(), readable)
        await asyncio.wait_for(done.wait(), PATIENCE)
        asyncio.get_running_loop().remove_reader(client.fileno())
        return seen

    assert asyncio.run(run()) == [PeerJoined(1), Interrupt(1, 1), PeerLeft(1)]


def test_news_that_were_taken_in_by_other_calls(server: MakeServer, connect: Connect) -> None:
    """An event loop sees them, although nothing is left in the socket."""
    server()
    client = connect()
    poll = select.poll()
    poll.register(client.fileno(), select.POLLIN)
    assert poll.poll(0) == []
    other = connect()
    until(lambda: client.peers == [other.id])
    assert poll.poll(0)
    assert list(client.events(timeout=0)) == [PeerJoined(other.id)]
    assert poll.poll(0) == []
    other.close()
    until(lambda: client.peers == [])
    assert poll.poll(0)
    assert client.peer_events() == [PeerLeft(other.id)]
    assert poll.poll(0) == []


def test_many_threads_on_one_client(server: MakeServer, connect: Connect) -> None:
    """Three threads share the interrupts that two others send, while peers come and go."""
    server()
    client, ringer = connect(), connect()
    total = 0
    lock = threading.Lock()
    stop = threading.Event()

    def collect() -> None:
        nonlocal total
        while not stop.is_set():
            interrupt = client.wait(timeout=0.05)
            with lock:
                total += interrupt.rings if interrupt else 0

    threads = [Background(collect) for _ in range(3)]
    for number in range(500):
        ringer.ring(client.id)
        if number % 50 == 0:
            connect().close()
    until(lambda: total == 500)
    stop.set()
    for thread in threads:
        thread.result()


# -- the server -----------------------------------------------------------------------------------


def test_peers_of_the_server(server: MakeServer, connect: Connect, socket_path: str) -> None:
    begin = time.time()
    serving = server(vectors=2)
    assert serving.path == socket_path
    assert repr(serving) == f"<ivshmem.Server at {socket_path}, 0 peers>"
    connect()
    connect()
    (first, second) = serving.peers
    assert (first.id, second.id) == (0, 1)
    assert first.pid == os.getpid()
    assert (first.uid, first.gid) == (os.getuid(), os.getgid())
    assert first.process == Path("/proc/self/comm").read_text().rstrip("\n")
    assert first.vectors == 2
    assert begin - 1 <= first.since <= time.time() + 1
    assert serving.paused == ""
    assert repr(serving) == f"<ivshmem.Server at {socket_path}, 2 peers>"


def test_callbacks(server: MakeServer, connect: Connect) -> None:
    calls: list[tuple[str, int]] = []
    server(
        on_join=lambda peer: calls.append(("join", peer.id)),
        on_leave=lambda peer: calls.append(("leave", peer.id)),
    )
    one, two = connect(), connect()
    one.close()
    until(lambda: len(calls) == 3)
    two.close()
    until(lambda: len(calls) == 4)
    assert calls == [("join", 0), ("join", 1), ("leave", 0), ("leave", 1)]


def test_callbacks_that_raise(
    server: MakeServer, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    """The peers do not suffer for the mistakes of a program that embeds the server."""

    def fail(peer: ivshmem.Peer) -> None:
        raise RuntimeError(f"mistake about {peer.id}")

    with caplog.at_level(logging.ERROR, "ivshmem.server"):
        serving = server(on_join=fail, on_leave=fail)
        one, two = connect(), connect()
        until(lambda: one.peers)
        one.ring(two.id)
        assert two.wait(0, PATIENCE) == 1
        one.close()
        until(lambda: two.peers == [])
        until(lambda: len(caplog.records) == 3)
    assert len(serving.peers) == 1
    assert "callback for peer 0 failed" in caplog.text
    assert "mistake about 1" in caplog.text


@pytest.mark.parametrize("callback", ["on_join", "on_leave"])
def test_a_callback_may_stop_the_server(
    server: MakeServer, connect: Connect, callback: str
) -> None:
    ended = threading.Event()

    def stop(_peer: ivshmem.Peer) -> None:
        serving.stop()
        ended.set()

    serving = server(start=False, **{callback: stop})
    running = Background(serving.serve_forever)
    connect().close()
    running.result()
    assert ended.is_set()


@pytest.mark.parametrize("callback", ["on_join", "on_leave"])
def test_a_callback_may_close_the_server(
    server: MakeServer, socket_path: str, callback: str
) -> None:
    """In the server's own thread: it ends without an error, and nothing is left."""
    closed = threading.Event()

    def close(_peer: ivshmem.Peer) -> None:
        serving.close()
        closed.set()

    serving = server(start=False, **{callback: close})
    running = Background(serving.serve_forever)
    with RawPeer(socket_path) as peer:
        peer.read_bytes(8)  # it is there: who leaves before is never heard of
        if callback == "on_join":
            assert closed.wait(PATIENCE)
    running.result()
    assert closed.is_set()
    assert not os.path.lexists(socket_path)


def test_foreground(server: MakeServer, connect: Connect) -> None:
    serving = server(start=False)
    running = Background(serving.serve_forever)
    client = connect()
    serving.stop()
    running.result()
    assert client.connected
    assert len(serving.peers) == 1


def test_closed_by_another_thread_in_the_foreground(
    server: MakeServer, connect: Connect, socket_path: str
) -> None:
    serving = server(start=False)
    running = Background(serving.serve_forever)
    client = connect()
    serving.close()
    assert not os.path.lexists(socket_path)
    running.result()
    assert isinstance(client.next_event(PATIENCE), Disconnected)


@pytest.mark.parametrize("call", ["stop", "close"])
def test_foreground_ends_by_a_signal_handler(server: MakeServer, call: str) -> None:
    """As a program does it that wants to end by SIGTERM."""
    serving = server(start=False)
    how = serving.stop if call == "stop" else serving.close
    before = signal.signal(signal.SIGTERM, lambda *_: how())
    target = threading.get_ident()
    try:
        with once_asleep(lambda: signal.pthread_kill(target, signal.SIGTERM)):
            serving.serve_forever()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_ctrl_c_in_the_foreground(server: MakeServer) -> None:
    serving = server(start=False)
    with pytest.raises(KeyboardInterrupt), interrupt_when_asleep():
        serving.serve_forever()


def test_stop_before_it_serves(server: MakeServer) -> None:
    serving = server(start=False)
    serving.stop()
    serving.serve_forever()


def test_steps_in_a_selector(server: MakeServer, connect: Connect) -> None:
    serving = server(vectors=2, start=False)
    connecting = Background(lambda: [connect(), connect()])
    with selectors.DefaultSelector() as selector:
        selector.register(serving, selectors.EVENT_READ)
        while connecting.running:
            if selector.select(0.05):
                serving.step(0)
    clients = connecting.result()
    assert isinstance(clients, list)
    clients[1].ring(0, 1)
    assert clients[0].wait(1, PATIENCE) == 1


def test_steps_in_asyncio(server: MakeServer, connect: Connect) -> None:
    serving = server(vectors=2, start=False)

    async def run() -> None:
        loop = asyncio.get_running_loop()
        loop.add_reader(serving.fileno(), serving.step, 0)
        try:
            one = await asyncio.to_thread(connect)
            other = await asyncio.to_thread(connect)
            event = await asyncio.to_thread(one.next_event, PATIENCE)
            assert event == PeerJoined(other.id)
        finally:
            loop.remove_reader(serving.fileno())

    asyncio.run(run())


def test_step_returns_in_time(server: MakeServer) -> None:
    serving = server(start=False)
    serving.step(0)
    begin = time.monotonic()
    serving.step(0.05)
    assert 0.05 <= time.monotonic() - begin < PATIENCE


def test_start_twice(server: MakeServer) -> None:
    serving = server()
    with pytest.raises(RuntimeError, match="runs in a thread already"):
        serving.start()


def test_a_region_of_the_callers(socket_path: str) -> None:
    with ivshmem.Region.create("1M") as region:
        with Server(socket_path, region) as serving:
            serving.start()
            with ivshmem.connect(socket_path, timeout=PATIENCE) as client:
                assert client.region.size == 1 << 20
                with memoryview(client.region) as view:
                    view[7] = 9
        assert not region.closed
        with memoryview(region) as view:
            assert view[7] == 9


@pytest.mark.parametrize("size", [0, "3M", "8E", 100, "none"])
def test_a_size_that_is_none(socket_path: str, size: int | str) -> None:
    with pytest.raises(ivshmem.RegionError):
        Server(socket_path, size)


def test_memory_that_crashes_guests(socket_path: str) -> None:
    """QEMU aborts at a size that is no power of two, and fails with memory it may only read."""
    odd = os.memfd_create("odd", os.MFD_CLOEXEC)
    os.ftruncate(odd, 3 * 4096)
    with ivshmem.Region.from_fd(odd) as region:
        with pytest.raises(ivshmem.RegionError), Server(socket_path, region):
            pass


def test_closed_server(server: MakeServer) -> None:
    serving = server()
    serving.close()
    serving.close()
    calls: list[Callable[[], object]] = [serving.step, serving.start, serving.fileno]
    for call in calls:
        with pytest.raises(ClosedError):
            call()
    serving.stop()
    assert serving.peers == []
    assert repr(serving).endswith("closed>")


def test_close_with_a_view_of_the_servers_own_region(server: MakeServer, connect: Connect) -> None:
    """All else is closed; the memory is when the view has gone."""
    serving = server()
    client = connect()
    view = memoryview(serving.region)
    with pytest.raises(BufferError):
        serving.close()
    assert isinstance(client.next_event(PATIENCE), Disconnected)
    assert not os.path.lexists(serving.path)
    view.release()
    serving.region.close()


def forget(_thing: object) -> None:
    """Nobody else has it."""


def test_forgotten_server(socket_path: str) -> None:
    with pytest.warns(ResourceWarning, match=r"unclosed <ivshmem.Server at .*, 0 peers>"):
        forget(Server(socket_path))


# -- the end of one side --------------------------------------------------------------------------


def test_the_server_goes(server: MakeServer, connect: Connect) -> None:
    """Memory and doorbells go on working, and one event says so."""
    serving = server(vectors=2)
    one, other = connect(), connect()
    until(lambda: one.peers)
    assert one.peer_events() == [PeerJoined(1)]
    serving.close()
    event = one.next_event(PATIENCE)
    assert event == Disconnected("the server ended the connection")
    assert not one.connected
    assert one.next_event(0) is None
    assert one.peers == [1]
    other.ring(0, 1)
    assert one.next_event(PATIENCE) == Interrupt(1, 1)
    one.ring(1, 0)
    assert other.wait(0, PATIENCE) == 1
    with memoryview(one.region) as a, memoryview(other.region) as b:
        a[0] = 77
        assert b[0] == 77
    with pytest.raises(NoSuchPeer):
        one.ring(5)


def test_the_server_goes_while_a_client_waits(server: MakeServer, connect: Connect) -> None:
    serving = server()
    client = connect()
    events = Background(lambda: client.next_event(PATIENCE))
    events.wait_until_asleep()
    Background(serving.close).result()
    assert isinstance(events.result(), Disconnected)
    waiting = Background(lambda: client.wait(timeout=PATIENCE))
    waiting.wait_until_asleep()
    client.ring(client.id)
    assert waiting.result() == Interrupt(0, 1)


def test_closed_client(server: MakeServer, connect: Connect) -> None:
    server(vectors=2)
    client = connect()
    other = connect()
    until(lambda: client.peers)
    before = len(open_fds())
    client.close()
    client.close()
    # Its socket, memory, epoll with wake-up, two vectors, two doorbells; the server's socket for
    # it and two eventfds go when the server notices.
    assert len(open_fds()) <= before - 8
    assert client.closed
    assert client.region.closed
    assert not client.connected
    assert client.peers == [other.id], "what it knew last"
    assert client.next_event(0) is None
    assert list(client) == []
    assert repr(client).endswith("closed>")
    calls: list[Callable[[], object]] = [
        lambda: client.ring(0),
        lambda: client.wait(0, 0),
        lambda: client.wait(timeout=0),
        client.fileno,
    ]
    for call in calls:
        with pytest.raises(ClosedError):
            call()


def test_close_with_a_view(server: MakeServer, connect: Connect) -> None:
    """BufferError, and the memory stays; the client has left all the same."""
    server()
    client = connect()
    other = connect()
    view = memoryview(client.region)
    with pytest.raises(BufferError, match="the memory is in use by 1 views"):
        client.close()
    assert client.closed
    assert other.next_event(PATIENCE) == PeerLeft(client.id)
    view[0] = 7
    assert memoryview(other.region)[0] == 7
    view.release()
    client.close()
    assert client.region.closed


def test_forgotten_client(server: MakeServer, socket_path: str) -> None:
    server()
    with pytest.warns(ResourceWarning, match=r"unclosed <ivshmem.Client at .*, id 0, 1 vector>"):
        forget(ivshmem.connect(socket_path, timeout=PATIENCE))


# -- fork -----------------------------------------------------------------------------------------


def test_forked_child_may_close_its_client(server: MakeServer, connect: Connect) -> None:
    server()
    client = connect()
    in_child(client.close)
    other = connect()
    assert client.next_event(PATIENCE) == PeerJoined(other.id)
    other.ring(client.id)
    assert client.next_event(PATIENCE) == Interrupt(0, 1)
    assert client.connected


def test_forked_child_may_close_the_server(server: MakeServer, connect: Connect) -> None:
    serving = server(start=False)
    in_child(serving.close)
    assert os.path.lexists(serving.path), "the path is the parent's"
    serving.start()
    client = connect()
    in_child(serving.close)  # also while a thread serves
    other = connect()
    assert client.next_event(PATIENCE) == PeerJoined(other.id)
    other.close()
    assert client.next_event(PATIENCE) == PeerLeft(other.id)


def test_forked_child_may_not_serve(server: MakeServer) -> None:
    serving = server(start=False)

    def try_it() -> None:
        calls: list[Callable[[], object]] = [serving.step, serving.start]
        for call in calls:
            with pytest.raises(RuntimeError, match="it may only close"):
                call()
        serving.stop()

    in_child(try_it)
    serving.step(0)
    assert not serving._stopping


@pytest.mark.parametrize("who", ["server", "client"])
def test_closing_is_noticed_though_a_child_has_copies(
    server: MakeServer, connect: Connect, who: str
) -> None:
    """A child that was forked for something else keeps the sockets open, but not the connection."""
    serving = server()
    client, other = connect(), connect()
    until(lambda: client.peers)
    client.peer_events()
    with idle_child():
        if who == "server":
            serving.close()
            assert isinstance(client.next_event(5), Disconnected)
        else:
            other.close()
            assert isinstance(client.next_event(5), PeerLeft)


def test_ring_all_knows_who_has_just_come() -> None:
    with (
        testing.server("4K") as server,
        ivshmem.connect(server.path) as a,
        ExitStack() as others,
    ):
        peers = [others.enter_context(ivshmem.connect(server.path)) for _ in range(3)]
        assert a.ring_all() == 3
        assert [peer.wait(0, PATIENCE) for peer in peers] == [1, 1, 1]
