"""Internal: a new file that is written from its beginning, record by record.

Knows: bytes and offsets. Does not know: what a record is.

Invariant: whatever is written in one call, whole records, is in the file as a whole or not at all,
also on a full disk. (A process that is killed during a write can leave a part of it.)
"""

from __future__ import annotations

import contextlib
import errno
import os

from .uncopied import Uncopied

_TEXTS = {
    errno.EEXIST: "file exists: choose another path, or have it replaced",
    errno.ENOENT: "its directory does not exist: create that first, or choose another path",
    errno.EISDIR: "it is a directory: give a file in that directory",
}


class Sink(Uncopied):
    """A new file, with as much of a file's methods as a library of recordings needs.

    Args:
        path: of the file.
        replace: write over a file that is there.

    Raises:
        FileExistsError: there is one.
        OSError: it cannot be made. Each has the path, and a text that says what to do where the
            kernel's word alone would not.
    """

    def __init__(self, path: str, *, replace: bool = False) -> None:
        flags = os.O_TRUNC if replace else os.O_EXCL
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | flags, 0o666)
        except OSError as error:
            text = _TEXTS.get(error.errno or 0, error.strerror)
            raise OSError(error.errno, text, path) from None
        self._path = path
        self.offset = 0

    def write(self, data: bytes) -> int:
        """Append whole records.

        Raises:
            OSError: with the path; the file ends where it ended before.
        """
        rest = memoryview(data)
        try:
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
        """Close it, and remove the file: nothing was written that anybody wants."""
        self.close()
        with contextlib.suppress(OSError):  # another process has removed it
            os.unlink(self._path)

    def close(self) -> None:
        """Close it; may be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
