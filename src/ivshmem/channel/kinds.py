"""Internal: the five kinds of channels, and which ends each of them has.

Knows: roles. Does not know: how a channel is made or found (channels.py); the protocol
(ivshmem_channel.h).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import ChannelError, ChannelTypeError, NoSuchChannel, RegionError
from ..system.time_limits import deadline_of
from ..text import plain
from . import records, streams, types
from .calls import Caller, CallServer
from .pickled import Pickled
from .queues import QueueReader
from .readers import Reader
from .streams import Stream, StreamListener
from .values import ValueReader
from .writers import Writer

if TYPE_CHECKING:
    import asyncio
    from typing import Literal, TypeAlias

    from . import transport
    from .membership import Membership

    Overflow: TypeAlias = Literal["overwrite", "block", "discard"]

_PREFERRED: tuple[Overflow, ...] = ("block", "discard", "overwrite")
_READER_LIMIT = 1 << 16  # bytes, as of asyncio
_CONNECT_PAUSE = 0.01  # seconds between two tries to connect


class Channel:
    """A channel that was found; made by the methods of Channels. It owns nothing.

    Attributes:
        name, kind, limit, slots, overflow, times: as in ChannelInfo.
        type: the type of messages as text; "": none.
    """

    kind = ""
    name = ""

    def __init__(self, channels: object, membership: Membership, facts: dict[str, Any]) -> None:
        self._channels = channels  # which ends keep from being collected
        self._membership = membership
        self._facts = facts
        self.name = str(facts["name"])
        self.limit: int = facts["limit"]
        self.slots: int = facts["slots"]
        self.overflow: tuple[str, ...] = facts["overflow"]
        self.times: bool = facts["times"]
        self.type = plain(facts["type"])
        self._type = types.parse(facts["type"])

    def _is_there(self) -> bool:
        """Whether nobody has removed it, nor made another one of its name since."""
        try:
            return bool(records.find(self._membership, self.name)["state"] == self._facts["state"])
        except NoSuchChannel:
            return False

    def _open(self, kind: Callable[..., Any], *args: Any) -> Any:
        return kind(self._channels, self._membership, self._facts, *args)

    def _type_for(self, pickle: bool) -> types.ArrayType | Pickled | None:
        if not pickle:
            return self._type
        if self._type is not None:
            raise ChannelTypeError(
                f"channel {self.name!r} has messages of {self._type}: they are not pickled"
            )
        return Pickled()

    def _check_writable(self) -> None:
        if self._membership.readonly:
            raise RegionError(
                f"channel {self.name!r}: the region is mapped for reading only, so that nothing can"
                " be taken"
            )

    def remove(self, *, force: bool = False) -> None:
        """Remove it, and free its memory.

        Args:
            force: also if processes use it. Whatever a process still stores into it may then reach
                another channel's memory: use it only if you know that none of them runs.

        Raises:
            ChannelError: it is in use.
            NoSuchChannel: it was removed before.
        """
        records.remove(self._membership, self._facts, force)

    def __repr__(self) -> str:
        return f"<ivshmem.channel.{type(self).__name__} {self.name!r}>"


class Messages(Channel):
    """Each reader gets every message of every writer."""

    kind = "messages"

    def writer(self, *, pickle: bool = False) -> Writer:
        """Open a writer.

        Args:
            pickle: `put` takes any object that pickle takes. The readers must say so, too: to
                unpickle executes what a message says, so do it only in a region that no other
                user can write to.

        Raises:
            ChannelError: all slots of writers are taken.
            RegionError: the region is mapped for reading only.
            ClosedError: the channels are closed, or this one was removed.
        """
        writer: Writer = self._open(Writer, self._type_for(pickle))
        return writer

    def reader(
        self, overflow: Overflow | None = None, *, history: int = 0, pickle: bool = False
    ) -> Reader:
        """Open a reader.

        Args:
            overflow: what happens when the channel is full of messages that this reader has yet to
                take, among those that the channel allows. "block": writers wait for it, at most for
                their time limit. "discard": it does not get the newest message, and its writer is
                told. "overwrite": it loses the oldest message, and is told how many. None: the
                first of these three that the channel allows.
            history: how many of the last messages of each writer it begins with, as far as they are
                there; at most slots - 1, and none with "discard".
            pickle: as of `writer`: messages are objects.

        If the memory is mapped for reading only, the reader overwrites, takes no slot, and polls.

        Raises:
            ChannelError: all slots of readers are taken, or the channel does not allow `overflow`.
            ClosedError: as of `writer`.
        """
        if overflow is None:
            # The memory may allow none: then the lines below say so.
            overflow = next((way for way in _PREFERRED if way in self.overflow), "overwrite")
        assert overflow is not None
        if overflow not in self._facts["overflow"] and not self._membership.readonly:
            raise ChannelTypeError(
                f"channel {self.name!r} allows its readers {', '.join(self._facts['overflow'])},"
                f" not {overflow!r}"
            )
        if history < 0:
            raise ValueError(f"history {history}: 0 or more messages")
        reader: Reader = self._open(
            Reader,
            self._type_for(pickle),
            records.OVERFLOW[overflow],
            min(history, self.slots),
        )
        return reader


class Value(Channel):
    """The latest content, never torn; it stays when its writer ends."""

    kind = "value"

    def writer(self, *, pickle: bool = False) -> Writer:
        """Open the writer, of which there is one: its `put` sets the value; as Messages.writer."""
        writer: Writer = self._open(Writer, self._type_for(pickle))
        return writer

    def reader(self, *, pickle: bool = False) -> ValueReader:
        """Open a reader; as Messages.reader."""
        reader: ValueReader = self._open(
            ValueReader, self._type_for(pickle), records.OVERFLOW["overwrite"], 0
        )
        return reader


class Queue(Channel):
    """Each message goes to one of the readers."""

    kind = "queue"

    def writer(self, *, pickle: bool = False) -> Writer:
        """Open a writer; as Messages.writer."""
        writer: Writer = self._open(Writer, self._type_for(pickle))
        return writer

    def reader(self, *, pickle: bool = False) -> QueueReader:
        """Open a reader; the errors are those of Messages.reader.

        Raises:
            RegionError: the region is mapped for reading only: nothing can be taken.
        """
        self._check_writable()
        reader: QueueReader = self._open(QueueReader, self._type_for(pickle))
        return reader


class Calls(Channel):
    """Requests and replies. A call is served once, or not at all."""

    kind = "calls"

    def caller(self, *, pickle: bool = False) -> Caller:
        """Open a caller; the errors are those of Messages.writer."""
        caller: Caller = self._open(Caller, self._type_for(pickle))
        return caller

    def server(self, *, pickle: bool = False) -> CallServer:
        """Open a server; the errors are those of Queue.reader."""
        self._check_writable()
        server: CallServer = self._open(CallServer, self._type_for(pickle))
        return server


class Bytes(Channel):
    """Connections, as of a stream socket.

    `slots` is how many bytes each direction of a connection holds.
    """

    kind = "bytes"

    @property
    def connections(self) -> int:
        """How many there can be at once."""
        most: int = self._facts["writers"]
        return most

    def listen(self) -> StreamListener:
        """Open a listener.

        Raises:
            ChannelError: all slots of listeners are taken.
            RegionError: the region is mapped for reading only.
            ClosedError: the channels are closed, or this one was removed.
        """
        listener: StreamListener = self._open(StreamListener)
        return listener

    def connect(self, *, wait_for_listener: bool = False, timeout: float | None = None) -> Stream:
        """Connect to a listener. What is sent waits until it accepts.

        Args:
            wait_for_listener: if no process listens, or all connections are in use, wait until
                that has changed.
            timeout: seconds to wait at most; None: for ever.

        Raises:
            ConnectionRefusedError: no process that is at work listens.
            ChannelError: all connections are in use.
            RegionError, ClosedError: as of `listen`.
        """
        deadline = deadline_of(timeout)
        while (stream := self._try_to_connect(wait_for_listener, deadline)) is None:
            time.sleep(_CONNECT_PAUSE)
        return stream

    async def connect_async(
        self, *, wait_for_listener: bool = False, timeout: float | None = None
    ) -> Stream:
        """The twin of `connect` for asyncio."""
        import asyncio  # here: a program that awaits has it, and others need none

        deadline = deadline_of(timeout)
        while (stream := self._try_to_connect(wait_for_listener, deadline)) is None:
            await asyncio.sleep(_CONNECT_PAUSE)
        return stream

    async def open_connection(
        self,
        *,
        wait_for_listener: bool = False,
        timeout: float | None = None,
        limit: int = _READER_LIMIT,
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect, as asyncio.open_connection; to close the writer closes the connection.

        Args:
            wait_for_listener, timeout: as of `connect`.
            limit: bytes that the reader keeps at most.

        Raises:
            As of `connect`. The reader and the writer raise ConnectionResetError if the other end's
            process is gone, and ClosedError if the channels are closed.
        """
        from . import transport  # here: it imports asyncio

        stream = await self.connect_async(wait_for_listener=wait_for_listener, timeout=timeout)
        return transport.streams_over(stream, limit)

    async def start_server(
        self,
        client_connected_cb: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any],
        *,
        limit: int = _READER_LIMIT,
    ) -> transport.StreamServer:
        """Listen, as asyncio.start_server.

        Args:
            client_connected_cb: takes a reader and a writer for each connection; a function, or a
                coroutine function, which then runs as a task.
            limit: bytes that each reader keeps at most.

        Returns:
            A StreamServer, which accepts until it is closed.

        Raises:
            As of `listen`.
        """
        from . import transport  # here: it imports asyncio

        return transport.StreamServer(self.listen(), client_connected_cb, limit)

    def _try_to_connect(self, may_wait: bool, deadline: float | None) -> Stream | None:
        try:
            stream: Stream = self._open(streams.connect)
        except (ConnectionRefusedError, ChannelError) as error:
            # All connections are in use; but another kind of ChannelError does not pass.
            may_pass = isinstance(error, ConnectionRefusedError) or type(error) is ChannelError
            is_late = deadline is not None and time.monotonic() >= deadline
            if not may_wait or not may_pass or is_late:
                raise
            return None
        return stream


KINDS: dict[str, type[Channel]] = {
    kind.kind: kind for kind in (Messages, Queue, Value, Calls, Bytes)
}
