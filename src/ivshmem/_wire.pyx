# cython: language_level=3, binding=True, freethreading_compatible=True
# cython: embedsignature=True, embedsignature.format=clinic
"""Messages with descriptors over Unix sockets, in batches.

Knows: sendmmsg, recvmmsg, SCM_RIGHTS. Does not know: what a message means.
"""

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport int64_t
from libc.string cimport memcpy, memset

from ._fds cimport BATCH, fail, FdArray
from ._libc cimport (
    c_close, CMSG_DATA, CMSG_FIRSTHDR, CMSG_LEN, CMSG_NXTHDR, cmsghdr, EAGAIN, EINTR, errno, iovec,
    ivshmem_control, mmsghdr, MSG_CMSG_CLOEXEC, MSG_CTRUNC, MSG_DONTWAIT, MSG_NOSIGNAL, recvmmsg,
    SCM_RIGHTS, sendmmsg, SOL_SOCKET,
)

from .errors import ProtocolError

cdef enum:
    # Bytes in a message of protocol version 0.
    MESSAGE = 8


def send_runs(int sock, runs):
    """Send messages without blocking, in batches of sendmmsg.

    Args:
        runs: a sequence of (value, fds, first, length, ..): `length` messages of `value`; where
            `fds` is an FdArray they carry fds[first], fds[first + 1] and so on, where it is None
            nothing.

    Returns:
        How many messages went out, in order, before the socket's buffer was full (or the kernel
        refused for want of memory or of descriptors in flight: the next call says so).

    Raises:
        OSError: the first message could not be sent, for another reason than a full buffer.
    """
    cdef mmsghdr messages[BATCH]
    cdef iovec iov[BATCH]
    cdef int64_t values[BATCH]
    cdef ivshmem_control controls[BATCH]
    cdef Py_ssize_t total = 0
    cdef Py_ssize_t first, count, i
    cdef int filled = 0
    cdef int sent
    cdef int64_t value
    cdef FdArray fds
    for run in runs:
        value, fds, first, count = run[0], run[1], run[2], run[3]
        if fds is not None and (first < 0 or first + count > fds.count):
            raise IndexError(f"descriptors {first}..{first + count - 1} of {fds.count}")
        for i in range(first, first + count):
            values[filled] = value
            iov[filled].iov_base = &values[filled]
            iov[filled].iov_len = MESSAGE
            memset(&messages[filled], 0, sizeof(messages[filled]))
            messages[filled].msg_hdr.msg_iov = &iov[filled]
            messages[filled].msg_hdr.msg_iovlen = 1
            if fds is not None:
                _attach(&messages[filled], &controls[filled], fds.fds[i])
            filled += 1
            if filled == BATCH:
                sent = _sendmmsg(sock, messages, filled, total)
                total += sent
                if sent < filled:
                    return total
                filled = 0
    if filled:
        total += _sendmmsg(sock, messages, filled, total)
    return total


cdef void _attach(mmsghdr *message, ivshmem_control *control, int fd) noexcept:
    cdef cmsghdr *header
    memset(control, 0, sizeof(ivshmem_control))
    message.msg_hdr.msg_control = control
    message.msg_hdr.msg_controllen = sizeof(ivshmem_control)
    header = CMSG_FIRSTHDR(&message.msg_hdr)
    header.cmsg_len = CMSG_LEN(sizeof(int))
    header.cmsg_level = SOL_SOCKET
    header.cmsg_type = SCM_RIGHTS
    memcpy(CMSG_DATA(header), &fd, sizeof(int))


cdef int _sendmmsg(int sock, mmsghdr *messages, int count, Py_ssize_t before) except -1:
    """How many of `count` went out. An 8-byte write to a Unix stream socket is never split."""
    cdef int n
    while True:
        n = sendmmsg(sock, messages, count, MSG_DONTWAIT | MSG_NOSIGNAL)
        if n >= 0:
            return n
        if errno == EINTR:
            continue
        if errno == EAGAIN or before > 0:
            return 0
        return fail()


def receive(int sock, Py_ssize_t limit):
    """Take up to about `limit` messages off a socket without blocking.

    Returns:
        (chunks, eof): chunks is a list of (data, fds): at most 8 bytes and the descriptors that
        came with them, which now belong to the caller. The kernel never reads past a byte that
        carried descriptors, so they belong to the message that holds the chunk's last byte.

    Raises:
        ProtocolError: a descriptor was lost on the way (MSG_CTRUNC), which cannot be mended.
        OSError: as of recvmsg(2), when nothing was received before. On any error all descriptors
            of this call are closed.
    """
    cdef mmsghdr messages[BATCH]
    cdef iovec iov[BATCH]
    cdef char data[BATCH * MESSAGE]
    cdef ivshmem_control controls[BATCH]
    cdef int n, i, want
    cdef list chunks = []
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
        for i in range(n):
            fds = _descriptors(&messages[i])
            lost = lost or messages[i].msg_hdr.msg_flags & MSG_CTRUNC
            eof = eof or messages[i].msg_len == 0
            if messages[i].msg_len:
                chunks.append(
                    (PyBytes_FromStringAndSize(&data[i * MESSAGE], messages[i].msg_len), fds)
                )
        if n < want:
            break
    if lost:
        for _, fds in chunks:
            for fd in fds:
                c_close(fd)
        raise ProtocolError(
            "a descriptor from the server was lost: this process has too many open files"
            " (raise its limit, for instance with `ulimit -n`)"
        )
    return chunks, eof


cdef tuple _descriptors(mmsghdr *message):
    cdef cmsghdr *header = CMSG_FIRSTHDR(&message.msg_hdr)
    cdef int fd
    cdef size_t i
    cdef list fds = []
    while header != NULL:
        if header.cmsg_level == SOL_SOCKET and header.cmsg_type == SCM_RIGHTS:
            for i in range((header.cmsg_len - CMSG_LEN(0)) // sizeof(int)):
                memcpy(&fd, CMSG_DATA(header) + i * sizeof(int), sizeof(int))
                fds.append(fd)
        header = CMSG_NXTHDR(&message.msg_hdr, header)
    return tuple(fds)
