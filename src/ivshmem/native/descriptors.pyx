# cython: language_level=3, binding=True, freethreading_compatible=True
# cython: embedsignature=True, embedsignature.format=clinic
"""Descriptors at C speed: eventfds, epoll, timers, and signals to eventfds that others share.

Knows: system calls, and how to wait, retry and clean up around them.
Does not know: what a descriptor means, any default or policy.

Invariants, of all modules in Cython:
1. Every descriptor has one owner, which closes it once; a plain int argument is borrowed,
   unless the name says `take`.
2. A descriptor is not closed while a call that runs without the GIL uses it: the last such call
   closes it (`ivshmem_enter`, `ivshmem_leave`, `ivshmem_shut`). Nor is it closed while the GIL, or
   a critical section of its owner, is held.
3. Another process can clear O_NONBLOCK of a shared descriptor. No call blocks because of that,
   except those that ring by a plain write: see Doorbells.ring and ring_nowait.
4. Blocking calls keep their deadline across EINTR and let signal handlers run at once.
"""

cimport cython
from cpython.exc cimport PyErr_CheckSignals, PyErr_SetFromErrno
from libc.stdint cimport INT64_MAX, int64_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset, strerror

from .syscalls cimport (
    aio_context_t, c_close, c_eventfd, c_fstat, CLOCK_MONOTONIC, EAGAIN, EFD_CLOEXEC, EFD_NONBLOCK,
    EINTR, EINVAL, ENOSYS, EPOLL_CLOEXEC, epoll_create1, epoll_ctl, EPOLL_CTL_ADD,
    EPOLL_CTL_DEL, EPOLL_CTL_MOD, epoll_event, epoll_wait, errno, file_stat, getpid, iocb,
    IOCB_CMD_POLL, IOCB_CMD_PREAD, IOCB_FLAG_RESFD, iovec, itimerspec, IVSHMEM_CLOSING,
    ivshmem_enter, ivshmem_fork_sharing_files, ivshmem_io_any_end, ivshmem_io_destroy,
    ivshmem_io_forget, ivshmem_io_has_ring, ivshmem_io_setup, ivshmem_io_submit, ivshmem_leave,
    ivshmem_set_elements, ivshmem_set_length, ivshmem_shut, pollfd, POLLOUT, ppoll, preadv2,
    PyOS_AfterFork_Child, PyOS_AfterFork_Parent, PyOS_BeforeFork, RWF_NOWAIT, TFD_CLOEXEC,
    TFD_NONBLOCK, timerfd_create, timerfd_settime, timespec, writev,
)
from .syscalls cimport EPOLLERR as _EPOLLERR
from .syscalls cimport EPOLLHUP as _EPOLLHUP
from .syscalls cimport EPOLLIN as _EPOLLIN
from .syscalls cimport EPOLLOUT as _EPOLLOUT

import os
import weakref

from ..errors import ClosedError
from .ringers import ring as ring_by_thread

cdef extern from "<fcntl.h>" nogil:
    int c_openat "openat"(int directory, const char *path, int flags, unsigned int mode)
    int fcntl(int fd, int command, int argument)
    enum: AT_FDCWD, O_CLOEXEC, F_DUPFD_CLOEXEC

cdef extern from *:
    """
    #include <errno.h>
    #include <sys/mman.h>
    #include <sys/syscall.h>
    #include <unistd.h>

    /* A system call, because older C libraries lack it: glibc before 2.28, musl before 1.2.6. */
    static inline long ivshmem_rename_exclusive(int directory, const char *from, const char *to)
    {
    #ifdef SYS_renameat2
        return syscall(SYS_renameat2, directory, from, directory, to, 1); /* RENAME_NOREPLACE */
    #else
        errno = ENOSYS;
        return -1;
    #endif
    }
    """
    long ivshmem_rename_exclusive(int directory, const char *source, const char *target) nogil
    int memfd_create(const char *name, unsigned int flags) nogil
    enum: MFD_CLOEXEC

EPOLLIN = _EPOLLIN
EPOLLOUT = _EPOLLOUT
EPOLLERR = _EPOLLERR
EPOLLHUP = _EPOLLHUP

# -- time and errors ------------------------------------------------------------------------------

cdef int64_t deadline_of(object timeout) except -1:
    """Return the monotonic nanoseconds at which `timeout` seconds end (None: never)."""
    cdef double seconds
    if timeout is None:
        return INT64_MAX
    seconds = seconds_of(timeout)
    if seconds <= 0:
        return 0
    if seconds > 1e9:  # 31 years
        return INT64_MAX
    return now() + <int64_t>(seconds * 1e9)


cdef int fail() except -1:
    PyErr_SetFromErrno(OSError)
    return -1


# -- descriptors ----------------------------------------------------------------------------------

@cython.final
cdef class Fd:
    """A new descriptor that has no owner yet; it is closed if no owner takes it.

    If a call in C returned a plain number, and a signal handler raised before the caller's next
    line, nobody would close the descriptor. Therefore such a call returns an Fd. Only code in C
    takes it (`FdArray.take`, for example), so that no signal handler can run in between.
    """

    def __cinit__(self):
        self.number = -1

    @property
    def taken(self):
        """Whether it has an owner or was closed."""
        return self.number < 0

    def fileno(self):
        """Return the descriptor, which this object still owns."""
        if self.number < 0:
            raise ClosedError("the descriptor was taken or closed")
        return self.number

    @cython.critical_section
    def close(self):
        """Close it, unless it has an owner. May be called twice."""
        if self.number >= 0:
            c_close(self.number)
        self.number = -1

    def __dealloc__(self):
        if self.number >= 0:
            c_close(self.number)


cdef int taken(object fd) except? -1:
    """Return the number of `fd`, an Fd or a number. The caller owns the descriptor from now on."""
    cdef Fd given
    cdef int number
    if not isinstance(fd, Fd):
        return fd
    given = fd
    with cython.critical_section(given):
        number, given.number = given.number, -1
    if number < 0:
        raise ClosedError("the descriptor was taken or closed")
    return number


@cython.final
cdef class FdArray:
    """File descriptors that it owns, in order; for instance one eventfd for each vector of a peer.

    `close()` closes all of them, once. If a call of another thread uses one of them, that call
    closes them when it returns. A closed array has length 0.
    """

    def __cinit__(self):
        self.fds = NULL

    @staticmethod
    def eventfds(Py_ssize_t count):
        """Return an array of `count` new eventfds: counter mode, non-blocking, close-on-exec.

        Raises:
            OSError: EMFILE, ENFILE or ENOMEM. Then no descriptor is left open.
        """
        cdef FdArray array = FdArray()
        cdef int fd
        for _ in range(count):
            fd = c_eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
            if fd < 0:
                try:
                    fail()
                finally:
                    array.close()
            array.add(fd)
        return array

    @staticmethod
    def copy(int fd):
        """Return an array of one copy of `fd`, made as by dup(2), close-on-exec.

        Raises:
            OSError: EBADF or EMFILE.
        """
        cdef FdArray array = FdArray()
        cdef int other = fcntl(fd, F_DUPFD_CLOEXEC, 0)
        if other < 0:
            fail()
        array.add(other)
        return array

    def open(self, path, int flags, unsigned int mode=0o777, *, int dir_fd=AT_FDCWD):
        """Call open(2) and append the descriptor, close-on-exec; return it.

        The array owns it. No signal handler can run between open(2) and that.

        Raises:
            OSError: as open(2), with the path.
        """
        cdef bytes where = os.fsencode(path)
        cdef const char *text = where
        cdef int fd, code
        if b"\0" in where:
            raise ValueError("embedded null byte")
        while True:
            with nogil:
                fd = c_openat(dir_fd, text, flags | O_CLOEXEC, mode)
                code = errno
            if fd >= 0:
                self.add(fd)
                return fd
            if code != EINTR:
                raise OSError(code, os.strerror(code), path)
            PyErr_CheckSignals()

    def memfd(self, name, unsigned int flags):
        """Call memfd_create(2) and append the descriptor, as `open` does; return it.

        Raises:
            OSError: as memfd_create(2).
        """
        cdef bytes called = os.fsencode(name)
        cdef int fd = memfd_create(called, flags | MFD_CLOEXEC)
        if fd < 0:
            fail()
        self.add(fd)
        return fd

    def take(self, fd):
        """Append `fd`, a number or an Fd. The array owns it from now on, even if this raises."""
        self.add(taken(fd))

    @cython.critical_section
    cdef int add(self, int fd) except -1:
        cdef int *grown
        cdef Py_ssize_t i
        if self.state & IVSHMEM_CLOSING:
            c_close(fd)
            raise ClosedError("the descriptors are closed")
        if self.count == self.room:
            # A thread that reads `fds` without the GIL may have the old address: keep it valid.
            grown = NULL
            if self.outgrown_count < OUTGROWN:
                grown = <int *>malloc((self.room * 2 + 1) * sizeof(int))
            if grown == NULL:
                c_close(fd)
                raise MemoryError
            for i in range(self.count):
                grown[i] = self.fds[i]
            self.outgrown[self.outgrown_count] = self.fds
            self.outgrown_count += 1
            ivshmem_set_elements(&self.fds, grown)
            self.room = self.room * 2 + 1
        self.fds[self.count] = fd
        ivshmem_set_length(&self.count, self.count + 1)
        return 0

    def __len__(self):
        return 0 if self.state & IVSHMEM_CLOSING else self.count

    @cython.critical_section
    def __getitem__(self, Py_ssize_t index):
        """Return the descriptor, which the array still owns."""
        if index < 0 or index >= len(self):
            raise IndexError(f"descriptor {index} of {len(self)}")
        return self.fds[index]

    @cython.critical_section
    def __iter__(self):
        """The descriptors that are here now; another thread's `close` ends no iteration early."""
        return iter([self.fds[i] for i in range(len(self))])

    def signal(self, Py_ssize_t index):
        """Add 1 to eventfd `index`, which no other process may have; do nothing if closed."""
        cdef int code
        if not ivshmem_enter(&self.state):
            return
        code = add_one(self.fds[index]) if 0 <= index < self.count else 0
        self.leave()
        if code:
            fail_with(code)

    def ring(self, int fd):
        """Add 1 to `fd`, an eventfd of this array; do nothing if closed. A peer can make it wait.

        Not for the main thread: it takes EINTR for no reason to run signal handlers.
        """
        cdef int code = EINTR
        if not ivshmem_enter(&self.state):
            return
        with nogil:
            while code == EINTR:
                code = add_one(fd)
        self.leave()

    def drain(self, Py_ssize_t index):
        """Set the count of eventfd `index` to 0, and return what it was.

        It never blocks, whatever other processes that have the eventfd do.
        """
        return take_count(self[index])

    cdef void release(self) noexcept nogil:
        cdef Py_ssize_t i
        cdef Py_ssize_t count = self.count
        ivshmem_set_length(&self.count, 0)
        for i in range(count):
            c_close(self.fds[i])

    cdef bint enter(self) noexcept nogil:
        """Count one more user, and return True; return False if the array is closed."""
        return ivshmem_enter(&self.state)

    cdef void leave(self) noexcept nogil:
        """Count one user less. The last user of a closed array closes the descriptors."""
        if ivshmem_leave(&self.state):
            self.release()

    @cython.critical_section
    def close(self):
        if ivshmem_shut(&self.state):
            self.release()

    def __dealloc__(self):
        cdef int i
        self.release()
        free(self.fds)
        for i in range(self.outgrown_count):
            free(self.outgrown[i])


@cython.final
cdef class Signaller:
    """Adds 1 to eventfds that other processes have, too, and never waits for these processes.

    A plain write waits if a process has filled the counter and cleared O_NONBLOCK, as each process
    that has the eventfd can. A signal of the kernel does not wait: at the end of a request with
    IOCB_FLAG_RESFD, io_submit(2) adds 1 to an eventfd. The request here is to read a byte of
    /dev/zero, which ends at once. One eventfd costs about three times as much as a write. With 64
    in one call each costs one and a half times as much.

    Raises:
        OSError: no /dev/zero; EAGAIN: fs.aio-max-nr is used up; ENOSYS: this kernel has no AIO.
    """

    def __cinit__(self):
        self.context = 0
        self.zero = -1
        self.pid = getpid()
        self.zero = os.open("/dev/zero", os.O_RDONLY | os.O_CLOEXEC)
        # A request counts until its end is taken off the ring. Each call does that for its own.
        if ivshmem_io_setup(BATCH, &self.context) < 0:
            try:
                fail()
            finally:
                self.close()

    def signal(self, fds):
        """Add 1 to each eventfd of a sequence. A full counter stays full."""
        cdef int batch[BATCH]
        cdef Py_ssize_t first
        cdef long count
        cdef unsigned int number
        if self.zero < 0:
            raise ClosedError("the signaller is closed")
        for first in range(0, len(fds), BATCH):
            count = 0
            for fd in fds[first : first + BATCH]:
                number = fd
                batch[count] = <int>number
                count += 1
            self.submit(batch, count)

    cdef int submit(self, int *fds, long count) except -1:
        """Add 1 to each of at most 64 eventfds.

        If one of `fds` is not an eventfd, those before it are done, and OSError is raised.
        """
        cdef int code
        with cython.critical_section(self):
            if self.zero < 0:
                raise ClosedError("the signaller is closed")
            code = self.send(fds, count)
        if code:
            fail_with(code)
        return 0

    cdef int send(self, int *fds, long count) noexcept nogil:
        """Do what `submit` does; return 0 or errno. No other thread may use this object now."""
        cdef iocb requests[BATCH]
        cdef iocb *pointers[BATCH]
        cdef char byte[1]
        cdef long i, n
        cdef long done = 0
        memset(requests, 0, count * sizeof(iocb))
        for i in range(count):
            requests[i].aio_lio_opcode = IOCB_CMD_PREAD
            requests[i].aio_fildes = self.zero
            requests[i].aio_buf = <uint64_t>&byte[0]
            requests[i].aio_nbytes = 1
            requests[i].aio_flags = IOCB_FLAG_RESFD
            requests[i].aio_resfd = fds[i]
            pointers[i] = &requests[i]
        while done < count:
            n = ivshmem_io_submit(self.context, count - done, &pointers[done])
            if n >= 0:
                done += n
                ivshmem_io_forget(self.context, n)
            elif errno != EINTR and errno != EAGAIN:
                return errno
        return 0

    @cython.critical_section
    def close(self):
        if self.context and getpid() == self.pid:
            ivshmem_io_destroy(self.context)
        self.context = 0
        if self.zero >= 0:
            c_close(self.zero)
        self.zero = -1

    def __dealloc__(self):
        self.close()


# All endpoints of a process share a Signaller: fs.aio-max-nr has room for a few hundred in all.
cdef object _shared = None


cdef Signaller shared_signaller():
    """Return the Signaller of this process, which lives as long as it is used; None: none can be.

    None, if the kernel has no AIO, or descriptors or fs.aio-max-nr are used up. Then a thread
    writes for `add_one_nowait`.
    """
    global _shared
    cdef Signaller signaller = None if _shared is None else _shared()
    if signaller is None or signaller.pid != getpid():
        try:
            signaller = Signaller()
        except OSError:
            return None
        _shared = weakref.ref(signaller)
    return signaller


cdef int add_one_nowait(Signaller signaller, FdArray bells, int fd) except -1:
    """Add 1 to an eventfd that other processes have, too, without waiting for them.

    Args:
        signaller: None: a thread of `ringers` writes. If no thread can be started either, this one
            looks for room in the counter, and writes.
        bells: has `fd`, and has been entered by the caller.
    """
    cdef int code = EINTR
    if signaller is not None:
        return signaller.submit(&fd, 1)
    if not has_room(fd) or ring_by_thread(bells.ring, fd):
        return 0
    while code == EINTR:
        PyErr_CheckSignals()
        code = add_one(fd)
    if code:
        fail_with(code)
    return 0


cdef bint has_room(int fd) noexcept nogil:
    """Whether the counter is not full: if it is, an interrupt is already pending."""
    cdef pollfd one
    cdef timespec none
    none.tv_sec = none.tv_nsec = 0
    one.fd = fd
    one.events = POLLOUT
    return ppoll(&one, 1, &none, NULL) == 1 and one.revents & POLLOUT


@cython.final
cdef class Relay:
    """Adds 1 to each of some eventfds when a descriptor becomes readable: once, without a thread.

    Therefore a thread that sleeps in a plain read of one of these eventfds is also woken by the
    other descriptor. The kernel does it, since Linux 4.18: io_submit(2) polls the descriptor, and
    at the end of the poll adds 1 to the eventfd (IOCB_FLAG_RESFD).

    Args:
        source: borrowed, as are `targets`. It must stay open as long as this object is.

    Raises:
        OSError: EAGAIN: fs.aio-max-nr is used up; ENOSYS or EINVAL: this kernel cannot do it.
    """

    def __cinit__(self, int source, targets):
        cdef iocb request
        cdef iocb *pointer = &request
        self.context = 0
        self.pid = getpid()
        try:
            if ivshmem_io_setup(max(len(targets), 1), &self.context) < 0:
                fail()
            if not ivshmem_io_has_ring(self.context):
                fail_with(ENOSYS)
            for fd in targets:
                memset(&request, 0, sizeof(iocb))
                request.aio_lio_opcode = IOCB_CMD_POLL
                request.aio_fildes = source
                request.aio_buf = _EPOLLIN  # which is POLLIN
                request.aio_flags = IOCB_FLAG_RESFD
                request.aio_resfd = fd
                if ivshmem_io_submit(self.context, 1, &pointer) < 0:
                    fail()
        except BaseException:
            self.close()
            raise

    cdef bint fired(self) noexcept nogil:
        """Whether that has happened. This takes no system call: the kernel's ring shows it."""
        return self.context != 0 and ivshmem_io_any_end(self.context)

    def close(self):
        """Stop the polls. May be called twice."""
        cdef aio_context_t context = self.context
        self.context = 0
        if context and getpid() == self.pid:
            ivshmem_io_destroy(context)

    def __dealloc__(self):
        self.close()


@cython.final
cdef class Epoll:
    """An epoll object whose events carry a token instead of a descriptor.

    The kernel gives a closed descriptor's number to the next file. An event that was fetched before
    could then be taken for one of that file. A token that is never used twice avoids this.
    """

    def __cinit__(self):
        self.epfd = -1
        self.epfd = epoll_create1(EPOLL_CLOEXEC)
        if self.epfd < 0:
            fail()

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
            fail()
        return 0

    def add(self, int fd, uint64_t token, unsigned int events):
        """Watch `fd`. EPOLLHUP and EPOLLERR are reported even if `events` is 0."""
        self.control(EPOLL_CTL_ADD, fd, events, token)

    def modify(self, int fd, uint64_t token, unsigned int events):
        self.control(EPOLL_CTL_MOD, fd, events, token)

    def remove(self, int fd):
        self.control(EPOLL_CTL_DEL, fd, 0, 0)

    def wait(self, timeout=None):
        """Wait for events, and return a list of (token, events).

        The list is empty if nothing happened for `timeout` seconds (None: no limit).
        """
        cdef epoll_event events[BATCH]
        cdef int64_t deadline = deadline_of(timeout)
        cdef int n
        cdef int epfd = self.fileno()
        while True:
            n = epoll_sleep(epfd, events, BATCH, deadline)
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


cdef int epoll_sleep(int epfd, epoll_event *events, int limit, int64_t deadline) except -2:
    """Call epoll_wait until `deadline`; return -1 if a signal handler ran: call this again."""
    cdef int64_t left
    cdef int milliseconds, n, code
    if deadline == INT64_MAX:
        milliseconds = -1
    else:
        left = deadline - now() if deadline else 0
        # Round up: otherwise the last fraction of a millisecond would be spent spinning.
        milliseconds = <int>min((left + 999999) // 1000000, <int64_t>2147483647) if left > 0 else 0
    with nogil:
        n = epoll_wait(epfd, events, limit, milliseconds)
        code = errno
    if n >= 0:
        return n
    if code != EINTR:
        fail_with(code)
    PyErr_CheckSignals()
    return -1


cdef int fail_with(int code) except -1:
    raise OSError(code, strerror(code).decode())


@cython.final
cdef class Timer:
    """A descriptor that becomes readable at a set time (timerfd_create(2))."""

    cdef int fd

    def __cinit__(self):
        self.fd = -1
        self.fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK)
        if self.fd < 0:
            fail()

    def fileno(self):
        if self.fd < 0:
            raise ClosedError("the timer is closed")
        return self.fd

    def set(self, double seconds):
        """Make the descriptor readable `seconds` from now, and not before. 0: never."""
        cdef itimerspec spec
        memset(&spec, 0, sizeof(spec))
        spec.it_value.tv_sec = <long>seconds
        spec.it_value.tv_nsec = <long>((seconds - <long>seconds) * 1e9)
        if timerfd_settime(self.fileno(), 0, &spec, NULL) < 0:
            fail()

    def close(self):
        cdef int fd = self.fd
        self.fd = -1
        if fd >= 0:
            c_close(fd)

    def __dealloc__(self):
        if self.fd >= 0:
            c_close(self.fd)


def fork_sharing_files():
    """Do what os.fork does, but share the table of descriptors: clone(2) with CLONE_FILES.

    A descriptor that one process opens is in the other as well. When one process ends, the kernel
    closes nothing.

    Raises:
        OSError: as fork(2).
    """
    cdef long pid
    cdef int code
    PyOS_BeforeFork()
    pid = ivshmem_fork_sharing_files()
    code = errno
    if pid == 0:
        PyOS_AfterFork_Child()
        return 0
    PyOS_AfterFork_Parent()
    if pid < 0:
        fail_with(code)
    return pid


def rename_exclusive(int directory, source, target):
    """Rename in an open directory, unless `target` exists: renameat2(2), RENAME_NOREPLACE.

    Raises:
        OSError: EEXIST; EINVAL or ENOSYS if the file system or the kernel cannot do it.
    """
    cdef bytes old = os.fsencode(source)
    cdef bytes new = os.fsencode(target)
    cdef const char *old_text = old
    cdef const char *new_text = new
    cdef long result
    with nogil:
        result = ivshmem_rename_exclusive(directory, old_text, new_text)
    if result < 0:
        fail()


cdef int64_t take_count(int fd) except -1:
    """Do what `look` does, but raise OSError on failure."""
    cdef int64_t count = look(fd)
    if count == -EINVAL:
        raise OSError(EINVAL, "a vector's descriptor is not an eventfd")
    if count < 0:
        fail_with(<int>-count)
    return count


def count_of_eventfd(int fd):
    """Return the count of an eventfd without changing it: proc_pid_fdinfo(5)."""
    with open(f"/proc/self/fdinfo/{fd}", "rb") as info:
        for line in info:
            if line.startswith(b"eventfd-count:"):
                return int(line.split()[1], 16)
    raise OSError(EINVAL, "a vector's descriptor is not an eventfd")


cdef bint is_eventfd(int fd, int known) noexcept nogil:
    """Whether `fd` is an eventfd. `known` is a descriptor that is one.

    Three tests, none of which changes a count:
    - Both have the inode that all anonymous files share. So `fd` is not a pipe, not a socket, and
      not a file of a user's own file system, where a write could wait without end.
    - A read of less than 8 bytes fails with EINVAL. Timers, signalfds and epoll objects do that,
      too.
    - A writev(2) of no bytes succeeds. Those other objects cannot be written.
    """
    cdef char data[7]
    cdef iovec iov
    cdef file_stat one, other
    if c_fstat(fd, &one) < 0 or c_fstat(known, &other) < 0:
        return False
    if one.st_dev != other.st_dev or one.st_ino != other.st_ino:
        return False
    iov.iov_base = data
    iov.iov_len = sizeof(data)
    if preadv2(fd, &iov, 1, -1, RWF_NOWAIT) >= 0 or errno != EINVAL:
        return False
    iov.iov_len = 0
    return writev(fd, &iov, 1) == 0
