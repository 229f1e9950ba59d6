"""`ivshmem serve --supervise`: the small process that a server's children have above them.

Knows: what the children share beside descriptors. Does not know: how anything is served; this
process imports nothing of that, so that it needs hardly more memory than the interpreter itself.
"""

from __future__ import annotations

import contextlib
import os
from functools import partial

from ..lasting import supervisor
from ..lasting.supervised import Supervision
from ..native import descriptors
from . import daemon
from .run import guarded

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

_ORPHANED = "the parent was gone"


def supervise(options: argparse.Namespace, ready: Callable[[], None]) -> int:
    """Let children serve as the options say, one after the other, until one ends by itself."""
    daemon.raise_fd_limit()
    inherited = supervisor.inherited()
    fd, theirs = inherited or (os.memfd_create("ivshmem-journal"), set())
    known = set(supervisor.strays(theirs))
    with daemon.signals_held(for_good=True):
        if options.takeover and not inherited:
            status = _in_helper(lambda: guarded(_take_over, options, fd))
            if status:
                return status
        taken = supervisor.strays(known)
        tell = partial(_tell, options)
        going_on = options.takeover or inherited is not None
        with daemon.pid_file_of(options.pid_file, tell, going_on=going_on):
            kept = Supervision(fd, set(supervisor.strays(taken)), heir=inherited is not None)
            return supervisor.supervise(
                lambda deaths: guarded(_serve, options, kept, deaths, ready),
                daemon.ENDING,
                [_ORPHANED] if kept.heir else [],
            )


def _serve(
    options: argparse.Namespace, kept: Supervision, deaths: list[str], ready: Callable[[], None]
) -> int:
    """What each child does. Once there are peers, another child does what this one cannot."""
    kept.release()
    kept.become()
    going_on = bool(deaths) and kept.announced
    tell = partial(_tell, options)
    with supervisor.left_to_another(tell) if going_on else contextlib.nullcontext():
        from .serve_process import serve_kept  # here, in the child: the parent stays small

        return serve_kept(options, kept, deaths, ready)


def _take_over(options: argparse.Namespace, fd: int) -> int:
    """Have the journal of what another server gives in the place of this one's."""
    # Here, in the helper process: the parent stays small.
    from ..service.succession import take_over
    from .serve_process import planned_by

    plan = planned_by(options)
    assert plan is not None
    journal, _ = take_over(plan.config)
    os.dup2(journal.fileno(), fd, inheritable=False)
    return 0


def _in_helper(run: Callable[[], int]) -> int:
    """Call this in a child that shares the descriptors and brings its own memory; its status."""
    child = descriptors.fork_sharing_files()
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
        from .log_writer import say_as  # here: the parent stays small as long as it says nothing

        say_as("json", text)
    else:
        supervisor.say(f"ivshmem: {text}")
