"""Spinning before sleeping: what is learnt, what is found, and what ends it."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Literal

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.waiting import PATIENCE, Background, interrupt_when_asleep, signals, until

from ivshmem import ClosedError, Interrupt, Region
from ivshmem._core import Doorbells
from ivshmem.native.descriptors import FdArray
from ivshmem.native.mapping import Atomic
from ivshmem.native.spin import Spinner

ME, VECTORS = 3, 3
US = 1000  # nanoseconds
LONGEST, SHORTEST = 50 * US, 20 * US

Spin = float | Literal["auto"]


class Listener(Doorbells):
    """An endpoint that can ring itself, as a client can."""

    def __init__(self) -> None:
        self.shared = FdArray.eventfds(VECTORS)
        for i in range(VECTORS):
            self._add_vector(os.dup(self.shared[i]))
        self._ring_self(ME)

    def end(self) -> None:
        self.close()
        self.shared.close()


@pytest.fixture
def listener() -> Iterator[Listener]:
    made = Listener()
    yield made
    made.end()


# -- what is learnt -------------------------------------------------------------------------------


def test_auto_begins_with_a_try_as_long_as_a_round_trip() -> None:
    assert Spinner()._budget(0, "auto") == LONGEST


def test_a_given_time_is_kept() -> None:
    assert Spinner()._budget(0, 0.25) == 250_000 * US
    assert Spinner()._budget(0, 0) == 0


@pytest.mark.parametrize("spin", ["auto", 1e-4])
def test_two_bad_spins_end_it_for_a_while(spin: Spin) -> None:
    spinner = Spinner()
    assert spinner._budget(0, spin) > 0
    spinner._lost(0)
    assert spinner._budget(0, spin) > 0, "one is bad luck"
    spinner._lost(0)
    for pause in (512, 4096, 4096, 4096):
        assert [spinner._budget(0, spin) for _ in range(pause)] == [0] * pause
        assert spinner._budget(0, spin) > 0, "then one more try"
        spinner._lost(0)


def test_bad_luck_now_and_then_changes_nothing() -> None:
    spinner = Spinner()
    for _ in range(100):
        spinner._lost(0)
        spinner._won(0, US)
        assert spinner._budget(0, "auto") > 0


def test_a_spin_that_was_held_up_counts_as_bad_at_once() -> None:
    """Somebody else wants the core: spinning uses up what a sleeper would be given."""
    spinner = Spinner()
    spinner._won(0, US, True)
    assert spinner._budget(0, "auto") == 0


def test_pauses_are_short_again_after_good_spins() -> None:
    spinner = Spinner()

    def pause() -> int:
        spinner._lost(0)
        spinner._lost(0)
        return next(n for n in range(10_000) if spinner._budget(0, "auto"))

    assert pause() == 512
    assert pause() == 4096
    for _ in range(64):
        spinner._won(0, US)
    assert pause() == 512


@given(st.lists(st.integers(0, 10**9), min_size=50, max_size=200))
def test_auto_stays_within_its_limits(gaps: list[int]) -> None:
    spinner = Spinner()
    for gap in gaps:
        spinner._won(0, gap)
        assert SHORTEST <= spinner._budget(0, "auto") <= LONGEST


def test_auto_follows_the_gaps() -> None:
    spinner = Spinner()
    for _ in range(100):
        spinner._won(0, 7 * US)
    assert 27 * US <= spinner._budget(0, "auto") <= 29 * US
    for _ in range(100):
        spinner._won(0, US)
    assert spinner._budget(0, "auto") == SHORTEST


def test_each_vector_learns_for_itself() -> None:
    spinner = Spinner()
    for _ in range(2):
        spinner._lost(5)
    assert spinner._budget(5, "auto") == 0
    assert spinner._budget(6, "auto") > 0
    for _ in range(2):
        spinner._lost(1000)
    assert spinner._budget(2000, "auto") == 0, "the rest share one record"


# -- what is found --------------------------------------------------------------------------------

SPINS: list[Spin] = ["auto", 1e-5, 0.002]
each_spin = pytest.mark.parametrize("spin", SPINS)

WAITS: list[tuple[Callable[[Listener, float | None, Spin], object], object, object]] = [
    (lambda e, t, s: e.wait(1, t, spin=s), 2, None),
    (lambda e, t, s: e.wait(None, t, spin=s), Interrupt(1, 2), None),
    (lambda e, t, s: e.wait((2, 1), t, spin=s), Interrupt(1, 2), None),
]
each_wait = pytest.mark.parametrize(
    ("wait", "two", "nothing"), WAITS, ids=["one", "any", "any of several"]
)
Wait = Callable[[Listener, float | None, Spin], object]


@each_wait
@each_spin
@pytest.mark.parametrize("timeout", [None, PATIENCE])
def test_found(
    listener: Listener, wait: Wait, two: object, nothing: object, spin: Spin, timeout: float | None
) -> None:
    for _ in range(600):  # far enough for "auto" to pause
        listener.ring(ME, 1)
        listener.ring(ME, 1)
        assert wait(listener, timeout, spin) == two
    assert wait(listener, 0, spin) == nothing


@each_wait
@each_spin
def test_found_after_sleeping(
    listener: Listener, wait: Wait, two: object, nothing: object, spin: Spin
) -> None:
    for _ in range(4):
        waiting = Background(lambda: wait(listener, None, spin))
        waiting.wait_until_asleep()
        os.eventfd_write(listener.shared[1], 2)
        assert waiting.result() == two


@each_wait
def test_found_while_spinning(listener: Listener, wait: Wait, two: object, nothing: object) -> None:
    """It never sleeps: that ends in an hour."""
    waiting = Background(lambda: wait(listener, None, 3600.0))
    begin = time.monotonic()
    while time.monotonic() < begin + 0.01:
        assert waiting.running
    os.eventfd_write(listener.shared[1], 2)
    assert waiting.result() == two


@each_wait
@pytest.mark.parametrize("timeout", [1e-6, 0.02])
def test_the_limit_ends_the_spin(
    listener: Listener, wait: Wait, two: object, nothing: object, timeout: float
) -> None:
    begin = time.monotonic()
    assert wait(listener, timeout, 3600.0) == nothing
    assert timeout <= time.monotonic() - begin < PATIENCE


@each_wait
def test_close_ends_the_spin(listener: Listener, wait: Wait, two: object, nothing: object) -> None:
    waiting = Background(lambda: wait(listener, None, 3600.0))
    begin = time.monotonic()
    while time.monotonic() < begin + 0.005:
        assert waiting.running
    listener.close()
    with pytest.raises(ClosedError):
        waiting.result()


@each_wait
def test_ctrl_c_ends_the_spin(listener: Listener, wait: Wait, two: object, nothing: object) -> None:
    with signals() as handled:
        assert wait(listener, 0.1, 3600.0) == nothing
    assert handled


@each_wait
@pytest.mark.parametrize("spin", [0.0009, 0.0035])
def test_a_signal_during_the_spin_ends_what_follows(
    listener: Listener, wait: Wait, two: object, nothing: object, spin: Spin
) -> None:
    """It is delivered before the sleep, so that no EINTR would tell of it."""

    class Enough(Exception):
        pass

    def handler(*_: object) -> None:
        raise Enough

    def wait_for_it() -> None:
        # On a busy machine it comes before the wait begins.
        signal.setitimer(signal.ITIMER_REAL, 0.0004)
        wait(listener, PATIENCE * 4, spin)

    before = signal.signal(signal.SIGALRM, handler)
    try:
        for _ in range(20):
            with pytest.raises(Enough):
                wait_for_it()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@each_wait
def test_ctrl_c_after_a_spin(listener: Listener, wait: Wait, two: object, nothing: object) -> None:
    with pytest.raises(KeyboardInterrupt), interrupt_when_asleep():
        wait(listener, None, 1e-4)


@each_wait
def test_a_peer_that_clears_nonblock(
    listener: Listener, wait: Wait, two: object, nothing: object
) -> None:
    """A spin does not sleep because of it, and close() still ends what does."""
    os.set_blocking(listener.shared[1], True)
    assert wait(listener, 0.01, 0.005) == nothing
    waiting = Background(lambda: wait(listener, None, 0.005))
    waiting.wait_until_asleep()
    os.eventfd_write(listener.shared[1], 2)
    assert waiting.result() == two
    waiting = Background(lambda: wait(listener, None, 3600.0))
    listener.close()
    with pytest.raises(ClosedError):
        waiting.result()


def test_spinning_and_sleeping_in_turn(listener: Listener) -> None:
    """A plain read clears the flag of the eventfd, which a spin must not rest on."""
    spins: list[Spin] = [0, 1e-5, "auto", 0, 0, 1e-3]
    for spin in spins * 3:
        waiting = Background(lambda spin=spin: listener.wait(1, spin=spin))  # type: ignore[misc]
        waiting.wait_until_asleep()
        listener.ring(ME, 1)
        assert waiting.result() == 1


def test_other_threads_run_during_a_spin(listener: Listener) -> None:
    ran = threading.Event()
    waiting = Background(lambda: listener.wait(1, spin=3600.0))
    Background(ran.set).result()
    assert ran.is_set()
    listener.ring(ME, 1)
    assert waiting.result() == 1


@pytest.mark.parametrize("spin", [-1, -1e-9, math.nan, "Auto", ""])
def test_bad_spins(listener: Listener, spin: Spin) -> None:
    with pytest.raises(ValueError, match="spin"):
        listener.wait(0, 0, spin=spin)


def test_no_spin(listener: Listener) -> None:
    with pytest.raises(TypeError):
        listener.wait(0, 0, spin=None)  # type: ignore[call-overload]
    assert listener.wait(0, 0, spin=math.inf) is None
    assert listener.wait(0, 0, spin=True) is None


# -- any of several -------------------------------------------------------------------------------


def test_any_of_several(listener: Listener) -> None:
    listener.ring(ME, 0)
    assert listener.wait([1, 2], 0) is None
    listener.ring(ME, 2)
    listener.ring(ME, 1)
    listener.ring(ME, 1)
    assert listener.wait([2, 1], 0) == Interrupt(2, 1), "the first named that is ready"
    assert listener.wait((n for n in (2, 1)), 0) == Interrupt(1, 2)
    assert listener.wait({0}) == Interrupt(0, 1)
    assert listener.wait(range(VECTORS), 0.01) is None


def test_none_of_several(listener: Listener) -> None:
    with pytest.raises(ValueError, match="no vector to wait for"):
        listener.wait([], 0)
    with pytest.raises(LookupError, match="vector 7"):
        listener.wait([0, 7], 0)
    with pytest.raises(TypeError):
        listener.wait("01", 0)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        listener.wait(1.0, 0)  # type: ignore[call-overload]


class Fickle:
    """A number that changes between two looks."""

    def __init__(self) -> None:
        self.answers = iter([0, *[10**9] * 9])

    def __index__(self) -> int:
        return next(self.answers)


def test_numbers_of_every_kind(listener: Listener) -> None:
    listener.ring(ME, 1)
    assert listener.wait([Fickle(), True], 0) == (1, 1)  # type: ignore[list-item]
    listener.ring_all([ME], numpy.int64(1))  # type: ignore[arg-type]
    assert listener.wait(numpy.int64(1), 0) == 1  # type: ignore[call-overload]
    listener.ring_all(numpy.array([ME]), numpy.array([0, 2]))
    assert listener.wait(numpy.array([2, 0]), 0) == (2, 1)
    assert listener.wait([0] * 5000, 0) == (0, 1)


def test_several_by_several_threads(listener: Listener) -> None:
    waiting = [Background(lambda: listener.wait((0, 1, 2))) for _ in range(3)]
    for thread in waiting:
        thread.wait_until_asleep()
    for done in range(3):
        listener.ring(ME, 1)
        until(lambda done=done: sum(not t.running for t in waiting) == done + 1)  # type: ignore[misc]
    assert [thread.result() for thread in waiting] == [Interrupt(1, 1)] * 3


# -- a word of shared memory ----------------------------------------------------------------------


@pytest.fixture
def region() -> Iterator[Region]:
    with Region.create("64K") as region:
        yield region


def words(region: Region) -> list[Atomic]:
    return [region.atomic_u32(4), region.atomic_u64(8)]


@each_spin
@pytest.mark.parametrize("which", [0, 1])
def test_a_word_that_has_changed(
    listener: Listener, region: Region, which: int, spin: Spin
) -> None:
    word = words(region)[which]
    for value in (1, 2, (1 << 32) - 1, 0):
        old = word.exchange(value)
        assert listener.wait_word(word, old, spin=spin) == value
        assert listener.wait_word(word, old, 0, 0, spin=spin) == value
        assert listener.wait_word(word, value, timeout=0, spin=spin) is None
        assert listener.wait_word(word, value, timeout=0.001, spin=spin) is None


@pytest.mark.parametrize("which", [0, 1])
def test_a_word_that_changes_during_a_spin(listener: Listener, region: Region, which: int) -> None:
    """Nobody rings: it is the word that was seen."""
    word = words(region)[which]
    waiting = Background(lambda: listener.wait_word(word, 0, spin=3600.0))
    begin = time.monotonic()
    while time.monotonic() < begin + 0.005:
        assert waiting.running
    word.store(7)
    assert waiting.result() == 7


@each_spin
@pytest.mark.parametrize("timeout", [None, PATIENCE])
def test_a_word_that_changes_during_sleep(
    listener: Listener, region: Region, spin: Spin, timeout: float | None
) -> None:
    word = region.atomic_u64(0)
    for value in range(5):
        waiting = Background(lambda v=value: listener.wait_word(word, v, 2, timeout, spin=spin))  # type: ignore[misc]
        waiting.wait_until_asleep()
        listener.ring(ME, 2)  # for nothing
        waiting.wait_until_asleep()
        assert waiting.running
        word.store(value + 1)
        listener.ring(ME, 2)
        assert waiting.result() == value + 1


def test_who_sleeps_says_so(listener: Listener, region: Region) -> None:
    word, sleeping = region.atomic_u32(0), region.atomic_u32(64)
    for spin in SPINS:
        waiting = Background(
            lambda spin=spin: listener.wait_word(word, 0, spin=spin, sleeping=sleeping)  # type: ignore[misc]
        )
        waiting.wait_until_asleep()
        assert sleeping.load() == 1
        word.store(5, "seq_cst")
        listener.ring(ME)
        assert waiting.result() == 5
        assert sleeping.load() == 0
        word.store(0)
    assert listener.wait_word(word, 0, timeout=0.001, sleeping=sleeping) is None
    assert sleeping.load() == 0


@pytest.mark.parametrize("spin", [0, 1e-5, "auto"])
def test_spared_rings(listener: Listener, region: Region, spin: Spin) -> None:
    """Who rings only those who say that they sleep leaves nobody asleep."""
    words = [region.atomic_u32(0), region.atomic_u32(64)]
    sleeping = [region.atomic_u32(128), region.atomic_u32(192)]
    rounds, rung = 20_000, 0

    def play(me: int) -> None:
        nonlocal rung
        for turn in range(1, rounds + 1):
            if me == 0:
                words[1].store(turn, "seq_cst")
                if sleeping[1].load("seq_cst"):
                    listener.ring(ME, 1)
                    rung += 1
            assert (
                listener.wait_word(words[me], turn - 1, me, spin=spin, sleeping=sleeping[me])
                == turn
            )
            if me == 1:
                words[0].store(turn, "seq_cst")
                if sleeping[0].load("seq_cst"):
                    listener.ring(ME, 0)

    answering = Background(lambda: play(1))
    play(0)
    answering.result()


def test_a_word_and_its_ends(listener: Listener, region: Region) -> None:
    word = region.atomic_u32(0)
    with pytest.raises(LookupError, match="vector 3"):
        listener.wait_word(word, 0, 3)
    with pytest.raises(KeyboardInterrupt), interrupt_when_asleep():
        listener.wait_word(word, 0)
    waiting = Background(lambda: listener.wait_word(word, 0))
    waiting.wait_until_asleep()
    region.close()  # the word stays mapped as long as it is waited for
    listener.ring(ME)
    waiting.wait_until_asleep()
    assert waiting.running
    listener.close()
    with pytest.raises(ClosedError):
        waiting.result()
    with pytest.raises(ClosedError):
        listener.wait_word(word, 0)


@pytest.mark.parametrize("spin", SPINS)
def test_a_word_and_one_who_rings_for_nothing(
    listener: Listener, region: Region, spin: Spin
) -> None:
    """A vector that is always ready defeats neither the limit nor signal handlers."""
    always = ctypes.CDLL(None).eventfd(1 << 30, os.EFD_SEMAPHORE | os.EFD_NONBLOCK)
    listener._add_vector(always)
    word = region.atomic_u32(0)
    begin = time.monotonic()
    assert listener.wait_word(word, 0, VECTORS, 0.05, spin=spin) is None
    with signals() as handled:
        assert listener.wait_word(word, 0, VECTORS, 0.1, spin=spin) is None
    assert handled
    assert time.monotonic() - begin < PATIENCE


def test_words_that_cannot_be(listener: Listener, region: Region) -> None:
    word = region.atomic_u32(0)
    with Region.from_fd(os.dup(region.fileno()), readonly=True) as readonly:
        with pytest.raises(TypeError, match="reading only"):
            listener.wait_word(word, 0, timeout=0, sleeping=readonly.atomic_u32(4))
        assert listener.wait_word(readonly.atomic_u32(0), 0, timeout=0) is None
    with pytest.raises(OverflowError):
        listener.wait_word(word, 1 << 32, timeout=0)
    assert listener.wait_word(region.atomic_u64(0), 1 << 32, timeout=0) == 0
    region.close()
    with pytest.raises(ClosedError):
        listener.wait_word(word, 0, timeout=0)
    with pytest.raises(TypeError):
        listener.wait_word(None, 0)  # type: ignore[arg-type]
