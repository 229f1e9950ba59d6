# cython: language_level=3, binding=True, freethreading_compatible=True
# cython: embedsignature=True, embedsignature.format=clinic
"""Internal: the writing end of a channel of messages, of a queue and of a value; loans.

Knows: payloads as Python gives them. Does not know: slots and cells (roles.pyx); the protocol,
which is in ivshmem_channel.h.

Invariant: the memory of a Loan is not used for anything else until every buffer over it is
released.
"""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_FillInfo, PyBuffer_Release
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy

from ..native.descriptors cimport check_timeout
from .header cimport *
from .roles cimport (
    check_in_place, flat, LARGE, microseconds, take_buffer, take_payload, WriterEnd,
)
from .sleeping_tasks cimport until_in_time

import operator

from ..errors import ChannelCorrupt, ChannelTypeError, ClosedError
from ..system.time_limits import deadline_of, left_until
from ..text import counted


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
            ChannelTypeError: it does not fit the channel's type, or is of Python objects.
            ChannelCorrupt, ClosedError: as of all calls.
        """
        cdef Py_buffer view
        cdef uint32_t cell = 0
        take_payload(self.type, data, &view)
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
        """Copy several buffers into one message, one after the other; otherwise as `put`.

        Raises:
            ChannelTypeError: no message of the channel's type has so many bytes, or pickle=True.
        """
        cdef Loan loan
        buffers = [flat(part) for part in parts]
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
            MessageTooLong, ChannelTypeError, ChannelCorrupt, ClosedError: as of `put`. (A
                ChannelCorrupt after the first row ends the call, and the next one raises it.)
        """
        cdef Py_buffer view
        cdef uint32_t cell = 0
        cdef uint64_t size, i, count
        cdef uint64_t time
        cdef int code = 0
        cdef object whole
        check_timeout(timeout)
        check_in_place(self.type, self.name)
        if self.type is not None:
            rows = self.type.encode_rows(rows)
        whole = memoryview(rows)
        if whole.ndim < 2:
            raise ValueError("rows: a buffer of two dimensions is needed, one row for each message")
        if self.claims or self.channel.record.geometry.kind == IVSHMEM_VALUE:
            raise ChannelTypeError(f"channel {self.name!r} takes one message at a time")
        count = whole.shape[0]
        take_buffer(rows, &view, PyBUF_SIMPLE)
        try:
            self.enter()
            size = view.len // count if count else 0
            if size > self.channel.record.geometry.limit:
                raise self.too_long(size)
            time = microseconds() if self.times else 0
            left = timeout
            deadline = None
            i = 0
            while i < count:
                code = ivshmem_writer_ready(&self.writer)
                if code == IVSHMEM_AGAIN:
                    if i:
                        self.announce()
                    if deadline is None:
                        deadline = deadline_of(timeout)
                    else:
                        left = left_until(deadline)
                    code = self.wait(left, spin)
                    if code == IVSHMEM_AGAIN:
                        if i:
                            return i
                        raise self.blocked(timeout)
                if code:
                    if i:
                        break
                    raise self.fail(code)
                if ivshmem_loan(&self.writer, &cell):
                    if i:
                        self.announce()
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
        return until_in_time(self, self.put, timeout, (data,))

    def put_parts_async(self, parts, timeout=None):
        """The twin of `put_parts` for asyncio: a coroutine. To cancel it takes nothing."""
        # A tuple: each attempt goes through all of them.
        return until_in_time(self, self.put_parts, timeout, (tuple(parts),))

    async def put_rows_async(self, rows, timeout=None):
        """The twin of `put_rows` for asyncio.

        After a cancellation it is unknown how many rows were published.
        """
        deadline = deadline_of(timeout)
        try:
            rest = memoryview(rows)
        except ValueError:  # an array of dates, for which there is no format
            rest = rows
        done = 0
        while True:
            left = None if deadline is None else left_until(deadline)
            try:
                put = await until_in_time(self, self.put_rows, left, (rest,))
            except (TimeoutError, ChannelCorrupt):
                if not done:
                    raise
                return done
            done += put
            rest = rest[put:]
            if not rest.shape[0]:
                return done

    cdef int announce(self) except -1:
        ivshmem_writer_announce(&self.writer)
        return self.membership.flush()

    @cython.critical_section
    def loan(self, size=None):
        """Borrow the memory of a message, to write into it without a copy.

        Args:
            size: bytes; None: the channel's limit, or the size of its type.

        Returns:
            A Loan: publish it, or use it in `with`, whose end publishes it.

        Raises:
            MessageTooLong: the channel's limit is less.
            ChannelError: as many loans as the channel allows are out.
            ChannelTypeError: pickle=True.
            ClosedError: as of all calls.
        """
        self.enter()
        size = self.channel.record.geometry.limit if size is None else operator.index(size)
        if size < 0:
            raise ValueError(f"no message has {size} bytes")
        if size > self.channel.record.geometry.limit:
            raise self.too_long(size)
        return Loan(self, size)


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
        check_in_place(writer.type, writer.name)
        self.writer = writer
        self.size = size
        if size > writer.channel.record.geometry.limit:
            raise writer.too_long(size)
        writer.loan_cell(&self.cell)
        self.live = True

    def __getbuffer__(self, Py_buffer *view, int flags):
        with cython.critical_section(self.writer):
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
        with cython.critical_section(self.writer):
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
            ChannelTypeError: no message of the channel's type has so many bytes. The loan stays.
            TimeoutError: as of `put`. The loan stays.
        """
        cdef Writer writer = self.writer
        cdef uint32_t length = self.size
        cdef int code
        with cython.critical_section(self.writer):
            self.check()
            self.check_exports()
            if size is not None:
                if not 0 <= size <= self.size:
                    raise ValueError(f"{size} bytes of a loan of {self.size}")
                length = size
            if writer.type is not None:
                writer.type.check_size(length)
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
        return until_in_time(self.writer, self.publish, timeout, (), {"size": size})

    def drop(self):
        """Give it back without publishing it; may be called twice.

        Raises:
            BufferError: as of `publish`.
        """
        with cython.critical_section(self.writer):
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
