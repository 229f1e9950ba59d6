# cython: language_level=3, binding=True, freethreading_compatible=True
# cython: embedsignature=True, embedsignature.format=clinic
"""Internal: what all ends of channels have in common, and how they sleep and wake.

Knows: spinning, sleeping, descriptors that a program watches. Does not know: what an end waits for.

Invariants:
1. Where there is no GIL, the end's critical section is held while its words are used. Loans, views
   and calls take that of their end.
2. A ring is never relied upon: each sleep ends at the latest after a beat.
3. A call that may have run other code (another thread, a signal handler, a finalizer) checks the
   end, by `enter` or `usable`, before it touches the memory again.
4. Ends, and what they give out, keep what they refer to during a collection (no_gc_clear): their
   finalizers and their buffers need it. No cycle is made of them alone.
"""

cimport cython
from cpython.exc cimport PyErr_CheckSignals
from cpython.pythread cimport PyThread_get_thread_ident
from libc.stdint cimport INT64_MAX, int64_t

from .._core cimport Doorbells
from ..native.descriptors cimport check_timeout, deadline_of, Epoll, now, place_of, time_left
from ..native.spin cimport Probe, spin_of, Spinner, Turn
from ..native.syscalls cimport (
    epoll_event, EPOLLET, epoll_wait, ivshmem_count, ivshmem_is_only_thread, pollfd, ppoll,
    timespec,
)
from ..native.syscalls cimport EPOLLIN as _EPOLLIN
from ..native.syscalls cimport POLLIN as _POLLIN
from .header cimport IVSHMEM_AGAIN, ivshmem_is_there
from .membership cimport Dependent, Membership

import weakref

from ..errors import ClosedError

# Nanoseconds: where no ring can come, the shortest pause between two looks.
cdef int64_t FIRST_PAUSE = 20_000
cdef enum:
    FIRST_LOOKS = 256  # of a spin, with the GIL: one or two microseconds


cdef class Wakeup:
    """What a thread sleeps on, or a program watches: an epoll object that each ring wakes.

    It is told of each ring at its edge (EPOLLET) and never takes the count. So all Wakeups of a
    process, and the program's own wait() for the same vector, hear of the same ring. A wait() that
    takes the count before the Wakeup looks would hide the ring; therefore the endpoint writes to
    `kick` after each such wait. A UIO device works alike: its descriptor has an edge for each
    interrupt.
    """

    def __cinit__(self, Membership membership not None):
        cdef Doorbells doorbells = membership.doorbells
        self.membership = membership
        self.epoll = Epoll()
        self.pause = FIRST_PAUSE
        self.kick = membership.kick
        if self.kick is None:
            raise membership.unusable()
        self.epoll.add(place_of(self.kick, 0)[0], 0, _EPOLLIN | <unsigned int>EPOLLET)
        if membership.vector >= 0 and doorbells is not None:
            if not membership.told:
                doorbells.tell_after_waits(place_of(self.kick, 0)[0])
                membership.told = True
            self.epoll.add(
                place_of(doorbells.own, membership.vector)[0],
                1,
                _EPOLLIN | <unsigned int>EPOLLET,
            )

    cdef int wait(self, int64_t deadline) except -1:
        """Sleep until a ring or a kick came, at the latest until the next beat."""
        cdef Membership membership = self.membership
        cdef epoll_event events[2]
        cdef pollfd one
        cdef timespec left
        cdef int64_t left_until
        cdef int milliseconds = -1
        cdef int n
        if membership.polls:
            left_until = min(deadline, now() + self.pause)
            self.pause = min(self.pause + self.pause // 2, LAST_PAUSE)
            one.fd = self.epoll.epfd
            one.events = _POLLIN
            with nogil:
                n = ppoll(&one, 1, time_left(left_until, &left), NULL)
                if n > 0:
                    epoll_wait(one.fd, events, 2, 0)
        else:
            # The thread of the beat wakes all sleepers once a beat. To set a timer for each sleep
            # takes a tenth of the round trip of two processes on one core.
            if deadline != INT64_MAX:
                left_until = deadline - now()
                if left_until < 2 * membership.beat:
                    milliseconds = <int>max((left_until + 999999) // 1000000, 0)
            ivshmem_count(&membership.sleepers, 1)
            with nogil:
                n = epoll_wait(self.epoll.epfd, events, 2, milliseconds)
            ivshmem_count(&membership.sleepers, -1)
        PyErr_CheckSignals()
        membership.check()
        if membership.doorbells is not None and membership.doorbells.closed:
            raise ClosedError("the endpoint is closed")
        return 0

    def fileno(self):
        """Return the epoll object's descriptor, which stays this object's."""
        return self.epoll.epfd

    cdef int clear(self) except -1:
        """Forget the rings until now, so that the descriptor is not readable."""
        cdef epoll_event events[2]
        epoll_wait(self.epoll.epfd, events, 2, 0)
        return 0


cdef Wakeup wakeup_of_thread(Membership membership):
    """Return what this thread sleeps on, at any end."""
    wakeup = getattr(membership.threads, "wakeup", None)
    if wakeup is None:
        wakeup = membership.threads.wakeup = Wakeup(membership)
    return wakeup


cdef object was_removed(str name):
    return ClosedError(f"channel {name!r} was removed")


@cython.no_gc_clear
cdef class ChannelEnd(Dependent):
    """One end of a channel: what all kinds of ends have in common.

    Calls may come from several threads and from signal handlers; a forked child may close its copy
    and do nothing else with it.
    """

    def __cinit__(self, *args, **kwargs):
        self.name = ""

    def __reduce__(self):
        raise TypeError(
            f"a {type(self).__name__} cannot be copied or pickled: open another one where it is"
            " needed"
        )

    @property
    def closed(self):
        """Whether close() was called, or the channels or the region were closed."""
        return not self.open or self.membership.closed or self.membership.mapping.closed

    cdef bint usable(self) noexcept:
        """Whether this end may still be used: what ends a call asks this before it stores."""
        return self.open and not self.removed and self.membership.has_place()

    cdef int enter(self) except -1:
        if not self.open:
            raise ClosedError(f"this {type(self).__name__} of {self.name!r} is closed")
        if self.removed:
            raise was_removed(self.name)
        return self.membership.check()

    # What each kind of end does in its own way.

    cdef int attempt(self) except? -2:
        """Look whether what is waited for is there; 0, IVSHMEM_AGAIN or an error."""
        return 0

    cdef int begin_sleep(self) except? -2:
        """Say in memory that this end sleeps; 0: there is something, so do not."""
        return IVSHMEM_AGAIN

    cdef void end_sleep(self) noexcept:
        pass

    cdef int one_awake(self) except -1:
        """Note that one of those that slept at this end sleeps no more."""
        self.asleep -= 1
        if self.usable():
            # Another thread or task sleeps, or a program watches: it is still to be rung.
            if self.asleep or self.watched:
                self.begin_sleep()
            else:
                self.end_sleep()
        return 0

    cdef ChannelEnd sleeper(self):
        """Return the end whose word in memory says that this one sleeps."""
        return self

    cdef int64_t probe(self, void **what, Probe *probe) except -1:
        """Set a look that a spin repeats; 0: this end cannot spin."""
        return 0

    cdef int beat(self) except -1:
        with cython.critical_section(self):
            if not self.usable():  # another thread has closed it
                return 0
            if ivshmem_is_there(&self.channel):
                return self.restore()
            self.removed = True
            if self.awaited:
                self.membership.kick_all()
            return 0

    cdef int restore(self) except -1:
        """Once a beat: store again what a late store spoiled; wake who watches the descriptor."""
        return 0

    cdef int give_up(self) except -1:
        """Free the slot."""
        return 0

    cdef int pass_on(self) except -1:
        """After a sleep that is over: a ring that woke this end alone may be for another one."""
        if self.slept:
            self.slept = False
            self.wake_another()
        return self.membership.flush()

    cdef int wake_another(self) except -1:
        """Ring another end, if there is something to take."""
        return 0

    cdef int check_there(self) except -1:
        """Raise ClosedError if the channel was removed, by force: then nothing more comes."""
        if not ivshmem_is_there(&self.sleeper().channel):
            raise was_removed(self.name)
        return 0

    # Waiting.

    cdef int wait(self, object timeout, object spin) except? -2:
        """Wait until `attempt` succeeds: 0, IVSHMEM_AGAIN: not in time, or an error."""
        cdef int64_t deadline
        cdef int64_t n
        cdef int64_t wish
        cdef int futile = 0
        cdef int code
        cdef Turn turn
        cdef Wakeup wakeup = None
        cdef ChannelEnd sleeper = self.sleeper()
        cdef Spinner spinner = None
        cdef void *what = NULL
        cdef Probe probe = NULL
        wish = 0 if spin is None else spin_of(spin)
        check_timeout(timeout)
        self.enter()
        code = self.attempt()
        if code != IVSHMEM_AGAIN:
            return code
        turn.left = 0
        if wish and self.probe(&what, &probe):
            if sleeper.spinner is None:
                sleeper.spinner = Spinner()
            spinner = sleeper.spinner
            spinner.begin(&turn, 0, wish)
            # What comes at once costs neither a look at the clock nor letting go of the GIL.
            for _ in range(FIRST_LOOKS if turn.left else 0):
                if probe(what):
                    code = self.attempt()
                    if code != IVSHMEM_AGAIN:
                        spinner.won(0, 1, False)
                        return code
                    break
        deadline = INT64_MAX if timeout is None else deadline_of(timeout)
        if deadline == 0:
            if self.watched:
                return self.arm()
            return code
        while True:
            if turn.left:
                if turn.left <= 100_000 and ivshmem_is_only_thread():
                    n = spinner.spin(
                        0, deadline, probe, what, &turn, &self.membership.state
                    )
                else:
                    with nogil:
                        n = spinner.spin(
                            0, deadline, probe, what, &turn, &self.membership.state
                        )
                PyErr_CheckSignals()
                self.enter()
            else:
                if self.slept_on is None or self.slept_by != PyThread_get_thread_ident():
                    wakeup = wakeup_of_thread(self.membership)
                    self.enter()
                    self.slept_on, self.slept_by = wakeup, PyThread_get_thread_ident()
                else:
                    wakeup = self.slept_on
                code = self.begin_sleep()
                sleeper.asleep += 1
                try:
                    self.membership.flush()
                    if code == IVSHMEM_AGAIN or code == 0 and futile > FUTILE:
                        wakeup.wait(deadline)
                        self.enter()
                finally:
                    sleeper.one_awake()
                futile += code == 0
                if code != 0 and code != IVSHMEM_AGAIN:
                    return code
            code = self.attempt()
            if code != IVSHMEM_AGAIN:
                if wakeup is not None:
                    wakeup.pause = FIRST_PAUSE
                return code
            if deadline != INT64_MAX and now() >= deadline:
                return code

    cdef int arm(self) except? -2:
        """Sleep as one that watches the descriptor does; return what is there after all."""
        cdef int code
        self.check_there()
        self.wakeup.clear()
        code = self.begin_sleep()
        self.membership.flush()
        if code == 0:
            if not self.sleeper().asleep:  # else those still sleep
                self.end_sleep()
            return self.attempt()
        return code

    @cython.critical_section
    def fileno(self):
        """Return a descriptor for an event loop, which is readable when there may be something.

        After it was readable, call the end's method with timeout=0 until that brings nothing:
        only then is the descriptor quiet, and readable again with the next ring. It stays the
        end's, and `close()` closes it.

        Raises:
            OSError: EMFILE or ENOMEM, at the first call, which makes the descriptor.
            ClosedError: it is closed.
        """
        self.enter()
        if self.wakeup is None:
            self.wakeup = Wakeup(self.membership)
        if not self.watched:
            self.watched = True
            self.begin_watch()
            if self.arm() == 0:
                self.membership.kick_all()
        return self.wakeup.epoll.epfd

    cdef int begin_watch(self) except -1:
        """Let each beat wake who watches the descriptor."""
        self.awaited += 1
        self.membership.watch(1)
        return self.membership.hurry()

    cdef object fail(self, int code):
        return self.membership.fail(code, &self.channel, self.name)

    # For tasks of an asyncio loop (sleeping_tasks.pyx).

    cdef bint begin_waiting(self) except -1:
        """Say in memory that this end sleeps; whether there is something already."""
        cdef int code
        cdef ChannelEnd sleeper = self.sleeper()
        with cython.critical_section(sleeper):
            self.enter()
            sleeper.check_there()
            code = self.begin_sleep()
            sleeper.asleep += 1
            sleeper.awaited += 1
            self.membership.watch(1)
            self.membership.hurry()
            self.membership.flush()
            return code != IVSHMEM_AGAIN

    cdef bint sleeps_on(self) except -1:
        """Say again that this end sleeps; whether its task need not run, since nothing has come.

        A ring is for all ends of the process, which can have hundreds. Not every one's task runs.
        """
        cdef ChannelEnd sleeper = self.sleeper()
        cdef bint nothing
        with cython.critical_section(sleeper):
            nothing = (
                sleeper.usable()
                and self.begin_sleep() == IVSHMEM_AGAIN
                and ivshmem_is_there(&sleeper.channel)
            )
            if self.membership.rings.count:
                self.membership.flush()
            return nothing

    cdef int end_waiting(self) except -1:
        """End what begin_waiting began."""
        cdef ChannelEnd sleeper = self.sleeper()
        with cython.critical_section(sleeper):
            sleeper.awaited -= 1
            self.membership.watch(-1)
            sleeper.one_awake()
            return 0

    @cython.critical_section
    def close(self):
        """Free what this end has in the channel; may be called twice."""
        if not self.open:
            return
        self.open = False
        self.wakeup = self.slept_on = None
        if self.watched:
            self.membership.watch(-1)
        if self.membership.has_place() and not self.copying:
            self.give_up()
            self.pass_on()
        if self.membership.is_own():
            self.membership.kick_all()
        self.membership.ends.pop(id(self), None)

    def __del__(self):
        if self.open:
            self.close()

    cdef int begin_copy(self) except -1:
        """Begin to copy without the GIL: what is copied to stays this end's until `end_copy`."""
        with cython.critical_section(self):
            self.membership.mapping.pin()
            try:
                self.membership.use_memory()
            except BaseException:
                self.membership.mapping.unpin()
                raise
            self.copying += 1
            return 0

    cdef int end_copy(self) except -1:
        with cython.critical_section(self):
            self.copying -= 1
            if not self.open and not self.copying and self.membership.has_place():
                self.give_up()  # another thread closed this end during the copy
                self.membership.flush()
            self.membership.mapping.unpin()
            return self.membership.end_use()

    cdef int enlist(self) except -1:
        """Make the end known to the membership; if that fails, free its slot."""
        self.open = True
        try:
            self.membership.ends[id(self)] = weakref.ref(self)
            self.membership.flush()
            if self.membership.readonly:
                self.membership.look_for_quiet_ends()
        except BaseException:
            self.close()
            raise
        return 0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def __repr__(self):
        state = ", closed" if not self.open else ""
        return f"<ivshmem.channel.{type(self).__name__} of {self.name!r}{state}>"
