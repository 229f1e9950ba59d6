# What the other modules in Cython use of _memory.pyx.

from libc.stdint cimport int64_t, uint32_t


cdef class Mapping:
    cdef char *start
    cdef Py_ssize_t length
    cdef Py_ssize_t views
    cdef bint fixed  # read-only

    cdef int check(self) except -1


cdef class Registers:
    cdef char *page
    cdef char *first
    cdef int64_t offset
    cdef Py_ssize_t size
    cdef Py_ssize_t length
    cdef int fd
    cdef bint open

    cdef int check(self, Py_ssize_t at) except -1
    cdef int put(self, Py_ssize_t at, uint32_t value) except -1
