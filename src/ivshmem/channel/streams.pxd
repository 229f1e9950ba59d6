"""What stream_poll.pyx uses of streams.pyx."""

from libc.stdint cimport int64_t, uint64_t

from .ends cimport ChannelEnd
from .header cimport ivshmem_listener, ivshmem_stream

cdef enum:
    SEND = 0
    RECEIVE = 1
    ENDED = 2  # no direction: the other end receives no more
    ABORTED = 3  # .. it is gone, and has not said that it sends no more
    FD_WAITS = -99  # no error of the header
    INTERRUPTED = -98  # by a signal, whose handler has run

cdef int look_both(ivshmem_stream *stream) noexcept nogil


cdef class StreamListener(ChannelEnd):
    cdef ivshmem_listener listener

    cdef int next_caller(self, Stream stream, object timeout, object spin) except? -2


cdef class Stream(ChannelEnd):
    cdef ivshmem_stream stream
    cdef object timeout
    cdef bint aborting
    cdef int tried  # directions in which a call looked since a watcher was told of them
    cdef bint partly  # the last move was of fewer bytes than the ring could take or give
    cdef bint moving[2]  # a call lets the kernel copy, without the GIL

    cdef int take_over(self, StreamListener listener) except -1
    cdef int begin(self) except -1
    cdef ChannelEnd half(self, int direction)
    cdef int await_half(self, int direction, object timeout, object deadline) except -1
    cdef int64_t push(
        self, const char *data, uint64_t size, object timeout, object deadline
    ) except -1
    cdef object broken(self, int direction)
    cdef int check_alone(self, int direction) except -1
    cdef int64_t pull(self, char *into, uint64_t room, object timeout) except -1
    cdef bytes receive(self, Py_ssize_t size, object timeout)
    cdef int64_t move(self, int direction, int fd, uint64_t most) except -100
    cdef int64_t move_once(self, int direction, int fd, uint64_t most) except -100
    cdef object move_in_time(self, int direction, object fd, object size)
