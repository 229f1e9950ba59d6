# cython: language_level=3, binding=True, freethreading_compatible=False
# cython: embedsignature=True, embedsignature.format=clinic
"""The kernel interface at C speed: descriptors, eventfds, epoll, fd passing, mappings, registers.

Knows: system calls, and how to wait, retry and clean up around them.
Does not know: what a message means, where memory comes from, any default or policy.

Invariants:
1. Every descriptor has one owner, which closes it once; a plain int argument is borrowed,
   unless the name says `take`.
2. A descriptor is not closed while a call that let go of the GIL is using it: the last user closes.
3. No call blocks because another process cleared O_NONBLOCK on a descriptor that is shared with it,
   but for one: see Doorbells.ring.
4. Blocking calls keep their deadline across EINTR and let signal handlers run at once.
"""

cimport cython
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.buffer cimport PyBuffer_FillInfo
from cpython.dict cimport PyDict_GetItem
from cpython.exc cimport PyErr_CheckSignals, PyErr_SetFromErrno
from cpython.ref cimport PyObject
from libc.stdint cimport INT64_MAX, int32_t, int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy, memset, strerror

from ._libc cimport (
    CLOCK_MONOTONIC, CMSG_DATA, CMSG_FIRSTHDR, CMSG_LEN, CMSG_NXTHDR, EAGAIN, EFD_CLOEXEC,
    EFD_NONBLOCK, EINTR, EINVAL, EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLL_CTL_DEL,
    EPOLL_CTL_MOD, IOCB_CMD_PREAD, IOCB_FLAG_RESFD, MADV_POPULATE_READ, MADV_POPULATE_WRITE,
    MAP_FAILED, MAP_SHARED,
    MSG_CMSG_CLOEXEC, MSG_CTRUNC, MSG_DONTWAIT, MSG_NOSIGNAL, PROT_READ, PROT_WRITE, RWF_NOWAIT,
    SCM_RIGHTS, SOL_SOCKET, aio_context_t, c_close, c_eventfd, c_read, c_write, clock_gettime,
    cmsghdr, epoll_create1, epoll_ctl, epoll_event, epoll_wait, errno, getpid, io_event, iocb,
    iovec, ivshmem_add, ivshmem_compare_exchange, ivshmem_control, ivshmem_io_destroy,
    ivshmem_io_getevents, ivshmem_io_setup, ivshmem_io_submit, ivshmem_load, ivshmem_load32,
    ivshmem_store, ivshmem_store32, ivshmem_touch, madvise, mincore, mmap, mmsghdr, munmap, pollfd,
    ppoll, pread, preadv2, pwrite, recvmmsg,
    TFD_CLOEXEC, TFD_NONBLOCK, itimerspec, sendmmsg, timerfd_create, timerfd_settime, timespec,
)
from ._libc cimport EPOLLERR as _EPOLLERR
from ._libc cimport EPOLLHUP as _EPOLLHUP
from ._libc cimport EPOLLIN as _EPOLLIN
from ._libc cimport EPOLLOUT as _EPOLLOUT
from ._libc cimport POLLIN as _POLLIN

import os
from collections import namedtuple

from .errors import ClosedError, NoSuchVector, ProtocolError

EPOLLIN = _EPOLLIN
EPOLLOUT = _EPOLLOUT
EPOLLERR = _EPOLLERR
EPOLLHUP = _EPOLLHUP

cdef enum:
    # Messages in one sendmmsg or recvmmsg call, and events in one epoll_wait: the arrays stand on
    # the stack, and a default socket buffer holds no more than 278 messages anyway.
    BATCH = 64
    # Bytes in a message of protocol version 0.
    MESSAGE = 8

Interrupt = namedtuple("Interrupt", ["vector", "rings"], module="ivshmem")
Interrupt.__doc__ = "A vector of this endpoint was rung `rings` times since it was last waited for."


# -- time and errors ------------------------------------------------------------------------------

cdef int64_t _now() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return <int64_t>t.tv_sec * 1000000000 + t.tv_nsec


cdef int64_t _deadline(object timeout) except -1:
    """Monotonic nanoseconds at which `timeout` seconds (None: never) are over."""
    cdef double seconds
    if timeout is None:
        return INT64_MAX
    seconds = timeout
    if seconds != seconds:
        raise ValueError("timeout is not a number")
    if seconds <= 0:
        return 0
    if seconds > 1e9:  # 31 years
        return INT64_MAX
    return _now() + <int64_t>(seconds * 1e9)


cdef int _fail() except -1:
    PyErr_SetFromErrno(OSError)
    return -1


# -- descriptors ----------------------------------------------------------------------------------

@cython.final
cdef class FdArray:
    """Owned file descriptors in order, for instance one eventfd for each vector of a peer.

    `close()` closes all of them, once; while another thread's call is using one, that call closes
    them when it returns. A closed array has length 0.
    """

    cdef int *fds
    cdef Py_ssize_t count
    cdef Py_ssize_t room
    cdef int users  # calls that let go of the GIL while using one of the fds
    cdef bint closing

    def __cinit__(self):
        self.fds = NULL

    @staticmethod
    def eventfds(Py_ssize_t count):
        """`count` new eventfds: counter mode, non-blocking, close-on-exec.

        Raises:
            OSError: EMFILE, ENFILE or ENOMEM; nothing is left open then.
        """
        cdef FdArray array = FdArray()
        cdef int fd
        for _ in range(count):
            fd = c_eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
            if fd < 0:
                try:
                    _fail()
                finally:
                    array.close()
            array.take(fd)
        return array

    def take(self, int fd):
        """Append `fd` and own it from now on, also when this call fails."""
        cdef int *grown
        if self.closing:
            c_close(fd)
            raise ClosedError("the descriptors are closed")
        if self.count == self.room:
            grown = <int *>realloc(self.fds, (self.room * 2 + 1) * sizeof(int))
            if grown == NULL:
                c_close(fd)
                raise MemoryError
            self.fds = grown
            self.room = self.room * 2 + 1
        self.fds[self.count] = fd
        self.count += 1

    def __len__(self):
        return 0 if self.closing else self.count

    def __getitem__(self, Py_ssize_t index):
        """The descriptor, still owned by the array."""
        if self.closing or index < 0 or index >= self.count:
            raise IndexError(f"descriptor {index} of {len(self)}")
        return self.fds[index]

    def signal(self, Py_ssize_t index):
        """Add 1 to eventfd `index`, which must be this process's alone; nothing if closed.

        Checked and written under the GIL, so that no other thread can close it in between.
        """
        cdef uint64_t one = 1
        if 0 <= index < len(self) and c_write(self.fds[index], &one, sizeof(one)) < 0:
            if errno != EAGAIN:  # full: it is readable, and that is what matters
                _fail()

    def drain(self, Py_ssize_t index):
        """The count of eventfd `index`, set back to 0. Never blocks, whoever shares it."""
        return _take(self[index])

    cdef void release(self) noexcept:
        cdef Py_ssize_t i
        cdef Py_ssize_t count = self.count
        self.count = 0
        for i in range(count):
            c_close(self.fds[i])

    cdef void done(self) noexcept:
        """One user less."""
        self.users -= 1
        if self.closing and self.users == 0:
            self.release()

    def close(self):
        self.closing = True
        if self.users == 0:
            self.release()

    def __dealloc__(self):
        self.release()
        free(self.fds)


@cython.final
cdef class Signaller:
    """Adds 1 to eventfds that are shared with other processes, and never waits for any.

    A plain write waits when somebody filled the counter and cleared O_NONBLOCK, and anybody who
    shares the eventfd can. The kernel's own signal does not: io_submit(2) sends it when a request
    with IOCB_FLAG_RESFD is done, and reading a byte of /dev/zero is done at once. It costs about
    four times as much as a write, for up to 64 eventfds.

    Raises:
        OSError: no /dev/zero, EAGAIN when fs.aio-max-nr is used up, ENOSYS where a kernel has none.
    """

    cdef aio_context_t context
    cdef int zero
    cdef int pid

    def __cinit__(self):
        self.context = 0
        self.zero = -1
        self.pid = getpid()
        self.zero = os.open("/dev/zero", os.O_RDONLY | os.O_CLOEXEC)
        # Requests count until their ends are reaped, which each call does for its own.
        if ivshmem_io_setup(BATCH, &self.context) < 0:
            try:
                _fail()
            finally:
                self.close()

    def signal(self, fds):
        """Add 1 to each eventfd of a sequence; a full counter stays full."""
        cdef iocb requests[BATCH]
        cdef iocb *pointers[BATCH]
        cdef io_event ends[BATCH]
        cdef char nothing[1]
        cdef Py_ssize_t first, i
        cdef long count, done, n
        if self.zero < 0:
            raise ClosedError("the signaller is closed")
        for first in range(0, len(fds), BATCH):
            count = 0
            for fd in fds[first : first + BATCH]:
                memset(&requests[count], 0, sizeof(iocb))
                requests[count].aio_lio_opcode = IOCB_CMD_PREAD
                requests[count].aio_fildes = self.zero
                requests[count].aio_buf = <uint64_t>&nothing[0]
                requests[count].aio_nbytes = 1
                requests[count].aio_flags = IOCB_FLAG_RESFD
                requests[count].aio_resfd = fd
                pointers[count] = &requests[count]
                count += 1
            done = 0
            while done < count:
                n = ivshmem_io_submit(self.context, count - done, &pointers[done])
                if n < 0:
                    if errno == EINTR or errno == EAGAIN:
                        continue
                    _fail()
                done += n
                i = 0
                while i < n:
                    i += max(ivshmem_io_getevents(self.context, n - i, ends), <long>0)

    def close(self):
        if self.context and getpid() == self.pid:
            ivshmem_io_destroy(self.context)
        self.context = 0
        if self.zero >= 0:
            c_close(self.zero)
        self.zero = -1

    def __dealloc__(self):
        self.close()


@cython.final
cdef class Epoll:
    """An epoll object whose events carry a token instead of a descriptor.

    A descriptor number is used again as soon as it is closed, so events that were already fetched
    could speak of the wrong file; a token that is never used twice cannot.
    """

    cdef int epfd

    def __cinit__(self):
        self.epfd = -1
        self.epfd = epoll_create1(EPOLL_CLOEXEC)
        if self.epfd < 0:
            _fail()

    def fileno(self):
        if self.epfd < 0:
            raise ClosedError("the epoll object is closed")
        return self.epfd

    cdef int control(self, int op, int fd, unsigned int events, uint64_t token) except -1:
        cdef epoll_event event
        memset(&event, 0, sizeof(event))
        event.events = events
        event.data.u64 = token
        if epoll_ctl(self.fileno(), op, fd, &event) < 0:
            _fail()
        return 0

    def add(self, int fd, uint64_t token, unsigned int events):
        """Watch `fd`; EPOLLHUP and EPOLLERR are reported also for `events` 0."""
        self.control(EPOLL_CTL_ADD, fd, events, token)

    def modify(self, int fd, uint64_t token, unsigned int events):
        self.control(EPOLL_CTL_MOD, fd, events, token)

    def remove(self, int fd):
        self.control(EPOLL_CTL_DEL, fd, 0, 0)

    def wait(self, timeout=None):
        """A list of (token, events), empty when `timeout` seconds are over first."""
        cdef epoll_event events[BATCH]
        cdef int64_t deadline = _deadline(timeout)
        cdef int n
        cdef int epfd = self.fileno()
        while True:
            n = _epoll_sleep(epfd, events, BATCH, deadline)
            if n >= 0:
                return [(events[i].data.u64, events[i].events) for i in range(n)]

    def close(self):
        cdef int epfd = self.epfd
        self.epfd = -1
        if epfd >= 0:
            c_close(epfd)

    def __dealloc__(self):
        if self.epfd >= 0:
            c_close(self.epfd)


cdef int _epoll_sleep(int epfd, epoll_event *events, int limit, int64_t deadline) except -2:
    """epoll_wait until `deadline`; -1 when a signal handler ran: the caller goes round again."""
    cdef int64_t left
    cdef int milliseconds, n, code
    if deadline == INT64_MAX:
        milliseconds = -1
    else:
        left = deadline - _now() if deadline else 0
        # Rounded up, or the last fraction of a millisecond would be spent spinning.
        milliseconds = <int>min((left + 999999) // 1000000, <int64_t>2147483647) if left > 0 else 0
    with nogil:
        n = epoll_wait(epfd, events, limit, milliseconds)
        code = errno
    if n >= 0:
        return n
    if code != EINTR:
        _fail_with(code)
    PyErr_CheckSignals()
    return -1


cdef int _fail_with(int code) except -1:
    raise OSError(code, strerror(code).decode())


@cython.final
cdef class Timer:
    """A clock as a descriptor that is readable when its time has come (timerfd_create(2))."""

    cdef int fd

    def __cinit__(self):
        self.fd = -1
        self.fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK)
        if self.fd < 0:
            _fail()

    def fileno(self):
        if self.fd < 0:
            raise ClosedError("the timer is closed")
        return self.fd

    def set(self, double seconds):
        """Be readable in so many seconds, from now on, and not before; 0: never."""
        cdef itimerspec spec
        memset(&spec, 0, sizeof(spec))
        spec.it_value.tv_sec = <long>seconds
        spec.it_value.tv_nsec = <long>((seconds - <long>seconds) * 1e9)
        if timerfd_settime(self.fileno(), 0, &spec, NULL) < 0:
            _fail()

    def close(self):
        cdef int fd = self.fd
        self.fd = -1
        if fd >= 0:
            c_close(fd)

    def __dealloc__(self):
        if self.fd >= 0:
            c_close(self.fd)


# -- messages with descriptors --------------------------------------------------------------------

def send_runs(int sock, runs):
    """Send messages without blocking, in batches of sendmmsg.

    Args:
        runs: a sequence of (value, fds, first, length, ..): `length` messages of `value`; where
            `fds` is an FdArray they carry fds[first], fds[first + 1] and so on, where it is None
            nothing.

    Returns:
        How many messages went out, in order, before the socket's buffer was full (or the kernel
        refused for want of memory or of descriptors in flight: the next call says so).

    Raises:
        OSError: the first message could not be sent, for another reason than a full buffer.
    """
    cdef mmsghdr messages[BATCH]
    cdef iovec iov[BATCH]
    cdef int64_t values[BATCH]
    cdef ivshmem_control controls[BATCH]
    cdef Py_ssize_t total = 0
    cdef Py_ssize_t first, count, i
    cdef int filled = 0
    cdef int sent
    cdef int64_t value
    cdef FdArray fds
    for run in runs:
        value, fds, first, count = run[0], run[1], run[2], run[3]
        if fds is not None and (first < 0 or first + count > fds.count):
            raise IndexError(f"descriptors {first}..{first + count - 1} of {fds.count}")
        for i in range(first, first + count):
            values[filled] = value
            iov[filled].iov_base = &values[filled]
            iov[filled].iov_len = MESSAGE
            memset(&messages[filled], 0, sizeof(messages[filled]))
            messages[filled].msg_hdr.msg_iov = &iov[filled]
            messages[filled].msg_hdr.msg_iovlen = 1
            if fds is not None:
                _attach(&messages[filled], &controls[filled], fds.fds[i])
            filled += 1
            if filled == BATCH:
                sent = _sendmmsg(sock, messages, filled, total)
                total += sent
                if sent < filled:
                    return total
                filled = 0
    if filled:
        total += _sendmmsg(sock, messages, filled, total)
    return total


cdef void _attach(mmsghdr *message, ivshmem_control *control, int fd) noexcept:
    cdef cmsghdr *header
    memset(control, 0, sizeof(ivshmem_control))
    message.msg_hdr.msg_control = control
    message.msg_hdr.msg_controllen = sizeof(ivshmem_control)
    header = CMSG_FIRSTHDR(&message.msg_hdr)
    header.cmsg_len = CMSG_LEN(sizeof(int))
    header.cmsg_level = SOL_SOCKET
    header.cmsg_type = SCM_RIGHTS
    memcpy(CMSG_DATA(header), &fd, sizeof(int))


cdef int _sendmmsg(int sock, mmsghdr *messages, int count, Py_ssize_t before) except -1:
    """How many of `count` went out. An 8-byte write to a Unix stream socket is never split."""
    cdef int n
    while True:
        n = sendmmsg(sock, messages, count, MSG_DONTWAIT | MSG_NOSIGNAL)
        if n >= 0:
            return n
        if errno == EINTR:
            continue
        if errno == EAGAIN or before > 0:
            return 0
        return _fail()


def receive(int sock, Py_ssize_t limit):
    """Take up to about `limit` messages off a socket without blocking.

    Returns:
        (chunks, eof): chunks is a list of (data, fds): at most 8 bytes and the descriptors that
        came with them, which now belong to the caller. The kernel never reads past a byte that
        carried descriptors, so they belong to the message that holds the chunk's last byte.

    Raises:
        ProtocolError: a descriptor was lost on the way (MSG_CTRUNC), which cannot be mended.
        OSError: as of recvmsg(2), when nothing was received before. On any error all descriptors
            of this call are closed.
    """
    cdef mmsghdr messages[BATCH]
    cdef iovec iov[BATCH]
    cdef char data[BATCH * MESSAGE]
    cdef ivshmem_control controls[BATCH]
    cdef int n, i, want
    cdef list chunks = []
    cdef bint lost = False
    cdef bint eof = False
    while len(chunks) < limit and not eof and not lost:
        memset(messages, 0, sizeof(messages))
        for i in range(BATCH):
            iov[i].iov_base = &data[i * MESSAGE]
            iov[i].iov_len = MESSAGE
            messages[i].msg_hdr.msg_iov = &iov[i]
            messages[i].msg_hdr.msg_iovlen = 1
            messages[i].msg_hdr.msg_control = &controls[i]
            messages[i].msg_hdr.msg_controllen = sizeof(ivshmem_control)
        want = <int>min(limit - len(chunks), <Py_ssize_t>BATCH)
        n = recvmmsg(sock, messages, want, MSG_DONTWAIT | MSG_CMSG_CLOEXEC, NULL)
        if n < 0:
            if errno == EINTR:
                continue
            if errno == EAGAIN or chunks:
                break
            _fail()
        for i in range(n):
            fds = _descriptors(&messages[i])
            lost = lost or messages[i].msg_hdr.msg_flags & MSG_CTRUNC
            eof = eof or messages[i].msg_len == 0
            if messages[i].msg_len:
                chunks.append(
                    (PyBytes_FromStringAndSize(&data[i * MESSAGE], messages[i].msg_len), fds)
                )
        if n < want:
            break
    if lost:
        for _, fds in chunks:
            for fd in fds:
                c_close(fd)
        raise ProtocolError(
            "a descriptor from the server was lost: this process has too many open files"
            " (raise its limit, for instance with `ulimit -n`)"
        )
    return chunks, eof


cdef tuple _descriptors(mmsghdr *message):
    cdef cmsghdr *header = CMSG_FIRSTHDR(&message.msg_hdr)
    cdef int fd
    cdef size_t i
    cdef list fds = []
    while header != NULL:
        if header.cmsg_level == SOL_SOCKET and header.cmsg_type == SCM_RIGHTS:
            for i in range((header.cmsg_len - CMSG_LEN(0)) // sizeof(int)):
                memcpy(&fd, CMSG_DATA(header) + i * sizeof(int), sizeof(int))
                fds.append(fd)
        header = CMSG_NXTHDR(&message.msg_hdr, header)
    return tuple(fds)


# -- memory ---------------------------------------------------------------------------------------

cdef class Mapping:
    """A shared mapping of a file, from `offset` on, offered through the buffer protocol.

    Raises:
        OSError: as of mmap(2).
    """

    cdef char *start
    cdef Py_ssize_t length
    cdef Py_ssize_t views
    cdef bint fixed  # read-only

    def __cinit__(
        self, int fd, Py_ssize_t size, *args, bint readonly=False, int64_t offset=0, **kwargs
    ):
        cdef void *address
        cdef int protection = PROT_READ if readonly else PROT_READ | PROT_WRITE
        self.start = NULL
        if size <= 0:
            raise ValueError(f"cannot map {size} bytes")
        with nogil:
            address = mmap(NULL, size, protection, MAP_SHARED, fd, offset)
        if address == MAP_FAILED:
            _fail()
        self.start = <char *>address
        self.length = size
        self.fixed = readonly

    @property
    def address(self):
        """Where the memory begins in this process, 0 when closed; for ctypes and its like."""
        return <size_t>self.start

    @property
    def size(self):
        """Bytes mapped."""
        return self.length

    @property
    def readonly(self):
        """Whether this process may only read."""
        return self.fixed

    @property
    def closed(self):
        """Whether the memory is no longer mapped here."""
        return self.start == NULL

    cdef int check(self) except -1:
        if self.start == NULL:
            raise ClosedError("the memory is closed")
        return 0

    def populate(self, Py_ssize_t page_size):
        """Fault every page in, for writing where that is allowed; contents stay as they are.

        Raises:
            OSError: ENOMEM or EFAULT when memory or huge pages ran out on the way.
        """
        cdef int advice = MADV_POPULATE_READ if self.fixed else MADV_POPULATE_WRITE
        cdef int code = 0
        cdef char *page
        cdef char *end
        cdef char seen = 0
        self.check()
        self.views += 1
        try:
            while True:
                with nogil:
                    code = errno if madvise(self.start, self.length, advice) < 0 else 0
                if code != EINTR and code != EAGAIN:
                    break
                PyErr_CheckSignals()
            if code == EINVAL:  # before Linux 5.14
                page = self.start
                end = self.start + self.length
                with nogil:
                    while page < end:
                        if advice == MADV_POPULATE_READ:
                            seen |= (<volatile_char *>page)[0]
                        else:
                            ivshmem_touch(page)
                        page += page_size
            elif code:
                _fail_with(code)
        finally:
            self.views -= 1

    def resident(self, Py_ssize_t page_size):
        """Bytes of the file that are in memory now, whoever brought them there (mincore(2))."""
        cdef Py_ssize_t pages = (self.length + page_size - 1) // page_size
        cdef Py_ssize_t i
        cdef Py_ssize_t count = 0
        cdef unsigned char *vector
        self.check()
        vector = <unsigned char *>malloc(pages)
        if vector == NULL:
            raise MemoryError
        try:
            if mincore(self.start, self.length, vector) < 0:
                _fail()
            for i in range(pages):
                count += vector[i] & 1
        finally:
            free(vector)
        return count * page_size

    def atomic_u64(self, Py_ssize_t offset):
        """The 64-bit word at `offset` bytes, a multiple of 8.

        Raises:
            ValueError: there is no such word.
        """
        if offset < 0 or offset % 8 or offset > self.length - 8:
            raise ValueError(f"no aligned 64-bit word at {offset} in {self.length} bytes")
        return AtomicU64(self, offset)

    def __len__(self):
        return self.length

    def __getbuffer__(self, Py_buffer *view, int flags):
        self.check()
        PyBuffer_FillInfo(view, self, self.start, self.length, self.fixed, flags)
        self.views += 1

    def __releasebuffer__(self, Py_buffer *view):
        self.views -= 1

    def close(self):
        """Unmap.

        Raises:
            BufferError: a memoryview, an array or a running call still uses the memory; nothing is
                changed then.
        """
        cdef char *address = self.start
        if address == NULL:
            return
        if self.views:
            raise BufferError(
                f"the memory is in use by {self.views} views: release memoryviews and arrays first"
            )
        self.start = NULL
        munmap(address, self.length)

    def __dealloc__(self):
        if self.start != NULL:
            munmap(self.start, self.length)


cdef extern from *:
    ctypedef char volatile_char "volatile char"


@cython.final
cdef class AtomicU64:
    """A 64-bit word of shared memory, in the machine's byte order, read and changed as a whole.

    Made by `Mapping.atomic_u64`; after the mapping is closed every call raises ClosedError.
    """

    cdef Mapping mapping
    cdef Py_ssize_t offset

    def __cinit__(self, Mapping mapping not None, Py_ssize_t offset):
        self.mapping = mapping
        self.offset = offset

    cdef void *word(self) except NULL:
        self.mapping.check()
        return self.mapping.start + self.offset

    cdef void *own_word(self) except NULL:
        if self.mapping.fixed:
            raise TypeError("the memory is mapped for reading only")
        return self.word()

    def load(self):
        """The value; what its writer stored before is seen, too (acquire)."""
        return ivshmem_load(self.word())

    def store(self, uint64_t value):
        """Set the value, after all that was stored before (release)."""
        ivshmem_store(self.own_word(), value)

    def compare_exchange(self, uint64_t expected, uint64_t desired):
        """Set `desired` if the value is `expected`; return what it was (sequentially consistent)."""
        return ivshmem_compare_exchange(self.own_word(), expected, desired)

    def fetch_add(self, uint64_t amount):
        """Add, modulo 2**64; return what the value was (sequentially consistent)."""
        return ivshmem_add(self.own_word(), amount)


# -- registers ------------------------------------------------------------------------------------

@cython.final
cdef class Registers:
    """The 32-bit registers of a device, in one page mapped from `fd` or behind reads and writes.

    Args:
        fd: borrowed; with `mapped` it may be closed afterwards.
        offset: of the first register in `fd`. It need not begin a page.
        size: bytes of registers.
        mapped: a load or store is then one of the processor's; otherwise one pread or pwrite of 4
            bytes, which vfio carries out as such, for what it does not map.

    Raises:
        OSError: as of mmap(2), pread(2), pwrite(2).
    """

    cdef char *page
    cdef char *first
    cdef int64_t offset
    cdef Py_ssize_t size
    cdef Py_ssize_t length
    cdef int fd
    cdef bint open

    def __cinit__(self, int fd, int64_t offset, Py_ssize_t size, *, bint mapped=True):
        cdef Py_ssize_t inside = offset % REGISTER_PAGE
        cdef void *address
        self.page = NULL
        self.fd = fd
        self.offset = offset
        self.size = size
        if mapped:
            self.length = inside + size
            address = mmap(
                NULL, self.length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, offset - inside
            )
            if address == MAP_FAILED:
                _fail()
            self.page = <char *>address
            self.first = self.page + inside
        self.open = True

    cdef int check(self, Py_ssize_t at) except -1:
        if not self.open:
            raise ClosedError("the device is closed")
        if at < 0 or at % 4 or at > self.size - 4:
            raise IndexError(f"no register at {at}: there are {self.size} bytes of them")
        return 0

    def load(self, Py_ssize_t at):
        """The register at `at` bytes."""
        cdef uint32_t value = 0
        self.check(at)
        if self.page != NULL:
            return ivshmem_load32(self.first + at)
        if pread(self.fd, &value, sizeof(value), self.offset + at) != sizeof(value):
            _fail()
        return value

    def store(self, Py_ssize_t at, uint32_t value):
        """Set the register at `at` bytes, after all that was written to memory before."""
        self.check(at)
        self.put(at, value)

    cdef int put(self, Py_ssize_t at, uint32_t value) except -1:
        if self.page != NULL:
            ivshmem_store32(self.first + at, value)
        elif not self.open:
            raise ClosedError("the device is closed")
        elif pwrite(self.fd, &value, sizeof(value), self.offset + at) != sizeof(value):
            _fail()
        return 0

    def close(self):
        """Unmap; may be called twice."""
        self.open = False
        if self.page != NULL:
            munmap(self.page, self.length)
            self.page = NULL

    def __dealloc__(self):
        if self.page != NULL:
            munmap(self.page, self.length)


cdef enum:
    REGISTER_PAGE = 4096  # the smallest there is; a larger page makes mmap fail, and nothing worse


# -- doorbells ------------------------------------------------------------------------------------

cdef enum:
    # Tokens of the epoll object in Doorbells; those of vectors are smaller.
    TOKEN_WAKE = 1 << 30
    TOKEN_NEWS = 1 << 29


cdef class Doorbells:
    """The doorbells that an endpoint rings, and those that it listens on.

    A subclass adds peers and vectors with `_add_bell`, `_drop_peer` and `_add_vector`, and
    overrides two hooks: `_news()` is called when the descriptor given to `_watch` is readable, and
    `_missing(peer, vector)` when somebody unknown is rung; it raises, or returns for another try.

    A device rings by a register instead (`_ring_by`), and may have to listen by UIO (`_listen_uio`).
    """

    cdef dict bells  # peer -> FdArray
    cdef FdArray own
    cdef Registers registers  # whose Doorbell register is at `doorbell`
    cdef Py_ssize_t doorbell
    cdef Py_ssize_t bells_each  # vectors that a peer has there
    cdef bint uio  # the own vector is a UIO device, and
    cdef int32_t uio_count  # its count was this at the last look
    cdef FdArray wake  # one eventfd, written by close() to send the waiters home
    cdef FdArray queued  # one eventfd, readable while the subclass has events that nobody took
    cdef Epoll epoll  # anything(), once it is needed
    cdef Epoll outer  # what fileno() returns: that and queued, once it is needed
    cdef int waiters
    cdef bint gone
    cdef int watched
    cdef bint urgent  # what is watched interrupts waiting for one vector, too
    cdef int pid

    def __cinit__(self, *args, **kwargs):
        self.gone = True  # until there is something to close
        self.bells = {}
        self.watched = -1
        self.pid = getpid()
        self.own = FdArray()
        self.wake = FdArray.eventfds(1)
        self.queued = FdArray.eventfds(1)
        self.gone = False

    # Overridden by subclasses.

    def _news(self):
        raise NotImplementedError

    def _missing(self, peer, vector):
        raise NotImplementedError

    # Bookkeeping, called with the GIL held.

    def _watch(self, int fd, *, bint urgent=False):
        """Call `_news()` when `fd`, which is borrowed, is readable.

        `urgent`: also while one vector is waited for, which what `_news()` raises then ends.
        """
        self.watched = fd
        self.urgent = urgent
        if self.epoll is not None:
            self.epoll.add(fd, TOKEN_NEWS, _EPOLLIN)

    def _unwatch(self):
        """Forget the descriptor of `_watch`, before it is closed."""
        # A forked child shares the epoll object with its parent, and must leave it as it is.
        if self.epoll is not None and self.watched >= 0:
            if not self.gone and getpid() == self.pid:
                self.epoll.remove(self.watched)
        self.watched = -1
        self.urgent = False

    def _add_vector(self, int fd):
        """Listen on `fd` as the next vector; takes it, also when this fails.

        Raises:
            ProtocolError: it is no eventfd.
        """
        self.own.take(fd)
        if not _counts(fd):
            raise ProtocolError(f"what came for vector {self.own.count - 1} is no eventfd")
        if self.epoll is not None:
            self.epoll.add(fd, self.own.count - 1, _EPOLLIN)

    def _add_bell(self, peer, int fd):
        """Ring the peer's next vector through `fd`; takes it."""
        cdef FdArray bells = self.bells.get(peer)
        if bells is None:
            bells = self.bells[peer] = FdArray()
        bells.take(fd)

    def _listen_uio(self, int fd):
        """Listen on `fd`, an open UIO device in non-blocking mode, as the only vector; takes it.

        Reading 4 bytes tells how many interrupts it had since it was made.
        """
        self.own.take(fd)
        self.uio = True

    def _ring_by(self, Registers registers not None, Py_ssize_t doorbell, Py_ssize_t vectors):
        """Ring everybody by storing peer << 16 | vector to the register at `doorbell`.

        `vectors`: how many each peer is taken to have.
        """
        self.registers = registers
        self.doorbell = doorbell
        self.bells_each = vectors

    def _ring_self(self, peer):
        """Let `peer`, this endpoint's own id, lead to its own vectors."""
        self.bells[peer] = self.own

    def _bells(self, peer):
        """How many doorbells `peer` has; None when it is unknown."""
        cdef FdArray bells = self.bells.get(peer)
        return None if bells is None else bells.count

    def _drop_peer(self, peer):
        """Close the doorbells of `peer`, if there are any."""
        cdef FdArray bells = self.bells.pop(peer, None)
        if bells is not None:
            bells.close()

    @property
    def vectors(self):
        """How many vectors others can ring here: they are 0..vectors-1."""
        return self.own.count

    @property
    def closed(self):
        """Whether close() was called."""
        return self.gone

    cdef int check(self) except -1:
        if self.gone:
            raise ClosedError("the endpoint is closed")
        return 0

    def _set_queued(self, bint anything):
        """Say whether there are events that were taken in and that nobody has asked for yet."""
        if self.gone:
            return
        if anything:
            self.queued.signal(0)
        else:
            _take(self.queued.fds[0])

    def fileno(self):
        """A descriptor, for any event loop, that is readable while `events(timeout=0)` has any.

        It is made at the first call, which is when OSError (EMFILE, ENOMEM) can be raised. From
        then on each ring that comes in costs its sender a little more, for the kernel keeps it up
        to date.
        """
        cdef Epoll outer
        self.check()
        if self.outer is None:
            outer = Epoll()
            outer.add(self.anything().epfd, 0, _EPOLLIN)
            outer.add(self.queued.fds[0], 0, _EPOLLIN)
            self.outer = outer
        return self.outer.epfd

    cdef Epoll anything(self):
        """What waiting for any vector sleeps on: the vectors, news, wake.

        Made when it is first needed: every epoll object that watches an eventfd makes each write to
        it dearer, by about as much as a system call costs.
        """
        cdef Epoll epoll
        cdef Py_ssize_t i
        if self.epoll is None:
            epoll = Epoll()
            epoll.add(self.wake.fds[0], TOKEN_WAKE, _EPOLLIN)
            for i in range(self.own.count):
                epoll.add(self.own.fds[i], i, _EPOLLIN)
            if self.watched >= 0:
                epoll.add(self.watched, TOKEN_NEWS, _EPOLLIN)
            self.epoll = epoll
        return self.epoll

    @cython.binding(False)
    def ring(self, peer, Py_ssize_t vector=0):
        """Interrupt `vector` of the peer with id `peer`.

        One write to an eventfd. It does not wait for the peer, and cannot tell whether it listens;
        a peer whose counter is full has an interrupt pending already, which is success. (Such a
        peer, if it also cleared O_NONBLOCK on its eventfd, can hold this thread, though not the
        interpreter, until a signal arrives. Signaller never waits, and costs four times as much.)

        A guest's device rings by one 32-bit store to its Doorbell register. It cannot tell who is
        there: ringing nobody is silently nothing.

        Raises:
            NoSuchPeer: nobody with that id is connected.
            NoSuchVector: the peer has no such vector.
            ClosedError: the endpoint is closed.
        """
        cdef FdArray bells
        cdef PyObject *found
        cdef int fd, code
        cdef Py_ssize_t number
        cdef uint64_t one = 1
        cdef ssize_t n
        if self.registers is not None:
            self.check()
            number = peer
            if not (0 <= number <= 0xFFFF and 0 <= vector < self.bells_each):
                self._missing(peer, vector)
            self.registers.put(self.doorbell, <uint32_t>(number << 16 | vector))
            return
        while True:
            self.check()
            found = PyDict_GetItem(self.bells, peer)
            if found != NULL:
                bells = <FdArray>found
                if 0 <= vector < bells.count:
                    break
            self._missing(peer, vector)
        fd = bells.fds[vector]
        bells.users += 1
        try:
            while True:
                with nogil:
                    n = c_write(fd, &one, sizeof(one))
                    code = errno
                if n >= 0 or code == EAGAIN:
                    return
                if code != EINTR:
                    _fail_with(code)
                PyErr_CheckSignals()
        finally:
            bells.done()

    @cython.binding(False)
    def wait(self, vector=None, timeout=None):
        """Wait for an interrupt, at most `timeout` seconds (None: for as long as it takes).

        Args:
            vector: the one to wait for; None: any.

        Returns:
            For a given vector: how often it was rung since the last look, 0 when the time is over.
            For any: an Interrupt(vector, rings), None when the time is over.
            Rings coalesce in the count: never count messages by interrupts.

        Raises:
            NoSuchVector: this endpoint has no such vector.
            ClosedError: the endpoint is closed, or was closed by another thread meanwhile.
        """
        cdef int64_t deadline
        cdef Py_ssize_t index
        cdef uint64_t count
        self.check()
        if vector is None:
            return self.wait_any(_deadline(timeout), False)
        index = vector
        if not 0 <= index < self.own.count:
            raise NoSuchVector(f"vector {index}: this endpoint has {self.own.count} vectors")
        count = self.take(index)
        if count:
            return count
        deadline = _deadline(timeout)
        if deadline == 0 and not self.urgent:
            return 0
        return self.wait_one(index, deadline)

    cdef object wait_one(self, Py_ssize_t index, int64_t deadline):
        cdef pollfd fds[3]
        cdef timespec left
        cdef int64_t nanoseconds
        cdef uint64_t count
        cdef int n, code
        fds[0].fd = self.own.fds[index]
        fds[1].fd = self.wake.fds[0]
        fds[2].fd = self.watched
        fds[0].events = fds[1].events = fds[2].events = _POLLIN
        self.waiters += 1
        try:
            while True:
                if deadline != INT64_MAX:
                    nanoseconds = max(deadline - _now(), <int64_t>0)
                    left.tv_sec = nanoseconds // 1000000000
                    left.tv_nsec = nanoseconds % 1000000000
                with nogil:
                    n = ppoll(
                        fds,
                        3 if self.urgent else 2,
                        NULL if deadline == INT64_MAX else &left,
                        NULL,
                    )
                    code = errno
                if self.gone:
                    raise ClosedError("the endpoint was closed while waiting")
                if n < 0:
                    if code != EINTR:
                        _fail_with(code)
                    PyErr_CheckSignals()
                    continue
                if n == 0:
                    return 0
                count = self.take(index)
                if count:
                    return count
                if self.urgent and fds[2].revents:
                    self._news()
                # Another thread, or a hostile peer, took it, perhaps again and again.
                PyErr_CheckSignals()
                if deadline != INT64_MAX and _now() >= deadline:
                    return 0
        finally:
            self.leave()

    def _wait_event(self, timeout=None):
        """Like wait(), but returns True as soon as `_news()` was called."""
        self.check()
        return self.wait_any(_deadline(timeout), True)

    cdef object wait_any(self, int64_t deadline, bint for_news):
        cdef epoll_event event
        cdef int rounds = 0
        cdef int epfd = self.anything().epfd
        cdef uint64_t count
        cdef int n
        self.waiters += 1
        try:
            while True:
                n = _epoll_sleep(epfd, &event, 1, deadline)
                if self.gone:
                    raise ClosedError("the endpoint was closed while waiting")
                if n < 0:
                    continue
                if n == 0:
                    return None
                if event.data.u64 == TOKEN_NEWS:
                    self._news()
                    if for_news:
                        return True
                elif event.data.u64 < TOKEN_NEWS:
                    count = self.take(event.data.u64)
                    if count:
                        return Interrupt(event.data.u64, count)
                # What is ready all the time, by somebody's ill will, does not defeat the deadline.
                PyErr_CheckSignals()
                if deadline and deadline != INT64_MAX and _now() >= deadline:
                    deadline = 0
                elif deadline == 0:
                    rounds += 1
                    if rounds == BATCH:
                        return None
        finally:
            self.leave()

    cdef uint64_t take(self, Py_ssize_t index) except? 0:
        """How often a vector was rung since the last look; 0 when it was not."""
        cdef int32_t count
        cdef ssize_t n
        if not self.uio:
            return _take(self.own.fds[index])
        n = c_read(self.own.fds[index], &count, sizeof(count))
        if n < 0:
            if errno != EAGAIN and errno != EINTR:
                _fail()
            return 0
        if n != sizeof(count):
            raise OSError(EINVAL, "what was opened is no UIO device")
        n = <uint32_t>count - <uint32_t>self.uio_count  # it wraps
        self.uio_count = count
        return n

    cdef void leave(self) noexcept:
        """One waiter less; the last one out of a closed endpoint closes the descriptors."""
        self.waiters -= 1
        if self.gone and self.waiters == 0:
            self.release()

    cdef void release(self) noexcept:
        self.own.close()
        self.wake.close()
        self.queued.close()
        if self.outer is not None:
            self.outer.close()
        if self.epoll is not None:
            self.epoll.close()

    def close(self):
        """Stop ringing and listening; waiters get ClosedError. May be called twice."""
        if self.gone:
            return
        self._unwatch()
        self.gone = True
        for bells in self.bells.values():
            if bells is not self.own:
                (<FdArray>bells).close()
        self.bells.clear()
        # In a forked child the waiters are threads of the parent, and the eventfd is its, too.
        if self.waiters and getpid() == self.pid:
            self.wake.signal(0)
        else:
            self.release()


cdef uint64_t _take(int fd) except? 0:
    """The count of an eventfd, set back to 0; 0 when nobody rang. Never blocks.

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
            return count
        if n >= 0:
            raise OSError(EINVAL, "a vector's descriptor is no eventfd")
        if errno == EAGAIN:
            return 0
        if errno != EINTR:
            _fail()


cdef bint _counts(int fd) noexcept:
    """Whether `fd` reads like an eventfd: less than 8 bytes are EINVAL, and its count stays."""
    cdef char data[7]
    cdef iovec iov
    iov.iov_base = data
    iov.iov_len = sizeof(data)
    return preadv2(fd, &iov, 1, -1, RWF_NOWAIT) < 0 and errno == EINVAL
