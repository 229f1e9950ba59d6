# What the other modules in Cython use of _fds.pyx.

from libc.stdint cimport int64_t, uint64_t

from ._libc cimport aio_context_t, epoll_event

cdef enum:
    # Messages in one sendmmsg or recvmmsg call, and events in one epoll_wait: the arrays stand on
    # the stack, and a default socket buffer holds no more than 278 messages anyway.
    BATCH = 64

cdef int64_t now() noexcept nogil
cdef int64_t deadline_of(object timeout) except -1
cdef int fail() except -1
cdef int fail_with(int code) except -1
cdef int epoll_sleep(int epfd, epoll_event *events, int limit, int64_t deadline) except -2
cdef uint64_t take_count(int fd) except? 0
cdef bint is_eventfd(int fd) noexcept


cdef class FdArray:
    cdef int *fds
    cdef Py_ssize_t count
    cdef Py_ssize_t room
    cdef int users  # calls that let go of the GIL while using one of the fds
    cdef bint closing

    cdef void release(self) noexcept
    cdef void done(self) noexcept


cdef class Relay:
    cdef aio_context_t context
    cdef int pid

    cdef bint fired(self) noexcept nogil


cdef class Epoll:
    cdef int epfd

    cdef int control(self, int op, int fd, unsigned int events, uint64_t token) except -1
