"""What calls.pyx uses of queues.pyx."""

from .header cimport ivshmem_claim, ivshmem_taken
from .roles cimport ReaderEnd
from .views cimport Received


cdef class ClaimingEnd(ReaderEnd):
    cdef ivshmem_taken taken
    cdef ivshmem_claim how

    cdef int claim(
        self, ivshmem_claim how, object timeout, object spin, ivshmem_taken *taken
    ) except? -2
    cdef int claim_as(self, ivshmem_claim how, ivshmem_taken *taken) noexcept
    cdef int undo(self, const ivshmem_taken *taken) except -1


cdef class QueueReader(ClaimingEnd):
    cdef object got(self, object timeout, object spin, object absent)
    cdef object decoded(self, const ivshmem_taken *taken)
    cdef object too_late(self)
    cdef int copy(self, const ivshmem_taken *taken, char *into) except -1
    cdef int acknowledge(self, const ivshmem_taken *taken) except -1


cdef class Taken(Received):
    cdef ivshmem_taken taken


cdef Taken taken_of(type kind, ClaimingEnd reader, const ivshmem_taken *taken)
