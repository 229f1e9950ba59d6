# cython: language_level=3, binding=True, freethreading_compatible=True
# cython: embedsignature=True, embedsignature.format=clinic
"""Internal: the ends of a channel of bytes: listeners, and connections that work as a socket does.

Knows: what a program that knows sockets expects. Does not know: the protocol, which is in
ivshmem_channel.h; files over a connection (stream_files.py).
"""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport int64_t, UINT64_MAX, uint64_t

from ..native.spin cimport Probe
from ..native.syscalls cimport EAGAIN, EINTR, errno, iovec, readv, writev
from .header cimport *
from .ends cimport ChannelEnd
from .membership cimport Membership
from .roles cimport flat, open_channel, take_buffer
from .sleeping_tasks cimport until_no_wait, until_something

import os
from time import monotonic

from ..errors import ChannelError
from ..system.time_limits import deadline_of, seconds_of
from ..text import all_of
from . import stream_files

cdef enum:
    LEAST_PART = 1 << 12  # bytes: less is not worth a look at the other end's words
    MOST_PART = 1 << 17  # more would leave the caches nearest to the core


@cython.no_gc_clear
@cython.final
cdef class StreamListener(ChannelEnd):
    """A listener of a channel of bytes; made by its `listen()`. It iterates over connections."""

    def __cinit__(self, channels, Membership membership not None, dict found not None):
        cdef int code
        open_channel(self, channels, membership, found)
        self.listener.channel = &self.channel
        self.listener.member = &membership.member
        code = ivshmem_listen(&self.listener)
        if code == IVSHMEM_TAKEN:
            most = self.channel.record.geometry.readers
            raise ChannelError(
                f"channel {self.name!r}: {all_of(most, 'listener')} open; create it with more"
                " listeners"
            )
        if code:
            raise self.fail(code)
        self.enlist()

    cdef int attempt(self) except? -2:
        return 0 if ivshmem_listener_has_caller(&self.listener) else IVSHMEM_AGAIN

    cdef int begin_sleep(self) except? -2:
        self.slept = True
        ivshmem_sleep_begin(&self.channel, &self.listener.sleep)
        return self.attempt()

    cdef void end_sleep(self) noexcept:
        ivshmem_sleep_end(&self.channel, &self.listener.sleep)

    cdef int restore(self) except -1:
        if self.awaited and self.attempt() == 0:
            self.membership.kick_all()
        return 0

    cdef int give_up(self) except -1:
        ivshmem_listener_close(&self.listener)
        return 0

    cdef int wake_another(self) except -1:
        ivshmem_listener_pass_on(&self.listener)
        return 0

    cdef int next_caller(self, Stream stream, object timeout, object spin) except? -2:
        """Accept; 0, or IVSHMEM_AGAIN: no caller came in time."""
        cdef int code
        deadline = deadline_of(timeout)
        while True:
            self.enter()
            stream.stream.channel = &self.channel
            code = ivshmem_accept(&self.listener, &stream.stream)
            if code != IVSHMEM_AGAIN:
                return code
            left = None if deadline is None else max(deadline - monotonic(), 0)
            if self.wait(left, spin) == IVSHMEM_AGAIN:
                return IVSHMEM_AGAIN

    @cython.critical_section
    def accept(self, timeout=None, *, spin=None):
        """Accept the next connection.

        Args:
            timeout: seconds to wait at most; None: for ever; 0: do not wait.
            spin: as of `Endpoint.wait`.

        Returns:
            A Stream; None: none came in time.

        Raises:
            ClosedError: the listener, the channels or the region is closed.
        """
        cdef Stream stream = Stream.__new__(Stream)
        cdef int code
        stream.take_over(self)
        try:
            code = self.next_caller(stream, timeout, spin)
            if code == 0:
                stream.begin()
                return stream
            if code != IVSHMEM_AGAIN:
                raise self.fail(code)
        finally:
            if self.usable():
                self.pass_on()

    def accept_async(self, timeout=None):
        """The twin of `accept` for asyncio: a coroutine. To cancel it takes nothing."""
        return until_something(self, self.accept, timeout, ())

    def __iter__(self):
        return self

    def __next__(self):
        return self.accept()

    def __aiter__(self):
        return self

    def __anext__(self):
        return self.accept_async()


def connect(channels, Membership membership not None, dict found not None):
    """Return a Stream to a listener of a channel.

    Raises:
        ConnectionRefusedError: no process that is at work listens.
        ChannelError: all connections are in use.
    """
    cdef Stream stream = Stream.__new__(Stream)
    cdef int code
    open_channel(stream, channels, membership, found)
    stream.stream.channel = &stream.channel
    stream.stream.member = &membership.member
    code = ivshmem_stream_connect(&stream.stream)
    if code == IVSHMEM_NOT_FOUND:
        raise ConnectionRefusedError(f"channel {stream.name!r}: no process listens")
    if code == IVSHMEM_TAKEN:
        most = stream.channel.record.geometry.writers
        raise ChannelError(
            f"channel {stream.name!r}: {all_of(most, 'connection')} in use; create it with more"
            " connections"
        )
    if code:
        raise stream.fail(code)
    stream.begin()
    membership.flush()
    return stream


cdef uint64_t part_of(const ivshmem_channel *channel) noexcept nogil:
    """Return how many bytes to copy at most before the other end is told of them.

    It works on the first ones while the next ones are copied.
    """
    return min(max(channel.layout.cell_bytes // 4, LEAST_PART), MOST_PART)


cdef struct Probed:
    ivshmem_stream *stream
    int direction


cdef int look_both(ivshmem_stream *stream) noexcept nogil:
    """Return in which directions a call would not wait: 1 << SEND, 1 << RECEIVE; or an error.

    With them 1 << ENDED: the other end receives no more; 1 << ABORTED: it has reset the connection.
    """
    cdef ivshmem_other_end other
    cdef int found = 0
    cdef int code = ivshmem_stream_look(stream, &other)
    if code:
        return code
    if other.closed or other.receives_no_more:
        found |= 1 << ENDED
    if other.closed and not other.sends_no_more:
        found |= 1 << ABORTED
    if (
        other.closed or other.receives_no_more or stream.sends_no_more
        or ivshmem_ahead(stream.sent, other.received) < stream.channel.layout.cell_bytes
    ):
        found |= 1 << SEND
    if (
        other.closed or other.sent != stream.received
        or other.sends_no_more or stream.receives_no_more
    ):
        found |= 1 << RECEIVE
    return found


cdef int look(ivshmem_stream *stream, int direction) noexcept nogil:
    """0: a call in this direction would not wait; IVSHMEM_AGAIN; or an error."""
    cdef int found = look_both(stream)
    return found if found < 0 else 0 if found >> direction & 1 else IVSHMEM_AGAIN


cdef int64_t probe_stream(void *what) noexcept nogil:
    cdef Probed *probed = <Probed *>what
    return look(probed.stream, probed.direction) != IVSHMEM_AGAIN


@cython.no_gc_clear
@cython.final
cdef class Half(ChannelEnd):
    """A direction of a Stream, as something to wait for: two threads may wait, one for each."""

    cdef Stream stream
    cdef Probed probed

    cdef int attempt(self) except? -2:
        return look(self.probed.stream, self.probed.direction)

    cdef int enter(self) except -1:
        if self.stream is None:
            raise TypeError("a Half is made by its Stream")
        return self.stream.enter()

    cdef ChannelEnd sleeper(self):
        return self.stream

    cdef int begin_sleep(self) except? -2:
        ivshmem_stream_sleep(self.probed.stream)
        return self.attempt()

    cdef void end_sleep(self) noexcept:
        self.stream.end_sleep()

    cdef int64_t probe(self, void **what, Probe *probe) except -1:
        what[0] = &self.probed
        probe[0] = probe_stream
        return 1


@cython.no_gc_clear
@cython.final
cdef class Stream(ChannelEnd):
    """One end of a connection, which works as a socket does; made by `connect` and `accept`.

    One thread may send while another receives. Two that send at once mix their bytes.
    """

    cdef int take_over(self, StreamListener listener) except -1:
        self.channels = listener.channels
        self.membership = listener.membership
        self.name = listener.name
        self.channel = listener.channel
        return 0

    cdef int begin(self) except -1:
        self.stream.channel = &self.channel
        return self.enlist()

    cdef ChannelEnd half(self, int direction):
        cdef Half half = Half.__new__(Half)
        half.stream = self
        half.membership = self.membership
        half.name = self.name
        half.probed.stream = &self.stream
        half.probed.direction = direction
        return half

    cdef int attempt(self) except? -2:
        return look(&self.stream, RECEIVE)

    cdef int begin_sleep(self) except? -2:
        ivshmem_stream_sleep(&self.stream)
        return look(&self.stream, RECEIVE)

    cdef void end_sleep(self) noexcept:
        ivshmem_sleep_end(&self.channel, &self.stream.sleep)

    cdef int restore(self) except -1:
        ivshmem_stream_beat(&self.stream)
        if self.awaited and (
            look(&self.stream, RECEIVE) != IVSHMEM_AGAIN
            or look(&self.stream, SEND) != IVSHMEM_AGAIN
        ):
            self.membership.kick_all()
        return 0

    cdef int arm(self) except? -2:
        """Sleep as one that watches the descriptor does; whether something can be done after all.

        A program that waits for room may leave unread what came, and one that waits for bytes has
        no use for room. So it is told only of directions in which it called since it was told last.
        """
        cdef int found
        self.check_there()
        self.wakeup.clear()
        ivshmem_stream_sleep(&self.stream)
        self.membership.flush()
        found = look_both(&self.stream)
        if found < 0:
            return found
        found &= self.tried
        self.tried &= ~found
        return 0 if found else IVSHMEM_AGAIN

    cdef int begin_watch(self) except -1:
        self.tried |= 1 << RECEIVE
        return ChannelEnd.begin_watch(self)

    cdef int give_up(self) except -1:
        if self.aborting:
            ivshmem_stream_abort(&self.stream)
        else:
            ivshmem_stream_close(&self.stream)
        return 0

    @cython.critical_section
    def abort(self):
        """Close at once, so that the other end sees a reset instead of an end.

        Its calls raise ConnectionResetError after what was sent before, also if this end was shut
        down for sending: that is taken back, unless the other one has received the end already. May
        be called twice, and after `close`.
        """
        self.aborting = True
        self.close()

    # As a socket.

    def settimeout(self, timeout):
        """Set how many seconds a call may wait; None: for ever; 0: calls do not wait."""
        if timeout is not None and seconds_of(timeout) < 0:
            raise ValueError(f"timeout {timeout!r}: 0 or more seconds, or None")
        self.timeout = timeout

    def gettimeout(self):
        """Return what `settimeout` set; None: no limit."""
        return self.timeout

    def setblocking(self, flag):
        """True: as settimeout(None); False: as settimeout(0)."""
        self.timeout = None if flag else 0

    cdef int await_half(self, int direction, object timeout, object deadline) except -1:
        cdef int code
        cdef ChannelEnd half
        if timeout is not None and timeout == 0:
            if self.watched and self.arm() != IVSHMEM_AGAIN:
                self.membership.kick_all()
            raise BlockingIOError(11, f"connection of {self.name!r}: it would wait")
        left = None if deadline is None else max(deadline - monotonic(), 0)
        half = self.half(direction)
        code = half.wait(left, None)
        if code == IVSHMEM_AGAIN:
            raise TimeoutError(f"connection of {self.name!r}: nothing moved in {timeout:g} s")
        if code:
            raise self.fail(code)
        return 0

    @cython.critical_section
    def send(self, data):
        """Send what there is room for, at least a byte; return how many bytes that were.

        Raises:
            BrokenPipeError: the other end receives no more, or this one was shut down.
            TimeoutError: no room in the time that `settimeout` set.
            BlockingIOError: no room now, after settimeout(0).
            ChannelCorrupt, ClosedError: as of all calls.
        """
        cdef Py_buffer view
        take_buffer(data, &view, PyBUF_SIMPLE)
        try:
            if view.len == 0:
                return 0
            timeout = self.timeout
            return self.push(<const char *>view.buf, view.len, timeout, deadline_of(timeout))
        finally:
            PyBuffer_Release(&view)

    cdef int64_t push(
        self, const char *data, uint64_t size, object timeout, object deadline
    ) except -1:
        cdef int64_t n
        cdef uint64_t done = 0
        self.tried |= 1 << SEND
        while True:
            self.enter()
            self.check_alone(SEND)
            n = ivshmem_send(&self.stream, data + done, min(size - done, part_of(&self.channel)))
            if self.membership.rings.count:
                self.membership.flush()
            if n > 0:
                done += <uint64_t>n
                if done == size:
                    return <int64_t>done
                continue
            if done:
                return <int64_t>done  # what is wrong, the next call finds
            if n == IVSHMEM_CLOSED:
                raise self.broken(SEND)
            if n != IVSHMEM_AGAIN:
                raise self.fail(<int>n)
            self.await_half(SEND, timeout, deadline)

    cdef object broken(self, int direction):
        """Return the error of a direction in which the other end does nothing more."""
        if direction == SEND:
            return BrokenPipeError(
                32, f"connection of {self.name!r}: the other end receives no more"
            )
        return ConnectionResetError(104, f"connection of {self.name!r}: the other end is gone")

    cdef int check_alone(self, int direction) except -1:
        if self.moving[direction]:
            verb = "sends" if direction == SEND else "receives"
            raise RuntimeError(f"connection of {self.name!r}: another thread {verb} at this moment")
        return 0

    @cython.critical_section
    def sendall(self, data):
        """Send all of a buffer. The time limit is for all of it; otherwise as `send`.

        After an error it is unknown how much was sent.
        """
        cdef Py_buffer view
        cdef uint64_t done = 0
        take_buffer(data, &view, PyBUF_SIMPLE)
        try:
            timeout = self.timeout
            deadline = deadline_of(timeout)
            while done < <uint64_t>view.len:
                done += self.push(
                    <const char *>view.buf + done, view.len - done, timeout, deadline
                )
        finally:
            PyBuffer_Release(&view)

    cdef int64_t pull(self, char *into, uint64_t room, object timeout) except -1:
        cdef int64_t n
        cdef uint64_t done = 0
        deadline = deadline_of(timeout)
        self.tried |= 1 << RECEIVE
        while True:
            self.enter()
            self.check_alone(RECEIVE)
            n = ivshmem_receive(&self.stream, into + done, min(room - done, part_of(&self.channel)))
            if self.membership.rings.count:
                self.membership.flush()
            if n > 0:
                done += <uint64_t>n
                if done == room:
                    return <int64_t>done
                continue
            if n == 0 or done:
                return <int64_t>done  # what is wrong, the next call finds
            if n == IVSHMEM_CLOSED:
                raise self.broken(RECEIVE)
            if n != IVSHMEM_AGAIN:
                raise self.fail(<int>n)
            self.await_half(RECEIVE, timeout, deadline)

    @cython.critical_section
    def recv(self, Py_ssize_t size):
        """Receive at most `size` bytes, at least one; b"": the other end sends no more.

        Raises:
            ConnectionResetError: the other end's process is gone, without having closed.
            TimeoutError, BlockingIOError, ChannelCorrupt, ClosedError: as of `send`.
        """
        return self.receive(size, self.timeout)

    cdef bytes receive(self, Py_ssize_t size, object timeout):
        cdef bytes data
        cdef int64_t n
        if size < 0:
            raise ValueError(f"cannot receive {size} bytes")
        size = min(size, <Py_ssize_t>self.channel.layout.cell_bytes)
        if size == 0:
            return b""
        data = PyBytes_FromStringAndSize(NULL, size)
        n = self.pull(PyBytes_AS_STRING(data), size, timeout)
        return data if n == size else data[:n]

    @cython.critical_section
    def recv_into(self, buffer, Py_ssize_t nbytes=0):
        """Receive into a buffer; return how many bytes, 0: the other end sends no more.

        Args:
            nbytes: at most so many; 0: as many as the buffer has.

        Raises:
            As of `recv`.
        """
        cdef Py_buffer view
        cdef Py_ssize_t room
        take_buffer(buffer, &view, PyBUF_WRITABLE)
        try:
            room = view.len if nbytes == 0 else nbytes
            if not 0 <= room <= view.len:
                raise ValueError(f"{nbytes} bytes into a buffer of {view.len}")
            return self.pull(<char *>view.buf, room, self.timeout) if room else 0
        finally:
            PyBuffer_Release(&view)

    def recv_async(self, Py_ssize_t size, timeout=None):
        """The twin of `recv` for asyncio: a coroutine. To cancel it takes nothing."""
        return until_no_wait(self.half(RECEIVE), self._recv_now, timeout, (size,))

    @cython.critical_section
    def _recv_now(self, size):
        """Receive as after settimeout(0), whatever another thread has set."""
        return self.receive(size, 0)

    async def sendall_async(self, data, timeout=None):
        """The twin of `sendall` for asyncio. The time limit is for each part that finds room.

        After a cancellation it is unknown how much was sent.
        """
        view = flat(data)
        while view:
            sent = await until_no_wait(self.half(SEND), self._send_now, timeout, (view,))
            view = view[sent:]

    @cython.critical_section
    def _send_now(self, data):
        """Send as after settimeout(0), whatever another thread has set."""
        cdef Py_buffer view
        take_buffer(data, &view, PyBUF_SIMPLE)
        try:
            return self.push(<const char *>view.buf, view.len, 0, None)
        finally:
            PyBuffer_Release(&view)

    # From and to descriptors.

    cdef int64_t move(self, int direction, int fd, uint64_t most) except -100:
        """Let the kernel copy between a descriptor and the ring, once; how many bytes.

        0: the end. FD_WAITS, or IVSHMEM_AGAIN: the descriptor, or the ring, would wait.
        IVSHMEM_CLOSED: the other end does nothing more in this direction. It raises the
        descriptor's errors, and those of a spoiled ring.
        """
        cdef int64_t n = INTERRUPTED
        while n == INTERRUPTED:
            n = self.move_once(direction, fd, most)
        return n

    cdef int64_t move_once(self, int direction, int fd, uint64_t most) except -100:
        cdef ivshmem_pieces pieces
        cdef iovec vector[2]
        cdef int64_t n, found
        cdef int code = 0
        self.partly = False
        self.enter()
        self.check_alone(direction)
        if direction == SEND:
            n = ivshmem_send_begin(&self.stream, most, &pieces)
        else:
            n = ivshmem_receive_begin(&self.stream, most, &pieces)
        if n <= 0:
            if n == 0 or n == IVSHMEM_AGAIN or n == IVSHMEM_CLOSED:
                return n
            raise self.fail(<int>n)
        vector[0].iov_base = pieces.first
        vector[0].iov_len = pieces.first_size
        vector[1].iov_base = pieces.second
        vector[1].iov_len = pieces.second_size
        found = n
        self.begin_copy()
        self.moving[direction] = True
        try:
            with nogil:
                if direction == SEND:
                    n = readv(fd, vector, 2 if pieces.second_size else 1)
                else:
                    n = writev(fd, vector, 2 if pieces.second_size else 1)
                if n < 0:
                    code = errno
        finally:
            self.moving[direction] = False
            self.end_copy()
        if n < 0:
            if code == EAGAIN:
                return FD_WAITS
            if code == EINTR:
                PyErr_CheckSignals()
                return INTERRUPTED
            raise OSError(code, os.strerror(code), f"descriptor {fd}")
        self.enter()  # another thread can have closed it
        self.partly = n < found
        if direction == SEND:
            if n:
                ivshmem_send_end(&self.stream, n)
        else:
            ivshmem_receive_end(&self.stream, n)
        if self.membership.rings.count:
            self.membership.flush()
        return n

    cdef object move_in_time(self, int direction, object fd, object size):
        cdef int64_t n
        cdef int number = fd if isinstance(fd, int) else fd.fileno()
        cdef uint64_t most = UINT64_MAX
        if size is not None:
            if size < 0:
                raise ValueError(f"cannot move {size} bytes")
            most = size
            if most == 0:
                raise ValueError("0 bytes: it would look like the end")
        timeout = self.timeout
        deadline = deadline_of(timeout)
        self.tried |= 1 << direction
        while True:
            n = self.move(direction, number, most)
            if n >= 0:
                return n
            if n == FD_WAITS:
                return None
            if n == IVSHMEM_CLOSED:
                raise self.broken(direction)
            self.await_half(direction, timeout, deadline)

    @cython.critical_section
    def read_from(self, fd, size=None):
        """Send what one read(2) of a descriptor brings; the kernel copies it into the ring.

        Args:
            fd: the number of a descriptor, or an object with fileno(). It had better not block: a
                call that waits for it in the kernel keeps the memory in use until it returns.
            size: bytes at most, 1 or more; None: as many as there is room for.

        Returns:
            How many bytes were sent, at least one. 0: the end of the file; the other end hears of
            it only by `shutdown`. None: the descriptor has nothing now (EAGAIN).

        Raises:
            OSError: of read(2); its `filename` names the descriptor. Nothing was sent.
            BrokenPipeError: the other end receives no more, or this one was shut down.
            TimeoutError, BlockingIOError: the ring had no room, as of `send`.
            RuntimeError: another thread sends at this moment.
            ChannelCorrupt, ClosedError: as of all calls.
        """
        return self.move_in_time(SEND, fd, size)

    @cython.critical_section
    def write_to(self, fd, size=None):
        """Receive what one write(2) to a descriptor takes; the kernel copies it from the ring.

        Args:
            fd, size: as of `read_from`.

        Returns:
            How many bytes were received, at least one. 0: the other end sends no more. None: the
            descriptor takes nothing now (EAGAIN).

        Raises:
            OSError: of write(2), BrokenPipeError for one; its `filename` names the descriptor.
                Nothing was received.
            ConnectionResetError: without `filename`: the other end's process is gone, or it called
                `abort`.
            TimeoutError, BlockingIOError: nothing came, as of `recv`.
            RuntimeError: another thread receives at this moment.
            ChannelCorrupt, ClosedError: as of all calls.
        """
        return self.move_in_time(RECEIVE, fd, size)

    @cython.critical_section
    def _silence(self):
        """Return for how many seconds the other end's process has shown no sign of life."""
        self.enter()
        return ivshmem_stream_silence(&self.stream) / 1e9

    @cython.critical_section
    def shutdown(self, int how):
        """As of a socket: socket.SHUT_RD, SHUT_WR or SHUT_RDWR.

        What was sent can still be received.

        Raises:
            RuntimeError: another thread sends at this moment, and its bytes would follow the end.
        """
        if not 0 <= how <= 2:
            raise ValueError(f"how {how}: SHUT_RD, SHUT_WR or SHUT_RDWR")
        self.enter()
        if how != 0:
            self.check_alone(SEND)
        ivshmem_stream_shutdown(&self.stream, how != 0, how != 1)
        self.membership.flush()

    def makefile(self, mode="r", buffering=None, *, encoding=None, errors=None, newline=None):
        """Return a file over the connection, as of a socket. To close it leaves this end open."""
        return stream_files.over(self, mode, buffering, encoding, errors, newline)
