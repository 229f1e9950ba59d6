# cython: language_level=3, binding=True, freethreading_compatible=True
# cython: embedsignature=True, embedsignature.format=clinic
"""Internal: a process's place in an area of channels, its beat, and how its ends sleep and wake.

Knows: joining, beats, rings, sleeping. Does not know: what passes through a channel.

Invariants:
1. The GIL is held during each call of the header, except ivshmem_beat and copies of payloads, which
   touch nothing that an end keeps.
2. A ring is never waited for, and never relied upon: each sleep ends at the latest after a beat.
3. The memory stays mapped while the membership is open, also if the region is closed: the thread of
   the beat may be between two of its loads.
4. A call that may have run other code (another thread, a signal handler, a finalizer) checks the
   end, by `enter` or `usable`, before it touches the memory again.
5. The place is given back after the last store that this process can make: after buffers of loans,
   and copies without the GIL. A forked child stores nothing.
6. Ends, and what they give out, keep what they refer to during a collection (no_gc_clear): their
   finalizers and their buffers need it. No cycle is made of them alone.
"""

cimport cython
from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport INT64_MAX, int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset, strncpy

from ..native.bell cimport ring_bell
from ..native.descriptors cimport deadline_of, now, place_of, time_left
from ..native.spin cimport spin_of
from ..native.syscalls cimport (
    epoll_event, epoll_wait, ESHUTDOWN, IVSHMEM_CLOSING, ivshmem_enter, ivshmem_is_only_thread,
    ivshmem_leave, ivshmem_shut, ivshmem_state, pollfd, ppoll, timespec,
)
from ..native.syscalls cimport EPOLLIN as _EPOLLIN
from ..native.syscalls cimport POLLIN as _POLLIN
from ..native.mapping cimport Mapping
from .header cimport *

import contextlib
import os
import secrets
import threading
import weakref

from ..errors import (
    ChannelCorrupt, ChannelError, ClosedError, IvshmemError, NoChannels, NoInterrupts, RegionError,
)
from . import identity

cdef extern from "<sys/epoll.h>":
    enum: EPOLLET

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd_read(int fd, uint64_t *value)


cdef extern from *:
    """
    #include <errno.h>
    #include <fcntl.h>
    #include <signal.h>
    #include <stdio.h>
    #include <stdlib.h>
    #include <string.h>
    #include <unistd.h>

    /* When a process of this PID namespace started, in clock ticks, modulo 2^40; 0: unknown. */
    static uint64_t ivshmem_process_start(uint64_t process)
    {
        char path[40], text[512], *at;
        int fd;
        ssize_t size;
        snprintf(path, sizeof path, "/proc/%lu/stat", (unsigned long)process);
        fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0)
            return 0;
        size = read(fd, text, sizeof text - 1);
        close(fd);
        if (size <= 0)
            return 0;
        text[size] = 0;
        at = strrchr(text, ')'); /* a program chooses its name */
        for (int field = 2; at != NULL && field < 22; field++)
            at = strchr(at + 1, ' ');
        return at == NULL ? 0 : strtoull(at + 1, NULL, 10) & ((UINT64_C(1) << 40) - 1);
    }

    /* Whether a process has ended and its parent has yet to ask how: a zombie without threads. */
    static int ivshmem_process_is_zombie(uint64_t process)
    {
        char path[40], text[512], *at, state = 0;
        long threads = 0;
        int fd;
        ssize_t size;
        snprintf(path, sizeof path, "/proc/%lu/stat", (unsigned long)process);
        fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0)
            return 0;
        size = read(fd, text, sizeof text - 1);
        close(fd);
        if (size <= 0)
            return 0;
        text[size] = 0;
        at = strrchr(text, ')');
        if (at == NULL || sscanf(at + 1, " %c %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s"
                                 " %*s %*s %*s %ld", &state, &threads) != 2)
            return 0;
        /* The first thread of a process can end before the others, which still store. */
        return (state == 'Z' || state == 'X') && threads <= 1;
    }

    /* Whether a process has ended. kill(2) tells it also where /proc hides other users' processes;
       a number that is in use again has another start. */
    static int ivshmem_process_ended(void *context, uint64_t process, uint64_t started)
    {
        uint64_t now;
        (void)context;
        if (process == 0 || process > INT32_MAX)
            return 0;
        if (kill((pid_t)process, 0) < 0 && errno == ESRCH)
            return 1;
        now = ivshmem_process_start(process);
        return (now != 0 && started != 0 && now != started) || ivshmem_process_is_zombie(process);
    }
    """
    uint64_t ivshmem_process_start(uint64_t process) nogil
    int ivshmem_process_ended(void *context, uint64_t process, uint64_t started) noexcept nogil


cdef extern from "ivshmem_channel.h":
    uint64_t IVSHMEM_PEER_MUTE

# Nanoseconds. Where no ring can come, the shortest and the longest pause between two looks.
cdef int64_t FIRST_PAUSE = 20_000
cdef int64_t LAST_PAUSE = 1_000_000
# A sleep that the memory forbids again and again, although nothing can be taken, is a hostile
# peer's work: after so many it sleeps all the same.
cdef enum:
    FUTILE = 64

cdef unsigned int generation = 0  # of this process: a forked child has another


def _after_fork():
    global generation
    generation += 1


os.register_at_fork(after_in_child=_after_fork)


cdef void note_ring(void *context, unsigned peer, unsigned vector) noexcept nogil:
    cdef Rings *rings = <Rings *>context
    if rings.count < MOST_RINGS:
        rings.targets[rings.count] = peer << 16 | vector
        rings.count += 1


cdef int64_t tell_time(void *context) noexcept nogil:
    return now()


@cython.no_gc_clear  # it needs the mapping to the end
cdef class Membership:
    """A place in the area at an offset of a region.

    Args:
        region: the memory.
        offset: of the area in it.
        endpoint: by which peers are rung, and this process is; None: none.
        vector: of the endpoint, at which peers ring this process.
        mapping: 0, 1 or 2: of ordinary memory, write-combining, uncached.
        beat, lease: seconds.
        name: of this process, for people.

    Raises:
        NoChannels: there is no area, or one of another version.
        ChannelError: no place is free.
        ClosedError: the region is closed.
    """

    def __cinit__(
        self,
        Mapping region not None,
        uint64_t offset,
        endpoint,
        Py_ssize_t vector,
        int mapping,
        double beat,
        double lease,
        str name,
    ):
        cdef ivshmem_memory memory
        cdef char text[64]
        cdef int code
        self.state = IVSHMEM_CLOSING
        self.generation = generation
        self.mapping = region
        self.endpoint = endpoint
        self.doorbells = endpoint
        self.vector = vector
        self.bells = {}
        self.ends = weakref.WeakSet()
        self.threads = threading.local()
        self.loops = weakref.WeakKeyDictionary()
        if not ivshmem_enter(&region.accesses):
            raise ClosedError("the region is closed")
        self.pinned = True
        memory.start = <unsigned char *>region.start
        memory.size = region.length
        memory.mapping = <ivshmem_mapping>mapping
        memory.readonly = region.fixed
        code = ivshmem_area_open(&self.member.area, &memory, offset)
        if code:
            raise self.fail(code, NULL, "")
        self.beat = <int64_t>(beat * 1e9)
        self.member.lease = <int64_t>(lease * 1e9)
        self.member.user.context = &self.rings
        self.member.user.ring = note_ring
        self.member.user.now = tell_time
        self.member.user.ended = ivshmem_process_ended
        self.kick = FdArray.eventfds(1)
        self.ending = FdArray.eventfds(1)
        self.pulses = <ivshmem_pulse *>calloc(self.member.area.places, sizeof(ivshmem_pulse))
        if self.pulses == NULL:
            raise MemoryError
        self.member.pulses = self.pulses
        self.member.looked = now()
        self.polls = vector < 0 or region.fixed  # no peer knows of one that only reads
        if not region.fixed:
            self.member.process = os.getpid()
            self.member.machine = identity.machine()
            self.member.started = ivshmem_process_start(self.member.process)
            self.name_peer()
            memset(text, 0, sizeof(text))
            encoded = name.encode(errors="replace")[: 8 * IVSHMEM_NAME_WORDS]
            strncpy(text, encoded, 8 * IVSHMEM_NAME_WORDS)
            code = ivshmem_join(&self.member, secrets.randbits(64), text)
            if code:
                raise self.fail(code, NULL, "")
            self.joined = True
        self.state = 0

    cdef int name_peer(self) except -1:
        cdef uint64_t peer = 0 if self.endpoint is None else self.endpoint.current_id()
        if self.vector < 0:
            peer |= IVSHMEM_PEER_MUTE
        else:
            peer |= <uint64_t>self.vector << 16
        self.member.peer = peer
        return 0

    @property
    def readonly(self):
        return bool(self.mapping.fixed)

    @property
    def closed(self):
        return ivshmem_state(&self.state) & IVSHMEM_CLOSING != 0

    cdef bint usable(self) noexcept:
        """Whether this process may store into the memory: neither closed nor a forked child's."""
        return (
            self.generation == generation
            and not ivshmem_state(&self.state) & IVSHMEM_CLOSING
            and not ivshmem_state(&self.mapping.views) & IVSHMEM_CLOSING
        )

    cdef int check(self) except -1:
        if not self.usable():
            raise self.unusable()
        # A process that was stopped looks before it stores: its slots may be another's. (Uncached
        # memory is slow to read: there only the thread of the beat looks.)
        if self.member.area.memory.mapping == 0 and self.joined and ivshmem_load(
            &self.member.area.memory, ivshmem_place_at(&self.member.area, self.member.place.index)
        ) != self.member.number:
            self.lose_place()
            raise self.unusable()
        return 0

    cdef object unusable(self):
        if self.generation != generation:
            return RuntimeError("a forked child may only close what it has of channels")
        if self.lost:
            return ClosedError(
                "this process's place among the channels was freed, by free_place() or by a new"
                " server on the memory, because it was silent: open the channels again"
            )
        if ivshmem_state(&self.state) & IVSHMEM_CLOSING and not self.mapping.closed:
            return ClosedError("the channels are closed")
        return ClosedError("the region is closed")

    cdef int lose_place(self) except -1:
        self.lost = True
        self.joined = False
        return self.abandon()

    cdef int use_memory(self) except -1:
        """Keep the memory and the place of this process until `end_use`, also after a close()."""
        if not ivshmem_enter(&self.state):
            raise self.unusable()
        return 0

    cdef int end_use(self) except -1:
        if ivshmem_leave(&self.state):
            self.release()
        return 0

    # -- rings ------------------------------------------------------------------------------------

    cdef int flush(self) except -1:
        """Ring those that the last call of the header named."""
        cdef uint32_t target
        while self.rings.count:
            self.rings.count -= 1
            target = self.rings.targets[self.rings.count]
            if self.doorbells is not None:
                self.ring(target)
        return 0

    cdef int ring(self, uint32_t target) except -1:
        cdef Doorbell bell = self.bells.get(target)
        cdef int code
        for _ in range(2):
            if bell is None:
                try:
                    bell = self.doorbells._doorbell_nowait(target >> 16, target & 0xffff)
                except NoInterrupts:
                    self.doorbells = None  # a plain device rings nobody
                    return 0
                except IvshmemError:
                    return 0  # the peer has left: it looks at its next beat
                self.bells[target] = bell
            try:
                code = bell.ring_gently() if bell.nowait else ring_bell(&bell.bell, 1)
            except OSError:
                return 0
            if code != ESHUTDOWN:
                return 0
            self.bells.pop(target, None)  # perhaps another thread did that
            bell = None
        return 0

    cdef Wakeup wakeup_of_thread(self):
        """Return what this thread sleeps on, at any end."""
        wakeup = getattr(self.threads, "wakeup", None)
        if wakeup is None:
            wakeup = self.threads.wakeup = Wakeup(self)
        return wakeup

    cdef int kick_all(self) except -1:
        """Wake what sleeps in this process: it looks again."""
        cdef FdArray kick = self.kick
        if kick is not None:
            kick.signal(0)
        return 0

    cdef int hurry(self) except -1:
        """Let the thread of the beat look now, and from now on often, if nothing rings."""
        cdef FdArray ending = self.ending
        if self.polls and self.watchers == 1:
            ending.signal(0)
        return 0

    # -- the beat ---------------------------------------------------------------------------------

    def run(self):
        """Beat, until `close`: what the thread of the beat does."""
        cdef pollfd one
        cdef timespec left
        cdef int64_t next_beat = now()
        cdef int64_t limit
        cdef uint64_t count
        cdef int code
        if not ivshmem_enter(&self.state):
            return
        one.fd = place_of(self.ending, 0)[0]
        one.events = _POLLIN
        try:
            while not self.closed:
                code = 0
                with nogil:
                    limit = next_beat
                    if self.watchers and self.polls:
                        limit = min(limit, now() + LAST_PAUSE)
                    if ppoll(&one, 1, time_left(limit, &left), NULL) > 0:
                        eventfd_read(one.fd, &count)
                    if now() >= next_beat and not ivshmem_state(&self.state) & IVSHMEM_CLOSING:
                        next_beat = now() + self.beat
                        if not self.mapping.fixed:
                            code = ivshmem_beat(&self.member)
                        self.look_for_mutes()
                if not self.closed:
                    self.after_beat(code)
        finally:
            if ivshmem_leave(&self.state):
                self.release()

    cdef void look_for_mutes(self) noexcept nogil:
        """Find out whether some process at work cannot ring this one: then its sleepers poll."""
        cdef ivshmem_memory *memory = &self.member.area.memory
        cdef uint64_t at, number, peer, process, machine
        cdef bint polls = self.vector < 0 or memory.readonly
        cdef unsigned i
        for i in range(self.member.area.places):
            if polls:
                break
            if not memory.readonly and i == self.member.place.index:
                continue
            at = ivshmem_place_at(&self.member.area, i)
            number = ivshmem_load(memory, at)
            peer = ivshmem_load(memory, at + IVSHMEM_PLACE_PEER)
            if ivshmem_flags(number) != IVSHMEM_LIVE:
                continue
            if ivshmem_epoch(peer) != ivshmem_epoch(number):
                continue
            if ivshmem_value(peer) & IVSHMEM_PEER_MUTE:
                polls = True
            elif (ivshmem_value(peer) ^ self.member.peer) & 0xffff == 0:
                # Clients of one broker have one id: they cannot ring one another.
                process = ivshmem_load(memory, at + IVSHMEM_PLACE_PROCESS)
                machine = ivshmem_load(memory, at + IVSHMEM_PLACE_MACHINE)
                polls = (
                    ivshmem_value(process) != self.member.process
                    or ivshmem_value(machine) != self.member.machine
                )
        self.polls = polls

    cdef int after_beat(self, int code) except -1:
        """Do, with the GIL, what a beat showed to be necessary."""
        if code == IVSHMEM_CLOSED:
            return self.lose_place()
        if self.mapping.closed:
            return self.abandon()
        try:
            if self.endpoint is not None and not self.mapping.fixed:
                self.name_peer()
        except (IvshmemError, OSError):
            pass  # a device's register that cannot be read now, or an endpoint that is closed
        for end in list(self.ends):
            if not (<ChannelEnd>end).usable():
                continue  # another thread has closed it since the list was made
            with contextlib.suppress(IvshmemError, OSError):
                (<ChannelEnd>end).restore()
        return self.flush()

    def places(self):
        """Return a list of (index, epoch, state, id, vector, process, name) of all places."""
        cdef ivshmem_memory *memory = &self.member.area.memory
        cdef uint64_t at, number, peer
        cdef ivshmem_place place
        cdef unsigned i
        cdef char text[33]
        self.check()
        found = []
        for i in range(self.member.area.places):
            at = ivshmem_place_at(&self.member.area, i)
            number = ivshmem_load(memory, at)
            if ivshmem_value(number) == 0 or ivshmem_flags(number) != IVSHMEM_LIVE:
                continue
            peer = ivshmem_load(memory, at + IVSHMEM_PLACE_PEER)
            place.index = i
            place.epoch = ivshmem_epoch(number)
            memset(text, 0, sizeof(text))
            ivshmem_load_bytes(memory, at + IVSHMEM_PLACE_NAME, text, 32)
            mute = ivshmem_value(peer) & IVSHMEM_PEER_MUTE != 0
            found.append((
                i,
                place.epoch,
                "silent" if self.is_silent(place) else "at work",
                ivshmem_value(peer) & 0xffff,
                None if mute else ivshmem_value(peer) >> 16 & 0xffff,
                ivshmem_value(ivshmem_load(memory, at + IVSHMEM_PLACE_PROCESS)),
                text.decode(errors="replace"),
            ))
        return found

    cdef bint is_silent(self, ivshmem_place place):
        return not self.mapping.fixed and ivshmem_is_silent(&self.member, place)

    def free_place(self, unsigned index):
        """Free a place at a user's word; whether it had an owner."""
        cdef uint64_t number
        self.check()
        if index >= self.member.area.places:
            raise ValueError(f"place {index}: the area has {self.member.area.places}")
        if self.mapping.fixed:
            raise RegionError("the region is mapped for reading only: no place can be freed")
        number = ivshmem_load(
            &self.member.area.memory, ivshmem_place_at(&self.member.area, index)
        )
        return ivshmem_value(number) != 0 and bool(
            ivshmem_place_free(&self.member.area, index, number)
        )

    # -- the end ----------------------------------------------------------------------------------

    def close(self):
        """Close all ends, and leave the area. A forked child only forgets what it has.

        Raises:
            BufferError: a View of a message is alive. All else is closed.
        """
        error = None
        if self.generation == generation and not self.closed and not self.mapping.closed:
            for end in list(self.ends):
                try:
                    (<ChannelEnd>end).close()
                except BufferError as one:
                    error = one
        self.abandon()
        if error is not None:
            raise error

    cdef int abandon(self) except -1:
        """Admit no more calls; the last user of the memory lets it go."""
        cdef FdArray ending = self.ending
        if ivshmem_state(&self.state) & IVSHMEM_CLOSING:
            return 0
        if self.generation == generation:
            self.kick_all()
            ending.signal(0)
        if ivshmem_shut(&self.state) or self.generation != generation:
            self.release()  # a forked child has only one thread
        return 0

    cdef int release(self) except -1:
        """Leave the area and let the memory go."""
        # What still sleeps has the eventfd, too: to close it would take the wake-up back.
        self.kick = None
        if self.ending is not None:
            self.ending.close()
        self.threads = None
        self.loops = None
        self.bells = {}  # each has a descriptor, which the endpoint's close must not outlive
        if self.pinned:
            self.leave()
            self.pinned = False
            let_go(self.mapping)
        return 0

    cdef void leave(self) noexcept:
        if self.joined and self.generation == generation:
            ivshmem_leave_area(&self.member)
        self.joined = False

    def __dealloc__(self):
        if self.pinned:
            self.leave()
            let_go(self.mapping)
        free(self.pulses)

    cdef object fail(self, int code, ivshmem_channel *channel, str name):
        """Return the exception for a result of the header."""
        of = f"channel {name!r}: " if name else ""
        if code == IVSHMEM_CORRUPT and channel != NULL:
            word = channel.fault.word.decode() if channel.fault.word != NULL else "a word"
            return ChannelCorrupt(
                f"{of}the {word} at {channel.fault.offset:#x}, which belongs to slot"
                f" {channel.fault.slot}, is impossible ({channel.fault.seen:#x}): some process that"
                " can write to the memory has spoiled it"
            )
        if code == IVSHMEM_NO_AREA:
            return NoChannels(
                "the region has no room for channels: make it by `ivshmem serve --channels SIZE`,"
                " or by Directory.create(channels=SIZE)"
            )
        if code == IVSHMEM_VERSION:
            return NoChannels("the region's channels are of a version that is not known here")
        if code == IVSHMEM_TAKEN:
            return ChannelError(
                f"all {self.member.area.places} places of the area are taken; `ivshmem channel"
                " info` lists them"
            )
        if code == IVSHMEM_READ_ONLY:
            return RegionError(f"{of}the region is mapped for reading only")
        if code == IVSHMEM_CLOSED:
            return ClosedError(
                f"{of}another process removed the channel, or the place of this process"
            )
        if code == IVSHMEM_NO_ATOMICS:
            return ChannelError(
                f"{of}this mapping of the memory has no compare-exchange, which a queue needs: open"
                " the device in another way (resource2_wc)"
            )
        return ChannelError(f"{of}error {-code} of ivshmem_channel.h")


cdef extern from *:
    """
    #include <sys/mman.h>
    """
    int munmap(void *address, size_t length) nogil


cdef int let_go(Mapping mapping) noexcept:
    cdef char *start
    if ivshmem_leave(&mapping.accesses):
        start = mapping.start
        mapping.start = NULL
        munmap(start, mapping.length)
    return 0


# -- sleeping -------------------------------------------------------------------------------------

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
        cdef int64_t limit
        cdef int milliseconds
        cdef int n
        if membership.polls:
            limit = min(deadline, now() + self.pause)
            self.pause = min(self.pause + self.pause // 2, LAST_PAUSE)
            one.fd = self.epoll.epfd
            one.events = _POLLIN
            with nogil:
                n = ppoll(&one, 1, time_left(limit, &left), NULL)
                if n > 0:
                    epoll_wait(one.fd, events, 2, 0)
        else:
            limit = min(deadline, now() + membership.beat) - now()
            milliseconds = <int>max((limit + 999999) // 1000000, 0)
            with nogil:
                n = epoll_wait(self.epoll.epfd, events, 2, milliseconds)
        PyErr_CheckSignals()
        membership.check()
        if membership.doorbells is not None and membership.doorbells.closed:
            raise ClosedError("the endpoint is closed")
        return 0

    def fileno(self):
        """Return the epoll object's descriptor, which stays this object's."""
        return self.epoll.epfd

    def clear_rings(self):
        """Do what `clear` does."""
        self.clear()

    cdef int clear(self) except -1:
        """Forget the rings until now, so that the descriptor is not readable."""
        cdef epoll_event events[2]
        epoll_wait(self.epoll.epfd, events, 2, 0)
        return 0


@cython.no_gc_clear
cdef class ChannelEnd:
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
        return self.open and self.membership.usable()

    cdef int enter(self) except -1:
        if not self.open:
            raise ClosedError(f"this {type(self).__name__} of {self.name!r} is closed")
        return self.membership.check()

    # What each kind of end does in its own way.

    cdef int attempt(self) except -2:
        """Look whether what is waited for is there; 0, IVSHMEM_AGAIN or an error."""
        return 0

    cdef int begin_sleep(self) except -2:
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

    cdef int restore(self) except -1:
        """Once a beat: store again what a late store spoiled; wake who watches the descriptor."""
        return 0

    cdef int give_up(self) except -1:
        """Free the slot."""
        return 0

    # Waiting.

    cdef int wait(self, object timeout, object spin) except -2:
        """Wait until `attempt` succeeds: 0, IVSHMEM_AGAIN: not in time, or an error."""
        cdef int64_t deadline
        cdef int64_t n
        cdef int futile = 0
        cdef int code
        cdef Turn turn
        cdef Wakeup wakeup = None
        cdef ChannelEnd sleeper = self.sleeper()
        cdef Spinner spinner = None
        cdef void *what = NULL
        cdef Probe probe = NULL
        self.enter()
        code = self.attempt()
        if code != IVSHMEM_AGAIN:
            return code
        deadline = INT64_MAX if timeout is None else deadline_of(timeout)
        if deadline == 0:
            if self.watched:
                return self.arm()
            return code
        turn.left = 0
        if spin is not None and self.probe(&what, &probe):
            if sleeper.spinner is None:
                sleeper.spinner = Spinner()
            spinner = sleeper.spinner
            spinner.begin(&turn, 0, spin_of(spin))
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
                wakeup = self.membership.wakeup_of_thread()
                self.enter()
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

    cdef int arm(self) except -2:
        """Sleep as one that watches the descriptor does; return what is there after all."""
        cdef int code
        self.wakeup.clear()
        code = self.begin_sleep()
        self.membership.flush()
        if code == 0:
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
            self.awaited += 1
            self.membership.watchers += 1
            self.membership.hurry()
            if self.arm() == 0:
                self.membership.kick_all()
        return self.wakeup.epoll.epfd

    cdef object fail(self, int code):
        return self.membership.fail(code, &self.channel, self.name)

    # For tasks of an asyncio loop (asynchronous.py).

    def _membership(self):
        return self.membership

    def _begin_waiting(self):
        """Say in memory that this end sleeps; whether there is something already."""
        cdef int code
        cdef ChannelEnd sleeper = self.sleeper()
        self.enter()
        code = self.begin_sleep()
        sleeper.asleep += 1
        sleeper.awaited += 1
        self.membership.watchers += 1
        self.membership.hurry()
        self.membership.flush()
        return code != IVSHMEM_AGAIN

    def _end_waiting(self):
        """End what _begin_waiting began."""
        cdef ChannelEnd sleeper = self.sleeper()
        sleeper.awaited -= 1
        self.membership.watchers -= 1
        sleeper.one_awake()

    def close(self):
        """Free what this end has in the channel; may be called twice."""
        if not self.open:
            return
        self.open = False
        self.wakeup = None
        if self.watched:
            self.membership.watchers -= 1
        if self.membership.usable() and not self.copying:
            self.give_up()
            self.membership.flush()
        if self.membership.generation == generation:
            self.membership.kick_all()
        self.membership.ends.discard(self)

    def __del__(self):
        if self.open:
            self.close()

    cdef int begin_copy(self) except -1:
        """Begin to copy without the GIL: what is copied to stays this end's until `end_copy`."""
        self.membership.mapping.pin()
        try:
            self.membership.use_memory()
        except BaseException:
            self.membership.mapping.unpin()
            raise
        self.copying += 1
        return 0

    cdef int end_copy(self) except -1:
        self.copying -= 1
        if not self.open and not self.copying and self.membership.usable():
            self.give_up()  # another thread closed this end during the copy
            self.membership.flush()
        self.membership.mapping.unpin()
        return self.membership.end_use()

    cdef int enlist(self) except -1:
        """Make the end known to the membership; if that fails, free its slot."""
        self.open = True
        try:
            self.membership.ends.add(self)
            self.membership.flush()
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
