"""Unix sockets by path: connecting in time, and what a path or a descriptor leads to.

Knows: paths, stale and live sockets. Does not know: listening (listener.py), what is said over a
socket.

Errors carry the path.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
import time

from .time_limits import deadline_of, seconds_of

MAX_PATH = 107  # sockaddr_un.sun_path less its final zero, unix(7)

_LONGEST = 1e9  # seconds: more is for ever
_TIMEVAL = struct.Struct("ll")


def check_path(path: str | os.PathLike[str]) -> str:
    """The path as a string.

    Raises:
        OSError: ENAMETOOLONG, it does not fit into a socket address; EINVAL, it is empty.
    """
    text = os.fsdecode(path)
    length = len(os.fsencode(text))
    if length > MAX_PATH:
        raise OSError(
            errno.ENAMETOOLONG,
            f"a socket path has at most {MAX_PATH} bytes, this one {length}: use a shorter one",
            text,
        )
    if not text or "\0" in text:
        raise OSError(errno.EINVAL, "a socket needs a path", text)
    return text


def is_live(path: str) -> bool:
    """Whether some process holds a socket bound to `path`; False if it is stale or absent.

    A datagram socket cannot connect to a stream socket, so the server never learns of the question;
    but the kernel's answer tells a bound socket (EPROTOTYPE) from a file that outlived its process
    (ECONNREFUSED).

    Raises:
        OSError: EACCES and the like.
    """
    code = _probe(path)
    if code in (errno.ECONNREFUSED, errno.ENOENT):
        return False
    if code in (0, errno.EPROTOTYPE):
        return True
    raise OSError(code, os.strerror(code), path)


def takes_datagrams(path: str) -> bool:
    """Whether some process holds a datagram socket bound to `path`: no server listens there."""
    return _probe(path) == 0


def _probe(path: str) -> int:
    """Return the errno of connecting a datagram socket to `path`; 0: that worked."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        return probe.connect_ex(path)


def connect(
    path: str | os.PathLike[str], timeout: float | None, *, address: bytes | None = None
) -> socket.socket:
    """A stream socket connected to `path`, from `address` if one is given.

    Raises:
        BlockingIOError: the listener's backlog was full for `timeout` seconds (0 or less: now).
        OSError: as of connect(2), with the path.
    """
    text = check_path(path)
    seconds = None if timeout is None else min(seconds_of(timeout), _LONGEST)
    deadline = deadline_of(seconds)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if address is not None:
            sock.bind(address)
        sock.setblocking(seconds is None or seconds > 0)
        while True:
            if deadline is not None:
                # Only SO_SNDTIMEO limits the wait for a full backlog: a non-blocking connect fails
                # at once with EAGAIN, and poll cannot wait for it. Zero would mean no limit.
                microseconds = max(int((deadline - time.monotonic()) * 1e6), 1)
                limit = _TIMEVAL.pack(*divmod(microseconds, 10**6))
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
            try:
                sock.connect(text)
                # Python takes a connect that a signal interrupted for one under way, which a Unix
                # socket never has.
                sock.getpeername()
                break
            except OSError as error:
                if error.errno != errno.ENOTCONN:
                    raise
                if deadline is not None and time.monotonic() >= deadline:
                    raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from None
        sock.setblocking(True)
    except OSError as error:
        sock.close()
        raise OSError(error.errno, error.strerror, text) from None
    except BaseException:
        sock.close()
        raise
    return sock


def is_socket(path: str) -> bool:
    """Whether a path leads to a socket; True if that cannot be known: it was one a moment ago."""
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return True


def is_connection(fd: int) -> bool:
    """Whether a descriptor is a connected Unix stream socket; takes no other descriptor to know."""
    try:
        sock = socket.socket(fileno=fd)
    except OSError:
        return False
    try:
        if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
            return False
        sock.getpeername()  # also of a peer that has hung up since
        return True
    except OSError:
        return False  # it listens, or was never connected
    finally:
        sock.detach()
