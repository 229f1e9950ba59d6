"""Outbox and receive over socket pairs: order, full buffers, cut messages, lost descriptors.

No descriptor is lost or left open, whatever happens.
"""

from __future__ import annotations

import array
import os
import socket
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from support.leaks import open_fds
from support.limits import free_fds
from support.peer import Eventfds, eventfd_id, send_raw

from ivshmem import ClosedError, ProtocolError
from ivshmem.native.descriptors import FdArray
from ivshmem.native.wire import Outbox, receive
from ivshmem.protocol.framing import encode

if TYPE_CHECKING:
    from ivshmem.native.wire import _Chunk

FULL = 278  # messages in a default socket buffer; other kernels may differ, so it is only a floor


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


@pytest.fixture
def events() -> Iterator[Eventfds]:
    with Eventfds() as fds:
        yield fds


def close_all(chunks: list[_Chunk]) -> list[tuple[int, list[int]]]:
    """Values and eventfd-ids; closes the descriptors."""
    found = []
    for data, fds in chunks:
        found.append((struct.unpack("<q", data)[0], [eventfd_id(fd.fileno()) for fd in fds]))
        for fd in fds:
            fd.close()
    return found


Pair = tuple[socket.socket, socket.socket]


# -- there and back -------------------------------------------------------------------------------


def test_there_and_back(pair: Pair) -> None:
    ours, theirs = pair
    fds = FdArray.eventfds(5)
    ids = [eventfd_id(fds[i]) for i in range(5)]
    runs = [(0, None, 0, 1), (-1, fds, 0, 1), (7, fds, 1, 3), (9, None, 0, 2), (3, fds, 4, 1)]
    assert Outbox().send(ours.fileno(), runs) == 8
    chunks, eof = receive(theirs.fileno(), 100)
    assert not eof
    for _, got in chunks:
        assert all(not os.get_inheritable(fd.fileno()) for fd in got)
    assert close_all(chunks) == [
        (0, []),
        (-1, [ids[0]]),
        *[(7, [ids[i]]) for i in (1, 2, 3)],
        (9, []),
        (9, []),
        (3, [ids[4]]),
    ]
    fds.close()


def test_nothing(pair: Pair) -> None:
    ours, theirs = pair
    fds = FdArray.eventfds(1)
    assert Outbox().send(ours.fileno(), []) == 0
    assert Outbox().send(ours.fileno(), [(5, fds, 1, 0), (5, None, 0, 0)]) == 0
    assert receive(theirs.fileno(), 10) == ([], False)
    fds.close()


def test_longer_than_a_batch(pair: Pair) -> None:
    """200 messages are several sendmmsg and recvmmsg calls."""
    ours, theirs = pair
    fds = FdArray.eventfds(200)
    ids = [eventfd_id(fds[i]) for i in range(200)]
    assert Outbox().send(ours.fileno(), [(4, fds, 0, 100), (5, fds, 100, 100)]) == 200
    chunks, _ = receive(theirs.fileno(), 1000)
    assert close_all(chunks) == [(4 + (i >= 100), [ids[i]]) for i in range(200)]
    fds.close()


def test_limit(pair: Pair) -> None:
    ours, theirs = pair
    assert Outbox().send(ours.fileno(), [(4, None, 0, 150)]) == 150
    assert [len(receive(theirs.fileno(), limit)[0]) for limit in (1, 64, 65, 500)] == [
        1,
        64,
        65,
        20,
    ]


def test_runs_out_of_range(pair: Pair) -> None:
    ours, theirs = pair
    fds = FdArray.eventfds(2)
    for first, length in ((0, 3), (2, 1), (-1, 1)):
        with pytest.raises(IndexError, match="of 2"):
            Outbox().send(ours.fileno(), [(4, fds, first, length)])
    fds.close()
    with pytest.raises(IndexError):
        Outbox().send(ours.fileno(), [(4, fds, 0, 1)])
    assert receive(theirs.fileno(), 10) == ([], False)


# -- full buffers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("with_fds", [False, True])
def test_full_buffer(pair: Pair, with_fds: bool) -> None:
    """What did not fit is sent later, from exactly there; nothing is lost, nothing twice."""
    ours, theirs = pair
    fds = FdArray.eventfds(700) if with_fds else None
    ids = [[eventfd_id(fds[i])] if fds is not None else [] for i in range(700)]
    sent = Outbox().send(ours.fileno(), [(4, fds, 0, 700)])
    assert FULL <= sent < 700
    assert Outbox().send(ours.fileno(), [(4, fds, sent, 700 - sent)]) == 0
    got: list[tuple[int, list[int]]] = []
    while len(got) < 700:
        chunks, eof = receive(theirs.fileno(), 50)
        assert not eof
        got += close_all(chunks)
        sent += Outbox().send(ours.fileno(), [(4, fds, sent, 700 - sent)])
    assert got == [(4, ids[i]) for i in range(700)]
    if fds is not None:
        fds.close()


def test_nobody_listens(pair: Pair) -> None:
    ours, theirs = pair
    theirs.close()
    with pytest.raises(BrokenPipeError):  # and no SIGPIPE
        Outbox().send(ours.fileno(), [(4, None, 0, 1)])


def test_blocking_sockets_do_not_block(pair: Pair) -> None:
    ours, theirs = pair
    ours.setblocking(True)
    theirs.setblocking(True)
    assert receive(theirs.fileno(), 10) == ([], False)
    assert Outbox().send(ours.fileno(), [(4, None, 0, 5000)]) < 5000


# -- what a stranger sends ------------------------------------------------------------------------


def test_end_of_stream(pair: Pair) -> None:
    ours, theirs = pair
    send_raw(ours, 5)
    ours.close()
    assert receive(theirs.fileno(), 10) == ([(encode(5), ())], True)
    assert receive(theirs.fileno(), 10) == ([], True)


def test_end_of_stream_at_the_limit(pair: Pair) -> None:
    ours, theirs = pair
    send_raw(ours, 5)
    ours.close()
    assert receive(theirs.fileno(), 1) == ([(encode(5), ())], False)
    assert receive(theirs.fileno(), 1) == ([], True)


def test_reset(pair: Pair) -> None:
    """The other side goes away with unread data: ECONNRESET, after what it had sent."""
    ours, theirs = pair
    theirs.send(b"unread")
    send_raw(ours, 5)
    ours.close()
    results = []
    with pytest.raises(ConnectionResetError):
        results += [receive(theirs.fileno(), 10) for _ in range(3)]
    assert results == []


def test_partial_messages_keep_their_descriptors(pair: Pair, events: Eventfds) -> None:
    ours, theirs = pair
    a, b = events.make(2)
    data = encode(5)
    socket.send_fds(ours, [data[:3]], [a])
    chunks, _ = receive(theirs.fileno(), 10)
    assert [c[0] for c in chunks] == [data[:3]]
    (fd,) = chunks[0][1]
    assert eventfd_id(fd.fileno()) == eventfd_id(a)
    assert not fd.taken
    fd.close()
    assert fd.taken
    with pytest.raises(ClosedError):
        fd.fileno()
    socket.send_fds(ours, [data[3:] + encode(6)], [b])
    chunks, _ = receive(theirs.fileno(), 10)
    assert b"".join(c[0] for c in chunks) == data[3:] + encode(6)
    got = [fd for _, fds in chunks for fd in fds]
    assert [eventfd_id(fd.fileno()) for fd in got] == [eventfd_id(b)]
    del got, chunks  # what has no owner is closed


def test_an_owner_takes_it_once(pair: Pair, events: Eventfds) -> None:
    ours, theirs = pair
    (a,) = events.make(1)
    send_raw(ours, 5, a)
    into: list[_Chunk] = []
    chunks, _ = receive(theirs.fileno(), 10, into)
    assert chunks is into
    ((_, (fd,)),) = into
    number = fd.fileno()
    owner = FdArray()
    owner.take(fd)
    assert fd.taken
    assert owner[0] == number
    with pytest.raises(ClosedError):
        owner.take(fd)
    fd.close()  # nothing is done: it has an owner
    assert eventfd_id(owner[0]) == eventfd_id(a)
    owner.close()


def test_a_read_never_runs_past_a_descriptor(pair: Pair, events: Eventfds) -> None:
    """The kernel joins bytes without descriptors to those that follow."""
    ours, theirs = pair
    a, b = events.make(2)
    ours.send(encode(1)[:5])
    socket.send_fds(ours, [encode(1)[5:]], [a])
    socket.send_fds(ours, [encode(2)], [b])
    ours.send(encode(3))
    chunks, _ = receive(theirs.fileno(), 10)
    assert b"".join(c[0] for c in chunks) == encode(1) + encode(2) + encode(3)
    ends = 0
    where = {}
    for data, fds in chunks:
        ends += len(data)
        for fd in fds:
            where[eventfd_id(fd.fileno())] = (ends - 1) // 8
            fd.close()
    assert where == {eventfd_id(a): 0, eventfd_id(b): 1}


def test_two_descriptors_on_one_message(pair: Pair, events: Eventfds) -> None:
    """There is room for a second one on 64-bit machines: it is handed on, not leaked."""
    ours, theirs = pair
    a, b = events.make(2)
    send_raw(ours, 5, a, b)
    chunks, _ = receive(theirs.fileno(), 10)
    assert close_all(chunks) == [(5, [eventfd_id(a), eventfd_id(b)])]


@pytest.mark.parametrize("count", [3, 10, 253])
def test_more_descriptors_than_any_server_sends(pair: Pair, events: Eventfds, count: int) -> None:
    ours, theirs = pair
    fds = events.make(count)
    before = open_fds()
    send_raw(ours, 4)
    send_raw(ours, 5, fds[0])
    send_raw(ours, 6, *fds)
    with pytest.raises(ProtocolError, match="descriptor"):
        receive(theirs.fileno(), 10)
    assert open_fds() == before


def test_credentials_are_no_descriptors(pair: Pair) -> None:
    """Other control messages are passed over."""
    ours, theirs = pair
    credentials = struct.pack("iII", os.getpid(), os.getuid(), os.getgid())
    ours.sendmsg([encode(5)], [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, credentials)])
    assert receive(theirs.fileno(), 10) == ([(encode(5), ())], False)


# -- too many open files --------------------------------------------------------------------------


@pytest.mark.parametrize("free", [0, 1, 3])
def test_out_of_descriptors(pair: Pair, events: Eventfds, free: int) -> None:
    """The kernel drops what has no room, and says so: the connection cannot be trusted any more."""
    ours, theirs = pair
    for fd in events.make(4):
        send_raw(ours, 5, fd)
    before = open_fds()
    with free_fds(free), pytest.raises(ProtocolError) as caught:
        receive(theirs.fileno(), 100)
    assert "too many open files (raise its limit, for instance with `ulimit -n`)" in str(
        caught.value
    )
    assert open_fds() == before


def test_exactly_enough_descriptors(pair: Pair, events: Eventfds) -> None:
    ours, theirs = pair
    for fd in events.make(4):
        send_raw(ours, 5, fd)
    with free_fds(4):
        chunks, _ = receive(theirs.fileno(), 100)
    assert len(close_all(chunks)) == 4


# -- wrong use ------------------------------------------------------------------------------------


def test_no_socket() -> None:
    with open("/dev/null") as file:
        for call in (
            lambda: receive(file.fileno(), 1),
            lambda: Outbox().send(file.fileno(), [(1, None, 0, 1)]),
        ):
            with pytest.raises(OSError, match="non-socket"):
                call()
    for call in (lambda: receive(-1, 1), lambda: Outbox().send(-1, [(1, None, 0, 1)])):
        with pytest.raises(OSError, match="Bad file descriptor"):
            call()


@pytest.mark.parametrize("run", [(1,), ("x", None, 0, 1), (1, [3], 0, 1), (1 << 63, None, 0, 1)])
def test_no_run(pair: Pair, run: tuple[object, ...]) -> None:
    ours, theirs = pair
    with pytest.raises((TypeError, IndexError, OverflowError)):
        Outbox().send(ours.fileno(), [run])
    assert receive(theirs.fileno(), 10) == ([], False)


def test_arrays_of_the_standard_library_are_no_arrays_of_ours(pair: Pair) -> None:
    with pytest.raises(TypeError):
        Outbox().send(pair[0].fileno(), [(1, array.array("i", [0]), 0, 1)])
