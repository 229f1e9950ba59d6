"""Child processes that never outlive this one.

Knows: how Linux tells a child that its parent died.
Does not know: what the child does.
"""

import os
import subprocess
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO

# The signal comes when the *thread* that forked ends, not the process. So all children are made by
# this one, which ends only with the interpreter.
_FORKER = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fork")

# setpriv and sh exec what follows, so the child's pid is the command's. The comparison closes
# the gap in which the parent dies before setpriv has asked for the signal.
_BOUND = ("setpriv", "--pdeathsig", "KILL", "sh", "-c", '[ "$PPID" = "$0" ] && exec "$@"')


def spawn(
    command: Sequence[str], pass_fds: Sequence[int], output: IO[bytes]
) -> subprocess.Popen[bytes]:
    """Starts the command; it is killed when this process ends, however that comes about."""

    def fork() -> subprocess.Popen[bytes]:
        # Its own session: Ctrl-C at the terminal is for the test run, which then cleans up itself.
        return subprocess.Popen(
            [*_BOUND, str(os.getpid()), *command],
            pass_fds=pass_fds,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )

    forked = _FORKER.submit(fork)
    try:
        return forked.result()
    except BaseException:  # interrupted here, nobody would know of the child
        if not forked.cancel():
            forked.add_done_callback(_end)
        raise


def _end(forked: Future[subprocess.Popen[bytes]]) -> None:
    if forked.exception() is None:
        forked.result().kill()
        forked.result().wait()
