"""Internal: the forwards of a process: they begin together, share a loop, and end together.

Knows: which connections there are, how long the other side may be silent, and when all is to begin
again in another memory. Does not know: how each is made.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Sequence
from functools import partial

from ..channel import Bytes, Channels
from ..channel.streams import Stream
from ..errors import ChannelError, ClosedError
from ..peer.endpoint import Endpoint
from ..system import late_logging
from ..system.uncopied import Uncopied
from ..text import counted
from . import its_channel
from .config import SILENCE, ForwardConfig
from .connecting import Connecting
from .listening import Listening, Sockets
from .plugs import SocketPlug, StdioPlug
from .relay import SocketRelay
from .server_watch import ServerWatch
from .turns import Turns

_log = late_logging.log_of("ivshmem.forward")

_LOOK = 1.0  # seconds between two looks whether a channel was removed


class Forwarder(Uncopied):
    """All forwards of a process. A context manager; its end resets the connections.

    A removed channel is found or made again. A forward whose channel cannot be had pauses until it
    can, and the others continue.

    Args:
        endpoint: whose the channels are.
        sockets: where forwards listen.
        former: the one that this one continues.
        silence: seconds without a sign of life of the other side's process, or of its machine,
            after which a connection is reset. (A process of this machine that has ended is known to
            be gone within a second or two.)

    Raises:
        ChannelError, ChannelTypeError: one forward cannot begin; none has. If this one continues
            another one, that forward pauses instead.
        OSError: one forward cannot listen or connect; none has begun.

    Attributes:
        next: after `run`: another Forwarder is to continue in the channels of this endpoint, which
            is the caller's; None: no other one.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        channels: Channels,
        configs: Sequence[ForwardConfig],
        sockets: Sockets,
        *,
        silence: float = SILENCE,
        former: Forwarder | None = None,
    ) -> None:
        self.next: Endpoint | None = None
        self._sizes: dict[str, its_channel.Sizes] = {} if former is None else former._sizes
        self._endpoint = endpoint
        self._channels = channels
        self._sockets = sockets
        self._silence = silence
        self._relays: dict[int, SocketRelay] = {}
        self._sides: dict[str, Listening | Connecting] = {}
        self._paused: dict[str, ForwardConfig] = {}  # which have no side yet
        self._said: dict[str, str] = {}  # why a forward pauses
        self._stdio: SocketRelay | None = None
        with contextlib.ExitStack() as undo:
            self.turns = Turns(channels)
            undo.callback(self.turns.close)
            undo.callback(self._reset_all)
            undo.callback(self._close_sides)
            for config in configs:
                try:
                    self._sides[config.name] = self._begin(config)
                except ChannelError as error:
                    if former is None:
                        raise  # whoever starts it reads that
                    self._paused[config.name] = config
                    self._say_paused(config.name, error)
            self.turns.after(silence / 4, self._look_for_silent)
            self.turns.after(_LOOK, self._look_for_removed)
            if configs:
                ServerWatch(
                    self.turns,
                    endpoint,
                    channels,
                    is_idle=lambda: not self._relays,
                    leave=self._continue_at,
                )
            self._undo = undo.pop_all()

    def _begin(self, config: ForwardConfig) -> Listening | Connecting:
        open_channel = partial(its_channel.opened, self._channels, config, self._sizes)
        if config.listen is not None:
            sockets = self._sockets.of(config)
            listening = Listening(self.turns, sockets, open_channel, config, self._join)
            _log.info("%s: listens at %s", config.name, listening.where)
            return listening
        connecting = Connecting(self.turns, open_channel, config, self._join)
        _log.info("%s: connects to %s", config.name, connecting.where)
        return connecting

    def _join(self, channel: Bytes, stream: Stream, sock: socket.socket, who: str) -> None:
        self._relay(channel, stream, SocketPlug(sock), f"{channel.name}: {who}")

    def _relay(
        self, channel: Bytes, stream: Stream, plug: SocketPlug | StdioPlug, name: str
    ) -> SocketRelay:
        # Half of a ring: while one side fills that, the other one empties the rest.
        piece = max(channel.slots // 2, 1)
        relay = SocketRelay(
            self.turns, channel, stream, plug, piece=piece, name=name, on_end=self._ended
        )
        self._relays[id(relay)] = relay
        _log.debug("%s: connected, %s", name, counted(len(self._relays), "connection"))
        return relay

    def connect_stdio(self, name: str) -> SocketRelay:
        """Connect standard input and output to a forward's other side; at the end `run` returns.

        Raises:
            NoSuchChannel, ChannelTypeError: the region has no forward of that name.
            ConnectionRefusedError: no process connects at the other side.
            ChannelError: all connections are in use.
        """
        channel = self._channels.open(name, "bytes")
        assert isinstance(channel, Bytes)
        plug = StdioPlug()  # first: if it cannot be used, the target hears of nothing
        try:
            stream = channel.connect()
        except BaseException as error:
            plug.close(self.turns.poller, failed=True)
            if type(error) is ChannelError:
                raise ChannelError(its_channel.said_of(error, name)) from None
            if not isinstance(error, ConnectionRefusedError):
                raise
            raise ConnectionRefusedError(
                f"forward {name}: no process connects at the other side: start `ivshmem forward"
                f" {name} --connect ADDRESS` there"
            ) from None
        self._stdio = self._relay(channel, stream, plug, f"{name}: standard input")
        return self._stdio

    def _ended(self, relay: SocketRelay) -> None:
        self._relays.pop(id(relay), None)
        _log.debug(
            "%s: %s, %d bytes into the channel, %d out of it",
            relay.name,
            f"reset ({relay.failed})" if relay.failed else "closed",
            *relay.moved,
        )
        for side in self._sides.values():
            if isinstance(side, Listening):
                side.resume()  # somebody can wait for a connection to become free
        if relay is self._stdio:
            self.turns.stop()

    def _look_for_silent(self) -> None:
        for relay in list(self._relays.values()):
            if (seconds := relay.silence()) > self._silence:
                relay.reset(f"the other side has been silent for {seconds:.0f} s")
        self.turns.after(self._silence / 4, self._look_for_silent)

    def _look_for_removed(self) -> None:
        """Take in that channels were removed, as a user can do by force."""
        removed = set()
        for relay in list(self._relays.values()):
            if relay.channel not in removed and not relay.channel._is_there():
                removed.add(relay.channel)
            if relay.channel in removed:
                relay.reset("the channel was removed")
        for name, side in self._sides.items():
            if side.has_lost_channel():
                if name not in self._said:
                    _log.warning("%s: the channel was removed: it is opened again", name)
                if self._tried(name, side.open_again):
                    _log.info("%s: the channel is open again", name)
        for name, config in list(self._paused.items()):
            self._tried(name, partial(self._begin_late, config))
        self.turns.after(_LOOK, self._look_for_removed)

    def _begin_late(self, config: ForwardConfig) -> None:
        self._sides[config.name] = self._begin(config)
        del self._paused[config.name]

    def _tried(self, name: str, act: Callable[[], object]) -> bool:
        """Let a forward have its channel; whether it has it. Else the forward pauses."""
        try:
            act()
        except (ChannelError, ClosedError) as error:
            # ClosedError: another process has removed the channel at this moment.
            if self._channels.closed or self._endpoint.closed:
                raise
            self._say_paused(name, error)
            return False
        self._said.pop(name, None)
        return True

    def _say_paused(self, name: str, error: Exception) -> None:
        text = str(error)
        if self._said.get(name) != text:
            self._said[name] = text
            _log.warning(
                "%s: paused: %s; it is tried again each second, and other forwards continue",
                name,
                text,
            )

    def _continue_at(self, endpoint: Endpoint) -> None:
        self.next = endpoint
        self.turns.stop()

    def _close_sides(self) -> None:
        for side in self._sides.values():
            side.close()

    def _reset_all(self) -> None:
        for relay in list(self._relays.values()):
            relay.reset("this side ends")

    def run(self) -> None:
        """Forward until `stop` is called, or another one is to continue.

        Raises:
            ClosedError: the channels are closed; with --stdio, another process freed this one's
                place.
        """
        try:
            self.turns.run()
        except ClosedError as error:
            if not self._sides or self._endpoint.closed or not self._channels.closed:
                raise
            _log.warning("%s; that is done, and connections are reset", error)
            self.next = self._endpoint

    def stop(self) -> None:
        """Let `run` return; from any thread or signal handler."""
        self.turns.stop()

    def close(self) -> None:
        """Accept no more, and reset the connections; may be called twice."""
        self._undo.close()

    def __enter__(self) -> Forwarder:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
