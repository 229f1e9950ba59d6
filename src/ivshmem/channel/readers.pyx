# cython: language_level=3, binding=True, freethreading_compatible=True
# cython: embedsignature=True, embedsignature.format=clinic
"""Internal: the reading end of a channel of messages.

Knows: payloads as Python takes them. Does not know: slots and cells (roles.pyx); the protocol,
which is in ivshmem_channel.h.
"""

cimport cython
from cpython.buffer cimport PyBuffer_Release
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport int64_t, uint32_t, uint64_t

from ..native.descriptors cimport check_timeout
from ..native.spin cimport Probe
from .header cimport *
from .roles cimport check_in_place, ReaderEnd, take_target, TRIES
from .sleeping_tasks cimport until_content, until_something
from .views cimport view_of

from ..errors import ChannelError, MessagesLost, MessageTooLong
from ..text import counted

# In the place of what a message is decoded to: its writer overwrote it during the copy.
cdef object OVERWRITTEN = object()


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

    cdef int attempt(self) except? -2:
        return 0 if self.kept else self.take_new()

    cdef int begin_sleep(self) except? -2:
        cdef int code = ivshmem_reader_sleep(&self.reader)
        if self.kept or self.reader.slot == IVSHMEM_NO_SLOT and probe_reader(&self.reader):
            return 0
        return code

    cdef void end_sleep(self) noexcept:
        if self.reader.slot != IVSHMEM_NO_SLOT:
            ivshmem_sleep_end(&self.channel, &self.reader.sleep)

    cdef int64_t probe(self, void **what, Probe *probe) except -1:
        what[0] = &self.reader
        probe[0] = probe_reader
        return 1

    cdef int restore(self) except -1:
        ivshmem_reader_beat(&self.reader)
        if self.awaited and (self.kept or probe_reader(&self.reader)):
            self.membership.kick_all()
        return 0

    # Reading.

    cdef int take(self, object timeout, object spin) except? -2:
        """Take the next message into `self.message`; 0, or IVSHMEM_AGAIN: none came in time."""
        cdef int code
        cdef ivshmem_message message
        check_timeout(timeout)
        self.enter()
        if self.take_kept():
            return self.tell_lost()
        code = self.take_new()
        if code == IVSHMEM_AGAIN:
            if timeout is not None and timeout == 0 and not self.watched:
                ivshmem_reader_settle(&self.reader)
                self.membership.flush()
                return code
            code = self.wait(timeout, spin)
            if code == IVSHMEM_AGAIN:
                return code
            if self.take_kept():  # another thread left it
                return self.tell_lost()
        if self.membership.rings.count:
            message = self.message  # another thread may take one during the flush
            try:
                self.membership.flush()
            except BaseException:
                if code == 0:
                    self.keep(&message)
                raise
            self.enter()
            self.message = message
        if code:
            raise self.fail(code)
        return self.tell_lost()

    cdef int take_new(self) except? -2:
        if self.holding == self.holds:
            self.make_room()
        return ivshmem_take(&self.reader, &self.message)

    cdef int tell_lost(self) except -1:
        """Raise MessagesLost if a reader that blocks lost messages before this one."""
        cdef uint64_t lost = self.message.lost
        if lost == 0 or self.reader.overflow != IVSHMEM_BLOCK:
            return 0
        self.message.lost = 0
        self.keep(&self.message)
        raise MessagesLost(
            f"channel {self.name!r}: this process was stopped, and writers continued without it:"
            f" {counted(lost, 'message')} of a writer were lost",
            lost,
        )

    cdef bint take_kept(self) noexcept:
        """Take a message that a call before this one left."""
        cdef uint32_t i
        if not self.kept:
            return False
        for i in range(self.holding):
            if self.held[i].kept:
                self.message = self.held[i].message
                self.holding -= 1
                self.held[i] = self.held[self.holding]
                break
        self.kept -= 1
        return True

    cdef int keep(self, const ivshmem_message *message) except -1:
        """Leave a message that was taken for the next call."""
        self.hold(message)
        return self.put_back(message)

    cdef int put_back(self, const ivshmem_message *message) except -1:
        cdef uint32_t i
        for i in range(self.holding):
            if (
                self.held[i].message.writer == message.writer
                and self.held[i].message.position == message.position
            ):
                self.held[i].kept = True
                self.kept += 1
                break
        return 0

    cdef object copy_out(self):
        """Copy the message that was taken; None: it was overwritten."""
        cdef ivshmem_message message = self.message
        cdef bytes data
        cdef int code
        try:
            data = PyBytes_FromStringAndSize(NULL, message.length)
        except MemoryError:
            self.keep(&message)
            raise
        code = self.copy_to(&message, PyBytes_AS_STRING(data))
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
            bytes, or what the channel's type makes of them; None: no message came in time. (With
            pickle=True a message can be None, too. To tell them apart, put it into a tuple.)

        Raises:
            MessagesLost: of a reader that blocks: this process was stopped or was silent, and
                writers continued without it. The next call returns the next message.
            ChannelCorrupt: a shared word is impossible. The next call looks at the next writer.
            ChannelTypeError: the message does not fit the channel's type; it is lost. If any other
                exception comes out of a call (MemoryError, or a signal handler's), the next call
                gets the message. Of an end that says pickle=True: if what a pickle raises is an
                Exception, its message is lost.
            Overtaken: the writer overwrote 64 messages in a row while they were copied.
            ClosedError: the reader, the channels or the region is closed.
        """
        return self.got(timeout, spin, None)

    cdef object got(self, object timeout, object spin, object absent):
        """Return a copy of the next message; `absent`: none came in time."""
        cdef object data
        for _ in range(TRIES):
            if self.take(timeout, spin):
                return absent
            if self.type is not None:
                data = self.decoded()
                if data is not OVERWRITTEN:
                    return data
            else:
                data = self.copy_out()
                if data is not None:
                    return data
        raise self.starved()

    cdef object decoded(self):
        """Return what the type makes of the message that was taken, or OVERWRITTEN.

        The message is held until it is decoded: if a signal handler raises during that, it is the
        next call's.
        """
        cdef ivshmem_message message = self.message
        cdef object found = OVERWRITTEN
        cdef bytes data
        self.hold(&message)
        try:
            data = PyBytes_FromStringAndSize(NULL, message.length)
            if self.copy_to(&message, PyBytes_AS_STRING(data)) == 0:
                found = self.type.decode(data)
        except BaseException as error:
            if self.is_for_ever(error):
                self.let_go(message.writer, message.position)
            else:
                self.put_back(&message)
            raise
        self.let_go(message.writer, message.position)
        return found

    @cython.critical_section
    def get_into(self, buffer, timeout=None, *, spin=None):
        """Copy the next message into `buffer`; otherwise as `get`.

        Returns:
            How many bytes the message has; None: no message came in time.

        Raises:
            MessageTooLong: the message has more bytes than the buffer. The next call returns the
                same message.
            ChannelTypeError: elements of the buffer are neither bytes nor those of the channel's
                type, or pickle=True.
        """
        cdef Py_buffer view
        cdef ivshmem_message message
        take_target(self.type, self.name, buffer, &view)
        try:
            for _ in range(TRIES):
                if self.take(timeout, spin):
                    return None
                message = self.message
                if message.length > <uint64_t>view.len:
                    message.lost = 0
                    self.keep(&message)
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
            rows: a contiguous buffer of two dimensions or more, which can be written: of bytes,
                or of the dtype of the channel's type.

        Returns:
            How many rows were filled; 0: no message came in time.

        Raises:
            MessageTooLong: the first message has more bytes than a row; it is there for the next
                call. (A later one ends the call.)
            ChannelTypeError: as of `get_into`.
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
        take_target(self.type, self.name, rows, &view)
        try:
            size = view.len // count if count else 0
            i = 0
            while i < count:
                if i == 0:
                    if self.take(timeout, spin):
                        return 0
                elif not self.take_kept():
                    code = self.take_new()
                    if code == IVSHMEM_AGAIN:
                        break
                    if code:  # how many rows were filled comes first: the next call raises it
                        self.reader.turn = (
                            self.reader.turn or self.channel.record.geometry.writers
                        ) - 1
                        break
                    if self.message.lost and self.reader.overflow == IVSHMEM_BLOCK:
                        self.keep(&self.message)
                        break
                message = self.message
                if message.length > size:
                    message.lost = 0
                    self.keep(&message)
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
            ChannelTypeError: pickle=True.
            MessagesLost, ChannelCorrupt, ClosedError: as of `get`.
        """
        check_in_place(self.type, self.name)
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
        return until_content(self, "get", self._get_or, timeout)

    @cython.binding(False)
    @cython.critical_section
    def _get_or(self, absent, timeout):
        """Do what `get` does; return `absent` if no message came."""
        return self.got(timeout, None, absent)

    def get_into_async(self, buffer, timeout=None):
        """The twin of `get_into` for asyncio: a coroutine. To cancel it takes nothing."""
        return until_something(self, self.get_into, timeout, (buffer,))

    async def get_rows_async(self, rows, timeout=None):
        """The twin of `get_rows` for asyncio. To cancel it takes nothing."""
        if memoryview(rows).shape[:1] == (0,):
            return self.get_rows(rows, 0)
        found = await until_something(self, self._rows_or_none, timeout, (rows,))
        return found or 0

    def _rows_or_none(self, rows, timeout):
        return self.get_rows(rows, timeout) or None

    def view_async(self, timeout=None):
        """The twin of `view` for asyncio: a coroutine. To cancel it takes nothing."""
        return until_something(self, self.view, timeout, ())

    def __iter__(self):
        return self

    def __next__(self):
        return self.get()

    def __aiter__(self):
        return self

    def __anext__(self):
        return self.get_async()
