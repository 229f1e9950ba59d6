# cython: language_level=3, binding=True, freethreading_compatible=True
# cython: embedsignature=True, embedsignature.format=clinic
"""Messages with descriptors over Unix sockets, in batches.

Knows: sendmmsg, recvmmsg, SCM_RIGHTS. Does not know: what a message means.

Invariants:
1. The memory of an outbox shows how many messages were sent, even if its process was killed: the
   kernel itself writes that there. See Outbox.
"""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

from .descriptors cimport BATCH, fail, fail_with, Fd, FdArray, length_of, place_of
from .syscalls cimport (
    c_close, CMSG_DATA, CMSG_FIRSTHDR, CMSG_LEN, CMSG_NXTHDR, cmsghdr, EAGAIN, EINTR, errno, iovec,
    ivshmem_control, mlock, mmsghdr, MSG_CMSG_CLOEXEC, MSG_CTRUNC, MSG_DONTWAIT, MSG_NOSIGNAL,
    recvmmsg, SCM_RIGHTS, sendmmsg, SOL_SOCKET,
)

from ..errors import ProtocolError

cdef enum:
    # Bytes in a message of protocol version 0.
    MESSAGE = 8

cdef extern from *:
    """
    /* If a store after this line is in the memory of a process that was killed, the stores before
       this line are there, too. The processor keeps that order by itself. The compiler does not. */
    #define ivshmem_in_order() __atomic_signal_fence(__ATOMIC_SEQ_CST)
    """
    void ivshmem_in_order() nogil


cdef struct Box:
    uint64_t end  # how far the owner's record goes
    uint64_t open  # the value of `end` when the current sending began; 0: nothing is being sent
    int64_t region, serial  # the peer that it is for; serial -1: one batch for many peers
    int64_t step  # how many batches before this one were sent, each completely
    int64_t filled[2]  # messages in a batch; the current batch has the index (step & 1)
    mmsghdr messages[2][BATCH]


OUTBOX_BYTES = sizeof(Box)


@cython.final
cdef class Outbox:
    """Sends messages in batches. Its memory shows which of them were sent.

    sendmmsg(2) writes into each message's header that it was sent, before it begins with the next
    one. A process that is killed in a system call dies when it leaves that call. Therefore, if the
    headers are in memory that outlives the process, and that memory says before the call what is
    about to be sent, a successor knows exactly which messages were sent. (Measured: 2,946 processes
    killed in the middle of a loop of such calls. None left a wrong count.)

    The owner keeps a record of what was sent, in the same memory. The first 8 bytes, `end`, say how
    far that record goes. A call of this class counts as unfinished until the owner adds to its
    record, which changes `end`. So one store says both: the record is longer, and the call is
    in it.

    Args:
        buffer: OUTBOX_BYTES of writable memory, held as long as the outbox exists; None: memory of
            its own.
    """

    cdef Box *box
    cdef bint borrowed  # by way of `view`
    cdef Py_buffer view
    cdef iovec iov[2][BATCH]
    cdef int64_t values[2][BATCH]
    cdef ivshmem_control controls[2][BATCH]

    def __cinit__(self, buffer=None):
        self.box = NULL
        self.borrowed = False
        if buffer is None:
            self.box = <Box *>calloc(1, sizeof(Box))
            if self.box == NULL:
                raise MemoryError
            self.box.end = 1
            return
        PyObject_GetBuffer(buffer, &self.view, PyBUF_SIMPLE | PyBUF_WRITABLE)
        if self.view.len < <Py_ssize_t>sizeof(Box) or <size_t>self.view.buf % sizeof(uint64_t):
            PyBuffer_Release(&self.view)
            raise ValueError(f"an outbox needs {sizeof(Box)} bytes, aligned")
        self.borrowed = True
        self.box = <Box *>self.view.buf
        # For a process that is being killed, the kernel does not fetch a page that is not in
        # memory: what it writes there would be lost.
        mlock(self.box, sizeof(Box))

    def __dealloc__(self):
        if self.borrowed:
            PyBuffer_Release(&self.view)
        else:
            free(self.box)

    def send(self, int sock, runs, int64_t region=0, int64_t serial=0):
        """Send messages in batches of sendmmsg, without blocking.

        Args:
            runs: a sequence of (value, fds, first, length, ..): `length` messages of `value`. If
                `fds` is an FdArray, they carry fds[first], fds[first + 1] and so on. If it is
                None, they carry nothing.
            region, serial: written into the memory; they say for which peer the messages are.

        Returns:
            How many messages were sent, in order, until the socket's buffer was full. Or until the
            kernel was short of memory or of descriptors in flight: then the next call raises that.

        Raises:
            OSError: the first message could not be sent, for another reason than a full buffer.
        """
        cdef Py_ssize_t total = 0
        cdef Py_ssize_t first, count, i
        cdef int filled = 0
        cdef int sent
        cdef int64_t step = 0
        cdef int64_t value
        cdef FdArray fds
        self.begin(region, serial)
        for run in runs:
            value, fds, first, count = run[0], run[1], run[2], run[3]
            self.check(fds, first, count)
            for i in range(first, first + count):
                self.put(step & 1, filled, value, fds, i)
                filled += 1
                if filled == BATCH:
                    sent = self.batch(sock, step, filled, total)
                    total += sent
                    if sent < filled:
                        return total
                    filled = 0
                    step += 1
        if filled:
            total += self.batch(sock, step, filled, total)
        return total

    def send_to_all(self, socks, Py_ssize_t first, runs, int64_t region=0):
        """Send the same batch to many sockets, until one of them takes less than all of it.

        Args:
            socks: descriptors of sockets. The first `first` of them got the batch before.
            runs: as for `send`. Only the first messages, at most 64, are sent.

        Returns:
            (done, sent, error, count): socks[:done] got all `count` messages. If these are not all
            sockets, socks[done] got `sent` messages, and `error` is its errno, or 0.
        """
        cdef Py_ssize_t total = len(socks)
        cdef Py_ssize_t start, length, i, done
        cdef int filled = 0
        cdef int sent = 0
        cdef int code = 0
        cdef int *fds_of = NULL
        cdef int64_t value
        cdef FdArray fds
        self.begin(region, -1)
        for run in runs:
            value, fds, start, length = run[0], run[1], run[2], run[3]
            self.check(fds, start, length)
            for i in range(start, min(start + length, start + BATCH - filled)):
                self.put(0, filled, value, fds, i)
                self.put(1, filled, value, fds, i)
                filled += 1
        fds_of = <int *>malloc((total + 1) * sizeof(int))
        if fds_of == NULL:
            raise MemoryError
        try:
            for i in range(total):
                fds_of[i] = socks[i]
            done = first
            with nogil:
                while done < total:
                    sent = self.batch_nogil(fds_of[done], done, filled, &code)
                    if sent < filled:
                        break
                    done += 1
        finally:
            free(fds_of)
        return done, sent if done < total else 0, code, filled

    def unfinished(self):
        """Return the sending whose end is not in the record, or None if there is none.

        (region, serial, step, sent, count): `step` batches were sent completely, and of the next
        one, which has `count` messages, the first `sent`. If it was `send_to_all`, `serial` is -1,
        and each batch was for one peer.
        """
        cdef int which = self.box.step & 1
        cdef int sent = 0
        # Copy it once: the memory is a journal's, which another process can have damaged.
        cdef int64_t filled = self.box.filled[which]
        if self.box.open == 0 or self.box.open != self.box.end:
            return None
        if not 0 <= filled <= BATCH:
            raise ValueError(f"a batch of {filled} messages: at most {BATCH} are possible")
        while sent < filled and self.box.messages[which][sent].msg_len == MESSAGE:
            sent += 1
        return self.box.region, self.box.serial, self.box.step, sent, filled

    cdef int check(self, FdArray fds, Py_ssize_t first, Py_ssize_t count) except -1:
        if fds is not None and (first < 0 or first + count > length_of(fds)):
            raise IndexError(f"descriptors {first}..{first + count - 1} of {length_of(fds)}")
        return 0

    cdef void begin(self, int64_t region, int64_t serial) noexcept:
        self.box.open = 0
        ivshmem_in_order()
        self.box.region = region
        self.box.serial = serial
        self.box.step = 0

    cdef void put(self, int which, int n, int64_t value, FdArray fds, Py_ssize_t i) noexcept:
        """Write message number `n` of a batch."""
        cdef mmsghdr *message = &self.box.messages[which][n]
        cdef cmsghdr *header
        self.values[which][n] = value
        self.iov[which][n].iov_base = &self.values[which][n]
        self.iov[which][n].iov_len = MESSAGE
        memset(message, 0, sizeof(mmsghdr))
        message.msg_hdr.msg_iov = &self.iov[which][n]
        message.msg_hdr.msg_iovlen = 1
        if fds is not None:
            memset(&self.controls[which][n], 0, sizeof(ivshmem_control))
            message.msg_hdr.msg_control = &self.controls[which][n]
            message.msg_hdr.msg_controllen = sizeof(ivshmem_control)
            header = CMSG_FIRSTHDR(&message.msg_hdr)
            header.cmsg_len = CMSG_LEN(sizeof(int))
            header.cmsg_level = SOL_SOCKET
            header.cmsg_type = SCM_RIGHTS
            memcpy(CMSG_DATA(header), place_of(fds, i), sizeof(int))

    cdef int batch(self, int sock, int64_t step, int count, Py_ssize_t before) except -1:
        cdef int code = 0
        cdef int sent = self.batch_nogil(sock, step, count, &code)
        if code and before == 0:
            return fail_with(code)
        return sent

    cdef int batch_nogil(self, int sock, int64_t step, int count, int *code) noexcept nogil:
        """Send a batch that `put` has written; return how many of its messages were sent.

        0, and `code` 0: the buffer is full. The kernel does not split 8 bytes that are written to a
        Unix stream socket.
        """
        cdef int which = step & 1
        cdef int i, n
        # These stores do no harm: `box.step` still selects the other batch, or `open` is 0.
        for i in range(count):
            self.box.messages[which][i].msg_len = 0
        self.box.filled[which] = count
        ivshmem_in_order()
        self.box.step = step
        ivshmem_in_order()
        self.box.open = self.box.end
        ivshmem_in_order()
        while True:
            n = sendmmsg(sock, self.box.messages[which], count, MSG_DONTWAIT | MSG_NOSIGNAL)
            if n >= 0:
                return n
            if errno == EAGAIN:
                return 0
            if errno != EINTR:
                code[0] = errno
                return 0


def receive(int sock, Py_ssize_t limit, list into=None):
    """Receive about `limit` messages at most from a socket, without blocking.

    Args:
        into: an empty list, to which this call adds the chunks. So the list's owner has them before
            a signal handler can raise.

    Returns:
        (chunks, eof): `chunks` is `into`, or a new list. Each chunk is (data, fds): at most 8
        bytes, and a tuple with an Fd for each descriptor that came with them. The kernel never
        reads past a byte that carried descriptors. Therefore the descriptors belong to the message
        that holds the chunk's last byte.

    Raises:
        ProtocolError: the kernel dropped a descriptor (MSG_CTRUNC). Nothing can repair that.
        OSError: as recvmsg(2), if nothing was received before. After any error all descriptors that
            this call received are closed.
    """
    cdef mmsghdr messages[BATCH]
    cdef iovec iov[BATCH]
    cdef char data[BATCH * MESSAGE]
    cdef ivshmem_control controls[BATCH]
    cdef int n, i, want
    cdef list chunks = [] if into is None else into
    cdef list received
    cdef bint lost = False
    cdef bint eof = False
    while len(chunks) < limit and not eof and not lost:
        memset(messages, 0, sizeof(messages))
        for i in range(BATCH):
            iov[i].iov_base = &data[i * MESSAGE]
            iov[i].iov_len = MESSAGE
            messages[i].msg_hdr.msg_iov = &iov[i]
            messages[i].msg_hdr.msg_iovlen = 1
            messages[i].msg_hdr.msg_control = &controls[i]
            messages[i].msg_hdr.msg_controllen = sizeof(ivshmem_control)
        want = <int>min(limit - len(chunks), <Py_ssize_t>BATCH)
        n = recvmmsg(sock, messages, want, MSG_DONTWAIT | MSG_CMSG_CLOEXEC, NULL)
        if n < 0:
            if errno == EINTR:
                continue
            if errno == EAGAIN or chunks:
                break
            fail()
        received = _descriptors(messages, n)
        for i in range(n):
            lost = lost or messages[i].msg_hdr.msg_flags & MSG_CTRUNC
            eof = eof or messages[i].msg_len == 0
            if messages[i].msg_len:
                chunks.append(
                    (
                        PyBytes_FromStringAndSize(&data[i * MESSAGE], messages[i].msg_len),
                        received[i],
                    )
                )
        if n < want:
            break
    if lost:
        for _, fds in chunks:
            for fd in fds:
                fd.close()
        chunks.clear()
        raise ProtocolError(
            "a descriptor from the server was lost: this process has too many open files"
            " (raise its limit, for instance with `ulimit -n`)"
        )
    return chunks, eof


cdef list _descriptors(mmsghdr *messages, int count):
    """Return a tuple of Fds for each message.

    Raises:
        MemoryError: then all these descriptors are closed.
    """
    cdef cmsghdr *header
    cdef int *place
    cdef int i
    cdef size_t j
    cdef bint out_of_memory = False
    cdef Fd fd
    cdef list fds
    cdef list found = []
    for i in range(count):
        fds = []
        header = CMSG_FIRSTHDR(&messages[i].msg_hdr)
        while header != NULL:
            if header.cmsg_level == SOL_SOCKET and header.cmsg_type == SCM_RIGHTS:
                for j in range((header.cmsg_len - CMSG_LEN(0)) // sizeof(int)):
                    place = <int *>(CMSG_DATA(header) + j * sizeof(int))
                    try:
                        fd = Fd()
                        fds.append(fd)
                        fd.number = place[0]
                    except MemoryError:
                        c_close(place[0])
                        out_of_memory = True
            header = CMSG_NXTHDR(&messages[i].msg_hdr, header)
        found.append(tuple(fds))
    if out_of_memory:
        raise MemoryError
    return found
