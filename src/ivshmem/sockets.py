"""Unix sockets by path: listening without harm to others, connecting in time, who is there.

Knows: paths, stale and live sockets, credentials. Does not know: what is said over a socket.

Invariants:
1. A live server's socket is never removed, and never connected to just to see whether it lives.
2. Errors carry the path.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import stat
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from . import locks
from .errors import ServerGone

MAX_PATH = 107  # sockaddr_un.sun_path less its final zero, unix(7)

# The abstract address, unix(7), of somebody who connects only to ask; random bytes follow. QEMU and
# clients of the protocol have no address at all.
ASK = b"\0ivshmem-ask-"

_LOCK_SECONDS = 2.0  # how long another process may hold a directory's lock while it binds
_LONGEST = 1e9  # seconds: more is for ever
_UCRED = struct.Struct("iII")
_TIMEVAL = struct.Struct("ll")


class Credentials(NamedTuple):
    """Who was on the other end when it connected (SO_PEERCRED), and what its process is called."""

    pid: int
    uid: int
    gid: int
    process: str


def check_path(path: str | os.PathLike[str]) -> str:
    """The path as a string.

    Raises:
        OSError: ENAMETOOLONG, it does not fit into a socket address; EINVAL, it is empty.
    """
    text = os.fspath(path)
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
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        code = probe.connect_ex(path)
    if code in (errno.ECONNREFUSED, errno.ENOENT):
        return False
    if code in (0, errno.EPROTOTYPE):
        return True
    raise OSError(code, os.strerror(code), path)


class Listener:
    """A non-blocking stream socket bound to `path`, which it removes when it is closed.

    A stale socket at `path` is replaced. Until `listen` is called, connecting is refused.

    Raises:
        OSError: EADDRINUSE when a live process is bound there, EEXIST when `path` is no socket; or
            as of bind(2). What was there is left alone then.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.path.abspath(check_path(path))
        check_path(self.path)
        self._pid = os.getpid()
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            with _directory_locked(self.path):
                _clear_stale(self.path)
                try:
                    self.socket.bind(self.path)
                except OSError as error:
                    raise OSError(error.errno, error.strerror, self.path) from None
                status = os.lstat(self.path)
        except BaseException:
            self.socket.close()
            raise
        self._file = status.st_dev, status.st_ino

    def listen(self) -> None:
        """Let others connect."""
        self.socket.listen(socket.SOMAXCONN)

    def close(self) -> None:
        """Close the socket, and remove `path` if it still leads to it; may be called twice.

        A forked child leaves the path to its parent.
        """
        if self.socket.fileno() < 0:
            return
        if os.getpid() == self._pid:
            with contextlib.suppress(FileNotFoundError):
                status = os.lstat(self.path)
                if (status.st_dev, status.st_ino) == self._file:
                    os.unlink(self.path)
        self.socket.close()

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _clear_stale(path: str) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise FileExistsError(
            errno.EEXIST, "exists and is no socket: remove it, or choose another path", path
        )
    if is_live(path):
        raise OSError(
            errno.EADDRINUSE,
            "another process listens here: stop it, or choose another path",
            path,
        )
    os.unlink(path)


@contextlib.contextmanager
def _directory_locked(path: str) -> Iterator[None]:
    """Keep two servers from replacing the same stale socket: the later would remove a live one.

    The lock is on the directory, so that no lock file is left behind. A directory that may not be
    read cannot be locked, and one that somebody keeps locked is not waited for: the worst is then
    the race of two servers that start at once.
    """
    with contextlib.ExitStack() as lock:
        with contextlib.suppress(PermissionError):
            lock.enter_context(locks.locked(os.path.dirname(path) or ".", _LOCK_SECONDS))
        yield


def ask(path: str | os.PathLike[str], timeout: float) -> dict[str, int]:
    """What a server of this package serves, without becoming its peer.

    Who connects from an abstract address that begins with ASK is told, in JSON, and not announced.

    Returns:
        protocol, vectors, size, page_size (bytes) and peers.

    Raises:
        ServerGone: this server does not answer questions. (It may have taken us for a peer.)
        TimeoutError, OSError: as of `connect`.
    """
    with connect(path, timeout, address=ASK + os.urandom(8).hex().encode()) as sock:
        sock.settimeout(timeout)
        data = b""
        try:
            while len(data) < 4096 and (more := sock.recv(4096)):
                data += more
        except TimeoutError:
            pass
    with contextlib.suppress(ValueError):
        answer = json.loads(data)
        if isinstance(answer, dict) and all(isinstance(v, int) for v in answer.values()):
            return answer
    raise ServerGone(f"{os.fspath(path)}: this server does not answer questions")


def only_asks(address: object) -> bool:
    """Whether an accepted connection comes from `ask`."""
    return isinstance(address, bytes) and address.startswith(ASK)


def connect(
    path: str | os.PathLike[str], timeout: float | None, *, address: bytes | None = None
) -> socket.socket:
    """A stream socket connected to `path`, from `address` if one is given.

    Raises:
        TimeoutError: the server did not make room in its backlog for `timeout` seconds (0: now).
        OSError: as of connect(2), with what to do where that is known.
    """
    text = check_path(path)
    deadline = None if timeout is None else time.monotonic() + min(timeout, _LONGEST)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if address is not None:
            sock.bind(address)
        sock.setblocking(timeout != 0)
        while True:
            if deadline is not None:
                # Only SO_SNDTIMEO limits the wait for a full backlog: a non-blocking connect fails
                # at once with EAGAIN, and poll cannot wait for it. Zero would mean for ever.
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
                    raise BlockingIOError from None
        sock.setblocking(True)
    except BlockingIOError:
        sock.close()
        raise accepts_nobody(text, timeout or 0) from None
    except OSError as error:
        sock.close()
        raise OSError(
            error.errno, _CONNECT_HINTS.get(error.errno or 0, error.strerror), text
        ) from None
    except BaseException:
        sock.close()
        raise
    return sock


def accepts_nobody(path: str, timeout: float) -> TimeoutError:
    """What to raise when a server's backlog was full for `timeout` seconds."""
    reason = f"the server accepts nobody: no answer in {timeout:g} seconds"
    return TimeoutError(errno.ETIMEDOUT, reason, path)


_CONNECT_HINTS = {
    errno.ENOENT: "no such socket: is the server running, and is this its path?",
    errno.ECONNREFUSED: "nobody listens here: start the server (ivshmem serve)",
    errno.EPROTOTYPE: "a socket of another kind: this is no ivshmem server",
    errno.EACCES: "permission denied: the server's user must let you write to its socket",
}


def credentials(sock: socket.socket) -> Credentials:
    """Who connected. A process that is gone, or hidden by another pid namespace, has no name."""
    pid, uid, gid = _UCRED.unpack(
        sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    )
    try:
        raw = Path(f"/proc/{pid}/comm").read_bytes()
    except OSError:
        raw = b""
    name = raw.decode(errors="replace").rstrip("\n")
    return Credentials(pid, uid, gid, "".join(c if c.isprintable() else "?" for c in name) or "?")
