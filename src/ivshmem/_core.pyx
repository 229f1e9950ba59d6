# cython: language_level=3, binding=True, freethreading_compatible=True
# cython: embedsignature=True, embedsignature.format=clinic
"""Internal, except for `cimport`: the data path, which rings doorbells and waits for interrupts.

Knows: ringing, listening, sleeping. Does not know: which peers there are; when to spin, as
native/spin.pyx does.
"""

cimport cython
from cpython.dict cimport PyDict_GetItemWithError
from cpython.exc cimport PyErr_CheckSignals
from cpython.long cimport PyLong_CheckExact
from cpython.ref cimport PyObject
from libc.stdint cimport INT64_MAX, int64_t, UINT32_MAX, uint32_t, uint64_t
from libc.stdlib cimport free, malloc

from .native.bell cimport Bell, Doorbell, ring_bell
from .native.descriptors cimport (
    add_one, add_one_nowait, BATCH, count_of, deadline_in, deadline_of, Epoll,
    epoll_sleep, fail_with, FdArray, is_eventfd, length_of, look, now, place_of, Relay,
    shared_signaller, Signaller, take_count, taken, time_left,
)
from .native.syscalls cimport (
    c_read, EAGAIN, ECANCELED, EINTR, EINVAL, EIO, epoll_event, epoll_wait, errno, ESHUTDOWN,
    F_SETFL, fcntl, c_close, getpid, IVSHMEM_CLOSING, word_and, ivshmem_count, ivshmem_enter,
    ivshmem_is_only_thread, ivshmem_leave, word_load, word_or, ivshmem_pause, ivshmem_shut,
    ivshmem_state, word_store, O_NONBLOCK, O_RDWR, pollfd, ppoll, PyNumber_AsSsize_t, RELAXED,
    SEQ_CST, timespec,
)
from .native.syscalls cimport EPOLLIN as _EPOLLIN
from .native.syscalls cimport POLLIN as _POLLIN
from .native.mapping cimport Atomic, Registers
from .native.spin cimport HABITS, Probe, spin_of, Spinner, Turn

import contextlib
import os
from collections import namedtuple

from .errors import ClosedError, NoSuchVector, ProtocolError

Interrupt = namedtuple("Interrupt", ["vector", "rings"], module="ivshmem")
Interrupt.__doc__ = "A vector of this endpoint was rung `rings` times since it was last waited for."

cdef object OFF = 0  # the same object as a caller's 0: CPython has one of each small number

cdef enum:
    # Tokens of the epoll object in Doorbells; those of vectors are smaller.
    TOKEN_WAKE = 1 << 30
    TOKEN_NEWS = 1 << 29
    # Habits of the Spinner: one for each of the first vectors, and the last one for any vector.
    ANY = HABITS - 1
    # Nanoseconds. A spin up to so long keeps the GIL if there is no other thread: to release the
    # GIL costs as much as a ring.
    SHORT = 100_000
    LOOKS = 8  # at a word, for each look at an eventfd

# -- plain reads ----------------------------------------------------------------------------------

cdef inline bint reads_plainly(Doorbells self, bint alone) noexcept nogil:
    """Whether a wait without limit is one plain read; `alone`: there is no other Python thread.

    close() by another thread ends such a read by adding to the count. If the eventfd is shared, a
    hostile peer can take that count away again at once. Such an eventfd is read plainly only if no
    other thread could call close().
    """
    return self.relay is not None or alone and not self.urgent and not self.uio


cdef inline bint relay_fired(Doorbells self) noexcept nogil:
    return self.relay is not None and self.relay.fired()


cdef inline int64_t read_plainly(Doorbells self, Py_ssize_t vector) noexcept nogil:
    """Sleep in one read, the quickest way; return 0 if O_NONBLOCK was set.

    All processes that have the eventfd share that flag. It is cleared here whoever set it: only
    this process reads the eventfd, and a writer waits only if the counter is full, which honest
    peers never bring about. close() and a relay end the read by adding to the count.
    """
    cdef uint64_t count = 0
    cdef ssize_t n = 0
    cdef int code = 0
    cdef int fd = place_of(self.own, vector)[0]
    # Either this sees that the endpoint is closing, or wake_sleepers() sees this.
    ivshmem_count(&self.sleepers, 1)
    if not ivshmem_state(&self.state) & IVSHMEM_CLOSING and not relay_fired(self):
        n = c_read(fd, &count, sizeof(count))
        code = errno
    ivshmem_count(&self.sleepers, -1)
    if ivshmem_state(&self.state) & IVSHMEM_CLOSING or relay_fired(self):
        if self.relay is not None:
            add_one(fd)  # other threads may sleep in the same read
        return -ESHUTDOWN if ivshmem_state(&self.state) & IVSHMEM_CLOSING else NEWS
    if n == sizeof(count):
        return count_of(count)
    if code != EAGAIN:
        return -code
    fcntl(fd, F_SETFL, O_RDWR)
    word_and(&self.nonblocking, True, ~(<uint64_t>1 << vector % 64), RELAXED)
    return 0


# -- spins ----------------------------------------------------------------------------------------

cdef inline Probe probe_of(Doorbells self, Py_ssize_t vector, bint plainly) noexcept nogil:
    """Choose how a spin for one vector looks: by a plain read, which is quicker, if it may sleep.

    The read sleeps if a peer clears O_NONBLOCK; the wait would sleep next in any case.
    """
    cdef uint64_t bit = <uint64_t>1 << vector % 64
    if not plainly or self.relay is not None or vector >= 64:
        return probe_eventfd
    if not word_load(&self.nonblocking, True, RELAXED) & bit:
        word_or(&self.nonblocking, True, bit, RELAXED)
        fcntl(place_of(self.own, vector)[0], F_SETFL, O_RDWR | O_NONBLOCK)
    return probe_plainly


cdef inline int64_t spin_for(
    Doorbells self, Py_ssize_t which, int64_t deadline, Probe probe, void *what, Turn *turn
):
    """Spinner.spin, with the GIL if the spin is short and there is no other thread."""
    cdef int64_t n
    if turn.left <= SHORT and ivshmem_is_only_thread():
        return self.spinner.spin(which, deadline, probe, what, turn, &self.state)
    with nogil:
        n = self.spinner.spin(which, deadline, probe, what, turn, &self.state)
    return n


# -- answers -------------------------------------------------------------------------------------

cdef struct Gentle:
    Bell *bell  # of an eventfd
    void *signaller  # used by this thread alone; or None
    void *raised  # a list: what ringing without one raised, perhaps in a signal handler


cdef int ring_gently(void *context, int64_t rings) noexcept nogil:
    """Do what ring_bell does, but never wait."""
    cdef Gentle *gentle = <Gentle *>context
    cdef int code
    if not ivshmem_enter(gentle.bell.state):
        return ESHUTDOWN
    if <Signaller>gentle.signaller is not None:
        code = (<Signaller>gentle.signaller).send(&gentle.bell.fd, 1)
    else:
        with gil:
            code = 0
            try:
                add_one_nowait(None, <FdArray>gentle.bell.fds, gentle.bell.fd)
            except BaseException as error:
                (<list>gentle.raised).append(error)
                code = ECANCELED
    (<FdArray>gentle.bell.fds).leave()
    return code


# -- an endpoint's --------------------------------------------------------------------------------

cdef class Doorbells:
    """The doorbells that an endpoint rings, and those that it listens on.

    A subclass adds peers and vectors with `_add_bell`, `_drop_peer` and `_add_vector`, and
    overrides hooks, which EndpointHooks in peer/endpoint.py documents.

    A device rings by a register instead (`_ring_by`), and may listen to UIO (`_listen_uio`).
    """

    def __cinit__(self, *args, **kwargs):
        self.state = IVSHMEM_CLOSING  # until there is something to close
        self.bells = {}
        self.watched = -1
        self.pid = getpid()
        self.own = FdArray()
        self.spinner = Spinner()
        self.wake = FdArray.eventfds(1)
        self.queued = FdArray.eventfds(1)
        self.state = 0

    def __reduce__(self):
        raise TypeError(
            f"a {type(self).__name__} cannot be copied or pickled: connect again, or open the"
            " device again, where another is needed"
        )

    # The hooks, which subclasses override; see EndpointHooks.

    def _read_news(self):
        raise NotImplementedError

    def _look_for(self, peer, vector):
        raise NotImplementedError

    def _check_can_wait(self):
        pass

    # Bookkeeping, called with the GIL held.

    @cython.critical_section
    def _watch_news(self, int fd, *, bint urgent=False):
        """Call `_read_news()` when `fd`, which is borrowed, is readable.

        `urgent`: also during a wait for one vector, which ends if `_read_news()` raises.
        """
        self.watched = fd
        self.urgent = urgent
        if self.epoll is not None:
            self.epoll.add(fd, TOKEN_NEWS, _EPOLLIN)

    @cython.critical_section
    def _unwatch_news(self):
        """Forget the descriptor of `_watch_news`, before it is closed."""
        # A forked child shares the epoll object with its parent, and must not change it.
        if self.epoll is not None and self.watched >= 0:
            if not self.closed and getpid() == self.pid:
                self.epoll.remove(self.watched)
        self.watched = -1
        self.urgent = False

    def _listen_alone(self, Relay relay not None):
        """Sleep in plain reads of the own eventfds: no other process has them, and they may block.

        `relay` adds to all of them when what is watched is readable. This takes ownership of it:
        the last call that uses it closes it.
        """
        self.relay = relay

    @cython.critical_section
    def _add_vector(self, fd):
        """Listen on `fd`, a number or an Fd, as the next vector; owns it, also when this fails.

        Raises:
            ProtocolError: it is not an eventfd.
        """
        cdef Py_ssize_t vector = length_of(self.own)
        cdef int number = taken(fd)
        self.check_kind(number, "this endpoint", vector)
        self.own.add(number)
        if self.epoll is not None:
            self.epoll.add(number, vector, _EPOLLIN)

    @cython.critical_section
    def _add_bell(self, peer, fd):
        """Ring the peer's next vector through `fd`, a number or an Fd; owns it, also on failure.

        Raises:
            ProtocolError: it is not an eventfd, so nothing is ever written to it. Only a write to
                an eventfd is known to be short and harmless, whatever its sender intends.
        """
        cdef FdArray bells = self.bells.get(peer)
        cdef int number
        if bells is None:
            bells = FdArray()
        number = taken(fd)
        self.check_kind(number, f"peer {peer}", length_of(bells))
        bells.add(number)
        self.bells[peer] = bells

    cdef int check_kind(self, int fd, str whose, Py_ssize_t vector) except -1:
        if is_eventfd(fd, self.wake.fds[0]):
            return 0
        c_close(fd)
        self.check()  # another thread's close() took away what `fd` was compared with
        raise ProtocolError(f"what came for vector {vector} of {whose} is not an eventfd")

    def _listen_uio(self, int fd):
        """Listen on `fd`, an open UIO device in non-blocking mode, as the only vector; owns it.

        Reading 4 bytes waits for the next interrupt, and returns how many there have ever been.
        When the driver has lost the device, a read fails with EIO, and a wait calls `_read_news()`,
        which raises.
        """
        self.own.take(fd)
        self.uio = True

    def _ring_by(self, Registers registers not None, Py_ssize_t doorbell, Py_ssize_t vectors):
        """Ring any peer by storing peer << 16 | vector to the register at `doorbell`.

        `vectors`: how many each peer is assumed to have.
        """
        self.registers = registers
        self.register_at = doorbell
        self.bells_each = vectors

    def _ring_self(self, peer):
        """Let rings of `peer`, this endpoint's own id, reach its own vectors."""
        self.bells[peer] = self.own

    def _bells(self, peer):
        """Return how many doorbells `peer` has; None if it is unknown."""
        cdef FdArray bells = self.bells.get(peer)
        return None if bells is None else length_of(bells)

    @cython.critical_section
    def _drop_peer(self, peer):
        """Close the doorbells of `peer`, if it has any."""
        cdef FdArray bells = self.bells.pop(peer, None)
        if bells is not None:
            bells.close()

    @property
    def vectors(self):
        """How many vectors this endpoint has: other peers ring 0..vectors-1."""
        return length_of(self.own)

    @property
    def closed(self):
        """Whether close() was called."""
        return ivshmem_state(&self.state) & IVSHMEM_CLOSING != 0

    cdef int check(self) except -1:
        if ivshmem_state(&self.state) & IVSHMEM_CLOSING:
            raise ClosedError("the endpoint is closed")
        return 0

    def _set_queued(self, bint anything):
        """Note whether events were taken in that the program has not asked for yet."""
        if not ivshmem_enter(&self.state):
            return
        try:
            if anything:
                self.queued.signal(0)
            else:
                take_count(self.queued.fds[0])
        finally:
            self.leave()

    cdef int tell_after_waits(self, int fd) except -1:
        """Add 1 to `fd`, an eventfd of this process alone, after each call that may take a ring.

        Channels sleep on the eventfds of vectors, too, and take no count from them. A call that
        takes a count between a ring and a channel's look hides that ring from the channel. So it
        tells the channel.
        """
        with cython.critical_section(self):
            if self.told is None:
                self.told = FdArray()
            self.told.take(os.dup(fd))
        return 0

    @cython.critical_section
    def fileno(self):
        """Return a descriptor for an event loop: readable while `events(timeout=0)` has any.

        It stays the endpoint's, and `close()` closes it. Never waits. From the first call on, each
        ring costs its sender a little more, because the kernel updates this descriptor.

        Raises:
            OSError: EMFILE or ENOMEM, at the first call, which makes the descriptor.
            ClosedError: the endpoint is closed.
        """
        cdef Epoll outer
        self.enter()
        try:
            if self.outer is None:
                outer = Epoll()
                outer.add(self.watch_all().epfd, 0, _EPOLLIN)
                outer.add(self.queued.fds[0], 0, _EPOLLIN)
                self.outer = outer
            return self.outer.epfd
        finally:
            self.leave()

    cdef Epoll anything(self):
        with cython.critical_section(self):
            return self.watch_all()

    cdef Epoll watch_all(self):
        """Return what a wait for any vector sleeps on: the vectors, what is watched, and wake.

        It is made when it is first needed: each epoll object that watches an eventfd makes a write
        to that eventfd slower, by about the time of a system call. The caller is in a critical
        section: a second one of the same object would release the first.
        """
        cdef Epoll epoll
        cdef Py_ssize_t i
        if self.epoll is None:
            epoll = Epoll()
            epoll.add(self.wake.fds[0], TOKEN_WAKE, _EPOLLIN)
            for i in range(length_of(self.own)):
                epoll.add(place_of(self.own, i)[0], i, _EPOLLIN)
            if self.watched >= 0:
                epoll.add(self.watched, TOKEN_NEWS, _EPOLLIN)
            self.epoll = epoll
        return self.epoll

    # -- ringing ----------------------------------------------------------------------------------

    @cython.binding(False)
    def ring(self, peer, Py_ssize_t vector=0):
        """Interrupt `vector` of the peer with id `peer`.

        This is one write to an eventfd. It does not wait for the peer, and does not tell whether
        the peer listens. If the peer's counter is full, an interrupt is pending already, and the
        call succeeds. (A hostile peer that filled its counter and cleared O_NONBLOCK of its eventfd
        can block this thread, but no other Python thread, until a signal arrives. `ring_nowait`
        never waits.) May be called by any thread, and by a signal handler.

        A guest's device rings by one 32-bit store to its Doorbell register. The device does not
        know which peers exist: to ring a peer that does not exist has no effect and raises nothing.

        Raises:
            NoSuchPeer: no peer with that id is connected.
            NoSuchVector: the peer has no such vector.
            ClosedError: the endpoint is closed.
        """
        cdef FdArray bells
        cdef PyObject *found
        cdef int code
        cdef Py_ssize_t number
        if self.registers is not None:
            self.check()
            number = PyNumber_AsSsize_t(peer, NULL)  # clipped; what is out of range stays so
            while not (0 <= number <= 0xFFFF and 0 <= vector < self.bells_each):
                self._look_for(peer, vector)
            self.registers.store(self.register_at, <uint32_t>(number << 16 | vector))
            return
        while True:
            if ivshmem_is_only_thread():  # so no other thread can close anything now
                found = PyDict_GetItemWithError(self.bells, peer)
                if found != NULL and 0 <= vector < length_of(<FdArray>found):
                    code = add_one(place_of(<FdArray>found, vector)[0])
                else:
                    code = ESHUTDOWN
            else:
                bells = self.bells_of(peer, vector)
                if bells is None or not bells.enter():
                    code = ESHUTDOWN
                else:
                    with nogil:
                        code = add_one(place_of(bells, vector)[0])
                    bells.leave()
            if code == 0:
                return
            if code == ESHUTDOWN:
                self.check()
                self._look_for(peer, vector)
            elif code != EINTR:
                fail_with(code)
            else:
                PyErr_CheckSignals()

    @cython.binding(False)
    def ring_nowait(self, peer, Py_ssize_t vector=0):
        """Ring like `ring`, but never wait, whatever a hostile peer did to its eventfd.

        It takes about three times as long: the kernel signals the eventfd at the end of an
        asynchronous read (io_submit(2)). If no such read is possible (no AIO in the kernel,
        fs.aio-max-nr used up, no descriptor left), a thread of the package's own writes, which
        takes twenty times as long. While hostile peers hold 64 of these threads, rings are lost.

        Raises:
            NoSuchPeer, NoSuchVector, ClosedError: as of `ring`.
        """
        cdef FdArray bells
        if self.registers is not None:
            return self.ring(peer, vector)
        while True:
            bells = self.bells_of(peer, vector)
            if bells is not None and bells.enter():
                try:
                    add_one_nowait(self.quiet(), bells, place_of(bells, vector)[0])
                finally:
                    bells.leave()
                return None
            self.check()
            self._look_for(peer, vector)

    cdef Signaller quiet(self):
        """Return the process's signaller, kept until this endpoint is closed; None: none."""
        cdef Signaller signaller
        with cython.critical_section(self):
            signaller = self.signaller
            if signaller is None:
                signaller = shared_signaller()
                if not ivshmem_state(&self.state) & IVSHMEM_CLOSING:
                    self.signaller = signaller
        return signaller

    cdef FdArray bells_of(self, peer, Py_ssize_t vector):
        """Return the doorbells of a peer if it has this vector, else None."""
        cdef FdArray bells = self.bells.get(peer)
        return bells if bells is not None and 0 <= vector < length_of(bells) else None

    cpdef Doorbell doorbell(self, peer, Py_ssize_t vector=0):
        """Look up a doorbell that is rung often: `Doorbell.ring` is a little quicker than `ring`.

        Other Cython code can ring it without the GIL: the package has declarations for cimport.

        Raises:
            NoSuchPeer, NoSuchVector, ClosedError: as of `ring`.
        """
        cdef Doorbell made = Doorbell.__new__(Doorbell)
        cdef FdArray bells
        cdef Py_ssize_t number
        made.endpoint = self
        made.peer = peer
        made.vector = vector
        if self.registers is not None:
            self.check()
            number = PyNumber_AsSsize_t(peer, NULL)
            while not (0 <= number <= 0xFFFF and 0 <= vector < self.bells_each):
                self._look_for(peer, vector)
            made.owner = self.registers
            made.bell.registers = <void *>self.registers
            made.bell.state = &self.registers.state
            made.bell.at = self.register_at
            made.bell.value = <uint32_t>(number << 16 | vector)
        else:
            while (bells := self.bells_of(peer, vector)) is None:
                self.check()
                self._look_for(peer, vector)
            made.owner = bells
            made.bell.fds = <void *>bells
            made.bell.state = &bells.state
            made.bell.fd = place_of(bells, vector)[0]
        return made

    def _doorbell_nowait(self, peer, Py_ssize_t vector=0):
        """Return a doorbell that rings as `ring_nowait` does."""
        cdef Doorbell made = self.doorbell(peer, vector)
        made.nowait = self.registers is None
        made.signaller = self.quiet() if made.nowait else None
        return made

    def ring_all(self, peers=None, vectors=0):
        """Ring several doorbells in one call: each of the vectors of each of the peers.

        If one of them does not exist, none is rung. A hostile peer can block it, as it can `ring`.

        Args:
            peers: ids; None: all other peers that are connected.
            vectors: a number, or an iterable of numbers.

        Returns:
            How many doorbells were rung. (A peer that leaves during the call is not counted.)

        Raises:
            NoSuchPeer, NoSuchVector, ClosedError: as of `ring`; nothing was rung.
            TypeError: a guest's device, which does not know the peers, was given none.
        """
        return self.ring_several(self.several(peers, vectors))

    def ring_all_nowait(self, peers=None, vectors=0):
        """Ring like `ring_all`, but never wait, as `ring_nowait`; one system call rings 64."""
        cdef list bells = self.several(peers, vectors)
        cdef list entered = []
        cdef Signaller signaller
        if self.registers is not None:
            return self.ring_several(bells)
        signaller = self.quiet()
        try:
            for bell in bells:
                if ivshmem_enter((<Doorbell>bell).bell.state):
                    entered.append(bell)
            if signaller is not None:
                signaller.signal([(<Doorbell>bell).bell.fd for bell in entered])
            else:
                for bell in entered:
                    (<Doorbell>bell).add_one_gently(None)
        finally:
            for bell in entered:
                (<FdArray>(<Doorbell>bell).bell.fds).leave()
        return len(entered)

    cdef list several(self, object peers, object vectors):
        """Return the doorbells that ring_all rings."""
        cdef list bells = []
        self.check()
        if peers is None:
            if self.registers is not None:
                raise TypeError("a device does not know which peers exist: name the peers to ring")
            if self.watched >= 0 and is_readable(self.watched):
                self._read_news()
            with cython.critical_section(self):
                peers = [peer for peer, its in self.bells.items() if its is not self.own]
        numbers = tuple(vectors) if hasattr(vectors, "__iter__") else (vectors,)
        for peer in peers:
            for number in numbers:
                bells.append(self.doorbell(peer, number))
        self.check()  # the caller's iterators may have closed it
        return bells

    cdef Py_ssize_t ring_several(self, list bells) except -1:
        cdef Bell **targets
        cdef Py_ssize_t i
        cdef Py_ssize_t done = 0
        cdef Py_ssize_t count = len(bells)
        cdef int code = 0
        targets = <Bell **>malloc(max(count, 1) * sizeof(Bell *))
        if targets == NULL:
            raise MemoryError
        try:
            for i in range(count):
                targets[i] = &(<Doorbell>bells[i]).bell
            i = 0
            while i < count:
                with nogil:
                    while i < count:
                        code = ring_bell(targets[i], 1)
                        if code == 0:
                            done += 1
                        elif code != ESHUTDOWN:
                            break
                        i += 1
                if i < count:
                    if code != EINTR:
                        fail_with(code)
                    PyErr_CheckSignals()
        finally:
            free(targets)
        return done

    # -- waiting ----------------------------------------------------------------------------------

    @cython.binding(False)
    def wait(self, vectors=None, timeout=None, *, spin=0):
        """Wait for an interrupt, at most `timeout` seconds (None: for ever; 0: do not wait).

        Args:
            vectors: a number: wait for that vector; None: for any; an iterable of numbers: for any
                of these, and take the first that is ready.
            timeout: seconds; a wait does not end before, except by an interrupt or an error.
            spin: seconds to look again and again before sleeping. To wake a sleeper takes ten times
                as long as all the rest, so a spin that succeeds saves much time. A spin that keeps
                the peer from running costs more than it saves. "auto": spin for 20 to 50
                microseconds if that succeeded recently. A number of seconds is spun under the same
                condition: after two spins in a row that brought nothing, the next waits sleep at
                once.

        May be called by any thread, and by a signal handler. A client that only waits for given
        vectors reads nothing that the server sends, and the server lists it as stalled. `events`,
        `peer_events`, `peers` and a wait for any vector (None) read it.

        Returns:
            For one vector: how often it was rung since the last look, at least 1.
            Else: an Interrupt(vector, rings).
            None if nothing came in time.
            Rings coalesce in the count: never count messages by interrupts.

        Raises:
            NoSuchVector: this endpoint has no such vector.
            ClosedError: the endpoint is closed, or another thread closed it during the call.
            NoInterrupts: the device has no interrupts.
            DeviceGone: the device was unplugged.
        """
        cdef int64_t wish = 0 if spin is OFF else spin_of(spin)
        self.enter()
        try:
            if vectors is None:
                return self.wait_any(timeout, wish, False)
            if PyLong_CheckExact(vectors) or not hasattr(vectors, "__iter__"):
                return self.wait_one(vectors, timeout, wish)
            return self.wait_some(vectors, timeout, wish)
        finally:
            self.leave()

    cdef object wait_one(self, Py_ssize_t vector, object timeout, int64_t spin):
        cdef int64_t deadline = INT64_MAX if timeout is None else deadline_of(timeout)
        cdef int64_t n = 0
        cdef bint plainly
        cdef Turn turn
        if not 0 <= vector < length_of(self.own):
            self.check_vector(vector)
        self.spinner.begin(&turn, vector, 0 if self.uio else spin)
        plainly = deadline == INT64_MAX and reads_plainly(self, ivshmem_is_only_thread())
        if not plainly and not turn.left:
            n = self.take(vector)
            if n == 0 and deadline == 0 and not self.urgent:
                return None
        while True:
            if n == 0 and turn.left:
                n = spin_for(
                    self,
                    vector,
                    deadline,
                    probe_of(self, vector, plainly),
                    place_of(self.own, vector),
                    &turn,
                )
            if n == 0:
                with nogil:
                    # A plain read clears the flag, which the next spin would have to set again.
                    n = self.sleep_for(vector, deadline, plainly and turn.done == 0)
                if n == 0:
                    return None
            if n > 0 and not relay_fired(self):
                return n
            self.attend(n if n < 0 else <int64_t>NEWS)
            n = 0
            # A signal handler may have started a thread.
            plainly = deadline == INT64_MAX and reads_plainly(self, ivshmem_is_only_thread())

    cdef int enter(self) except -1:
        """Begin a call that waits; `leave` ends it."""
        if not ivshmem_enter(&self.state):
            self.check()
        if length_of(self.own) == 0:
            try:
                self._check_can_wait()
            except BaseException:
                self.leave()
                raise
        return 0

    cdef int check_vector(self, Py_ssize_t vector) except -1:
        if not 0 <= vector < length_of(self.own):
            there = "1 vector" if length_of(self.own) == 1 else f"{length_of(self.own)} vectors"
            raise NoSuchVector(f"vector {vector}: this endpoint has {there}")
        return 0

    cdef int attend(self, int64_t code) except -1:
        if ivshmem_state(&self.state) & IVSHMEM_CLOSING:
            raise ClosedError("the endpoint was closed while waiting")
        if (
            code == NEWS
            or code == -EIO and self.uio
            or code == -EINTR and self.urgent and is_readable(self.watched)
        ):
            self._read_news()
        elif code == -EINVAL:
            what = "a UIO device" if self.uio else "an eventfd"
            raise OSError(EINVAL, f"the descriptor of this vector is not {what}")
        elif code < 0 and code != -EINTR:
            fail_with(<int>-code)
        PyErr_CheckSignals()
        return 0

    cdef int64_t sleep_for(
        self, Py_ssize_t vector, int64_t deadline, bint plainly
    ) noexcept nogil:
        """Sleep until a vector was rung: how often; 0: not in time; else a code for `attend`."""
        cdef pollfd fds[3]
        cdef timespec left
        cdef int64_t n
        if plainly:
            n = read_plainly(self, vector)
            if n:
                return n
        fds[0].fd = place_of(self.own, vector)[0]
        fds[1].fd = self.wake.fds[0]
        fds[2].fd = self.watched
        fds[0].events = fds[1].events = fds[2].events = _POLLIN
        n = ppoll(fds, 3 if self.urgent else 2, time_left(deadline, &left), NULL)
        if n < 0:
            return -errno
        if ivshmem_state(&self.state) & IVSHMEM_CLOSING:
            return -ESHUTDOWN
        if n == 0:
            return 0
        n = self.take(vector)
        if n:
            return n
        if self.urgent and fds[2].revents:
            return NEWS
        # Another thread, or a hostile peer, took the count, perhaps again and again.
        return 0 if deadline != INT64_MAX and now() >= deadline else -EINTR

    cdef object wait_some(self, object vectors, object timeout, int64_t spin):
        """Wait for any of several vectors, by ppoll."""
        cdef int64_t deadline = deadline_of(timeout)
        cdef int64_t n = 0
        cdef Py_ssize_t i
        cdef list numbers = []
        cdef Polled polled
        cdef timespec left
        cdef Turn turn
        cdef Py_ssize_t number
        for vector in vectors:
            number = vector
            self.check_vector(number)
            if number not in numbers:
                numbers.append(number)
        if not numbers:
            raise ValueError("no vector to wait for")
        polled.count = len(numbers) + 2
        polled.fds = <pollfd *>malloc(polled.count * sizeof(pollfd))
        if polled.fds == NULL:
            raise MemoryError
        try:
            for i in range(len(numbers)):
                polled.fds[i].fd = place_of(self.own, numbers[i])[0]
            polled.fds[polled.count - 2].fd = self.wake.fds[0]
            polled.fds[polled.count - 1].fd = self.watched if self.urgent else -1
            for i in range(polled.count):
                polled.fds[i].events = _POLLIN
            self.spinner.begin(&turn, ANY, spin)
            n = probe_poll(&polled)
            while True:
                if n == 0 and turn.left:
                    n = spin_for(self, ANY, deadline, probe_poll, &polled, &turn)
                if n == 0:
                    with nogil:
                        n = ppoll(polled.fds, polled.count, time_left(deadline, &left), NULL)
                        n = -errno if n < 0 else n
                    if n == 0:
                        self.attend(-EINTR)
                        return None
                if n > 0:
                    for i in range(len(numbers)):
                        if polled.fds[i].revents:
                            n = self.take(numbers[i])
                            if n > 0 and not relay_fired(self):
                                return Interrupt(numbers[i], n)
                            if n:
                                break
                    else:
                        n = NEWS if polled.fds[polled.count - 1].revents else -EINTR
                self.attend(n if n < 0 else <int64_t>NEWS)
                if deadline != INT64_MAX and now() >= deadline:
                    return None
                n = 0
        finally:
            free(polled.fds)

    @cython.binding(False)
    def wait_word(
        self,
        Atomic word not None,
        old,
        vector=0,
        timeout=None,
        *,
        spin="auto",
        Atomic sleeping=None,
    ):
        """Wait until a word of shared memory differs from `old`.

        The call looks at the word, spins on it, which takes no system call, and then sleeps until
        `vector` is rung. So the peer that changes the word must ring afterwards.

        Args:
            word: of `region.atomic_u32()` or `atomic_u64()`. It stays mapped during the call, even
                if the region is closed during the call.
            old: the value that is not waited for.
            vector: the one that the peer rings.
            timeout: seconds to wait at most; None: for ever; 0: look once.
            spin: as of `wait`.
            sleeping: a word that is 1 while this call sleeps, else 0. It saves the peer rings: a
                peer that changes `word` and then loads `sleeping`, both with order="seq_cst", must
                ring only if that is not 0. (If this process dies asleep, it stays 1, and the peer
                rings each time.) Each waiter needs a word of its own.

        Returns:
            The value, which may be 0. What its writer stored before is seen, too (acquire). None if
            the word did not change in time. Rings of `vector` that came during the call are taken,
            or left for the next call.

        Raises:
            NoSuchVector, ClosedError: as of `wait`; ClosedError also if the region is closed.
            OverflowError: the word cannot have the value `old`.
            TypeError: `sleeping` is in memory that is mapped for reading only.
        """
        cdef int64_t deadline = INT64_MAX if timeout is None else deadline_of(timeout)
        cdef int64_t wish = spin_of(spin)
        cdef Py_ssize_t index = vector
        cdef Watched watched
        self.enter()
        try:
            self.check_vector(index)
            watched.old = old
            if watched.old > UINT32_MAX and not word.wide:
                raise OverflowError(f"{old} has more than the 32 bits of the word")
            watched.wide = word.wide
            watched.sleeping = NULL
            watched.address = word.pin()
            try:
                if sleeping is None:
                    return self.watch_word(&watched, index, deadline, wish)
                watched.sleeping_wide = sleeping.wide
                watched.sleeping = sleeping.pin_own()
                try:
                    return self.watch_word(&watched, index, deadline, wish)
                finally:
                    sleeping.unpin()
            finally:
                word.unpin()
        finally:
            self.leave()

    cdef object watch_word(
        self, Watched *watched, Py_ssize_t vector, int64_t deadline, int64_t spin
    ):
        cdef int64_t n
        cdef bint plainly
        cdef Turn turn
        self.spinner.begin(&turn, vector, spin)
        while True:
            n = has_changed(watched)
            if n == 0 and turn.left:
                n = spin_for(self, vector, deadline, probe_word, watched, &turn)
            if n == 0:
                plainly = deadline == INT64_MAX
                plainly = plainly and reads_plainly(self, ivshmem_is_only_thread())
                with nogil:
                    n = self.sleep_at_word(watched, vector, deadline, plainly)
                if n == 0:
                    return None
            elif n > 0:
                return watched.seen
            self.attend(n if n < 0 else <int64_t>NEWS if relay_fired(self) else -EINTR)
            # Rung without a change, perhaps again and again.
            if deadline != INT64_MAX and now() >= deadline and not has_changed(watched):
                return None

    cdef int64_t sleep_at_word(
        self, Watched *watched, Py_ssize_t vector, int64_t deadline, bint plainly
    ) noexcept nogil:
        """Do what sleep_for does, unless the word changes first, which counts as a ring."""
        cdef int64_t n = 1
        if watched.sleeping != NULL:
            word_store(watched.sleeping, watched.sleeping_wide, 1, SEQ_CST)
        if not has_changed(watched):
            n = self.sleep_for(vector, deadline, plainly)
            if n == 0 and has_changed(watched):
                n = 1
        if watched.sleeping != NULL:
            word_store(watched.sleeping, watched.sleeping_wide, 0, SEQ_CST)
        return n

    def _wait_event(self, timeout=None):
        """Wait like wait(), but return True as soon as `_read_news()` was called."""
        self.enter()
        try:
            return self.wait_any(timeout, 0, True)
        finally:
            self.leave()

    cdef object wait_any(self, object timeout, int64_t spin, bint for_news):
        cdef int64_t deadline = deadline_of(timeout)
        cdef Polled polled
        cdef Turn turn
        cdef int rounds = 0
        cdef uint64_t token
        cdef int64_t n
        polled.epfd = self.anything().epfd
        self.spinner.begin(&turn, ANY, spin)
        while True:
            n = 0
            if turn.left:
                n = spin_for(self, ANY, deadline, probe_epoll, &polled, &turn)
            if n == 0:
                n = epoll_sleep(polled.epfd, &polled.event, 1, deadline)
            if ivshmem_state(&self.state) & IVSHMEM_CLOSING:
                raise ClosedError("the endpoint was closed while waiting")
            if n == 0:
                return None
            if n > 0:
                token = polled.event.data.u64
                if token == TOKEN_NEWS:
                    self._read_news()
                    if for_news:
                        return True
                elif token < TOKEN_NEWS:
                    n = self.take(token)
                    if n > 0 and not relay_fired(self):
                        return Interrupt(token, n)
                    if n:
                        self.attend(n if n < 0 else <int64_t>NEWS)
            elif n < -1:
                self.attend(n)
            # What a hostile peer keeps ready all the time cannot defeat the deadline.
            PyErr_CheckSignals()
            if deadline and deadline != INT64_MAX and now() >= deadline:
                deadline = 0
            elif deadline == 0:
                rounds += 1
                if rounds == BATCH:
                    return None

    cdef int64_t take(self, Py_ssize_t vector) noexcept nogil:
        """Return how often a vector was rung since the last look, 0 if it was not, or -errno."""
        cdef int fd = place_of(self.own, vector)[0]
        return self.take_uio(fd) if self.uio else look(fd)

    cdef int64_t take_uio(self, int fd) noexcept nogil:
        cdef uint32_t count, before
        cdef ssize_t n = c_read(fd, &count, sizeof(count))
        if n < 0:
            return 0 if errno == EAGAIN or errno == EINTR else -errno
        if n != sizeof(count):
            return -EINVAL
        # It counts since the driver was loaded, and wraps.
        before = self.uio_count if self.uio_known else count - 1
        self.uio_count = count
        self.uio_known = True
        return <uint32_t>(count - before)

    # -- loops without the interpreter ------------------------------------------------------------

    cdef int64_t wait_nogil(self, Py_ssize_t vector, Wait *wait) noexcept nogil:
        """Do what wait_one does, as far as that is possible without the GIL."""
        cdef int64_t n = 0
        cdef bint plainly
        if not ivshmem_enter(&self.state):
            return -ESHUTDOWN
        if 0 <= vector < length_of(self.own):
            if wait.turn.left < 0:
                self.spinner.begin(&wait.turn, vector, 0 if self.uio else wait.spin)
            plainly = wait.deadline == INT64_MAX and reads_plainly(self, wait.alone)
            if not plainly and not wait.turn.left:
                n = self.take(vector)
            if n == 0 and wait.turn.left:
                ivshmem_count(&self.sleepers, 1)  # a spin by plain reads may be made to sleep
                n = self.spinner.spin(
                    vector,
                    wait.deadline,
                    probe_of(self, vector, plainly),
                    place_of(self.own, vector),
                    &wait.turn,
                    &self.state,
                )
                ivshmem_count(&self.sleepers, -1)
            if n == 0:
                n = self.sleep_for(vector, wait.deadline, plainly and wait.turn.done == 0)
            if n > 0 and relay_fired(self):
                n = NEWS
        else:
            n = -EINVAL
        self.leave()
        return n

    cdef int64_t serve(
        self,
        Py_ssize_t vector,
        Handler handler,
        void *context,
        int64_t rounds,
        int64_t timeout,
        int64_t spin,
        int *stopped,
    ) except -1:
        cdef int64_t done = 0
        cdef int64_t n
        cdef Wait wait
        begin_wait(&wait, timeout, spin)
        self.check()
        if length_of(self.own) == 0:
            self._check_can_wait()
        self.check_vector(vector)
        stopped[0] = 0
        while done < rounds and stopped[0] == 0:
            wait.alone = ivshmem_is_only_thread()
            with nogil:
                while done < rounds:
                    n = self.wait_nogil(vector, &wait)
                    if n <= 0:
                        break
                    done += 1
                    wait.turn.left = -1
                    if timeout >= 0:
                        wait.deadline = deadline_in(timeout)
                    stopped[0] = handler(context, n)
                    if stopped[0]:
                        break
            if n == 0:
                break
            if n < 0:
                self.attend(n)
        return done

    def echo(self, peer, Py_ssize_t vector=0, *, answer=None, rounds=None, timeout=None, spin=0):
        """Answer interrupts by ringing back, in a loop without the interpreter.

        Args:
            peer: the peer to ring; an interrupt does not tell which peer sent it.
            vector: this endpoint's vector to wait for.
            answer: the peer's vector to ring; None: the same number.
            rounds: how many interrupts to answer; None: without end.
            timeout: seconds without an interrupt after which it returns; None: never.
            spin: as of `wait`.

        With a `timeout` it rings as `ring_nowait` does, so that the limit holds whatever a hostile
        peer did to its eventfd. Each answer then takes about half a microsecond longer.

        Returns:
            How many interrupts were answered.

        Raises:
            NoSuchPeer, NoSuchVector: as of `ring` and `wait`; also when another thread has taken in
                that the peer left. This call itself does not read what the server sends.
            ClosedError: the endpoint is closed, or another thread closed it during the call.
        """
        cdef int64_t nanoseconds = -1
        cdef int64_t limit = INT64_MAX if rounds is None else rounds
        cdef int stopped = 0
        cdef int64_t done = 0
        cdef Signaller own = None
        cdef list raised = []
        cdef Gentle gentle
        cdef Doorbell bell
        if answer is None:
            answer = vector
        if timeout is None:
            bell = self.doorbell(peer, answer)
        else:
            bell = self._doorbell_nowait(peer, answer)
            nanoseconds = max(deadline_of(timeout) - now(), <int64_t>0)
            if bell.nowait:
                with contextlib.suppress(OSError):  # then as ring_nowait does without one
                    own = Signaller()
        gentle.bell = &bell.bell
        gentle.signaller = <void *>own
        gentle.raised = <void *>raised
        while True:
            done += self.serve(
                vector,
                ring_gently if bell.nowait else ring_bell,
                <void *>&gentle if bell.nowait else <void *>&bell.bell,
                limit - done,
                nanoseconds,
                spin_of(spin),
                &stopped,
            )
            if stopped == 0:
                return done
            if raised:
                raise raised[0]
            self.attend(-EINTR)
            bell.ring()  # raises what stopped the loop, unless a signal did

    # -- the end ----------------------------------------------------------------------------------

    cdef void leave(self) noexcept nogil:
        """End a call; the last one in a closed endpoint closes the descriptors."""
        cdef Py_ssize_t i
        if self.told is not None:
            for i in range(length_of(self.told)):
                add_one(place_of(self.told, i)[0])
        if ivshmem_leave(&self.state):
            with gil:
                self.release()

    cdef void release(self) noexcept:
        if self.relay is not None:
            self.relay.close()
        self.own.close()
        self.wake.close()
        self.queued.close()
        if self.told is not None:
            self.told.close()
        if self.outer is not None:
            self.outer.close()
        if self.epoll is not None:
            self.epoll.close()
        with cython.critical_section(self):
            self.signaller = None

    @cython.critical_section
    def _close_bells(self):
        """Close all doorbells; one in use is closed when its last user is done."""
        for bells in self.bells.values():
            if bells is not self.own:
                (<FdArray>bells).close()
        self.bells.clear()

    def close(self):
        """Stop ringing and listening; waiting calls raise ClosedError. May be called twice."""
        # As one of the users, so that no other thread closes what is signalled here.
        if not ivshmem_enter(&self.state):
            return
        try:
            self._unwatch_news()
            ivshmem_shut(&self.state)
            self._close_bells()
            # In a forked child the other users are threads of the parent, and the eventfds too.
            if getpid() == self.pid:
                self.wake.signal(0)
                self.wake_sleepers()
            else:
                self.release()
        finally:
            self.leave()

    cdef int wake_sleepers(self) except -1:
        """End plain reads, by adding to what they read; never wait for a peer.

        If the eventfds are shared, only a thread that Python does not know can sleep in a plain
        read.
        """
        cdef Signaller signaller
        if self.relay is not None:
            for vector in range(length_of(self.own)):
                self.own.signal(vector)
        elif ivshmem_count(&self.sleepers, 0):
            signaller = self.quiet()
            if signaller is None:  # fs.aio-max-nr is used up, or no descriptor is left
                return 0
            signaller.signal(
                [place_of(self.own, vector)[0] for vector in range(length_of(self.own))]
            )
        return 0

    # -- for event loops that watch the descriptors themselves ------------------------------------

    @cython.binding(False)
    def _take(self, Py_ssize_t vector):
        """Return how often `vector` was rung since the last look; 0: not at all. Never waits."""
        cdef int64_t n
        if not ivshmem_enter(&self.state):
            self.check()
        try:
            self.check_vector(vector)
            n = self.take(vector)
            if n > 0 and not relay_fired(self):
                return n
            if n:
                self.attend(n if n < 0 else <int64_t>NEWS)
            return 0
        finally:
            self.leave()

    def _descriptor(self, which):
        """Return a descriptor that is readable while there is something to take; borrowed.

        Args:
            which: a vector, for `_take`; "any", for `_wait_event`; "queued", for the events that
                the subclass queued; or "urgent", for `_read_news`: -1 if nothing urgent is watched.
        """
        self.check()
        if length_of(self.own) == 0:
            self._check_can_wait()
        if which == "any":
            return self.anything().epfd
        if which == "queued":
            return self.queued.fds[0]
        if which == "urgent":
            return self.watched if self.urgent else -1
        self.check_vector(which)
        return place_of(self.own, which)[0]


# -- what a spin looks at -------------------------------------------------------------------------

cdef struct Polled:
    int epfd
    epoll_event event
    pollfd *fds
    Py_ssize_t count


cdef int64_t probe_eventfd(void *what) noexcept nogil:
    return look((<int *>what)[0])


cdef inline bint has_changed(Watched *watched) noexcept nogil:
    watched.seen = word_load(watched.address, watched.wide, SEQ_CST)
    return watched.seen != watched.old


cdef int64_t probe_word(void *what) noexcept nogil:
    for _ in range(LOOKS):
        if has_changed(<Watched *>what):
            return 1
        ivshmem_pause()
    return 0


cdef int64_t probe_plainly(void *what) noexcept nogil:
    cdef uint64_t count
    if c_read((<int *>what)[0], &count, sizeof(count)) == sizeof(count):
        return count_of(count)
    return 0 if errno == EAGAIN else -errno


cdef bint is_readable(int fd) noexcept nogil:
    cdef pollfd one
    cdef timespec none
    none.tv_sec = none.tv_nsec = 0
    one.fd = fd
    one.events = _POLLIN
    return ppoll(&one, 1, &none, NULL) == 1


cdef int64_t probe_epoll(void *what) noexcept nogil:
    cdef Polled *polled = <Polled *>what
    cdef int n = epoll_wait(polled.epfd, &polled.event, 1, 0)
    return n if n >= 0 else 0 if errno == EINTR else -errno


cdef int64_t probe_poll(void *what) noexcept nogil:
    cdef Polled *polled = <Polled *>what
    cdef timespec none
    cdef int n
    none.tv_sec = none.tv_nsec = 0
    n = ppoll(polled.fds, polled.count, &none, NULL)
    return n if n >= 0 else 0 if errno == EINTR else -errno
