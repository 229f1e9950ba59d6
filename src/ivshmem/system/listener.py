"""A socket that listens at a path, without harm to others that use the path.

Knows: stale sockets, a socket's file and its permissions, sockets that another process passed on.
Does not know: what is said over a connection, who may become a peer.

Invariants:
1. A live server's socket is never removed, and never connected to just to see whether it lives.
2. Errors carry the path.
3. A socket's file has no more permissions at any moment than it is meant to have in the end.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import stat
from collections.abc import Callable, Iterable, Iterator

from ..native import descriptors
from . import locks
from .accounts import group_id, user_id
from .new_files import check_mode
from .sockets import check_path, is_live
from .uncopied import Uncopied

_NO_FILE = (0, 0)  # a device and inode that no socket has
_LOCK_SECONDS = 2.0  # how long another process may hold a directory's lock while it binds


class Listener(Uncopied):
    """A non-blocking stream socket bound to `path`, which it removes when it is closed.

    A stale socket at `path` is replaced. Until `listen` is called, connecting is refused.

    Args:
        mode: the permissions of the socket's file, 0 to 0o777. A process that may write to the file
            may connect. None: as the process's umask says.
        owner, group: of the file, by name or number; None: the process's.

    No process can connect before the file has mode, owner and group. umask(2) is not changed,
    because it belongs to the whole process.

    Attributes:
        path: absolute. An abstract address begins with "@"; "": the socket has no address.
        socket: the listening socket; the Listener closes it.
        unlinks: whether `close` removes the path.

    Raises:
        ValueError: the mode is out of range; or there is no such user or group.
        OSError: EADDRINUSE: a live process is bound there. EEXIST: `path` is not a socket. EPERM:
            the file cannot be given to that owner or group. Or as bind(2). A file that was there
            has not changed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        mode: int | None = None,
        owner: int | str | None = None,
        group: int | str | None = None,
    ) -> None:
        self.path = os.path.abspath(check_path(path))
        check_path(self.path)
        if mode is not None:
            check_mode(mode)
        uid = -1 if owner is None else user_id(owner)
        gid = -1 if group is None else group_id(group)
        self.unlinks = True
        self._pid = os.getpid()
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            if mode is not None:
                # bind(2) makes the file with the socket's own mode, less the umask; 0 admits
                # nobody, and is the same with every umask.
                os.fchmod(self.socket.fileno(), 0)
            with _directory_locked(self.path):
                _clear_stale(self.path)
                try:
                    self.socket.bind(self.path)
                except OSError as error:
                    raise OSError(error.errno, error.strerror, self.path) from None
                self._file = _permit(self.path, mode, uid, gid)
        except BaseException as error:
            if not isinstance(error, OSError):  # by a signal handler, perhaps right after bind(2)
                self._remove_bound()
            self.socket.close()
            raise

    def _remove_bound(self) -> None:
        """Remove the path if the socket has been bound to it, also if `_file` does not know yet."""
        with contextlib.suppress(OSError):
            if self.socket.getsockname() == self.path:
                status = os.lstat(self.path)
                if status.st_uid == os.geteuid():
                    _unlink_same(self.path, self._file or (status.st_dev, status.st_ino))

    @classmethod
    def adopt(
        cls,
        fd: int,
        *,
        unlink: bool = False,
        file: Iterable[int] | None = None,
        begin: bool = False,
    ) -> Listener:
        """Take over a listening socket, and own `fd`, also when this fails.

        It was inherited, from systemd for instance, or handed over by another server.

        Args:
            unlink: remove its path at the end; otherwise its creator does.
            file: what the former owner knew by that name, see `file`; None: what is there now.
            begin: listen on one that is bound and does not listen yet, because its former owner was
                killed in between.

        Raises:
            OSError: it is no listening Unix stream socket.
        """
        self = cls.__new__(cls)
        self._pid = os.getpid()
        self.socket = _adopted(fd, begin)
        self.path = path_of(self.socket)
        self.unlinks = unlink
        self._file = None if file is None else _pair(file)
        # A relative path would be one from the directory that another process was in.
        if file is None and os.path.isabs(self.path):
            self._file = _NO_FILE
            with contextlib.suppress(OSError):
                status = os.lstat(self.path)
                if stat.S_ISSOCK(status.st_mode):
                    self._file = status.st_dev, status.st_ino
        return self

    def permit(
        self,
        *,
        mode: int | None = None,
        owner: int | str | None = None,
        group: int | str | None = None,
    ) -> None:
        """Change the permissions of the socket's file; None: they stay.

        Raises:
            ValueError, OSError: as of making one.
        """
        if mode is not None:
            check_mode(mode)
        uid = -1 if owner is None else user_id(owner)
        gid = -1 if group is None else group_id(group)
        file = descriptors.FdArray()
        file.open(self.path, os.O_PATH | os.O_NOFOLLOW)
        try:
            status = os.fstat(file[0])
            if (status.st_dev, status.st_ino) != self._file:
                raise OSError(errno.ENOENT, "the socket is not there any more", self.path)
            if mode is not None:  # or else a new group would have the old mode for a moment
                _change(file[0], self.path, stat.S_IMODE(status.st_mode) & mode)
            _change(file[0], self.path, mode, uid, gid)
        finally:
            file.close()

    _file: tuple[int, int] | None = None  # what is removed in the end: (st_dev, st_ino)

    @property
    def file(self) -> tuple[int, int] | None:
        """The socket's file: st_dev and st_ino. None: it has none that is known.

        Somebody can have put another in its place, which is not to be touched.
        """
        return self._file

    def astray(self) -> str:
        """Say why nobody can connect by `path` any more; "": `path` leads to this socket.

        Also "" where the file is not known: an abstract address, or a relative path that was
        inherited. The file is this socket's if device and inode are the same: the kernel gives an
        inode's number to no other file while a socket is bound to it.
        """
        if self._file is None:
            return ""
        try:
            status = os.lstat(self.path)
        except FileNotFoundError:
            return "is gone"
        except OSError as error:
            return f"cannot be looked at ({error.strerror})"
        if not stat.S_ISSOCK(status.st_mode):
            return "leads to a file that is not a socket"
        if (status.st_dev, status.st_ino) != self._file:
            return "leads to another socket"
        # Our file, and a socket that is closed: a process was killed while it bound it again.
        try:
            return "" if is_live(self.path) else "is stale"
        except OSError:
            return ""  # it cannot ask: a socket that it was passed, and that others may connect to

    def bind_again(
        self,
        *,
        mode: int | None = None,
        owner: int | str | None = None,
        group: int | str | None = None,
        note: Callable[[], object] = lambda: None,
    ) -> None:
        """Bind a new listening socket to `path`, and replace this object's socket with it.

        Its descriptor keeps its number. (An epoll object has to be told: see Server.relisten.)

        Args:
            mode, owner, group: as for a new one.
            note: tells a successor what `file` is from now on. It is called before the new socket
                takes the old one's place: whenever this process is killed, the path is found to be
                stale, and never to be another's.

        Raises:
            BlockingIOError: somebody waits in the queue of the old socket; nothing has changed.
            OSError: EPERM, a service manager bound it; or as of making one. Nothing has changed.
        """
        if not self.unlinks:
            reason = "the process that bound it has to do that (restart its socket unit)"
            raise OSError(errno.EPERM, reason, self.path)
        waiting = select.poll()
        waiting.register(self.socket, select.POLLIN)
        if waiting.poll(0):
            raise BlockingIOError(errno.EAGAIN, "a connection waits in its backlog", self.path)
        former = self._file
        try:
            with Listener(self.path, mode=mode, owner=owner, group=group) as fresh:
                self._file = fresh.file
                note()
                os.dup2(fresh.socket.fileno(), self.socket.fileno(), inheritable=False)
                fresh.unlinks = False
        except BaseException:
            self._file = former
            raise
        self.listen()

    def listen(self) -> None:
        """Let others connect."""
        self.socket.listen(socket.SOMAXCONN)

    def close(self, *, unlink: bool | None = None) -> None:
        """Close the socket, and remove `path` if it still leads to it; may be called twice.

        A forked child leaves the path to its parent.

        Args:
            unlink: False: leave the path to whoever has the socket now. None: as `unlinks` says.
        """
        if self.socket.fileno() < 0:
            return
        if os.getpid() == self._pid and (self.unlinks if unlink is None else unlink):
            _unlink_same(self.path, self._file)
        self.socket.close()

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        # A signal handler can raise when it is made, and nobody has it yet: no stale path is left.
        with contextlib.suppress(AttributeError):  # it never had a socket
            self.close()


def _permit(path: str, mode: int | None, uid: int, gid: int) -> tuple[int, int]:
    """Give the socket that was bound to `path` just now its owner and mode: (st_dev, st_ino).

    By a descriptor of the file, for the path can lead elsewhere at the second look where others may
    write to the directory. They could also have put another file there before the first: so it is
    changed only if it is what bind(2) makes here.
    """
    if (mode, uid, gid) == (None, -1, -1):
        status = os.lstat(path)
        return status.st_dev, status.st_ino
    try:
        # O_PATH opens what cannot be opened, a socket.
        file = descriptors.FdArray()
        file.open(path, os.O_PATH | os.O_NOFOLLOW)
    except OSError:  # EMFILE
        os.unlink(path)
        raise
    try:
        fd = file[0]
        status = os.fstat(fd)
        found = status.st_dev, status.st_ino
        expected = stat.S_ISSOCK(status.st_mode) and status.st_uid == os.geteuid()
        if not expected or (mode is not None and status.st_mode & 0o777):
            raise OSError(
                errno.EBUSY,
                "another process replaced the socket: use a directory where only you may write",
                path,
            )
        try:
            _change(fd, path, mode, uid, gid)
        except OSError:
            _unlink_same(path, found)
            raise
    finally:
        file.close()
    return found


def _change(fd: int, path: str, mode: int | None, uid: int = -1, gid: int = -1) -> None:
    """Give the file at `path`, which `fd` is by O_PATH, its owner and mode; -1 and None: they stay.

    fchmod and fchown refuse such a descriptor; its name in /proc leads to the same file.
    """
    made = f"/proc/self/fd/{fd}"
    try:
        if (uid, gid) != (-1, -1):
            os.chown(made, uid, gid)
        if mode is not None:
            os.chmod(made, mode)
    except OSError as error:
        raise OSError(error.errno, _permit_hint(error, uid, gid), path) from None


def _permit_hint(error: OSError, uid: int, gid: int) -> str:
    if error.errno == errno.EPERM:
        return (
            f"the socket cannot be given to uid {uid}: only root can do that"
            if uid not in (-1, os.geteuid())
            else f"the socket cannot be given to gid {gid}: this process is not in that group"
        )
    if error.errno == errno.ENOENT:
        return "permissions are set by way of /proc, which is not mounted"
    return error.strerror or "permissions cannot be set"


def _adopted(fd: int, begin: bool) -> socket.socket:
    """The listening socket that `fd` is, or an error that says what else it is; `fd` is closed."""

    def refuse(code: int, what: str) -> OSError:
        return OSError(code, f"descriptor {fd} {what}: expected a listening Unix stream socket")

    try:
        sock = socket.socket(fileno=fd)
    except OSError as error:
        with contextlib.suppress(OSError):  # EBADF
            os.close(fd)
        what = "is not a socket" if error.errno == errno.ENOTSOCK else "is not open"
        raise refuse(error.errno or 0, what) from None
    try:
        if sock.family != socket.AF_UNIX:
            raise refuse(errno.EAFNOSUPPORT, "is a socket of another family")
        if sock.type != socket.SOCK_STREAM:
            raise refuse(errno.EPROTOTYPE, "is a Unix socket of another type")
        if begin:
            with contextlib.suppress(OSError):  # it is not bound, or is a connection
                sock.listen(socket.SOMAXCONN)
        if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise refuse(errno.EINVAL, "does not listen")
        sock.setblocking(False)
        sock.set_inheritable(False)
    except BaseException:
        sock.close()
        raise
    return sock


def _pair(numbers: Iterable[int]) -> tuple[int, int]:
    device, inode = numbers
    return device, inode


def path_of(sock: socket.socket) -> str:
    """The address of a bound socket: a path, "@name" for an abstract one, "" for none."""
    address = sock.getsockname()
    if isinstance(address, bytes):
        return "@" + address[1:].decode(errors="backslashreplace")
    return str(address)


def _unlink_same(path: str, file: tuple[int, int] | None) -> None:
    with contextlib.suppress(FileNotFoundError):
        status = os.lstat(path)
        # Also a socket: `file` can come from another process, which was wrong or lied.
        if (status.st_dev, status.st_ino) == file and stat.S_ISSOCK(status.st_mode):
            os.unlink(path)


def _clear_stale(path: str) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise FileExistsError(errno.EEXIST, "exists and is not a socket: choose another path", path)
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
