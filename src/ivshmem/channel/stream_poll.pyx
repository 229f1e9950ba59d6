# cython: language_level=3, binding=True, freethreading_compatible=True
# cython: embedsignature=True, embedsignature.format=clinic
"""Internal: many connections and listeners, for which one loop waits by one descriptor.

Knows: which of them can continue. Does not know: what a loop does with them.

A ring is for a process, and does not say for which of its ends it was. A loop of hundreds of
connections asks here, where one pass in C looks at all that sleep, in some ten nanoseconds each.

Invariant: an end that sleeps says so in memory since it was last looked at. Its ring may be under
way at that moment, and a ring is sent once for each sleep: so each pass says it again.
"""

cimport cython
from libc.stdlib cimport free, realloc

from .ends cimport ChannelEnd, Wakeup
from .header cimport *
from .membership cimport Dependent, Membership
from .streams cimport ABORTED, ENDED, look_both, RECEIVE, SEND, Stream, StreamListener

import weakref

from ..errors import ClosedError

# What a Sleeper waits for, and what `ready` tells.
MAY_SEND = 1 << SEND
MAY_RECEIVE = 1 << RECEIVE  # also of a listener: that it may accept
HAS_ENDED = 1 << ENDED  # the other end receives no more, or is gone
HAS_RESET = 1 << ABORTED  # it is gone, and what it sent before can still be received


cdef int look_at(Entry *entry) noexcept nogil:
    """Return which of the awaited directions would not wait; those of an end that fails are all."""
    cdef int found
    if entry.stream == NULL:
        found = 1 << RECEIVE if ivshmem_listener_has_caller(entry.listener) else 0
    else:
        found = look_both(entry.stream)
        if found < 0:
            found = entry.awaited
    return found & entry.awaited


@cython.final
@cython.no_gc_clear
cdef class StreamPoll(Dependent):
    """The ends for which a loop waits. One thread uses it, and closes it before the channels."""

    def __cinit__(self, Membership membership not None):
        self.membership = membership
        self.sleepers = []
        self.wakeup = Wakeup(membership)
        membership.ends[id(self)] = weakref.ref(self)
        membership.watch(1)
        self.open = True
        membership.hurry()

    def __dealloc__(self):
        free(self.entries)

    def __reduce__(self):
        raise TypeError(f"a {type(self).__name__} cannot be copied or pickled")

    def fileno(self):
        """Return a descriptor, which stays this object's.

        It is readable after a ring. To be watched for edges: then nothing has to read from it.
        """
        return self.wakeup.fileno()

    @cython.critical_section
    def add(self, ChannelEnd end not None, owner):
        """Return the Sleeper of a Stream or StreamListener; `owner` is what `ready` tells."""
        cdef Entry *larger
        cdef Entry *entry
        cdef Sleeper sleeper
        cdef Py_ssize_t count = len(self.sleepers)
        if count == self.room:
            larger = <Entry *>realloc(self.entries, (2 * count + 8) * sizeof(Entry))
            if larger == NULL:
                raise MemoryError
            self.entries = larger
            self.room = 2 * count + 8
        sleeper = Sleeper.__new__(Sleeper)
        sleeper.poll = self
        sleeper.end = end
        sleeper.owner = owner
        sleeper.index = count
        entry = &self.entries[count]
        entry.awaited = 0
        entry.channel = &end.channel
        if isinstance(end, StreamListener):
            entry.stream = NULL
            entry.listener = &(<StreamListener>end).listener
            entry.sleep = &entry.listener.sleep
        else:
            entry.stream = &(<Stream?>end).stream
            entry.listener = NULL
            entry.sleep = &entry.stream.sleep
        self.sleepers.append(sleeper)
        return sleeper

    @cython.critical_section
    def ready(self):
        """Return a list of (owner, directions) of those that slept and can continue.

        They do not sleep any more.

        Raises:
            ClosedError: the channels, the region or the endpoint is closed.
        """
        cdef Entry *entry
        cdef Sleeper sleeper
        cdef Py_ssize_t i
        cdef int said = 0
        cdef int found
        self.membership.check()
        if self.membership.doorbells is not None and self.membership.doorbells.closed:
            raise ClosedError("the endpoint is closed")
        ready = []
        for i in range(len(self.sleepers)):
            entry = &self.entries[i]
            if entry.awaited:
                ivshmem_sleep_say(entry.channel, entry.sleep)
                said += 1
        if said:
            ivshmem_full_fence(&self.membership.member.area.memory)
        for i in range(len(self.sleepers) if said else 0):
            entry = &self.entries[i]
            if not entry.awaited:
                continue
            found = look_at(entry)
            if found:
                sleeper = <Sleeper>self.sleepers[i]
                sleeper.wake_up(entry)
                ready.append((sleeper.owner, found))
        return ready

    cdef int beat(self) except -1:
        """Wake the loop if there is something for it: a ring may have been lost."""
        cdef Py_ssize_t i
        with cython.critical_section(self):
            if self.open and self.membership.has_place():
                for i in range(len(self.sleepers)):
                    if self.entries[i].awaited and look_at(&self.entries[i]):
                        self.membership.kick_all()
                        break
        return 0

    @cython.critical_section
    def close(self):
        """Forget all; may be called twice. The ends stay their owners'."""
        if self.open:
            self.open = False
            self.membership.watch(-1)
            self.membership.ends.pop(id(self), None)
            self.wakeup = None
            for sleeper in list(self.sleepers):
                (<Sleeper>sleeper).close()


@cython.final
@cython.no_gc_clear
cdef class Sleeper:
    """An end in a StreamPoll."""

    def __reduce__(self):
        raise TypeError(f"a {type(self).__name__} cannot be copied or pickled")

    cpdef int sleep(self, int directions) except -1:
        """Wait for these directions, until `ready` tells of one.

        Returns:
            Those that need no wait: then it does not sleep. 0: it sleeps.

        Raises:
            ClosedError: the end or the channels are closed.
        """
        cdef Entry *entry
        cdef int found
        if self.poll is None:
            raise ClosedError("this Sleeper has left its poll")
        with cython.critical_section(self.poll):
            self.end.enter()
            entry = &self.poll.entries[self.index]
            entry.awaited = directions
            if entry.stream != NULL:
                entry.sleep.more = 0 if directions & 1 << SEND else IVSHMEM_HAS_ROOM
            ivshmem_sleep_begin(entry.channel, entry.sleep)
            found = look_at(entry)
            if found:
                self.wake_up(entry)
            return found

    cdef int wake_up(self, Entry *entry) except -1:
        entry.awaited = 0
        if self.end.usable():
            ivshmem_sleep_end(entry.channel, entry.sleep)
        return 0

    def close(self):
        """Leave the poll, before the end is closed; may be called twice."""
        cdef StreamPoll poll = self.poll
        cdef Py_ssize_t last
        if poll is None:
            return
        with cython.critical_section(poll):
            last = len(poll.sleepers) - 1
            if self.index != last:
                poll.entries[self.index] = poll.entries[last]
                poll.sleepers[self.index] = poll.sleepers[last]
                (<Sleeper>poll.sleepers[last]).index = self.index
            poll.sleepers.pop()
        self.poll = None
        self.owner = None
