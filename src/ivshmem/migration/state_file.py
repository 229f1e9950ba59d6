"""Internal: how far a migration is, in a file that outlives who makes it.

Knows: the file's form, that two processes must not work at once. Does not know: what steps do.

The first line is the plan; each further one says that a step begins, is done, or is undone. They
are only ever appended, and a last line without its end was never written.

Invariants:
1. What was begun stands in the file, on disk, before anything is done.
2. The plan is there whole, or the file is not there.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Sequence
from typing import Literal, get_args

from ..errors import MigrationError
from ..native import descriptors
from ..system import new_files, safe_files
from ..system.uncopied import Uncopied
from .model import Plan, Vm

_VERSION = 1
_MOST_BYTES = 1 << 24

Word = Literal["begin", "done", "undone"]


class StateFile(Uncopied):
    """The plan, and how far it is: of each step the last word, "undone" if there was none.

    Made by `create` and `load`; a context manager that closes the file, and lets others have it.
    """

    def __init__(self, path: str, file: descriptors.FdArray, plan: Plan) -> None:
        self.path = path
        self.plan = plan
        self.words: list[Word] = ["undone"] * len(plan.steps)
        self._file = file

    @classmethod
    def create(cls, path: str | os.PathLike[str], plan: Plan) -> StateFile:
        """Begin a file.

        Raises:
            MigrationError: there is one: a migration was interrupted, or is under way.
            OSError: it cannot be written.
        """
        path = os.path.abspath(path)
        try:
            place = safe_files.find(path)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            place = safe_files.find(path)
        with place, new_files.NewFile(place, os.O_RDWR | os.O_APPEND) as draft:
            _append(draft.file[0], {"version": _VERSION, "plan": plan._to_json()})
            try:
                draft.publish(keep_lock=True)
            except FileExistsError:
                raise MigrationError(
                    f"{path}: an earlier migration of these VMs is unfinished: finish it with"
                    " --resume, or undo it with --put-back; if those VMs no longer exist, remove"
                    " the file"
                ) from None
            draft.place.sync()
            return cls(path, draft.file, plan)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> StateFile:
        """Go on with a file.

        Raises:
            MigrationError: another process works on it, or it is not such a file.
            OSError: it cannot be opened.
        """
        path = os.path.abspath(path)
        try:
            with safe_files.find(path) as place:
                file = place.open(os.O_RDWR | os.O_APPEND, lone=True)
        except FileNotFoundError:
            raise _nothing(path) from None
        with safe_files.closed_on_error(file):
            try:
                fcntl.flock(file[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise MigrationError(
                    f"{path}: another process works on this migration: wait until it ends"
                ) from None
            if not os.fstat(file[0]).st_nlink:
                raise _nothing(path)  # another process has just finished it
            return cls._parse(path, file)

    @classmethod
    def _parse(cls, path: str, file: descriptors.FdArray) -> StateFile:
        fd = file[0]
        data = os.pread(fd, _MOST_BYTES + 1, 0)
        if len(data) > _MOST_BYTES:
            raise MigrationError(f"{path}: not the state of a migration: the file is too long")
        whole, _, torn = data.rpartition(b"\n")
        try:
            first, *lines = [json.loads(line) for line in whole.split(b"\n")]
            if first["version"] != _VERSION:
                raise ValueError(f"version {first['version']}")
            state = cls(path, file, Plan._from_json(first["plan"]))
            for line in lines:
                ((word, index),) = line.items()
                state._take(word, index)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise MigrationError(
                f"{path}: not the state of a migration, or one of another version"
                f" ({' '.join(str(error).split())[:100]})"
            ) from None
        if torn:  # not before: the file could be anything
            os.ftruncate(fd, len(data) - len(torn))
        return state

    def _take(self, word: Word, index: int) -> None:
        if not 0 <= index < len(self.words) or word not in get_args(Word):
            raise ValueError(f"{word} {index}")
        self.words[index] = word

    def note(self, word: Word, index: int) -> None:
        """Write down that a step begins, is done or was undone; known here even if that fails."""
        self._take(word, index)
        _append(self._file[0], {word: index})

    @property
    def next(self) -> int:
        """The first step that is not done; how many there are, if all are."""
        return next((i for i, word in enumerate(self.words) if word != "done"), len(self.words))

    @property
    def arrived(self) -> bool:
        """Whether a VM has migrated: from then on the migration cannot be undone."""
        return any(
            step.kind == "migrate" and word == "done"
            for step, word in zip(self.plan.steps, self.words, strict=True)
        )

    def remove(self) -> None:
        """Nothing is left to be done."""
        with safe_files.find(self.path) as place:
            place.remove(self._file[0])

    def __enter__(self) -> StateFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def default_path(vms: Sequence[Vm]) -> str:
    """Return the default path for the state of these VMs' migration."""
    sources = [os.path.abspath(vm.source) if "/" in vm.source else vm.source for vm in vms]
    key = "\n".join(sorted(sources))
    home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    name = hashlib.sha256(key.encode()).hexdigest()[:12]
    return os.path.join(home, "ivshmem", f"migration-{name}")


def _nothing(path: str) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, "no unfinished migration of these VMs", path)


def _append(fd: int, line: object) -> None:
    data = json.dumps(line, separators=(",", ":")).encode() + b"\n"
    before = os.fstat(fd).st_size
    try:
        if os.write(fd, data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(fd)
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(fd, before)
        raise
