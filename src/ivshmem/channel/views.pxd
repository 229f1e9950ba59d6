"""What other modules use of views.pyx."""

from .header cimport ivshmem_message
from .roles cimport ReaderEnd


cdef class Received:
    cdef ReaderEnd reader
    cdef ivshmem_message message
    cdef int exports
    cdef bint live

    cdef int enter(self) except -1
    cdef int check_exports(self) except -1
    cdef object not_made(self)
    cdef object type_in_place(self)


cdef class View(Received):
    cdef bint overtaken

    cdef int abandon(self) except -1


cdef View view_of(ReaderEnd reader, ivshmem_message message)
