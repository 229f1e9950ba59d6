"""What the other modules in Cython use of membership.pyx."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from .._core cimport Doorbells
from ..native.bell cimport Doorbell
from ..native.descriptors cimport FdArray
from ..native.mapping cimport Mapping
from .header cimport ivshmem_channel, ivshmem_member, ivshmem_place, ivshmem_pulse

cdef enum:
    MOST_RINGS = 192
    EVERY_PEER = 0xffffffff  # as a target; there is no vector 65535


cdef struct Rings:
    uint32_t targets[MOST_RINGS]  # peer << 16 | vector, to be rung
    int count
    uint32_t lock  # of both, for a few instructions


cdef class Dependent:
    cdef object __weakref__

    cdef int beat(self) except -1
    cdef bint is_rung(self) noexcept


cdef class Membership:
    cdef ivshmem_member member
    cdef ivshmem_pulse *pulses
    cdef Rings rings
    cdef Mapping mapping
    cdef readonly object endpoint
    cdef Doorbells doorbells  # None: a region alone
    cdef readonly Py_ssize_t vector  # -1: this process cannot be rung
    cdef dict bells  # peer << 16 | vector -> Doorbell
    # One eventfd, never read: each write is an edge to all Wakeups. None: the membership has ended.
    cdef FdArray kick
    cdef FdArray ending  # one eventfd, which wakes the thread of the beat
    cdef dict ends  # id -> a weak reference to an end that is open
    cdef object threads  # a threading.local, with the Wakeup of each thread
    cdef readonly object loops  # what each asyncio loop watches (sleeping_tasks.pyx), by weak keys
    cdef bint told  # the endpoint writes to `kick` after its waits
    cdef bint polls  # not every process that this one waits for can ring it
    cdef int watchers  # ends whose descriptor a program watches
    cdef int sleepers  # threads that sleep until they are woken, once a beat at the latest
    cdef unsigned int state  # calls without the GIL, and whether it is closed
    cdef unsigned int generation
    cdef bint pinned
    cdef bint joined  # the place is this process's
    cdef bint lost  # another process has freed the place
    cdef int64_t beat

    cdef int name_peer(self) except -1
    cdef int ring(self, uint32_t target) except -1
    cdef void look_for_mutes(self) noexcept nogil
    cdef int after_beat(self, int code) except -1
    cdef list open_ends(self)
    cdef void watch(self, int count) noexcept
    cdef int look_for_quiet_ends(self) except -1
    cdef int release(self) except -1
    cdef bint is_silent(self, ivshmem_place place)
    cdef int abandon(self) except -1
    cdef bint is_own(self) noexcept
    cdef bint usable(self) noexcept
    cdef bint has_place(self) noexcept
    cdef object unusable(self)
    cdef int lose_place(self) except -1
    cdef int use_memory(self) except -1
    cdef int end_use(self) except -1
    cdef void leave(self) noexcept
    cdef int hurry(self) except -1
    cdef int check(self) except -1
    cdef int flush(self) except -1
    cdef int kick_all(self) except -1
    cdef int look_after_ends(self) except -1
    cdef str whose(self, uint64_t owner)
    cdef object fail(self, int code, ivshmem_channel *channel, str name)
