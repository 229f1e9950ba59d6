# cython: language_level=3, binding=True, freethreading_compatible=True
# cython: embedsignature=True, embedsignature.format=clinic
"""Internal: messages where they lie, as Python sees them.

Knows: buffers, numpy, DLPack. Does not know: how a message is taken.

Invariant: what a reader holds is not used for anything else until every buffer over it is released
(a reader that overwrites holds nothing: `check` tells).
"""

cimport cython
from cpython.buffer cimport PyBuffer_FillInfo
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint64_t

from ..native.syscalls cimport ivshmem_count
from .header cimport *
from .roles cimport check_in_place, microseconds, ReaderEnd

from ..errors import ClosedError, Overtaken
from ..text import counted


@cython.no_gc_clear
cdef class Received:
    """A message where it lies: a buffer that can be read.

    Attributes:
        size: bytes.
        writer: the number of the writer's slot.
        position: of the message among those of its writer.
        time: of publication, in seconds since 1970; None if the channel has no times.
    """

    def __init__(self, *_, **__):
        raise self.not_made()

    cdef object not_made(self):
        return TypeError(f"a {type(self).__name__} is made by the end of a channel")

    def __reduce__(self):
        raise TypeError(
            f"a {type(self).__name__} cannot be copied or pickled: `bytes()` makes a copy"
        )

    @property
    def size(self):
        return self.message.length

    @property
    def writer(self):
        return self.message.writer

    @property
    def position(self):
        return self.message.position

    cdef int enter(self) except -1:
        if not self.live:
            raise ClosedError(f"the {type(self).__name__} was released")
        return self.reader.enter()

    cdef int check_exports(self) except -1:
        if self.exports:
            raise BufferError(
                f"{counted(self.exports, 'memoryview')} or arrays of the message are in use:"
                " release them first (del)"
            )
        return 0

    def __getbuffer__(self, Py_buffer *view, int flags):
        cdef char *start
        self.enter()
        self.reader.membership.mapping.pin()
        start = <char *>self.reader.channel.area.memory.start + self.message.offset
        try:
            PyBuffer_FillInfo(view, self, start, self.message.length, True, flags)
        except BaseException:
            self.reader.membership.mapping.unpin()
            raise
        ivshmem_count(&self.exports, 1)

    def __releasebuffer__(self, Py_buffer *view):
        ivshmem_count(&self.exports, -1)
        self.reader.membership.mapping.unpin()

    def __len__(self):
        return self.message.length

    @property
    def time(self):
        cdef uint64_t late, today
        if self.reader is None:
            raise self.not_made()
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

    cdef object type_in_place(self):
        self.enter()
        check_in_place(self.reader.type, self.reader.name)
        return self.reader.type

    @property
    def array(self):
        """A numpy array over the message, of the channel's type (without one: of bytes)."""
        import numpy  # an extra, which only this needs

        message_type = self.type_in_place()
        if message_type is not None:
            return message_type.array(memoryview(self))
        return numpy.frombuffer(self, "uint8")

    @property
    def __array_interface__(self):
        """What numpy.asarray and others take: address, shape and type; read-only."""
        message_type = self.type_in_place()
        kind, shape = ("|u1", (self.message.length,))
        if message_type is not None:
            kind, shape = message_type.interface(self.message.length)
        address = <size_t>self.reader.channel.area.memory.start + self.message.offset
        return {"version": 3, "typestr": kind, "shape": shape, "data": (address, True)}

    def __dlpack__(self, **options):
        """Export the message, for numpy.from_dlpack or torch.from_dlpack; needs numpy."""
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        """Return DLPack's number of the processor's memory."""
        return (1, 0)


@cython.no_gc_clear
@cython.final
cdef class View(Received):
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

    @property
    def lost(self):
        return self.message.lost

    def __bytes__(self):
        """Return a copy; raise Overtaken if the message was overwritten before the copy ended."""
        cdef bytes data
        cdef const char *start
        cdef char *into
        self.enter()
        data = PyBytes_FromStringAndSize(NULL, self.message.length)
        into = PyBytes_AS_STRING(data)
        ivshmem_count(&self.exports, 1)  # no other thread releases it during the copy
        self.reader.membership.mapping.pin()
        start = <const char *>self.reader.channel.area.memory.start + self.message.offset
        try:
            with nogil:  # large messages would stop all other threads
                ivshmem_copy_payload(into, start, self.message.length)
        finally:
            self.reader.membership.mapping.unpin()
            ivshmem_count(&self.exports, -1)
        self.check()
        return data

    def check(self):
        """Raise Overtaken if the message was overwritten since it was taken."""
        with cython.critical_section(self.reader):
            if not self.overtaken and self.live and self.reader.open and (
                self.reader.membership.usable()  # also without a place: it is only read
            ):
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
        self.check_exports()
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
        with cython.critical_section(self.reader):
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
        reader.put_back(&message)
        raise
    reader.views += 1
    view.message = message
    view.reader = reader
    view.live = True
    return view
