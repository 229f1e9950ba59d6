"""The client side of the control socket: asks a running server.

Knows: the types of all replies, whose answers are trusted. Does not know: what a server does.

docs/reference/control-protocol.md describes the protocol. A client takes answers from root and its
own user, and root takes them from anybody. What `ControlClient.ask` returns has the documented
fields and types.
"""

from __future__ import annotations

import _thread  # the commands that ask need not load all of threading
import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Collection, Mapping

from ..errors import ClosedError, ControlError, Misshapen
from ..peer import connecting, inquiry
from ..protocol.limits import MAX_ID, MAX_VECTORS
from ..server.limits import LINGER
from ..system import credentials, json_shapes
from ..system.accounts import user_name
from ..system.time_limits import deadline_of, seconds_of
from ..system.uncopied import Uncopied
from ..text import counted, plain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


PROTOCOL = 1
LONGEST_CODE = 64  # characters of an error's code
SUFFIX = ".control"


_LOOK = 0.01  # seconds between two questions whether a peer has read all
MOST_PID, MOST_UID = (1 << 31) - 1, (1 << 32) - 1
_MOST_REQUEST = 1 << 16  # bytes that a server takes, with the newline
_LONGEST = 2e6  # seconds: a socket takes no longer limit, and more is for ever
_MOST_REPLY = 1 << 26  # bytes that a client takes: a status of 10,000 peers has a tenth


def default_path(server: str | os.PathLike[str]) -> str:
    """Return the default path of a server's control socket.

    Raises:
        OSError: EINVAL, the server's path is empty.
    """
    path = os.fsdecode(server)
    if not path:
        raise OSError(errno.EINVAL, "a socket needs a path", path)
    return os.path.abspath(path) + SUFFIX


def as_line(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


# -- the other side -------------------------------------------------------------------------------

_COUNT = json_shapes.integer(0)
_PEER = json_shapes.record(
    # Servers of older versions do not say these.
    {
        "leaves_told": _COUNT,
        "leaves_held": _COUNT,
        "held": json_shapes.flag(),
        "held_until": json_shapes.optional(json_shapes.moment()),
    },
    id=json_shapes.integer(0, MAX_ID),
    pid=json_shapes.integer(0, MOST_PID),
    uid=json_shapes.integer(0, MOST_UID),
    gid=json_shapes.integer(0, MOST_UID),
    process=json_shapes.text(),
    names=json_shapes.array(json_shapes.text()),
    vectors=json_shapes.integer(0, MAX_VECTORS),
    since=json_shapes.moment(),
    readonly=json_shapes.flag(),
    set_up=json_shapes.flag(),
    pending=_COUNT,
    stalled_since=json_shapes.optional(json_shapes.moment()),
    interrupts=json_shapes.array(_COUNT, MAX_VECTORS),
)
_REGION = json_shapes.record(
    {
        "file_system": json_shapes.text(),
        "holds_leaves": json_shapes.flag(),
        "channels": _COUNT,
        "unreachable": json_shapes.text(),
        "memory_leads_to": json_shapes.text(),
    },
    name=json_shapes.text(),
    socket=json_shapes.text(),
    vectors=json_shapes.integer(0, MAX_VECTORS),
    size=_COUNT,
    page_size=_COUNT,
    source=json_shapes.text(),
    memory=json_shapes.text(),
    paused=json_shapes.text(),
    counts=json_shapes.table(_COUNT),
)
_SERVER = json_shapes.record(
    pid=json_shapes.integer(0, MOST_PID),
    uid=json_shapes.integer(0, MOST_UID),
    version=json_shapes.text(),
    protocol=_COUNT,
    since=json_shapes.moment(),
    time=json_shapes.moment(),
    cpu=json_shapes.number(),
    resident=_COUNT,
    fds=json_shapes.record(open=_COUNT, limit=json_shapes.optional(_COUNT)),
    pid_namespace=_COUNT,
)

# What a reply to each request has, for whoever reads it; more fields may come.
REPLIES: Mapping[str, json_shapes.Shape] = {
    "version": json_shapes.record(version=json_shapes.text(), protocol=_COUNT, pid=_COUNT),
    "status": json_shapes.record(server=_SERVER, regions=json_shapes.array(_REGION)),
    "evict": json_shapes.record(region=json_shapes.text()),
    "hold-leaves": json_shapes.record(region=json_shapes.text()),
    "hold": json_shapes.record(region=json_shapes.text(), read=json_shapes.flag()),
    "release": json_shapes.record(region=json_shapes.text(), held=json_shapes.flag()),
    "free-places": json_shapes.record(region=json_shapes.text(), freed=_COUNT),
    "reload": json_shapes.record(changes=json_shapes.array(json_shapes.text())),
}
_PEERS = json_shapes.record(
    regions=json_shapes.array(json_shapes.record(peers=json_shapes.array(_PEER)))
)
_ANY_REPLY = json_shapes.record(
    # Servers of older versions do not say a code.
    {"error": json_shapes.text(), "code": json_shapes.text()},
    ok=json_shapes.flag(),
)


def _check(message: Mapping[str, Any], reply: Mapping[str, Any]) -> None:
    """Raise Misshapen if a reply to this message is not what it should be."""
    kind = message.get("do")
    if isinstance(kind, str) and kind in REPLIES:
        REPLIES[kind](reply, kind)
        if kind == "status" and message.get("peers", True):
            _PEERS(reply, kind)


class ControlClient(Uncopied):
    """A connection to a control socket; a context manager.

    Several threads may use one: each request waits until the one before it has its reply. When the
    connection has ended, or a reply did not come in time, a new ControlClient is needed.

    Args:
        timeout: seconds to wait at most for connecting, for each reply, and for a `hold`; None: for
            ever; 0 or less: no longer than it takes to look once. A server that is stopped or hangs
            does not answer: give a limit if your program must not wait for it.
        users: uids whose servers may be asked. None: root's and this process's; root may ask a
            server of any user.

    Attributes:
        server: the credentials of the server's process, from the kernel.
        path: of the control socket.

    Raises:
        ControlError: another user answers at this path.
        TimeoutError: the server did not accept the connection in time.
        OSError: as of connect(2).
    """

    # What __repr__ finds where __init__ did not come to its end.
    path = "?"
    _closed = True

    def __init__(
        self,
        path: str | os.PathLike[str],
        timeout: float | None = None,
        *,
        users: Collection[int] | None = None,
    ) -> None:
        self.path = os.fsdecode(path)
        self._timeout = None if timeout is None else seconds_of(timeout)
        self._pid = os.getpid()
        # For one request and its reply. A signal handler may ask while its own thread does.
        self._lock = _thread.RLock()
        heard = None if users is None else frozenset(users)
        # From this address a server would take us for somebody with a question, not for a peer, if
        # this should be its other socket.
        address = inquiry.ASK + os.urandom(8).hex().encode()
        self._socket = connecting.connect(path, timeout, address=address)
        self._rest = b""
        self.server = credentials.credentials(self._socket)
        self._closed = False
        mine = os.geteuid()
        if heard is None:
            heard = frozenset({0, mine, self.server.uid} if mine == 0 else {0, mine})
        if self.server.uid not in heard:
            self.close()
            whose = user_name(self.server.uid)
            raise ControlError(
                f"{self.path}: {whose} answers here, not your server: give the path of yours by -S"
                f" or --control, or ask as {whose}{'' if self.server.uid == 0 else ' or as root'}"
            )

    def ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Return the reply to a request, without "ok".

        Raises:
            ControlError: the server refused it, for a reason that `code` names, or it has more than
                65,536 bytes ("bad-request") and was not sent; or this is not a control socket, or
                the reply makes no sense (`code` is "").
            TimeoutError: no reply within the time limit. The connection is of no use any more.
            ConnectionError: the server has closed the connection: make a new ControlClient.
            ClosedError: this is closed, or another thread closed it during the call.
        """
        line = as_line(message)
        if len(line) > _MOST_REQUEST:
            # The server would say the same, and close the connection.
            reason = f"a request has at most {_MOST_REQUEST} bytes, this one {len(line)}: send less"
            raise ControlError(reason, "bad-request")
        try:
            with self._lock:
                self._check()
                deadline = deadline_of(self._timeout)
                self._send(line, deadline)
                reply = self._receive(deadline)
        except TimeoutError:
            seconds = counted(max(self._timeout or 0, 0), "second")
            reason = f"no reply within {seconds}: is the server stopped?"
            raise TimeoutError(errno.ETIMEDOUT, reason, self.path) from None
        except OSError:
            self._check()  # why it failed
            raise
        if reply.pop("ok"):
            try:
                _check(message, reply)
            except Misshapen as error:
                raise ControlError(
                    f"the server's reply makes no sense ({error}): is it of another version?"
                ) from None
            return reply
        text = plain(reply.get("error", "it could not be done"))
        raise ControlError(text, plain(reply.get("code", ""), LONGEST_CODE))

    def hold(
        self, peer_id: int, *, linger: float | None = LINGER, region: str | None = None
    ) -> None:
        """Let the server hold back messages to a peer, and wait until the peer has read the rest.

        The hold ends by `release`, when the peer disconnects, and `linger` seconds after this
        connection has ended (None: it does not end by that). Server.hold says why that is needed.

        Raises:
            ControlError: there is no such peer; or the server is of a version that cannot do it.
            TimeoutError: the peer did not read all within the time limit; it stays held.
            ConnectionError: the server has closed the connection.
        """
        deadline = deadline_of(self._timeout)
        message = {"do": "hold", "id": peer_id, "linger": linger, "region": region}
        while not self.ask(message)["read"]:
            if _is_over(deadline):
                reason = (
                    f"peer {peer_id} has not read all that it was sent within"
                    f" {max(self._timeout or 0, 0):g} seconds: is it stopped? (It is sent nothing"
                    f" more until `ivshmem release {peer_id}`)"
                )
                raise TimeoutError(errno.ETIMEDOUT, reason, self.path)
            time.sleep(_LOOK)

    def release(self, peer_id: int, *, region: str | None = None) -> bool:
        """Let the server send a peer messages again; return whether the peer was held.

        Raises:
            ControlError: there is no such peer; or the server is of a version that cannot do it.
        """
        reply = self.ask({"do": "release", "id": peer_id, "region": region})
        return bool(reply["held"])

    def _send(self, data: bytes, deadline: float | None) -> None:
        # A server that refuses us says so and closes, so there may be a reply to read anyway.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._socket.settimeout(_left(deadline))
            self._socket.sendall(data)

    def _receive(self, deadline: float | None) -> dict[str, Any]:
        chunks = [self._rest]
        size = 0
        while b"\n" not in chunks[-1]:
            self._socket.settimeout(_left(deadline))
            data = b""
            with contextlib.suppress(ConnectionResetError):
                data = self._socket.recv(1 << 18)
            if _is_over(deadline):
                raise TimeoutError
            size += len(data)
            chunks.append(data)
            if size > _MOST_REPLY:
                raise self._stranger()
            if not data:
                if size or self._rest:
                    raise self._stranger()
                reason = "the server closed the connection: make a new ControlClient, and ask again"
                raise ConnectionResetError(errno.ECONNRESET, reason, self.path)
        line, _, self._rest = b"".join(chunks).partition(b"\n")
        with contextlib.suppress(Misshapen):
            reply = json_shapes.loads(line)
            _ANY_REPLY(reply, "reply")
            return dict(reply)
        raise self._stranger()

    def _stranger(self) -> ControlError:
        return ControlError(
            f"{self.path}: this is not a control socket (that of a server on this socket would be"
            f" {self.path}{SUFFIX})"
        )

    def close(self) -> None:
        """Close the connection; may be called twice, and by any thread."""
        self._closed = True
        # The socket says whether it is done: a signal handler can end this call at any line.
        if self._socket.fileno() < 0:
            return
        if os.getpid() != self._pid:
            self._socket.close()  # without the lock, which a thread of the parent may have had
            return
        with contextlib.suppress(OSError):  # the server has ended it
            self._socket.shutdown(socket.SHUT_RDWR)  # so that another thread's call ends
        with self._lock:
            self._socket.close()

    def _check(self) -> None:
        if self._closed:
            raise ClosedError("the connection to the control socket is closed")

    def __enter__(self) -> ControlClient:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"pid {self.server.pid}"
        return f"<ivshmem.control.ControlClient at {self.path}, {state}>"


def _is_over(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() > deadline


def _left(deadline: float | None) -> float | None:
    """Seconds for a socket until the deadline; 0 would make the socket non-blocking."""
    left = 0 if deadline is None else max(deadline - time.monotonic(), 0.001)
    return left if 0 < left < _LONGEST else None


def request(
    path: str | os.PathLike[str], message: Mapping[str, Any], timeout: float | None = None
) -> dict[str, Any]:
    """Return the reply to one request, without "ok".

    Args:
        timeout: seconds to wait at most for connecting, and for the reply; None: for ever.

    Raises:
        ControlError, TimeoutError, OSError: as of ControlClient.
    """
    with ControlClient(path, timeout) as client:
        return client.ask(message)
