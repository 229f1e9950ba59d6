# cython: language_level=3, binding=True, freethreading_compatible=True
# cython: embedsignature=True, embedsignature.format=clinic
"""Internal: the reading end of a queue: each message goes to one reader.

Knows: taking a message, and acknowledging it. Does not know: the writing end, which is
writers.Writer; the protocol, which is in ivshmem_channel.h.
"""

cimport cython
from cpython.buffer cimport PyBuffer_Release
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport int64_t, uint64_t

from ..native.descriptors cimport check_timeout
from ..native.spin cimport Probe
from .header cimport *
from .roles cimport LARGE, ReaderEnd, take_target
from .sleeping_tasks cimport until_content, until_something
from .views cimport Received

from ..errors import MessageTooLong, Redelivered

cdef int64_t probe_queue(void *what) noexcept nogil:
    cdef ivshmem_reader *reader = <ivshmem_reader *>what
    cdef unsigned i
    for i in range(reader.channel.record.geometry.writers):
        if ivshmem_value(ivshmem_head(reader.channel, i)) != reader.sources[i].next:
            return 1
    return 0


@cython.no_gc_clear
cdef class ClaimingEnd(ReaderEnd):
    """A reader that claims what it takes: of a queue, or a server of calls."""

    cdef int attempt(self) except? -2:
        cdef int code = ivshmem_queue_take(&self.reader, self.how, False, &self.taken)
        if code == IVSHMEM_AGAIN:
            code = ivshmem_queue_take(&self.reader, self.how, True, &self.taken)
        return code

    cdef int begin_sleep(self) except? -2:
        self.slept = True
        return ivshmem_queue_sleep(&self.reader)

    cdef void end_sleep(self) noexcept:
        ivshmem_queue_awake(&self.reader)

    cdef int64_t probe(self, void **what, Probe *probe) except -1:
        what[0] = &self.reader
        probe[0] = probe_queue
        return 1

    cdef int restore(self) except -1:
        if self.awaited and ivshmem_queue_has_more(&self.reader):
            self.membership.kick_all()
        return 0

    cdef int claim_as(self, ivshmem_claim how, ivshmem_taken *taken) noexcept:
        cdef uint64_t claim = ivshmem_claim_word(
            taken.message.position, self.reader.slot, how, self.reader.epoch
        )
        if not ivshmem_claim_exchange(&self.channel, taken.claim_at, taken.claim, claim):
            return IVSHMEM_AGAIN  # this process was taken for gone at that moment
        taken.claim = claim
        return 0

    cdef int undo(self, const ivshmem_taken *taken) except -1:
        """Give a message back that was claimed, for another call."""
        if self.usable():
            ivshmem_queue_return(&self.reader, taken)
            self.membership.flush()
        return 0

    cdef int wake_another(self) except -1:
        ivshmem_queue_pass_on(&self.reader)
        return 0

    cdef int claim(
        self, ivshmem_claim how, object timeout, object spin, ivshmem_taken *taken
    ) except? -2:
        """Take a message; 0, or IVSHMEM_AGAIN: none came in time."""
        cdef int code
        check_timeout(timeout)
        self.enter()
        self.how = how
        code = ivshmem_queue_take(&self.reader, how, False, taken)
        if code == IVSHMEM_AGAIN:
            try:
                code = self.wait(timeout, spin)
                taken[0] = self.taken  # before another thread takes one
                if code == 0 and ivshmem_flags(taken.claim) != how:
                    code = self.claim_as(how, taken)  # `how` is another thread's since the wait
            finally:
                if self.usable():
                    self.pass_on()
        elif self.slept:  # in an event loop, or by its descriptor
            self.pass_on()
        if code and code != IVSHMEM_AGAIN:
            raise self.fail(code)
        return code


@cython.no_gc_clear
cdef class QueueReader(ClaimingEnd):
    """One reader of a queue; made by its `reader()`. It iterates over messages.

    `get` copies a message and is done with it: at most once. `take` acknowledges at the end: at
    least once.

    Attributes:
        name: of the channel.
    """

    @cython.binding(False)
    @cython.critical_section
    def get(self, timeout=None, *, spin=None):
        """Return a copy of the next message, which no other reader gets: at most once.

        If this process dies during the call, the message is lost.

        Args:
            timeout: seconds to wait at most; None: for ever; 0: do not wait.
            spin: as of `Endpoint.wait`.

        Returns:
            bytes, or what the channel's type makes of them; None: no message came in time. (With
            pickle=True a message can be None, too. To tell them apart, put it into a tuple.)

        Raises:
            Redelivered: this process was taken for gone during the copy: the message is lost.
            RegionError: the region is mapped for reading only.
            ChannelError: this mapping of the memory has no compare-exchange.
            ChannelTypeError: the message does not fit the channel's type; it is lost. After other
                exceptions, as of Reader.get, a reader gets it.
            ChannelCorrupt, ClosedError: as of Reader.get.
        """
        return self.got(timeout, spin, None)

    cdef object got(self, object timeout, object spin, object absent):
        """Return a copy of the next message; `absent`: none came in time."""
        cdef ivshmem_taken taken
        cdef bytes data
        if self.claim(IVSHMEM_CLAIM_ONCE, timeout, spin, &taken):
            return absent
        if self.type is not None:
            return self.decoded(&taken)
        try:
            data = PyBytes_FromStringAndSize(NULL, taken.message.length)
        except MemoryError:
            self.undo(&taken)
            raise
        self.copy(&taken, PyBytes_AS_STRING(data))
        self.acknowledge(&taken)
        return data

    cdef object decoded(self, const ivshmem_taken *taken):
        """Return what the type makes of a message, and be done with it; or give it back."""
        cdef bytes data
        cdef object found
        try:
            data = PyBytes_FromStringAndSize(NULL, taken.message.length)
            self.copy(taken, PyBytes_AS_STRING(data))
            ivshmem_load_barrier(&self.channel.area.memory)
            if ivshmem_get(&self.channel, taken.claim_at) != taken.claim:
                raise self.too_late()  # what was copied may be torn: it is not decoded
            found = self.type.decode(data)
            self.enter()
        except BaseException as error:
            if not self.is_for_ever(error):
                self.undo(taken)
            elif self.usable():
                self.acknowledge(taken)
            raise
        self.acknowledge(taken)
        return found

    @cython.critical_section
    def get_into(self, buffer, timeout=None, *, spin=None):
        """Copy the next message into `buffer`, at most once; otherwise as `get`.

        Returns:
            How many bytes the message has; None: no message came in time.

        Raises:
            MessageTooLong: the message has more bytes than the buffer; it is given back.
            ChannelTypeError: as of Reader.get_into.
        """
        cdef Py_buffer view
        cdef ivshmem_taken taken
        take_target(self.type, self.name, buffer, &view)
        try:
            if self.claim(IVSHMEM_CLAIM_ONCE, timeout, spin, &taken):
                return None
            if taken.message.length > <uint64_t>view.len:
                self.undo(&taken)
                raise MessageTooLong(
                    f"a message of {taken.message.length} bytes, and the buffer has {view.len}"
                )
            self.copy(&taken, <char *>view.buf)
            self.acknowledge(&taken)
            return taken.message.length
        finally:
            PyBuffer_Release(&view)

    cdef int copy(self, const ivshmem_taken *taken, char *into) except -1:
        cdef const char *at = <const char *>self.channel.area.memory.start + taken.message.offset
        if taken.message.length < LARGE:
            ivshmem_copy_payload(into, at, taken.message.length)
        else:
            self.membership.mapping.pin()
            try:
                with nogil:
                    ivshmem_copy_payload(into, at, taken.message.length)
                self.enter()
            finally:
                self.membership.mapping.unpin()
        return 0

    cdef int acknowledge(self, const ivshmem_taken *taken) except -1:
        """Give a message's memory back after it was copied."""
        if ivshmem_queue_done(&self.reader, taken):
            raise self.too_late()
        if self.membership.rings.count:
            self.membership.flush()
        return 0

    cdef object too_late(self):
        return Redelivered(
            f"queue {self.name!r}: this process was taken for gone while it copied a message,"
            " which is lost"
        )

    @cython.critical_section
    def take(self, timeout=None, *, spin=None):
        """Take the next message, and acknowledge it later: at least once.

        If this process dies, or is silent for the lease, before it has acknowledged the message,
        another reader gets the message, marked `redelivered`.

        Args:
            timeout, spin: as of `get`.

        Returns:
            A Taken: the end of its `with` acknowledges it, an exception gives it back. None: no
            message came in time.

        Raises:
            As of `get`.
        """
        cdef ivshmem_taken taken
        if self.claim(IVSHMEM_CLAIM_TAKEN, timeout, spin, &taken):
            return None
        return taken_of(Taken, self, &taken)

    def get_async(self, timeout=None):
        """The twin of `get` for asyncio: a coroutine. To cancel it takes nothing."""
        return until_content(self, "get", self._get_or, timeout)

    @cython.binding(False)
    @cython.critical_section
    def _get_or(self, absent, timeout):
        """Do what `get` does; return `absent` if no message came."""
        return self.got(timeout, None, absent)

    def get_into_async(self, buffer, timeout=None):
        """The twin of `get_into` for asyncio: a coroutine. To cancel it takes nothing."""
        return until_something(self, self.get_into, timeout, (buffer,))

    def take_async(self, timeout=None):
        """The twin of `take` for asyncio: a coroutine. To cancel it takes nothing."""
        return until_something(self, self.take, timeout, ())

    def __iter__(self):
        return self

    def __next__(self):
        return self.get()

    def __aiter__(self):
        return self

    def __anext__(self):
        return self.get_async()


@cython.no_gc_clear
cdef class Taken(Received):
    """A message of a queue that this reader has; made by `QueueReader.take`.

    It is a buffer that can be read, and `array` has the channel's type, as of a View. Its bytes are
    shared memory: any process that can write to the region can change them at any time.

    Attributes:
        size: bytes.
        redelivered: another reader had it before, and did not acknowledge it.
        writer: the number of the writer's slot.
        position: of the message among those of its writer.
        time: of publication, in seconds since 1970; None if the channel has no times.
    """

    @property
    def redelivered(self):
        return self.taken.redelivered != 0

    def __bytes__(self):
        return memoryview(self).tobytes()

    def get(self):
        """Return a copy: bytes, or what the channel's type makes of them."""
        data = bytes(self)
        return data if self.reader.type is None else self.reader.type.decode(data)

    def done(self):
        """Acknowledge it: no other reader gets it. May be called twice.

        Raises:
            Redelivered: this process was silent, and another reader has the message, too; what was
                seen of it may be torn.
            BufferError: a memoryview or an array of it is alive.
        """
        cdef int code
        with cython.critical_section(self.reader):
            if not self.live:
                return
            self.check_exports()
            self.enter()
            self.live = False
            code = ivshmem_queue_done(&self.reader.reader, &self.taken)
            self.reader.membership.flush()
            if code:
                raise Redelivered(
                    f"queue {self.reader.name!r}: this process was silent while it had message"
                    f" {self.taken.message.position} of writer {self.taken.message.writer}: another"
                    " reader has it, too"
                )

    def give_back(self):
        """Give it to another reader, marked `redelivered`. May be called twice."""
        with cython.critical_section(self.reader):
            if not self.live:
                return
            self.check_exports()
            self.live = False
            if self.reader.usable():
                ivshmem_queue_return(&self.reader.reader, &self.taken)
                self.reader.membership.flush()

    def __enter__(self):
        return self

    def __exit__(self, kind, *error):
        if kind is None:
            self.done()
        elif self.exports == 0:
            self.give_back()

    def __del__(self):
        if self.live and self.exports == 0:
            self.give_back()

    def __repr__(self):
        state = "" if self.live else ", done"
        return f"<ivshmem.channel.{type(self).__name__} of {self.size} bytes{state}>"


cdef Taken taken_of(type kind, ClaimingEnd reader, const ivshmem_taken *taken):
    cdef Taken made
    try:
        made = kind.__new__(kind)
    except BaseException:
        reader.undo(taken)
        raise
    made.reader = reader
    made.taken = taken[0]
    made.message = taken.message
    made.live = True
    return made
