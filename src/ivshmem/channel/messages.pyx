# cython: language_level=3, binding=True, freethreading_compatible=True
# cython: embedsignature=True, embedsignature.format=clinic
"""Internal: the ends of a channel of messages, and of a value: writers, loans, readers, views.

Knows: payloads as Python sees them. Does not know: slots and cells (roles.pyx); the protocol, which
is in ivshmem_channel.h; how an end sleeps.

Invariant: the memory of a Loan or a View is not used for anything else until every buffer over it
is released.
"""

cimport cython
from cpython.buffer cimport (
    PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer,
)
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memcpy

from ..native.spin cimport Probe
from .header cimport *
from .roles cimport LARGE, microseconds, ReaderEnd, TRIES, WriterEnd

import operator

from ..errors import (
    ChannelError, ChannelTypeError, ClosedError, MessagesLost, MessageTooLong, Overtaken,
)
from ..text import counted
from . import asynchronous

# -- writers --------------------------------------------------------------------------------------


@cython.no_gc_clear
cdef class Writer(WriterEnd):
    """One writer of messages, of a queue or of a value; made by its `writer()`.

    Attributes:
        name: of the channel.
        limit: bytes that a message can have.
        missed: how often a reader that discards did not get a message.
    """

    @cython.binding(False)  # a function that binds adds 40 ns to a call
    @cython.critical_section
    def put(self, data, timeout=None, *, spin=None):
        """Copy a message into the channel.

        Args:
            data: bytes, or any contiguous buffer. A channel with a type takes what fits the type.
            timeout: seconds that readers which block may hold this call up; None: for ever; 0: not
                at all.
            spin: as of `Endpoint.wait`.

        Returns:
            How many readers that discard did not get it: their part of the channel is full.

        Raises:
            TimeoutError: a reader that blocks left no room in time. Nothing was published.
            MessageTooLong: the channel's limit is less.
            ChannelTypeError: it does not fit the channel's type.
            ChannelCorrupt, ClosedError: as of all calls.
        """
        cdef Py_buffer view
        cdef uint32_t cell = 0
        if self.type is not None:
            data = self.type.encode(data)
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            self.enter()  # last: what stands before can run other threads, which close it
            if <uint64_t>view.len > self.channel.record.geometry.limit:
                raise self.too_long(view.len)
            self.find_room(&cell, timeout, spin)
            self.putting += 1
            try:
                self.copy_in(cell, <const char *>view.buf, view.len)
                if view.len >= LARGE:
                    self.wait_again(timeout)
            except BaseException:
                ivshmem_loan_drop(&self.writer, cell)
                raise
            finally:
                self.putting -= 1
            self.send(cell, view.len, 0)
            return self.writer.missed
        finally:
            PyBuffer_Release(&view)

    @cython.critical_section
    def put_parts(self, parts, timeout=None, *, spin=None):
        """Copy several buffers into one message, one after the other; otherwise as `put`."""
        cdef Loan loan
        buffers = [memoryview(part).cast("B") for part in parts]
        loan = self.loan(sum(map(len, buffers)))
        try:
            with memoryview(loan) as into:
                at = 0
                for part in buffers:
                    into[at : at + len(part)] = part
                    at += len(part)
        except BaseException:
            loan.drop()
            raise
        return loan.publish(timeout, spin=spin)

    @cython.critical_section
    def put_rows(self, rows, timeout=None, *, spin=None):
        """Publish each row of an array as a message, and announce them together.

        Args:
            rows: a contiguous buffer of two dimensions or more (a numpy array, a memoryview): each
                row is a message.
            timeout, spin: as of `put`; the time for all.

        Returns:
            How many were published: all, unless the time was over; then at least one.

        Raises:
            TimeoutError: not one was published.
            MessageTooLong, ChannelCorrupt, ClosedError: as of `put`.
        """
        cdef Py_buffer view
        cdef uint32_t cell = 0
        cdef uint64_t size, i, count
        cdef uint64_t time
        cdef int code = 0
        cdef object whole = memoryview(rows)
        if whole.ndim < 2:
            raise ValueError("rows: a buffer of two dimensions is needed, one row for each message")
        if self.claims or self.channel.record.geometry.kind == IVSHMEM_VALUE:
            raise ChannelTypeError(f"channel {self.name!r} takes one message at a time")
        count = whole.shape[0]
        PyObject_GetBuffer(rows, &view, PyBUF_SIMPLE)
        try:
            self.enter()
            size = view.len // count if count else 0
            if size > self.channel.record.geometry.limit:
                raise self.too_long(size)
            time = microseconds() if self.times else 0
            i = 0
            while i < count:
                code = ivshmem_writer_ready(&self.writer)
                if code == IVSHMEM_AGAIN:
                    if i:
                        self.announce()
                    code = self.wait(timeout, spin)
                    if code == IVSHMEM_AGAIN:
                        if i:
                            return i
                        raise self.blocked(timeout)
                if code:
                    raise self.fail(code)
                if ivshmem_loan(&self.writer, &cell):
                    self.pause_for_cell()
                    continue  # look again whether there is room
                memcpy(self.at(cell), <const char *>view.buf + i * size, size)
                ivshmem_writer_add(&self.writer, cell, <uint32_t>size, time, 0)
                self.missed += self.writer.missed
                i += 1
            self.announce()
            return i
        finally:
            PyBuffer_Release(&view)

    def put_async(self, data, timeout=None):
        """The twin of `put` for asyncio: a coroutine. To cancel it takes nothing."""
        return asynchronous.until_in_time(self, self.put, timeout, data)

    def put_parts_async(self, parts, timeout=None):
        """The twin of `put_parts` for asyncio: a coroutine. To cancel it takes nothing."""
        return asynchronous.until_in_time(self, self.put_parts, timeout, parts)

    def put_rows_async(self, rows, timeout=None):
        """The twin of `put_rows` for asyncio: a coroutine. To cancel it takes nothing."""
        return asynchronous.until_in_time(self, self.put_rows, timeout, rows)

    cdef int announce(self) except -1:
        ivshmem_writer_announce(&self.writer)
        return self.membership.flush()

    def loan(self, size=None):
        """Borrow the memory of a message, to write into it without a copy.

        Args:
            size: bytes; None: the channel's limit, or the size of its type.

        Returns:
            A Loan: publish it, or use it in `with`, whose end publishes it.

        Raises:
            MessageTooLong: the channel's limit is less.
            ChannelError: as many loans as the channel allows are out.
            ClosedError: as of all calls.
        """
        cdef uint64_t wanted
        self.enter()
        size = self.channel.record.geometry.limit if size is None else operator.index(size)
        if size < 0:
            raise ValueError(f"no message has {size} bytes")
        wanted = min(size, 1 << 40)
        if wanted > self.channel.record.geometry.limit:
            raise self.too_long(wanted)
        return Loan(self, wanted)


@cython.no_gc_clear
@cython.final
cdef class Loan:
    """Memory of a message that is being written; made by `loan()` of a writer.

    It is a buffer that can be written: memoryview(loan), numpy.asarray(loan). `array` has the
    channel's type. At the end of `with` it is published, or dropped after an exception.

    Attributes:
        size: bytes.
    """

    def __cinit__(self, Writer writer not None, uint32_t size):
        self.writer = writer
        self.size = size
        if size > writer.channel.record.geometry.limit:
            raise writer.too_long(size)
        writer.loan_cell(&self.cell)
        self.live = True

    def __getbuffer__(self, Py_buffer *view, int flags):
        self.check()
        self.writer.begin_copy()  # by the user, until the buffer is released
        try:
            PyBuffer_FillInfo(view, self, self.writer.at(self.cell), self.size, False, flags)
        except BaseException:
            self.writer.end_copy()
            raise
        self.exports += 1
        self.writer.exports += 1

    def __releasebuffer__(self, Py_buffer *view):
        self.exports -= 1
        self.writer.exports -= 1
        self.writer.end_copy()

    def __reduce__(self):
        raise TypeError("a Loan cannot be copied or pickled")

    def __len__(self):
        return self.size

    cdef int check(self) except -1:
        if not self.live:
            raise ClosedError("the loan was published or dropped")
        return self.writer.enter()

    cdef int check_exports(self) except -1:
        if self.exports:
            raise BufferError(
                f"{counted(self.exports, 'memoryview')} or arrays of the loan are in use: release"
                " them first (del)"
            )
        return 0

    @property
    def array(self):
        """A numpy array over the memory, of the channel's type (without one: of bytes).

        `publish` drops it with the loan only if no other reference to it is kept: a loan with
        arrays cannot be published.
        """
        import numpy  # an extra, which only this needs

        if self.writer.type is not None:
            return self.writer.type.array(memoryview(self))
        return numpy.frombuffer(self, "uint8")

    def publish(self, timeout=None, *, size=None, spin=None):
        """Publish it; afterwards the memory is the readers'.

        Args:
            timeout, spin: as of `put`.
            size: bytes of the message, if it is shorter than the loan.

        Returns:
            As of `put`.

        Raises:
            BufferError: a memoryview or an array of it is alive: its owner could change the message
                after it was published. The loan stays.
            TimeoutError: as of `put`. The loan stays.
        """
        cdef Writer writer = self.writer
        cdef uint32_t length = self.size
        cdef int code
        self.check()
        self.check_exports()
        if size is not None:
            if not 0 <= size <= self.size:
                raise ValueError(f"{size} bytes of a loan of {self.size}")
            length = size
        code = writer.wait(timeout, spin)
        if code == IVSHMEM_AGAIN:
            raise writer.blocked(timeout)
        if code:
            raise writer.fail(code)
        self.check()
        self.check_exports()  # another thread may have made one during the wait
        self.live = False
        writer.send(self.cell, length, 0)
        return writer.writer.missed

    def publish_async(self, timeout=None, *, size=None):
        """The twin of `publish` for asyncio: a coroutine. If it is cancelled, the loan stays."""
        return asynchronous.until_in_time(self.writer, self.publish, timeout, size=size)

    def drop(self):
        """Give it back without publishing it; may be called twice.

        Raises:
            BufferError: as of `publish`.
        """
        if not self.live:
            return
        self.check_exports()
        self.live = False
        if self.writer.open:
            ivshmem_loan_drop(&self.writer.writer, self.cell)

    def __enter__(self):
        return self

    def __exit__(self, kind, *error):
        if not self.live:
            return
        if kind is None:
            self.publish()
        elif self.exports == 0:
            self.drop()

    def __del__(self):
        if self.live and self.writer is not None and self.writer.open:
            ivshmem_loan_drop(&self.writer.writer, self.cell)

    def __repr__(self):
        state = "" if self.live else ", published or dropped"
        return f"<ivshmem.channel.Loan of {self.size} bytes{state}>"


# -- readers --------------------------------------------------------------------------------------

cdef int64_t probe_reader(void *what) noexcept nogil:
    cdef ivshmem_reader *reader = <ivshmem_reader *>what
    cdef unsigned i
    for i in range(reader.channel.record.geometry.writers):
        if ivshmem_value(
            ivshmem_get(reader.channel, ivshmem_source_head_at(reader, i))
        ) != reader.sources[i].next:
            return 1
    return 0


@cython.no_gc_clear
cdef class Reader(ReaderEnd):
    """One reader of a channel of messages; made by its `reader()`. It iterates over messages.

    Attributes:
        name: of the channel.
    """

    @property
    def lost(self):
        """How many messages were overwritten before this reader took them."""
        return ivshmem_reader_lost(&self.reader)

    # As a ChannelEnd.

    cdef int attempt(self) except -2:
        return 0 if self.pending else ivshmem_take(&self.reader, &self.message)

    cdef int begin_sleep(self) except -2:
        return ivshmem_reader_sleep(&self.reader)

    cdef void end_sleep(self) noexcept:
        if self.reader.slot != IVSHMEM_NO_SLOT:
            ivshmem_sleep_end(&self.channel, &self.reader.sleep)

    cdef int64_t probe(self, void **what, Probe *probe) except -1:
        what[0] = &self.reader
        probe[0] = probe_reader
        return 1

    cdef int restore(self) except -1:
        ivshmem_reader_beat(&self.reader)
        if self.awaited and (self.pending or probe_reader(&self.reader)):
            self.membership.kick_all()
        return 0

    # Reading.

    cdef int take(self, object timeout, object spin) except -2:
        """Take the next message into `self.message`; 0, or IVSHMEM_AGAIN: none came in time."""
        cdef int code
        cdef ivshmem_message message
        self.enter()
        if self.take_pending():
            return 0
        code = ivshmem_take(&self.reader, &self.message)
        if code == IVSHMEM_AGAIN:
            if timeout is not None and timeout == 0 and not self.watched:
                ivshmem_reader_settle(&self.reader)
                self.membership.flush()
                return code
            code = self.wait(timeout, spin)
            if code == IVSHMEM_AGAIN:
                return code
            if self.take_pending():  # another thread left it
                return 0
        if self.membership.rings.count:
            message = self.message  # another thread may take one during the flush
            self.membership.flush()
            self.enter()
            self.message = message
        if code:
            raise self.fail(code)
        if self.message.lost and self.reader.overflow == IVSHMEM_BLOCK:
            self.keep()
            raise MessagesLost(
                f"channel {self.name!r}: this process was stopped, and writers continued without"
                f" it: {counted(self.message.lost, 'message')} of a writer were lost",
                self.message.lost,
            )
        return 0

    cdef bint take_pending(self) noexcept:
        if not self.pending:
            return False
        self.pending = False
        self.forget(self.message.writer, self.message.position)
        return True

    cdef int keep(self) except -1:
        """Leave the message that was taken for the next call."""
        self.pending = True
        return self.hold(&self.message)

    cdef object copy_out(self):
        """Copy the message that was taken; None: it was overwritten."""
        cdef ivshmem_message message = self.message
        cdef bytes data = PyBytes_FromStringAndSize(NULL, message.length)
        cdef int code = self.copy_to(&message, PyBytes_AS_STRING(data))
        return data if code == 0 else None

    @cython.binding(False)
    @cython.critical_section
    def get(self, timeout=None, *, spin=None):
        """Return a copy of the next message, of any writer.

        Messages of one writer come in its order. After a wait for one writer's message, another
        writer's can come first.

        Args:
            timeout: seconds to wait at most; None: for ever; 0: do not wait.
            spin: as of `Endpoint.wait`.

        Returns:
            bytes, or what the channel's type makes of them; None: no message came in time.

        Raises:
            MessagesLost: of a reader that blocks: this process was stopped or was silent, and
                writers continued without it. The next call returns the next message.
            ChannelCorrupt: a shared word is impossible. The next call looks at the next writer.
            Overtaken: the writer overwrote 64 messages in a row while they were copied.
            ClosedError: the reader, the channels or the region is closed.
        """
        cdef object data
        for _ in range(TRIES):
            if self.take(timeout, spin):
                return None
            data = self.copy_out()
            if data is not None:
                return data if self.type is None else self.type.decode(data)
        raise self.starved()

    @cython.critical_section
    def get_into(self, buffer, timeout=None, *, spin=None):
        """Copy the next message into `buffer`; otherwise as `get`.

        Returns:
            How many bytes the message has; None: no message came in time.

        Raises:
            MessageTooLong: the message has more bytes than the buffer. The next call returns the
                same message.
        """
        cdef Py_buffer view
        cdef ivshmem_message message
        PyObject_GetBuffer(buffer, &view, PyBUF_WRITABLE)
        try:
            for _ in range(TRIES):
                if self.take(timeout, spin):
                    return None
                message = self.message
                if message.length > <uint64_t>view.len:
                    self.message.lost = 0
                    self.keep()
                    raise MessageTooLong(
                        f"a message of {message.length} bytes, and the buffer has {view.len}"
                    )
                if self.copy_to(&message, <char *>view.buf) == 0:
                    return message.length
            raise self.starved()
        finally:
            PyBuffer_Release(&view)

    @cython.critical_section
    def get_rows(self, rows, timeout=None, *, spin=None):
        """Copy the messages that are there into the rows of an array, at most one into each.

        It waits, as `get`, for the first message only.

        Args:
            rows: a contiguous buffer of two dimensions or more, which can be written.

        Returns:
            How many rows were filled; 0: no message came in time.

        Raises:
            MessageTooLong: the first message has more bytes than a row; it is there for the next
                call. (A later one ends the call.)
        """
        cdef Py_buffer view
        cdef uint64_t size, i, count
        cdef int code
        cdef int tries = 0
        cdef ivshmem_message message
        cdef object whole = memoryview(rows)
        if whole.ndim < 2:
            raise ValueError("rows: a buffer of two dimensions is needed, one row for each message")
        count = whole.shape[0]
        PyObject_GetBuffer(rows, &view, PyBUF_WRITABLE)
        try:
            size = view.len // count if count else 0
            i = 0
            while i < count:
                if i == 0:
                    if self.take(timeout, spin):
                        return 0
                else:
                    code = ivshmem_take(&self.reader, &self.message)
                    if code == IVSHMEM_AGAIN:
                        break
                    if code:
                        raise self.fail(code)
                    if self.message.lost and self.reader.overflow == IVSHMEM_BLOCK:
                        self.keep()
                        break
                message = self.message
                if message.length > size:
                    self.message.lost = 0
                    self.keep()
                    if i:
                        break
                    raise MessageTooLong(
                        f"a message of {message.length} bytes, and a row has {size}"
                    )
                if self.copy_to(&message, <char *>view.buf + i * size) == 0:
                    i += 1
                    tries = 0
                else:
                    tries += 1
                    if tries == TRIES:
                        if i:
                            break
                        raise self.starved()
            return i
        finally:
            PyBuffer_Release(&view)

    @cython.critical_section
    def view(self, timeout=None, *, spin=None):
        """Return the next message as a View: its memory itself, without a copy.

        The writer keeps the memory as long as the View lives, if this reader blocks or discards; a
        reader that overwrites can be overtaken.

        Args:
            timeout, spin: as of `get`.

        Returns:
            A View; None: no message came in time.

        Raises:
            ChannelError: as many views as the channel allows are alive.
            MessagesLost, ChannelCorrupt, ClosedError: as of `get`.
        """
        if self.views >= self.channel.record.geometry.views:
            raise ChannelError(
                f"channel {self.name!r}: {counted(self.views, 'view')} at once, which are all"
                " that it was made for: release one"
            )
        if self.take(timeout, spin):
            return None
        return view_of(self, self.message)

    def get_async(self, timeout=None):
        """The twin of `get` for asyncio: a coroutine. To cancel it takes nothing."""
        return asynchronous.until_something(self, self.get, timeout)

    def get_into_async(self, buffer, timeout=None):
        """The twin of `get_into` for asyncio: a coroutine. To cancel it takes nothing."""
        return asynchronous.until_something(self, self.get_into, timeout, buffer)

    async def get_rows_async(self, rows, timeout=None):
        """The twin of `get_rows` for asyncio. To cancel it takes nothing."""
        found = await asynchronous.until_something(self, self._rows_or_none, timeout, rows)
        return found or 0

    def _rows_or_none(self, rows, timeout):
        return self.get_rows(rows, timeout) or None

    def view_async(self, timeout=None):
        """The twin of `view` for asyncio: a coroutine. To cancel it takes nothing."""
        return asynchronous.until_something(self, self.view, timeout)

    def __iter__(self):
        return self

    def __next__(self):
        return self.get()

    def __aiter__(self):
        return self

    def __anext__(self):
        return self.get_async()


@cython.no_gc_clear
@cython.final
cdef class View:
    """A message where it lies; made by `Reader.view`.

    It is a buffer that can be read: memoryview(view), numpy.asarray(view); `array` has the
    channel's type. Its bytes are shared memory: any process that can write to the region can change
    them at any time. Copy (`bytes(view)`) what is to be checked before it is used.

    Release it soon (`with`, or `release()`): it holds memory of the writer.

    Attributes:
        size: bytes.
        writer: the number of the writer's slot.
        position: of the message among those of its writer.
        time: of publication, in seconds since 1970; None if the channel has no times.
        lost: messages of this writer that were overwritten before this one was taken.
    """

    def __init__(self, *_, **__):
        raise TypeError("a View is made by Reader.view")

    def __reduce__(self):
        raise TypeError("a View cannot be copied or pickled: `bytes(view)` is a copy")

    @property
    def size(self):
        return self.message.length

    @property
    def writer(self):
        return self.message.writer

    @property
    def position(self):
        return self.message.position

    @property
    def lost(self):
        return self.message.lost

    @property
    def time(self):
        cdef uint64_t late, today
        if self.reader is None:
            raise TypeError("a View is made by Reader.view")
        if not self.reader.channel.record.geometry.options & IVSHMEM_TIMES:
            return None
        # The message has 44 bits of it, half a year: the rest is that of now.
        today = microseconds()
        late = (today - self.message.time) & ((<uint64_t>1 << 44) - 1)
        if late >= <uint64_t>1 << 43:
            return (today + ((<uint64_t>1 << 44) - late)) / 1e6
        return (today - late) / 1e6

    @property
    def offset(self):
        """Where it lies in the region, in bytes."""
        return self.message.offset

    def __getbuffer__(self, Py_buffer *view, int flags):
        cdef char *start
        if not self.live:
            raise ClosedError("the view was released")
        if not self.reader.usable():
            raise self.reader.membership.unusable()  # its writer does not wait for it any more
        self.reader.membership.mapping.pin()
        start = <char *>self.reader.channel.area.memory.start + self.message.offset
        try:
            PyBuffer_FillInfo(view, self, start, self.message.length, True, flags)
        except BaseException:
            self.reader.membership.mapping.unpin()
            raise
        self.exports += 1

    def __releasebuffer__(self, Py_buffer *view):
        self.exports -= 1
        self.reader.membership.mapping.unpin()

    def __len__(self):
        return self.message.length

    def __bytes__(self):
        """Return a copy; raise Overtaken if the message was overwritten before the copy ended."""
        data = memoryview(self).tobytes()
        self.check()
        return data

    @property
    def array(self):
        """A numpy array over the message, of the channel's type (without one: of bytes)."""
        import numpy  # an extra, which only this needs

        if not self.live:
            raise ClosedError("the view was released")
        if self.reader.type is not None:
            return self.reader.type.array(memoryview(self))
        return numpy.frombuffer(self, "uint8")

    @property
    def __array_interface__(self):
        """What numpy.asarray and others take: address, shape and type; read-only."""
        if not self.live or self.reader.membership.mapping.closed:
            raise ClosedError("the view was released, or the region closed")
        kind, shape = ("|u1", (self.message.length,))
        if self.reader.type is not None:
            kind, shape = self.reader.type.interface(self.message.length)
        address = <size_t>self.reader.channel.area.memory.start + self.message.offset
        return {"version": 3, "typestr": kind, "shape": shape, "data": (address, True)}

    def __dlpack__(self, **options):
        """Export the message, for numpy.from_dlpack or torch.from_dlpack; needs numpy."""
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        """Return DLPack's number of the processor's memory."""
        return (1, 0)

    def check(self):
        """Raise Overtaken if the message was overwritten since it was taken."""
        if not self.overtaken and self.live and self.reader.usable():
            self.overtaken = ivshmem_check(&self.reader.channel, &self.message) != 0
        if self.overtaken:
            raise Overtaken(
                f"channel {self.reader.name!r}: the writer overwrote message"
                f" {self.message.position} while it was looked at; what was seen may be torn"
            )

    def release(self):
        """Give the memory back to the writer; may be called twice.

        Raises:
            BufferError: a memoryview or an array of it is alive.
            Overtaken: the message was overwritten since it was taken. The View is released.
        """
        if not self.live:
            return
        if self.exports:
            raise BufferError(
                f"{counted(self.exports, 'memoryview')} or arrays of the message are in use:"
                " release them first (del)"
            )
        try:
            self.check()
        finally:
            self.abandon()

    def __enter__(self):
        return self

    def __exit__(self, kind, *error):
        if kind is None:
            self.release()
        elif not self.exports:
            self.abandon()

    cdef int abandon(self) except -1:
        if self.live:
            self.live = False
            self.reader.views -= 1
            self.reader.let_go(self.message.writer, self.message.position)
        return 0

    def __del__(self):
        self.abandon()

    def __repr__(self):
        state = "" if self.live else ", released"
        return f"<ivshmem.channel.View of {self.message.length} bytes{state}>"


cdef View view_of(ReaderEnd reader, ivshmem_message message):
    # By value: to make an object can run other code, which takes the reader's next message.
    cdef View view
    reader.hold(&message)
    try:
        view = View.__new__(View)
    except BaseException:
        reader.let_go(message.writer, message.position)
        raise
    reader.views += 1
    view.message = message
    view.reader = reader
    view.live = True
    return view


# -- values ---------------------------------------------------------------------------------------

cdef int64_t probe_value(void *what) noexcept nogil:
    cdef ivshmem_reader *reader = <ivshmem_reader *>what
    return ivshmem_value(ivshmem_head(reader.channel, 0)) != reader.sources[0].next


@cython.no_gc_clear
cdef class ValueReader(ReaderEnd):
    """One reader of a value; made by its `reader()`. It iterates over contents as they change.

    Attributes:
        name: of the channel.
    """

    cdef int attempt(self) except -2:
        """Look for a content that this reader has not seen."""
        if not probe_value(&self.reader):
            return IVSHMEM_AGAIN
        return ivshmem_value_look(&self.reader, &self.message)

    cdef int begin_sleep(self) except -2:
        if self.reader.slot == IVSHMEM_NO_SLOT:
            return IVSHMEM_AGAIN
        ivshmem_sleep_begin(&self.channel, &self.reader.sleep)
        return 0 if probe_value(&self.reader) else IVSHMEM_AGAIN

    cdef void end_sleep(self) noexcept:
        if self.reader.slot != IVSHMEM_NO_SLOT:
            ivshmem_sleep_end(&self.channel, &self.reader.sleep)

    cdef int64_t probe(self, void **what, Probe *probe) except -1:
        what[0] = &self.reader
        probe[0] = probe_value
        return 1

    cdef int restore(self) except -1:
        if self.awaited and probe_value(&self.reader):
            self.membership.kick_all()
        return 0

    cdef object latest(self, int code):
        """Copy the content that was looked at, or a later one."""
        cdef bytes data
        for _ in range(TRIES):
            if code == IVSHMEM_AGAIN:
                return None
            if code:
                raise self.fail(code)
            data = PyBytes_FromStringAndSize(NULL, self.message.length)
            ivshmem_copy_payload(
                PyBytes_AS_STRING(data),
                self.channel.area.memory.start + self.message.offset,
                self.message.length,
            )
            if ivshmem_check(&self.channel, &self.message) == 0:
                return data if self.type is None else self.type.decode(data)
            code = ivshmem_value_look(&self.reader, &self.message)
        raise self.starved()

    @cython.critical_section
    def get(self):
        """Return a copy of the latest content, which is never torn. Never waits.

        Returns:
            bytes, or what the channel's type makes of them; None: it was never set.

        Raises:
            Overtaken: the writer sets it faster than it can be copied.
            ChannelCorrupt, ClosedError: as of Reader.get.
        """
        self.enter()
        return self.latest(ivshmem_value_look(&self.reader, &self.message))

    @cython.critical_section
    def wait_changed(self, timeout=None, *, spin=None):
        """Wait until the value was set since this reader last looked; return its content.

        Args:
            timeout, spin: as of Reader.get.

        Returns:
            The content; None: it was not set in time. Contents that came in between are skipped.

        Raises:
            As of `get`.
        """
        self.enter()
        return self.latest(self.wait(timeout, spin))

    @cython.critical_section
    def view(self):
        """Return the latest content as a View; None: it was never set.

        The writer does not wait for it: `check`, and the end of `with`, raise Overtaken if the
        writer has used its memory again. The last four contents keep theirs.
        """
        cdef int code
        self.enter()
        code = ivshmem_value_look(&self.reader, &self.message)
        if code == IVSHMEM_AGAIN:
            return None
        if code:
            raise self.fail(code)
        return view_of(self, self.message)

    def wait_changed_async(self, timeout=None):
        """The twin of `wait_changed` for asyncio: a coroutine. To cancel it takes nothing."""
        return asynchronous.until_something(self, self.wait_changed, timeout)

    def __iter__(self):
        return self

    def __next__(self):
        return self.wait_changed()

    def __aiter__(self):
        return self

    def __anext__(self):
        return self.wait_changed_async()
