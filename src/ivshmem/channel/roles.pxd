"""What the ends of each kind use of roles.pyx."""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyObject_GetBuffer
from libc.stdint cimport uint32_t, uint64_t

from .header cimport ivshmem_message, ivshmem_reader, ivshmem_writer
from .ends cimport ChannelEnd
from .membership cimport Membership

cdef enum:
    # Bytes from which on a copy releases the GIL, as in native/mapping.pyx.
    LARGE = 1 << 18
    # Messages in a row that a writer may overwrite during their copies, before a call gives up.
    TRIES = 64

cdef uint64_t microseconds() noexcept nogil
cpdef object flat(object data)
cdef int check_in_place(object message_type, str name) except -1
cdef int take_typed(object message_type, str name, object buffer, Py_buffer *view) except -1
cdef int take_without_objects(object data, Py_buffer *view, int flags) except -1


cdef inline int take_buffer(object data, Py_buffer *view, int flags) except -1:
    """Get a buffer whose bytes are sent, or received into; none of Python objects."""
    if type(data) is bytes or type(data) is bytearray:
        return PyObject_GetBuffer(data, view, flags)
    return take_without_objects(data, view, flags)


cdef inline int take_payload(object message_type, object data, Py_buffer *view) except -1:
    """Get the bytes of what is to be sent, as the channel's type makes them."""
    if message_type is None:
        return take_buffer(data, view, PyBUF_SIMPLE)
    return PyObject_GetBuffer(message_type.encode(data), view, PyBUF_SIMPLE)


cdef inline int take_target(
    object message_type, str name, object buffer, Py_buffer *view
) except -1:
    """Get a buffer that messages are received into: of bytes, or of the type's dtype."""
    if message_type is None:
        return take_buffer(buffer, view, PyBUF_WRITABLE)
    return take_typed(message_type, name, buffer, view)


cdef int open_channel(
    ChannelEnd end, object channels, Membership membership, dict found
) except -1


cdef struct Held:
    ivshmem_message message
    bint kept  # by nobody: it is for the next call


cdef class WriterEnd(ChannelEnd):
    cdef ivshmem_writer writer
    cdef readonly object type  # of the messages: what checks and converts them, or None
    cdef bint times
    cdef bint claims  # a queue's, or calls': a slot is chosen by its claim
    cdef readonly uint64_t missed
    cdef int putting  # threads that have a cell, and may run without the GIL
    cdef int exports  # memoryviews and arrays of loans

    cdef int ready(self) noexcept
    cdef object blocked(self, object timeout)
    cdef object too_long(self, object size)
    cdef int wait_again(self, object timeout) except -1
    cdef int loan_cell(self, uint32_t *cell) except -1
    cdef int find_room(self, uint32_t *cell, object timeout, object spin) except -1
    cdef int pause_for_cell(self) except -1
    cdef int copy_in(self, uint32_t cell, const char *data, uint64_t size) except -1
    cdef uint64_t send(self, uint32_t cell, uint32_t length, uint64_t user) except? 0
    cdef char *at(self, uint32_t cell) noexcept nogil


cdef class ReaderEnd(ChannelEnd):
    cdef ivshmem_reader reader
    cdef readonly object type
    cdef Held *held
    cdef uint32_t holding, holds  # how many are held, and how many `held` has room for
    cdef readonly uint32_t views  # Views that are alive

    cdef int make_room(self) except -1
    cdef int hold(self, const ivshmem_message *message) except -1
    cdef int forget(self, unsigned writer, uint64_t position) except -1
    cdef int let_go(self, unsigned writer, uint64_t position) except -1
    cdef int put_back(self, const ivshmem_message *message) except -1
    cdef bint is_for_ever(self, object error) except -1
    cdef int copy_to(self, const ivshmem_message *message, char *into) except? -2
    cdef object starved(self)
