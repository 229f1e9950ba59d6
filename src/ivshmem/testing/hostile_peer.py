"""Internal: a peer that does what no honest one does.

Knows: the wire and the system calls. Does not know: this package's clients, whose checks it avoids.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import socket
import struct
from collections.abc import Iterable

from ..system.uncopied import Uncopied

_FULL = (1 << 64) - 2  # the highest count of an eventfd
_PUNCH_HOLE, _KEEP_SIZE = 2, 1  # fallocate(2)
_MOST_MESSAGE = 64  # bytes of the ancillary data that is taken with a message


class HostilePeer(Uncopied):
    """A peer of a server that can do everything that the protocol does not prevent.

    It connects with a bare socket and keeps the descriptors that every peer is given. Each method
    does one harm, and returns at once. A program that shares memory with untrusted peers is tested
    against them: after each of these it must still work, and must neither block nor crash.

    Call from one thread. A context manager.

    Args:
        path: of the server's socket.
        vectors: how many each peer has at this server; the set-up is read until all are there.
        timeout: seconds for the set-up. It has a default, as no other call has: a test of a
            broken server should fail, not hang.

    Attributes:
        id: the peer's own id.
        memory: the descriptor of the region's file; closed by `close`.
        size: bytes of the region.
        doorbells: for each id that was announced, the descriptors of its eventfds, its own too.

    Raises:
        OSError: as of connect(2); TimeoutError: the set-up was not complete in time.
    """

    id = -1  # until the server has said it

    def __init__(
        self, path: str | os.PathLike[str], vectors: int = 1, *, timeout: float = 10.0
    ) -> None:
        self.memory = -1
        self.size = 0
        self.doorbells: dict[int, list[int]] = {}
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.settimeout(timeout)
            self._socket.connect(os.fspath(path))
            self._receive()  # the version
            self.id, _ = self._receive()
            _, fds = self._receive()
            self.memory = fds[0]
            self.size = os.fstat(self.memory).st_size
            while len(self.doorbells.get(self.id, ())) < vectors:
                self._take()
        except BaseException as error:
            there = len(self.doorbells.get(self.id, ()))
            self.close()
            if isinstance(error, TimeoutError) and self.id >= 0:
                raise TimeoutError(
                    f"the server gave {there} of {vectors} vectors in {timeout:g} seconds: ask for"
                    " as many as its peers have"
                ) from None
            raise

    def _receive(self) -> tuple[int, list[int]]:
        data, fds = b"", []
        while len(data) < 8:
            more, some, _, _ = socket.recv_fds(self._socket, 8 - len(data), _MOST_MESSAGE // 4)
            if not more:
                raise ConnectionError("the server ended the connection")
            data += more
            fds += some
        (value,) = struct.unpack("<q", data)
        return value, fds

    def _take(self) -> None:
        peer, fds = self._receive()
        if fds:
            self.doorbells.setdefault(peer, []).extend(fds)
        else:
            for fd in self.doorbells.pop(peer, []):
                os.close(fd)

    def take_messages(self) -> int:
        """Take what the server has sent: who joined, who left. A peer that never does is stalled.

        Returns:
            How many messages there were.

        Raises:
            ConnectionError: the server ended the connection.
        """
        self._socket.setblocking(False)
        count = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                self._take()
                count += 1
        return count

    # -- against the doorbells --------------------------------------------------------------------

    def _fds(self, peers: Iterable[int] | None) -> list[int]:
        chosen = self.doorbells if peers is None else peers
        return [fd for peer in chosen for fd in self.doorbells.get(peer, ())]

    def ring(self, peers: Iterable[int] | None = None, times: int = 1) -> None:
        """Ring all vectors of these peers (None: of all, itself included) so many times."""
        for fd in self._fds(peers):
            for _ in range(times):
                _set_nonblocking(fd, True)
                with contextlib.suppress(BlockingIOError):  # the counter is full
                    os.eventfd_write(fd, 1)

    def fill_counters(self, peers: Iterable[int] | None = None) -> None:
        """Fill the eventfds of these peers (None: of all), so that another write has to wait."""
        for fd in self._fds(peers):
            _set_nonblocking(fd, True)
            with contextlib.suppress(BlockingIOError):  # there was something in it
                os.eventfd_write(fd, _FULL)

    def steal_rings(self, peers: Iterable[int] | None = None) -> int:
        """Read the eventfds of these peers (None: of all); returns how many rings they lose."""
        stolen = 0
        for fd in self._fds(peers):
            _set_nonblocking(fd, True)
            with contextlib.suppress(BlockingIOError):
                stolen += os.eventfd_read(fd)
        return stolen

    def clear_nonblock(self, peers: Iterable[int] | None = None) -> None:
        """Clear O_NONBLOCK of the eventfds of these peers (None: of all), which all share."""
        for fd in self._fds(peers):
            _set_nonblocking(fd, False)

    # -- against the memory -----------------------------------------------------------------------

    def scribble(self, data: bytes = b"\xff", offset: int = 0, length: int | None = None) -> None:
        """Repeat `data` over `length` bytes of the memory (None: to its end)."""
        length = self.size - offset if length is None else length
        with mmap.mmap(self.memory, self.size) as memory:
            whole, rest = divmod(length, len(data))
            memory[offset : offset + length] = data * whole + data[:rest]

    def punch_hole(self, offset: int = 0, length: int | None = None) -> bool:
        """Give these bytes back to the kernel (None: to the end), so that they read as zero.

        Returns:
            Whether the file allows it.
        """
        length = self.size - offset if length is None else length
        call = ctypes.CDLL(None, use_errno=True).fallocate
        call.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
        done: int = call(self.memory, _PUNCH_HOLE | _KEEP_SIZE, offset, length)
        return done == 0

    def truncate(self, size: int = 0) -> bool:
        """Try to change the size of the memory's file, which makes accesses to it fail by SIGBUS.

        Returns:
            Whether that worked. It never does with memory that is sealed, as anonymous regions are.
        """
        try:
            os.ftruncate(self.memory, size)
        except OSError:
            return False
        return True

    # -- against the server -----------------------------------------------------------------------

    def send_rubbish(self, most: int = 1 << 20) -> int:
        """Send bytes and descriptors, which no client of the protocol does, until it would block.

        Returns:
            How many bytes the server's side took.
        """
        self._socket.setblocking(False)
        sent = 0
        with contextlib.suppress(OSError):  # full, or the server has disconnected this peer
            while sent < most:
                sent += socket.send_fds(self._socket, [b"rubbish" * 1000], [self.memory] * 10)
        return sent

    def close(self) -> None:
        """Leave. May be called twice."""
        self._socket.close()
        fds = self._fds(None)
        self.doorbells.clear()
        if self.memory >= 0:
            fds.append(self.memory)
        self.memory = -1
        for fd in fds:
            os.close(fd)

    def __enter__(self) -> HostilePeer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<ivshmem.testing.HostilePeer, id {self.id}>"


def _set_nonblocking(fd: int, nonblocking: bool) -> None:
    """Set or clear O_NONBLOCK, which whoever has this eventfd shares."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    flags = flags | os.O_NONBLOCK if nonblocking else flags & ~os.O_NONBLOCK
    fcntl.fcntl(fd, fcntl.F_SETFL, flags)


def leave_during_set_up(
    path: str | os.PathLike[str], messages: int = 2, *, timeout: float = 10.0
) -> None:
    """Connect to a server, take so many messages of the set-up, and leave.

    Args:
        messages: 0: leave at once; 2: the server has given out an id; more: memory and vectors too.
        timeout: seconds for each message.

    Raises:
        OSError: as of connect(2); TimeoutError: the server sent fewer messages.
    """
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(timeout)
        sock.connect(os.fspath(path))
        for _ in range(messages):
            try:
                data, fds, _, _ = socket.recv_fds(sock, 8, _MOST_MESSAGE // 4)
            except ConnectionError:
                return
            for fd in fds:
                os.close(fd)
            if not data:
                return
