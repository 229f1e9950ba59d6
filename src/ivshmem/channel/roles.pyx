# cython: language_level=3, binding=True, freethreading_compatible=True
# cython: embedsignature=True, embedsignature.format=clinic
"""Internal: the two roles in a channel, writing and reading, as far as all kinds share them.

Knows: taking a slot, cells that are loaned or looked at, copies. Does not know: how a kind
publishes and takes messages.

Invariants:
1. A cell that is loaned, or looked at, is not used for anything else until it is given back.
2. What is copied out counts only after the header has checked it.
"""

cimport cython
from cpython.buffer cimport (
    PyBUF_FORMAT, PyBUF_ND, PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release,
    PyObject_GetBuffer,
)
from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcpy

from ..native.descriptors cimport check_timeout
from ..native.syscalls cimport clock_gettime, timespec
from .header cimport *
from .ends cimport ChannelEnd, was_removed
from .membership cimport Membership
from .records cimport facts_of

from ..errors import ChannelError, ChannelTypeError, MessageTooLong, Overtaken
from ..text import all_of, counted

cdef extern from "<time.h>" nogil:
    enum: CLOCK_REALTIME
    int nanosleep(const timespec *wanted, timespec *left)


cdef uint64_t microseconds() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_REALTIME, &t)
    return <uint64_t>t.tv_sec * 1_000_000 + t.tv_nsec // 1000


cdef int open_channel(
    ChannelEnd end, object channels, Membership membership, dict found
) except -1:
    """Open the channel that was found, and check that its record still says the same.

    Its name alone tells too little: another process may have removed it, and made one of another
    kind or type since. Nor is the state enough: a hostile process can store all of a record.
    """
    cdef ivshmem_record record
    cdef int code = ivshmem_record_read(&membership.member.area, found["index"], &record)
    end.channels = channels
    end.membership = membership
    end.name = found["name"]
    membership.check()
    if code or facts_of(&record) != found:
        raise was_removed(end.name)
    ivshmem_channel_open(&end.channel, &membership.member.area, &record)
    return 0


# -- payloads -------------------------------------------------------------------------------------

cdef bint has_objects(const Py_buffer *view) noexcept:
    """Whether a buffer's format names Python objects; names of fields stand between colons."""
    cdef const char *at = view.format
    cdef bint in_name = False
    while at != NULL and at[0]:
        if at[0] == b":":
            in_name = not in_name
        elif at[0] == b"O" and not in_name:
            return True
        at += 1
    return False


cdef int take_without_objects(object data, Py_buffer *view, int flags) except -1:
    """Get a buffer whose bytes are sent, or received into; refuse one of Python objects.

    The bytes of objects are their addresses: a peer that learns them knows where this process has
    its memory, and one that sets them lets this process use what they point to.
    """
    try:
        PyObject_GetBuffer(data, view, flags | PyBUF_ND | PyBUF_FORMAT)
    except (BufferError, ValueError):  # numpy has no format for dates, nor what is beside them
        PyObject_GetBuffer(data, view, flags)
        refused = getattr(getattr(data, "dtype", None), "hasobject", False)
    else:
        refused = has_objects(view)
    if refused:
        PyBuffer_Release(view)
        raise ChannelTypeError(
            f"a {type(data).__name__} of Python objects: its bytes are addresses of this process,"
            " which no peer may see or set; use a dtype without objects, or pickle=True"
        )
    return 0


cdef int check_in_place(object message_type, str name) except -1:
    """Refuse what sends, or shows, the bytes of a message where messages are pickled objects."""
    if message_type is not None and not message_type.in_place:
        raise ChannelTypeError(
            f"channel {name!r}: with pickle=True messages are objects, which have no bytes to lend,"
            " view or copy in parts: use `put` and `get`"
        )
    return 0


cdef int take_typed(object message_type, str name, object buffer, Py_buffer *view) except -1:
    """Do what take_target does, where messages have a type."""
    check_in_place(message_type, name)
    take_buffer(buffer, view, PyBUF_WRITABLE)
    if view.itemsize != 1:
        try:
            message_type.check_dtype(buffer)
        except BaseException:
            PyBuffer_Release(view)
            raise
    return 0


cpdef object flat(object data):
    """Return a memoryview of the bytes of what is to be sent.

    Raises:
        ChannelTypeError: a buffer of Python objects.
        TypeError, BufferError, ValueError: no buffer, or one whose parts do not lie side by side.
    """
    cdef Py_buffer view
    take_buffer(data, &view, PyBUF_SIMPLE)  # which refuses objects
    PyBuffer_Release(&view)
    return memoryview(data).cast("B")


# -- writers --------------------------------------------------------------------------------------

@cython.no_gc_clear
cdef class WriterEnd(ChannelEnd):
    """The slot of a writer, or of a caller."""

    def __cinit__(
        self, channels, Membership membership not None, dict found not None, message_type=None
    ):
        cdef ivshmem_geometry *g
        cdef ivshmem_writer_tables *tables = &self.writer.tables
        cdef uint64_t cells
        cdef int code
        open_channel(self, channels, membership, found)
        self.type = message_type
        g = &self.channel.record.geometry
        cells = self.channel.layout.cells_each
        self.times = g.options & IVSHMEM_TIMES != 0
        self.claims = g.kind == IVSHMEM_QUEUE or g.kind == IVSHMEM_CALLS
        self.writer.channel = &self.channel
        self.writer.member = &membership.member
        tables.cell_of = <uint32_t *>calloc(g.slots, sizeof(uint32_t))
        tables.free = <uint32_t *>calloc(cells, sizeof(uint32_t))
        if g.overflow & IVSHMEM_DISCARD:
            tables.references = <uint16_t *>calloc(cells, sizeof(uint16_t))
            tables.pinned = <uint32_t *>calloc(<size_t>g.readers * g.slots + 1, sizeof(uint32_t))
            tables.backlogs = <ivshmem_backlog *>calloc(g.readers + 1, sizeof(ivshmem_backlog))
        if tables.cell_of == NULL or tables.free == NULL or (
            g.overflow & IVSHMEM_DISCARD
            and (tables.references == NULL or tables.pinned == NULL or tables.backlogs == NULL)
        ):
            raise MemoryError
        code = ivshmem_writer_open(&self.writer)
        if code == IVSHMEM_TAKEN:
            more = "" if g.kind == IVSHMEM_VALUE else "; create it with more writers"
            raise ChannelError(
                f"channel {self.name!r}: {all_of(g.writers, 'writer')} open, or wrote messages that"
                f" a reader has yet to read{more}"
            )
        if code:
            raise self.fail(code)
        self.enlist()

    @cython.critical_section
    def close(self):
        """Free the slot; may be called twice.

        Raises:
            BufferError: a memoryview or an array of a Loan is alive. Nothing has changed then.
        """
        if self.open and self.exports and self.membership.usable():
            raise BufferError(
                f"channel {self.name!r}: {counted(self.exports, 'memoryview')} or arrays of loans"
                " are in use: release them first (del)"
            )
        ChannelEnd.close(self)

    def __dealloc__(self):
        free(self.writer.tables.cell_of)
        free(self.writer.tables.free)
        free(self.writer.tables.references)
        free(self.writer.tables.pinned)
        free(self.writer.tables.backlogs)

    # As a ChannelEnd.

    cdef int ready(self) noexcept:
        if self.claims:
            return ivshmem_queue_ready(&self.writer)
        return ivshmem_writer_ready(&self.writer)

    cdef int attempt(self) except? -2:
        return self.ready()

    cdef int begin_sleep(self) except? -2:
        if self.claims:
            ivshmem_queue_writer_sleep(&self.writer)
            return ivshmem_queue_ready(&self.writer)
        return ivshmem_writer_sleep(&self.writer)

    cdef void end_sleep(self) noexcept:
        ivshmem_sleep_end(&self.channel, &self.writer.sleep)

    cdef int restore(self) except -1:
        ivshmem_writer_beat(&self.writer)
        if self.awaited and self.ready() == 0:
            self.membership.kick_all()
        return 0

    cdef int give_up(self) except -1:
        ivshmem_writer_close(&self.writer)
        return 0

    # What all kinds of writers have in common.

    @property
    def limit(self):
        """Bytes that a message can have."""
        return self.channel.record.geometry.limit

    cdef char *at(self, uint32_t cell) noexcept nogil:
        return (
            <char *>self.channel.area.memory.start
            + self.writer.cells_at
            + cell * self.channel.layout.cell_bytes
        )

    cdef object blocked(self, object timeout):
        return TimeoutError(
            f"channel {self.name!r} is full: a reader took nothing for {timeout:g} s"
            if timeout
            else f"channel {self.name!r} is full"
        )

    cdef int loan_cell(self, uint32_t *cell) except -1:
        while ivshmem_loan(&self.writer, cell):
            self.pause_for_cell()
        return 0

    cdef int find_room(self, uint32_t *cell, object timeout, object spin) except -1:
        """Wait until a message can be published, and borrow a cell for it."""
        cdef int code
        check_timeout(timeout)
        while True:
            code = self.ready()
            if code == IVSHMEM_AGAIN:
                code = self.wait(timeout, spin)
                if code == IVSHMEM_AGAIN:
                    raise self.blocked(timeout)
            if code:
                raise self.fail(code)
            if ivshmem_loan(&self.writer, cell) == 0:
                return 0
            self.pause_for_cell()

    cdef int pause_for_cell(self) except -1:
        """Let another thread, which puts a large message, give its cell back."""
        cdef timespec pause
        if not self.putting:
            raise ChannelError(
                f"channel {self.name!r}: {counted(self.writer.loaned, 'loan')} at once, which are"
                " all that it was made for"
            )
        pause.tv_sec = 0
        pause.tv_nsec = 20_000  # of the 0.1 ms that a copy takes as a rule
        with nogil:
            nanosleep(&pause, NULL)
        PyErr_CheckSignals()
        return self.enter()

    cdef int copy_in(self, uint32_t cell, const char *data, uint64_t size) except -1:
        if size < LARGE:
            memcpy(self.at(cell), data, size)
            return 0
        self.begin_copy()
        with nogil:
            memcpy(self.at(cell), data, size)
        return self.end_copy()

    cdef uint64_t send(self, uint32_t cell, uint32_t length, uint64_t user) except? 0:
        """Publish a loan; there is room. The position that it got, of calls."""
        cdef uint64_t position = self.writer.next
        cdef uint64_t time = microseconds() if self.times else 0
        if self.claims:
            position = ivshmem_queue_publish(&self.writer, cell, length, time, user)
        else:
            ivshmem_writer_add(&self.writer, cell, length, time, user)
            ivshmem_writer_announce(&self.writer)
            self.missed += self.writer.missed
        if self.membership.rings.count:
            self.membership.flush()
        return position

    cdef int wait_again(self, object timeout) except -1:
        """After a time without the GIL: whether there is still room, and a channel."""
        cdef int code
        code = self.wait(timeout, None)
        if code == IVSHMEM_AGAIN:
            raise self.blocked(timeout)
        if code:
            raise self.fail(code)
        return 0

    cdef object too_long(self, object size):
        return MessageTooLong(
            f"channel {self.name!r}: a message of {size} bytes, and its limit is"
            f" {self.channel.record.geometry.limit}"
        )


# -- readers --------------------------------------------------------------------------------------

@cython.no_gc_clear
cdef class ReaderEnd(ChannelEnd):
    """The slot of a reader, or of a server; or, where memory can only be read, none."""

    def __cinit__(
        self,
        channels,
        Membership membership not None,
        dict found not None,
        message_type=None,
        uint32_t overflow=0,
        uint32_t history=0,
    ):
        cdef ivshmem_geometry *g
        cdef int code
        open_channel(self, channels, membership, found)
        self.type = message_type
        g = &self.channel.record.geometry
        self.holds = g.views + 2
        self.held = <Held *>malloc(self.holds * sizeof(Held))
        if self.held == NULL:
            raise MemoryError
        self.reader.channel = &self.channel
        self.reader.member = &membership.member
        self.reader.overflow = <ivshmem_overflow>overflow
        code = ivshmem_reader_open(&self.reader, history)
        if code == IVSHMEM_TAKEN:
            raise ChannelError(
                f"channel {self.name!r}: {all_of(g.readers, 'reader')} open; create it with more"
                " readers"
            )
        if code:
            raise self.fail(code)
        self.enlist()

    def __dealloc__(self):
        free(self.held)

    cdef int give_up(self) except -1:
        ivshmem_reader_close(&self.reader)
        return 0

    @cython.critical_section
    def close(self):
        """Free the slot; may be called twice.

        Raises:
            BufferError: a View of a message is alive. Nothing has changed then.
        """
        if self.open and self.views and self.membership.usable():
            raise BufferError(f"{counted(self.views, 'view')} of messages: release them first")
        ChannelEnd.close(self)

    cdef bint is_rung(self) noexcept:
        return self.usable() and ivshmem_is_rung_always(&self.membership.member, &self.channel)

    cdef int make_room(self) except -1:
        """See to it that `hold` has memory for one more message.

        Each thread that copies a large message holds it. What takes a message calls this before:
        afterwards nothing may fail.
        """
        cdef Held *grown
        if self.holding == self.holds:
            grown = <Held *>realloc(self.held, 2 * <size_t>self.holds * sizeof(Held))
            if grown == NULL:
                raise MemoryError
            self.held = grown
            self.holds *= 2
        return 0

    cdef int hold(self, const ivshmem_message *message) except -1:
        """Note that a message is being looked at."""
        self.make_room()
        self.held[self.holding].message = message[0]
        self.held[self.holding].kept = False
        self.holding += 1
        return 0

    cdef int put_back(self, const ivshmem_message *message) except -1:
        """Undo that a message was taken, which is held: what took it failed."""
        return self.let_go(message.writer, message.position)

    cdef bint is_for_ever(self, object error) except -1:
        """Whether a message that its type cannot decode will never be decoded.

        Other exceptions are those of a moment: of a signal handler, or for lack of memory.
        """
        return isinstance(error, self.type.undecodable) and not isinstance(error, MemoryError)

    cdef int forget(self, unsigned writer, uint64_t position) except -1:
        """Note that a message is not looked at any more; its writer hears of it later."""
        cdef uint32_t i
        for i in range(self.holding):
            if (
                self.held[i].message.writer == writer
                and self.held[i].message.position == position
            ):
                self.holding -= 1
                self.held[i] = self.held[self.holding]
                break
        return 0

    cdef int let_go(self, unsigned writer, uint64_t position) except -1:
        """Do the same, and tell the writer up to which message nothing is looked at."""
        cdef uint64_t oldest = self.reader.sources[writer].next
        cdef uint32_t i
        self.forget(writer, position)
        for i in range(self.holding):
            if self.held[i].message.writer == writer and (
                ivshmem_ahead(oldest, self.held[i].message.position) < <uint64_t>1 << 39
            ):
                oldest = self.held[i].message.position
        if self.usable():
            ivshmem_release(&self.reader, writer, oldest)
            if self.membership.rings.count:
                self.membership.flush()
        return 0

    cdef object starved(self):
        return Overtaken(
            f"channel {self.name!r}: its writer is faster than this reader: {TRIES} messages in a"
            " row were overwritten while they were copied"
        )

    cdef int copy_to(self, const ivshmem_message *message, char *into) except? -2:
        """Copy a message out, check it and let it go; 0, or IVSHMEM_OVERTAKEN."""
        cdef const char *at = <const char *>self.channel.area.memory.start + message.offset
        cdef int code
        if message.length < LARGE and not self.holding:
            memcpy(into, at, message.length)
            code = ivshmem_check(&self.channel, message)
            ivshmem_release(
                &self.reader, message.writer, self.reader.sources[message.writer].next
            )
            if self.membership.rings.count:
                self.membership.flush()
        else:
            self.hold(message)
            self.membership.mapping.pin()  # which keeps the region from being closed
            try:
                with nogil:
                    ivshmem_copy_payload(into, at, message.length)
                self.enter()
                code = ivshmem_check(&self.channel, message)
            finally:
                self.let_go(message.writer, message.position)
                self.membership.mapping.unpin()
        if code:
            ivshmem_reader_lose(&self.reader, message.writer)
        return code
