"""One doorbell for other modules in Cython; see _core.pxd."""

from libc.stdint cimport int64_t, uint32_t

from .descriptors cimport Signaller

# Called for each interrupt that Doorbells.serve takes, without the GIL; what is not 0 ends it.
ctypedef int (*Handler)(void *context, int64_t rings) noexcept nogil


cdef struct Bell:
    unsigned int *state  # of what rings: either is borrowed, the other NULL
    void *fds  # FdArray: the eventfd `fd` is one of these
    void *registers  # Registers: `value` goes to the one at `at`
    int fd
    Py_ssize_t at
    uint32_t value


cdef int ring_bell(void *bell, int64_t rings) noexcept nogil  # a Handler, too


cdef class Doorbell:
    cdef object endpoint
    cdef object owner  # of what `bell` borrows
    cdef readonly object peer
    cdef readonly Py_ssize_t vector
    cdef Bell bell
    cdef bint nowait  # ring by `signaller`, or by a thread if that is None
    cdef Signaller signaller

    # 0, or errno: ESHUTDOWN when the peer left or the endpoint was closed, EINTR: again.
    cdef int ring_nogil(self) noexcept nogil
    cdef int add_one_gently(self, Signaller signaller) except -1
    cdef int ring_gently(self) except -1
