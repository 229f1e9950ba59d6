"""Internal: the forwards of a process: they begin together, share a loop, and end together.

Knows: which connections there are, and how long the other side may be silent. Does not know: how
each is made.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence
from functools import partial

from ..channel import Bytes, Channels
from ..channel.streams import Stream
from ..system import late_logging
from ..system.uncopied import Uncopied
from ..text import counted
from . import rings
from .config import SILENCE, ForwardConfig
from .connecting import Connecting
from .listening import Listening
from .plugs import SocketPlug, StdioPlug
from .relay import SocketRelay
from .turns import Turns

_log = late_logging.log_of("ivshmem.forward")


class Forwarder(Uncopied):
    """All forwards of a process. A context manager; its end resets the connections.

    Args:
        silence: seconds without a sign of life of the other side's process, or of its machine,
            after which a connection is reset. (A process of this machine that has ended is known to
            be gone within a second or two.)

    Raises:
        ChannelError, ChannelTypeError, OSError: one forward cannot begin; none has.
    """

    def __init__(
        self, channels: Channels, configs: Sequence[ForwardConfig], *, silence: float = SILENCE
    ) -> None:
        self._channels = channels
        self._silence = silence
        self._relays: dict[int, SocketRelay] = {}
        self._listening: list[Listening] = []
        self._stdio: SocketRelay | None = None
        with contextlib.ExitStack() as undo:
            self.turns = Turns(channels)
            undo.callback(self.turns.close)
            undo.callback(self._reset_all)
            for config in configs:
                undo.callback(self._begin(config).close)
            self.turns.after(silence / 4, self._look_for_silent)
            self._undo = undo.pop_all()

    def _begin(self, config: ForwardConfig) -> Listening | Connecting:
        open_channel = partial(rings.opened, self._channels, config)
        if config.listen is not None:
            listening = Listening(self.turns, open_channel, config, self._join)
            self._listening.append(listening)
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
        relay = SocketRelay(self.turns, stream, plug, piece=piece, name=name, on_end=self._ended)
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
        try:
            stream = channel.connect()
        except ConnectionRefusedError:
            raise ConnectionRefusedError(
                f"forward {name}: no process connects at the other side: start `ivshmem forward"
                f" {name} --connect ADDRESS` there"
            ) from None
        try:
            plug = StdioPlug()
        except BaseException:
            stream.abort()
            raise
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
        for listening in self._listening:
            listening.resume()  # somebody can wait for a connection to become free
        if relay is self._stdio:
            self.turns.stop()

    def _look_for_silent(self) -> None:
        for relay in list(self._relays.values()):
            if (seconds := relay.silence()) > self._silence:
                relay.reset(f"the other side has been silent for {seconds:.0f} s")
        self.turns.after(self._silence / 4, self._look_for_silent)

    def _reset_all(self) -> None:
        for relay in list(self._relays.values()):
            relay.reset("this side ends")

    def run(self) -> None:
        """Forward until `stop` is called.

        Raises:
            ClosedError: the channels are closed, or another process freed this one's place.
        """
        self.turns.run()

    def stop(self) -> None:
        """Let `run` return; from any thread or signal handler."""
        self.turns.stop()

    def close(self) -> None:
        """Listen no more, and reset the connections; may be called twice."""
        self._undo.close()

    def __enter__(self) -> Forwarder:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
