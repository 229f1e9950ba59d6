"""What other modules use of messages.pyx."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from .header cimport ivshmem_message
from .roles cimport ReaderEnd, WriterEnd


cdef class Writer(WriterEnd):
    cdef int announce(self) except -1


cdef class Loan:
    cdef Writer writer
    cdef uint32_t cell
    cdef readonly uint32_t size
    cdef int exports
    cdef bint live

    cdef int check(self) except -1
    cdef int check_exports(self) except -1


cdef class Reader(ReaderEnd):
    cdef ivshmem_message message
    cdef bint pending  # the message was taken, and is for the next call

    cdef int take(self, object timeout, object spin) except -2
    cdef bint take_pending(self) noexcept
    cdef int keep(self) except -1
    cdef object copy_out(self)


cdef class View:
    cdef ReaderEnd reader
    cdef ivshmem_message message
    cdef int exports
    cdef bint live
    cdef bint overtaken

    cdef int abandon(self) except -1


cdef class ValueReader(ReaderEnd):
    cdef ivshmem_message message

    cdef object latest(self, int code)
