# cython: language_level=3, binding=False, freethreading_compatible=True
# cython: embedsignature=True, embedsignature.format=clinic
"""Memory at C speed: mappings, words and copies in them, and the registers of a device.

Knows: mmap, and what the processor guarantees. Does not know: where memory comes from.

Invariants:
1. Memory in use stays mapped. A view of a mapping, and a call that runs without the GIL, make its
   `close()` fail. A call that keeps the GIL ends before another thread can close. In a Python
   without a GIL such a call is counted, and so is one that waits for a word: the last one unmaps
   what was closed during the call.
2. Each call accesses shared bytes once: words by one instruction, everything else by one copy.

(`binding=False`: functions that bind add 90 ns to each round trip.)
"""

cimport cython
from cpython.buffer cimport (
    PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer,
)
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.dict cimport PyDict_GetItemWithError
from cpython.exc cimport PyErr_CheckSignals
from cpython.number cimport PyNumber_Index
from cpython.ref cimport PyObject
from libc.stdint cimport int64_t, uint32_t, uint64_t, UINT32_MAX
from libc.string cimport memmove

from .descriptors cimport fail, fail_with
from .syscalls cimport (
    ACQ_REL, ACQUIRE, EAGAIN, EINTR, EINVAL, EIO, errno, word_add, word_and,
    IVSHMEM_CLOSING, word_compare_exchange, ivshmem_enter, ivshmem_enter_held,
    word_exchange, ivshmem_fence, ivshmem_leave, ivshmem_leave_held, word_load,
    ivshmem_load32, word_or, ivshmem_shut, ivshmem_shut_unused, ivshmem_state, word_store,
    ivshmem_store32, word_sub, ivshmem_touch, word_xor, MADV_POPULATE_READ,
    MADV_POPULATE_WRITE, madvise, MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, MAP_SHARED, mincore,
    mmap, munmap, pread, PROT_NONE, PROT_READ, PROT_WRITE, pwrite, PyNumber_AsSsize_t, RELAXED,
    RELEASE, _SC_PAGESIZE, SEQ_CST, sysconf,
)

import importlib
import math
import operator

from ..errors import ClosedError

cdef enum:
    # Bytes from which on a copy, or unmapping, releases the GIL. That takes 50 ns if no other
    # thread wants it, but to get it back from a thread that computes takes 5 ms. So a smaller copy
    # keeps it: for 2 to 25 microseconds, which is about the time to wake a thread.
    LARGE = 1 << 18
    HUGE = 1 << 21  # a huge page of x86-64, and of arm64 with small pages of 4 KiB
    PAGES_AT_ONCE = 1 << 14  # that mincore(2) is asked for, a byte of the stack each


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
        # Closed, to a subclass's __del__ after a failure here.
        self.views = self.accesses = IVSHMEM_CLOSING
        if size <= 0:
            raise ValueError(f"cannot map {size} bytes")
        with nogil:
            address = mmap(free_place(size), size, protection, MAP_SHARED, fd, offset)
        if address == MAP_FAILED:
            fail()
        self.start = <char *>address
        self.length = size
        self.fixed = readonly
        self.views = self.accesses = 0

    @property
    def address(self):
        """The address of the memory in this process, for ctypes for instance; 0 when closed."""
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
        """Whether the memory is not mapped, or not any more."""
        # No address: a subclass's __del__ asks, after wrong arguments of the constructor.
        return self.start == NULL or ivshmem_state(&self.views) & IVSHMEM_CLOSING != 0

    cdef int pin(self) except -1:
        """Count one user more: until `unpin` the memory stays mapped, and close() fails."""
        if not ivshmem_enter(&self.views):
            raise ClosedError("the memory is closed")
        return 0

    cdef void unpin(self) noexcept nogil:
        ivshmem_leave(&self.views)

    cdef int borrow(self) except -1:
        """Keep the memory mapped until `give_back`, also if it is closed before."""
        if not ivshmem_enter(&self.accesses):
            raise ClosedError("the memory is closed")
        return 0

    cdef void give_back(self) noexcept:
        if ivshmem_leave(&self.accesses):
            unmap(self)

    def _populate(self, Py_ssize_t page_size):
        """Fault every page in, for writing where that is allowed; contents stay as they are.

        Args:
            page_size: bytes; one byte of each is touched, where madvise(2) cannot do this.

        Raises:
            OSError: ENOMEM or EFAULT when memory or huge pages ran out on the way.
        """
        cdef int advice = MADV_POPULATE_READ if self.fixed else MADV_POPULATE_WRITE
        cdef int code = 0
        cdef char *page
        cdef char *end
        cdef char seen = 0
        if page_size <= 0:
            raise ValueError(f"no pages have {page_size} bytes")
        self.pin()
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
            self.unpin()

    def resident(self, Py_ssize_t offset=0, size=None):
        """Return how many bytes of the file are in memory now, in whole pages (mincore(2)).

        It does not matter which process brought them there. Other threads run during the call, and
        signals are handled. All of a terabyte takes seconds, even if it is one hole.

        Args:
            offset, size: count only in `size` bytes at `offset`; None: to the end.

        Raises:
            ValueError: these bytes do not all lie in the memory.
            ClosedError: the memory is closed.
        """
        cdef Py_ssize_t page_size = sysconf(_SC_PAGESIZE)
        cdef Py_ssize_t end = self.length if size is None else offset + <Py_ssize_t>size
        cdef Py_ssize_t count = 0
        cdef Py_ssize_t at, i, length
        cdef int code
        cdef unsigned char vector[PAGES_AT_ONCE]
        if not 0 <= offset <= end <= self.length:
            raise ValueError(f"no {size} bytes at {offset} in {self.length} bytes")
        at = offset - offset % page_size
        self.pin()
        try:
            while at < end:
                length = min(end - at, PAGES_AT_ONCE * page_size)
                with nogil:
                    code = errno if mincore(self.start + at, length, vector) < 0 else 0
                    if not code:
                        for i in range((length + page_size - 1) // page_size):
                            count += vector[i] & 1
                        at += length
                if code and code != EAGAIN:
                    fail_with(code)
                PyErr_CheckSignals()
        finally:
            self.unpin()
        return count * page_size

    # -- copies -----------------------------------------------------------------------------------

    def read(self, offset, size):
        """Return a copy of `size` bytes at `offset`.

        It is one copy, as by memcpy(3). Nothing orders it: what another peer writes during the copy
        may be in it in part. Other threads run during a copy of 256 KiB or more. `read_into` makes
        no new object; the pages of a large new object take longer than the copy.

        Raises:
            ValueError: they do not all lie in the memory.
            ClosedError: the memory is closed.
        """
        cdef Py_ssize_t length = PyNumber_AsSsize_t(size, NULL)
        cdef Py_ssize_t start = self.place(offset, length)
        cdef bytes data = PyBytes_FromStringAndSize(NULL, length)
        self.copy(start, PyBytes_AS_STRING(data), length, False)
        return data

    def read_into(self, offset, buffer):
        """Fill `buffer` from `offset` on by one copy, as `read`; return its size in bytes.

        Args:
            buffer: a contiguous buffer that can be written: a bytearray, an array, a memoryview.

        Raises:
            ValueError: so many bytes do not all lie in the memory.
            TypeError, BufferError: it is not such a buffer (numpy: ValueError).
            ClosedError: the memory is closed.
                Whatever is raised, the buffer is as it was.
        """
        return self.exchange(offset, buffer, False)

    def write(self, offset, data):
        """Copy `data` to `offset` by one copy, as by memcpy(3); return its size in bytes.

        Nothing orders it: to publish what was written, store a word or ring. `data` may be a view
        of this memory. Other threads run during a copy of 256 KiB or more.

        Args:
            data: a contiguous buffer: bytes, an array, a memoryview.

        Raises:
            ValueError: it does not fit between `offset` and the end of the memory.
            TypeError: it is not a buffer, or the memory is mapped for reading only.
            BufferError: it is not contiguous (numpy: ValueError).
            ClosedError: the memory is closed.
                Whatever is raised, nothing was written.
        """
        if self.fixed:
            raise TypeError("the memory is mapped for reading only")
        return self.exchange(offset, data, True)

    cdef object exchange(self, object offset, object buffer, bint into):
        # Without a typed memoryview as an argument, which takes 60 ns longer.
        cdef Py_buffer view
        PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE if into else PyBUF_WRITABLE)
        try:
            self.copy(self.place(offset, view.len), <char *>view.buf, view.len, into)
            return view.len
        finally:
            PyBuffer_Release(&view)

    cdef Py_ssize_t place(self, object offset, Py_ssize_t size) except -1:
        """Return the offset, clipped to Py_ssize_t; raise ValueError if the bytes are not there."""
        cdef Py_ssize_t start = PyNumber_AsSsize_t(offset, NULL)
        if size < 0 or start < 0 or start > self.length - size:
            raise ValueError(f"no {size} bytes at {offset} in {self.length} bytes")
        return start

    cdef int copy(self, Py_ssize_t start, char *buffer, Py_ssize_t size, bint into) except -1:
        if size < LARGE:
            hold(self)
            move(self.start + start, buffer, size, into)
            let_go(self)
        else:
            self.pin()
            with nogil:
                move(self.start + start, buffer, size, into)
            self.unpin()
        return 0

    # -- words ------------------------------------------------------------------------------------

    def atomic_u32(self, offset):
        """Return the 32-bit word at `offset` bytes, a multiple of 4.

        Raises:
            ValueError: there is no such word.
        """
        return AtomicU32(self, offset)

    def atomic_u64(self, offset):
        """Return the 64-bit word at `offset` bytes, a multiple of 8.

        Raises:
            ValueError: there is no such word.
        """
        return AtomicU64(self, offset)

    # -- views ------------------------------------------------------------------------------------

    def array(self, dtype="uint8", shape=None, offset=0):
        """Return a numpy array over this memory: the memory itself, not a copy.

        While the array or a view of it is alive, `close` raises BufferError. If the memory is
        mapped for reading only, so is the array.

        Args:
            dtype: of the elements, as numpy.dtype() takes it. Peers should agree on the byte order,
                for instance "<u4".
            shape: a length, or several; None: one dimension with as many elements as fit.
            offset: of the first element, in bytes; a multiple of the dtype's alignment.

        Raises:
            ValueError: so many elements do not all lie in the memory, or they would be misaligned.
            TypeError: the dtype has Python objects; a peer could choose their addresses.
            ImportError: numpy is not installed.
            ClosedError: the memory is closed.
        """
        try:
            numpy = importlib.import_module("numpy")
        except ImportError as error:
            raise ImportError(
                "region.array() needs numpy: pip install numpy (or use memoryview(region))"
            ) from error
        kind = numpy.dtype(dtype)
        start = operator.index(offset)
        if kind.hasobject:
            raise TypeError(f"no array of {kind} in shared memory: it would hold addresses")
        if kind.subdtype is not None:
            raise ValueError(f"dtype {kind}: give the inner shape by `shape`")
        if kind.itemsize == 0:
            raise ValueError(f"dtype {kind}: its elements have no bytes")
        if start % kind.alignment:
            raise ValueError(
                f"offset {start}: elements of {kind} begin at a multiple of {kind.alignment}"
            )
        if shape is None:
            lengths = (max(self.length - start, 0) // kind.itemsize,)
        elif hasattr(shape, "__iter__"):
            lengths = tuple(map(operator.index, shape))
        else:
            lengths = (operator.index(shape),)
        if any(length < 0 for length in lengths):
            raise ValueError(f"shape {lengths}: no length can be negative")
        size = math.prod(lengths) * kind.itemsize
        if start < 0 or start + size > self.length:
            raise ValueError(f"no {size} bytes at {offset} in {self.length} bytes")
        # asarray keeps the view, and so the mapping; numpy.ndarray(buffer=) would not.
        view = memoryview(self)[start : start + size]
        return numpy.asarray(view).view(kind).reshape(lengths)

    def __dlpack__(self, **options):
        """Export all bytes, for numpy.from_dlpack or torch.from_dlpack; needs numpy."""
        return self.array().__dlpack__(**options)

    def __dlpack_device__(self):
        """Return DLPack's number of the processor's memory."""
        return (1, 0)

    def __reduce__(self):
        raise TypeError(
            f"a {type(self).__name__} cannot be copied or pickled: attach or connect where it is"
            " needed, or pass its descriptor"
        )

    def __len__(self):
        return self.length

    def __getbuffer__(self, Py_buffer *view, int flags):
        self.pin()
        try:
            PyBuffer_FillInfo(view, self, self.start, self.length, self.fixed, flags)
        except BaseException:
            self.unpin()
            raise

    def __releasebuffer__(self, Py_buffer *view):
        self.unpin()

    def close(self):
        """Unmap; may be called twice.

        Raises:
            BufferError: a memoryview, an array or a running call still uses the memory. Nothing has
                changed then.
        """
        cdef unsigned int views = ivshmem_shut_unused(&self.views)
        if views & IVSHMEM_CLOSING:
            return
        if views:
            raise BufferError(
                f"the memory is in use by {views} views: release memoryviews and arrays first"
            )
        if ivshmem_shut(&self.accesses):
            unmap(self)

    def __dealloc__(self):
        if self.start != NULL:
            munmap(self.start, self.length)


cdef inline int hold(Mapping mapping) except -1:
    """Keep the memory mapped until `let_go`; the caller keeps the GIL all the time."""
    if not ivshmem_enter_held(&mapping.accesses):
        raise ClosedError("the memory is closed")
    return 0


cdef inline void let_go(Mapping mapping) noexcept:
    if ivshmem_leave_held(&mapping.accesses):
        unmap(mapping)


cdef void *free_place(size_t size) noexcept nogil:
    """Return an address to map `size` bytes at, a multiple of 2 MiB; NULL: anywhere.

    At other addresses a huge page cannot be mapped as one. The kernel itself chooses such an
    address only for hugetlbfs, and for a tmpfs that makes transparent huge pages by itself.
    """
    cdef void *place
    if size < HUGE:
        return NULL
    place = mmap(NULL, size + HUGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    if place == MAP_FAILED:
        return NULL
    munmap(place, size + HUGE)
    return <void *>((<size_t>place + HUGE - 1) & ~<size_t>(HUGE - 1))


cdef void unmap(Mapping mapping) noexcept:
    cdef char *address = mapping.start
    cdef Py_ssize_t length = mapping.length
    mapping.start = NULL
    if length < LARGE:
        munmap(address, length)
    else:
        with nogil:  # 30 ms for each GiB of small pages
            munmap(address, length)


cdef inline void move(char *memory, char *buffer, Py_ssize_t size, bint into) noexcept nogil:
    # memmove, which is as quick as memcpy: the buffer may be a view of the same memory.
    if into:
        memmove(memory, buffer, size)
    else:
        memmove(buffer, memory, size)


cdef extern from *:
    ctypedef char volatile_char "volatile char"


# -- words ----------------------------------------------------------------------------------------

# The orders that an operation can have, by their names in C11.
cdef dict LOADS = {"relaxed": RELAXED, "acquire": ACQUIRE, "seq_cst": SEQ_CST}
cdef dict STORES = {"relaxed": RELAXED, "release": RELEASE, "seq_cst": SEQ_CST}
cdef dict CHANGES = {**LOADS, "release": RELEASE, "acq_rel": ACQ_REL}

ctypedef uint64_t (*Change)(void *word, bint wide, uint64_t value, int order) noexcept nogil


cdef class Atomic:
    """A word of shared memory in the machine's byte order, read and changed as a whole.

    Made by `Region.atomic_u32` and `atomic_u64`. It does not keep the region from closing; after
    that every call raises ClosedError. All calls may be made by any thread; none blocks.

    Attributes:
        offset: where it is in the memory, in bytes.

    Memory orders have C11's names: "relaxed", "acquire", "release", "acq_rel" and "seq_cst".
    A load cannot have an order with release, a store none with acquire. If a peer stores anything
    and then changes this word with release, another peer that loads that value, or a later one,
    with acquire sees all that was stored before.

    Raises, in all calls:
        ValueError: the operation cannot have that order.
        OverflowError: a value is negative or has more bits than the word.
        TypeError: a value is not an integer; or the memory is mapped for reading only, and this is
            not a load.
        ClosedError: the memory is closed.
            Whatever is raised, the word is as it was.
    """

    def __cinit__(self, Mapping mapping not None, offset):
        cdef Py_ssize_t start = PyNumber_AsSsize_t(offset, NULL)
        cdef Py_ssize_t size
        self.wide = isinstance(self, AtomicU64)
        size = 8 if self.wide else 4
        if start < 0 or start % size or start > mapping.length - size:
            raise ValueError(
                f"no aligned {8 * size}-bit word at {offset} in {mapping.length} bytes"
            )
        self.mapping = mapping
        self.offset = start

    def __repr__(self):
        name = type(self).__name__
        try:
            value = self.load()
        except ClosedError:
            return f"<ivshmem.{name} at offset {self.offset:#x}, closed>"
        return f"<ivshmem.{name} at offset {self.offset:#x}, value {value:#x}>"

    def __reduce__(self):
        raise TypeError(
            f"an {type(self).__name__} cannot be copied or pickled: ask the region for another one"
        )

    cdef void *pin(self) except NULL:
        """Return its address; it stays mapped until `unpin`, also if the region is closed."""
        self.mapping.borrow()
        return at(self)

    cdef void *pin_own(self) except NULL:
        """Do the same for a word that is to be changed."""
        if self.mapping.fixed:
            raise TypeError("the memory is mapped for reading only")
        return self.pin()

    cdef void unpin(self) noexcept:
        self.mapping.give_back()

    cdef uint64_t peek(self) noexcept nogil:
        """Return the value (acquire), for other Cython code; the word must be pinned."""
        return word_load(at(self), self.wide, ACQUIRE)

    def load(self, order="acquire"):
        """Return the value."""
        cdef int how = ACQUIRE if order is "acquire" else order_of(order, LOADS)
        cdef uint64_t value
        hold(self.mapping)
        value = word_load(at(self), self.wide, how)
        let_go(self.mapping)
        return value

    def store(self, value, order="release"):
        """Set the value."""
        cdef int how = RELEASE if order is "release" else order_of(order, STORES)
        cdef uint64_t number = fitting(self, value)
        hold_own(self.mapping)
        word_store(at(self), self.wide, number, how)
        let_go(self.mapping)

    def exchange(self, value, order="seq_cst"):
        """Set the value; return what it was."""
        return change(self, word_exchange, value, order)

    def compare_exchange(self, expected, desired, order="seq_cst"):
        """Set `desired` if the value is `expected`; return what it was.

        If it was not, this is a load, with the part of `order` that a load can have.
        """
        cdef int how = SEQ_CST if order is "seq_cst" else order_of(order, CHANGES)
        cdef uint64_t old = fitting(self, expected)
        cdef uint64_t new = fitting(self, desired)
        hold_own(self.mapping)
        old = word_compare_exchange(at(self), self.wide, old, new, how)
        let_go(self.mapping)
        return old

    def fetch_add(self, amount, order="seq_cst"):
        """Add, modulo 2**32 or 2**64; return what the value was."""
        return change(self, word_add, amount, order)

    def fetch_sub(self, amount, order="seq_cst"):
        """Subtract, modulo 2**32 or 2**64; return what the value was."""
        return change(self, word_sub, amount, order)

    def fetch_and(self, bits, order="seq_cst"):
        """Clear all bits except these; return what the value was."""
        return change(self, word_and, bits, order)

    def fetch_or(self, bits, order="seq_cst"):
        """Set these bits; return what the value was."""
        return change(self, word_or, bits, order)

    def fetch_xor(self, bits, order="seq_cst"):
        """Invert these bits; return what the value was."""
        return change(self, word_xor, bits, order)


@cython.final
cdef class AtomicU32(Atomic):
    """A 32-bit word of shared memory; see Atomic."""


@cython.final
cdef class AtomicU64(Atomic):
    """A 64-bit word of shared memory; see Atomic."""


cdef inline object change(Atomic word, Change operation, object value, object order):
    cdef int how = SEQ_CST if order is "seq_cst" else order_of(order, CHANGES)
    cdef uint64_t number = fitting(word, value)
    hold_own(word.mapping)
    number = operation(at(word), word.wide, number, how)
    let_go(word.mapping)
    return number


cdef int order_of(object order, dict allowed) except -1:
    cdef PyObject *found = PyDict_GetItemWithError(allowed, order)
    if found == NULL:
        raise ValueError(f"no order {order!r} for this operation: {', '.join(allowed)}")
    return <object>found


cdef inline uint64_t fitting(Atomic word, object value) except? -1:
    cdef uint64_t number = value if isinstance(value, int) else PyNumber_Index(value)
    if number > UINT32_MAX and not word.wide:
        raise OverflowError(f"{number} has more than the 32 bits of the word")
    return number


cdef inline int hold_own(Mapping mapping) except -1:
    if mapping.fixed:
        raise TypeError("the memory is mapped for reading only")
    return hold(mapping)


def fence():
    """Order all earlier stores and loads before all later ones (a seq_cst fence of C11).

    If two peers each store, call this, and then load what the other one stores, at least one of
    them sees the other's store. Without the fence it can be that neither does.
    """
    ivshmem_fence()


cdef inline void *at(Atomic word) noexcept nogil:
    return word.mapping.start + word.offset


# -- registers ------------------------------------------------------------------------------------

@cython.final
cdef class Registers:
    """The 32-bit registers of a device, in one page mapped from `fd`, or by reads and writes.

    Args:
        fd: borrowed; with `mapped` it may be closed afterwards.
        offset: of the first register in `fd`. It need not begin a page.
        size: bytes of registers.
        mapped: each load or store is one instruction; otherwise it is one pread or pwrite of 4
            bytes, which vfio performs as one access, for a region that it does not map.

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

    cdef int check(self, Py_ssize_t at) except -1:
        if at < 0 or at % 4 or at > self.size - 4:
            raise IndexError(f"no register at {at}: there are {self.size} bytes of them")
        return 0

    def load(self, Py_ssize_t at):
        """Return the register at `at` bytes.

        Raises:
            IndexError: there is none.
            OSError: as of pread(2), where it is not mapped.
            ClosedError: the device is closed.
        """
        cdef uint32_t value = 0
        cdef int code = 0
        cdef Py_ssize_t n
        self.check(at)
        if not ivshmem_enter(&self.state):
            raise ClosedError("the device is closed")
        if self.page != NULL:
            value = ivshmem_load32(self.first + at)
        else:
            n = pread(self.fd, &value, sizeof(value), self.offset + at)
            code = 0 if n == sizeof(value) else errno if n < 0 else EIO
        self.leave()
        if code:
            fail_with(code)
        return value

    def store(self, Py_ssize_t at, uint32_t value):
        """Set the register at `at` bytes, after all earlier writes to memory.

        Raises:
            IndexError, OSError, ClosedError: as of `load`, but of pwrite(2).
            OverflowError: the value has more than 32 bits.
        """
        cdef int code
        self.check(at)
        if not ivshmem_enter(&self.state):
            raise ClosedError("the device is closed")
        code = self.put(at, value)
        self.leave()
        if code:
            fail_with(code)

    cdef int put(self, Py_ssize_t at, uint32_t value) noexcept nogil:
        """Store; the caller has entered `state`. Return 0 or errno."""
        cdef Py_ssize_t n
        if self.page != NULL:
            ivshmem_store32(self.first + at, value)
            return 0
        n = pwrite(self.fd, &value, sizeof(value), self.offset + at)
        return 0 if n == sizeof(value) else errno if n < 0 else EIO

    cdef void leave(self) noexcept nogil:
        if ivshmem_leave(&self.state):
            self.release()

    cdef void release(self) noexcept nogil:
        cdef char *page = self.page
        self.page = NULL
        if page != NULL:
            munmap(page, self.length)

    def close(self):
        """Unmap when the last call that uses them has ended; may be called twice."""
        if ivshmem_shut(&self.state):
            self.release()

    def __dealloc__(self):
        self.release()


cdef enum:
    # The smallest page. Where pages are larger, mmap fails, and nothing worse happens.
    REGISTER_PAGE = 4096
