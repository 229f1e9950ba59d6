"""What pumps.pyx uses of stream_poll.pyx."""

from .ends cimport ChannelEnd, Wakeup
from .header cimport ivshmem_channel, ivshmem_listener, ivshmem_sleep, ivshmem_stream
from .membership cimport Dependent, Membership


cdef struct Entry:
    ivshmem_stream *stream  # NULL: it is a listener
    ivshmem_listener *listener
    ivshmem_channel *channel
    ivshmem_sleep *sleep
    int awaited  # 0: it does not sleep


cdef class StreamPoll(Dependent):
    cdef Membership membership
    cdef Wakeup wakeup
    cdef Entry *entries
    cdef list sleepers  # at the places of the entries
    cdef Py_ssize_t room
    cdef bint open


cdef class Sleeper:
    cdef StreamPoll poll
    cdef ChannelEnd end
    cdef object owner
    cdef Py_ssize_t index

    cdef int wake_up(self, Entry *entry) except -1
    cpdef int sleep(self, int directions) except -1
