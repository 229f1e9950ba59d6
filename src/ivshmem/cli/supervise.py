"""`ivshmem serve --supervise`: the small process that a server's children have above them.

Knows: what the children share beside descriptors. Does not know: how anything is served; this
process imports nothing of that, so that it needs hardly more memory than the interpreter itself.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from functools import partial

from .. import _fds, keeper
from . import daemon, guarded

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

_ORPHANED = "the parent was gone"


_RESERVE = range(8, 40, 4)  # where the numbers of descriptors stand in the shared page

# Variables by which a service manager says which process it means: this one, thus its children.
_MEANT = ("LISTEN_PID", "WATCHDOG_PID")


class Kept:
    """What a child has of its parent.

    Attributes:
        fd: of the journal of all children, a file in memory.
        parent: its pid.
        known: descriptors that it had before there was a child; all others are children's.
        heir: this parent took the place of one that was killed.
    """

    def __init__(self, fd: int, known: set[int], *, heir: bool) -> None:
        self.fd = fd
        self.known = known
        self.parent = os.getpid()
        self.heir = heir
        self._meant = [name for name in _MEANT if os.environ.get(name) == str(self.parent)]
        self._shared = mmap.mmap(-1, mmap.PAGESIZE)  # by all children
        if heir:
            self.announce()

    @property
    def announced(self) -> bool:
        """Whether a child has opened all that it was to open, and has said so."""
        return self._shared[0] != 0

    def announce(self) -> None:
        """Note that."""
        self._shared[0] = 1

    def reserve(self) -> None:
        """Keep a few descriptors unused, if any are left, which the next child will need."""
        with contextlib.suppress(OSError):
            for place in _RESERVE:
                fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
                self._shared[place : place + 4] = fd.to_bytes(4, "little")

    def release(self) -> None:
        """Close those of the last child."""
        for place in _RESERVE:
            fd = int.from_bytes(self._shared[place : place + 4], "little")
            self._shared[place : place + 4] = bytes(4)  # first, lest another file be closed
            if fd:
                os.close(fd)

    def become(self) -> None:
        """In a child: let what the service manager says to its parent be for the child."""
        for name in self._meant:
            os.environ[name] = str(os.getpid())


def supervise(options: argparse.Namespace, ready: Callable[[], None]) -> int:
    """Let children serve as the options say, one after the other, until one ends by itself."""
    daemon.raise_fd_limit()
    inherited = keeper.inherited()
    fd, theirs = inherited or (os.memfd_create("ivshmem-journal"), set())
    known = set(keeper.strays(theirs))
    with daemon.signals_held(for_good=True):
        if options.takeover and not inherited:
            status = _in_helper(lambda: guarded(_take_over, options, fd))
            if status:
                return status
        taken = keeper.strays(known)
        tell = partial(_tell, options)
        going_on = options.takeover or inherited is not None
        with daemon.pid_file_of(options.pid_file, tell, going_on=going_on):
            kept = Kept(fd, set(keeper.strays(taken)), heir=inherited is not None)
            return keeper.keep(
                lambda deaths: guarded(_serve, options, kept, deaths, ready),
                daemon.ENDING,
                [_ORPHANED] if kept.heir else [],
            )


def _serve(
    options: argparse.Namespace, kept: Kept, deaths: list[str], ready: Callable[[], None]
) -> int:
    """What each child does. Once there are peers, another child does what this one cannot."""
    kept.release()
    kept.become()
    going_on = bool(deaths) and kept.announced
    tell = partial(_tell, options)
    with keeper.left_to_another(tell) if going_on else contextlib.nullcontext():
        from .serving import serve_kept

        return serve_kept(options, kept, deaths, ready)


def _take_over(options: argparse.Namespace, fd: int) -> int:
    """Have the journal of what another server gives in the place of this one's."""
    from .serving import planned_by
    from .succession import take_over

    plan = planned_by(options)
    assert plan is not None
    journal, _ = take_over(plan.config)
    os.dup2(journal.fileno(), fd, inheritable=False)
    return 0


def _in_helper(run: Callable[[], int]) -> int:
    """Call this in a child that shares the descriptors and brings its own memory; its status."""
    child = _fds.fork_sharing_files()
    if child == 0:
        status = 1
        try:
            status = run()
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    return daemon.status_of(status)


def _tell(options: argparse.Namespace, text: str) -> None:
    if options.log_format == "json":
        from .news import say_as

        say_as("json", text)
    else:
        keeper.say(f"ivshmem: {text}")
