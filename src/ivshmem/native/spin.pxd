# What the other modules in Cython use of spin.pyx.

from libc.stdint cimport int64_t, uint32_t

cdef enum:
    # A spin as long as the learner thinks best, where others give nanoseconds.
    SPIN_AUTO = -1
    HABITS = 1 << 6


cdef struct Habit:
    int64_t gap  # nanoseconds from the beginning of a spin to its success, smoothed
    uint32_t losses  # spins in a row that found nothing
    uint32_t wins  # spins in a row that found something
    uint32_t pause  # waits without a spin after the last bad spins
    uint32_t left  # of these, still to come


cdef struct Turn:
    int64_t left  # nanoseconds that one wait may still spin
    int64_t done  # and those it has


# A look at something that may have come: 0 if it has not; it calls nothing of Python.
ctypedef int64_t (*Probe)(void *what) noexcept nogil

cdef int64_t spin_of(object spin) except -2


cdef class Spinner:
    cdef Habit habits[HABITS]

    cdef int64_t spin(
        self,
        Py_ssize_t which,
        int64_t deadline,
        Probe probe,
        void *what,
        Turn *turn,
        const unsigned int *state,
    ) noexcept nogil
    cdef void begin(self, Turn *turn, Py_ssize_t which, int64_t wish) noexcept nogil
    cdef int64_t budget(self, Py_ssize_t which, int64_t wish) noexcept nogil
    cdef void won(self, Py_ssize_t which, int64_t gap, bint held_up) noexcept nogil
    cdef void lost(self, Py_ssize_t which) noexcept nogil
