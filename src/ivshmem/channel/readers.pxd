"""What other modules use of readers.pyx."""

from .header cimport ivshmem_message
from .roles cimport ReaderEnd


cdef class Reader(ReaderEnd):
    cdef ivshmem_message message
    cdef bint pending  # the message was taken, and is for the next call

    cdef int take(self, object timeout, object spin) except? -2
    cdef bint take_pending(self) noexcept
    cdef int tell_lost(self) except -1
    cdef int keep(self) except -1
    cdef object copy_out(self)


cdef class ValueReader(ReaderEnd):
    cdef ivshmem_message message

    cdef object latest(self, int code)
