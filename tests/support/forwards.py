"""`ivshmem forward` in processes, a server, and the sockets at both ends."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from .waiting import PATIENCE, until


class Forward:
    """A process that runs `ivshmem forward`; its log is in a file.

    Args:
        under: a command that it is started by.
    """

    def __init__(
        self, directory: Path, name: str, path: str, *words: object, under: Sequence[str] = ()
    ) -> None:
        self.log = directory / f"{name}.log"
        command = [*under, sys.executable, "-m", "ivshmem", "forward", "-S", path]
        self.words = [*command, *map(str, words)]
        self._start()

    def _start(self) -> None:
        with self.log.open("ab") as log:
            self.begin = log.tell()
            self.process = subprocess.Popen(self.words, stdin=subprocess.DEVNULL, stderr=log)

    def text(self) -> str:
        """Return what this process has logged."""
        return self.log.read_bytes()[self.begin :].decode()

    def says(self, words: str) -> re.Match[str]:
        """Wait until the log has a match."""
        return until(lambda: self._looked(words), f"{words!r} in the log")

    def _looked(self, words: str) -> re.Match[str] | None:
        found = re.search(words, self.text())
        if found is None and self.process.poll() is not None:
            raise AssertionError(f"it ended before it said {words!r}: {self.text()}")
        return found

    def port(self) -> int:
        """Return the port at which it listens."""
        return int(self.says(r"listens at tcp:\S+:([0-9]+)")[1])

    def kill(self) -> None:
        """End it by SIGKILL."""
        self.process.kill()
        self.process.wait()

    def again(self) -> None:
        """Start it anew."""
        self.end()
        self._start()

    def end(self) -> int:
        """End it by SIGTERM, unless it has ended; return its status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)

    def processor_time(self) -> float:
        """Return the seconds of the processor that it has used."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Pair:
    """A forward: a side that listens, and one that connects to a socket of the test.

    Args:
        unix: of Unix sockets. Else of TCP, and `port` is where it listens.
    """

    def __init__(
        self, directory: Path, path: str, name: str, *words: object, unix: bool = False
    ) -> None:
        self.at = str(directory / f"{name}-listens") if unix else ""
        if unix:
            self.target = socket.socket(socket.AF_UNIX)
            self.target.bind(str(directory / f"{name}-target"))
            self.target.listen(1000)
            at, where = f"unix:{self.target.getsockname()}", f"unix:{self.at}"
        else:
            self.target = socket.create_server(("127.0.0.1", 0), backlog=1000)
            at, where = f"tcp:127.0.0.1:{self.target.getsockname()[1]}", "tcp:127.0.0.1:0"
        self.target.settimeout(PATIENCE)
        self.far = Forward(directory, f"{name}-far", path, "-v", name, "--connect", at, *words)
        self.far.says("connects to")
        self.near = Forward(directory, f"{name}-near", path, "-v", name, "--listen", where)
        self.near.says("listens at")
        self.port = 0 if unix else self.near.port()
        self.path = path

    def dial(self, **how: object) -> socket.socket:
        """Connect to the side that listens."""
        if self.at:
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(PATIENCE)
            sock.connect(self.at)
            return sock
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE, **how)  # type: ignore[arg-type]
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def accept(self) -> socket.socket:
        """Accept what arrives at the other side."""
        sock, _ = self.target.accept()
        sock.settimeout(PATIENCE)
        return sock

    @contextlib.contextmanager
    def joined(self) -> Iterator[tuple[socket.socket, socket.socket]]:
        """Both ends of one connection."""
        with self.dial() as near, self.accept() as far:
            yield near, far

    def close(self) -> None:
        """End both sides; each must end as it should."""
        self.target.close()
        statuses = [side.end() for side in (self.near, self.far)]
        assert all(status in (0, -signal.SIGKILL) for status in statuses), statuses


def reset(sock: socket.socket) -> None:
    """Close a socket by a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    sock.close()


def fill(sock: socket.socket) -> int:
    """Send until back pressure has come all the way; how many bytes."""
    sock.setblocking(False)
    sent = quiet = 0
    while quiet < 20:
        try:
            sent += sock.send(bytes(1 << 16))
            quiet = 0
        except BlockingIOError:
            quiet += 1
            select.select([], [sock], [], 0.01)
    sock.settimeout(PATIENCE)
    return sent


def received(sock: socket.socket, size: int | None = None) -> bytes:
    """Receive so many bytes, or all until the end."""
    found = bytearray()
    while size is None or len(found) < size:
        data = sock.recv(1 << 18 if size is None else size - len(found))
        if not data:
            break
        found += data
    return bytes(found)


def is_reset(sock: socket.socket) -> bool:
    """Wait for the end of what comes; whether it is a reset."""
    try:
        while sock.recv(1 << 18):
            pass
    except ConnectionResetError:
        return True
    return False


def is_refused(port: int) -> bool:
    """Whether who connects is reset, which can be so soon that connect(2) tells of it."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as sock:
            return is_reset(sock)
    except ConnectionResetError:
        return True


def exchanged(one: socket.socket, other: socket.socket, size: int, seed: int) -> bool:
    """Send so many bytes both ways at once, then the ends; whether all arrived."""
    block = hashlib.shake_256(seed.to_bytes(4, "big")).digest(1 << 16)
    sums: dict[tuple[int, str], str] = {}

    def send(sock: socket.socket, side: int) -> None:
        sent, total = hashlib.sha256(), 0
        while total < size:
            part = (block[side:] + block[:side])[: size - total]
            sock.sendall(part)
            sent.update(part)
            total += len(part)
        sock.shutdown(socket.SHUT_WR)
        sums[side, "sent"] = sent.hexdigest()

    def receive(sock: socket.socket, side: int) -> None:
        came = hashlib.sha256()
        while data := sock.recv(1 << 18):
            came.update(data)
        sums[side, "came"] = came.hexdigest()

    works: list[Callable[[], None]] = [
        lambda: send(one, 0),
        lambda: send(other, 1),
        lambda: receive(one, 0),
        lambda: receive(other, 1),
    ]
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return (
        len(sums) == 4 and sums[0, "sent"] == sums[1, "came"] and sums[1, "sent"] == sums[0, "came"]
    )
