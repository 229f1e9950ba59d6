# cython: language_level=3, binding=True, freethreading_compatible=False
# cython: embedsignature=True, embedsignature.format=clinic
"""Memory at C speed: mappings, 64-bit words in them, and the registers of a device.

Knows: mmap, and what the processor guarantees. Does not know: where memory comes from.
"""

cimport cython
from cpython.buffer cimport PyBuffer_FillInfo
from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc

from ._fds cimport fail, fail_with
from ._libc cimport (
    EAGAIN, EINTR, EINVAL, errno, ivshmem_add, ivshmem_compare_exchange, ivshmem_load,
    ivshmem_load32, ivshmem_store, ivshmem_store32, ivshmem_touch, MADV_POPULATE_READ,
    MADV_POPULATE_WRITE, madvise, MAP_FAILED, MAP_SHARED, mincore, mmap, munmap, pread, PROT_READ,
    PROT_WRITE, pwrite,
)

from .errors import ClosedError

cdef class Mapping:
    """A shared mapping of a file, from `offset` on, offered through the buffer protocol.

    Raises:
        OSError: as of mmap(2).
    """

    def __cinit__(
        self, int fd, Py_ssize_t size, *args, bint readonly=False, int64_t offset=0, **kwargs
    ):
        cdef void *address
        cdef int protection = PROT_READ if readonly else PROT_READ | PROT_WRITE
        self.start = NULL
        if size <= 0:
            raise ValueError(f"cannot map {size} bytes")
        with nogil:
            address = mmap(NULL, size, protection, MAP_SHARED, fd, offset)
        if address == MAP_FAILED:
            fail()
        self.start = <char *>address
        self.length = size
        self.fixed = readonly

    @property
    def address(self):
        """Where the memory begins in this process, 0 when closed; for ctypes and its like."""
        return <size_t>self.start

    @property
    def size(self):
        """Bytes mapped."""
        return self.length

    @property
    def readonly(self):
        """Whether this process may only read."""
        return self.fixed

    @property
    def closed(self):
        """Whether the memory is no longer mapped here."""
        return self.start == NULL

    cdef int check(self) except -1:
        if self.start == NULL:
            raise ClosedError("the memory is closed")
        return 0

    def populate(self, Py_ssize_t page_size):
        """Fault every page in, for writing where that is allowed; contents stay as they are.

        Raises:
            OSError: ENOMEM or EFAULT when memory or huge pages ran out on the way.
        """
        cdef int advice = MADV_POPULATE_READ if self.fixed else MADV_POPULATE_WRITE
        cdef int code = 0
        cdef char *page
        cdef char *end
        cdef char seen = 0
        self.check()
        self.views += 1
        try:
            while True:
                with nogil:
                    code = errno if madvise(self.start, self.length, advice) < 0 else 0
                if code != EINTR and code != EAGAIN:
                    break
                PyErr_CheckSignals()
            if code == EINVAL:  # before Linux 5.14
                page = self.start
                end = self.start + self.length
                with nogil:
                    while page < end:
                        if advice == MADV_POPULATE_READ:
                            seen |= (<volatile_char *>page)[0]
                        else:
                            ivshmem_touch(page)
                        page += page_size
            elif code:
                fail_with(code)
        finally:
            self.views -= 1

    def resident(self, Py_ssize_t page_size):
        """Bytes of the file that are in memory now, whoever brought them there (mincore(2))."""
        cdef Py_ssize_t pages = (self.length + page_size - 1) // page_size
        cdef Py_ssize_t i
        cdef Py_ssize_t count = 0
        cdef unsigned char *vector
        self.check()
        vector = <unsigned char *>malloc(pages)
        if vector == NULL:
            raise MemoryError
        try:
            if mincore(self.start, self.length, vector) < 0:
                fail()
            for i in range(pages):
                count += vector[i] & 1
        finally:
            free(vector)
        return count * page_size

    def atomic_u64(self, Py_ssize_t offset):
        """The 64-bit word at `offset` bytes, a multiple of 8.

        Raises:
            ValueError: there is no such word.
        """
        if offset < 0 or offset % 8 or offset > self.length - 8:
            raise ValueError(f"no aligned 64-bit word at {offset} in {self.length} bytes")
        return AtomicU64(self, offset)

    def __len__(self):
        return self.length

    def __getbuffer__(self, Py_buffer *view, int flags):
        self.check()
        PyBuffer_FillInfo(view, self, self.start, self.length, self.fixed, flags)
        self.views += 1

    def __releasebuffer__(self, Py_buffer *view):
        self.views -= 1

    def close(self):
        """Unmap.

        Raises:
            BufferError: a memoryview, an array or a running call still uses the memory; nothing is
                changed then.
        """
        cdef char *address = self.start
        if address == NULL:
            return
        if self.views:
            raise BufferError(
                f"the memory is in use by {self.views} views: release memoryviews and arrays first"
            )
        self.start = NULL
        munmap(address, self.length)

    def __dealloc__(self):
        if self.start != NULL:
            munmap(self.start, self.length)


cdef extern from *:
    ctypedef char volatile_char "volatile char"


@cython.final
cdef class AtomicU64:
    """A 64-bit word of shared memory, in the machine's byte order, read and changed as a whole.

    Made by `Mapping.atomic_u64`; after the mapping is closed every call raises ClosedError.
    """

    cdef Mapping mapping
    cdef Py_ssize_t offset

    def __cinit__(self, Mapping mapping not None, Py_ssize_t offset):
        self.mapping = mapping
        self.offset = offset

    cdef void *word(self) except NULL:
        self.mapping.check()
        return self.mapping.start + self.offset

    cdef void *own_word(self) except NULL:
        if self.mapping.fixed:
            raise TypeError("the memory is mapped for reading only")
        return self.word()

    def load(self):
        """The value; what its writer stored before is seen, too (acquire)."""
        return ivshmem_load(self.word())

    def store(self, uint64_t value):
        """Set the value, after all that was stored before (release)."""
        ivshmem_store(self.own_word(), value)

    def compare_exchange(self, uint64_t expected, uint64_t desired):
        """Set `desired` if the value is `expected`; return what it was (full barrier)."""
        return ivshmem_compare_exchange(self.own_word(), expected, desired)

    def fetch_add(self, uint64_t amount):
        """Add, modulo 2**64; return what the value was (full barrier)."""
        return ivshmem_add(self.own_word(), amount)


# -- registers ------------------------------------------------------------------------------------

@cython.final
cdef class Registers:
    """The 32-bit registers of a device, in one page mapped from `fd` or behind reads and writes.

    Args:
        fd: borrowed; with `mapped` it may be closed afterwards.
        offset: of the first register in `fd`. It need not begin a page.
        size: bytes of registers.
        mapped: a load or store is then one of the processor's; otherwise one pread or pwrite of 4
            bytes, which vfio carries out as such, for what it does not map.

    Raises:
        OSError: as of mmap(2), pread(2), pwrite(2).
    """

    def __cinit__(self, int fd, int64_t offset, Py_ssize_t size, *, bint mapped=True):
        cdef Py_ssize_t inside = offset % REGISTER_PAGE
        cdef void *address
        self.page = NULL
        self.fd = fd
        self.offset = offset
        self.size = size
        if mapped:
            self.length = inside + size
            address = mmap(
                NULL, self.length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, offset - inside
            )
            if address == MAP_FAILED:
                fail()
            self.page = <char *>address
            self.first = self.page + inside
        self.open = True

    cdef int check(self, Py_ssize_t at) except -1:
        if not self.open:
            raise ClosedError("the device is closed")
        if at < 0 or at % 4 or at > self.size - 4:
            raise IndexError(f"no register at {at}: there are {self.size} bytes of them")
        return 0

    def load(self, Py_ssize_t at):
        """The register at `at` bytes."""
        cdef uint32_t value = 0
        self.check(at)
        if self.page != NULL:
            return ivshmem_load32(self.first + at)
        if pread(self.fd, &value, sizeof(value), self.offset + at) != sizeof(value):
            fail()
        return value

    def store(self, Py_ssize_t at, uint32_t value):
        """Set the register at `at` bytes, after all that was written to memory before."""
        self.check(at)
        self.put(at, value)

    cdef int put(self, Py_ssize_t at, uint32_t value) except -1:
        if self.page != NULL:
            ivshmem_store32(self.first + at, value)
        elif not self.open:
            raise ClosedError("the device is closed")
        elif pwrite(self.fd, &value, sizeof(value), self.offset + at) != sizeof(value):
            fail()
        return 0

    def close(self):
        """Unmap; may be called twice."""
        self.open = False
        if self.page != NULL:
            munmap(self.page, self.length)
            self.page = NULL

    def __dealloc__(self):
        if self.page != NULL:
            munmap(self.page, self.length)


cdef enum:
    REGISTER_PAGE = 4096  # the smallest there is; a larger page makes mmap fail, and nothing worse
