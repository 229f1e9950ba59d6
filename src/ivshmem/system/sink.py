"""Internal: a new file that is written from its beginning, record by record.

Knows: bytes and offsets. Does not know: what a record is.

Invariant: whatever is written in one call, whole records, is in the file as a whole or not at all,
also on a full disk. (A process that is killed during a write can leave a part of it.)
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat

from .uncopied import Uncopied

_IRREGULAR = "it is not a regular file: choose another path"
_TEXTS = {
    errno.EEXIST: "file exists: choose another path, or have it replaced",
    errno.ENOENT: "its directory does not exist: create that first, or choose another path",
    errno.EISDIR: "it is a directory: give a file in that directory",
    errno.ENXIO: _IRREGULAR,  # a FIFO that nobody reads
    errno.EAGAIN: "another process writes it: choose another path",
}
# To open a FIFO or a device must not wait: no signal would end that.
_FLAGS = os.O_WRONLY | os.O_CLOEXEC | os.O_NONBLOCK


class Sink(Uncopied):
    """A new file, with as much of a file's methods as a library of recordings needs.

    Args:
        path: of the file.
        replace: write over a file that is there, if it is a regular one that no other Sink writes.
            It changes with the first `write`.

    Raises:
        FileExistsError: there is one.
        OSError: it cannot be made, and a file that was there has not changed. Each has the path,
            and a text that says what to do where the kernel's word alone would not.
    """

    def __init__(self, path: str, *, replace: bool = False) -> None:
        try:
            self._fd, self._made = _opened(path, replace)
        except OSError as error:
            text = _TEXTS.get(error.errno or 0, error.strerror)
            raise OSError(error.errno, text, path) from None
        self._path = path
        self.offset = 0
        self._emptied = self._made

    def write(self, data: bytes) -> int:
        """Append whole records.

        Raises:
            OSError: with the path; the file ends where it ended before.
        """
        rest = memoryview(data)
        try:
            if not self._emptied:
                os.ftruncate(self._fd, 0)
                self._emptied = True
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except OSError as error:
            with contextlib.suppress(OSError):  # what cannot be cut off is for readers to skip
                os.ftruncate(self._fd, self.offset)
                os.lseek(self._fd, self.offset, os.SEEK_SET)
            raise OSError(error.errno, error.strerror, self._path) from None
        self.offset += len(data)
        return len(data)

    def tell(self) -> int:
        """Return the number of bytes written."""
        return self.offset

    def flush(self) -> None:
        """Do nothing: nothing is kept here."""

    def remove(self) -> None:
        """Close it: nothing was written that anybody wants. A file that it made is removed."""
        self.close()
        if self._made:
            with contextlib.suppress(OSError):  # another process has removed it
                os.unlink(self._path)

    def close(self) -> None:
        """Close it; may be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _opened(path: str, replace: bool) -> tuple[int, bool]:
    """A descriptor of the file, and whether the file is new."""
    made = True
    try:
        fd = os.open(path, _FLAGS | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        if not replace:
            raise
        fd, made = os.open(path, _FLAGS), False
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.ENXIO, _IRREGULAR)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(fd)
        raise
    return fd, made
