# cython: language_level=3, binding=True, freethreading_compatible=True
# cython: embedsignature=True, embedsignature.format=clinic, auto_pickle=False
"""When to spin before sleeping, and for how long.

Knows: what earlier spins brought. Does not know: what is waited for.

To wake a sleeper takes ten times as long as all the rest. A short spin that succeeds makes a round
trip up to thirty times faster. A spin that fails is lost time; if it keeps the peer from running,
because both are on one core, it fails every time. A process cannot see on which core its peer runs,
but it can see which of its own spins succeed. So:

- Each spin is a try. After two failures in a row, or one spin during which the processor was taken
  away for long, the next waits sleep at once: 512 of them, later 4096. Then one more spin is tried.
  (Both ends try: that is less than one wait in 2000, which does not change the 99.9th percentile.)
- A spin that succeeds ends this, and after 64 successes in a row all failures are forgotten.
- A try is never short: a peer that has just been woken takes 5 to 15 microseconds to answer, and a
  budget below that would never succeed again.
"""

cimport cython
from cpython.float cimport PyFloat_AS_DOUBLE, PyFloat_CheckExact
from libc.stdint cimport int64_t, uint32_t, uint64_t

from .descriptors cimport now
from .syscalls cimport (
    EINTR, ESHUTDOWN, IVSHMEM_CLOSING, word_load, ivshmem_state, word_store, RELAXED,
)

cdef enum:
    # Nanoseconds: the shortest and the longest spin of "auto"; the gap between two looks from which
    # on a spin was held up; the time after which a spin lets signal handlers run.
    SHORTEST = 20_000
    LONGEST = 50_000
    HELD_UP = 1_000_000
    SLICE = 1_000_000
    # Waits without a spin: after the first failures, and later; and the successes in a row after
    # which the first number is used again.
    FIRST_PAUSE = 512
    LAST_PAUSE = 4096
    FORGET = 64
    LOOKS = 4  # between two readings of the clock


cdef int64_t spin_of(object spin) except -2:
    """Return nanoseconds, or SPIN_AUTO, for the `spin` argument of a wait."""
    cdef double seconds
    if PyFloat_CheckExact(spin):
        seconds = PyFloat_AS_DOUBLE(spin)
    elif isinstance(spin, str):
        if spin != "auto":
            raise ValueError(f'spin is seconds or "auto", not {spin!r}')
        return SPIN_AUTO
    else:
        seconds = spin
    if not seconds >= 0:
        raise ValueError(f"cannot spin for {seconds:g} seconds")
    return <int64_t>(min(seconds, 1e9) * 1e9)


# The numbers of a Habit, which threads share without a lock: each is read and written whole.

cdef inline uint32_t get32(uint32_t *number) noexcept nogil:
    return <uint32_t>word_load(number, False, RELAXED)


cdef inline void set32(uint32_t *number, uint32_t value) noexcept nogil:
    word_store(number, False, value, RELAXED)


cdef inline int64_t get64(int64_t *number) noexcept nogil:
    return <int64_t>word_load(number, True, RELAXED)


cdef inline void set64(int64_t *number, int64_t value) noexcept nogil:
    word_store(number, True, <uint64_t>value, RELAXED)


@cython.final
cdef class Spinner:
    """A record of spins for each of 63 things; all others share the last record.

    Threads may use it at once without a lock: what they overwrite then is only an estimate.
    """

    cdef int64_t spin(
        self,
        Py_ssize_t which,
        int64_t deadline,
        Probe probe,
        void *what,
        Turn *turn,
        const unsigned int *state,
    ) noexcept nogil:
        """Call `probe(what)` until it is not 0, for as long as `turn` leaves.

        Args:
            which: the number of the record.
            turn: this wait's, from `begin`.
            state: its IVSHMEM_CLOSING ends the spin.

        Returns:
            What `probe` returned; 0: sleep now; -ESHUTDOWN; -EINTR: let signal handlers run, and
            call again. (A signal that came during the spin would not end the sleep.)
        """
        cdef int64_t begun, last, t, n, until
        cdef bint held_up = False
        cdef int i
        if turn.done == 0:  # first looks without the clock, which takes as long as two looks
            for i in range(LOOKS):
                n = probe(what)
                if n:
                    if i:  # else it was there before the spin, which tells nothing
                        self.won(which, 1, False)
                    return n
        begun = last = t = now()
        until = min(begun + min(turn.left, <int64_t>SLICE), deadline)
        while t < until:
            for _ in range(LOOKS):
                n = probe(what)
                if n:
                    t = now()
                    self.won(which, turn.done + t - begun, held_up or t - last > HELD_UP)
                    return n
            if ivshmem_state(state) & IVSHMEM_CLOSING:
                return -ESHUTDOWN
            last = t
            t = now()
            held_up |= t - last > HELD_UP
        turn.done += t - begun
        turn.left -= t - begun
        if t >= deadline:
            turn.left = 0  # the deadline cut the spin short, so nothing is learnt
        elif turn.left <= 0:
            turn.left = 0
            self.lost(which)
        return -EINTR

    cdef void begin(self, Turn *turn, Py_ssize_t which, int64_t wish) noexcept nogil:
        """Set how long a wait that begins now may spin; `wish`: nanoseconds, or SPIN_AUTO."""
        turn.done = 0
        turn.left = self.budget(which, wish) if wish else 0

    cdef int64_t budget(self, Py_ssize_t which, int64_t wish) noexcept nogil:
        cdef Habit *habit = &self.habits[min(<size_t>which, <size_t>HABITS - 1)]
        cdef uint32_t left = get32(&habit.left)  # once: other threads change it
        cdef int64_t gap
        if left:
            set32(&habit.left, left - 1)
            return 0
        if wish >= 0:
            return wish
        gap = get64(&habit.gap)
        if gap == 0:
            return LONGEST
        return min(max(gap * 4, <int64_t>SHORTEST), <int64_t>LONGEST)

    cdef void won(self, Py_ssize_t which, int64_t gap, bint held_up) noexcept nogil:
        """Note that a spin succeeded after `gap` nanoseconds; `held_up`: count it as a failure."""
        cdef Habit *habit = &self.habits[min(<size_t>which, <size_t>HABITS - 1)]
        cdef int64_t before = get64(&habit.gap)
        cdef uint32_t wins = get32(&habit.wins) + 1
        if held_up:
            set32(&habit.losses, get32(&habit.losses) + 1)
            self.lost(which)
            return
        set32(&habit.losses, 0)
        gap = max(gap, <int64_t>1)
        set64(&habit.gap, before + (gap - before) // 8 if before else gap)
        if wins >= FORGET:
            wins = 0
            set32(&habit.pause, 0)
        set32(&habit.wins, wins)

    cdef void lost(self, Py_ssize_t which) noexcept nogil:
        """Note that a spin failed."""
        cdef Habit *habit = &self.habits[min(<size_t>which, <size_t>HABITS - 1)]
        cdef uint32_t losses = get32(&habit.losses) + 1
        cdef uint32_t pause = get32(&habit.pause)
        set32(&habit.wins, 0)
        set64(&habit.gap, 0)
        if losses < 2:
            set32(&habit.losses, losses)
            return
        set32(&habit.losses, 1)  # the next try has to succeed
        pause = min(pause * 8, <uint32_t>LAST_PAUSE) if pause else FIRST_PAUSE
        set32(&habit.pause, pause)
        set32(&habit.left, pause)

    # The same functions for tests.

    def _budget(self, Py_ssize_t which, spin):
        return self.budget(which, spin_of(spin))

    def _won(self, Py_ssize_t which, int64_t gap, bint held_up=False):
        self.won(which, gap, held_up)

    def _lost(self, Py_ssize_t which):
        self.lost(which)
