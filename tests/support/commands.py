"""Runs `python -m ivshmem ...` as a fork of one process that has imported all of it.

An interpreter that starts, imports and ends takes 80 ms of a processor, a fork of one that has
started takes 15, and the tests run a thousand commands. The command has its own process, with the
arguments, environment, folder, standard streams and exit status that subprocess.run would give it.

Knows: how a fork is made to look like an interpreter that has just started, and ends like one.
Does not know: what the test's own process has changed of itself (user, limits, umask, namespaces),
    and what an interpreter reads from the environment at its start (PYTHON*, LANG). Where these
    matter, or the start itself, a test runs a process of its own.
Invariants: warnings are errors in the command. Nothing of the commands stays behind: with the
    process that asks, the one that forks ends, too.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping

import ivshmem

PATIENCE = 30.0
_LARGEST = 1 << 18  # a request; the environment is nearly all of it
_forks: socket.socket | None = None


# -- who asks -------------------------------------------------------------------------------------


@contextlib.contextmanager
def forking() -> Iterator[None]:
    """Have the process that forks; `run` needs it."""
    global _forks
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        words = [sys.executable, "-W", "error", __file__, str(theirs.fileno())]
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,  # of the kind that the commands have: it decides the buffering
            pass_fds=[theirs.fileno()],
        )
        with process:
            theirs.close()
            _forks = ours
            try:
                yield
            finally:
                _forks = None
                ours.close()


def run(
    *arguments: object,
    input: str = "",  # noqa: A002  (as subprocess.run has it)
    cwd: str | os.PathLike[str] | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = PATIENCE,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    assert _forks is not None, "the module has no pytest.mark.usefixtures('commands')"
    words = list(map(str, arguments))
    request = {
        "words": words,
        "folder": os.path.abspath(cwd or os.getcwd()),
        "environment": dict(os.environ if env is None else env),
    }
    ends: list[int] = []
    try:
        for _ in ("stdin", "stdout", "stderr", "status"):
            ends += os.pipe()
        stdin, put, out, stdout, err, stderr, told, status = ends
        os.set_blocking(put, False)
        assert os.write(put, input.encode()) == len(input.encode())
        socket.send_fds(_forks, [json.dumps(request).encode()], [stdin, stdout, stderr, status])
        for fd in (stdin, put, stdout, stderr, status):
            os.close(fd)
            ends.remove(fd)
        said = _read(words, (out, err, told), timeout)
    finally:
        for fd in ends:
            os.close(fd)
    code = json.loads(said[told].split()[1])
    return subprocess.CompletedProcess(words, code, said[out].decode(), said[err].decode())


def _read(words: list[str], fds: tuple[int, ...], timeout: float) -> dict[int, bytes]:
    """All that is written to the pipes. The last one begins with the command's pid."""
    end = time.monotonic() + timeout
    told = fds[-1]
    said = dict.fromkeys(fds, b"")
    waiting = select.poll()
    for fd in fds:
        waiting.register(fd, select.POLLIN)
    while fds:
        ready = waiting.poll(max(0.0, end - time.monotonic()) * 1000)
        if not ready:
            os.kill(int(said[told].split()[0]), signal.SIGKILL)
            raise subprocess.TimeoutExpired(words, timeout, *list(said.values())[:2])
        for fd, _ in ready:
            data = os.read(fd, 1 << 16)
            said[fd] += data
            if not data:
                waiting.unregister(fd)
                fds = tuple(each for each in fds if each != fd)
    return said


# -- what forks ------------------------------------------------------------------------------------


def _serve(asked: socket.socket) -> dict[str, object]:
    """Make a process for each request, and tell how it ended. Returns in these processes alone."""
    waiting = select.poll()
    waiting.register(asked.fileno(), select.POLLIN)
    running: dict[int, tuple[int, int]] = {}  # by pidfd: the pid, and whom to tell
    while True:
        for fd, _ in waiting.poll():
            if fd in running:
                pid, status = running.pop(fd)
                waiting.unregister(fd)
                os.close(fd)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                os.write(status, b" %d" % code)
                os.close(status)
                continue
            data, fds, _, _ = socket.recv_fds(asked, _LARGEST, 4)
            if not data:
                os._exit(0)
            if (pid := os.fork()) == 0:
                asked.detach()  # else what is opened by its number is closed with it
                for at in range(3):
                    os.dup2(fds[at], at)
                os.closerange(3, 1 << 20)
                return json.loads(data)  # type: ignore[no-any-return]
            os.write(fds[3], b"%d" % pid)
            for fd in fds[:3]:
                os.close(fd)
            pidfd = os.pidfd_open(pid)
            running[pidfd] = pid, fds[3]
            waiting.register(pidfd, select.POLLIN)


def _main() -> None:
    for module in pkgutil.walk_packages(ivshmem.__path__, "ivshmem."):
        if not module.name.endswith("__main__"):
            try:
                importlib.import_module(module.name)
            except ModuleNotFoundError as error:
                if (error.name or "").startswith("ivshmem"):
                    raise  # else it is an extra's, which is not installed for each Python
    gc.freeze()  # collections in the forks look at what they have made, and copy no page of this
    request = _serve(socket.socket(fileno=int(sys.argv[1])))
    words = request["words"]
    assert isinstance(words, list)
    assert isinstance(request["environment"], dict)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(str(request["folder"]))
    sys.path[0] = os.getcwd()
    sys.argv[1:] = words
    sys.orig_argv[:] = [sys.executable, "-m", "ivshmem", *words]
    os._exit(_status())


def _status() -> int:
    """Run the command, and end as an interpreter does that need not free its modules: 50 ms."""
    status = 0
    try:
        runpy.run_module("ivshmem", run_name="__main__", alter_sys=True)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    for thread in threading.enumerate():
        if not thread.daemon and thread is not threading.current_thread():
            thread.join()
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except OSError:
        status = 120
    sys.stderr.flush()
    return status


if __name__ == "__main__":
    _main()
