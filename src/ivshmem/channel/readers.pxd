"""What other modules use of readers.pyx."""

from libc.stdint cimport uint32_t

from .header cimport ivshmem_message
from .roles cimport ReaderEnd


cdef class Reader(ReaderEnd):
    cdef ivshmem_message message
    cdef uint32_t kept  # messages that were taken, and are for the next calls

    cdef int take(self, object timeout, object spin) except? -2
    cdef int take_new(self) except? -2
    cdef bint take_kept(self) noexcept
    cdef int tell_lost(self) except -1
    cdef int keep(self, const ivshmem_message *message) except -1
    cdef object got(self, object timeout, object spin, object absent)
    cdef object copy_out(self)
    cdef object decoded(self)
