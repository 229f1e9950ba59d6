"""Files in directories that others can write: found, opened and removed safely.

Knows: whose links and files can be trusted, and that a path may lead elsewhere a moment later.
Does not know: what the files are for, or how a new one gets its name (new_files.py).

Trusted are root, the user of this process, and the users that a caller accepts. Nothing here rests
on fs.protected_symlinks and its like: some distributions switch them off.

Invariants:
1. A path is walked once, by descriptors of its directories. What was checked is what is used.
2. A symbolic link is followed only if a trusted user made it.
3. Opening a file creates nothing, truncates nothing and waits for nobody. The caller gets the file
   only when its type, its owner and its hard links are right.
4. Each descriptor has an owner from the system call on that makes it: an `FdArray`.
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

# What a caller says who has no option to accept users with, so that no message names one.
NOBODY = None

_MOST_LINKS = 40  # on the way to one file, as in the kernel
_OVERFLOW = 65534  # what a user namespace shows for every user that it does not map

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def kind_word(mode: int) -> str:
    """What a mode from stat(2) says, for a message: "a FIFO"."""
    return _KINDS.get(stat.S_IFMT(mode), "a regular file")


def same_file(one: os.stat_result, other: os.stat_result) -> bool:
    """Whether two results of stat(2) are of one file: names and times say nothing about that."""
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
    """Close a descriptor if the block fails. (If not, the exception's traceback keeps it open.)"""
    try:
        yield file
    except BaseException:
        file.close()
        raise


# -- places ---------------------------------------------------------------------------------------


class Place(Uncopied):
    """A name in an open directory: what a path led to when `find` walked it. A context manager.

    Attributes:
        path: as it was given; for messages only.
        name: in the directory `fd`. Nothing need have that name.
        shared: whether users who are not trusted can make or replace names in the directory.
        by_link: whether the path's own last name was a link, and `name` is what it leads to.
        inherited: the path is /proc/self/fd/N, which /dev/stdout leads to: the descriptor was
            given to us, so nobody's ownership is asked for.
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
        """The directory's descriptor, still owned by this object."""
        return self._directory[0]

    def status(self) -> os.stat_result | None:
        """What has the name now, by lstat(2); None: nothing has it."""
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
        """Open the file that has the name, if it can be trusted; its only descriptor is returned.

        It is never created or truncated, and a FIFO is not waited for.

        Args:
            flags: O_RDONLY, O_WRONLY or O_RDWR, and O_APPEND.
            lone: refuse a file with several hard links anywhere; else only in a shared directory,
                where another user may have made the link.
            strict: refuse a file of another user anywhere; else only in a shared directory.
            streams: take a device, FIFO or socket, too.

        Raises:
            PermissionError: the owner is not trusted, or there are several hard links.
            WrongKind: it is not a regular file (EISDIR or EINVAL).
            OSError: as of open(2), with the path.
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
        """Judge a file that has the name, as `open` does.

        Raises:
            OSError: as of `open`.
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
        """Raise something better than what open(2) said, if its cause is the kind of file."""
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            found = self.status()
            if found is not None and not stat.S_ISREG(found.st_mode):
                raise self.wrong_kind(found.st_mode) from None

    def wrong_kind(self, mode: int) -> WrongKind:
        """The error for what is not a regular file."""
        what = f"it is {kind_word(mode)}, not a regular file: choose another path"
        if stat.S_ISDIR(mode):
            return WrongKindDirectory(errno.EISDIR, what, self.path)
        return WrongKind(errno.EINVAL, what, self.path)

    def create(self, flags: int, mode: int) -> descriptors.FdArray:
        """Make an empty file that has the name, and open it.

        Raises:
            FileExistsError: something has the name; a link that leads nowhere, too.
            OSError: as of open(2), with the path.
        """
        file = descriptors.FdArray()
        try:
            file.open(self.name, flags | os.O_CREAT | os.O_EXCL, mode, dir_fd=self.fd)
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.path) from None
        return file

    def remove(self, fd: int) -> bool:
        """Remove the name if it is that of the open file `fd`; else return False."""
        try:
            return not self.inherited and unlink_same(self.name, os.fstat(fd), dir_fd=self.fd)
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.path) from None

    def sync(self) -> None:
        """Have the directory on the disk; some file systems cannot be asked that."""
        with contextlib.suppress(OSError):
            directory = descriptors.FdArray()
            directory.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=self.fd)
            os.fsync(directory[0])

    def close(self) -> None:
        """Close the directory; may be called twice."""
        self._directory.close()

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def find(
    path: str | os.PathLike[str], *, accept: Users | None = NOBODY, links: bool = True
) -> Place:
    """Walk a path to the directory that its last name is in; that name need not exist.

    A symbolic link is followed if root, this process's user or an accepted user made it. So a link
    that another user put somewhere on the way leads nobody to another file.

    Args:
        accept: users who are trusted like ourselves; NOBODY: the caller cannot be told any.
        links: whether the last name may be a link.

    Raises:
        PermissionError: a link is another user's.
        ValueError: `accept` names a user who does not exist.
        OSError: ELOOP, the last name is a link and must not be; or as of open(2).
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
        """Whether a user is trusted with a directory: also the root of the namespaces above."""
        return uid in self.users or (uid == _OVERFLOW and _is_unmapped(uid))

    def check_link(self, link: os.stat_result, shared: bool) -> None:
        """Refuse a link that somebody may have put there who is not trusted."""
        if not (link.st_uid in self.users or (not shared and self.with_directory(link.st_uid))):
            raise self.refusal(None, link.st_uid, "a symbolic link on the way")
        if shared and link.st_nlink > 1:  # a second name of root's link, made by anybody
            raise PermissionError(
                errno.EPERM,
                "a symbolic link on the way has several hard links, so another user may have put"
                " it there: give the path that it leads to",
            )

    def refusal(self, path: str | None, uid: int, what: str) -> PermissionError:
        """The error for what is another user's."""
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


def _walk(path: str, trusted: _Trusted, links: bool) -> Place:
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
            return Place(path, here, name, trusted, shared=shared, by_link=by_link)
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
                # Its text is no path, so the kernel has to follow it.
                return Place(path, here, name, trusted, shared=shared, inherited=True)
            text = os.readlink("", dir_fd=child[0])
            if text.startswith("/"):
                here = _directory("/", None)
            todo += _parts(text)
        elif todo:
            here = _directory(name, here[0])
        else:
            return Place(path, here, name, trusted, shared=shared, by_link=by_link)
    return Place(path, here, ".", trusted, shared=True)  # "/", "." or a link to one of them


def _parts(path: str) -> list[str]:
    """The names in a path, the last one first."""
    return [part for part in reversed(path.split("/")) if part not in ("", ".")]


def _directory(name: str, inside: int | None) -> descriptors.FdArray:
    """Open a directory that is not a link."""
    directory = descriptors.FdArray()
    where = {} if inside is None else {"dir_fd": inside}
    try:
        # O_RDONLY, since O_PATH does not mount what autofs has there.
        directory.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, **where)
    except PermissionError:
        directory.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, **where)
    return directory


def _is_unmapped(uid: int) -> bool:
    """Whether a uid stands for users outside of this user namespace; user_namespaces(7)."""
    try:
        with open("/proc/self/uid_map") as lines:
            spans = [[int(number) for number in line.split()] for line in lines]
    except OSError:
        return False
    return not any(first <= uid < first + count for first, _, count in spans)


# -- reading --------------------------------------------------------------------------------------


@contextlib.contextmanager
def reading(path: str | os.PathLike[str], *, accept: Users | None = NOBODY) -> Iterator[BinaryIO]:
    """A regular file, open for reading while the block runs.

    In a directory that only trusted users can write, it may be anybody's.

    Raises:
        OSError: as of `find` and `Place.open`.
    """
    with find(path, accept=accept) as place:
        file = place.open(os.O_RDONLY, strict=False)
    try:
        with open(file[0], "rb", closefd=False) as stream:
            yield stream
    finally:
        file.close()
