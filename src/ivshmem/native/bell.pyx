# cython: language_level=3, binding=True, freethreading_compatible=True
# cython: embedsignature=True, embedsignature.format=clinic
"""One doorbell, looked up once, to be rung often or without the interpreter.

Knows: an eventfd or a register, and whether it is still there. Does not know: whose it is.
"""

cimport cython
from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport int64_t

from .descriptors cimport add_one, add_one_nowait, fail_with, FdArray, Signaller
from .syscalls cimport (
    EINTR, ESHUTDOWN, IVSHMEM_CLOSING, ivshmem_enter, ivshmem_is_only_thread,
)
from .mapping cimport Registers

from ..errors import ClosedError, NoSuchPeer

cdef unsigned int NOBODY = IVSHMEM_CLOSING  # the state of a Doorbell that leads nowhere


cdef int ring_bell(void *context, int64_t rings) noexcept nogil:
    """Ring; return 0 or errno. It is a Handler, and ignores the second argument."""
    cdef Bell *bell = <Bell *>context
    cdef int code
    if not ivshmem_enter(bell.state):
        return ESHUTDOWN
    if bell.fds != NULL:
        code = add_one(bell.fd)
        (<FdArray>bell.fds).leave()
    else:
        code = (<Registers>bell.registers).put(bell.at, bell.value)
        (<Registers>bell.registers).leave()
    return code


@cython.final
cdef class Doorbell:
    """One vector of one peer, looked up once; made by `Endpoint.doorbell`.

    It keeps nothing open: when the peer has left, or the endpoint is closed, `ring` raises.

    Attributes:
        peer: the id of the peer that it rings.
        vector: of that peer.
    """

    def __cinit__(self):
        self.bell.state = &NOBODY

    def __init__(self, *args, **kwargs):
        raise TypeError("a Doorbell is made by Endpoint.doorbell(peer, vector)")

    cdef int ring_nogil(self) noexcept nogil:
        return ring_bell(&self.bell, 1)

    cdef int add_one_gently(self, Signaller signaller) except -1:
        """Ring, once the caller has entered the eventfds."""
        return add_one_nowait(signaller, <FdArray>self.bell.fds, self.bell.fd)

    cdef int ring_gently(self) except -1:
        if not ivshmem_enter(self.bell.state):
            return ESHUTDOWN
        try:
            self.add_one_gently(self.signaller)
        finally:
            (<FdArray>self.bell.fds).leave()
        return 0

    @cython.binding(False)
    def ring(self):
        """Interrupt the vector, as `Endpoint.ring` does, without looking the peer up again.

        A doorbell that an AsyncEndpoint made never waits, like `Endpoint.ring_nowait`. May be
        called by any thread, and by a signal handler.

        Raises:
            NoSuchPeer: the peer has left. (If its id is in use again, that is another peer.)
            ClosedError: the endpoint is closed.
        """
        cdef int code
        while True:
            if self.nowait:
                code = self.ring_gently()
            elif ivshmem_is_only_thread():
                code = ring_bell(&self.bell, 1)
            else:
                with nogil:
                    code = ring_bell(&self.bell, 1)
            if code == 0:
                return
            if code == ESHUTDOWN:
                if self.endpoint is None:
                    raise TypeError("a Doorbell is made by Endpoint.doorbell(peer, vector)")
                if self.endpoint.closed:
                    raise ClosedError("the endpoint is closed")
                raise NoSuchPeer(f"peer {self.peer} is gone: its doorbells were closed")
            if code != EINTR:
                fail_with(code)
            PyErr_CheckSignals()

    def __reduce__(self):
        raise TypeError("a Doorbell cannot be copied or pickled: ask the endpoint for another one")

    def __repr__(self):
        return f"<ivshmem.Doorbell of peer {self.peer}, vector {self.vector}>"
