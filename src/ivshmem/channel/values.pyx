# cython: language_level=3, binding=True, freethreading_compatible=True
# cython: embedsignature=True, embedsignature.format=clinic
"""Internal: the reading end of a value. (The writing end is that of messages: writers.pyx.)

Knows: contents as Python takes them. Does not know: slots and cells (roles.pyx); the protocol,
which is in ivshmem_channel.h.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport int64_t, uint64_t

from ..native.spin cimport Probe
from .header cimport *
from .roles cimport check_in_place, ReaderEnd, TRIES
from .sleeping_tasks cimport until_content
from .views cimport view_of


cdef int64_t probe_value(void *what) noexcept nogil:
    cdef ivshmem_reader *reader = <ivshmem_reader *>what
    return ivshmem_value(ivshmem_head(reader.channel, 0)) != reader.sources[0].next


@cython.no_gc_clear
cdef class ValueReader(ReaderEnd):
    """One reader of a value; made by its `reader()`. It iterates over contents as they change.

    Attributes:
        name: of the channel.
    """

    cdef int attempt(self) except? -2:
        """Look for a content that this reader has not seen."""
        if not probe_value(&self.reader):
            return IVSHMEM_AGAIN
        return self.look()

    cdef int look(self) noexcept:
        self.seen = self.reader.sources[0].next
        return ivshmem_value_look(&self.reader, &self.message)

    cdef int put_back(self, const ivshmem_message *message) except -1:
        """Undo that a content was seen, which is held."""
        self.reader.sources[0].next = self.seen
        return ReaderEnd.put_back(self, message)

    cdef int begin_sleep(self) except? -2:
        if self.reader.slot != IVSHMEM_NO_SLOT:
            ivshmem_sleep_begin(&self.channel, &self.reader.sleep)
        return 0 if probe_value(&self.reader) else IVSHMEM_AGAIN

    cdef void end_sleep(self) noexcept:
        if self.reader.slot != IVSHMEM_NO_SLOT:
            ivshmem_sleep_end(&self.channel, &self.reader.sleep)

    cdef int64_t probe(self, void **what, Probe *probe) except -1:
        what[0] = &self.reader
        probe[0] = probe_value
        return 1

    cdef int restore(self) except -1:
        if self.awaited and probe_value(&self.reader):
            self.membership.kick_all()
        return 0

    cdef object latest(self, int code, object absent):
        """Copy the content that was looked at, or a later one; `absent`: there is none."""
        cdef bytes data
        cdef uint64_t newest
        cdef uint64_t seen = self.seen
        for _ in range(TRIES):
            if code == IVSHMEM_AGAIN:
                return absent
            if code:
                raise self.fail(code)
            newest = self.reader.sources[0].next
            self.reader.sources[0].next = seen  # without memory for a copy, it was not seen
            data = PyBytes_FromStringAndSize(NULL, self.message.length)
            self.reader.sources[0].next = newest
            ivshmem_copy_payload(
                PyBytes_AS_STRING(data),
                self.channel.area.memory.start + self.message.offset,
                self.message.length,
            )
            if ivshmem_check(&self.channel, &self.message) == 0:
                return data if self.type is None else self.decoded(data, seen)
            code = ivshmem_value_look(&self.reader, &self.message)
        raise self.starved()

    cdef object decoded(self, bytes data, uint64_t seen):
        try:
            return self.type.decode(data)
        except BaseException as error:
            if not self.is_for_ever(error):
                self.reader.sources[0].next = seen
            raise

    @cython.critical_section
    def get(self):
        """Return a copy of the latest content, which is never torn. Never waits.

        Returns:
            bytes, or what the channel's type makes of them; None: it was never set. (With
            pickle=True a content can be None, too.)

        Raises:
            Overtaken: the writer sets it faster than it can be copied.
            ChannelCorrupt, ClosedError: as of Reader.get.
        """
        self.enter()
        return self.latest(self.look(), None)

    @cython.critical_section
    def wait_changed(self, timeout=None, *, spin=None):
        """Wait until the value was set since this reader last looked; return its content.

        Args:
            timeout, spin: as of Reader.get.

        Returns:
            The content; None: it was not set in time, or the content is None, as of `get`.
            Contents that came in between are skipped.

        Raises:
            As of `get`.
        """
        self.enter()
        return self.latest(self.wait(timeout, spin), None)

    @cython.critical_section
    def _changed_or(self, absent, timeout):
        """Do what `wait_changed` does; return `absent` if the value was not set."""
        self.enter()
        return self.latest(self.wait(timeout, None), absent)

    @cython.critical_section
    def view(self):
        """Return the latest content as a View; None: it was never set.

        The writer does not wait for it: `check`, and the end of `with`, raise Overtaken if the
        writer has used its memory again. The last four contents keep theirs.

        Raises:
            ChannelTypeError: pickle=True.
        """
        cdef int code
        check_in_place(self.type, self.name)
        self.enter()
        code = self.look()
        if code == IVSHMEM_AGAIN:
            return None
        if code:
            raise self.fail(code)
        return view_of(self, self.message)

    def wait_changed_async(self, timeout=None):
        """The twin of `wait_changed` for asyncio: a coroutine. To cancel it takes nothing."""
        return until_content(self, "wait_changed", self._changed_or, timeout)

    def __iter__(self):
        return self

    def __next__(self):
        return self.wait_changed()

    def __aiter__(self):
        return self

    def __anext__(self):
        return self.wait_changed_async()
