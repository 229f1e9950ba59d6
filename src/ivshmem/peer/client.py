"""A host process as a peer: connects to a server and is then an endpoint.

Knows: setting up, and following who joins and leaves. Does not know: how a server works.

Invariants:
1. Every descriptor received is owned by the region, a doorbell, a vector or an Fd, or is closed.
2. After set-up nothing that the server does or sends raises: it is a ServerLost event.
3. News that nobody asks for takes memory for at most two events per peer.
4. The handler of a signal may raise between any two bytecodes, as Ctrl-C does: the next look at the
   news continues where that one was, and no message is lost or counted twice.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections.abc import Iterable

from ..errors import NoSuchPeer, NoSuchVector, ProtocolError, ServerGone
from ..memory.region import Region
from ..native import wire
from ..native.descriptors import Fd
from ..protocol.framing import Framer, Message
from ..protocol.session import GotLeave, GotMemory, GotVector, Session, SessionState
from ..system import sockets
from ..text import counted
from .endpoint import Endpoint, Event, PeerJoined, PeerLeft, ServerLost

# How long a server must be silent after the memory before an only client takes its set-up to be
# complete, where the server does not say so. The example server sends a set-up in one go.
SETTLE = 0.1

# Messages taken from the socket at once, and how often in a row: a server that floods its clients
# does not keep a call from returning in time.
_BATCH, _BATCHES = 512, 4
_FIRST_LOOK, _LAST_LOOK = 0.0002, 0.01  # seconds between looks for the end of set-up


def connect(
    path: str | os.PathLike[str],
    *,
    timeout: float | None = None,
    vectors: int | None = None,
    readonly: bool = False,
    wait_for_server: bool = False,
) -> Client:
    """Connect to the server at `path` and wait until set-up is complete.

    Args:
        timeout: seconds for all of it; None: as long as it takes.
        vectors: how many vectors the server gives each peer, if that is known: they are waited for.
            It is only needed with a server that is not this package's, for its first client, to be
            quite sure: there the end of set-up follows from a tenth of a second of silence.
            (Vectors that come later count all the same.)
        readonly: map the memory for reading only.
        wait_for_server: if the server is not there yet (no directory, no socket, or a socket that
            a dead server left), wait until it is; so it does not matter which is started first. A
            server that refuses this process, or ends during set-up, is an error as ever. So is a
            socket or a directory whose permissions shut this process out for a second.

    Raises:
        TimeoutError: no server came in time, or set-up was not complete in time.
        ServerGone: the server ended the connection during set-up.
        ProtocolError: what it sent is not protocol version 0.
        RegionError: its memory cannot be mapped.
        OSError: nobody listens there, no permission, out of descriptors. Whatever was opened is
            closed.
    """
    deadline = sockets.deadline_of(timeout)
    if wait_for_server:
        sock = sockets.connect_when_served(path, timeout)
    else:
        sock = sockets.connect(path, timeout)
    try:
        return Client._join(sock, os.fsdecode(path), deadline, vectors, readonly)
    except BaseException:
        sock.close()
        raise


class Client(Endpoint):
    """A host process connected to a server; made by `connect`.

    When the server ends, memory and doorbells go on working, `connected` is False, and `events`
    says ServerLost once.
    """

    # What __repr__ finds before set-up has come to it.
    id = -1
    path = "?"

    def __init__(self, *_: object, **__: object) -> None:
        raise TypeError("a Client is made by ivshmem.connect(path)")

    @classmethod
    def _join(
        cls,
        sock: socket.socket,
        path: str,
        deadline: float | None,
        vectors: int | None,
        readonly: bool,
    ) -> Client:
        """Make a client of a connected socket, which it owns if this succeeds."""
        self = cls.__new__(cls)
        self._begin(sock, path, deadline, vectors, readonly)
        return self

    def _begin(
        self,
        sock: socket.socket,
        path: str,
        deadline: float | None,
        vectors: int | None,
        readonly: bool,
    ) -> None:
        self.path = path
        self._socket = sock
        self._readonly = readonly
        self._guess = vectors is None
        self._pid = os.getpid()
        self._session = Session(vectors)
        self._chunks: list[wire._Chunk] = []  # of the socket, and not taken in yet
        # What the first of them made of the framer, and the messages that it ended.
        self._framed: tuple[wire._Chunk | None, Framer, list[Message]] = (None, Framer(), [])
        self._unread: tuple[Message | None, bool] = (None, False)  # of a leave: was the join read?
        self._losing: str | None = None  # why the connection is over, while `_lose` is at it
        self._lock = threading.RLock()  # one thread at a time reads the socket
        self._reading = False
        self._queue: dict[tuple[type[Event], int], Event] = {}  # in the order of happening
        try:
            sock.setblocking(False)
            self._set_up(deadline)
        except BaseException:
            self.close()
            raise

    # -- what a client knows ----------------------------------------------------------------------

    @property
    def peers(self) -> list[int]:
        """Ids of the other peers, as of now, in ascending order."""
        if not self.closed:
            self._news()
        return self._session.peers

    def vectors_of(self, peer: int) -> int:
        """How many vectors of a peer can be rung; 0 if it is not connected."""
        return self._bells(peer) or 0

    def news(self) -> list[Event]:
        """What `events` would say now, without interrupts: who joined, who left, a server lost."""
        if not self.closed:
            self._news()
        return list(iter(self._next_news, None))

    @property
    def connected(self) -> bool:
        """Whether the server still tells of peers."""
        return self._socket.fileno() >= 0

    # -- set-up -----------------------------------------------------------------------------------

    def _set_up(self, deadline: float | None) -> None:
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        pause = _FIRST_LOOK
        quiet_since = time.monotonic()
        while True:
            told_all = self._told_all()  # asked first: what was sent before is then in the socket
            empty = False
            with contextlib.suppress(ConnectionError):  # connected is False then
                anything, empty = self._receive()
                if anything:
                    quiet_since = time.monotonic()
                    pause = _FIRST_LOOK
            state = self._session.state
            if state is SessionState.SETUP and self.connected:
                if told_all and empty:
                    self._session.end_setup()
                elif self._guess and time.monotonic() - quiet_since > SETTLE:
                    self._session.end_setup(guessed=True)
            if self._session.state is SessionState.READY:
                break
            if not self.connected:
                raise ServerGone(
                    f"{self.path}: the server ended the connection before it had sent the"
                    f" {_MISSING[state]}: is this an ivshmem server? (it may have refused you)"
                )
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError(
                    f"{self.path}: set-up was not complete in time (still waiting for the"
                    f" {_MISSING[state]}): is this an ivshmem server, and does it run?"
                )
            # A first look finds nothing more often than not: the server has still to accept.
            limit = pause if state is SessionState.SETUP else SETTLE
            if deadline is not None:
                limit = min(limit, max(deadline - time.monotonic(), 0))
            poll.poll(max(limit * 1000, 0.001))
            pause = min(pause * 2, _LAST_LOOK)
        self.id = self._session.id
        self._ring_self(self.id)
        if self.connected:
            self._watch(self._socket.fileno())

    def _told_all(self) -> bool:
        """Whether the server has shut down its receiving side, by which ours ends a set-up.

        Protocol version 0 has no message for that. To a client of version 0 it makes no difference,
        since it never sends; one that knows sees EPIPE when it sends nothing at all, see unix(7).
        """
        try:
            self._socket.send(b"", socket.MSG_NOSIGNAL)
        except BrokenPipeError:
            return True
        except OSError:
            pass
        return False

    # -- following the server ---------------------------------------------------------------------

    def _news(self) -> None:
        """Take in what the server has sent; its failures become a ServerLost event."""
        with self._lock:
            if self._reading:
                return  # a signal handler that interrupted the reader
            try:
                self._reading = True  # in the block, before which a handler could raise
                self._take_news()
            finally:
                self._reading = False

    def _take_news(self) -> None:
        try:
            if self._losing is not None:
                self._lose(self._losing)
            if self.connected:
                self._receive()
        except ConnectionError:
            pass  # lost already
        except (ProtocolError, OSError) as error:
            self._lose(str(error))

    def _receive(self) -> tuple[bool, bool]:
        """Take in what is in the socket, or a good deal of it.

        Returns:
            Whether there was anything, and whether nothing is left.

        Raises:
            ProtocolError, OSError: the connection is of no further use.
        """
        anything = False
        self._take_in()  # what a signal interrupted
        for _ in range(_BATCHES):
            try:
                _, eof = wire.receive(self._socket.fileno(), _BATCH, self._chunks)
            except ConnectionError as error:
                self._lose(f"the connection to the server broke: {error.strerror}")
                raise
            count = len(self._chunks)
            anything = anything or count > 0
            self._take_in()
            if eof:
                cut = " in the middle of a message" if self._framed[1].partial else ""
                self._lose(f"the server ended the connection{cut}")
            if eof or count < _BATCH:
                return anything, True
        return anything, False

    def _take_in(self) -> None:
        """Hand chunks through framing and session to where their descriptors belong.

        Each step is one store, or does no harm if it is done again.
        """
        chunks = self._chunks
        while chunks:
            chunk = chunks[0]
            if self._framed[0] is not chunk:
                framer, messages = self._framed[1].after(*chunk)
                self._framed = (chunk, framer, list(messages))
            for message in self._framed[2]:  # one at most, since a chunk is not longer
                self._session.again(message)
                self._apply(message, self._session.receive(message))
            chunks.pop(0)

    def _apply(self, message: Message, event: GotMemory | GotVector | GotLeave | None) -> None:
        if isinstance(event, GotMemory):
            self.region = Region.from_fd(event.fd, readonly=self._readonly)
        elif isinstance(event, GotVector):
            if event.peer == self._session.id:
                if not event.fd.taken:
                    self._add_vector(event.fd)
                return
            try:
                if not event.fd.taken:
                    self._add_bell(event.peer, event.fd)
            except Exception:
                self._session.refuse(event.peer)
                raise
            if event.whole and self._session.state is SessionState.READY:
                self._tell(PeerJoined, event.peer, PeerJoined(event.peer))
        elif isinstance(event, GotLeave):
            self._drop_peer(event.peer)
            if self._unread[0] is not message:
                self._unread = (message, (PeerJoined, event.peer) in self._queue)
            if self._unread[1]:
                self._queue.pop((PeerJoined, event.peer), None)
                if not self._queue:
                    self._set_queued(False)
            # Who left during set-up was never there for who asks for events.
            elif event.whole and self._session.state is SessionState.READY:
                self._tell(PeerLeft, event.peer, PeerLeft(event.peer))

    def _tell(self, kind: type[Event], peer: int, event: Event) -> None:
        self._queue[kind, peer] = event
        self._set_queued(True)

    def _lose(self, reason: str) -> None:
        """The connection is over; what it brought stays."""
        self._losing = reason  # so that an interrupted end is completed, and told once
        self._tell(ServerLost, -1, ServerLost(reason))
        self._unwatch()
        self._hang_up()
        self._losing = None

    def _hang_up(self) -> None:
        if os.getpid() == self._pid:
            # Children that were forked for something else keep copies of the socket.
            with contextlib.suppress(OSError):  # closed, or the server did the same
                self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for _, fds in self._chunks:
            _close_all(fds)
        _close_all(self._framed[1].held)
        self._chunks.clear()
        self._framed = (None, Framer(), [])

    def _next_news(self) -> Event | None:
        if (self._chunks or self._losing is not None) and not self.closed:
            self._news()  # a look was interrupted, which may have queued the event already
        # Without the lock: a signal handler may be here, in the middle of _news. Each operation on
        # the dictionary is whole by itself.
        while self._queue:
            with contextlib.suppress(RuntimeError, StopIteration, KeyError):
                event = self._queue.pop(next(iter(self._queue)))
                if not self._queue:
                    self._set_queued(False)
                    if self._queue:  # something came in just then
                        self._set_queued(True)
                return event
        return None

    def _missing(self, peer: int, vector: int) -> None:
        """Somebody unknown is rung: perhaps the news of it are still in the socket."""
        self._news()
        bells = self._bells(peer)
        if bells is None:
            others = ", ".join(map(str, self._session.peers)) or "nobody"
            raise NoSuchPeer(f"peer {peer} is not connected (connected: {others})")
        if not 0 <= vector < bells:
            raise NoSuchVector(f"vector {vector}: peer {peer} has {counted(bells, 'vector')}")

    # -- the end ----------------------------------------------------------------------------------

    def close(self) -> None:
        """Leave: the server tells the others. May be called twice.

        Raises:
            BufferError: a view of the memory is alive: that stays mapped until it is gone, and
                another close() unmaps it. All else is closed.
        """
        if not vars(self):  # __init__ never ran
            super().close()
            return
        # While another thread reads the socket, its number must not become another file's. In a
        # forked child there is no such thread, which would give the lock back.
        with self._lock if os.getpid() == self._pid else contextlib.nullcontext():
            self._unwatch()
            self._hang_up()
        super().close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"id {self.id}, {counted(self.vectors, 'vector')}"
        return f"<ivshmem.Client at {self.path}, {state}>"


_MISSING = {
    SessionState.VERSION: "protocol version",
    SessionState.ID: "id",
    SessionState.MEMORY: "memory",
    SessionState.SETUP: "vectors",
}


def _close_all(fds: Iterable[Fd]) -> None:
    for fd in fds:
        fd.close()
