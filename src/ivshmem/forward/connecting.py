"""Internal: the side that connects: each connection that comes through the channel gets a socket.

Knows: the one address, and connects that take time. Does not know: what a connection carries.

A peer that connects through the channel cannot choose the target: this side connects only to the
address of its settings.
"""

from __future__ import annotations

import errno
import os
import select
import socket
from collections.abc import Callable

from ..channel import Bytes
from ..channel.stream_poll import HAS_RESET, MAY_RECEIVE
from ..channel.streams import Stream
from ..errors import ChannelError, ClosedError, reason_of
from ..system import late_logging
from ..system.complaints import Complaints
from ..system.uncopied import Uncopied
from .addresses import SocketPlace, places
from .config import ForwardConfig
from .listening import BATCH, PAUSE, SHORT, Join
from .plugs import quick, reset
from .turns import Turns

_log = late_logging.log_of("ivshmem.forward")

_FULL_PAUSE = 0.02  # seconds until a Unix socket whose queue is full is tried again


class Connecting(Uncopied):
    """A listener of the channel, and the address that it leads to.

    Args:
        open_channel: finds or makes the channel.
        join: makes a relay of a connection of the channel and a socket, and owns both.

    Raises:
        OSError: the address has a name that cannot be looked up.
        ChannelError: all slots of listeners are taken.
    """

    def __init__(
        self, turns: Turns, open_channel: Callable[[], Bytes], config: ForwardConfig, join: Join
    ) -> None:
        assert config.connect is not None
        self.where = config.connect.text
        self.places = places(config.connect)
        self._turns = turns
        self._name = config.name
        self._join = join
        self._complaints = Complaints()
        self._spare: socket.socket | None = None  # for the next connection
        self._paused = False
        self._dials: set[_Dial] = set()
        self._open_channel = open_channel
        self._listen()  # last: the channel stays when something else fails

    def _listen(self) -> None:
        self.channel = self._open_channel()
        self._listener = self.channel.listen()
        try:
            self._sleeper = self._turns.poll.add(self._listener, self)
        except BaseException:
            self._listener.close()
            raise
        self._turns.due(self)

    def has_lost_channel(self) -> bool:
        """Whether the channel was removed, or nobody listens at it for another reason."""
        return self._listener.closed or not self.channel._is_there()

    def open_again(self) -> None:
        """Find or make the channel again, and listen.

        Raises:
            ChannelError: it cannot be had now.
        """
        self._stop_listening()
        self._listen()

    def awaken(self, directions: int) -> None:
        """Have a turn."""
        self._turns.due(self)

    def turn(self) -> bool:
        """Accept some; whether more may be there."""
        if self._paused or self._listener.closed:
            return False
        for _ in range(BATCH):
            # The socket first: without one, those who come wait in the channel.
            try:
                if self._spare is None:
                    self._spare = _socket(self.places[0])
            except OSError as error:
                if error.errno not in SHORT:
                    raise
                self.complain(f"no socket: {reason_of(error)}; those who wait are kept")
                self._paused = True
                self._turns.after(PAUSE, self._resume)
                return False
            try:
                stream = self._listener.accept(0)
                if stream is None:
                    return self._sleeper.sleep(MAY_RECEIVE) != 0
            except (ChannelError, ClosedError) as error:
                if isinstance(error, ClosedError) and self.channel._is_there():
                    raise
                self._stop_listening()  # it is opened again soon
                if isinstance(error, ChannelError):
                    self.complain(f"{error}; it listens again")
                return False
            sock, self._spare = self._spare, None
            _Dial(self, stream, sock)
        return True

    def _resume(self) -> None:
        self._paused = False
        self._turns.due(self)

    def complain(self, text: str) -> None:
        """Log what goes wrong with a connection, each kind at most once a minute."""
        if self._complaints.is_due(text):
            _log.warning("%s: %s", self._name, text)

    def _stop_listening(self) -> None:
        self._sleeper.close()
        self._listener.close()
        for dial in list(self._dials):
            dial.give_up()

    def close(self) -> None:
        """Accept no more; may be called twice."""
        self._stop_listening()
        if self._spare is not None:
            self._spare.close()


class _Dial:
    """A connect(2) that is under way, for a stream. It owns both ends until they are joined.

    If the other side resets the stream, nobody waits for the target any more.
    """

    def __init__(self, home: Connecting, stream: Stream, sock: socket.socket) -> None:
        self._home = home
        self._stream = stream
        self._sock = sock
        self._left = list(home.places)
        self._over = False
        self._turns = home._turns
        self._sleeper = self._turns.poll.add(stream, self)
        home._dials.add(self)
        self._turns.due(self)

    def awaken(self, directions: int) -> None:
        """The other side has reset the stream."""
        self.give_up()

    def turn(self) -> bool:
        """Begin."""
        if self._over:
            return False
        self._connect()
        if not self._over and self._sleeper.sleep(HAS_RESET):
            self.give_up()
        return False

    def _connect(self) -> None:
        """Try the first of the places that are left."""
        if self._over:
            return
        code = self._sock.connect_ex(self._left[0].address)
        if code == 0:
            self._succeed()
        elif code == errno.EINPROGRESS:
            self._turns.poller.watch_events(
                self._sock.fileno(), lambda _: self._decided(), select.EPOLLOUT
            )
        elif code == errno.EAGAIN and self._sock.family == socket.AF_UNIX:
            self._turns.after(_FULL_PAUSE, self._connect)
        else:
            self._failed(code)

    def _decided(self) -> None:
        self._turns.poller.unwatch(self._sock.fileno())
        code = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._failed(code)
        else:
            self._succeed()

    def _failed(self, code: int) -> None:
        """Try the next place, or end the connection as the target would: by a reset."""
        del self._left[0]
        if self._left:
            self._sock.close()
            try:
                self._sock = _socket(self._left[0])
            except OSError as error:
                code = error.errno or errno.EIO
            else:
                self._connect()
                return
        reason = os.strerror(code)
        self._home.complain(
            f"{self._home.where} cannot be connected to: {reason[:1].lower()}{reason[1:]}"
        )
        self.give_up()

    def _succeed(self) -> None:
        self._over = True
        self._home._dials.discard(self)
        self._sleeper.close()
        quick(self._sock)
        self._home._join(self._home.channel, self._stream, self._sock, "the other side")

    def give_up(self) -> None:
        """Reset the connection; may be called twice."""
        if not self._over:
            self._over = True
            self._home._dials.discard(self)
            self._sleeper.close()
            if self._sock.fileno() >= 0:
                self._turns.poller.unwatch(self._sock.fileno())
            reset(self._sock)  # the target can have accepted it already
            self._stream.abort()


def _socket(place: SocketPlace) -> socket.socket:
    return socket.socket(place.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
