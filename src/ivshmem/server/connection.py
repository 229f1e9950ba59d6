"""One peer's connection, and what the kernel says of it.

Knows: the socket of a peer, its buffers, its eventfds. Does not know: what is sent over it, when.
"""

from __future__ import annotations

import contextlib
import fcntl
import select
import socket
from collections.abc import Collection

from ..native import descriptors
from ..protocol.roster import Member
from ..system.uncopied import Uncopied
from .report import Peer

# The kernel's least. A default buffer holds 278 messages, and each has a descriptor in flight: of
# these an unprivileged server can have RLIMIT_NOFILE, over all of its user's sockets. Four peers
# that do not read would stop it from sending anything to anybody.
SMALLEST_BUFFER = 4608
_SIOCOUTQ = 0x5411  # sockios.h; of a Unix socket: the memory that unread messages take
_CAP_SYS_ADMIN, _CAP_SYS_RESOURCE = 21, 24  # capabilities(7): either lifts that limit


class Connection(Uncopied):
    """One peer's socket, and what it has been sent.

    Attributes:
        socket, fd: of the connection.
        member: the peer in the roster.
        peer: what is said of it.
        readonly: whether it was given memory that it can only read.
        events: watched for beside EPOLLHUP: EPOLLOUT while its buffer is full.
        taken: when it last took something (seconds since the epoch), if its buffer is full; else 0.
        announced: whether it was told that its set-up is complete.
    """

    __slots__ = ("announced", "events", "fd", "member", "peer", "readonly", "socket", "taken")

    def __init__(self, sock: socket.socket, member: Member, peer: Peer, readonly: bool) -> None:
        self.socket = sock
        self.fd = sock.fileno()
        self.member = member
        self.peer = peer
        self.readonly = readonly
        self.events = 0
        self.taken = 0.0
        self.announced = False

    @property
    def vectors(self) -> descriptors.FdArray:
        """Its eventfds."""
        vectors = self.member.vectors
        assert isinstance(vectors, descriptors.FdArray)
        return vectors

    @property
    def vector_fds(self) -> list[int]:
        """The numbers of its eventfds."""
        return list(self.vectors)

    @property
    def stalled(self) -> bool:
        """Whether its buffer is full: it does not read. When it does, an event will say so."""
        return bool(self.events & descriptors.EPOLLOUT)

    @property
    def unread(self) -> bool:
        """Whether it has not read yet all that it was sent."""
        return any(fcntl.ioctl(self.socket, _SIOCOUTQ, bytes(4)))

    def announce_set_up(self) -> None:
        """Tell the peer that its set-up is complete.

        Protocol version 0 has no message for that. Shutting down this side's receiving says it to a
        client that asks, and changes nothing for one that does not.
        """
        self.announced = True
        with contextlib.suppress(OSError):  # ENOTCONN: it is gone, and the next event says so
            self.socket.shutdown(socket.SHUT_RD)

    def use_small_buffer(self) -> None:
        """Limit the messages in flight to a few; see SMALLEST_BUFFER."""
        with contextlib.suppress(OSError):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALLEST_BUFFER)

    def close(self) -> None:
        """Close this process's descriptors."""
        self.socket.close()
        self.vectors.close()


def rung(connections: Collection[Connection]) -> frozenset[int]:
    """The eventfds that are not zero. To read the count of each would take ten times as long."""
    poll = select.poll()
    for connection in connections:
        for fd in connection.vector_fds:
            poll.register(fd, select.POLLIN)
    return frozenset(fd for fd, _ in poll.poll(0))


def has_left(sock: socket.socket) -> bool:
    """Whether a client disconnected while it was still in the listen backlog.

    After a flood thousands can be there. Such a client gets no id and no eventfds, and no peer
    hears of it. POLLHUP: both directions are closed.
    """
    poll = select.poll()
    poll.register(sock, 0)
    return bool(poll.poll(0))


def disconnect(sock: socket.socket) -> None:
    """Hang up on a peer, also where other processes have copies of the socket."""
    with contextlib.suppress(OSError):  # ENOTCONN: the peer did the same
        sock.shutdown(socket.SHUT_RDWR)


def is_privileged() -> bool:
    """Whether RLIMIT_NOFILE limits the descriptors that this process has in flight."""
    try:
        with open("/proc/self/status") as status:
            for line in status:
                if line.startswith("CapEff:"):
                    capabilities = int(line.split()[1], 16)
                    wanted = 1 << _CAP_SYS_ADMIN | 1 << _CAP_SYS_RESOURCE
                    return bool(capabilities & wanted)
    except OSError:
        pass
    return False
