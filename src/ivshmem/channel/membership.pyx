# cython: language_level=3, binding=True, freethreading_compatible=True
# cython: embedsignature=True, embedsignature.format=clinic
"""Internal: a process's place in an area of channels, its beat, and the rings that it sends.

Knows: joining, beats, rings. Does not know: how an end sleeps; what passes through a channel.

Invariants:
1. The GIL is held during each call of the header, except ivshmem_beat and copies of payloads, which
   touch nothing that an end keeps. Where there is no GIL, the critical section of the end is held;
   what ends share is here, and each of these is safe by itself: `rings` by its lock, `watchers` by
   atomic changes, dictionaries by their own locks.
2. A ring is never waited for. Whichever thread comes first sends what another has noted.
3. The memory stays mapped while the membership is open, also if the region is closed: the thread of
   the beat may be between two of its loads.
4. The place is given back after the last store that this process can make: after buffers of loans,
   and copies without the GIL. A forked child stores nothing.
"""

cimport cython
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset, strncpy

from ..native.bell cimport ring_bell
from ..native.descriptors cimport now, place_of, time_left
from ..native.mapping cimport Mapping
from ..native.syscalls cimport (
    ACQUIRE, ESHUTDOWN, eventfd_read, IVSHMEM_CLOSING, ivshmem_count, ivshmem_enter,
    ivshmem_leave, ivshmem_pause, ivshmem_shut, ivshmem_state, pollfd, ppoll, RELEASE, timespec,
    word_exchange, word_store,
)
from ..native.syscalls cimport POLLIN as _POLLIN
from .header cimport *
from .processes cimport ivshmem_process_ended, ivshmem_process_start

import contextlib
import os
import threading
import weakref

from ..errors import (
    ChannelCorrupt, ChannelError, ClosedError, IvshmemError, NoChannels, NoInterrupts, RegionError,
)
from ..text import plain
from . import identity


cdef extern from "ivshmem_channel.h":
    uint64_t IVSHMEM_PEER_MUTE, IVSHMEM_NO_PEER

NO_AREA = (
    "the region has no room for channels: make it by `ivshmem serve --channels SIZE`, or by"
    " Directory.create(channels=SIZE)"
)

# Nanoseconds between two looks of the beat's thread, where no ring can come.
cdef int64_t PAUSE = 1_000_000

cdef unsigned int generation = 0  # of this process: a forked child has another


def _after_fork():
    global generation
    generation += 1


os.register_at_fork(after_in_child=_after_fork)


cdef class Dependent:
    """What a membership looks after at each beat, and closes at its end: an end of a channel."""

    cdef int beat(self) except -1:
        """Do what an end does once a beat."""
        return 0

    cdef bint is_rung(self) noexcept:
        """Whether peers ring this process for the end, although it can only read."""
        return False


cdef void note_ring(void *context, unsigned peer, unsigned vector) noexcept nogil:
    cdef Rings *rings = <Rings *>context
    while word_exchange(&rings.lock, False, 1, ACQUIRE):
        ivshmem_pause()
    if rings.count < MOST_RINGS:
        rings.targets[rings.count] = EVERY_PEER if peer == EVERY_PEER else peer << 16 | vector
        rings.count += 1
    word_store(&rings.lock, False, 0, RELEASE)


cdef bint next_ring(Rings *rings, uint32_t *target) noexcept nogil:
    """Take a ring that was noted, by whichever thread; whether there was one."""
    cdef bint found
    while word_exchange(&rings.lock, False, 1, ACQUIRE):
        ivshmem_pause()
    found = rings.count > 0
    if found:
        rings.count -= 1
        target[0] = rings.targets[rings.count]
    word_store(&rings.lock, False, 0, RELEASE)
    return found


cdef int64_t tell_time(void *context) noexcept nogil:
    return now()


@cython.final  # so that the compiler inlines its checks
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
        self.ends = {}
        self.threads = threading.local()
        self.loops = weakref.WeakKeyDictionary()
        region.borrow()
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
        self.member.machine = identity.machine()
        if not region.fixed:
            self.member.process = os.getpid()
            self.member.started = ivshmem_process_start(self.member.process)
            self.name_peer()
            memset(text, 0, sizeof(text))
            encoded = name.encode(errors="replace")[: 8 * IVSHMEM_NAME_WORDS]
            strncpy(text, encoded, 8 * IVSHMEM_NAME_WORDS)
            code = ivshmem_join(&self.member, int.from_bytes(os.urandom(8), "little"), text)
            if code:
                raise self.fail(code, NULL, "")
            self.joined = True
        self.state = 0
        self.flush()

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

    cdef bint is_own(self) noexcept:
        """Whether this process made it: it is not a forked child's copy."""
        return self.generation == generation

    cdef bint usable(self) noexcept:
        """Whether this process may store into the memory: neither closed nor a forked child's."""
        return (
            self.is_own()
            and not ivshmem_state(&self.state) & IVSHMEM_CLOSING
            and not ivshmem_state(&self.mapping.views) & IVSHMEM_CLOSING
        )

    cdef bint has_place(self) noexcept:
        """Whether this process may store, and its place is its own.

        A process that was stopped asks this before it stores: its slots may be another's. (Uncached
        memory is slow to read: there only the thread of the beat looks.)
        """
        return self.usable() and not (
            self.joined and self.member.area.memory.mapping == 0 and ivshmem_load(
                &self.member.area.memory,
                ivshmem_place_at(&self.member.area, self.member.place.index),
            ) != self.member.number
        )

    cdef int check(self) except -1:
        if not self.has_place():
            raise self.unusable()
        return 0

    cdef object unusable(self):
        if not self.is_own():
            return RuntimeError("a forked child may only close what it has of channels")
        if self.usable() and not self.has_place():
            self.lose_place()
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
        cdef uint32_t target = 0
        while self.rings.count and next_ring(&self.rings, &target):
            if self.doorbells is not None:
                self.ring(target)
        return 0

    cdef int ring(self, uint32_t target) except -1:
        cdef Doorbell bell
        cdef int code
        if target == <uint32_t>EVERY_PEER:
            try:
                if self.doorbells.registers is None:  # a guest's device knows no peers
                    self.doorbells.ring_all_nowait(None, self.vector)
            except (IvshmemError, OSError):
                pass
            return 0
        bell = self.bells.get(target)
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

    cdef void watch(self, int count) noexcept:
        """Count ends whose descriptor a program watches."""
        ivshmem_count(&self.watchers, count)

    # -- the beat ---------------------------------------------------------------------------------

    def run(self):
        """Beat, until `close`: what the thread of the beat does."""
        cdef pollfd one
        cdef timespec left
        cdef int64_t next_beat = now()
        cdef int64_t limit
        cdef uint64_t count
        cdef int code
        cdef bint due
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
                        limit = min(limit, now() + PAUSE)
                    if ppoll(&one, 1, time_left(limit, &left), NULL) > 0:
                        eventfd_read(one.fd, &count)
                    due = now() >= next_beat
                    if due and not ivshmem_state(&self.state) & IVSHMEM_CLOSING:
                        next_beat = now() + self.beat
                        if not self.mapping.fixed:
                            code = ivshmem_beat(&self.member)
                        self.look_for_mutes()
                if not self.closed:
                    self.after_beat(code)
                    if due and self.sleepers:
                        self.kick_all()
        finally:
            if ivshmem_leave(&self.state):
                self.release()

    cdef void look_for_mutes(self) noexcept nogil:
        """Find out whether some process at work cannot ring this one: then its sleepers poll.

        A process that can only read polls, unless all its ends are rung always.
        """
        cdef ivshmem_memory *memory = &self.member.area.memory
        cdef uint64_t at, peer, process, machine
        cdef bint polls = self.vector < 0
        cdef unsigned i
        if memory.readonly:
            return  # `after_beat` asks the ends
        for i in range(self.member.area.places):
            if polls:
                break
            if i == self.member.place.index:
                continue
            at = ivshmem_place_at(&self.member.area, i)
            peer = ivshmem_peer_at(&self.member.area, i)
            if peer == IVSHMEM_NO_PEER:
                continue
            if peer & IVSHMEM_PEER_MUTE:
                polls = True
            elif (peer ^ self.member.peer) & 0xffff == 0:
                # Clients of one broker have one id: they cannot ring one another.
                process = ivshmem_load(memory, at + IVSHMEM_PLACE_PROCESS)
                machine = ivshmem_load(memory, at + IVSHMEM_PLACE_MACHINE)
                polls = (
                    ivshmem_value(process) != self.member.process
                    or ivshmem_value(machine) != self.member.machine
                )
        self.polls = polls

    cdef list open_ends(self):
        # Other threads open and close ends: values() alone would find the dictionary changed.
        found = [end() for end in list(self.ends.values())]
        return [end for end in found if end is not None]

    cdef int look_for_quiet_ends(self) except -1:
        """Find out, where memory can only be read, whether peers ring for each end."""
        rung = [(<Dependent>end).is_rung() for end in self.open_ends()]
        self.polls = self.vector < 0 or not all(rung)
        return 0

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
        if code > 0:
            ivshmem_ring_places(&self.member)  # it freed places
        if self.mapping.fixed:
            self.look_for_quiet_ends()
        self.look_after_ends()
        return self.flush()

    cdef int look_after_ends(self) except -1:
        """Let each end do what it does once a beat."""
        for end in self.open_ends():
            with contextlib.suppress(IvshmemError, OSError):
                (<Dependent>end).beat()
        return 0

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

    def has_foreign_places(self):
        """Return whether a process of another machine, a virtual one for instance, is at work."""
        cdef ivshmem_memory *memory = &self.member.area.memory
        cdef uint64_t number, machine
        cdef ivshmem_place place
        cdef unsigned i
        self.check()
        for i in range(self.member.area.places):
            number = ivshmem_load(memory, ivshmem_place_at(&self.member.area, i))
            machine = ivshmem_load(
                memory, ivshmem_place_at(&self.member.area, i) + IVSHMEM_PLACE_MACHINE
            )
            place.index = i
            place.epoch = ivshmem_epoch(number)
            if (
                ivshmem_value(number) != 0
                and ivshmem_flags(number) == IVSHMEM_LIVE
                and ivshmem_value(machine) != self.member.machine
                and not self.is_silent(place)
            ):
                return True
        return False

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
        if ivshmem_value(number) == 0 or not ivshmem_place_free(
            &self.member.area, index, number
        ):
            return False
        ivshmem_ring_places(&self.member)
        self.flush()
        return True

    # -- the end ----------------------------------------------------------------------------------

    def close(self):
        """Close all ends, and leave the area. A forked child only forgets what it has.

        Raises:
            BufferError: a View of a message is alive. All else is closed.
        """
        error = None
        if self.is_own() and not self.closed and not self.mapping.closed:
            for end in self.open_ends():
                try:
                    end.close()
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
        if self.is_own():
            self.kick_all()
            ending.signal(0)
        if ivshmem_shut(&self.state) or not self.is_own():
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
            self.mapping.give_back()
        return 0

    cdef void leave(self) noexcept:
        if self.joined and self.is_own():
            ivshmem_leave_area(&self.member)
        self.joined = False

    def __dealloc__(self):
        if self.pinned:
            self.leave()
            self.mapping.give_back()
        free(self.pulses)

    cdef str whose(self, uint64_t owner):
        """Say to which place a word belongs, by the owner word of its slot."""
        cdef ivshmem_place place = ivshmem_place_of(owner)
        if ivshmem_flags(owner) == IVSHMEM_SLOT_FREE:
            return "which belongs to no place"
        for index, epoch, _, _, _, process, name in self.places():
            if index == place.index and epoch == place.epoch:
                return f"which belongs to place {index} (process {process}, {plain(name)!r})"
        return f"which belonged to place {place.index}"

    cdef object fail(self, int code, ivshmem_channel *channel, str name):
        """Return the exception for a result of the header."""
        of = f"channel {name!r}: " if name else ""
        if channel != NULL and code in (IVSHMEM_CORRUPT, IVSHMEM_CLOSED):
            if not ivshmem_is_there(channel):
                return ClosedError(f"channel {name!r} was removed")
        if code == IVSHMEM_CORRUPT and channel != NULL:
            word = channel.fault.word.decode() if channel.fault.word != NULL else "a word"
            whose = self.whose(channel.fault.owner)
            return ChannelCorrupt(
                f"{of}the {word} at {channel.fault.offset:#x}, {whose}, is"
                f" impossible ({channel.fault.seen:#x}): some process that can write to the memory"
                " has spoiled it"
            )
        if code == IVSHMEM_NO_AREA:
            return NoChannels(NO_AREA)
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
                f"{of}another process freed the place of this process"
            )
        if code == IVSHMEM_NO_ATOMICS:
            return ChannelError(
                f"{of}this processor may refuse a compare-exchange in a guest's mapping of the"
                " device, which queues and calls need: only a process of the host can take from it"
            )
        return ChannelError(f"{of}error {-code} of ivshmem_channel.h")
