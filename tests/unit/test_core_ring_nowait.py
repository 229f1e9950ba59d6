"""Ringing that waits for nobody, and what is taken for a doorbell at all.

A hostile peer shares its eventfds: it can fill a counter and clear O_NONBLOCK. A hostile server
hands out any descriptor that it likes.
"""

from __future__ import annotations

import _thread
import contextlib
import copy
import ctypes
import itertools
import mmap
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from support.leaks import open_fds
from support.limits import free_fds
from support.waiting import PATIENCE, in_child, until

from ivshmem import ClosedError, NoSuchPeer, NoSuchVector, ProtocolError
from ivshmem._core import Doorbells
from ivshmem.native import ringers
from ivshmem.native.descriptors import FdArray

OTHER = 9
FULL = (1 << 64) - 2


class Bells(Doorbells):
    """An endpoint with one vector, and a peer with three."""

    def __init__(self) -> None:
        self.theirs = FdArray.eventfds(3)
        self._add_vector(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        for i in range(3):
            self._add_bell(OTHER, os.dup(self.theirs[i]))
        self._ring_self(0)

    def _read_news(self) -> None: ...

    def _look_for(self, peer: int, vector: int) -> None:
        raise (NoSuchPeer if self._bells(peer) is None else NoSuchVector)(f"{peer}, {vector}")

    def rung(self) -> list[int]:
        return [self.theirs.drain(i) for i in range(3)]


@pytest.fixture
def bells() -> Iterator[Bells]:
    made = Bells()
    yield made
    made.close()
    made.theirs.close()


Ring = Callable[[Bells], object]
WAYS: dict[str, Ring] = {
    "ring_nowait": lambda bells: bells.ring_nowait(OTHER, 0),
    "ring_all_nowait": lambda bells: bells.ring_all_nowait([OTHER], [0]),
    "doorbell": lambda bells: bells._doorbell_nowait(OTHER, 0).ring(),
}
each_way = pytest.mark.parametrize("ring", WAYS.values(), ids=WAYS)


@each_way
def test_each_ring_is_one(bells: Bells, ring: Ring) -> None:
    for number in range(1, 200):
        ring(bells)
        if number % 3 == 0:
            assert bells.rung() == [3, 0, 0]


def held(bells: Bells, ring: Ring) -> bool:
    """Whether a ring was held up until somebody read the eventfd."""
    fd = bells.theirs[0]
    os.eventfd_write(fd, FULL)
    os.set_blocking(fd, True)
    rescued = threading.Event()

    def rescue() -> None:
        rescued.set()
        os.eventfd_read(fd)

    timer = threading.Timer(2, rescue)
    timer.start()
    try:
        ring(bells)
        return rescued.is_set()
    finally:
        timer.cancel()
        timer.join(PATIENCE)
        os.set_blocking(fd, False)


def test_the_plain_ring_is_held(bells: Bells) -> None:
    """What the others are compared with."""
    assert held(bells, lambda bells: bells.ring(OTHER, 0))


@each_way
def test_a_full_counter_of_a_hostile_peer_holds_nobody(bells: Bells, ring: Ring) -> None:
    assert not held(bells, ring)
    assert bells.rung()[0] > 1 << 62
    ring(bells)
    assert bells.rung() == [1, 0, 0]


@each_way
def test_without_a_descriptor_for_the_kernels_own_signal(bells: Bells, ring: Ring) -> None:
    """A thread rings: nobody is held up, and no ring is lost."""

    def starve() -> None:
        with free_fds(0):
            assert not held(bells, ring)
            bells.rung()
            counter = Counter(bells.theirs)
            for _ in range(100):
                ring(bells)
            until(lambda: counter.reaches(100))
        assert ringers._shared is not None
        assert ringers._shared.started < 10  # one, but on a busy machine a ring can be late
        ring(bells)
        assert bells.rung() == [1, 0, 0]

    in_child(starve)


FIRST = """
import os, resource
from ivshmem._core import Doorbells
from ivshmem.native.descriptors import FdArray
class Bells(Doorbells):
    def _read_news(self): ...
bells, theirs = Bells(), FdArray.eventfds(1)
bells._add_bell(9, os.dup(theirs[0]))
resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
bells.ring_nowait(9, 0)
count = 0
while not count:
    count = theirs.drain(0)
assert count == 1
"""


def test_the_first_ring_of_a_process_needs_no_descriptor() -> None:
    """What it needs, Python has loaded before."""
    subprocess.run([sys.executable, "-c", FIRST], check=True, timeout=PATIENCE)


# -- the threads that ring where the kernel cannot ------------------------------------------------


class Held:
    """An eventfd whose next ring waits, as a peer can have it between a look and the write."""

    def __init__(self) -> None:
        self.fds = FdArray.eventfds(1)
        self.fd = self.fds[0]
        os.eventfd_write(self.fd, FULL)
        os.set_blocking(self.fd, True)

    def let_go(self) -> None:
        assert os.eventfd_read(self.fd) == FULL


class Counter:
    """How often an eventfd was rung since this was made."""

    def __init__(self, fds: FdArray, index: int = 0) -> None:
        self.fds, self.index, self.total = fds, index, 0

    def reaches(self, wanted: int) -> bool:
        self.total += self.fds.drain(self.index)
        return self.total == wanted


def test_a_ring_that_waits_holds_neither_its_caller_nor_another_ring() -> None:
    def play() -> None:
        made = ringers.Ringers()
        held, free = Held(), FdArray.eventfds(1)
        counter = Counter(free)
        begin = time.monotonic()
        assert made.ring(held.fds.ring, held.fd)
        for _ in range(10):
            assert made.ring(free.ring, free[0])
        until(lambda: counter.reaches(10))
        assert time.monotonic() - begin < PATIENCE
        assert made.started > 1
        held.let_go()
        assert os.eventfd_read(held.fd) == 1  # it was not lost

    in_child(play)


def test_more_rings_than_threads_are_lost_until_one_is_free() -> None:
    def play() -> None:
        made = ringers.Ringers()
        held = [Held() for _ in range(ringers.MOST)]
        free = FdArray.eventfds(1)
        for each in held:
            assert made.ring(each.fds.ring, each.fd)
        assert made.started == ringers.MOST
        assert made.ring(free.ring, free[0])
        assert free.drain(0) == 0
        held[7].let_go()
        assert os.eventfd_read(held[7].fd) == 1
        until(lambda: made.ring(free.ring, free[0]) and free.drain(0) == 1)
        assert made.started == ringers.MOST

    in_child(play)


def test_what_is_closed_while_a_ring_waits_is_closed_in_the_end() -> None:
    def play() -> None:
        made = ringers.Ringers()
        held = Held()
        mine = os.dup(held.fd)
        made.ring(held.fds.ring, held.fd)
        held.fds.close()
        os.fstat(held.fd)  # nothing else can get its number and be rung
        os.eventfd_read(mine)
        until(lambda: not os.path.exists(f"/proc/self/fd/{held.fd}"))

    in_child(play)


@pytest.mark.parametrize("times", [100, pytest.param(10_000, marks=pytest.mark.nightly)])
def test_a_peer_that_fills_the_counter_between_the_look_and_the_write(
    bells: Bells, times: int
) -> None:
    """It fills it while another process rings all the time, and empties it when that went on."""
    fd = bells.theirs[0]
    made = mmap.mmap(-1, 8)  # how many calls the other process made; shared with children

    def calls() -> int:
        return int.from_bytes(made[:8], "little")

    def too_late(*_: object) -> None:
        raise TimeoutError

    def fill() -> None:
        os.set_blocking(fd, True)
        signal.signal(signal.SIGALRM, too_late)
        for _ in range(times):
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            with contextlib.suppress(TimeoutError):
                os.eventfd_read(fd)
                os.eventfd_write(fd, FULL)  # waits if there was a ring since the read
                signal.setitimer(signal.ITIMER_REAL, 0)
                wanted = calls() + 3
                give_up = time.monotonic() + PATIENCE
                while calls() < wanted:
                    assert time.monotonic() < give_up, "the ring waits"

    def play() -> None:
        ringer = os.fork()
        if ringer == 0:
            with free_fds(0):
                for number in itertools.count():
                    bells.ring_nowait(OTHER, 0)
                    made[:8] = number.to_bytes(8, "little")
        try:
            fill()
        finally:
            os.kill(ringer, signal.SIGKILL)
            os.waitpid(ringer, 0)

    in_child(play)


def test_without_a_thread_the_caller_writes(bells: Bells, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    def play() -> None:
        monkeypatch.setattr(_thread, "start_new_thread", refuse)
        with free_fds(0):
            for ring in WAYS.values():
                ring(bells)
        assert bells.rung() == [len(WAYS), 0, 0]

    in_child(play)


def test_a_child_has_threads_of_its_own(bells: Bells) -> None:
    def ring() -> None:
        with free_fds(0):
            bells.ring_nowait(OTHER, 0)
        until(lambda: bells.rung() == [1, 0, 0])

    def play() -> None:
        ring()
        in_child(ring)
        ring()

    in_child(play)


def test_handlers_ring_while_they_interrupt_a_ring(bells: Bells) -> None:
    def play() -> None:
        rung = 0
        first, second = Counter(bells.theirs), Counter(bells.theirs, 1)

        def handle(*_: object) -> None:
            nonlocal rung
            bells.ring_nowait(OTHER, 1)
            rung += 1

        signal.signal(signal.SIGALRM, handle)
        with free_fds(0):
            signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
            for _ in range(500):
                bells.ring_nowait(OTHER, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
        assert rung > 10
        until(lambda: first.reaches(500) and second.reaches(rung))

    in_child(play)


# -- answers that have a time limit ---------------------------------------------------------------


def answer(bells: Bells, timeout: float | None) -> int:
    """Answer the one interrupt that is there."""
    bells.ring(0, 0)
    return bells.echo(OTHER, 0, rounds=1, timeout=timeout)


def test_echo_without_a_limit_is_held(bells: Bells) -> None:
    """What the others are compared with: it rings by a plain write, as it need not end."""
    assert held(bells, lambda bells: answer(bells, None))


@pytest.mark.parametrize("timeout", [0, 0.01, PATIENCE])
@pytest.mark.parametrize("starved", [False, True], ids=["", "without a descriptor"])
def test_echo_keeps_to_its_limit(bells: Bells, timeout: float, starved: bool) -> None:
    """Whatever the peer did to its eventfd, each answer is given and none waits."""

    def check() -> None:
        with free_fds(0) if starved else contextlib.nullcontext():
            assert not held(bells, lambda bells: answer(bells, timeout))
            bells.rung()
            for _ in range(2):
                assert answer(bells, timeout) == 1
                until(lambda: bells.rung() == [1, 0, 0])

    in_child(check)


def test_what_a_signal_handler_raises_ends_an_echo_that_a_thread_rings_for(bells: Bells) -> None:
    """The thread is waited for in Python, where the handler of Ctrl-C can run."""

    class Interrupted(ringers.Ringers):
        def ring(self, *_: object) -> bool:
            raise KeyboardInterrupt

    def play() -> None:
        ringers._shared = Interrupted()
        with free_fds(0), pytest.raises(KeyboardInterrupt):
            answer(bells, PATIENCE)

    in_child(play)


def test_echo_with_a_limit_to_one_who_leaves(bells: Bells) -> None:
    """The answer that finds nobody is an error, as it is without a limit; nothing stays open."""
    bells.ring_nowait(OTHER, 1)  # what the process has for such rings is there from now on
    before = open_fds()
    bells.ring(0, 0)

    def leave() -> None:
        bells._drop_peer(OTHER)
        bells.ring(0, 0)

    leaver = threading.Timer(0.05, leave)
    leaver.start()
    with pytest.raises(NoSuchPeer, match="peer 9 is gone"):
        bells.echo(OTHER, 0, timeout=PATIENCE)
    leaver.join(PATIENCE)
    assert bells.theirs.drain(0) == 1
    assert len(open_fds()) < len(before), "the peer's doorbells"


def test_all_of_several(bells: Bells) -> None:
    assert bells.ring_all_nowait() == 1
    assert bells.ring_all_nowait([OTHER], range(3)) == 3
    assert bells.rung() == [2, 1, 1]
    assert bells.ring_all_nowait([OTHER] * 50, range(3)) == 150, "more than one batch"
    assert bells.rung() == [50, 50, 50]
    with pytest.raises(NoSuchVector):
        bells.ring_all_nowait([OTHER], [0, 3])
    assert bells.rung() == [0, 0, 0], "all or nothing"


@each_way
def test_errors(bells: Bells, ring: Ring) -> None:
    doorbell = bells._doorbell_nowait(OTHER, 0)
    with pytest.raises(NoSuchVector):
        bells.ring_nowait(OTHER, 3)
    bells._drop_peer(OTHER)
    with pytest.raises(NoSuchPeer):
        ring(bells)
    with pytest.raises(NoSuchPeer, match="peer 9 is gone"):
        doorbell.ring()
    bells.close()
    with pytest.raises(ClosedError):
        ring(bells)
    with pytest.raises(ClosedError):
        doorbell.ring()


def test_one_signaller_for_a_process() -> None:
    """fs.aio-max-nr has room for a few hundred of them in the whole machine."""
    before = open_fds()
    made = [Bells() for _ in range(20)]
    own = len(open_fds()) - len(before)
    for one in made:
        one.ring_nowait(OTHER)
    assert len(open_fds()) - len(before) == own + 1
    for one in made[1:]:
        one.close()
    made[0].ring_nowait(OTHER)
    assert made[0].rung()[0] == 2
    for one in made:
        one.close()
        one.theirs.close()
    assert open_fds() == before


# -- what is taken for a doorbell -----------------------------------------------------------------


def full_pipe() -> int:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        while True:
            os.write(writer, bytes(4096))
    except BlockingIOError:
        pass
    os.set_blocking(writer, True)
    _later.append(reader)
    return writer


def sock() -> int:
    one, other = socket.socketpair()
    _later.append(other.detach())
    return one.detach()


def file() -> int:
    with tempfile.TemporaryFile() as made:
        return os.dup(made.fileno())


def direct_file() -> int:
    """Reads of less than a block are EINVAL there, as of an eventfd."""
    directory = os.path.dirname(__file__)
    fd = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_DIRECT, 0o600)
    os.ftruncate(fd, 4096)
    return fd


def memory() -> int:
    fd = os.memfd_create("no-bell")
    os.ftruncate(fd, 4096)
    return fd


def nameless(call: str, *args: object) -> int:
    """A descriptor of a system call that Python 3.10 has no function for."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = int(getattr(libc, call)(*args))
    if fd < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return fd


def epoll() -> int:
    with select.epoll() as made:
        return os.dup(made.fileno())


_later: list[int] = []
WRONG: dict[str, Callable[[], int]] = {
    "full pipe": full_pipe,
    "pipe to read": lambda: (pair := os.pipe(), _later.append(pair[1]))[0][0],  # type: ignore[func-returns-value]
    "socket": sock,
    "file": file,
    "direct file": direct_file,
    "memory": memory,
    "zero": lambda: os.open("/dev/zero", os.O_RDWR),
    "terminal": lambda: os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY),
    "directory": lambda: os.open("/", os.O_RDONLY),
    "path": lambda: os.open("/", os.O_PATH),
    # These have the inode that eventfds have.
    "timer": lambda: nameless("timerfd_create", 1, 0),
    "signals": lambda: nameless("signalfd", -1, ctypes.create_string_buffer(128), 0),
    "inotify": lambda: nameless("inotify_init1", 0),
    "epoll": epoll,
    "process": lambda: os.pidfd_open(os.getpid()),
}


ADDS: dict[str, Callable[[Bells, int], None]] = {
    "bell": lambda bells, fd: bells._add_bell(OTHER, fd),
    "new bell": lambda bells, fd: bells._add_bell(5, fd),
    "vector": lambda bells, fd: bells._add_vector(fd),
}


@pytest.mark.parametrize("make", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("add", ADDS)
def test_only_eventfds_are_doorbells(bells: Bells, make: Callable[[], int], add: str) -> None:
    """Of anything else a write may wait for ever, or go to somebody's file."""
    before = open_fds()
    try:
        fd = make()
    except OSError as error:
        pytest.skip(f"not here: {error}")
    try:
        with pytest.raises(ProtocolError, match=r"vector [013] of .* is not an eventfd"):
            ADDS[add](bells, fd)
    finally:
        while _later:
            os.close(_later.pop())
    assert open_fds() == before, "it is closed"
    assert bells.vectors == 1
    assert bells._bells(OTHER) == 3
    assert bells._bells(5) is None


# -- objects of Cython's own that nobody may copy -------------------------------------------------


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, pickle.dumps])
def test_doorbells_are_not_copied(bells: Bells, way: Callable[[object], object]) -> None:
    bell = bells.doorbell(OTHER)
    for thing, remedy in ((bells, "connect again"), (bell, "ask the endpoint for another one")):
        with pytest.raises(TypeError, match=f"cannot be copied or pickled: {remedy}"):
            way(thing)
    for fds in (bells.theirs, FdArray()):
        with pytest.raises(TypeError):
            way(fds)
    bell.ring()
    assert bells.rung() == [1, 0, 0]
