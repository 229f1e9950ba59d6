"""What each kind of end uses of ends.pyx."""

from libc.stdint cimport int64_t

from ..native.descriptors cimport Epoll, FdArray
from ..native.spin cimport Probe, Spinner
from .header cimport ivshmem_channel
from .membership cimport Dependent, Membership

cdef enum:
    # A sleep that the memory forbids again and again, although nothing can be taken, is a hostile
    # peer's work: after so many it sleeps all the same.
    FUTILE = 64
    # Nanoseconds: where no ring can come, the longest pause between two looks.
    LAST_PAUSE = 1_000_000


cdef class Wakeup:
    cdef Membership membership
    cdef Epoll epoll
    cdef FdArray kick
    cdef int64_t pause

    cdef int wait(self, int64_t deadline) except -1
    cdef int clear(self) except -1


cdef object was_removed(str name)


cdef class ChannelEnd(Dependent):
    cdef Membership membership
    cdef readonly object channels  # keeps the membership from being collected
    cdef readonly str name  # of the channel
    cdef ivshmem_channel channel
    cdef Wakeup wakeup  # of the descriptor that a program watches
    cdef Wakeup slept_on  # of the thread that slept last at this end
    cdef unsigned long slept_by  # its number
    cdef int asleep  # threads and tasks that sleep in a call
    cdef int awaited  # tasks of them, and whether a program watches the descriptor
    cdef object watch  # a weak reference to what the loop of its tasks watches
    cdef Spinner spinner
    cdef bint watched  # a program watches the descriptor
    cdef bint open
    cdef bint removed  # the channel; the beat finds out
    cdef bint slept  # of ends that a ring wakes alone: since then it has rung no other
    cdef int copying  # copies without the GIL into memory of this end

    cdef bint usable(self) noexcept
    cdef int begin_copy(self) except -1
    cdef int end_copy(self) except -1
    cdef int enlist(self) except -1
    cdef int enter(self) except -1
    cdef int attempt(self) except? -2
    cdef int begin_sleep(self) except? -2
    cdef void end_sleep(self) noexcept
    cdef int one_awake(self) except -1
    cdef ChannelEnd sleeper(self)
    cdef bint begin_waiting(self) except -1
    cdef bint sleeps_on(self) except -1
    cdef int end_waiting(self) except -1
    cdef int64_t probe(self, void **what, Probe *probe) except -1
    cdef int check_there(self) except -1
    cdef int wait(self, object timeout, object spin) except? -2
    cdef int restore(self) except -1
    cdef int give_up(self) except -1
    cdef int pass_on(self) except -1
    cdef int wake_another(self) except -1
    cdef int begin_watch(self) except -1
    cdef int arm(self) except? -2
    cdef object fail(self, int code)
