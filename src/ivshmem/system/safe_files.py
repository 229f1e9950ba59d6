"""Finds, opens and removes files safely in directories that other users can write.

Knows: whose links and files can be trusted, and that a path can lead elsewhere a moment later.
Does not know: what the files are for, or how a new file gets its name (new_files.py).

Trusted are root, the user of this process, and the users that a caller accepts. Nothing here relies
on fs.protected_symlinks or similar settings, because some distributions switch them off.

Invariants:
1. A path is walked once, by descriptors of its directories. The file that is checked is the file
   that is used.
2. A symbolic link is followed only if a trusted user made it.
3. Opening a file creates nothing, truncates nothing and waits for no other process. The caller gets
   the file only if its type, its owner and its hard links are right.
4. Each descriptor has an owner, an `FdArray`, from the system call on that makes it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat

from ..errors import WrongKind, WrongKindDirectory
from ..native import descriptors
from .accounts import user_id, user_name, user_option
from .uncopied import Uncopied

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import BinaryIO, SupportsIndex, TypeAlias

    # Users whose files are accepted, by name or number.
    Users: TypeAlias = Iterable[SupportsIndex | str]

# For callers that have no option to accept further users. Their messages name no such option.
NOBODY = None

_MOST_LINKS = 40  # in one path: the kernel's limit
_OVERFLOW = 65534  # the uid that a user namespace shows for every user that it does not map

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def kind_word(mode: int) -> str:
    """Return the kind of file that a mode from stat(2) says, for a message: "a FIFO"."""
    return _KINDS.get(stat.S_IFMT(mode), "a regular file")


def same_file(one: os.stat_result, other: os.stat_result) -> bool:
    """Whether two results of stat(2) are of one file. Names and times do not tell that."""
    return (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)


def unlink_same(name: str, status: os.stat_result, *, dir_fd: int | None = None) -> bool:
    """Remove a name if it is that of the file with this status; return whether it was removed.

    Raises:
        OSError: as of lstat(2) and unlink(2), except that the name is gone.
    """
    try:
        if not same_file(os.stat(name, dir_fd=dir_fd, follow_symlinks=False), status):
            return False
        os.unlink(name, dir_fd=dir_fd)
    except FileNotFoundError:
        return False
    return True


@contextlib.contextmanager
def closed_on_error(file: descriptors.FdArray) -> Iterator[descriptors.FdArray]:
    """Close a descriptor if the block fails: otherwise the exception's traceback keeps it open."""
    try:
        yield file
    except BaseException:
        file.close()
        raise


# -- places ---------------------------------------------------------------------------------------


class SafePlace(Uncopied):
    """A name in an open directory, to which a path led when `find` walked it. A context manager.

    Attributes:
        path: the path as the caller gave it, for messages only.
        name: a name in the directory `fd`. There need not be a file of that name.
        shared: whether users who are not trusted can make or replace names in the directory.
        by_link: whether the path's last name was a link. Then `name` is where the link leads.
        inherited: whether the path is /proc/self/fd/N, where /dev/stdout leads. This process was
            given that descriptor, so it does not matter who owns the file.
    """

    def __init__(
        self,
        path: str,
        directory: descriptors.FdArray,
        name: str,
        trusted: _Trusted,
        *,
        shared: bool,
        by_link: bool = False,
        inherited: bool = False,
    ) -> None:
        self._directory = directory
        self._trusted = trusted
        self.path = path
        self.name = name
        self.shared = shared
        self.by_link = by_link
        self.inherited = inherited

    @property
    def fd(self) -> int:
        """The directory's descriptor, which this object owns."""
        return self._directory[0]

    def status(self) -> os.stat_result | None:
        """Return lstat(2) of the name, or None if no file has it."""
        try:
            return os.stat(self.name, dir_fd=self.fd, follow_symlinks=self.inherited)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.path) from None

    def leads_to(self, fd: int) -> bool:
        """Whether the name is that of the open file `fd`, by device and inode."""
        found = self.status()
        return found is not None and same_file(found, os.fstat(fd))

    def open(
        self, flags: int, *, lone: bool = False, strict: bool = True, streams: bool = False
    ) -> descriptors.FdArray:
        """Open the file that has the name, if it can be trusted; return its descriptor.

        The call never creates or truncates a file, and does not wait for a FIFO.

        Args:
            flags: O_RDONLY, O_WRONLY or O_RDWR, and O_APPEND.
            lone: refuse a file with several hard links in any directory. False: refuse it only in a
                shared directory, where another user may have made the link.
            strict: refuse a file of another user in any directory. False: only in a shared one.
            streams: also accept a device, FIFO or socket.

        Raises:
            PermissionError: the owner is not trusted, or there are several hard links.
            WrongKind: it is not a regular file (EISDIR or EINVAL).
            OSError: as open(2), with the path.
        """
        flags |= os.O_NONBLOCK | os.O_NOCTTY
        if not self.inherited:
            flags |= os.O_NOFOLLOW
        file = descriptors.FdArray()
        try:
            file.open(self.name, flags, dir_fd=self.fd)
        except OSError as error:
            self._explain(error)
            raise OSError(error.errno, error.strerror, self.path) from None
        with closed_on_error(file):
            self.check(os.fstat(file[0]), lone=lone, strict=strict, streams=streams)
        return file

    def check(
        self,
        found: os.stat_result,
        *,
        lone: bool = False,
        strict: bool = True,
        streams: bool = False,
    ) -> None:
        """Check a file that has the name, as `open` does.

        Raises:
            OSError: as `open`.
        """
        if not stat.S_ISREG(found.st_mode) and not streams:
            raise self.wrong_kind(found.st_mode)
        if self.inherited:
            return
        if found.st_uid not in self._trusted.users and (strict or self.shared):
            raise self._trusted.refusal(self.path, found.st_uid, "it")
        if stat.S_ISREG(found.st_mode) and found.st_nlink > 1 and (lone or self.shared):
            raise PermissionError(
                errno.EPERM,
                f"it has {found.st_nlink} hard links, so another user may have put another file"
                " here: remove this name, or choose another path",
                self.path,
            )

    def _explain(self, error: OSError) -> None:
        """Raise a clearer error than open(2) did, if the kind of file is the cause."""
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            found = self.status()
            if found is not None and not stat.S_ISREG(found.st_mode):
                raise self.wrong_kind(found.st_mode) from None

    def wrong_kind(self, mode: int) -> WrongKind:
        """Return the error for a file that is not a regular one."""
        what = f"it is {kind_word(mode)}, not a regular file: choose another path"
        if stat.S_ISDIR(mode):
            return WrongKindDirectory(errno.EISDIR, what, self.path)
        return WrongKind(errno.EINVAL, what, self.path)

    def create(self, flags: int, mode: int) -> descriptors.FdArray:
        """Make an empty file with the name, and open it.

        Raises:
            FileExistsError: a file has the name, or a link that leads nowhere.
            OSError: as open(2), with the path.
        """
        file = descriptors.FdArray()
        try:
            file.open(self.name, flags | os.O_CREAT | os.O_EXCL, mode, dir_fd=self.fd)
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.path) from None
        return file

    def remove(self, fd: int) -> bool:
        """Remove the name if it leads to the open file `fd`; return whether it was removed."""
        try:
            return not self.inherited and unlink_same(self.name, os.fstat(fd), dir_fd=self.fd)
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.path) from None

    def sync(self) -> None:
        """Write the directory to the disk, if its file system can do that."""
        with contextlib.suppress(OSError):
            directory = descriptors.FdArray()
            directory.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=self.fd)
            os.fsync(directory[0])

    def close(self) -> None:
        """Close the directory. May be called twice."""
        self._directory.close()

    def __enter__(self) -> SafePlace:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def find(
    path: str | os.PathLike[str], *, accept: Users | None = NOBODY, links: bool = True
) -> SafePlace:
    """Walk a path to the directory of its last name. That name need not exist.

    A symbolic link is followed only if root, this process's user or an accepted user made it. So a
    link of another user, anywhere in the path, cannot lead to another file.

    Args:
        accept: further users who are trusted. NOBODY: the caller has no option for that.
        links: whether the last name may be a link.

    Raises:
        PermissionError: another user made a link.
        ValueError: `accept` names a user who does not exist.
        OSError: ELOOP: the last name is a link, and `links` is False; or as open(2).
    """
    given = os.fsdecode(path)
    trusted = _Trusted(accept)
    try:
        return _walk(given, trusted, links)
    except OSError as error:
        raise OSError(error.errno, error.strerror, given) from None


class _Trusted:
    """The users whose files and links are trusted."""

    def __init__(self, accept: Users | None) -> None:
        self.users = frozenset({0, os.geteuid(), *map(user_id, accept or ())})
        self._optional = accept is not NOBODY

    def with_directory(self, uid: int) -> bool:
        """Whether a directory of this user is trusted: also one of root of an outer namespace."""
        return uid in self.users or (uid == _OVERFLOW and _is_unmapped(uid))

    def check_link(self, link: os.stat_result, shared: bool) -> None:
        """Refuse a link that a user who is not trusted may have put there."""
        if not (link.st_uid in self.users or (not shared and self.with_directory(link.st_uid))):
            raise self.refusal(None, link.st_uid, "a symbolic link on the way")
        if shared and link.st_nlink > 1:  # any user can make a second name of root's link
            raise PermissionError(
                errno.EPERM,
                "a symbolic link on the way has several hard links, so another user may have put"
                " it there: give the path that it leads to",
            )

    def refusal(self, path: str | None, uid: int, what: str) -> PermissionError:
        """Return the error for a file or link of another user."""
        user = user_name(uid)
        way = (
            ", or if you trust that user,"
            f" --accept-owner {user_option(uid)} (accept_owner in Python and TOML)"
            if self._optional
            else ""
        )
        return PermissionError(
            errno.EPERM,
            f"{what} belongs to {user}, neither root nor this process's user: choose another"
            f" path{way}",
            path,
        )


def _walk(path: str, trusted: _Trusted, links: bool) -> SafePlace:
    if not path:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    here = _directory("/" if path.startswith("/") else ".", None)
    todo = _parts(path)
    followed = 0
    by_link = False
    while todo:
        name = todo.pop()
        above = os.fstat(here[0])
        shared = bool(above.st_mode & 0o022) or not trusted.with_directory(above.st_uid)
        child = descriptors.FdArray()
        try:
            child.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=here[0])
        except FileNotFoundError:
            if todo:
                raise
            return SafePlace(path, here, name, trusted, shared=shared, by_link=by_link)
        found = os.fstat(child[0])
        if stat.S_ISLNK(found.st_mode):
            followed += 1
            if followed > _MOST_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            by_link = by_link or not todo
            if not todo and not links:
                raise OSError(
                    errno.ELOOP,
                    "it is a symbolic link, which a POSIX name must not be: remove it, or name"
                    " the file that it leads to",
                )
            trusted.check_link(found, shared)
            if name.isdigit() and found.st_dev == os.stat("/proc").st_dev:
                # A link of /proc/PID/fd: its text need not be a path, so the kernel follows it.
                return SafePlace(path, here, name, trusted, shared=shared, inherited=True)
            text = os.readlink("", dir_fd=child[0])
            if text.startswith("/"):
                here = _directory("/", None)
            todo += _parts(text)
        elif todo:
            here = _directory(name, here[0])
        else:
            return SafePlace(path, here, name, trusted, shared=shared, by_link=by_link)
    return SafePlace(path, here, ".", trusted, shared=True)  # "/", "." or a link to one of them


def _parts(path: str) -> list[str]:
    """Return the names in a path, the last one first."""
    return [part for part in reversed(path.split("/")) if part not in ("", ".")]


def _directory(name: str, inside: int | None) -> descriptors.FdArray:
    """Open a directory that is not a link."""
    directory = descriptors.FdArray()
    where = {} if inside is None else {"dir_fd": inside}
    try:
        # Not O_PATH: it does not make autofs mount the file system.
        directory.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, **where)
    except PermissionError:
        directory.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, **where)
    return directory


def _is_unmapped(uid: int) -> bool:
    """Whether a uid stands for users outside this user namespace: user_namespaces(7)."""
    try:
        with open("/proc/self/uid_map") as lines:
            spans = [[int(number) for number in line.split()] for line in lines]
    except OSError:
        return False
    return not any(first <= uid < first + count for first, _, count in spans)


# -- reading --------------------------------------------------------------------------------------


@contextlib.contextmanager
def reading(path: str | os.PathLike[str], *, accept: Users | None = NOBODY) -> Iterator[BinaryIO]:
    """Open a regular file for reading while the block runs.

    In a directory that only trusted users can write, the file may belong to any user.

    Raises:
        OSError: as `find` and `SafePlace.open`.
    """
    with find(path, accept=accept) as place:
        file = place.open(os.O_RDONLY, strict=False)
    try:
        with open(file[0], "rb", closefd=False) as stream:
            yield stream
    finally:
        file.close()
