"""Doorbells without a server: ringing and waiting, and everything that can disturb them.

Deadlines, signals, Ctrl-C, close by another thread, fork, full counters, hostile peers that change
the flags of a shared eventfd.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.leaks import open_fds
from support.waiting import (
    PATIENCE,
    Background,
    in_child,
    interrupt_when_asleep,
    once_asleep,
    signals,
    sleeps_in_write,
    until,
)

from ivshmem import ClosedError, Interrupt, NoSuchPeer, NoSuchVector, ProtocolError
from ivshmem._core import Doorbells
from ivshmem.native.bell import Doorbell
from ivshmem.native.descriptors import FdArray

ME, OTHER, ABSENT = 3, 9, 77


class Bells(Doorbells):
    """An endpoint with two vectors, and a peer with three; news come over a pipe."""

    def __init__(self) -> None:
        self.news = 0
        self.reader, self.writer = os.pipe()
        self.listened = FdArray.eventfds(2)  # our vectors, as their peers have them
        self.theirs = FdArray.eventfds(3)
        for i in range(2):
            self._add_vector(os.dup(self.listened[i]))
        self.first_bell = os.dup(self.theirs[0])
        self._add_bell(OTHER, self.first_bell)
        for i in (1, 2):
            self._add_bell(OTHER, os.dup(self.theirs[i]))
        self._ring_self(ME)
        self._watch_news(self.reader)

    def _read_news(self) -> None:
        assert os.read(self.reader, 1) == b"!"
        self.news += 1

    def _look_for(self, peer: int, vector: int) -> None:
        bells = self._bells(peer)
        if bells is None:
            raise NoSuchPeer(f"peer {peer}")
        raise NoSuchVector(f"vector {vector} of {bells}")

    def rung(self, vector: int) -> int:
        """How often the peer's vector was rung."""
        try:
            return os.eventfd_read(self.theirs[vector])
        except BlockingIOError:
            return 0

    def end(self) -> None:
        self.close()
        self.listened.close()
        self.theirs.close()
        os.close(self.reader)
        os.close(self.writer)


@pytest.fixture
def bells() -> Iterator[Bells]:
    made = Bells()
    yield made
    made.end()


# Each way of waiting, and what it returns for one ring of vector 1.
WAITS: list[tuple[Callable[[Bells, float | None], object], object, object]] = [
    (lambda b, t: b.wait(1, t), 1, None),
    (lambda b, t: b.wait(timeout=t), Interrupt(1, 1), None),
    (lambda b, t: b._wait_event(t), Interrupt(1, 1), None),
]
each_wait = pytest.mark.parametrize(
    ("wait", "one", "nothing"), WAITS, ids=["one vector", "any vector", "event"]
)
Wait = Callable[[Bells, float | None], object]


# -- ringing --------------------------------------------------------------------------------------


def test_ring(bells: Bells) -> None:
    bells.ring(OTHER)
    bells.ring(OTHER, 2)
    bells.ring(OTHER, vector=2)
    assert [bells.rung(v) for v in range(3)] == [1, 0, 2]


def test_ring_oneself(bells: Bells) -> None:
    bells.ring(ME, 1)
    assert bells.wait(0, 0) is None
    assert bells.wait(1, 0) == 1
    assert bells.vectors == 2


def test_nobody_to_ring(bells: Bells) -> None:
    with pytest.raises(NoSuchPeer):
        bells.ring(ABSENT)
    for vector in (-1, 3, 1 << 40):
        with pytest.raises(NoSuchVector):
            bells.ring(OTHER, vector)
    with pytest.raises(NoSuchVector):
        bells.ring(ME, 2)
    unhashable: Any = []
    with pytest.raises(TypeError):
        bells.ring(unhashable)
    with pytest.raises(TypeError):
        bells.ring(OTHER, "x")  # type: ignore[arg-type]


def test_dropped_peer(bells: Bells) -> None:
    count = len(open_fds())
    bells._drop_peer(OTHER)
    bells._drop_peer(OTHER)
    assert len(open_fds()) == count - 3
    with pytest.raises(NoSuchPeer):
        bells.ring(OTHER)


def test_missing_may_say_try_again(bells: Bells) -> None:
    """The hook brings the peer in, and the ring goes through."""
    asked: list[tuple[int, int]] = []

    class Late(Bells):
        def _look_for(self, peer: int, vector: int) -> None:
            asked.append((peer, vector))
            self._add_bell(peer, os.dup(self.theirs[0]))

    late = Late()
    late.ring(ABSENT)
    assert asked == [(ABSENT, 0)]
    assert late.rung(0) == 1
    late.end()


def test_full_counter_is_success(bells: Bells) -> None:
    os.eventfd_write(bells.theirs[0], (1 << 64) - 2)
    bells.ring(OTHER)
    bells.ring(OTHER)
    assert bells.rung(0) == (1 << 64) - 2


def test_full_counter_of_a_hostile_peer_holds_only_that_call(bells: Bells) -> None:
    """It cleared O_NONBLOCK: the ring may last, but this interpreter and Ctrl-C go on."""
    fd = bells.theirs[0]
    os.eventfd_write(fd, (1 << 64) - 2)
    os.set_blocking(fd, True)
    ringing = Background(lambda: bells.ring(OTHER))
    ringing.wait_until_writing()
    os.eventfd_read(fd)
    ringing.result()
    os.set_blocking(fd, False)
    assert bells.rung(0) == 1


@pytest.mark.parametrize("end", ["drop", "close"])
def test_a_doorbell_in_use_is_closed_by_its_last_user(bells: Bells, end: str) -> None:
    """Else the ring that waits would go to whatever file gets the number next."""
    bell = bells.first_bell
    fd = bells.theirs[0]
    os.eventfd_write(fd, (1 << 64) - 2)
    os.set_blocking(fd, True)
    ringing = Background(lambda: bells.ring(OTHER))
    ringing.wait_until_writing()
    bells._drop_peer(OTHER) if end == "drop" else bells.close()
    assert bell in open_fds()
    os.eventfd_read(fd)
    ringing.result()
    assert bell not in open_fds()


def test_full_counter_of_a_hostile_peer_and_ctrl_c(bells: Bells) -> None:
    fd = bells.theirs[0]
    os.eventfd_write(fd, (1 << 64) - 2)
    os.set_blocking(fd, True)

    class Enough(Exception):
        pass

    def handler(*_: object) -> None:
        raise Enough

    before = signal.signal(signal.SIGUSR1, handler)
    main, me = threading.get_ident(), threading.get_native_id()

    def interrupt() -> None:
        until(lambda: sleeps_in_write(me), "a ring that waits")
        signal.pthread_kill(main, signal.SIGUSR1)

    waker = Background(interrupt)
    try:
        with pytest.raises(Enough):
            bells.ring(OTHER)
    finally:
        os.eventfd_read(fd)
        waker.result()
        signal.signal(signal.SIGUSR1, before)


# -- waiting --------------------------------------------------------------------------------------


def test_counts_and_coalescing(bells: Bells) -> None:
    for _ in range(5):
        bells.ring(ME, 0)
    bells.ring(ME, 1)
    assert bells.wait(0, 0) == 5
    assert bells.wait(0, 0) is None
    assert bells.wait(timeout=0) == Interrupt(1, 1)
    assert bells.wait(timeout=0) is None


@each_wait
@pytest.mark.parametrize("timeout", [0, -1, -math.inf, 1e-6, 0.01])
def test_time_is_over(
    bells: Bells, wait: Wait, one: object, nothing: object, timeout: float
) -> None:
    assert wait(bells, timeout) == nothing
    bells.ring(ME, 1)
    assert wait(bells, timeout) == one


@each_wait
def test_no_limit(bells: Bells, wait: Wait, one: object, nothing: object) -> None:
    waiting = Background(lambda: wait(bells, None))
    waiting.wait_until_asleep()
    bells.ring(ME, 1)
    assert waiting.result() == one


@each_wait
def test_bad_limits(bells: Bells, wait: Wait, one: object, nothing: object) -> None:
    with pytest.raises(ValueError, match="timeout is not a number"):
        wait(bells, math.nan)
    with pytest.raises(TypeError):
        wait(bells, "1")  # type: ignore[arg-type]


def test_no_such_vector(bells: Bells) -> None:
    for vector in (-1, 2, 1 << 40):
        with pytest.raises(NoSuchVector, match=f"vector {vector}: this endpoint has 2 vectors"):
            bells.wait(vector, 0)


def test_waiting_for_one_leaves_the_others(bells: Bells) -> None:
    bells.ring(ME, 0)
    assert bells.wait(1, 0.02) is None
    assert bells.wait(0, 0) == 1


@each_wait
def test_signals_do_not_change_the_deadline(
    bells: Bells, wait: Wait, one: object, nothing: object
) -> None:
    begin = time.monotonic()
    with signals() as handled:
        assert wait(bells, 0.25) == nothing
    took = time.monotonic() - begin
    assert 0.25 <= took < PATIENCE
    assert len(handled) > 3


@each_wait
@pytest.mark.parametrize("timeout", [None, PATIENCE * 4])
def test_ctrl_c(
    bells: Bells, wait: Wait, one: object, nothing: object, timeout: float | None
) -> None:
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt), interrupt_when_asleep():
        wait(bells, timeout)
    assert time.monotonic() - begin < PATIENCE
    bells.ring(ME, 1)
    assert wait(bells, 0) == one


@each_wait
def test_cleared_nonblock_flag_hangs_nobody(
    bells: Bells, wait: Wait, one: object, nothing: object
) -> None:
    for i in range(2):
        fcntl.fcntl(bells.listened[i], fcntl.F_SETFL, 0)
    # Should it hang after all, this turns the hang into a failure.
    rescue = threading.Timer(PATIENCE, lambda: bells.ring(ME, 1))
    rescue.start()
    try:
        for timeout in (0, 0.02, 0.02):
            assert wait(bells, timeout) == nothing
        bells.ring(ME, 1)
        assert wait(bells, None) == one
    finally:
        rescue.cancel()
        rescue.join()


@each_wait
def test_interrupt_stolen_by_a_peer(bells: Bells, wait: Wait, one: object, nothing: object) -> None:
    """Another process that shares the eventfd may read it: the waiter goes on waiting."""
    thief_done = threading.Event()

    def steal() -> None:
        while not thief_done.is_set():
            bells.ring(ME, 1)
            try:
                os.eventfd_read(bells.listened[1])
            except BlockingIOError:
                thief_done.set()  # the waiter was quicker: it has one

    thief = Background(steal)
    assert wait(bells, PATIENCE) == one
    thief_done.set()
    thief.result()


def test_a_vector_that_is_no_eventfd(bells: Bells) -> None:
    """Always readable, never a count: it would make each wait an endless loop."""
    reader, writer = os.pipe()
    os.close(writer)
    with pytest.raises(
        ProtocolError, match="what came for vector 2 of this endpoint is not an eventfd"
    ):
        bells._add_vector(reader)


@each_wait
def test_a_thief_does_not_defeat_the_deadline(
    bells: Bells, wait: Wait, one: object, nothing: object
) -> None:
    """A peer rings and takes the count itself, as fast as it can."""
    stop = threading.Event()

    def steal() -> None:
        while not stop.is_set():
            os.eventfd_write(bells.listened[1], 1)
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(bells.listened[1])

    thief = Background(steal)
    begin = time.monotonic()
    results = [wait(bells, 0.05) for _ in range(3)]
    stop.set()
    thief.result()
    assert time.monotonic() - begin < PATIENCE
    assert {repr(result) for result in results} <= {repr(one), repr(nothing)}


def test_fileno_in_another_loop(bells: Bells) -> None:
    poll = select.poll()
    poll.register(bells.fileno(), select.POLLIN)
    assert poll.poll(0) == []
    bells.ring(ME, 0)
    assert poll.poll(0)
    assert bells.wait(timeout=0) == Interrupt(0, 1)
    assert poll.poll(0) == []
    os.write(bells.writer, b"!")
    assert poll.poll(0)
    assert bells.wait(timeout=0) is None
    assert bells.news == 1


def test_fileno_while_something_is_queued(bells: Bells) -> None:
    """What the subclass has taken in, and nobody asked for, is to be seen by event loops."""
    poll = select.poll()
    poll.register(bells.fileno(), select.POLLIN)
    bells._set_queued(False)
    assert poll.poll(0) == []
    bells._set_queued(True)
    bells._set_queued(True)
    assert poll.poll(0)
    assert bells.wait(timeout=0) is None
    bells._set_queued(False)
    assert poll.poll(0) == []


def test_news_end_only_the_wait_for_events(bells: Bells) -> None:
    os.write(bells.writer, b"!")
    assert bells._wait_event(PATIENCE) is True
    assert bells.news == 1
    os.write(bells.writer, b"!")
    bells_waiting = Background(lambda: bells.wait(timeout=PATIENCE))
    until(lambda: bells.news == 2)
    bells.ring(ME, 0)
    assert bells_waiting.result() == Interrupt(0, 1)


def test_an_error_in_news_comes_out(bells: Bells) -> None:
    class Broken(Bells):
        def _read_news(self) -> None:
            raise RuntimeError("news")

    broken = Broken()
    os.write(broken.writer, b"!")
    with pytest.raises(RuntimeError, match="news"):
        broken.wait(timeout=PATIENCE)
    broken.end()


# -- the end --------------------------------------------------------------------------------------


def test_closed() -> None:
    count = len(open_fds())
    bells = Bells()
    bells.close()
    bells.close()
    assert bells.closed
    assert len(open_fds()) == count + 2 + 3 + 2  # what the test holds: eventfds and a pipe
    calls: list[Callable[[], object]] = [
        lambda: bells.ring(OTHER),
        lambda: bells.ring(ABSENT),
        lambda: bells.wait(0, 0),
        lambda: bells.wait(timeout=0),
        lambda: bells._wait_event(0),
        bells.fileno,
    ]
    for call in calls:
        with pytest.raises(ClosedError):
            call()
    bells.end()


@each_wait
def test_close_sends_waiters_home(bells: Bells, wait: Wait, one: object, nothing: object) -> None:
    waiters = [Background(lambda: wait(bells, None)) for _ in range(3)]
    for waiter in waiters:
        waiter.wait_until_asleep()
    bells.close()
    for waiter in waiters:
        with pytest.raises(ClosedError):
            waiter.result()


def test_close_keeps_descriptors_for_those_who_wait() -> None:
    """The number of a descriptor in use must not go to somebody else's file."""
    bells = Bells()
    waiter = Background(lambda: bells.wait(0, None))
    waiter.wait_until_asleep()
    before = set(open_fds())
    bells.close()
    with pytest.raises(ClosedError):
        waiter.result()
    bells.end()
    assert set(open_fds()) < before


def test_close_while_others_ring_and_wait() -> None:
    """Many threads, closed in the middle: ClosedError or NoSuchPeer, never another file's data."""
    for _ in range(20):
        bells = Bells()
        decoys = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
        going = threading.Barrier(4)

        def work(call: Callable[[], object], going: threading.Barrier = going) -> None:
            going.wait()
            try:
                while True:
                    call()
            except (ClosedError, NoSuchPeer):
                pass

        calls: list[Callable[[], object]] = [
            lambda b=bells: b.ring(ME, 0),  # type: ignore[misc]
            lambda b=bells: b.ring(OTHER, 1),  # type: ignore[misc]
            lambda b=bells: b.wait(timeout=1),  # type: ignore[misc]
        ]
        threads = [Background(lambda c=call: work(c)) for call in calls]  # type: ignore[misc]
        going.wait()
        bells.close()
        fresh = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(8)]  # the numbers just freed
        for thread in threads:
            thread.result()
        for fd in fresh + decoys:
            with pytest.raises(BlockingIOError):
                os.eventfd_read(fd)
            os.close(fd)
        bells.end()


def test_forked_child_may_close(bells: Bells) -> None:
    """epoll objects are shared across fork: the child must leave the parent's as it is."""
    in_child(bells.close)
    bells.ring(ME, 1)
    assert bells.wait(timeout=0) == Interrupt(1, 1)
    os.write(bells.writer, b"!")
    assert bells.wait(timeout=0) is None
    assert bells.news == 1
    assert not bells.closed


def test_forked_child_may_forget(bells: Bells) -> None:
    def forget() -> None:
        bells._unwatch_news()
        bells.__class__.close(bells)

    in_child(forget)
    os.write(bells.writer, b"!")
    assert bells._wait_event(0) is True
    assert bells.news == 1


def test_forked_child_does_not_wake_the_parents_waiters(bells: Bells) -> None:
    waiter = Background(lambda: bells.wait(1, PATIENCE))
    waiter.wait_until_asleep()
    in_child(bells.close)
    assert waiter.running
    assert not select.select([bells.fileno()], [], [], 0)[0], "the waiter would spin from now on"
    bells.ring(ME, 1)
    assert waiter.result() == 1


def test_forgotten_doorbells_are_closed() -> None:
    before = open_fds()
    bells = Bells()
    bells.listened.close()
    bells.theirs.close()
    os.close(bells.reader)
    os.close(bells.writer)
    del bells
    assert open_fds() == before


# -- plain reads of shared eventfds ---------------------------------------------------------------


def test_nonblock_set_by_a_peer_again_and_again(bells: Bells) -> None:
    """As QEMU does when it joins: a wait without limit sleeps all the same, and wakes up."""
    for fd in (bells.listened[1], bells.listened[1], bells.listened[0]):
        waiting = Background(lambda: bells.wait(1))
        waiting.wait_until_asleep()
        os.set_blocking(fd, False)
        bells.ring(ME, 1)
        assert waiting.result() == 1
    for _ in range(3):
        os.set_blocking(bells.listened[1], False)
        waiting = Background(lambda: bells.wait(1))
        waiting.wait_until_asleep()
        bells.ring(ME, 1)
        assert waiting.result() == 1


def test_close_ends_a_plain_read_that_a_thief_reads_as_well(bells: Bells) -> None:
    """A peer takes what close() adds to the count to end the read: it has to be outrun."""
    assert bells.wait(1, 0) is None
    fd = bells.listened[1]
    stop, ready = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(ready[1], b"!")
        while not select.select([stop[0]], [], [], 0)[0]:
            for _ in range(1000):
                with contextlib.suppress(BlockingIOError):
                    os.set_blocking(fd, False)
                    os.eventfd_read(fd)
        os._exit(0)
    os.read(ready[0], 1)
    try:
        waiters = [Background(lambda: bells.wait(1)) for _ in range(2)]
        for waiter in waiters:
            waiter.wait_until_asleep()
        bells.close()
        for waiter in waiters:
            with pytest.raises(ClosedError):
                waiter.result()
    finally:
        os.write(stop[1], b"!")
        os.waitpid(pid, 0)
        for end in (*stop, *ready):
            os.close(end)


def test_close_by_a_signal_handler_of_the_thread_that_waits(bells: Bells) -> None:
    before = signal.signal(signal.SIGUSR1, lambda *_: bells.close())
    main = threading.get_ident()
    try:
        with (
            pytest.raises(ClosedError),
            once_asleep(lambda: signal.pthread_kill(main, signal.SIGUSR1)),
        ):
            bells.wait(1)
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_close_never_waits_for_a_full_counter(bells: Bells) -> None:
    waiting = Background(lambda: bells.wait(1))
    waiting.wait_until_asleep()
    os.set_blocking(bells.listened[0], True)
    os.eventfd_write(bells.listened[0], (1 << 64) - 2)
    bells.close()
    with pytest.raises(ClosedError):
        waiting.result()


# -- several doorbells ----------------------------------------------------------------------------


def test_ring_all(bells: Bells) -> None:
    assert bells.ring_all() == 1
    assert [bells.rung(v) for v in range(3)] == [1, 0, 0]
    assert bells.ring_all(vectors=(0, 2, 2)) == 3
    assert [bells.rung(v) for v in range(3)] == [1, 0, 2]
    assert bells.ring_all([OTHER, ME], 1) == 2
    assert bells.rung(1) == 1
    assert bells.wait(1, 0) == 1
    assert bells.ring_all([]) == bells.ring_all([OTHER], []) == 0
    bells._drop_peer(OTHER)
    assert bells.ring_all() == 0


def test_ring_all_or_none(bells: Bells) -> None:
    with pytest.raises(NoSuchPeer):
        bells.ring_all([OTHER, ABSENT])
    with pytest.raises(NoSuchVector):
        bells.ring_all([OTHER], range(4))
    assert bells.rung(0) == 0
    bells.close()
    with pytest.raises(ClosedError):
        bells.ring_all()


def test_ring_all_of_many(bells: Bells) -> None:
    peers = FdArray.eventfds(300)
    for i in range(300):
        bells._add_bell(1000 + i, os.dup(peers[i]))
    assert bells.ring_all() == 301
    assert all(peers.drain(i) == 1 for i in range(300))
    peers.close()


def test_ring_all_and_a_full_counter_of_a_hostile_peer(bells: Bells) -> None:
    fd = bells.theirs[1]
    os.eventfd_write(fd, (1 << 64) - 2)
    os.set_blocking(fd, True)
    ringing = Background(lambda: bells.ring_all(vectors=range(3)))
    ringing.wait_until_writing()
    assert os.eventfd_read(fd) == (1 << 64) - 2
    assert ringing.result() == 3
    os.set_blocking(fd, False)
    assert [bells.rung(v) for v in range(3)] == [1, 1, 1]


# -- a doorbell looked up once --------------------------------------------------------------------


def test_doorbell(bells: Bells) -> None:
    bell = bells.doorbell(OTHER, 2)
    assert (bell.peer, bell.vector) == (OTHER, 2)
    assert repr(bell) == f"<ivshmem.Doorbell of peer {OTHER}, vector 2>"
    bell.ring()
    bell.ring()
    assert bells.rung(2) == 2
    own = bells.doorbell(ME)
    own.ring()
    assert bells.wait(0, 0) == 1
    with pytest.raises(NoSuchPeer):
        bells.doorbell(ABSENT)
    with pytest.raises(NoSuchVector):
        bells.doorbell(OTHER, 3)


def test_doorbell_keeps_nothing_open(bells: Bells) -> None:
    bell, own = bells.doorbell(OTHER, 0), bells.doorbell(ME)
    bells._drop_peer(OTHER)
    assert bells.first_bell not in open_fds()
    decoy = FdArray.eventfds(8)
    with pytest.raises(NoSuchPeer, match=f"peer {OTHER} is gone"):
        bell.ring()
    assert not any(decoy.drain(i) for i in range(8))
    decoy.close()
    bells.close()
    for made in (bell, own):
        with pytest.raises(ClosedError):
            made.ring()


def test_doorbell_made_by_nobody() -> None:
    with pytest.raises(TypeError, match="made by"):
        Doorbell().ring()


# -- echo -----------------------------------------------------------------------------------------


def test_echo(bells: Bells) -> None:
    assert bells.echo(OTHER, 1, timeout=0) == 0
    bells.ring(ME, 1)
    bells.ring(ME, 1)
    assert bells.echo(OTHER, 1, timeout=0) == 1
    assert bells.rung(1) == 1
    bells.ring(ME, 0)
    assert bells.echo(OTHER, answer=2, rounds=1) == 1
    assert bells.rung(2) == 1
    assert bells.echo(OTHER, rounds=0) == 0


@pytest.mark.parametrize("spin", [0, 1e-4, "auto"])
def test_echo_and_its_ends(bells: Bells, spin: float) -> None:
    answering = Background(lambda: bells.echo(OTHER, spin=spin))
    for _ in range(1000):
        bells.ring(ME)
        until(lambda: bells.rung(0) == 1)
    answering.wait_until_asleep()
    bells._drop_peer(OTHER)
    bells.ring(ME)
    with pytest.raises(NoSuchPeer):
        answering.result()
    with pytest.raises(NoSuchPeer):
        bells.echo(OTHER)
    waiting = Background(lambda: bells.echo(ME, 1, answer=0, spin=spin))
    waiting.wait_until_asleep()
    bells.close()
    with pytest.raises(ClosedError):
        waiting.result()


def test_echo_of_no_vector(bells: Bells) -> None:
    for wrong in (-1, 2):
        with pytest.raises(NoSuchVector):
            bells.echo(OTHER, wrong, answer=0, timeout=0)
    with pytest.raises(NoSuchVector):
        bells.echo(OTHER, 0, answer=3, timeout=0)


def test_echo_and_signals(bells: Bells) -> None:
    with signals() as handled:
        assert bells.echo(OTHER, timeout=0.1) == 0
    assert handled
    with pytest.raises(KeyboardInterrupt), interrupt_when_asleep():
        bells.echo(OTHER)


def test_echo_to_a_full_counter_of_a_hostile_peer(bells: Bells) -> None:
    """The echo waits with it, and Ctrl-C and this interpreter go on."""
    fd = bells.theirs[0]
    os.eventfd_write(fd, (1 << 64) - 2)
    os.set_blocking(fd, True)
    bells.ring(ME)
    answering = Background(lambda: bells.echo(OTHER, rounds=1))
    answering.wait_until_writing()
    os.eventfd_read(fd)
    assert answering.result() == 1
    os.set_blocking(fd, False)
