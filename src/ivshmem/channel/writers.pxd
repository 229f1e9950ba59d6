"""What other modules use of writers.pyx."""

from libc.stdint cimport uint32_t

from .roles cimport WriterEnd


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
