"""Internal: one connection: what comes from its socket goes into the ring, and the other way round.

Knows: half-close, resets, back pressure. Does not know: how the connection was made, whose turn it
is.

Each direction moves until one side would wait: then only that side is waited for. So a slow reader
fills its ring, then its writer's socket, and holds up nobody else.

How each end is passed on:

    the socket sends no more                the stream is shut down for sending
    the stream sends no more                the socket is shut down for sending
    the socket takes no more, or is reset   what it still has is sent; then the stream is aborted
    the stream was aborted, or its process  what came is written; then the socket is reset
    is gone or silent
"""

from __future__ import annotations

import select
import socket
from collections.abc import Callable

from ..channel.stream_poll import HAS_ENDED, MAY_RECEIVE, MAY_SEND
from ..channel.streams import BROKEN, DESCRIPTOR_WAITS, RING_WAITS, Stream
from ..errors import IvshmemError, reason_of
from ..system import late_logging
from ..system.uncopied import Uncopied
from .plugs import SocketPlug, StdioPlug
from .turns import Turns

_log = late_logging.log_of("ivshmem.forward")

_SHARE = 1 << 18  # bytes that a turn moves in each direction
_HUNG = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR


class SocketRelay(Uncopied):
    """A Stream joined with a socket, or with standard input and output. It owns both.

    Args:
        piece: bytes that one system call moves at most.
        name: of the connection, for the log.
        on_end: called with the relay when both are closed.

    Attributes:
        failed: after the end: why the connection was reset; "": it ended in order.
    """

    def __init__(
        self,
        turns: Turns,
        stream: Stream,
        plug: SocketPlug | StdioPlug,
        *,
        piece: int,
        name: str,
        on_end: Callable[[SocketRelay], object],
    ) -> None:
        self.name = name
        self.failed = ""
        self.over = False
        self.moved = [0, 0]  # bytes into the ring, and out of it
        self._turns = turns
        self._stream = stream
        self._plug = plug
        self._piece = piece
        self._on_end = on_end
        self._inward = self._outward = True  # the directions that have not ended
        self._readable = self._writable = True  # until it turns out that it is not
        # Whether a read that brings less than was asked for is followed by another one: the socket
        # said that its end comes, or it is none.
        self._hung = not plug.is_socket
        self._refuses = False  # the socket takes no more
        self._sleeper = turns.poll.add(stream, self)
        try:
            plug.watch(turns.poller, self._noted)
        except BaseException:
            self.reset("it cannot be watched")
            raise
        turns.due(self)

    def _noted(self, events: int) -> None:
        if events & (select.EPOLLIN | _HUNG):
            self._readable = True
        if events & (select.EPOLLOUT | select.EPOLLHUP | select.EPOLLERR):
            self._writable = True
        if events & _HUNG:
            self._hung = True
        self._turns.due(self)

    def awaken(self, directions: int) -> None:
        """Note what the ring can do."""
        if directions & HAS_ENDED and self._inward:
            self._inward = False  # what the socket still sends reaches nobody

    def turn(self) -> bool:
        """Move a fair share; whether there is more to move."""
        if self.over:
            return False
        try:
            more = (self._inward and self._readable and self._fill()) | (
                self._outward and self._writable and self._drain()
            )
            if self.over:
                return False
            if not self._inward and not self._outward:
                self._finish()
                return False
            if more:
                return True
            found = self._sleeper.sleep(self._awaited())
            if found:
                self.awaken(found)
            return found != 0
        except (OSError, IvshmemError) as error:
            self.reset(reason_of(error) if isinstance(error, OSError) else str(error))
            return False

    def _awaited(self) -> int:
        wanted = 0
        if self._inward:
            wanted |= HAS_ENDED | (MAY_SEND if self._readable else 0)
        if self._outward and self._writable:
            wanted |= MAY_RECEIVE
        return wanted

    def _fill(self) -> bool:
        """Move from the socket into the ring."""
        left = _SHARE
        while left > 0:
            try:
                moved, partly = self._stream._fill(self._plug.source, self._piece)
            except ConnectionResetError:
                self.reset("the socket was reset")
                return False
            if moved > 0:
                self.moved[0] += moved
                left -= moved
                if partly and not self._hung:
                    self._readable = False
                    return False
            elif moved == 0:
                self._inward = False
                if self._refuses:
                    self.reset("the socket was closed, and takes no more")
                else:
                    self._stream.shutdown(socket.SHUT_WR)
                return False
            elif moved == DESCRIPTOR_WAITS:
                self._readable = False
                return False
            elif moved == RING_WAITS:
                return False
            else:
                assert moved == BROKEN
                self._inward = False
                return False
        return True

    def _drain(self) -> bool:
        """Move from the ring to the socket."""
        left = _SHARE
        while left > 0:
            try:
                moved, partly = self._stream._drain(self._plug.target, self._piece)
            except (BrokenPipeError, ConnectionResetError):
                self._outward = False
                self._refuses = True
                if self._inward and self._plug.is_socket:
                    self._stream.shutdown(socket.SHUT_RD)
                    self._readable = True  # it has something to say, an end at least
                    self._turns.due(self)
                else:
                    self.reset("the socket takes no more")
                return False
            if moved > 0:
                self.moved[1] += moved
                left -= moved
                if partly:
                    self._writable = False
                    return False
            elif moved == 0:
                self._outward = False
                self._plug.end(self._turns.poller)
                return False
            elif moved == DESCRIPTOR_WAITS:
                self._writable = False
                return False
            elif moved == RING_WAITS:
                return False
            else:
                assert moved == BROKEN
                self.reset("the other side reset it, or is gone")
                return False
        return True

    # -- the end ----------------------------------------------------------------------------------

    def silence(self) -> float:
        """Return for how many seconds the other side has shown no sign of life."""
        return 0.0 if self.over else self._stream._silence()

    def _finish(self) -> None:
        if self._refuses:
            self.reset("the socket takes no more")
        else:
            self._close(failed=False)

    def reset(self, reason: str) -> None:
        """End it at both sides by a reset."""
        if not self.over:
            self.failed = reason
            self._close(failed=True)

    def _close(self, *, failed: bool) -> None:
        self.over = True
        self._sleeper.close()
        self._plug.close(self._turns.poller, failed=failed)
        if failed:
            self._stream.abort()
        else:
            self._stream.close()
        self._on_end(self)
