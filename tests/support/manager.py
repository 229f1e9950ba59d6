"""A service manager: starts a program, listens to it, and keeps what it is told to keep.

What systemd does, as far as sd_notify(3) and sd_listen_fds(3) say; the tests in guests have the
real one. It can do what that one does only on a bad day: not read, or lose something.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import select
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from .waiting import PATIENCE, until

_MOST = 253  # descriptors in a message
_END, _HERE = b"END", b"HERE"  # what it says to itself


class Manager:
    """One service, and its fd store.

    Args:
        reverse: give back what has the same name in the order of systemd before 253.
        sockets: listening ones that the service is given at each start, with their names.
    """

    def __init__(
        self,
        command: Sequence[str],
        directory: Path,
        *,
        reverse: bool = False,
        sockets: Sequence[tuple[str, socket.socket]] = (),
        watchdog: float | None = None,
    ) -> None:
        self.command = list(command)
        self.store: list[tuple[str, int]] = []
        self.told: list[dict[str, str]] = []
        self.log = directory / "log"
        self.pid = 0
        self._reverse, self._sockets, self._watchdog = reverse, sockets, watchdog
        self._place = tempfile.mkdtemp(prefix="ivtm", dir="/tmp")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(f"{self._place}/notify")
        self._lock = threading.Lock()
        self._here = threading.Event()
        self._reads = threading.Event()
        self._reads.set()
        self._pauses = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    # -- listening --------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            if not self._reads.is_set():
                self._pauses.set()
                self._reads.wait()
                self._pauses.clear()
            data, fds, _, _ = socket.recv_fds(self._socket, 4096, _MOST)
            for fd in fds:
                os.set_inheritable(fd, False)  # recv_fds hands flags on only since Python 3.12
            if data == _END:
                return
            if data == _HERE:
                self._here.set()
                continue
            fields = dict(line.split("=", 1) for line in data.decode().split("\n"))
            with self._lock:
                self._take(fields, fds)

    def _take(self, fields: dict[str, str], fds: list[int]) -> None:
        if "BARRIER" not in fields:
            self.told.append(fields)
        if fields.get("FDSTORE") == "1":
            random.shuffle(fds)  # systemd has those of a message in a hash set
            self.store += [(fields["FDNAME"], fd) for fd in fds]
            fds = []
        elif fields.get("FDSTOREREMOVE") == "1":
            fds = [fd for name, fd in self.store if name == fields["FDNAME"]]
            self.store = [each for each in self.store if each[0] != fields["FDNAME"]]
        for fd in fds:
            os.close(fd)

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Read nothing while the block runs, but for one message."""
        self._reads.clear()
        try:
            yield
        finally:
            self._reads.set()

    def fill(self) -> None:
        """Leave no room for a message; for a `busy` manager."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
            sock.connect(f"{self._place}/notify")
            for _ in range(2):  # before and after it takes its last message
                with contextlib.suppress(BlockingIOError):
                    while True:
                        sock.send(b"FILLS=1")
                assert self._pauses.wait(PATIENCE)

    def _catch_up(self) -> None:
        """Read what was said before now."""
        self._here.clear()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(_HERE, f"{self._place}/notify")
        assert self._here.wait(PATIENCE)

    def last(self, key: str) -> str | None:
        """What the service said last of this."""
        with self._lock:
            found = [fields[key] for fields in self.told if key in fields]
        return found[-1] if found else None

    def names(self) -> list[str]:
        """Of all that is stored, by what was said before now."""
        self._catch_up()
        with self._lock:
            return [name for name, _ in self.store]

    def lose(self, name: str) -> None:
        """Forget one of the descriptors of that name."""
        with self._lock:
            index = [each for each, _ in self.store].index(name)
            os.close(self.store.pop(index)[1])

    # -- the process ------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the service, with all there is for it, and wait until it is ready."""
        self._catch_up()
        with self._lock:
            self.told.clear()
            stored = self.store[::-1] if self._reverse else self.store
            passed = [(name, sock.fileno()) for name, sock in self._sockets] + stored
            self._spawn(passed)
        until(lambda: self.last("READY") or self._gone())
        assert self.last("READY"), self.log.read_text()

    def _spawn(self, passed: list[tuple[str, int]]) -> None:
        env = {**os.environ, "NOTIFY_SOCKET": f"{self._place}/notify"}
        if passed:
            env["LISTEN_FDS"] = str(len(passed))
            env["LISTEN_FDNAMES"] = ":".join(name for name, _ in passed)
        if self._watchdog:
            env["WATCHDOG_USEC"] = str(int(self._watchdog * 1e6))
        # Out of the way of the numbers that they are to have.
        copies = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 1000) for _, fd in passed]
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC)
        actions = [(os.POSIX_SPAWN_DUP2, log, 1), (os.POSIX_SPAWN_DUP2, log, 2)]
        actions += [(os.POSIX_SPAWN_DUP2, fd, 3 + i) for i, fd in enumerate(copies)]
        shell = ["sh", "-c", 'LISTEN_PID=$$ exec "$@"', "sh", *self.command]
        try:
            self.pid = os.posix_spawn("/bin/sh", shell, env, file_actions=actions)
        finally:
            for fd in (log, *copies):
                os.close(fd)

    def _gone(self) -> bool:
        found = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return found is not None

    def kill(self, number: int = signal.SIGKILL) -> int:
        """End the service by a signal; how it ended, as os.waitstatus_to_exitcode says."""
        fd = os.pidfd_open(self.pid)
        try:
            os.kill(self.pid, number)
            assert select.select([fd], [], [], PATIENCE)[0], "it does not end"
        finally:
            os.close(fd)
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        return os.waitstatus_to_exitcode(status)

    def restart(self, number: int = signal.SIGKILL) -> None:
        self.kill(number)
        self.start()

    def close_stored(self) -> None:
        """Close all that is stored, as when a service is not to be started again."""
        self._catch_up()
        with self._lock:
            while self.store:
                os.close(self.store.pop()[1])

    def close(self) -> None:
        if self.pid:
            self.kill(signal.SIGTERM)
        self._reads.set()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(_END, f"{self._place}/notify")
        self._thread.join()
        while self.store:
            os.close(self.store.pop()[1])
        self._socket.close()
        os.unlink(f"{self._place}/notify")
        os.rmdir(self._place)
