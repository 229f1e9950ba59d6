"""What other modules use of values.pyx."""

from libc.stdint cimport uint64_t

from .header cimport ivshmem_message
from .roles cimport ReaderEnd


cdef class ValueReader(ReaderEnd):
    cdef ivshmem_message message
    cdef uint64_t seen  # what `next` of its source was before the last look

    cdef int look(self) noexcept
    cdef object latest(self, int code, object absent)
    cdef object decoded(self, bytes data, uint64_t seen)
