"""Connecting to a server: in time, when it has come, and with an error that says what to do.

Knows: why a connect to a server fails, and whether waiting can help. Does not know: what is said
over a connection.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Iterator

from ..system import sockets
from ..system.time_limits import deadline_of, left_until
from ..text import counted

_LOOKS = (0.001, 0.05)  # seconds between looks for a server, the first and the longest
_PERMITTED = 1.0  # seconds from a server's bind to the permissions that its socket is to have

_START = "start the server (ivshmem serve), or give the path of one that runs"
CONNECT_HINTS = {
    errno.ENOENT: f"no such socket: {_START}",
    errno.ECONNREFUSED: f"nobody listens here: {_START}",
    errno.EPROTOTYPE: "this socket is of another type, so it is not an ivshmem server's",
    errno.EACCES: "permission denied: the server's user must let you write to its socket",
}


def connect(
    path: str | os.PathLike[str], timeout: float | None, *, address: bytes | None = None
) -> socket.socket:
    """A stream socket connected to the server at `path`, from `address` if one is given.

    Blocks for at most `timeout` seconds (None: no limit), while the server's backlog is full.

    Raises:
        TimeoutError: the server did not make room in its backlog in that time.
        OSError: as of connect(2), with what to do where that is known.
    """
    try:
        return sockets.connect(path, timeout, address=address)
    except BlockingIOError:
        raise accepts_nobody(os.fsdecode(path), timeout or 0) from None
    except OSError as error:
        if error.errno == errno.ECONNREFUSED and not sockets.is_socket(os.fsdecode(path)):
            hint = "not a socket: no server listens here, choose another path"
        elif error.errno in CONNECT_HINTS:
            hint = CONNECT_HINTS[error.errno]
        else:
            raise
        raise OSError(error.errno, hint, error.filename) from None


def connect_when_served(path: str | os.PathLike[str], timeout: float | None) -> socket.socket:
    """Like `connect`, but if the server is not there yet, wait for it.

    Raises:
        TimeoutError: no server came within `timeout` seconds, or one did not make room in its
            backlog.
        OSError: as of `connect`, where waiting would not help.
    """
    deadline = deadline_of(timeout)
    awaited = Awaited(path)
    for pause in pauses(deadline):
        left = None if deadline is None else left_until(deadline)
        try:
            return connect(path, left)
        except TimeoutError:
            raise accepts_nobody(os.fsdecode(path), timeout or 0) from None
        except OSError as error:
            if not awaited.may_come(error):
                raise
        time.sleep(pause)
    raise nobody_came(os.fsdecode(path), timeout or 0)


def pauses(deadline: float | None) -> Iterator[float]:
    """Seconds between looks whether a server has come, until `deadline` (None: without end).

    Looking is used, and not inotify(7): that would need a watch on each directory that does not
    exist yet, and does not tell when a process listens on a socket that exists. A look costs some
    microseconds.
    """
    pause, longest = _LOOKS
    while True:
        left = longest if deadline is None else deadline - time.monotonic()
        yield max(min(pause, left), 0)
        if left <= 0:
            return
        pause = min(pause * 2, longest)


class Awaited:
    """Tells whether a server may still come to a path, from why a connect to it failed."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.fsdecode(path)
        self._denied: float | None = None  # since when

    def may_come(self, error: OSError) -> bool:
        """Whether a connect that failed so can succeed as soon as a server starts there.

        Also for a second after the first EACCES: a server binds its socket first, and then lets
        others in, and a service manager does the same with a directory.
        """
        now = time.monotonic()
        if error.errno == errno.EACCES:
            self._denied = self._denied or now
            return now < self._denied + _PERMITTED
        self._denied = None
        if error.errno == errno.ENOENT:
            return True
        if error.errno != errno.ECONNREFUSED:
            return False
        return sockets.is_socket(self._path)  # a stale one; any other file is in the way


def nobody_came(path: str, timeout: float) -> TimeoutError:
    """What to raise when no server came for `timeout` seconds."""
    seconds = counted(max(timeout, 0), "second")
    reason = f"no server came in {seconds}: start it (ivshmem serve), or wait longer"
    return TimeoutError(errno.ETIMEDOUT, reason, path)


def accepts_nobody(path: str, timeout: float) -> TimeoutError:
    """What to raise when a server's backlog was full for `timeout` seconds."""
    reason = f"the server accepts nobody: no answer in {counted(max(timeout, 0), 'second')}"
    return TimeoutError(errno.ETIMEDOUT, reason, path)


def server_sent_all(sock: socket.socket) -> bool:
    """Whether the server shut down its receiving side: this package's marks the set-up's end so.

    Protocol version 0 has no message for that end. Other clients do not notice the shutdown,
    because a client never sends; this one sees EPIPE when it sends zero bytes, see unix(7).
    """
    try:
        sock.send(b"", socket.MSG_NOSIGNAL)
    except BrokenPipeError:
        return True
    except OSError:
        pass
    return False
