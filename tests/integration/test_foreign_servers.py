"""Whatever answers at the path: other versions, silence, early ends, garbage, wrong descriptors.

Set-up fails with one clear error and leaves nothing open; after set-up nothing raises, it is an
event. And QEMU's example server, imitated: it does not say when a set-up is complete.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.children import NOBODY, needs_root, python
from support.limits import free_fds
from support.peer import Eventfds, FakeServer, memory_fd, send_raw, until_closed
from support.waiting import PATIENCE, Background, until

import ivshmem
from ivshmem import Disconnected, Interrupt, ProtocolError, RegionError, ServerGone

Script = Callable[[socket.socket], object]


@pytest.fixture
def events() -> Iterator[Eventfds]:
    with Eventfds() as fds:
        yield fds


def send_memory(sock: socket.socket, size: int = 4096) -> None:
    fd = memory_fd(size)
    send_raw(sock, -1, fd)
    os.close(fd)


def greet(sock: socket.socket, own: int = 3) -> None:
    send_raw(sock, 0)
    send_raw(sock, own)
    send_memory(sock)


# -- before the end of set-up ---------------------------------------------------------------------


def fails(path: str, script: Script, timeout: float = PATIENCE) -> BaseException:
    """Connect to a server that follows the script; the error that it ends with."""
    with FakeServer(path, script):
        with pytest.raises((ivshmem.IvshmemError, OSError)) as caught:
            ivshmem.connect(path, timeout=timeout)
    return caught.value


def test_protocol_version_1(socket_path: str) -> None:
    error = fails(socket_path, lambda sock: send_raw(sock, 1))
    assert isinstance(error, ProtocolError)
    assert str(error) == "the server speaks protocol version 1, this client only 0"


@pytest.mark.parametrize("messages", range(3))
def test_silence(socket_path: str, messages: int) -> None:
    def script(sock: socket.socket) -> None:
        for value in [0, 3][:messages]:
            send_raw(sock, value)
        until_closed(sock)

    error = fails(socket_path, script, timeout=0.1)
    missing = ["protocol version", "id", "memory"][messages]
    assert isinstance(error, TimeoutError)
    assert str(error) == (
        f"{socket_path}: set-up was not complete in time (still waiting for the {missing}):"
        " is this an ivshmem server, and does it run?"
    )


@pytest.mark.parametrize("timeout", [0.05, 0, -1])
def test_nobody_accepts(socket_path: str, timeout: float) -> None:
    """A server that hangs, with a full backlog."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(socket_path)
        stack.callback(os.unlink, socket_path)
        listener.listen(0)
        while True:
            waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
            waiting.setblocking(False)
            if waiting.connect_ex(socket_path) == errno.EAGAIN:
                break
        with pytest.raises(TimeoutError, match="the server accepts nobody: no answer in") as caught:
            ivshmem.connect(socket_path, timeout=timeout)
        assert caught.value.filename == socket_path


SETUP = 8 * (3 + 2 + 2)  # greeting, two vectors of a peer, two of its own


@pytest.mark.sampled(6)
@pytest.mark.parametrize("count", range(SETUP + 1))
def test_end_after_any_byte(socket_path: str, events: Eventfds, count: int) -> None:
    fds = events.make(4)
    memory = memory_fd()
    messages: list[tuple[int, list[int]]] = [
        (0, []),
        (3, []),
        (-1, [memory]),
        *[(7, [fd]) for fd in fds[:2]],
        *[(3, [fd]) for fd in fds[2:]],
    ]

    def script(sock: socket.socket) -> None:
        left = count
        for value, descriptors in messages:
            part = struct.pack("<q", value)[:left]
            if part:
                socket.send_fds(sock, [part], descriptors)
            left -= len(part)

    with FakeServer(socket_path, script):
        if count < SETUP:
            with pytest.raises(ServerGone, match="is this an ivshmem server") as caught:
                ivshmem.connect(socket_path, timeout=PATIENCE)
            missing = {0: "protocol version", 1: "id", 2: "memory"}.get(count // 8, "vectors")
            assert f"before it had sent the {missing}:" in str(caught.value)
            assert isinstance(caught.value, ConnectionError)
        else:
            with ivshmem.connect(socket_path, timeout=PATIENCE) as client:
                assert (client.id, client.peers, client.vectors) == (3, [7], 2)
                assert isinstance(client.next_event(PATIENCE), Disconnected)
    os.close(memory)


def test_reset_instead_of_an_end(socket_path: str) -> None:
    """What a client's kernel says when the server dies with it still in the backlog."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(socket_path)
    listener.listen()
    connecting = Background(lambda: ivshmem.connect(socket_path, timeout=PATIENCE))
    connecting.wait_until_asleep()
    listener.close()
    os.unlink(socket_path)
    with pytest.raises(ServerGone, match="before it had sent the protocol version"):
        connecting.result()


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "speaks protocol version"),
        (b"\xff" * 64, "speaks protocol version -1, this client only 0"),
        (b"\0" * 8 + b"\xff" * 8, "the server gave id -1, allowed are 0 to 65535"),
        (b"\0" * 24, "expected the memory (message -1 with a descriptor), got message 0 with 0"),
    ],
)
def test_garbage(socket_path: str, data: bytes, text: str) -> None:
    def script(sock: socket.socket) -> None:
        sock.sendall(data)
        until_closed(sock)

    error = fails(socket_path, script)
    assert isinstance(error, ProtocolError)
    assert text in str(error)


@pytest.mark.parametrize("seed", range(20))
def test_random_garbage(socket_path: str, events: Eventfds, seed: int) -> None:
    """Also with descriptors anywhere, and after a good beginning."""
    numbers = random.Random(seed)  # noqa: S311
    fds = events.make(3)

    def script(sock: socket.socket) -> None:
        with contextlib.suppress(ConnectionError):
            for value in [0, 3][: numbers.randrange(3)]:
                send_raw(sock, value)
            for _ in range(numbers.randrange(1, 10)):
                data = numbers.randbytes(numbers.randrange(1, 20))
                socket.send_fds(sock, [data], fds[: numbers.randrange(3)])

    error = fails(socket_path, script)
    assert isinstance(error, ProtocolError | ServerGone)


def test_memory_does_not_come_first(socket_path: str, events: Eventfds) -> None:
    """As a server of before version 0 did it."""
    (fd,) = events.make()

    def script(sock: socket.socket) -> None:
        send_raw(sock, 0)
        send_raw(sock, 3)
        send_raw(sock, 3, fd)
        until_closed(sock)

    error = fails(socket_path, script)
    assert isinstance(error, ProtocolError)
    assert "expected the memory" in str(error)


def pipe_end() -> int:
    reader, writer = os.pipe()
    os.close(writer)
    return reader


@pytest.mark.parametrize(
    "make",
    [
        lambda: os.eventfd(0),
        pipe_end,
        lambda: os.open("/", os.O_RDONLY),
        lambda: os.open("/dev/zero", os.O_RDWR),
        lambda: memory_fd(0),
    ],
    ids=["eventfd", "pipe", "directory", "device", "empty"],
)
def test_memory_that_is_none(socket_path: str, make: Callable[[], int]) -> None:
    def script(sock: socket.socket) -> None:
        send_raw(sock, 0)
        send_raw(sock, 3)
        fd = make()
        send_raw(sock, -1, fd)
        os.close(fd)
        until_closed(sock)

    error = fails(socket_path, script)
    assert isinstance(error, RegionError)
    assert "the descriptor is not shared memory: a file of " in str(error)


def test_read_only_memory(socket_path: str, directory: Path, events: Eventfds) -> None:
    """Such a server's memory can be read here, as it can be."""
    file = directory / "memory"
    file.write_bytes(b"a" * 4096)
    (vector,) = events.make()

    def script(sock: socket.socket) -> None:
        send_raw(sock, 0)
        send_raw(sock, 3)
        fd = os.open(file, os.O_RDONLY)
        send_raw(sock, -1, fd)
        os.close(fd)
        send_raw(sock, 3, vector)
        until_closed(sock)

    with FakeServer(socket_path, script):
        with ivshmem.connect(socket_path, timeout=PATIENCE, vectors=1) as client:
            assert client.region.readonly
            with memoryview(client.region) as view:
                assert view[0] == ord("a")


@pytest.mark.parametrize("who", [3, 7])
def test_two_descriptors_on_a_vector(socket_path: str, events: Eventfds, who: int) -> None:
    fds = events.make(2)

    def script(sock: socket.socket) -> None:
        greet(sock)
        send_raw(sock, who, *fds)
        until_closed(sock)

    error = fails(socket_path, script)
    assert isinstance(error, ProtocolError)
    assert "2 descriptors, not 0 or 1" in str(error)


def test_a_vector_that_cannot_be_watched(socket_path: str) -> None:
    """A file where an eventfd should be."""

    def script(sock: socket.socket) -> None:
        greet(sock)
        send_raw(sock, 3, fd := memory_fd())
        os.close(fd)
        until_closed(sock)

    assert isinstance(fails(socket_path, script), OSError | ProtocolError)


SERVER = """
    import sys, ivshmem
    with ivshmem.Server(sys.argv[1], 4096, int(sys.argv[2])) as server:
        server.start()
        print("READY")
        sys.stdin.readline()
"""


@pytest.mark.sampled(3)
@pytest.mark.parametrize("free", range(15))
def test_out_of_descriptors(socket_path: str, free: int) -> None:
    """However few can be opened: one error that says so, or a client; nothing is left open."""
    with python(SERVER, socket_path, "4") as child:
        child.expect("READY")
        error = None
        with free_fds(free):
            try:
                ivshmem.connect(socket_path, timeout=PATIENCE).close()
            except (OSError, ProtocolError) as caught:
                error = caught
        if error is not None:
            assert "too many open files" in str(error).lower()
        # At least the socket, an epoll object, an eventfd to wake it, the memory, four vectors.
        assert (error is None) >= (free == 14)
        assert (error is not None) >= (free < 8)
        child.tell()
        child.finish()


# -- after set-up ---------------------------------------------------------------------------------


def send_two_vectors(sock: socket.socket) -> None:
    bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    for _ in range(2):
        send_raw(sock, 9, bell)
    os.close(bell)


@pytest.mark.parametrize(
    ("after", "reason"),
    [
        (lambda sock: sock.sendall(b"\xfe" + b"\xff" * 7), "message -2 is not a peer id"),
        (send_memory, "message -1 is not a peer id"),
        (lambda sock: send_raw(sock, 3), "the server says that this client itself (3) has left"),
        (lambda sock: sock.sendall(b"\0\0\0"), "the server ended the connection"),
        (lambda _sock: None, "the server ended the connection"),
        (lambda sock: send_raw(sock, 9, 0, 1, 2), "descriptor"),
        (send_two_vectors, "more than 1 vector"),
    ],
    ids=["garbage", "memory", "own leave", "half a message", "end", "descriptors", "vectors"],
)
def test_failures_after_setup_are_an_event(
    socket_path: str, events: Eventfds, after: Script, reason: str
) -> None:
    """Doorbells go on working."""
    mine, other = events.make(2)
    ready = threading.Event()

    def script(sock: socket.socket) -> None:
        greet(sock)
        send_raw(sock, 7, other)
        send_raw(sock, 3, mine)
        ready.wait(PATIENCE)
        after(sock)

    with FakeServer(socket_path, script):
        with ivshmem.connect(socket_path, timeout=PATIENCE) as client:
            ready.set()
            for event in client.events(PATIENCE):
                if isinstance(event, Disconnected):
                    break
            assert isinstance(event, Disconnected)
            assert reason in event.reason
            assert not client.connected
            assert client.next_event(0) is None
            assert 7 in client.peers
            client.ring(7)
            assert os.eventfd_read(other) == 1
            os.eventfd_write(mine, 2)
            assert client.next_event(PATIENCE) == Interrupt(0, 2)


def test_a_vector_that_cannot_be_watched_after_setup(socket_path: str, events: Eventfds) -> None:
    """Of a guess that turns out too small, with a file where an eventfd should be."""
    (mine,) = events.make()

    def script(sock: socket.socket) -> None:
        greet(sock)
        send_raw(sock, 3, mine)
        ready.wait(PATIENCE)
        send_raw(sock, 3, fd := memory_fd())
        os.close(fd)
        until_closed(sock)

    ready = threading.Event()
    with FakeServer(socket_path, script):
        with ivshmem.connect(socket_path, timeout=PATIENCE) as client:
            ready.set()
            assert isinstance(client.next_event(PATIENCE), Disconnected)


def test_unfinished_announcement_and_an_interrupt(socket_path: str, events: Eventfds) -> None:
    """News without an event do not hide the interrupt that is there, too."""
    own, other, newcomer = events.make(2), events.make(2), events.make(2)
    ready, sent = threading.Event(), threading.Event()

    def script(sock: socket.socket) -> None:
        greet(sock)
        for peer, fds in ((7, other), (3, own)):
            for fd in fds:
                send_raw(sock, peer, fd)
        ready.wait(PATIENCE)
        send_raw(sock, 9, newcomer[0])
        os.eventfd_write(own[1], 1)
        sent.set()
        until_closed(sock)

    with FakeServer(socket_path, script):
        with ivshmem.connect(socket_path, timeout=PATIENCE) as client:
            ready.set()
            sent.wait(PATIENCE)
            assert client.next_event(0) == Interrupt(1, 1)
            assert client.peers == [7]


def test_unfinished_announcement_is_no_end_of_waiting(socket_path: str, events: Eventfds) -> None:
    own, other, newcomer = events.make(2), events.make(2), events.make(2)
    seen = threading.Event()

    def script(sock: socket.socket) -> None:
        greet(sock)
        for peer, fds in ((7, other), (3, own)):
            for fd in fds:
                send_raw(sock, peer, fd)
        send_raw(sock, 9, newcomer[0])
        seen.wait(PATIENCE)
        send_raw(sock, 9, newcomer[1])
        until_closed(sock)

    with FakeServer(socket_path, script):
        with ivshmem.connect(socket_path, timeout=PATIENCE) as client:
            waiting = Background(lambda: client.next_event(PATIENCE))
            until(lambda: client._bells(9) == 1)
            waiting.wait_until_asleep()
            seen.set()
            assert repr(waiting.result()) == "PeerJoined(peer=9)"


# -- QEMU's example server ------------------------------------------------------------------------


class ExampleServer:
    """The order of contrib/ivshmem-server's messages: it says nothing of the end of a set-up."""

    def __init__(self, vectors: int, events: Eventfds) -> None:
        self.vectors = vectors
        self._events = events
        self._clients: list[tuple[int, socket.socket, list[int]]] = []

    def accept(self, sock: socket.socket) -> list[int]:
        """Set up the next client; returns its vectors."""
        number = len(self._clients)
        vectors = self._events.make(self.vectors)
        greet(sock, own=number)
        for _, other, _ in self._clients:  # the others are told first
            self._send(other, number, vectors)
        for peer, _, theirs in self._clients:
            self._send(sock, peer, theirs)
        self._send(sock, number, vectors)
        self._clients.append((number, sock, vectors))
        return vectors

    @staticmethod
    def _send(sock: socket.socket, peer: int, vectors: list[int]) -> None:
        for fd in vectors:
            send_raw(sock, peer, fd)


@pytest.mark.parametrize("vectors", [0, 1, 3])
def test_ready_by_silence(socket_path: str, events: Eventfds, vectors: int) -> None:
    example = ExampleServer(vectors, events)

    def script(sock: socket.socket) -> None:
        example.accept(sock)
        until_closed(sock)

    with FakeServer(socket_path, script):
        with ivshmem.connect(socket_path, timeout=PATIENCE) as client:
            assert client.vectors == vectors
            assert client.peers == []
            for vector in range(vectors):
                client.ring(0, vector)
                assert client.wait(vector, PATIENCE) == 1
            assert client.connected


def test_several_clients(socket_path: str, events: Eventfds) -> None:
    """Whoever finds somebody there needs no silence to know that its set-up is complete."""
    example = ExampleServer(2, events)
    kept = []

    def script(sock: socket.socket) -> None:
        copy = sock.dup()
        copy.settimeout(PATIENCE)
        kept.append(copy)
        example.accept(copy)

    with FakeServer(socket_path, script, script, script), contextlib.ExitStack() as clients:
        one, two, three = (
            clients.enter_context(ivshmem.connect(socket_path, timeout=PATIENCE)) for _ in range(3)
        )
        until(lambda: [c.peers for c in (one, two, three)] == [[1, 2], [0, 2], [0, 1]])
        assert [c.vectors for c in (one, two, three)] == [2, 2, 2]
        three.ring(0, 1)
        assert one.wait(1, PATIENCE) == 1
        one.ring(2, 0)
        assert three.wait(0, PATIENCE) == 1
    for sock in kept:
        sock.close()


def test_late_vectors_count(socket_path: str, events: Eventfds) -> None:
    """A server that was held up: the silence was no end, and nothing is lost."""
    fds = events.make(3)
    ready = threading.Event()

    def script(sock: socket.socket) -> None:
        greet(sock)
        send_raw(sock, 3, fds[0])
        ready.wait(PATIENCE)
        for fd in fds[1:]:
            send_raw(sock, 3, fd)
        for fd in fds:
            send_raw(sock, 8, fd)
        until_closed(sock)

    with FakeServer(socket_path, script):
        with ivshmem.connect(socket_path, timeout=PATIENCE) as client:
            assert client.vectors == 1
            ready.set()
            event = client.next_event(PATIENCE)
            assert isinstance(event, ivshmem.PeerJoined)
            assert event.peer == 8
            assert client.vectors == 3
            os.eventfd_write(fds[2], 1)
            assert client.wait(2, PATIENCE) == 1


def test_vectors_that_are_known_are_waited_for(socket_path: str, events: Eventfds) -> None:
    """With `vectors=` silence means nothing: the rest may take as long as the time allows."""
    fds = events.make(2)

    def script(sock: socket.socket) -> None:
        greet(sock)
        send_raw(sock, 3, fds[0])
        time.sleep(0.4)  # longer than the silence that would end the set-up
        send_raw(sock, 3, fds[1])
        until_closed(sock)

    with FakeServer(socket_path, script):
        with ivshmem.connect(socket_path, timeout=PATIENCE, vectors=2) as client:
            assert client.vectors == 2


def test_own_vectors_that_the_example_server_dropped(socket_path: str, events: Eventfds) -> None:
    """With many peers it sends no own vectors: others can be rung all the same."""
    fds = events.make(4)

    def script(sock: socket.socket) -> None:
        greet(sock)
        for peer, pair in ((7, fds[:2]), (8, fds[2:])):
            for fd in pair:
                send_raw(sock, peer, fd)
        until_closed(sock)

    with FakeServer(socket_path, script):
        with ivshmem.connect(socket_path, timeout=PATIENCE) as client:
            assert client.peers == [7, 8]
            assert client.vectors == 0
            client.ring(8, 1)
            assert os.eventfd_read(fds[3]) == 1


# -- no server at all -----------------------------------------------------------------------------


def refused(path: str | os.PathLike[str]) -> OSError:
    with pytest.raises(OSError) as caught:
        ivshmem.connect(path, timeout=PATIENCE)
    assert caught.value.filename == os.fspath(path)
    return caught.value


def test_no_such_path(socket_path: str) -> None:
    error = refused(socket_path)
    assert isinstance(error, FileNotFoundError)
    assert "no such socket: start the server (ivshmem serve), or give the path" in str(error)


def test_stale_socket(socket_path: str) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(socket_path)
    error = refused(socket_path)
    assert isinstance(error, ConnectionRefusedError)
    assert "nobody listens here: start the server (ivshmem serve)" in str(error)
    os.unlink(socket_path)


def test_regular_file(directory: Path) -> None:
    (directory / "file").write_text("")
    assert isinstance(refused(directory / "file"), ConnectionRefusedError)


def test_a_directory(directory: Path) -> None:
    assert refused(directory).errno in (errno.ECONNREFUSED, errno.EACCES)


def test_datagram_socket(socket_path: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(socket_path)
        error = refused(socket_path)
        assert error.errno == errno.EPROTOTYPE
        assert "this socket is of another type, so it is not an ivshmem server's" in str(error)
        os.unlink(socket_path)


@pytest.mark.parametrize("path", ["/tmp/" + "x" * 103, "", "a\0b"])
def test_path_that_cannot_be(path: str) -> None:
    error = refused(path)
    assert error.errno == (errno.ENAMETOOLONG if len(path) > 100 else errno.EINVAL)
    if len(path) > 100:
        assert "a socket path has at most 107 bytes, this one 108: use a shorter one" in str(error)


@needs_root
def test_no_permission(server: Callable[..., object], socket_path: str) -> None:
    server()
    os.chmod(socket_path, 0o600)
    code = """
        import sys, ivshmem
        try:
            ivshmem.connect(sys.argv[1], timeout=10)
        except PermissionError as error:
            print(error)
    """
    with python(code, socket_path, user=NOBODY) as child:
        child.expect(
            "[Errno 13] permission denied: the server's user must let you write to its socket:"
            f" {socket_path!r}"
        )
