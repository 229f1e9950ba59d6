"""Internal: what a connection of a channel is joined with: a socket, or standard input and output.

Knows: descriptors, and how each kind ends and is reset. Does not know: the channel.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import socket
import stat
import struct
from collections.abc import Callable, Iterator

from ..system.loop import Poller
from ..system.uncopied import Uncopied
from .turns import EDGES

_RESET = struct.pack("ii", 1, 0)  # struct linger: close(2) sends RST and drops what is queued


def quick(sock: socket.socket) -> None:
    """Send small writes at once: Nagle's algorithm would hold them up to 40 ms."""
    if sock.family != socket.AF_UNIX:
        with contextlib.suppress(OSError):  # the other side has reset it already
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def reset(sock: socket.socket) -> None:
    """Close a socket so that the other side sees a reset.

    A Unix socket has none: its other side sees the end, and ECONNRESET if it had sent what was not
    read.
    """
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    sock.close()


class SocketPlug(Uncopied):
    """A connected socket, which it owns.

    Attributes:
        source, target: descriptors to read from and to write to.
        is_socket: a read that brings less than was asked for has emptied it; and it can have
            something to say after it takes no more.
        resets: it takes no more only after a reset. (A Unix socket can be closed in order, while
            what it sent is still to be read.)
        input, output: what `source` and `target` are called.
        lost: what is said if it was reset, or takes no more.
    """

    is_socket = True
    input = output = "the socket"
    lost = "the socket was reset"

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.source = self.target = sock.fileno()
        self.resets = sock.family != socket.AF_UNIX

    def watch(self, poller: Poller, act: Callable[[int], object]) -> None:
        """Call `act(events)` at each edge; when there is room again, after `watch_output` only.

        Each write that the other side takes would be an edge, and most are of no use.
        """
        poller.watch_events(self.source, act, EDGES)

    def watch_output(self, poller: Poller) -> None:
        """Call `act` also when there is room to write again."""
        poller.watch_for(self.source, EDGES | select.EPOLLOUT)

    def is_broken(self) -> bool:
        """Whether it was reset; the error of a read or a write before that can have told it."""
        return bool(_state(self.source) & select.POLLERR)

    def end(self, poller: Poller) -> None:
        """Tell the other side that nothing more comes.

        Raises:
            OSError: ENOTCONN: it is gone.
        """
        self._sock.shutdown(socket.SHUT_WR)

    def close(self, poller: Poller, *, failed: bool) -> None:
        """Close it, by a reset if it failed."""
        poller.unwatch(self.source)
        if failed:
            reset(self._sock)
        else:
            self._sock.close()


class StdioPlug(Uncopied):
    """Standard input and standard output, which need not be of one kind.

    Their descriptions can be shared with other processes, a terminal's for one, which a change of
    O_NONBLOCK would disturb. So pipes, terminals and devices are opened again by way of /proc. That
    does not work for sockets, whose flag is set until `close`.

    Raises:
        OSError: EBADF: one of the two is open in the wrong way.
    """

    is_socket = False  # a terminal gives one line at a time
    resets = True
    input, output = "standard input", "standard output"
    lost = "nobody reads standard output any more"

    def __init__(self, source: int = 0, target: int = 1) -> None:
        # To open a pipe again by way of /proc could give its other end.
        for fd, wrong, text in (
            (source, os.O_WRONLY, "standard input is open for writing only: redirect it by <"),
            (target, os.O_RDONLY, "standard output is open for reading only: redirect it by >"),
        ):
            if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == wrong:
                raise OSError(errno.EBADF, text)
        self._given = target
        with contextlib.ExitStack() as undo:
            self.source = undo.enter_context(_non_blocking(source, os.O_RDONLY))
            self.target = undo.enter_context(_non_blocking(target, os.O_WRONLY))
            self._undo = undo.pop_all()

    def watch(self, poller: Poller, act: Callable[[int], object]) -> None:
        """Call `act(events)` at each edge. A file has none, since it never blocks."""
        for fd, events in ((self.source, select.EPOLLIN), (self.target, select.EPOLLOUT)):
            with contextlib.suppress(PermissionError):
                poller.watch_events(fd, act, events | select.EPOLLRDHUP | select.EPOLLET)

    def watch_output(self, poller: Poller) -> None:
        """Do nothing: it is watched from the beginning."""

    def is_broken(self) -> bool:
        """Whether who uses it is gone: nobody reads its output, and nobody writes its input."""
        if not _state(self.target) & select.POLLERR:
            return False
        return bool(_state(self.source) & (select.POLLHUP | select.POLLERR))

    def end(self, poller: Poller) -> None:
        """Close standard output, so that its reader sees the end.

        Raises:
            OSError: ENOTCONN: it is a socket, and its other side is gone.
        """
        if stat.S_ISSOCK(os.fstat(self.target).st_mode):
            with socket.socket(fileno=os.dup(self.target)) as sock:
                sock.shutdown(socket.SHUT_WR)
            return
        poller.unwatch(self.target)
        null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        for fd in (self._given, self.target):
            os.dup2(null, fd, inheritable=False)
        os.close(null)

    def close(self, poller: Poller, *, failed: bool) -> None:
        """Give back what was opened."""
        for fd in (self.source, self.target):
            poller.unwatch(fd)
        self._undo.close()


def _state(fd: int) -> int:
    """What poll(2) says of a descriptor beside what it can read and write."""
    poll = select.poll()
    poll.register(fd, 0)
    return sum(events for _, events in poll.poll(0))


@contextlib.contextmanager
def _non_blocking(fd: int, flags: int) -> Iterator[int]:
    """A descriptor of the same file that does not block."""
    kind = os.fstat(fd).st_mode
    if stat.S_ISREG(kind):
        own = os.dup(fd)  # to open it again would begin at its start
    elif stat.S_ISSOCK(kind):
        own = -1
    else:
        try:
            own = os.open(f"/proc/self/fd/{fd}", flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError:  # no /proc, or a terminal of another user
            own = -1
    if own >= 0:
        try:
            yield own
        finally:
            os.close(own)
        return
    own = os.dup(fd)
    before = os.get_blocking(fd)
    os.set_blocking(own, False)
    try:
        yield own
    finally:
        os.set_blocking(own, before)
        os.close(own)
