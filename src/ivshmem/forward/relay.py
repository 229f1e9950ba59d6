"""Internal: one connection: what comes from its socket goes into the ring, and the other way round.

Knows: half-close and resets. Does not know: how bytes move (channel/pumps.pyx); how the connection
was made.

A slow reader fills its ring, then its writer's socket, and holds up nobody else.

How each end is passed on:

    the socket sends no more                the stream is shut down for sending
    the stream sends no more                the socket is shut down for sending
    the socket takes no more, or is reset   what it still has is sent; then the stream is aborted
    the stream was aborted, or its process  what came is written; then the socket is reset
    is gone

After a reset nobody waits for long: what has not moved after RESET_LIMIT is dropped. So a target
that is stopped keeps no connection whose client is gone. An end in order has no limit.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from functools import partial

from ..channel import Bytes
from ..channel.pumps import (
    HAS_MORE,
    HUNG_UP,
    RESET_WAITS,
    SOURCE_ENDED,
    STREAM_ENDED,
    STREAM_RESET,
    TARGET_BLOCKS,
    Pump,
)
from ..channel.streams import Stream
from ..errors import IvshmemError, reason_of
from ..system.uncopied import Uncopied
from .plugs import SocketPlug, StdioPlug
from .turns import Turns

_SHARE = 1 << 18  # bytes that a turn moves in each direction
RESET_LIMIT = 1.0  # seconds that each side gives to what was sent before a reset
_GONE = "the other side reset it, or is gone"


class SocketRelay(Uncopied):
    """A Stream joined with a socket, or with standard input and output. It owns both.

    Args:
        piece: bytes that one system call moves at most.
        channel: of the stream.
        name: of the connection, for the log.
        on_end: called with the relay when both are closed.

    Attributes:
        failed: after the end: why the connection was reset; "": it ended in order.
    """

    def __init__(
        self,
        turns: Turns,
        channel: Bytes,
        stream: Stream,
        plug: SocketPlug | StdioPlug,
        *,
        piece: int,
        name: str,
        on_end: Callable[[SocketRelay], object],
    ) -> None:
        self.name = name
        self.channel = channel
        self.failed = ""
        self.over = False
        self._turns = turns
        self._stream = stream
        self._plug = plug
        self._on_end = on_end
        self._refuses = False  # the socket takes no more
        self._is_leaving = False  # a reset is passed on within the limit
        self._pump = Pump(
            turns.poll,
            stream,
            plug.source,
            plug.target,
            share=_SHARE,
            piece=piece,
            short_is_empty=plug.is_socket,
            told=self._told,
        )
        try:
            plug.watch(turns.poller, self._pump.noted)
        except BaseException:
            self.reset("it cannot be watched")
            raise
        turns.due(self)

    @property
    def moved(self) -> tuple[int, int]:
        """Bytes into the channel, and out of it."""
        return self._pump.into, self._pump.out

    def turn(self) -> bool:
        """Move a fair share; what is left gets a turn by `_told`."""
        self._pump.turn()
        return False

    def awaken(self, directions: int) -> None:
        """Do nothing: in the poll stands the pump."""

    def _told(self, result: int, error: Exception | None) -> None:
        """Do what follows from a turn that did not end in sleep."""
        try:
            if error is not None:
                self._fail(error)
            elif result != HAS_MORE:
                self._act(result)
        except OSError as failed:  # of the socket: it is gone by now
            self.reset(reason_of(failed))
        except IvshmemError as failed:
            self.reset(str(failed))
        if self.over:
            return
        if self._pump.inward or self._pump.outward:
            self._turns.due(self)
        elif self._refuses:
            self.reset(self._plug.lost)
        else:
            self._close(failed=False)

    def _act(self, result: int) -> None:
        if result == SOURCE_ENDED:
            self._pump.inward = False
            if self._refuses:
                self.reset("the socket was closed")
            else:
                self._stream.shutdown(socket.SHUT_WR)
        elif result == STREAM_ENDED:
            self._pump.outward = False
            self._plug.end(self._turns.poller)
        elif result == STREAM_RESET:
            self.reset(_GONE)
        elif result == RESET_WAITS:
            self._reset_soon(_GONE)
        elif result == TARGET_BLOCKS:
            self._plug.watch_output(self._turns.poller)
        else:
            assert result == HUNG_UP
            if self._plug.is_broken():
                self._reset_soon(self._plug.lost)

    def _fail(self, error: Exception) -> None:
        is_gone = isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.ECONNRESET)
        if not is_gone:
            if isinstance(error, OSError):
                which = self._plug.input if self._pump.failed else self._plug.output
                self.reset(f"{which}: {reason_of(error)}")
                return
            raise error
        if self._pump.failed:
            self.reset(f"{self._plug.input} was reset")
        elif self._pump.inward and self._plug.is_socket:
            # It has something to say yet, an end at least.
            self._pump.outward = False
            self._refuses = True
            self._stream.shutdown(socket.SHUT_RD)
            self._pump.readable = True
            if self._plug.resets:
                self._reset_soon(self._plug.lost)
        else:
            self.reset(self._plug.lost)

    # -- the end ----------------------------------------------------------------------------------

    def silence(self) -> float:
        """Return for how many seconds the other side has shown no sign of life."""
        return 0.0 if self.over else self._stream._silence()

    def _reset_soon(self, reason: str) -> None:
        """End it by a reset when all that was sent before it has moved, or in RESET_LIMIT."""
        if not self._is_leaving:
            self._is_leaving = True
            self._turns.after(RESET_LIMIT, partial(self.reset, reason))

    def reset(self, reason: str) -> None:
        """End it at both sides by a reset."""
        if not self.over:
            self.failed = reason
            self._close(failed=True)

    def _close(self, *, failed: bool) -> None:
        self.over = True
        self._pump.close()
        self._plug.close(self._turns.poller, failed=failed)
        if failed:
            self._stream.abort()
        else:
            self._stream.close()
        self._on_end(self)
