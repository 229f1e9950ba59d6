# cython: language_level=3, binding=True, freethreading_compatible=False
# cython: embedsignature=True, embedsignature.format=clinic
"""The data path: the doorbells that an endpoint rings, and those that it listens on.

Knows: ringing, listening, sleeping. Does not know: who the peers are.
"""

cimport cython
from cpython.dict cimport PyDict_GetItem
from cpython.exc cimport PyErr_CheckSignals
from cpython.ref cimport PyObject
from libc.stdint cimport int32_t, INT64_MAX, int64_t, uint32_t, uint64_t

from ._fds cimport (
    BATCH, deadline_of, Epoll, epoll_sleep, fail, fail_with, FdArray, is_eventfd, now, Relay,
    take_count,
)
from ._libc cimport (
    c_read, c_write, EAGAIN, EINTR, EINVAL, epoll_event, errno, getpid,
    ivshmem_is_only_thread, pollfd, PyNumber_AsSsize_t, ppoll, timespec,
)
from ._libc cimport EPOLLIN as _EPOLLIN
from ._libc cimport POLLIN as _POLLIN
from ._memory cimport Registers

from collections import namedtuple

from .errors import ClosedError, NoSuchVector, ProtocolError

Interrupt = namedtuple("Interrupt", ["vector", "rings"], module="ivshmem")
Interrupt.__doc__ = "A vector of this endpoint was rung `rings` times since it was last waited for."

cdef enum:
    # Tokens of the epoll object in Doorbells; those of vectors are smaller.
    TOKEN_WAKE = 1 << 30
    TOKEN_NEWS = 1 << 29


cdef class Doorbells:
    """The doorbells that an endpoint rings, and those that it listens on.

    A subclass adds peers and vectors with `_add_bell`, `_drop_peer` and `_add_vector`, and
    overrides two hooks: `_news()` is called when the descriptor given to `_watch` is readable, and
    `_missing(peer, vector)` when somebody unknown is rung; it raises, or returns for another try.

    A device rings by a register instead (`_ring_by`), and may listen by UIO (`_listen_uio`).
    """

    cdef dict bells  # peer -> FdArray
    cdef FdArray own
    cdef Registers registers  # whose Doorbell register is at `doorbell`
    cdef Py_ssize_t doorbell
    cdef Py_ssize_t bells_each  # vectors that a peer has there
    cdef bint uio  # the own vector is a UIO device,
    cdef bint uio_known  # and its count at the last look is known:
    cdef int32_t uio_count
    cdef FdArray wake  # one eventfd, written by close() to send the waiters home
    cdef FdArray queued  # one eventfd, readable while the subclass has events that nobody took
    cdef Epoll epoll  # anything(), once it is needed
    cdef Epoll outer  # what fileno() returns: that and queued, once it is needed
    cdef int waiters
    cdef bint gone
    cdef int watched
    cdef bint urgent  # what is watched interrupts waiting for one vector, too
    cdef Relay relay  # the own eventfds are this process's alone, and hear of what is urgent
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

    def _listen_alone(self, Relay relay not None):
        """Sleep in plain reads of the own eventfds, which nobody else has and which may block.

        That is the quickest there is. `relay` leads from what is watched to all of them.
        """
        self.relay = relay

    def _add_vector(self, int fd):
        """Listen on `fd` as the next vector; takes it, also when this fails.

        Raises:
            ProtocolError: it is no eventfd.
        """
        self.own.take(fd)
        if not is_eventfd(fd):
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

        Reading 4 bytes waits for the next interrupt, and tells how many there have ever been.
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
            take_count(self.queued.fds[0])

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
            number = PyNumber_AsSsize_t(peer, NULL)  # what is out of range stays so
            while not (0 <= number <= 0xFFFF and 0 <= vector < self.bells_each):
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
                if ivshmem_is_only_thread():
                    n = c_write(fd, &one, sizeof(one))
                    code = errno
                else:
                    with nogil:
                        n = c_write(fd, &one, sizeof(one))
                        code = errno
                if n >= 0 or code == EAGAIN:
                    return
                if code != EINTR:
                    fail_with(code)
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
            return self.wait_any(deadline_of(timeout), False)
        index = vector
        if not 0 <= index < self.own.count:
            raise NoSuchVector(f"vector {index}: this endpoint has {self.own.count} vectors")
        if timeout is None and self.relay is not None:
            return self.read_one(index)
        count = self.take(index)
        if count:
            return count
        deadline = deadline_of(timeout)
        if deadline == 0 and not self.urgent:
            return 0
        return self.wait_one(index, deadline)

    cdef object read_one(self, Py_ssize_t index):
        """Wait in a plain read, which close() and the relay end by adding to the count."""
        cdef int fd = self.own.fds[index]
        cdef uint64_t count = 0
        cdef ssize_t n
        cdef int code
        self.waiters += 1
        try:
            while True:
                if self.relay.fired():
                    self._news()
                with nogil:
                    n = c_read(fd, &count, sizeof(count))
                    code = errno
                if self.gone:
                    raise ClosedError("the endpoint was closed while waiting")
                if n == sizeof(count):
                    if not self.relay.fired():
                        return count
                elif code != EINTR:
                    fail_with(code)
                else:
                    PyErr_CheckSignals()
        finally:
            if self.waiters > 1 and (self.gone or self.relay.fired()):
                self.own.signal(index)  # another may sleep in the same read
            self.leave()

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
                    nanoseconds = max(deadline - now(), <int64_t>0)
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
                        fail_with(code)
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
                if deadline != INT64_MAX and now() >= deadline:
                    return 0
        finally:
            self.leave()

    def _wait_event(self, timeout=None):
        """Like wait(), but returns True as soon as `_news()` was called."""
        self.check()
        return self.wait_any(deadline_of(timeout), True)

    cdef object wait_any(self, int64_t deadline, bint for_news):
        cdef epoll_event event
        cdef int rounds = 0
        cdef int epfd = self.anything().epfd
        cdef uint64_t count
        cdef int n
        self.waiters += 1
        try:
            while True:
                n = epoll_sleep(epfd, &event, 1, deadline)
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
                if deadline and deadline != INT64_MAX and now() >= deadline:
                    deadline = 0
                elif deadline == 0:
                    rounds += 1
                    if rounds == BATCH:
                        return None
        finally:
            self.leave()

    cdef uint64_t take(self, Py_ssize_t index) except? 0:
        """How often a vector was rung since the last look; 0 when it was not."""
        cdef uint64_t total
        cdef int32_t count
        cdef ssize_t n
        if not self.uio:
            total = take_count(self.own.fds[index])
            if total and self.relay is not None and self.relay.fired():
                self._news()  # the relay's doing, and not a ring
            return total
        n = c_read(self.own.fds[index], &count, sizeof(count))
        if n < 0:
            if errno != EAGAIN and errno != EINTR:
                fail()
            return 0
        if n != sizeof(count):
            raise OSError(EINVAL, "what was opened is no UIO device")
        # It counts since the driver was loaded, and wraps.
        n = <uint32_t>count - <uint32_t>self.uio_count if self.uio_known else 1
        self.uio_count = count
        self.uio_known = True
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
            if self.relay is not None:
                for index in range(self.own.count):
                    self.own.signal(index)
        else:
            self.release()
