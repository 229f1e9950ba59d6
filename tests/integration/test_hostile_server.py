"""What a server at a path that anybody could take can do to a client, and what it cannot.

SECURITY.md, "What a hostile server can do to a client", says the same in words.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from support.children import python
from support.leaks import open_fds
from support.limits import free_fds
from support.peer import Eventfds, FakeServer, memory_fd, send_raw, until_closed
from support.waiting import PATIENCE, in_child, until

import ivshmem
from ivshmem import Disconnected, ProtocolError, RegionError


@pytest.fixture
def events() -> Iterator[Eventfds]:
    with Eventfds() as made:
        yield made


def greet(sock: socket.socket, memory: int | None = None) -> None:
    """Version, id 3, memory."""
    fd = memory_fd() if memory is None else memory
    send_raw(sock, 0)
    send_raw(sock, 3)
    send_raw(sock, -1, fd)
    os.close(fd)


def pipe_end() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def one_socket() -> int:
    one, other = socket.socketpair()
    other.close()
    return one.detach()


STRANGE: dict[str, Callable[[], int]] = {
    "pipe": pipe_end,
    "socket": one_socket,
    "zero": lambda: os.open("/dev/zero", os.O_RDWR),
    "directory": lambda: os.open("/", os.O_RDONLY),
    "path": lambda: os.open("/etc/passwd", os.O_PATH),
    "eventfd": lambda: os.eventfd(0),
    "proc": lambda: os.open("/proc/self/maps", os.O_RDONLY),
}


@pytest.mark.parametrize("make", STRANGE.values(), ids=STRANGE)
def test_what_is_not_memory(socket_path: str, make: Callable[[], int]) -> None:
    before = open_fds()

    def script(sock: socket.socket) -> None:
        greet(sock, make())
        until_closed(sock)

    with FakeServer(socket_path, script):
        with pytest.raises((RegionError, OSError, ProtocolError)) as found:
            ivshmem.connect(socket_path, timeout=PATIENCE)
        assert not isinstance(found.value, TimeoutError)
        assert str(found.value)
        del found
    assert open_fds() == before


def test_memory_larger_than_any_address_space(socket_path: str) -> None:
    def script(sock: socket.socket) -> None:
        fd = os.memfd_create("large")
        with contextlib.suppress(OSError):
            os.ftruncate(fd, (1 << 63) - 4096)
        greet(sock, fd)
        until_closed(sock)

    with FakeServer(socket_path, script), pytest.raises((OSError, RegionError)):
        ivshmem.connect(socket_path, timeout=PATIENCE)


def test_memory_that_shrinks(socket_path: str) -> None:
    """The memory is the server's own: it reads what the client writes, and can end the client.

    Nothing in user space can prevent that: the client dies when it touches what is gone.
    """
    shrunk, done = threading.Event(), threading.Event()

    def script(sock: socket.socket) -> None:
        fd = memory_fd(8192)
        copy = os.dup(fd)
        greet(sock, fd)
        sock.shutdown(socket.SHUT_RD)
        shrunk.wait(PATIENCE)
        seen.append(os.pread(copy, 6, 0))
        os.ftruncate(copy, 0)
        os.close(copy)
        done.set()
        until_closed(sock)

    seen: list[bytes] = []
    program = """
        import sys, ivshmem
        with ivshmem.connect(sys.argv[1], timeout=30) as client:
            client.region.write(0, b"secret")
            print(client.region.info().sealed, flush=True)
            sys.stdin.readline()  # the word that it has happened
            print(client.region.read(0, 8))
    """
    with FakeServer(socket_path, script), python(program, socket_path) as child:
        assert child.line() == "False", "it could have known"
        shrunk.set()
        assert done.wait(PATIENCE)
        assert seen == [b"secret"]
        assert child.process.stdin is not None
        child.process.stdin.write(b"\n")
        child.process.stdin.flush()
        assert child.process.wait(PATIENCE) == -signal.SIGBUS


KINDS: dict[str, Callable[[], int]] = {"pipe": pipe_end, "memory": memory_fd, "socket": one_socket}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("who", [3, 7], ids=["own", "a peer's"])
@pytest.mark.parametrize("when", ["set-up", "later"])
def test_what_is_not_a_doorbell(
    socket_path: str, events: Eventfds, make: Callable[[], int], who: int, when: str
) -> None:
    """Nothing is ever written to it: the first message with one ends the connection."""
    (mine,) = events.make()
    ready = threading.Event()

    def script(sock: socket.socket) -> None:
        greet(sock)
        if when == "later":
            send_raw(sock, 3, mine)
            sock.shutdown(socket.SHUT_RD)
            ready.wait(PATIENCE)
        strange = make()
        send_raw(sock, who, strange)
        os.close(strange)
        until_closed(sock)

    before = open_fds()
    with FakeServer(socket_path, script):
        if when == "set-up":
            with pytest.raises(ProtocolError, match="is not an eventfd"):
                ivshmem.connect(socket_path, timeout=PATIENCE)
        else:
            with ivshmem.connect(socket_path, timeout=PATIENCE) as client:
                ready.set()
                event = client.next_event(PATIENCE)
                assert isinstance(event, Disconnected)
                assert "more than 1 vector" in event.reason or "is not an eventfd" in event.reason
                assert client.vectors_of(7) == 0
                with pytest.raises(ivshmem.NoSuchPeer):
                    client.ring(7)
    assert set(open_fds()) <= set(before)


def news(sock: socket.socket, bell: int) -> None:
    """Peers that come and go until the other side does."""
    sock.settimeout(PATIENCE)
    with contextlib.suppress(OSError):
        for peer in itertools.cycle([5, 6, 7, 8]):
            send_raw(sock, peer, bell)
            send_raw(sock, peer)


def test_a_set_up_without_end(socket_path: str, events: Eventfds) -> None:
    (bell,) = events.make()

    def script(sock: socket.socket) -> None:
        greet(sock)
        news(sock, bell)

    with FakeServer(socket_path, script):
        begun = time.monotonic()
        with pytest.raises(TimeoutError):
            ivshmem.connect(socket_path, timeout=0.3, vectors=1)
        assert time.monotonic() - begun < 10


def test_news_without_end(socket_path: str, events: Eventfds) -> None:
    """Each call returns, and what nobody reads is bounded."""
    bell, mine = events.make(2)

    def script(sock: socket.socket) -> None:
        greet(sock)
        send_raw(sock, 3, mine)
        sock.shutdown(socket.SHUT_RD)
        news(sock, bell)

    with FakeServer(socket_path, script):
        with ivshmem.connect(socket_path, timeout=PATIENCE) as client:
            calls: list[Callable[[], object]] = [
                lambda: client.peers,
                client.peer_events,
                lambda: client.wait(0, 0.01),
                lambda: client.wait(None, 0.01),
                lambda: client.next_event(0.01),
                lambda: sum(1 for _ in client.events(0.05)),
                lambda: sum(1 for _ in client.events(0)),
            ]
            begun = time.monotonic()
            for call in calls * 3:
                call()
            assert time.monotonic() - begun < 20
            assert len(client.peer_events()) <= 8


def test_descriptors_without_end(socket_path: str, events: Eventfds) -> None:
    def starve() -> None:
        (bell,) = events.make()

        def script(sock: socket.socket) -> None:
            greet(sock)
            sock.settimeout(PATIENCE)
            with contextlib.suppress(OSError):
                for peer in itertools.count(10):
                    send_raw(sock, peer, bell)

        before = open_fds()
        with FakeServer(socket_path, script):
            with free_fds(40), pytest.raises(ProtocolError, match="too many open files"):
                ivshmem.connect(socket_path, timeout=PATIENCE)
        until(lambda: set(open_fds()) <= set(before), "everything that was opened is closed")

    in_child(starve)
