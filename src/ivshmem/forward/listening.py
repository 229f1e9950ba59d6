"""Internal: the side that listens: accepts sockets, and connects each through the channel.

Knows: full queues, and what is short. Does not know: what a connection carries.
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
from collections.abc import Callable

from ..channel import Bytes
from ..channel.streams import Stream
from ..errors import ChannelError, ClosedError, NoSuchChannel, reason_of
from ..system import late_logging
from ..system.complaints import Complaints
from ..system.listener import Listener
from ..system.uncopied import Uncopied
from . import addresses
from .config import ForwardConfig
from .its_channel import said_of
from .plugs import quick, reset
from .turns import Turns

_log = late_logging.log_of("ivshmem.forward")

# What passes when something else ends: those who wait stay in the queue of the socket.
SHORT = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
PAUSE = 0.1  # seconds until it is tried again
BATCH = 16  # that are accepted in a turn

Join = Callable[[Bytes, Stream, socket.socket, str], object]


class Sockets(Uncopied):
    """The listening sockets of all forwards of a process; a context manager.

    They outlive a Forwarder: while the next one begins, those who connect wait in their queues.
    """

    def __init__(self) -> None:
        self._opened: dict[str, list[socket.socket]] = {}
        self._undo = contextlib.ExitStack()

    def of(self, config: ForwardConfig) -> list[socket.socket]:
        """Return the sockets of a forward, which stay this object's; they do not block.

        Raises:
            OSError: the address cannot be listened at, with the address.
        """
        if config.name not in self._opened:
            with contextlib.ExitStack() as undo:
                self._opened[config.name] = _listen(config, undo)
                self._undo.push(undo.pop_all())
        return self._opened[config.name]

    def __enter__(self) -> Sockets:
        return self

    def __exit__(self, *error: object) -> None:
        self._undo.close()


class Listening(Uncopied):
    """Listening sockets at an address.

    Args:
        sockets: they stay the caller's.
        open_channel: finds or makes the channel.
        join: makes a relay of a connection of the channel and a socket, and owns both.
    """

    def __init__(
        self,
        turns: Turns,
        sockets: list[socket.socket],
        open_channel: Callable[[], Bytes],
        config: ForwardConfig,
        join: Join,
    ) -> None:
        self._turns = turns
        self._name = config.name
        self._join = join
        self._complaints = Complaints()
        self._paused = False
        self._held: tuple[socket.socket, str] | None = None  # accepted, and no connection is free
        self._undo = contextlib.ExitStack()
        with contextlib.ExitStack() as undo:
            self.sockets = list(sockets)
            self._open_channel = open_channel
            self.channel = open_channel()
            for sock in self.sockets:
                turns.poller.watch(sock.fileno(), lambda: turns.due(self))
                undo.callback(turns.poller.unwatch, sock.fileno())
            self._undo = undo.pop_all()

    @property
    def where(self) -> str:
        """The addresses, with the port that the kernel chose."""
        return " and ".join(addresses.shown(sock.getsockname()) for sock in self.sockets)

    def awaken(self, directions: int) -> None:
        """Do nothing: it has no end of a channel."""

    def turn(self) -> bool:
        """Accept some; the rest is readable again."""
        if self._paused:
            return False
        if self._held is not None and not self._connect(*self._held):
            return False
        for sock in self.sockets:
            for _ in range(BATCH):
                try:
                    accepted, peer = sock.accept()
                except (BlockingIOError, ConnectionAbortedError, InterruptedError):
                    break
                except OSError as error:
                    if error.errno not in SHORT:
                        raise
                    self._complain(
                        "short", f"cannot accept: {reason_of(error)}; those who wait are kept"
                    )
                    self._pause()
                    return False
                accepted.setblocking(False)
                quick(accepted)
                if not self._connect(accepted, addresses.shown(peer) if peer else "a process"):
                    return False
        return False

    def _connect(self, sock: socket.socket, who: str) -> bool:
        """Connect a socket through the channel; False: there is no room, and it is held."""
        self._held = None
        try:
            stream = self._new_stream()
        except ConnectionRefusedError:
            reset(sock)
            self._complain(
                "refused",
                f"{who} is refused: no process connects at the other side (start `ivshmem forward"
                f" {self._name} --connect ADDRESS` there)",
            )
            return True
        except ChannelError as error:
            if type(error) is not ChannelError:  # removed, or spoiled
                reset(sock)
                self._complain(type(error).__name__, f"{who} is refused: {error}")
                return True
            self._held = sock, who
            self._complain("full", f"{who} waits: {said_of(error, self._name)}")
            self._pause()
            return False
        except BaseException:
            reset(sock)
            raise
        self._join(self.channel, stream, sock, who)
        return True

    def _new_stream(self) -> Stream:
        """Connect through the channel.

        Raises:
            NoSuchChannel: it was removed, even if another one has its name now.
        """
        if self.channel._is_there():
            try:
                return self.channel.connect()
            except ClosedError:
                if self.channel._is_there():
                    raise
        raise NoSuchChannel("the channel was removed")

    def _complain(self, kind: str, text: str) -> None:
        if self._complaints.is_due(kind):
            _log.warning("%s: %s", self._name, text)

    def _pause(self) -> None:
        """Accept nobody for a while: a socket that is readable would make the loop spin."""
        self._paused = True
        for sock in self.sockets:
            self._turns.poller.watch_for(sock.fileno(), 0)
        self._turns.after(PAUSE, self.resume)

    def resume(self) -> None:
        """Accept again, if it paused."""
        if self._paused and self.sockets:
            self._paused = False
            for sock in self.sockets:
                self._turns.poller.watch_for(sock.fileno(), select.EPOLLIN)
            self._turns.due(self)

    def has_lost_channel(self) -> bool:
        """Whether the channel was removed."""
        return not self.channel._is_there()

    def open_again(self) -> None:
        """Find or make the channel again: it was removed.

        Raises:
            ChannelError: it cannot be had now.
        """
        self.channel = self._open_channel()

    def close(self) -> None:
        """Accept no more; may be called twice."""
        self.sockets = []
        if self._held is not None:
            reset(self._held[0])
            self._held = None
        self._undo.close()


def _listen(config: ForwardConfig, undo: contextlib.ExitStack) -> list[socket.socket]:
    """Return listening sockets that do not block; `undo` closes them.

    Raises:
        OSError: the address cannot be listened at, with the address.
    """
    address = config.listen
    assert address is not None
    if address.path and address.path[0] != "@":
        listener = undo.enter_context(Listener(address.path, mode=config.mode))
        listener.listen()
        return [listener.socket]
    found: list[socket.socket] = []
    errors: list[OSError] = []
    for family, place in addresses.places(address, listen=True):
        try:
            found.append(undo.enter_context(_bound(family, place)))
        except OSError as error:
            errors.append(error)
        if found and not address.port:
            break  # the kernel chose a port: another address would get another one
    # A host without IPv6 has a name with an IPv6 address, too.
    lacking = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
    for failed in errors:
        if not found or failed.errno not in lacking:
            raise OSError(failed.errno, _hint(failed), address.text)
    return found


def _bound(family: int, place: object) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        if family != socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(place)  # type: ignore[arg-type]
        sock.listen(socket.SOMAXCONN)
    except BaseException:
        sock.close()
        raise
    return sock


def _hint(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "another process listens here: stop it, or choose another address"
    if error.errno == errno.EADDRNOTAVAIL:
        return "this machine does not have the address: choose one of its own"
    if error.errno == errno.EACCES:
        return "only root may listen at a port below 1024: choose a higher one"
    return error.strerror or str(error)
