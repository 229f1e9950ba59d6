"""How far a migration is, in a file that outlives who makes it.

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

from .model import MigrationError, Plan, Vm

_VERSION = 1
_MOST_BYTES = 1 << 24

Word = Literal["begin", "done", "undone"]


class State:
    """The plan, and how far it is: of each step the last word, "undone" if there was none.

    Made by `create` and `load`; a context manager that closes the file, and lets others have it.
    """

    def __init__(self, path: str, fd: int, plan: Plan) -> None:
        self.path = path
        self.plan = plan
        self.words: list[Word] = ["undone"] * len(plan.steps)
        self._fd = fd

    @classmethod
    def create(cls, path: str | os.PathLike[str], plan: Plan) -> State:
        """Begin a file.

        Raises:
            MigrationError: there is one: a migration was interrupted, or is under way.
            OSError: it cannot be written.
        """
        path = os.path.abspath(path)
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        first = f"{path}.{os.urandom(8).hex()}"
        fd = os.open(first, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            _append(fd, {"version": _VERSION, "plan": plan.to_json()})
            os.link(first, path)  # which fails if there is one
            _sync_directory(path)
        except FileExistsError:
            os.close(fd)
            raise MigrationError(
                f"{path}: a migration of these VMs was begun before: finish it with --resume, or"
                " undo it with --put-back; if those VMs are gone, remove the file"
            ) from None
        except BaseException:
            os.close(fd)
            raise
        finally:
            os.unlink(first)
        return cls(path, fd, plan)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> State:
        """Go on with a file.

        Raises:
            MigrationError: somebody else is at it, or it is no such file.
            OSError: it cannot be opened.
        """
        path = os.path.abspath(path)
        try:
            fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        except FileNotFoundError:
            raise _nothing(path) from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.fstat(fd).st_nlink:
                raise _nothing(path)  # somebody has just finished it
            state = cls._parse(path, fd)
        except BlockingIOError:
            os.close(fd)
            raise MigrationError(f"{path}: another process is at this migration") from None
        except BaseException:
            os.close(fd)
            raise
        return state

    @classmethod
    def _parse(cls, path: str, fd: int) -> State:
        data = os.pread(fd, _MOST_BYTES + 1, 0)
        if len(data) > _MOST_BYTES:
            raise MigrationError(f"{path}: this is no state of a migration: it is too long")
        whole, _, torn = data.rpartition(b"\n")
        try:
            first, *lines = [json.loads(line) for line in whole.split(b"\n")]
            if first["version"] != _VERSION:
                raise ValueError(f"version {first['version']}")
            state = cls(path, fd, Plan.from_json(first["plan"]))
            for line in lines:
                ((word, index),) = line.items()
                state._take(word, index)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise MigrationError(
                f"{path}: this is no state of a migration, or of another version"
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
        _append(self._fd, {word: index})

    @property
    def next(self) -> int:
        """The first step that is not done; how many there are, if all are."""
        return next((i for i, word in enumerate(self.words) if word != "done"), len(self.words))

    @property
    def arrived(self) -> bool:
        """Whether a VM has migrated: from then on there is no way back."""
        return any(
            step.kind == "migrate" and word == "done"
            for step, word in zip(self.plan.steps, self.words, strict=True)
        )

    def remove(self) -> None:
        """Nothing is left to be done."""
        os.unlink(self.path)

    def __enter__(self) -> State:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._fd)


def default_path(vms: Sequence[Vm]) -> str:
    """Where the state of these VMs' migration is, if nobody says otherwise."""
    sources = [os.path.abspath(vm.source) if "/" in vm.source else vm.source for vm in vms]
    key = "\n".join(sorted(sources))
    home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    name = hashlib.sha256(key.encode()).hexdigest()[:12]
    return os.path.join(home, "ivshmem", f"migration-{name}")


def _nothing(path: str) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, "no migration of these VMs is to be finished", path)


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


def _sync_directory(path: str) -> None:
    fd = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
