"""Where a server's socket is if no path is given: in a place where only its user can put one.

Knows: runtime directories, which users may write to them, whose sockets can be trusted. Does not
know: what is sent over a socket.

    root        /run/ivshmem.sock
    others      $XDG_RUNTIME_DIR/ivshmem.sock
    without it  /tmp/ivshmem-UID/ivshmem.sock, in a directory of mode 0700 that the server makes

A command that needs a server looks there, then at root's place, and last at /tmp/ivshmem_socket,
where QEMU's example server and `ivshmem-server` listen.

Invariants:
1. A path from here is in a directory where only its user and root can write. Or it is
   /tmp/ivshmem_socket, in a sticky directory, and belongs to the caller or to root.
2. Only the directory of a server that is about to listen there is created, and nothing else.

*Rejected:* /run/ivshmem for root: ivshmem.service gives that directory to its own user, and removes
it when it stops.
"""

from __future__ import annotations

import errno
import os
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

NAME = "ivshmem.sock"
OF_ROOT = "/run/ivshmem.sock"
# The example server's path, so that programs written for it find `ivshmem-server`.
OF_THE_EXAMPLE = "/tmp/ivshmem_socket"  # noqa: S108

_OWN_PARENT = "/tmp"  # noqa: S108
_LONGEST_NAME = len("/ivshmem.sock.control")


def default_socket() -> str:
    """Return the path where this user's server listens; make our own directory if needed.

    Raises:
        OSError: the directory belongs to another user, or others may write to it.
    """
    for directory in _given():
        if not _unsafe(directory) and os.access(directory, os.W_OK | os.X_OK):
            return os.path.join(directory, NAME)
    return os.path.join(_made(), NAME)


def expected_socket() -> str:
    """Return the path of a server that runs, or else the one where this user's would listen.

    Nothing is created.
    """
    try:
        return find_socket()
    except OSError:
        given = (d for d in _given() if not _unsafe(d) and os.access(d, os.W_OK | os.X_OK))
        return os.path.join(next(given, _own()), NAME)


def find_socket() -> str:
    """Return the path of the server that runs, if no path was given.

    Raises:
        FileNotFoundError: no server runs; the message lists the places that were looked at.
    """
    looked = []
    for path in _places():
        what = _fault(path)
        if not what:
            return path
        looked.append(f"{path} ({what})")
    raise FileNotFoundError(
        errno.ENOENT,
        f"no server was found; looked at {', '.join(looked)}: start one (ivshmem serve), or give"
        " -S PATH",
    )


# -- places ----------------------------------------------------------------------------------------


def _given() -> Iterator[str]:
    """Directories that the system made for this user."""
    if os.geteuid() == 0:
        yield os.path.dirname(OF_ROOT)
        return
    found = os.environ.get("XDG_RUNTIME_DIR", "")
    # Here: a program that needs only the names above does not load the sockets.
    from ..system.sockets import MAX_PATH

    short = len(os.fsencode(found)) <= MAX_PATH - _LONGEST_NAME
    if os.path.isabs(found) and short:
        yield found


def _own() -> str:
    return os.path.join(_OWN_PARENT, f"ivshmem-{os.geteuid()}")


def _places() -> Iterator[str]:
    """Yield where a server may be, the likeliest place first."""
    for directory in (*_given(), _own()):
        yield os.path.join(directory, NAME)
    if os.geteuid() != 0:
        yield OF_ROOT
    yield OF_THE_EXAMPLE


# -- which are trusted -----------------------------------------------------------------------------


def _fault(path: str) -> str:
    """Say why no server is asked at this path; "": a server that can be trusted listens there."""
    directory = os.path.dirname(path)
    try:
        status = os.lstat(path)
        if path == OF_THE_EXAMPLE:
            trouble = _not_sticky(directory) or _of_another(status, own_only=False)
            if trouble:
                return f"{trouble}: -S {path} uses it nevertheless"
        elif trouble := _unsafe(directory):
            return f"its directory {trouble}"
        if not stat.S_ISSOCK(status.st_mode):
            return "not a socket"
        from ..system import sockets  # here: an option needs none of it

        return "" if sockets.is_live(path) else "stale: nobody listens"
    except FileNotFoundError:
        return "not there"
    except OSError as error:
        return (error.strerror or str(error)).lower()


def _unsafe(directory: str) -> str:
    """Say why sockets in this directory cannot be trusted; "": they can."""
    try:
        status = os.lstat(directory)
    except OSError as error:
        return f"cannot be looked at ({(error.strerror or str(error)).lower()})"
    if not stat.S_ISDIR(status.st_mode):
        return "is not a directory" if not stat.S_ISLNK(status.st_mode) else "is a symbolic link"
    if whose := _of_another(status, own_only=directory == _own()):
        return whose
    if status.st_mode & 0o022:
        return f"has mode {stat.S_IMODE(status.st_mode):04o}: others may write to it"
    return _not_sticky(os.path.dirname(directory)) if directory == _own() else ""


def _of_another(status: os.stat_result, *, own_only: bool) -> str:
    """Say whose a file is if it belongs to neither this user nor root; "": it does."""
    trusted = {os.geteuid()} if own_only else {os.geteuid(), 0}
    if status.st_uid in trusted:
        return ""
    from ..system.accounts import user_name  # here: few paths are refused

    return f"belongs to {user_name(status.st_uid)}"


def _not_sticky(directory: str) -> str:
    """Say why others could rename what is in this directory; "": they cannot."""
    status = os.lstat(directory)
    if status.st_uid in {0, os.geteuid()} and (
        not status.st_mode & 0o022 or status.st_mode & stat.S_ISVTX
    ):
        return ""
    return f"is in {directory}, where others may rename it"


def _made() -> str:
    """Return our own directory under /tmp; make it if it is not there.

    Raises:
        OSError: something else is there, and it is left alone.
    """
    directory = _own()
    try:
        os.mkdir(directory, 0o700)
        os.chmod(directory, 0o700)  # whatever the umask took away
    except FileExistsError:
        pass  # the check below tells whether it is ours
    if trouble := _unsafe(directory):
        remedy = (
            f"chmod 700 {directory}"
            if trouble.startswith("has mode")
            else "give -S PATH, or set XDG_RUNTIME_DIR to a directory of yours"
        )
        raise OSError(
            errno.EPERM, f"{trouble}: a server's socket is not safe there: {remedy}", directory
        )
    return directory
