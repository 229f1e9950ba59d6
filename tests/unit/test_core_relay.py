"""Sleeping in a plain read of eventfds that nobody else has, and what ends that: Relay, close()."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import NoReturn

import pytest
from support.leaks import open_fds
from support.waiting import PATIENCE, Background, in_child, sleeps_in_read, until

from ivshmem import ClosedError
from ivshmem._core import Doorbells
from ivshmem.native.descriptors import FdArray, Relay

VECTORS = 3


class Gone(Exception):
    """What this listener's news are."""


class Listener(Doorbells):
    """Doorbells with eventfds of its own, as a guest's device by vfio has them."""

    def __init__(self) -> None:
        self.fds = [os.eventfd(0, os.EFD_CLOEXEC) for _ in range(VECTORS)]
        for fd in self.fds:
            self._add_vector(fd)
        self.removal = FdArray.eventfds(1)
        self._watch_news(self.removal[0], urgent=True)
        self.relay = Relay(self.removal[0], self.fds)
        self._listen_alone(self.relay)

    def _read_news(self) -> NoReturn:
        raise Gone

    def end(self) -> None:
        self.close()
        self.relay.close()
        self.removal.close()


@pytest.fixture
def listener() -> Iterator[Listener]:
    made = Listener()
    yield made
    made.end()


def sleepers(listener: Listener, *vectors: int) -> list[Background]:
    """Threads that wait without limit, once they sleep."""

    def waiter(vector: int) -> Callable[[], object]:
        return lambda: listener.wait(vector)

    started = [Background(waiter(vector)) for vector in vectors]
    for thread in started:
        thread.wait_until_reading()
    return started


def test_rings_that_are_there_and_that_come(listener: Listener) -> None:
    os.eventfd_write(listener.fds[1], 5)
    assert listener.wait(1) == 5
    (thread,) = sleepers(listener, 2)
    os.eventfd_write(listener.fds[2], 1)
    assert thread.result() == 1
    assert listener.wait(2, 0) is None


def test_what_is_urgent_ends_every_wait(listener: Listener) -> None:
    threads = sleepers(listener, 0, 0, 0, 1, 2)
    listener.removal.signal(0)
    for thread in threads:
        with pytest.raises(Gone):
            thread.result()
    for timeout in (None, 0, 0.001, PATIENCE):
        for vector in (0, 1, 2, None):
            with pytest.raises(Gone):
                listener.wait(vector, timeout)


def test_close_ends_every_wait(listener: Listener) -> None:
    threads = sleepers(listener, 0, 0, 0, 1, 2)
    listener.close()
    for thread in threads:
        with pytest.raises(ClosedError):
            thread.result()


def test_ctrl_c(listener: Listener) -> None:
    me, target = threading.get_native_id(), threading.get_ident()

    def send() -> None:
        until(lambda: sleeps_in_read(me))
        signal.pthread_kill(target, signal.SIGINT)

    thread = threading.Thread(target=send)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        listener.wait(0)
    thread.join()
    os.eventfd_write(listener.fds[0], 2)
    assert listener.wait(0) == 2


def test_any_vector(listener: Listener) -> None:
    os.eventfd_write(listener.fds[1], 1)
    assert listener.wait() == (1, 1)
    assert listener.wait(timeout=0) is None


def test_a_forked_child_closes_its_copy(listener: Listener) -> None:
    in_child(listener.end)
    os.eventfd_write(listener.fds[0], 1)
    assert listener.wait(0) == 1
    listener.removal.signal(0)
    with pytest.raises(Gone):
        listener.wait(0)


def test_a_source_that_is_readable_already() -> None:
    source, target = FdArray.eventfds(1), FdArray.eventfds(2)
    source.signal(0)
    relay = Relay(source[0], [target[0], target[1]])
    until(lambda: target.drain(0) == 1)
    until(lambda: target.drain(1) == 1)
    relay.close()
    relay.close()
    source.close()
    target.close()


def test_many_targets() -> None:
    source, targets = FdArray.eventfds(1), FdArray.eventfds(300)
    relay = Relay(source[0], list(targets))
    source.signal(0)
    for i in range(300):
        until(partial(targets.drain, i))
    relay.close()
    source.close()
    targets.close()


def test_no_such_descriptor() -> None:
    before = open_fds()
    source = FdArray.eventfds(1)
    with pytest.raises(OSError, match="Bad file descriptor"):
        Relay(source[0], [source[0], 10**6])
    source.close()
    assert open_fds() == before
