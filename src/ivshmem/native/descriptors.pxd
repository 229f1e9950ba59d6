# What other modules in Cython use of descriptors.pyx, and inline what each of them often does.

from libc.stdint cimport INT64_MAX, int64_t, uint64_t

from .syscalls cimport (
    aio_context_t, c_write, clock_gettime, CLOCK_MONOTONIC, EAGAIN, EINTR, EINVAL, epoll_event,
    errno, iovec, ivshmem_elements, ivshmem_length, preadv2, RWF_NOWAIT, timespec,
)

cdef enum:
    # Messages in one sendmmsg or recvmmsg call, and events in one epoll_wait: the arrays stand on
    # the stack, and a default socket buffer holds no more than 278 messages anyway.
    BATCH = 64
    # How often an FdArray can grow, twofold each time.
    OUTGROWN = 24

cdef int64_t deadline_of(object timeout) except -1
cdef int fail() except -1
cdef int fail_with(int code) except -1
cdef int epoll_sleep(int epfd, epoll_event *events, int limit, int64_t deadline) except -2
cdef int64_t take_count(int fd) except -1
cdef bint is_eventfd(int fd, int known) noexcept nogil
cdef Signaller shared_signaller()
cdef int add_one_nowait(Signaller signaller, FdArray bells, int fd) except -1


cdef inline double seconds_of(object timeout) except? -1:
    """A time limit that is not None."""
    cdef double seconds = timeout
    if seconds != seconds:
        raise ValueError("timeout is not a number")
    return seconds


cdef inline int check_timeout(object timeout) except -1:
    """Refuse what is no time limit, also where nothing will wait."""
    if timeout is not None and type(timeout) is not int:  # 0 as a rule: to convert it costs 10 ns
        seconds_of(timeout)
    return 0


cdef inline int64_t now() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return <int64_t>t.tv_sec * 1000000000 + t.tv_nsec


cdef inline int64_t deadline_in(int64_t nanoseconds) noexcept nogil:
    """When they will be over; less than 0: never."""
    return now() + min(nanoseconds, <int64_t>INT64_MAX // 2) if nanoseconds >= 0 else INT64_MAX


cdef inline timespec *time_left(int64_t deadline, timespec *left) noexcept nogil:
    """What is left until then, put into `left`; NULL: no limit. For ppoll."""
    cdef int64_t nanoseconds
    if deadline == INT64_MAX:
        return NULL
    nanoseconds = max(deadline - now(), <int64_t>0)
    left.tv_sec = nanoseconds // 1000000000
    left.tv_nsec = nanoseconds % 1000000000
    return left


cdef inline int64_t count_of(uint64_t count) noexcept nogil:
    """What was read from an eventfd; more than 2**63 - 1 rings are somebody's ill will."""
    return <int64_t>min(count, <uint64_t>INT64_MAX)


cdef inline int64_t look(int fd) noexcept nogil:
    """The count of an eventfd, set back to 0; 0 when nobody rang; -errno. Never blocks.

    RWF_NOWAIT does what O_NONBLOCK would, whatever other processes did to that flag; eventfds know
    it since Linux 5.8, which is why that is the oldest kernel supported.
    """
    cdef uint64_t count = 0
    cdef iovec iov
    cdef ssize_t n
    iov.iov_base = &count
    iov.iov_len = sizeof(count)
    while True:
        n = preadv2(fd, &iov, 1, -1, RWF_NOWAIT)
        if n == sizeof(count):
            return count_of(count)
        if n >= 0:
            return -EINVAL  # no eventfd
        if errno == EAGAIN:
            return 0
        if errno != EINTR:
            return -errno


cdef inline int add_one(int fd) noexcept nogil:
    """Add 1 to an eventfd: 0, also where its counter is full; else errno, which may be EINTR."""
    cdef uint64_t one = 1
    if c_write(fd, &one, sizeof(one)) >= 0 or errno == EAGAIN:
        return 0
    return errno


cdef class Fd:
    cdef int number  # -1: it is closed, or has another owner


cdef int taken(object fd) except? -1


cdef class FdArray:
    cdef int *fds
    cdef Py_ssize_t count
    cdef Py_ssize_t room
    cdef unsigned int state  # calls that use one of the fds without the GIL; closing
    cdef int *outgrown[OUTGROWN]
    cdef int outgrown_count

    cdef int add(self, int fd) except -1
    cdef bint enter(self) noexcept nogil
    cdef void leave(self) noexcept nogil
    cdef void release(self) noexcept nogil


cdef inline Py_ssize_t length_of(FdArray array) noexcept nogil:
    """How many descriptors there are, also while another thread adds one."""
    return ivshmem_length(&array.count)


cdef inline int *place_of(FdArray array, Py_ssize_t index) noexcept nogil:
    """Where a descriptor stands, of as many as `length_of` told; it stays there."""
    return &ivshmem_elements(&array.fds)[index]


cdef class Signaller:
    cdef aio_context_t context
    cdef int zero
    cdef int pid
    cdef object __weakref__

    cdef int submit(self, int *fds, long count) except -1
    cdef int send(self, int *fds, long count) noexcept nogil


cdef class Relay:
    cdef aio_context_t context
    cdef int pid

    cdef bint fired(self) noexcept nogil


cdef class Epoll:
    cdef int epfd

    cdef int control(self, int op, int fd, unsigned int events, uint64_t token) except -1
