"""`ivshmem serve --supervise`: the small parent of the processes that serve.

Knows: what the children share besides descriptors. Does not know: how anything is served; this
process imports nothing of that, so it needs hardly more memory than the interpreter itself.
"""

from __future__ import annotations

import contextlib
import os
from functools import partial

from ..lasting import supervisor
from ..lasting.supervised import Supervision
from ..native import descriptors
from . import daemon, pid_file, signals
from .run import guarded

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

_ORPHANED = "the parent had ended"


def supervise(options: argparse.Namespace, ready: Callable[[], None]) -> int:
    """Start a child that serves as the options say, and the next one when it is killed.

    Returns when a child ends by itself, with its exit status.
    """
    daemon.raise_fd_limit()
    inherited = supervisor.inherited()
    fd, theirs = inherited or (os.memfd_create("ivshmem-journal"), set())
    known = set(supervisor.strays(theirs))
    with signals.held(for_good=True):
        if options.takeover and not inherited:
            status = _in_helper(lambda: guarded(_take_over, options, fd))
            if status:
                return status
        taken = supervisor.strays(known)
        write_error = partial(_write_error, options)
        continues = options.takeover or inherited is not None
        with pid_file.held_by_server(options.pid_file, write_error, is_successor=continues):
            supervision = Supervision(fd, set(supervisor.strays(taken)), heir=inherited is not None)
            return supervisor.supervise(
                lambda deaths: guarded(_serve, options, supervision, deaths, ready),
                signals.ENDING,
                [_ORPHANED] if supervision.heir else [],
            )


def _serve(
    options: argparse.Namespace,
    supervision: Supervision,
    deaths: list[str],
    ready: Callable[[], None],
) -> int:
    """Serve, as a child. Once there are peers, an error leaves all to the next child."""
    supervision.release()
    supervision.become()
    continues = bool(deaths) and supervision.announced
    write_error = partial(_write_error, options)
    with supervisor.left_to_another(write_error) if continues else contextlib.nullcontext():
        from .serve_process import serve_supervised  # here, in the child: the parent stays small

        return serve_supervised(options, supervision, deaths, ready)


def _take_over(options: argparse.Namespace, fd: int) -> int:
    """Replace this supervisor's journal by that of the server that hands over."""
    # Here, in the helper process: the parent stays small.
    from ..service.succession import take_over
    from .serve_process import plan_of

    plan = plan_of(options)
    assert plan is not None
    journal, _ = take_over(plan.config)
    os.dup2(journal.fileno(), fd, inheritable=False)
    return 0


def _in_helper(run: Callable[[], int]) -> int:
    """Call this in a child that shares our descriptors, not our memory; return its status."""
    child = descriptors.fork_sharing_files()
    if child == 0:
        status = 1
        try:
            status = run()
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    return daemon.status_of(status)


def _write_error(options: argparse.Namespace, text: str) -> None:
    if options.log_format == "json":
        from .log_writer import say_as  # here: the parent stays small as long as it says nothing

        say_as("json", text)
    else:
        supervisor.say(f"ivshmem: {text}")
