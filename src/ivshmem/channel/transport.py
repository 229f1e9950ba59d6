"""Internal: connections of a channel of bytes as asyncio's transports, readers and writers.

Knows: what asyncio demands of a transport. Does not know: how a connection works (streams.pyx).

Invariant: a protocol hears connection_lost once, and nothing after that.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
from collections.abc import Callable
from typing import Any

from ..errors import ClosedError, IvshmemError
from ..system.uncopied import Uncopied
from .roles import flat
from .streams import Stream, StreamListener

_AT_ONCE = 1 << 16  # bytes
_HIGH = 1 << 16  # bytes that wait to be sent, from which on a protocol is told to pause
_AFTER_AN_ERROR = 0.1  # seconds until a listener is asked again
_STREAK = 16  # parts that a task moves without a pause; then other tasks have their turn


class StreamTransport(Uncopied, asyncio.Transport):
    """A connection, for a protocol. It owns the Stream, which is get_extra_info("stream")."""

    def __init__(self, stream: Stream, protocol: asyncio.BaseProtocol) -> None:
        super().__init__({"stream": stream, "peername": stream.name})
        self._loop = asyncio.get_running_loop()
        self._stream = stream
        self._protocol: Any = protocol
        self._buffer = bytearray()  # what waits to be sent
        self._low, self._high = _HIGH // 4, _HIGH
        self._protocol_pauses = False
        self._may_read = asyncio.Event()
        self._may_read.set()
        self._ends = False  # write_eof was called
        self._closing = False
        self._over = False
        self._sends = False  # the task that sends what waits has yet to end
        self._writing: asyncio.Task[None] | None = None
        self._reading: asyncio.Task[None] | None = None
        try:
            protocol.connection_made(self)
        except Exception as error:
            self._report(error, "a protocol failed with a new connection")
            self._end(error)
        if not self._closing:
            self._reading = self._loop.create_task(self._read())
            self._reading.add_done_callback(self._no_more)

    def get_protocol(self) -> asyncio.BaseProtocol:
        """Return the protocol."""
        protocol: asyncio.BaseProtocol = self._protocol
        return protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Set the protocol."""
        self._protocol = protocol

    # -- receiving --------------------------------------------------------------------------------

    def is_reading(self) -> bool:
        """Whether the protocol gets what comes."""
        return self._may_read.is_set() and not self._closing

    def pause_reading(self) -> None:
        """Give the protocol nothing until `resume_reading`."""
        self._may_read.clear()

    def resume_reading(self) -> None:
        """Give the protocol what comes."""
        self._may_read.set()

    async def _read(self) -> None:
        try:
            for part in itertools.count(1):
                await self._may_read.wait()
                data = await self._stream.recv_async(_AT_ONCE)
                await self._may_read.wait()
                if not data:
                    break
                self._protocol.data_received(data)
                if self._closing:
                    return
                if part % _STREAK == 0:
                    await asyncio.sleep(0)
            if not self._protocol.eof_received():
                self.close()
        except (OSError, IvshmemError) as error:
            self._end(error)
        except Exception as error:
            self._report(error, "a protocol failed with what it received")
            self._end(error)

    def _no_more(self, task: asyncio.Task[None]) -> None:
        # Not in the task itself, which a loop that ends can cancel before it began.
        if task.cancelled():
            if task is self._writing or not self._closing:
                self._end(None)
        elif task.exception() is not None:  # KeyboardInterrupt or SystemExit
            self._end(None)

    # -- sending ----------------------------------------------------------------------------------

    def write(self, data: Any) -> None:
        """Send; what finds no room now is sent later, in order."""
        if self._ends:
            raise RuntimeError("write() after write_eof()")
        if self._closing:
            return
        view = flat(data)
        if not self._buffer:
            try:
                while view:
                    view = view[self._stream._send_now(view) :]
            except BlockingIOError:
                pass
            except (OSError, IvshmemError) as error:
                self._end(error)
                return
        if not view:
            return
        self._buffer += view
        if not self._sends:
            self._sends = True  # a task that begins eagerly can end in the next line
            self._writing = self._loop.create_task(self._write())
            self._writing.add_done_callback(self._no_more)
        self._pause_protocol()

    def _pause_protocol(self) -> None:
        if len(self._buffer) > self._high and not self._protocol_pauses:
            self._protocol_pauses = True
            self._protocol.pause_writing()

    async def _write(self) -> None:
        try:
            for number in itertools.count(1):
                if not self._buffer:
                    break
                if number % _STREAK == 0:
                    await asyncio.sleep(0)
                part = bytes(self._buffer[:_AT_ONCE])
                await self._stream.sendall_async(part)
                del self._buffer[: len(part)]
                if self._protocol_pauses and len(self._buffer) <= self._low:
                    self._protocol_pauses = False
                    self._protocol.resume_writing()
        except (OSError, IvshmemError) as error:
            self._end(error)
            return
        self._sends = False
        self._after_the_last()

    def _after_the_last(self) -> None:
        """Do what waited until everything was sent."""
        if self._closing:
            self._end(None)
        elif self._ends:
            with contextlib.suppress(OSError, IvshmemError):  # a reader hears of it
                self._stream.shutdown(socket.SHUT_WR)

    def can_write_eof(self) -> bool:
        """Whether one direction can be ended alone: yes."""
        return True

    def write_eof(self) -> None:
        """End this direction after what was written."""
        if self._ends or self._closing:
            return
        self._ends = True
        if not self._sends:
            self._after_the_last()

    def get_write_buffer_size(self) -> int:
        """Return how many bytes wait to be sent."""
        return len(self._buffer)

    def get_write_buffer_limits(self) -> tuple[int, int]:
        """Return from how many bytes on the protocol continues, and pauses."""
        return self._low, self._high

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Set them, as of asyncio's transports."""
        if high is None:
            high = _HIGH if low is None else 4 * low
        if low is None:
            low = high // 4
        if not high >= low >= 0:
            raise ValueError(f"high {high}, low {low}: high >= low >= 0 is needed")
        self._low, self._high = low, high
        self._pause_protocol()

    # -- the end ----------------------------------------------------------------------------------

    def is_closing(self) -> bool:
        """Whether `close` or `abort` was called, or the connection failed."""
        return self._closing

    def close(self) -> None:
        """Receive no more, and close the connection after everything was sent."""
        if self._closing:
            return
        self._closing = True
        if not self._sends:
            self._end(None)
        else:
            self._cancel(self._reading)

    def abort(self) -> None:
        """Close the connection now; what waits to be sent is lost."""
        self._end(None)

    def _end(self, error: Exception | None) -> None:
        if self._over:
            return
        self._over = self._closing = True
        self._buffer.clear()
        self._cancel(self._reading)
        self._cancel(self._writing)
        self._stream.close()
        self._loop.call_soon(self._tell_the_end, error)

    def _cancel(self, task: asyncio.Task[None] | None) -> None:
        if task is not None and task is not asyncio.current_task(self._loop):
            task.cancel()

    def _tell_the_end(self, error: Exception | None) -> None:
        self._protocol.connection_lost(error)

    def _report(self, error: BaseException, what: str) -> None:
        self._loop.call_exception_handler(
            {
                "message": f"connection of {self._stream.name!r}: {what}",
                "exception": error,
                "transport": self,
                "protocol": self._protocol,
            }
        )

    def __repr__(self) -> str:
        return f"<ivshmem.channel.{type(self).__name__} of {getattr(self, '_stream', None)!r}>"


def streams_over(stream: Stream, limit: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Return asyncio's reader and writer of a connection."""
    loop = asyncio.get_running_loop()
    reader, protocol = _reader_of(loop, limit)
    transport = StreamTransport(stream, protocol)
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


def _reader_of(
    loop: asyncio.AbstractEventLoop, limit: int, connected: Callable[[Any, Any], Any] | None = None
) -> tuple[asyncio.StreamReader, asyncio.StreamReaderProtocol]:
    reader = asyncio.StreamReader(limit=limit, loop=loop)
    return reader, asyncio.StreamReaderProtocol(reader, connected, loop=loop)


class StreamServer(Uncopied, asyncio.AbstractServer):
    """Accepts connections, each for a call of a function; made by Bytes.start_server.

    As asyncio.Server: a context manager whose end closes it. Connections that it has accepted
    continue after that.
    """

    def __init__(
        self, listener: StreamListener, connected: Callable[[Any, Any], Any], limit: int
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._listener = listener
        self._connected = connected
        self._limit = limit
        self._accepting = self._loop.create_task(self._accept())
        self._accepting.add_done_callback(lambda _: listener.close())

    async def _accept(self) -> None:
        while True:
            try:
                stream = await self._listener.accept_async()
            except ClosedError:
                return
            except (OSError, IvshmemError) as error:
                self._loop.call_exception_handler(
                    {"message": f"listener of {self._listener.name!r}", "exception": error}
                )
                await asyncio.sleep(_AFTER_AN_ERROR)
                continue
            assert stream is not None
            _, protocol = _reader_of(self._loop, self._limit, self._connected)
            StreamTransport(stream, protocol)
            await asyncio.sleep(0)  # callers that come quickly leave other tasks their turn

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """Return the loop in which it accepts."""
        return self._loop

    def is_serving(self) -> bool:
        """Whether it accepts connections."""
        return not self._accepting.done()

    async def start_serving(self) -> None:
        """Do nothing: it accepts connections from the beginning."""

    async def serve_forever(self) -> None:
        """Wait until it is closed; a cancellation closes it."""
        try:
            await asyncio.shield(self._accepting)
        except asyncio.CancelledError:
            if not self._accepting.cancelled():
                self.close()
            raise

    def close(self) -> None:
        """Accept no more; may be called twice."""
        self._accepting.cancel()
        self._listener.close()

    async def wait_closed(self) -> None:
        """Wait until it accepts no more."""
        await asyncio.wait([self._accepting])

    async def __aenter__(self) -> StreamServer:
        return self

    async def __aexit__(self, *error: object) -> None:
        self.close()
        await self.wait_closed()

    def __repr__(self) -> str:
        return f"<ivshmem.channel.{type(self).__name__} of {getattr(self, '_listener', None)!r}>"
