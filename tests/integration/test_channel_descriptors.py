"""Connections of channels and descriptors: what the kernel copies between them, and resets."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from support.waiting import until

import ivshmem
from ivshmem import ClosedError, Directory, Region, Server, channel
from ivshmem.channel import Channels, Stream
from ivshmem.channel.stream_poll import HAS_ENDED, MAY_RECEIVE, MAY_SEND, StreamPoll


@pytest.fixture
def channels() -> Iterator[Channels]:
    with Region.create("4M") as region:
        Directory.create(region, channels="2M").close()
        with channel.open(region) as channels:
            yield channels


@pytest.fixture
def ends(channels: Channels) -> Iterator[tuple[Stream, Stream]]:
    """Both ends of a connection of 4 KiB, which do not wait."""
    room = channels.create_bytes("c", buffer=4096, connections=2)
    with room.listen() as listener, room.connect() as one:
        other = listener.accept(0)
        assert other is not None
        with other:
            one.setblocking(False)
            other.setblocking(False)
            yield one, other


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    source, target = os.pipe2(os.O_NONBLOCK)
    yield source, target
    os.close(source)
    os.close(target)


def test_from_a_descriptor_to_a_descriptor(
    ends: tuple[Stream, Stream], pipe: tuple[int, int]
) -> None:
    """Also where the ring wraps; all offsets of it are used."""
    one, other = ends
    data = os.urandom(3000)
    for _ in range(10):
        assert os.write(pipe[1], data) == 3000
        assert one.read_from(pipe[0]) == 3000
        assert other.write_to(pipe[1]) == 3000
        assert os.read(pipe[0], 5000) == data


def test_sizes(ends: tuple[Stream, Stream], pipe: tuple[int, int]) -> None:
    one, other = ends
    os.write(pipe[1], bytes(10_000))
    assert one.read_from(pipe[0], 100) == 100
    assert one.read_from(pipe[0]) == 3996  # what there is room for
    with pytest.raises(BlockingIOError):
        one.read_from(pipe[0])
    assert other.write_to(pipe[1], 1) == 1
    assert one.read_from(pipe[0]) == 1
    with pytest.raises(ValueError, match="0 bytes: it would look like the end"):
        one.read_from(pipe[0], 0)
    with pytest.raises(ValueError, match="cannot move -1 bytes"):
        other.write_to(pipe[1], -1)


def test_an_object_with_a_descriptor(ends: tuple[Stream, Stream]) -> None:
    one, other = ends
    near, far = socket.socketpair()
    with near, far:
        near.sendall(b"hello")
        assert one.read_from(far) == 5
        assert other.write_to(far) == 5
        assert near.recv(10) == b"hello"


def test_a_descriptor_that_would_wait(ends: tuple[Stream, Stream], pipe: tuple[int, int]) -> None:
    one, other = ends
    assert one.read_from(pipe[0]) is None
    with pytest.raises(BlockingIOError):
        os.write(pipe[1], bytes(1 << 17)), os.write(pipe[1], bytes(1 << 17))
    one.send(b"x")
    assert other.write_to(pipe[1]) is None
    assert other.recv(10) == b"x"


def test_signals_while_a_descriptor_waits() -> None:
    # Each interrupts the system call: with a stack of 512 KiB, 5000 at once would have no room.
    script = """
import os, signal
from ivshmem import Directory, Region, channel
count = 0
source, target = os.pipe()
def tick(*_):
    global count
    count += 1
    if count == 5000:
        os.write(target, b"x")
with Region.create("4M") as region:
    Directory.create(region, channels="2M").close()
    with channel.open(region) as channels:
        room = channels.create_bytes("b", buffer=4096)
        with room.listen(), room.connect() as stream:
            signal.signal(signal.SIGALRM, tick)
            signal.setitimer(signal.ITIMER_REAL, 5e-5, 5e-5)
            assert stream.read_from(source) == 1
            signal.setitimer(signal.ITIMER_REAL, 0)
"""
    limited = 'ulimit -s 512 && exec "$0" -c "$1"'
    ended = subprocess.run(["sh", "-c", limited, sys.executable, script], check=False, timeout=60)
    assert ended.returncode == 0


def test_the_end_of_a_file(ends: tuple[Stream, Stream]) -> None:
    one, other = ends
    with open(os.devnull, "rb") as null:
        assert one.read_from(null) == 0
        with pytest.raises(BlockingIOError):  # the other end does not hear of it
            other.recv(1)
        one.shutdown(socket.SHUT_WR)
        assert other.write_to(null) == 0


def test_errors_of_a_descriptor(ends: tuple[Stream, Stream]) -> None:
    one, other = ends
    source, target = os.pipe()
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        one.read_from(target)
    assert (caught.value.errno, caught.value.filename) == (errno.EBADF, f"descriptor {target}")
    os.close(source)
    one.send(b"kept")
    with pytest.raises(BrokenPipeError) as broken:
        other.write_to(target)
    assert broken.value.filename == f"descriptor {target}"
    os.close(target)
    assert other.recv(10) == b"kept"


def test_an_end_that_is_gone(ends: tuple[Stream, Stream], pipe: tuple[int, int]) -> None:
    one, other = ends
    one.send(b"last")
    one.abort()
    one.abort()
    one.close()
    assert one.closed
    with pytest.raises(BrokenPipeError) as broken:
        other.read_from(pipe[0])
    assert broken.value.filename is None
    assert other.write_to(pipe[1]) == 4
    with pytest.raises(ConnectionResetError) as reset:
        other.write_to(pipe[1])
    assert reset.value.filename is None
    with pytest.raises(ConnectionResetError):
        other.recv(1)
    with pytest.raises(ClosedError):
        one.read_from(pipe[0])


@pytest.mark.parametrize("accepted_first", [True, False])
def test_abort_of_each_end(channels: Channels, accepted_first: bool) -> None:
    """The connection can be used again when both ends have closed."""
    room = channels.create_bytes("c", buffer=64, connections=1)
    with room.listen() as listener:
        for _ in range(3):
            one = room.connect()
            if not accepted_first:
                one.abort()
                assert listener.accept(0) is None  # nothing was sent to anybody
                continue
            other = listener.accept(0)
            assert other is not None
            other.abort()
            with pytest.raises(ConnectionResetError):
                one.recv(1)
            one.close()


@pytest.mark.parametrize("was_seen", [True, False])
def test_an_end_before_an_abort_is_taken_back(ends: tuple[Stream, Stream], was_seen: bool) -> None:
    one, other = ends
    one.send(b"last")
    one.shutdown(socket.SHUT_WR)
    if was_seen:
        assert [other.recv(10), other.recv(10)] == [b"last", b""]
    one.abort()
    if not was_seen:
        assert other.recv(10) == b"last"
    with pytest.raises(ConnectionResetError):
        other.recv(1)
    with pytest.raises(BrokenPipeError):
        other.send(b"x")


def test_a_call_that_waits_for_the_ring(ends: tuple[Stream, Stream], pipe: tuple[int, int]) -> None:
    one, other = ends
    other.settimeout(None)
    done: list[int | None] = []
    thread = threading.Thread(target=lambda: done.append(other.write_to(pipe[1])))
    thread.start()
    one.send(b"after a while")
    thread.join()
    assert done == [13]
    other.settimeout(0.01)
    with pytest.raises(TimeoutError):
        other.write_to(pipe[1])


def test_two_threads_that_send(ends: tuple[Stream, Stream]) -> None:
    """One lets the kernel copy, and waits for a descriptor; it can also be closed then."""
    one, other = ends
    source, target = os.pipe()  # which block
    failed: list[BaseException] = []

    def read() -> None:
        try:
            one.read_from(source)
        except ClosedError as error:
            failed.append(error)

    def refused() -> bool:
        try:
            one.send(b"x")
        except RuntimeError as error:
            return "another thread sends" in str(error)
        except BlockingIOError:
            other.recv(5000)
        return False

    thread = threading.Thread(target=read)
    thread.start()
    until(refused)
    one.close()
    os.write(target, b"too late")
    thread.join()
    assert len(failed) == 1
    os.close(source)
    os.close(target)


# -- many at once ---------------------------------------------------------------------------------


def test_a_poll_tells_who_can_continue(channels: Channels) -> None:
    room = channels.create_bytes("c", buffer=64, connections=4)
    poll = StreamPoll(channels._member)
    try:
        with room.listen() as listener:
            accepting = poll.add(listener, "listener")
            assert accepting.sleep(MAY_RECEIVE) == 0
            assert poll.ready() == []
            ones = [room.connect() for _ in range(3)]
            assert poll.ready() == [("listener", MAY_RECEIVE)]
            assert poll.ready() == []  # it sleeps no more
            others = [listener.accept(0) for _ in ones]
            sleepers = []
            for number, other in enumerate(others):
                assert other is not None
                sleepers.append(poll.add(other, number))
                assert sleepers[-1].sleep(MAY_RECEIVE | HAS_ENDED) == 0
                assert sleepers[-1].sleep(MAY_SEND) == MAY_SEND  # there is room
                assert sleepers[-1].sleep(MAY_RECEIVE | HAS_ENDED) == 0
            ones[1].send(b"x")
            assert poll.ready() == [(1, MAY_RECEIVE)]
            sleepers[0].close()
            sleepers[0].close()
            with pytest.raises(ClosedError):
                sleepers[0].sleep(MAY_RECEIVE)
            ones[0].close()
            ones[2].close()
            assert poll.ready() == [(2, MAY_RECEIVE | HAS_ENDED)]
            ones[1].close()
            for other in others:
                assert other is not None
                other.close()
    finally:
        poll.close()
        poll.close()


def test_what_makes_room_rings_who_waits_for_room(socket_path: str) -> None:
    with (
        Server(socket_path, "1M", channels="512K").start(),
        ivshmem.connect(socket_path, timeout=10) as a,
        ivshmem.connect(socket_path, timeout=10) as b,
        channel.open(a) as own,
        channel.open(b) as others,
    ):
        room = own.create_bytes("c", buffer=64, connections=1)
        with room.listen() as listener, others.open("c", "bytes").connect() as far:  # type: ignore[attr-defined]
            near = listener.accept(0)
            assert near is not None
            poll = StreamPoll(own._member)
            with near:
                sleeper = poll.add(near, None)
                near.send(bytes(64))
                assert sleeper.sleep(MAY_RECEIVE) == 0
                a.wait(0, timeout=0)
                assert len(far.recv(32)) == 32
                assert not a.wait(0, timeout=0)
                far.send(b"x")
                assert a.wait(0, timeout=10)
                assert poll.ready() == [(None, MAY_RECEIVE)]
                near.send(bytes(32))
                assert sleeper.sleep(MAY_SEND) == 0
                a.wait(0, timeout=0)
                assert len(far.recv(1)) == 1
                assert a.wait(0, timeout=10)
                assert poll.ready() == [(None, MAY_SEND)]
                sleeper.close()
            poll.close()


@pytest.mark.parametrize("buffer", [1 << 12, 1 << 16, 1 << 19])
def test_one_call_fills_or_empties_the_ring(channels: Channels, buffer: int) -> None:
    """Although it copies in parts, of which the other end learns one after the other."""
    data = os.urandom(buffer + 1000)
    room = channels.create_bytes("c", buffer=buffer, connections=1)
    with room.listen() as listener, room.connect() as one:
        other = listener.accept(0)
        assert other is not None
        with other:
            one.setblocking(False)
            other.setblocking(False)
            for shift in (0, buffer // 2 - 1):  # in the second round the ring wraps
                assert one.send(data[:shift]) == shift
                assert not shift or other.recv(buffer) == data[:shift]
                assert one.send(data) == buffer
                with pytest.raises(BlockingIOError):
                    one.send(data)
                into = bytearray(2 * buffer)
                assert other.recv_into(into) == buffer
                assert into[:buffer] == data[:buffer]
                with pytest.raises(BlockingIOError):
                    other.recv_into(into)
            assert one.send(data[:300]) == 300
            one.close()
            assert other.recv(buffer) == data[:300]  # what follows is for the next call
            assert other.recv(buffer) == b""
