# cython: language_level=3, binding=True, freethreading_compatible=True
# cython: embedsignature=True, embedsignature.format=clinic
"""Internal: the ends of a channel of calls: callers, and servers that reply.

Knows: calls under way, and why one has no reply. Does not know: the protocol, which is in
ivshmem_channel.h.
"""

cimport cython
from cpython.buffer cimport PyBuffer_Release
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memcpy

from ..native.spin cimport Probe
from .header cimport *
from .ends cimport ChannelEnd, Wakeup
from .queues cimport ClaimingEnd, Taken, taken_of
from .roles cimport take_payload, WriterEnd
from .sleeping_tasks cimport until_in_time, until_something

import weakref
from time import monotonic

from ..errors import (
    CallFailed,
    ChannelTypeError,
    ClosedError,
    IvshmemError,
    MessageTooLong,
    ServerLost,
)
from ..text import plain

cdef enum:
    # The status of a reply: what the bytes are.
    REPLY = 0
    FAILURE = 1  # text that says why there is none
    SHOWN = 1000  # bytes of it


cdef struct Probed:
    ivshmem_writer *caller
    uint64_t position


cdef int64_t probe_call(void *what) noexcept nogil:
    cdef Probed *call = <Probed *>what
    return not ivshmem_call_waits(call.caller, call.position)


@cython.no_gc_clear
@cython.final
cdef class PendingCall(ChannelEnd):
    """A call under way; made by `Caller.submit`.

    A call that is forgotten is cancelled.
    """

    cdef Caller caller
    cdef uint64_t position
    cdef bytes reply
    cdef object error
    cdef bint over
    cdef bint lost  # the server that had begun is gone
    cdef bint cancelled
    cdef Probed probed

    # Invariants:
    # 1. While a program watches the descriptor of a call that is not over, the call is one of those
    #    that sleep at its caller.
    # 2. No code of Python's, which lets signal handlers run, stands between two steps of a call's
    #    end: a handler that raises would leave its slot taken. (Even repr() of a str is such code.)

    cdef int attempt(self) except? -2:
        cdef uint32_t length = 0
        cdef unsigned status = 0
        cdef int code, never = 0
        cdef bytes data
        if self.over:
            return 0
        code = ivshmem_call_look(&self.caller.writer, self.position, &length, &status)
        if code == IVSHMEM_AGAIN:
            return code
        if code == 0:
            data = PyBytes_FromStringAndSize(NULL, length)
            ivshmem_copy_payload(
                PyBytes_AS_STRING(data),
                self.channel.area.memory.start
                + ivshmem_reply_offset(&self.channel, self.caller.writer.slot, self.position),
                length,
            )
            if status == REPLY:
                self.reply = data
            else:
                why = plain(data[:SHOWN].decode(errors="replace"))
                self.error = CallFailed(f"call of {self.name!r}: the server failed: {why}")
        elif code == IVSHMEM_CLOSED:
            self.lost = True
        else:
            self.error = self.caller.fail(code)
        self.over = True
        ivshmem_call_end(&self.caller.writer, self.position, &never)
        self.end_watch()
        return 0

    cdef object why_not(self):
        """Return the exception that says why a call that is over has no reply."""
        if self.error is not None:
            return self.error
        if self.cancelled:
            return CallFailed(f"call of {self.name!r}: it was cancelled")
        return ServerLost(
            f"call of {self.name!r}: the server that had begun with it is gone; whether it did"
            " the work is not known"
        )

    cdef int begin_watch(self) except -1:
        self.caller.asleep += 1
        self.membership.watch(1)
        return self.membership.hurry()

    cdef int end_watch(self) except -1:
        """Wake who watches the descriptor, for the last time."""
        if not self.watched:
            return 0
        self.watched = False
        self.membership.watch(-1)
        self.caller.one_awake()
        return self.membership.kick_all() if self.membership.is_own() else 0

    cdef int beat(self) except -1:
        with cython.critical_section(self.caller):
            if not self.watched:
                return 0
            if not self.caller.usable():  # to ask for the result raises that
                self.end_watch()
            elif not ivshmem_call_waits(&self.caller.writer, self.position):
                self.membership.kick_all()
            return 0

    cdef int enter(self) except -1:
        if self.caller is None:
            raise TypeError("a PendingCall is made by Caller.submit")
        return 0 if self.over else self.caller.enter()

    cdef ChannelEnd sleeper(self):
        return self.caller

    cdef int begin_sleep(self) except? -2:
        ivshmem_queue_writer_sleep(&self.caller.writer)
        return self.attempt()

    cdef void end_sleep(self) noexcept:
        ivshmem_sleep_end(&self.channel, &self.caller.writer.sleep)

    cdef int64_t probe(self, void **what, Probe *probe) except -1:
        self.probed.caller = &self.caller.writer
        self.probed.position = self.position
        what[0] = &self.probed
        probe[0] = probe_call
        return 1

    def fileno(self):
        """Return a descriptor, which becomes readable when `result` has something, and stays so.

        As of other ends, it is also readable at times without a reason: call `result` with
        timeout=0, which raises TimeoutError then. It stays the call's, and `close()` closes it.

        Raises:
            OSError: EMFILE or ENOMEM, at the first call, which makes the descriptor.
            ClosedError: the call, its caller or the channels are closed.
        """
        with cython.critical_section(self.caller):
            if self.caller is not None and not self.open:
                raise ClosedError(f"this PendingCall of {self.name!r} is closed")
            if self.wakeup is None:
                self.enter()
                self.wakeup = Wakeup(self.membership)
                self.membership.ends[id(self)] = weakref.ref(self)
                if self.over:
                    self.membership.kick_all()
            return self.wakeup.epoll.epfd if self.over else ChannelEnd.fileno(self)

    def done(self):
        """Whether `result` would return, or raise, at once."""
        with cython.critical_section(self.caller):
            self.enter()
            return self.attempt() == 0

    def result(self, timeout=None, *, spin=None):
        """Return the reply.

        Args:
            timeout: seconds to wait at most; None: for ever; 0: do not wait.
            spin: as of `Endpoint.wait`.

        Raises:
            TimeoutError: no reply came in time; the call goes on.
            CallFailed: the server replied that it failed.
            ServerLost: the server that had begun is gone.
            ChannelCorrupt, ClosedError: as of all calls.
        """
        with cython.critical_section(self.caller):
            if self.wait(timeout, spin) == IVSHMEM_AGAIN:
                raise TimeoutError(f"call of {self.name!r}: no reply in {timeout:g} s")
            if self.reply is None:
                raise self.why_not()
            return self.reply if self.caller.type is None else self.caller.type.decode(self.reply)

    def result_async(self, timeout=None):
        """The twin of `result` for asyncio: a coroutine. `await call` does the same."""
        return until_in_time(self, self.result, timeout, ())

    def __await__(self):
        return self.result_async().__await__()

    def cancel(self):
        """Give the call up; return whether it is certain that no server began with it."""
        cdef int never = 0
        with cython.critical_section(self.caller):
            if self.over or self.caller is None:
                return False
            if not self.caller.usable():
                self.end_watch()
                return False
            self.caller.given_up.append(self.position)  # first: it alone can fail
            self.over = self.cancelled = True
            if ivshmem_call_end(&self.caller.writer, self.position, &never):
                self.caller.given_up.pop()
            self.end_watch()
            return never != 0

    def close(self):
        """Give the call up, and close its descriptor; may be called twice."""
        self.cancel()
        with cython.critical_section(self.caller):
            self.open = False
            self.wakeup = self.slept_on = None
            if self.membership is not None:
                self.membership.ends.pop(id(self), None)

    def __del__(self):
        self.close()


@cython.no_gc_clear
cdef class Caller(WriterEnd):
    """One caller; made by `caller()` of a channel of calls. Its `call` waits for the reply."""

    cdef list given_up  # positions of calls that were cancelled while a server had them

    def __init__(self, *args):
        self.given_up = []

    cdef int restore(self) except -1:
        ivshmem_writer_beat(&self.writer)
        if self.awaited:  # for a reply, or for room
            self.membership.kick_all()
        return 0

    cdef int ready(self) noexcept:
        cdef int never = 0
        cdef Py_ssize_t i = 0 if self.given_up is None else len(self.given_up)
        while i > 0:  # in place: a call that is collected during this adds itself
            i -= 1
            if ivshmem_call_end(&self.writer, self.given_up[i], &never):
                del self.given_up[i]
        return ivshmem_queue_ready(&self.writer)

    @cython.critical_section
    def submit(self, data, timeout=None, *, spin=None):
        """Send a request, and return a PendingCall.

        Args:
            data: bytes, or any contiguous buffer.
            timeout: seconds to wait for room, which calls under way may take; None: for ever.

        Raises:
            TimeoutError: there was no room in time; nothing was sent.
            MessageTooLong, ChannelTypeError, ChannelCorrupt, ClosedError: as of Writer.put.
        """
        cdef PendingCall call
        cdef Py_buffer view
        cdef uint32_t cell = 0
        call = PendingCall.__new__(PendingCall)  # first: once it is sent, nothing may fail
        call.over = True
        take_payload(self.type, data, &view)
        try:
            self.enter()
            if <uint64_t>view.len > self.channel.record.geometry.limit:
                raise self.too_long(view.len)
            self.find_room(&cell, timeout, spin)
            memcpy(self.at(cell), view.buf, view.len)
            call.caller = self
            call.membership = self.membership
            call.channel = self.channel
            call.name = self.name
            call.open = True
            call.position = self.writer.next
            call.over = False
            self.send(cell, view.len, 0)
            return call
        finally:
            PyBuffer_Release(&view)

    def call(self, data, timeout=None, *, spin=None):
        """Send a request, wait for the reply and return it.

        Args:
            data: bytes, or any contiguous buffer.
            timeout: seconds for all of it; None: for ever. When they are over, the call is given
                up, and its server may still do the work.

        Raises:
            As of `submit` and of PendingCall.result.
        """
        cdef PendingCall call
        begun = monotonic() if timeout else 0.0
        call = self.submit(data, timeout, spin=spin)
        try:
            left = max(timeout - (monotonic() - begun), 0) if timeout else timeout
            return call.result(left, spin=spin)
        except TimeoutError:
            how = "no server has begun with it" if call.cancel() else "a server has begun with it"
            raise TimeoutError(
                f"call of {self.name!r}: no reply in {timeout:g} s; {how}"
            ) from None
        except BaseException:
            call.cancel()
            raise

    def submit_async(self, data, timeout=None):
        """The twin of `submit` for asyncio: a coroutine."""
        return until_in_time(self, self.submit, timeout, (data,))

    async def call_async(self, data, timeout=None):
        """The twin of `call` for asyncio. If it is cancelled, the call is given up."""
        cdef PendingCall call
        begun = monotonic() if timeout else 0.0
        call = await self.submit_async(data, timeout)
        try:
            left = max(timeout - (monotonic() - begun), 0) if timeout else timeout
            return await call.result_async(left)
        except TimeoutError:
            how = "no server has begun with it" if call.cancel() else "a server has begun with it"
            raise TimeoutError(
                f"call of {self.name!r}: no reply in {timeout:g} s; {how}"
            ) from None
        except BaseException:
            call.cancel()
            raise


@cython.no_gc_clear
cdef class CallServer(ClaimingEnd):
    """One server of a channel of calls; made by its `server()`. It iterates over calls."""

    @cython.critical_section
    def take(self, timeout=None, *, spin=None):
        """Take the next call, which no other server gets.

        Args:
            timeout: seconds to wait at most; None: for ever; 0: do not wait.
            spin: as of `Endpoint.wait`.

        Returns:
            A Call, to be replied to; None: none came in time.

        Raises:
            As of QueueReader.take.
        """
        cdef ivshmem_taken taken
        if self.claim(IVSHMEM_CLAIM_TAKEN, timeout, spin, &taken):
            return None
        return taken_of(Call, self, &taken)

    def serve(self, function, timeout=None, *, spin=None):
        """Reply to calls with what `function` returns, one after the other.

        What it raises is told to the caller, whose `result` raises CallFailed; it ends this call
        only if it is no Exception (KeyboardInterrupt, SystemExit). The caller is told of a reply
        that is too long, no buffer, or cannot be pickled, in the same way; this call continues.

        Args:
            function: takes a request (bytes, or what the type makes of them), returns a reply.
            timeout: seconds without a call after which this returns; None: for ever.
        """
        while True:
            call = self.take(timeout, spin=spin)
            if call is None:
                return
            try:
                reply = function(call.get())
            except Exception as error:
                call.fail(explained(error))
            except BaseException:
                call.fail("the server ends")
                raise
            else:
                reply_or_fail(call, reply)

    async def serve_async(self, function, timeout=None):
        """The twin of `serve` for asyncio; `function` may be a coroutine function."""
        while True:
            call = await self.take_async(timeout)
            if call is None:
                return
            try:
                reply = function(call.get())
                if hasattr(reply, "__await__"):
                    reply = await reply
            except Exception as error:
                call.fail(explained(error))
            except BaseException:
                call.fail("the server ends")
                raise
            else:
                reply_or_fail(call, reply)

    def take_async(self, timeout=None):
        """The twin of `take` for asyncio: a coroutine. To cancel it takes nothing."""
        return until_something(self, self.take, timeout, ())

    def __iter__(self):
        return self

    def __next__(self):
        return self.take()

    def __aiter__(self):
        return self

    def __anext__(self):
        return self.take_async()


cdef str explained(object error):
    """Return what a caller is told of an exception."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # of its __str__
        return type(error).__name__


cdef int reply_or_fail(Call call, object reply) except -1:
    """Send a reply, or tell the caller that it cannot be sent. The server continues."""
    try:
        call.reply(reply)
    except (ChannelTypeError, MessageTooLong) as error:
        call.fail(explained(error))
    except IvshmemError:  # the channel is closed, or spoiled
        raise
    except Exception as error:  # whatever a pickle raises
        call.fail(explained(error))
    return 0


@cython.no_gc_clear
cdef class Call(Taken):
    """A call that this server has; made by `CallServer.take`. Its buffer is the request.

    Reply to it once, by `reply` or `fail`. At the end of `with` it is failed if that was not done.
    """

    def reply(self, data=b""):
        """Send the reply.

        Returns:
            Whether the caller still waits for it.

        Raises:
            MessageTooLong: it is longer than the channel's limit. The call can still be replied to.
        """
        self.enter()
        return self.send(self.reader.type, data, REPLY)

    def fail(self, why):
        """Tell the caller that there is no reply, and why: its `result` raises CallFailed."""
        self.enter()
        limit = min(self.reader.channel.record.geometry.limit, SHOWN)
        return self.send(None, str(why).encode(errors="backslashreplace")[:limit], FAILURE)

    cdef object send(self, object message_type, object data, unsigned status):
        cdef Py_buffer view
        cdef int code
        with cython.critical_section(self.reader):
            take_payload(message_type, data, &view)
            try:
                self.enter()
                self.check_exports()
                if <uint64_t>view.len > self.reader.channel.record.geometry.limit:
                    raise MessageTooLong(
                        f"a reply of {view.len} bytes, and the channel's limit is"
                        f" {self.reader.channel.record.geometry.limit}"
                    )
                memcpy(
                    self.reader.channel.area.memory.start
                    + ivshmem_reply_offset(
                        &self.reader.channel, self.taken.message.writer, self.taken.message.position
                    ),
                    view.buf,
                    view.len,
                )
                code = ivshmem_reply(&self.reader.reader, &self.taken, view.len, status)
                self.live = False
            finally:
                PyBuffer_Release(&view)
            self.reader.membership.flush()
            return code == 0

    def done(self):
        """A call is replied to."""
        raise TypeError("a call ends with `reply` or `fail`")

    def give_back(self):
        """No other server may get a call: what this one did would be repeated."""
        raise TypeError("a call ends with `reply` or `fail`")

    def __exit__(self, kind, *error):
        if self.live and self.exports == 0:
            self.fail(
                "the server gave no reply" if kind is None else explained(error[0])
            )

    def __del__(self):
        if self.live and self.exports == 0 and self.reader.usable():
            self.fail("the server gave no reply")
