"""New files in directories that others can write: whole before they have their name.

Knows: files without a name (O_TMPFILE), drafts beside the target where there are none, and how
either gets a name in one step. Does not know: what the files are for.

Invariants:
1. A file has its final name only when it is whole. Until then it has none, or, where the file
   system knows no files without names, one that only drafts use.
2. An error or an exception at any moment removes what has not been published. What a killed
   process left under a draft's name, the next draft for the same path removes.
3. What another user put at a draft's name is not opened, changed or removed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat

from ..native import descriptors
from . import safe_files
from .uncopied import Uncopied

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_DRAFTS = 3  # names that the drafts of a path try before they take one by chance

# Errors that say "not on this file system", not "not here" or "not you".
_UNSUPPORTED = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EPERM, errno.EISDIR})


def check_mode(mode: int) -> None:
    """Raise if these are not the permissions of a file, 0 to 0o777.

    Raises:
        ValueError: a number that is not allowed.
        TypeError: no number; for instance text, as a command line has it.
    """
    if not isinstance(mode, int):
        raise TypeError(f"mode: expected a number, for example 0o660, not {mode!r}")
    if not 0 <= mode <= 0o777:
        raise ValueError(f"mode {mode:#o}: 0 to 0o777 are allowed, for example 0o660")


class NewFile(Uncopied):
    """A new, empty file that gets its name when it is whole. A context manager.

    The block's end, and an exception at any moment, remove what has not been published. If the
    process is killed, the kernel does, since the file has no name (O_TMPFILE). On a file system
    that lacks that, the file has a name beside the target and a lock (flock), and the next draft
    for the same target removes it.

    Args:
        where: its path, or a place, which stays the caller's to close.
        flags, mode: as for open(2); the mode less the umask.

    Attributes:
        place: where it is to be.
        file: its descriptor, which the caller may keep after the block if it was published.
        published: whether it has its name.
        replaced: whether `publish` took the name from another file, or was about to.
    """

    _name: str | None = None  # what it is called, if it must have a name
    _status: os.stat_result | None = None  # of the file, also when the caller has closed it
    _claiming = False  # whether an interrupted `publish` may have given it the target's free name

    def __init__(
        self,
        where: str | os.PathLike[str] | safe_files.SafePlace,
        flags: int = os.O_RDWR,
        mode: int = 0o600,
    ) -> None:
        self.published = False
        self.replaced = False
        self.file = descriptors.FdArray()
        self._given = isinstance(where, safe_files.SafePlace)
        self.place = where if isinstance(where, safe_files.SafePlace) else safe_files.find(where)
        if self.place.inherited:
            reason = "it is a descriptor of this process, which cannot be replaced: name a file"
            raise FileExistsError(errno.EEXIST, reason, self.place.path)
        if self.place.name in (".", ".."):
            raise self.place.wrong_kind(stat.S_IFDIR)
        try:
            self._open(flags, mode)
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.place.path) from None

    def _open(self, flags: int, mode: int) -> None:
        try:
            self.file.open(".", flags | os.O_TMPFILE, mode, dir_fd=self.place.fd)
            # Before the file has a name: what has one and no lock was left behind.
            self._lock()
            return
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
        for name in self._names():
            self._name = name
            self.file = descriptors.FdArray()
            try:
                self.file.open(name, flags | os.O_CREAT | os.O_EXCL, mode, dir_fd=self.place.fd)
            except FileExistsError:
                continue
            self._lock()
            self._status = os.fstat(self.file[0])
            if self._has(name, self._status):
                return
            # Another draft took ours for one that was left behind, in the moment before the lock.

    def _lock(self) -> None:
        with contextlib.suppress(OSError):  # a file system without locks: nobody sweeps there
            fcntl.flock(self.file[0], fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _names(self) -> Iterator[str]:
        """Names for it, beside the target; first those that the drafts before us may have left."""
        stem = os.fsdecode(os.fsencode(self.place.name)[:200])
        for number in range(_DRAFTS):
            name = f".{stem}.ivshmem-{number}"
            self._sweep(name)
            yield name
        while True:
            yield f".{stem}.ivshmem-{os.urandom(8).hex()}"

    def _sweep(self, name: str) -> None:
        """Remove a draft whose maker was killed: one of ours that nobody has locked."""
        left = descriptors.FdArray()
        with contextlib.suppress(OSError):
            left.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=self.place.fd)
            found = os.fstat(left[0])
            if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid():
                fcntl.flock(left[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._has(name, found):
                    os.unlink(name, dir_fd=self.place.fd)
        left.close()

    def _has(self, name: str, file: os.stat_result) -> bool:
        """Whether `name`, beside the target, is that of this file."""
        try:
            found = os.stat(name, dir_fd=self.place.fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return safe_files.same_file(found, file)

    def publish(self, *, replace: bool = False, keep_lock: bool = False) -> None:
        """Give the file its name, in one step: nobody ever finds half of it, or nothing.

        Args:
            replace: take the name from the file that has it; else that is an error.
            keep_lock: leave the file locked by flock(2), as a draft is.

        Raises:
            FileExistsError: something has the name and `replace` is false; the draft stays.
            OSError: as of linkat(2) or rename(2), with the path.
        """
        try:
            self._publish(replace)
        except OSError as error:
            self._claiming = False
            raise OSError(error.errno, error.strerror, self.place.path) from None
        self.published = True
        if not keep_lock:
            with contextlib.suppress(OSError):
                fcntl.flock(self.file[0], fcntl.LOCK_UN)

    def _publish(self, replace: bool) -> None:
        place = self.place
        if self._name is None:
            self._claiming = True
            try:
                self._link(place.name)
                return
            except FileExistsError:
                if not replace:
                    raise
                self._claiming = False
        name = self._name or self._linked()
        self._claiming = not replace
        if replace:
            self.replaced = True
            os.replace(name, place.name, src_dir_fd=place.fd, dst_dir_fd=place.fd)
        else:
            self._rename_exclusive(name)
        self._name = None

    def _linked(self) -> str:
        """Give a file without a name one beside the target, from which it can replace that."""
        for name in self._names():
            self._name = name
            with contextlib.suppress(FileExistsError):
                self._link(name)
                return name
        raise AssertionError

    def _link(self, name: str) -> None:
        # With `dst_dir_fd` Python follows the link in /proc, without it does not.
        os.link(f"/proc/self/fd/{self.file[0]}", name, dst_dir_fd=self.place.fd)

    def _rename_exclusive(self, name: str) -> None:
        """Rename the draft unless something has the target's name; not all file systems can."""
        place = self.place
        try:
            descriptors.rename_exclusive(place.fd, name, place.name)
            return
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
        try:
            os.link(name, place.name, src_dir_fd=place.fd, dst_dir_fd=place.fd)
            os.unlink(name, dir_fd=place.fd)
            return
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
        # An empty file of ours first. To those who meet it, 0 bytes mean "not made yet".
        place.create(os.O_WRONLY, 0o600).close()
        os.replace(name, place.name, src_dir_fd=place.fd, dst_dir_fd=place.fd)

    def publish_nameless(self) -> None:
        """Leave the file to the caller; it will never have a name."""
        if self._name is not None:
            os.unlink(self._name, dir_fd=self.place.fd)
            self._name = None
        self.published = True

    def close(self) -> None:
        """Remove it, unless it was published; may be called twice."""
        try:
            if not self.published:
                status = os.fstat(self.file[0]) if len(self.file) else self._status
                if self._name is not None and status and self._has(self._name, status):
                    os.unlink(self._name, dir_fd=self.place.fd)
                if self._claiming and len(self.file):
                    self.place.remove(self.file[0])
            self._name = None
        finally:
            if not self.published:
                self.file.close()
            if not self._given:
                self.place.close()

    def __enter__(self) -> NewFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # __init__ did not come so far
            self.close()
