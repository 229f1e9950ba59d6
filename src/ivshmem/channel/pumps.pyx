# cython: language_level=3, binding=True, freethreading_compatible=True
# cython: embedsignature=True, embedsignature.format=clinic
"""Internal: a connection of a channel joined with a descriptor: bytes go from one to the other.

Knows: which side each direction waits for. Does not know: what an end or a reset means to the other
side; whose turn it is.

Each direction moves until one side would wait: then only that side is waited for. All of that is in
C, since in an emulated guest a call from Python to Python costs as much as a system call.
"""

cimport cython
from libc.stdint cimport int64_t, uint64_t

from .header cimport IVSHMEM_AGAIN, IVSHMEM_CLOSED
from .stream_poll cimport Sleeper, StreamPoll
from .streams cimport ABORTED, ENDED, FD_WAITS, RECEIVE, SEND, Stream

import select

cdef enum:
    SLEEPING = 0
    MORE = 1
    NO_SOURCE = 2
    NO_STREAM = 3
    RESET = 4
    BLOCKED = 5
    LEFT = 6
    HANGUP = 7
    IN = 1  # as in <sys/epoll.h>
    OUT = 4
    HUNG = 0x2018  # RDHUP, HUP, ERR
    HUP_OR_ERROR = 0x18
    OUT_OR_ERROR = 0x1c

# What a turn came to, unless nothing can move now. Another turn is due.
HAS_MORE = MORE  # its share was used, or a direction has ended
SOURCE_ENDED = NO_SOURCE  # the descriptor has no more to read
STREAM_ENDED = NO_STREAM  # the other end of the connection sends no more
STREAM_RESET = RESET  # .. or is gone without saying so
TARGET_BLOCKS = BLOCKED  # for the first time: from now on its EPOLLOUT is to be watched
RESET_WAITS = LEFT  # the other end is gone in this way; what it sent before waits for the target
HUNG_UP = HANGUP  # no turn: epoll(7) told of an error, or that nobody is at the other end

assert (select.EPOLLIN, select.EPOLLOUT) == (IN, OUT)
assert select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR == HUNG


@cython.final
cdef class Pump:
    """A Stream and a descriptor; or two, of which one is read from and one is written to.

    Args:
        poll: where the stream sleeps.
        stream, source, target: they stay the caller's, who closes the pump before them.
        share: bytes that a turn moves at most, in each direction.
        piece: bytes that one system call moves at most.
        short_is_empty: a read that brings less than was asked for has emptied the descriptor.
        told: called with what a turn came to, unless it sleeps, and None; or with 0 and the error
            that ended it.

    Attributes:
        inward, outward: whether the direction goes on: into the stream, and out of it.
        readable: whether the source may have something to read.
        failed: whether it was the inward direction that raised the last error.
        into, out: bytes that were moved.
    """

    cdef Stream stream
    cdef Sleeper sleeper
    cdef object told
    cdef int source
    cdef int target
    cdef uint64_t share
    cdef uint64_t piece
    cdef public bint readable  # until it turns out that it is not
    cdef bint writable
    cdef bint to_the_end  # a short read is followed by another one
    cdef bint watched  # that the target blocks has been told
    cdef bint aborted  # the other end is gone by a reset
    cdef bint abort_told
    cdef public bint inward
    cdef public bint outward
    cdef readonly bint failed
    cdef readonly uint64_t into
    cdef readonly uint64_t out

    def __init__(
        self,
        StreamPoll poll not None,
        Stream stream not None,
        int source,
        int target,
        *,
        uint64_t share,
        uint64_t piece,
        bint short_is_empty,
        told,
    ):
        self.stream = stream
        self.source = source
        self.target = target
        self.share = share
        self.piece = piece
        self.to_the_end = not short_is_empty
        self.told = told
        self.inward = self.outward = self.readable = self.writable = True
        self.sleeper = poll.add(stream, self)

    def __reduce__(self):
        raise TypeError(f"a {type(self).__name__} cannot be copied or pickled")

    def noted(self, int events):
        """Take in what epoll(7) says of the descriptors, and have a turn."""
        if events & (IN | HUNG):
            self.readable = True
        if events & OUT_OR_ERROR:
            self.writable = True
        if events & HUNG:
            self.to_the_end = True
        self.step()
        if events & HUP_OR_ERROR and self.sleeper is not None:
            self.told(HANGUP, None)  # a direction that waits for the ring does not find out

    def awaken(self, int directions):
        """Take in what the poll says of the stream, and have a turn."""
        self.take_in(directions)
        self.step()

    cdef void take_in(self, int directions) noexcept:
        if directions & 1 << ENDED:
            self.inward = False  # what the descriptor still has reaches nobody
        if directions & 1 << ABORTED:
            self.aborted = True

    def turn(self):
        """Move a fair share, in both directions."""
        self.step()

    cdef int step(self) except -1:
        cdef int result
        if self.sleeper is None:
            return 0  # it was closed
        try:
            result = self.move()
        except Exception as error:
            self.told(SLEEPING, error)
        else:
            if result != SLEEPING:
                self.told(result, None)
        return 0

    cdef int move(self) except -1:
        """Move a fair share; what that came to."""
        cdef int found = SLEEPING
        cdef int result = SLEEPING
        cdef int awaited = 0
        if self.inward and self.readable:
            self.failed = True
            result = self.fill()
            if result > MORE:
                return result
        if self.outward and self.writable:
            self.failed = False
            found = self.drain()
            if found > MORE:
                return found
        if result or found or not (self.inward or self.outward):
            return MORE
        if self.aborted and not self.abort_told:
            self.abort_told = True
            return LEFT
        if self.inward:
            awaited = 1 << ENDED | (1 << SEND if self.readable else 0)
        if self.outward:
            awaited |= 1 << (RECEIVE if self.writable else ABORTED)
        if self.aborted:
            awaited &= ~(1 << ABORTED)
        found = self.sleeper.sleep(awaited)
        if found:
            self.take_in(found)
            return MORE
        return SLEEPING

    cdef int fill(self) except -1:
        cdef uint64_t moved = 0
        cdef int64_t n
        while moved < self.share:
            n = self.stream.move(SEND, self.source, self.piece)
            if n > 0:
                self.into += n
                moved += n
                if self.stream.partly and not self.to_the_end:
                    self.readable = False
                    return SLEEPING
            elif n == 0:
                return NO_SOURCE
            else:
                if n == FD_WAITS:
                    self.readable = False
                elif n == IVSHMEM_CLOSED:
                    self.inward = False
                return SLEEPING
        return MORE

    cdef int drain(self) except -1:
        cdef uint64_t moved = 0
        cdef int64_t n
        while moved < self.share:
            n = self.stream.move(RECEIVE, self.target, self.piece)
            if n > 0:
                self.out += n
                moved += n
                if not self.stream.partly:
                    continue
            elif n == 0:
                return NO_STREAM
            elif n == IVSHMEM_CLOSED:
                return RESET
            elif n == IVSHMEM_AGAIN:
                return SLEEPING
            self.writable = False
            if self.watched:
                return SLEEPING
            self.watched = True
            return BLOCKED
        return MORE

    def close(self):
        """Move no more; may be called twice."""
        if self.sleeper is not None:
            self.sleeper.close()
            self.sleeper = None
            self.told = None
