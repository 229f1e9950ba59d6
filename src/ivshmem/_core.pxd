"""Doorbells for other modules in Cython: ringing, waiting and whole loops without the interpreter.

`cimport` it from code that is compiled against the installed package:

    from ivshmem._core cimport Doorbell, Doorbells

    cdef Doorbells endpoint = ivshmem.connect(path)
    cdef Doorbell peer = endpoint.doorbell(3, 0)
    cdef Wait wait
    with nogil:
        begin_wait(&wait, -1, SPIN_AUTO)
        rings = endpoint.wait_nogil(0, &wait)
        if rings < 0:
            with gil:
                endpoint.attend(rings)  # and then wait_nogil again, with the same `wait`
        code = peer.ring_nogil()
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from .native.bell cimport Doorbell, Handler
from .native.descriptors cimport deadline_in, Epoll, FdArray, Relay, Signaller
from .native.mapping cimport Registers
from .native.spin cimport Spinner, Turn

cdef enum:
    # What wait_nogil returns, beside -errno, when `attend` has something to do.
    NEWS = -4096


# One wait, until it has brought something.
cdef struct Wait:
    int64_t deadline
    int64_t spin
    bint alone  # there is no other Python thread: see reads_plainly in _core.pyx
    Turn turn


cdef inline void begin_wait(Wait *wait, int64_t timeout, int64_t spin) noexcept nogil:
    """Both in nanoseconds; `timeout` -1: no limit; `spin` SPIN_AUTO (of native.spin): "auto"."""
    wait.deadline = deadline_in(timeout)
    wait.spin = spin
    wait.alone = False
    wait.turn.left = -1


cdef struct Watched:
    void *address  # of a word, pinned
    bint wide  # 64 bits
    uint64_t old
    uint64_t seen
    void *sleeping  # a word that tells the peer that this call sleeps, or NULL
    bint sleeping_wide


cdef class Doorbells:
    cdef dict bells  # peer -> FdArray
    cdef FdArray own
    cdef Registers registers  # whose Doorbell register is at `register_at`
    cdef Py_ssize_t register_at
    cdef Py_ssize_t bells_each  # vectors that a peer has there
    cdef bint uio  # the own vector is a UIO device,
    cdef bint uio_known  # and its count at the last look is known:
    cdef uint32_t uio_count
    cdef FdArray wake  # one eventfd, written by close() to end all waits
    cdef FdArray queued  # one eventfd, readable while the subclass has events to be taken
    cdef FdArray told  # eventfds to add to after each call that may have taken a ring, or None
    cdef Epoll epoll  # anything(), once it is needed
    cdef Epoll outer  # what fileno() returns: that and queued, once it is needed
    cdef unsigned int state  # calls that wait, and whether it is closed
    cdef uint64_t nonblocking  # of the first 64 vectors: a spin has set O_NONBLOCK
    cdef int sleepers  # how many of these calls sleep in plain reads
    cdef int watched
    cdef bint urgent  # what is watched interrupts waiting for one vector, too
    cdef Relay relay  # adds to the own eventfds, which no other process has, if it is urgent
    cdef Signaller signaller  # once something was rung without waiting
    cdef int pid
    cdef Spinner spinner

    # Rings of one vector since the last look; 0: the time is over; negative: hand it to `attend`,
    # and if that returns, call again with the same `wait`. -EINVAL: no such vector.
    cdef int64_t wait_nogil(self, Py_ssize_t vector, Wait *wait) noexcept nogil
    # Needs the GIL. Lets signal handlers run and takes in news; raises what ends the wait.
    cdef int attend(self, int64_t code) except -1
    # Needs the GIL and releases it: waits, calls the handler, and so on, for `rounds` times or
    # until nothing comes for `timeout`. Returns how often; `stopped` is what the handler returned.
    cdef int64_t serve(
        self,
        Py_ssize_t vector,
        Handler handler,
        void *context,
        int64_t rounds,
        int64_t timeout,
        int64_t spin,
        int *stopped,
    ) except -1
    cpdef Doorbell doorbell(self, peer, Py_ssize_t vector=*)

    # The rest is internal.
    cdef int check(self) except -1
    cdef int enter(self) except -1
    cdef FdArray bells_of(self, peer, Py_ssize_t vector)
    cdef int check_kind(self, int fd, str whose, Py_ssize_t vector) except -1
    cdef Signaller quiet(self)
    cdef list several(self, object peers, object vectors)
    cdef Py_ssize_t ring_several(self, list bells) except -1
    cdef int check_vector(self, Py_ssize_t vector) except -1
    cdef int tell_after_waits(self, int fd) except -1
    cdef Epoll anything(self)
    cdef Epoll watch_all(self)
    cdef object wait_one(self, Py_ssize_t vector, object timeout, int64_t spin)
    cdef object wait_any(self, object timeout, int64_t spin, bint for_news)
    cdef object wait_some(self, object vectors, object timeout, int64_t spin)
    cdef object watch_word(
        self, Watched *watched, Py_ssize_t vector, int64_t deadline, int64_t spin
    )
    cdef int64_t sleep_at_word(
        self, Watched *watched, Py_ssize_t vector, int64_t deadline, bint plainly
    ) noexcept nogil
    cdef int64_t sleep_for(self, Py_ssize_t vector, int64_t deadline, bint plainly) noexcept nogil
    cdef int64_t take(self, Py_ssize_t vector) noexcept nogil
    cdef int64_t take_uio(self, int fd) noexcept nogil
    cdef void leave(self) noexcept nogil
    cdef int wake_sleepers(self) except -1
    cdef void release(self) noexcept
