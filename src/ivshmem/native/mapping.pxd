# What the other modules in Cython use of mapping.pyx.

from libc.stdint cimport int64_t, uint32_t, uint64_t


cdef class Mapping:
    cdef char *start
    cdef Py_ssize_t length
    cdef unsigned int views  # and calls without the GIL; for ivshmem_enter and its like
    cdef unsigned int accesses  # by calls that keep the GIL, counted where there is none
    cdef bint fixed  # read-only

    cdef int pin(self) except -1
    cdef void unpin(self) noexcept nogil
    cdef int borrow(self) except -1
    cdef void give_back(self) noexcept
    cdef object exchange(self, object offset, object buffer, bint into)
    cdef Py_ssize_t place(self, object offset, Py_ssize_t size) except -1
    cdef int copy(self, Py_ssize_t start, char *buffer, Py_ssize_t size, bint into) except -1


cdef class Atomic:
    cdef Mapping mapping
    cdef readonly Py_ssize_t offset
    cdef bint wide  # 64 bits, else 32

    cdef void *pin(self) except NULL
    cdef void *pin_own(self) except NULL
    cdef void unpin(self) noexcept
    cdef uint64_t peek(self) noexcept nogil


cdef class AtomicU32(Atomic):
    pass


cdef class AtomicU64(Atomic):
    pass


cdef class Registers:
    cdef char *page
    cdef char *first
    cdef int64_t offset
    cdef Py_ssize_t size
    cdef Py_ssize_t length
    cdef int fd
    cdef unsigned int state  # calls that use them, and whether they are closed

    cdef int check(self, Py_ssize_t at) except -1
    cdef int put(self, Py_ssize_t at, uint32_t value) noexcept nogil
    cdef void leave(self) noexcept nogil
    cdef void release(self) noexcept nogil
