"""FdArray, Epoll and Mapping: every descriptor is closed once, use after close is an error.

Also: events carry tokens, deadlines are kept while signals come, Ctrl-C comes through, memory in
use cannot be unmapped.
"""

from __future__ import annotations

import math
import os
import resource
import select
import socket
import time

import pytest
from support.leaks import open_fds, shared_mappings
from support.limits import free_fds
from support.peer import Eventfds, memory_fd
from support.waiting import PATIENCE, interrupt_when_asleep, signals

from ivshmem import ClosedError
from ivshmem.native.descriptors import EPOLLHUP, EPOLLIN, EPOLLOUT, Epoll, FdArray, Timer
from ivshmem.native.mapping import Mapping

# -- FdArray --------------------------------------------------------------------------------------


def test_eventfds() -> None:
    array = FdArray.eventfds(3)
    fds = [array[i] for i in range(3)]
    assert len(array) == 3
    assert len(set(fds)) == 3
    for fd in fds:
        assert open_fds()[fd] == "anon_inode:[eventfd]"
        assert not os.get_inheritable(fd)
        assert not os.get_blocking(fd)
        os.eventfd_write(fd, 5)
        assert os.eventfd_read(fd) == 5, "not in counter mode"
        with pytest.raises(BlockingIOError):
            os.eventfd_read(fd)
    array.close()
    assert not set(fds) & set(open_fds())


def test_iteration() -> None:
    array = FdArray.eventfds(3)
    fds = [array[0], array[1], array[2]]
    assert list(array) == fds
    assert fds[1] in array
    assert list(reversed(array)) == fds[::-1]
    numbers = iter(array)
    assert next(numbers) == fds[0]
    array.close()
    assert list(numbers) == fds[1:], "numbers that were there, whatever became of them"
    assert list(array) == []


def test_no_eventfds() -> None:
    array = FdArray.eventfds(0)
    assert len(array) == 0
    array.close()


@pytest.mark.parametrize("free", [0, 1, 5])
def test_eventfds_all_or_none(free: int) -> None:
    before = open_fds()
    with free_fds(free):
        with pytest.raises(OSError, match="Too many open files"):
            FdArray.eventfds(6)
    assert open_fds() == before


def test_array_takes_and_closes_once() -> None:
    array = FdArray()
    fds = [os.eventfd(0) for _ in range(20)]
    for fd in fds:
        array.take(fd)
    assert [array[i] for i in range(20)] == fds
    array.close()
    assert len(array) == 0
    with Eventfds() as others:
        again = others.make(20)  # the same numbers, most likely
        array.close()
        array.close()
        del array
        assert set(again) <= set(open_fds()), "closed twice"


def test_array_forgotten() -> None:
    array = FdArray.eventfds(2)
    fds = {array[0], array[1]}
    del array
    assert not fds & set(open_fds())


def test_closed_array() -> None:
    array = FdArray.eventfds(1)
    array.close()
    with pytest.raises(IndexError):
        array[0]
    fd = os.eventfd(0)
    with pytest.raises(ClosedError):
        array.take(fd)
    assert fd not in open_fds(), "taken means owned, also when it fails"


@pytest.mark.parametrize("index", [-1, 2, 1 << 40])
def test_no_such_descriptor(index: int) -> None:
    array = FdArray.eventfds(2)
    with pytest.raises(IndexError, match="of 2"):
        array[index]
    array.close()


# -- Epoll ----------------------------------------------------------------------------------------


def test_tokens() -> None:
    epoll = Epoll()
    with Eventfds() as fds:
        a, b = fds.make(2)
        epoll.add(a, (1 << 64) - 1, EPOLLIN)
        epoll.add(b, 7, EPOLLIN | EPOLLOUT)
        os.eventfd_write(a, 1)
        assert sorted(epoll.wait(0)) == [(7, EPOLLOUT), ((1 << 64) - 1, EPOLLIN)]
        epoll.modify(b, 8, EPOLLIN)
        assert epoll.wait(0) == [((1 << 64) - 1, EPOLLIN)]
        epoll.remove(a)
        assert epoll.wait(0) == []
        with pytest.raises(FileExistsError):
            epoll.add(b, 9, EPOLLIN)
        with pytest.raises(FileNotFoundError):
            epoll.remove(a)
        with pytest.raises(OSError, match="Bad file descriptor"):
            epoll.add(-1, 9, EPOLLIN)
    epoll.close()


def test_hang_up_is_always_reported() -> None:
    epoll = Epoll()
    ours, theirs = socket.socketpair()
    with ours:
        epoll.add(ours.fileno(), 3, 0)
        assert epoll.wait(0) == []
        theirs.close()
        ((token, events),) = epoll.wait(PATIENCE)
        assert token == 3
        assert events & EPOLLHUP
    epoll.close()


def test_more_events_than_one_call_takes() -> None:
    epoll = Epoll()
    with Eventfds() as fds:
        for token, fd in enumerate(fds.make(150)):
            epoll.add(fd, token, EPOLLOUT)
        seen: set[int] = set()
        while len(seen) < 150:
            events = epoll.wait(PATIENCE)
            assert events, "some are never reported"
            seen.update(token for token, _ in events)
    epoll.close()


@pytest.mark.parametrize("timeout", [0, 0.0, -1, -0.5, -math.inf, 1e-9])
def test_no_time(timeout: float) -> None:
    epoll = Epoll()
    assert epoll.wait(timeout) == []
    epoll.close()


@pytest.mark.parametrize("timeout", [None, 1e300, math.inf])
def test_all_the_time(timeout: float | None) -> None:
    """Long limits do not overflow into none."""
    epoll = Epoll()
    with Eventfds() as fds:
        (fd,) = fds.make()
        epoll.add(fd, 1, EPOLLIN)
        with pytest.raises(KeyboardInterrupt), interrupt_when_asleep():
            epoll.wait(timeout)
        os.eventfd_write(fd, 1)
        assert epoll.wait(timeout) == [(1, EPOLLIN)]
    epoll.close()


def test_not_a_time() -> None:
    epoll = Epoll()
    with pytest.raises(ValueError, match="timeout is not a number"):
        epoll.wait(math.nan)
    with pytest.raises(TypeError):
        epoll.wait("soon")  # type: ignore[arg-type]
    epoll.close()


def test_signals_do_not_change_the_deadline() -> None:
    epoll = Epoll()
    begin = time.monotonic()
    with signals() as handled:
        assert epoll.wait(0.3) == []
    took = time.monotonic() - begin
    assert took >= 0.3
    assert took < PATIENCE
    assert len(handled) > 3, "handlers run while it waits"
    epoll.close()


def test_closed_epoll() -> None:
    epoll = Epoll()
    fd = epoll.fileno()
    assert fd in open_fds()
    assert not os.get_inheritable(fd)
    epoll.close()
    epoll.close()
    assert fd not in open_fds()
    for call in (epoll.fileno, epoll.wait, lambda: epoll.add(0, 0, 0), lambda: epoll.remove(0)):
        with pytest.raises(ClosedError):
            call()


def test_epoll_without_descriptors() -> None:
    with free_fds(0), pytest.raises(OSError, match="Too many open files"):
        Epoll()


# -- Timer ----------------------------------------------------------------------------------------


def test_timer() -> None:
    timer = Timer()
    assert not os.get_inheritable(timer.fileno())
    poll = select.poll()
    poll.register(timer.fileno(), select.POLLIN)
    assert poll.poll(0) == []
    begin = time.monotonic()
    timer.set(0.05)
    assert poll.poll(PATIENCE * 1000)
    assert time.monotonic() - begin >= 0.05
    assert poll.poll(0), "until it is set again"
    timer.set(PATIENCE * 4)
    assert poll.poll(0) == []
    timer.set(1e-9)
    assert poll.poll(PATIENCE * 1000)
    timer.set(0)
    assert poll.poll(0) == []
    fd = timer.fileno()
    timer.close()
    timer.close()
    assert fd not in open_fds()
    for call in (timer.fileno, lambda: timer.set(1)):
        with pytest.raises(ClosedError):
            call()


# -- Mapping --------------------------------------------------------------------------------------

PAGE = resource.getpagesize()


def test_mapping_is_shared() -> None:
    fd = memory_fd(4 * PAGE)
    one, other = Mapping(fd, 4 * PAGE), Mapping(fd, 4 * PAGE, readonly=True)
    os.close(fd)
    assert len(one) == one.size == 4 * PAGE
    assert not one.readonly
    assert other.readonly
    with memoryview(one) as view, memoryview(other) as mirror:
        assert view.nbytes == 4 * PAGE
        assert view.format == "B"
        view[5:8] = b"abc"
        assert bytes(mirror[4:9]) == b"\0abc\0"
        assert mirror.readonly
        with pytest.raises(TypeError):
            mirror[0] = 1
    one.close()
    other.close()


def test_mapping_in_use_cannot_be_closed() -> None:
    fd = memory_fd()
    mapping = Mapping(fd, 4096)
    os.close(fd)
    view = memoryview(mapping)
    second = view[10:20]
    with pytest.raises(BufferError, match="the memory is in use by 1 views: release"):
        mapping.close()
    assert not mapping.closed
    view[0] = 65
    view.release()
    with pytest.raises(BufferError):
        mapping.close()
    second.release()
    mapping.close()
    assert mapping.closed
    mapping.close()


def test_view_keeps_the_memory() -> None:
    """A forgotten mapping is unmapped only when nobody looks at it."""
    fd = memory_fd()
    view = memoryview(Mapping(fd, 4096))
    os.close(fd)
    view[0] = 1
    assert view[0] == 1
    view.release()


def test_closed_mapping() -> None:
    fd = memory_fd()
    before = shared_mappings()
    mapping = Mapping(fd, 4096)
    assert shared_mappings() != before
    assert mapping.address
    mapping.close()
    assert shared_mappings() == before
    assert mapping.address == 0
    for call in (
        lambda: memoryview(mapping),
        lambda: mapping._populate(PAGE),
        lambda: mapping.resident(),
    ):
        with pytest.raises(ClosedError):
            call()
    os.close(fd)


def test_what_cannot_be_mapped() -> None:
    fd = memory_fd()
    for size in (0, -1):
        with pytest.raises(ValueError, match=f"cannot map {size} bytes"):
            Mapping(fd, size)
    with pytest.raises(OSError, match="Bad file descriptor"):
        Mapping(-1, 4096)
    os.close(fd)
    with open("/proc/self/exe", "rb") as program:
        with pytest.raises(PermissionError):
            Mapping(program.fileno(), 4096)
        Mapping(program.fileno(), 4096, readonly=True).close()
    reader, writer = os.pipe()
    with pytest.raises(OSError, match="No such device"):
        Mapping(reader, 4096, readonly=True)
    os.close(reader)
    os.close(writer)


def test_populate_and_resident() -> None:
    fd = memory_fd(64 * PAGE)
    mapping = Mapping(fd, 64 * PAGE)
    assert mapping.resident() == 0
    with memoryview(mapping) as view:
        view[3 * PAGE + 5] = 9
    assert mapping.resident() == PAGE
    assert mapping.resident(3 * PAGE, PAGE) == PAGE
    assert mapping.resident(0, 3 * PAGE) == mapping.resident(4 * PAGE) == 0
    assert mapping.resident(64 * PAGE) == mapping.resident(5, 0) == 0
    for offset, size in ((-1, None), (0, 64 * PAGE + 1), (65 * PAGE, None), (5, -1)):
        with pytest.raises(ValueError, match="bytes at"):
            mapping.resident(offset, size)
    mapping._populate(PAGE)
    assert mapping.resident() == 64 * PAGE
    with memoryview(mapping) as view:
        assert view[3 * PAGE + 5] == 9, "contents stay as they are"
        assert bytes(view).count(0) == 64 * PAGE - 1
    mapping.close()
    os.close(fd)


def test_populate_for_reading() -> None:
    fd = memory_fd(8 * PAGE)
    mapping = Mapping(fd, 8 * PAGE, readonly=True)
    mapping._populate(PAGE)
    assert mapping.resident() == 8 * PAGE
    mapping.close()
    os.close(fd)


def test_populate_beyond_the_end_is_an_error() -> None:
    fd = memory_fd(PAGE)
    mapping = Mapping(fd, 2 * PAGE)
    with pytest.raises(OSError, match="Bad address"):
        mapping._populate(PAGE)
    mapping.close()
    os.close(fd)


def test_wait_leaves_events_to_others() -> None:
    """The epoll object is an ordinary descriptor: it can be watched, as event loops do."""
    epoll = Epoll()
    with Eventfds() as fds:
        (fd,) = fds.make()
        epoll.add(fd, 1, EPOLLIN)
        assert select.select([epoll.fileno()], [], [], 0)[0] == []
        os.eventfd_write(fd, 1)
        assert select.select([epoll.fileno()], [], [], 0)[0] == [epoll.fileno()]
    epoll.close()
