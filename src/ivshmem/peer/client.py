"""A host process as a peer: it connects to a server, and is an endpoint from then on.

Knows: the set-up, and which peers join and leave. Does not know: how a server works.

Invariants:
1. Every descriptor received is owned by the region, a doorbell, a vector or an Fd, or is closed.
2. After the set-up nothing that the server does or sends raises: it becomes a Disconnected event.
3. Events that the program does not ask for take memory for at most two events per peer.
4. A signal handler may raise between any two bytecodes, as the one for Ctrl-C does. The next look
   at the socket continues where the interrupted one was: no message is lost or counted twice.
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
from ..system.time_limits import deadline_of, left_until
from ..text import counted
from . import connecting
from .endpoint import Disconnected, Endpoint, Event, PeerJoined, PeerLeft

# Seconds. If the server does not say where a set-up ends, an only client takes its own to be
# complete when the server was silent for so long after it sent the memory. The example server
# sends a set-up in one piece.
SETTLE = 0.1

# Messages taken from the socket at once, and how often in a row: a server that floods its clients
# cannot keep a call from returning in time.
_BATCH, _BATCHES = 512, 4
_FIRST_LOOK, _LAST_LOOK = 0.0002, 0.01  # seconds between two looks for the end of the set-up


def connect(
    path: str | os.PathLike[str],
    *,
    timeout: float | None = None,
    vectors: int | None = None,
    readonly: bool = False,
    wait_for_server: bool = False,
) -> Client:
    """Connect to the server at `path`, and wait until the set-up is complete.

    Args:
        timeout: seconds for all of it; None: wait for ever. 0 or less: find out whether a server
            listens, and raise TimeoutError if one does, because its set-up takes a moment.
        vectors: how many vectors the server gives each peer, if the program knows it; the set-up is
            then complete when all have come. It is needed only to be sure with a server that is not
            this package's, for its first client: there a tenth of a second of silence ends the
            set-up. (Vectors that come later are added.)
        readonly: map the memory for reading only.
        wait_for_server: if the server is not there yet (no directory, no socket, or a socket that
            a dead server left), wait until it is, so that either may be started first. A server
            that refuses this process, or that ends during the set-up, is an error as without it. So
            is a socket or a directory whose permissions shut this process out for a second.

    Returns:
        The client; close it, or use it in a `with` statement.

    Raises:
        TimeoutError: no server came in time, or the set-up was not complete in time.
        ServerGone: the server ended the connection during the set-up.
        ProtocolError: what the server sent is not protocol version 0.
        RegionError: the server's memory cannot be mapped.
        OSError: nobody listens there, no permission, out of descriptors.
            Whatever is raised, everything that was opened is closed.
    """
    deadline = deadline_of(timeout)
    if wait_for_server:
        sock = connecting.connect_when_served(path, timeout)
    else:
        sock = connecting.connect(path, timeout)
    try:
        return Client._join(sock, os.fsdecode(path), deadline, vectors, readonly)
    except BaseException:
        sock.close()
        raise


class Client(Endpoint):
    """A host process that is a peer of a server; made by `connect`.

    When the server ends, the memory and the doorbells continue to work, `connected` is False, and
    `events` yields Disconnected once.

    A program that never calls `events`, `next_event`, `peer_events`, `peers` or a wait for any
    vector takes nothing from the server: the server then lists it as stalled.

    Attributes:
        id: this peer's own id, 0..65535.
        path: of the server's socket.
        region: the shared memory.
    """

    # What __repr__ finds before the set-up sets them.
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
        self._guess_end = vectors is None
        self._pid = os.getpid()
        self._session = Session(vectors)
        self._chunks: list[wire._Chunk] = []  # read from the socket, and not taken in yet
        # What the framer became by the first of them, and the messages that this chunk ended.
        self._framed: tuple[wire._Chunk | None, Framer, list[Message]] = (None, Framer(), [])
        # The last leave message, and whether the program had not taken the peer's join yet.
        self._unread_join: tuple[Message | None, bool] = (None, False)
        self._lost_reason: str | None = None  # why the connection is over, while `_disconnect` runs
        self._lock = threading.RLock()  # one thread at a time reads the socket
        self._reading = False
        self._queue: dict[tuple[type[Event], int], Event] = {}  # events, in order
        try:
            sock.setblocking(False)
            self._set_up(deadline)
        except BaseException:
            self.close()
            raise

    # -- what a client knows ----------------------------------------------------------------------

    @property
    def peers(self) -> list[int]:
        """The ids of the other peers, as of now, ascending. Reads the socket; never waits."""
        if not self.closed:
            self._read_news()
        return self._session.peers

    def vectors_of(self, peer: int) -> int:
        """Return how many vectors of a peer can be rung; 0 if it is not connected."""
        return self._bells(peer) or 0

    def peer_events(self) -> list[Event]:
        """Return the events that are there now: peers that joined or left, or Disconnected.

        Never waits. Interrupts are not included. `events` does not yield these events again.
        """
        if not self.closed:
            self._read_news()
        return super().peer_events()

    @property
    def connected(self) -> bool:
        """Whether the connection to the server is open, so that it can tell of joins and leaves."""
        return self._socket.fileno() >= 0

    # -- set-up -----------------------------------------------------------------------------------

    def _set_up(self, deadline: float | None) -> None:
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        pause = _FIRST_LOOK
        quiet_since = time.monotonic()
        if deadline is not None and quiet_since >= deadline:
            # Whether a quick server was in time would be luck, so no limit of 0 ever succeeds.
            raise self._too_late()
        while True:
            # Asked first: what the server sent before is in the socket then.
            told_all = connecting.server_sent_all(self._socket)
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
                elif self._guess_end and time.monotonic() - quiet_since > SETTLE:
                    self._session.end_setup(guessed=True)
            if self._session.state is SessionState.READY:
                break
            if not self.connected:
                raise ServerGone(
                    f"{self.path}: the server ended the connection before it had sent the"
                    f" {_MISSING[state]}: is this an ivshmem server? (it may have refused you)"
                )
            if deadline is not None and time.monotonic() >= deadline:
                raise self._too_late()
            # The first look usually finds nothing: the server has not accepted yet.
            limit = pause if state is SessionState.SETUP else SETTLE
            if deadline is not None:
                limit = min(limit, left_until(deadline))
            poll.poll(max(limit * 1000, 0.001))
            pause = min(pause * 2, _LAST_LOOK)
        self.id = self._session.id
        self._ring_self(self.id)
        if self.connected:
            self._watch_news(self._socket.fileno())

    def _too_late(self) -> TimeoutError:
        return TimeoutError(
            f"{self.path}: set-up was not complete in time (still waiting for the"
            f" {_MISSING[self._session.state]}): {_suspicion(self.path)}"
        )

    # -- following the server ---------------------------------------------------------------------

    def _read_news(self) -> None:
        """Take in what the server has sent; if that fails, a Disconnected event tells why."""
        with self._lock:
            if self._reading:
                return  # this is a signal handler that interrupted the reader
            try:
                self._reading = True  # inside the block: a handler may raise before it
                self._receive_messages()
            finally:
                self._reading = False

    def _receive_messages(self) -> None:
        try:
            if self._lost_reason is not None:
                self._disconnect(self._lost_reason)
            if self.connected:
                self._receive()
        except ConnectionError:
            pass  # disconnected already
        except (ProtocolError, OSError) as error:
            self._disconnect(str(error))

    def _receive(self) -> tuple[bool, bool]:
        """Take in what is in the socket, 2048 messages at most.

        Returns:
            Whether there was anything, and whether nothing is left.

        Raises:
            ProtocolError, OSError: the connection cannot be used any more.
        """
        anything = False
        self._take_in()  # chunks whose taking in a signal interrupted
        for _ in range(_BATCHES):
            try:
                _, eof = wire.receive(self._socket.fileno(), _BATCH, self._chunks)
            except ConnectionError as error:
                self._disconnect(f"the connection to the server broke: {error.strerror}")
                raise
            count = len(self._chunks)
            anything = anything or count > 0
            self._take_in()
            if eof:
                cut = " in the middle of a message" if self._framed[1].partial else ""
                self._disconnect(f"the server ended the connection{cut}")
            if eof or count < _BATCH:
                return anything, True
        return anything, False

    def _take_in(self) -> None:
        """Pass chunks through framing and session, and their descriptors to their owners.

        Each step is one store, or can be repeated: a signal handler may raise in between.
        """
        chunks = self._chunks
        while chunks:
            chunk = chunks[0]
            if self._framed[0] is not chunk:
                framer, messages = self._framed[1].after(*chunk)
                self._framed = (chunk, framer, list(messages))
            for message in self._framed[2]:  # at most one: a chunk is not longer
                self._session.before_receive(message)
                self._apply(message, self._session.receive(message))
            chunks.pop(0)

    def _apply(self, message: Message, event: GotMemory | GotVector | GotLeave | None) -> None:
        if isinstance(event, GotMemory):
            self.region = Region._from_received(event.fd, readonly=self._readonly)
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
                self._queue_event(PeerJoined, event.peer, PeerJoined(event.peer))
        elif isinstance(event, GotLeave):
            self._drop_peer(event.peer)
            if self._unread_join[0] is not message:
                self._unread_join = (message, (PeerJoined, event.peer) in self._queue)
            if self._unread_join[1]:
                self._queue.pop((PeerJoined, event.peer), None)
                if not self._queue:
                    self._set_queued(False)
            # A peer that left during the set-up was never announced to the program.
            elif event.whole and self._session.state is SessionState.READY:
                self._queue_event(PeerLeft, event.peer, PeerLeft(event.peer))

    def _queue_event(self, kind: type[Event], peer: int, event: Event) -> None:
        self._queue[kind, peer] = event
        self._set_queued(True)

    def _disconnect(self, reason: str) -> None:
        """End the connection; the memory and the doorbells stay."""
        self._lost_reason = reason  # so that an interrupted call is completed, and tells it once
        self._queue_event(Disconnected, -1, Disconnected(reason))
        self._unwatch_news()
        self._hang_up()
        self._lost_reason = None

    def _hang_up(self) -> None:
        if os.getpid() == self._pid:
            # Forked children may keep copies of the socket, so closing it alone ends nothing.
            with contextlib.suppress(OSError):  # closed, or the server did the same
                self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for _, fds in self._chunks:
            _close_all(fds)
        _close_all(self._framed[1].held)
        self._chunks.clear()
        self._framed = (None, Framer(), [])

    def _next_peer_event(self) -> Event | None:
        if (self._chunks or self._lost_reason is not None) and not self.closed:
            self._read_news()  # a signal interrupted it, perhaps after it had queued the event
        # Without the lock: this may be a signal handler that interrupted _read_news. Each operation
        # on the dictionary is whole by itself.
        while self._queue:
            with contextlib.suppress(RuntimeError, StopIteration, KeyError):
                event = self._queue.pop(next(iter(self._queue)))
                if not self._queue:
                    self._set_queued(False)
                    if self._queue:  # another thread queued an event in between
                        self._set_queued(True)
                return event
        return None

    def _look_for(self, peer: int, vector: int) -> None:
        """A peer that is not known is rung: its announcement may still be in the socket."""
        self._read_news()
        bells = self._bells(peer)
        if bells is None:
            others = ", ".join(map(str, self._session.peers)) or "nobody"
            raise NoSuchPeer(f"peer {peer} is not connected (connected: {others})")
        if not 0 <= vector < bells:
            raise NoSuchVector(f"vector {vector}: peer {peer} has {counted(bells, 'vector')}")

    # -- the end ----------------------------------------------------------------------------------

    def close(self) -> None:
        """Disconnect; the server tells the other peers. May be called twice, and by any thread.

        Raises:
            BufferError: a view of the memory is alive. The memory stays mapped until the view is
                released and close() is called again. Everything else is closed.
        """
        if not vars(self):  # `_begin` never ran
            super().close()
            return
        # While another thread reads the socket, its number must not become another file's. A forked
        # child has no such thread, and the lock that it copied might never be released.
        with self._lock if os.getpid() == self._pid else contextlib.nullcontext():
            self._unwatch_news()
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


def _suspicion(path: str) -> str:
    """Return what may be wrong with a server that does not speak."""
    server = path.removesuffix(".control")
    if server != path:
        return f"this looks like a control socket; the server's own socket would be {server}"
    return "is this an ivshmem server, and does it run?"


def _close_all(fds: Iterable[Fd]) -> None:
    for fd in fds:
        fd.close()
