"""A peer and a server of bare sockets, written without the package they test.

RawPeer believes nothing: it checks each message against what QEMU, as a client, can bear.
"""

from __future__ import annotations

import array
import os
import re
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import NamedTuple

from .waiting import PATIENCE

_ROOM = socket.CMSG_SPACE(16 * 4)


class Raw(NamedTuple):
    """A message off the wire; the receiver owns `fd`."""

    value: int
    fd: int | None


def eventfd_id(fd: int) -> int:
    """The kernel's number of an eventfd: the same in every process that has it."""
    with open(f"/proc/self/fdinfo/{fd}") as info:
        match = re.search(r"^eventfd-id:\s*(\d+)", info.read(), re.MULTILINE)
    assert match, "not an eventfd"
    return int(match[1])


class RawPeer:
    """A client made of a socket. Descriptors go to `keep`, or are noted and closed at once.

    Attributes:
        vectors: for each id announced, eventfd-ids in the order of arrival.
        left: ids that left.
        memory: (st_dev, st_ino, size) of the region.
    """

    def __init__(self, path: str, keep: Callable[[int, int, int], object] | None = None) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.socket.connect(path)
        except BaseException:
            self.socket.close()
            raise
        self.id = -1
        self.memory: tuple[int, int, int] | None = None
        self.vectors: dict[int, list[int]] = {}
        self.counts: dict[int, int] = {}
        self.left: set[int] = set()
        self.eof = False
        self._greeted = 0
        self._keep = keep

    # -- bytes ------------------------------------------------------------------------------------

    def receive(self, timeout: float | None = PATIENCE) -> Raw | None:
        """The next message, None at the end of the stream.

        Raises:
            TimeoutError: it did not come in time.
        """
        self.socket.settimeout(timeout)
        data = b""
        fds = array.array("i")
        while len(data) < 8:
            chunk, ancillary, flags, _ = self.socket.recvmsg(
                8 - len(data), _ROOM, socket.MSG_CMSG_CLOEXEC
            )
            assert not flags & socket.MSG_CTRUNC, "a descriptor was lost"
            for _, _, content in ancillary:
                fds.frombytes(content)
            if not chunk:
                assert not data, f"the stream ended inside a message: {data!r}"
                self.eof = True
                return None
            data += chunk
        assert len(fds) <= 1, f"{len(fds)} descriptors on one message"
        return Raw(struct.unpack("<q", data)[0], fds[0] if fds else None)

    def read_bytes(self, count: int) -> None:
        """Take exactly `count` bytes off the stream, wherever that cuts a message."""
        self.socket.settimeout(PATIENCE)
        while count:
            chunk, ancillary, _, _ = self.socket.recvmsg(
                min(count, 8), _ROOM, socket.MSG_CMSG_CLOEXEC
            )
            for _, _, content in ancillary:
                fds = array.array("i")
                fds.frombytes(content)
                for fd in fds:
                    os.close(fd)
            assert chunk, "the stream ended early"
            count -= len(chunk)

    # -- meaning ----------------------------------------------------------------------------------

    def take(self, timeout: float | None = PATIENCE) -> Raw | None:
        """Receive one message and check it as a strict client of version 0 would."""
        message = self.receive(timeout)
        if message is not None:
            self._check(message)
        return message

    def _check(self, message: Raw) -> None:
        value, fd = message
        if self._greeted == 0:
            assert message == (0, None), "the version comes first"
        elif self._greeted == 1:
            assert fd is None
            assert 0 <= value <= 65535
            self.id = value
        elif self._greeted == 2:
            assert value == -1
            assert fd is not None, "the memory comes third"
            status = os.fstat(fd)
            self.memory = status.st_dev, status.st_ino, status.st_size
            os.close(fd)
        elif fd is None:
            assert value in self.counts, f"{value} left and was not there"
            assert value != self.id
            del self.counts[value]
            self.vectors.pop(value, None)
            self.left.add(value)
        else:
            assert 0 <= value <= 65535
            assert value not in self.left, f"id {value} was used again"
            number = self.counts.get(value, 0)
            self.counts[value] = number + 1
            if self._keep is None:
                self.vectors.setdefault(value, []).append(eventfd_id(fd))
                os.close(fd)
            else:
                self._keep(value, number, fd)
        self._greeted += 1

    def set_up(self, vectors: int) -> RawPeer:
        """Read until all own vectors are there; returns self."""
        while self._greeted < 3 or self.counts.get(self.id, 0) < vectors:
            assert self.take() is not None, "the server ended the connection"
        return self

    def drain(self) -> int:
        """Take the whole messages that are there now; returns how many that were."""
        self.socket.setblocking(False)
        count = 0
        while True:
            try:
                data, ancillary, flags, _ = self.socket.recvmsg(8, _ROOM, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                return count
            assert not flags & socket.MSG_CTRUNC, "a descriptor was lost"
            if not data:
                self.eof = True
                return count
            assert len(data) == 8, "the server cut a message"
            fd = int.from_bytes(ancillary[0][2], "little") if ancillary else None
            self._check(Raw(int.from_bytes(data, "little", signed=True), fd))
            count += 1

    def readable(self, timeout: float) -> bool:
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        return bool(poll.poll(timeout * 1000))

    def take_until(self, condition: Callable[[], bool]) -> RawPeer:
        """Take messages until the condition is true; returns self."""
        while not condition():
            assert self.take() is not None, "the server ended the connection"
        return self

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> RawPeer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def send_raw(sock: socket.socket, value: int, *fds: int) -> None:
    """One message of the protocol, with any number of descriptors."""
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    assert sock.sendmsg([struct.pack("<q", value)], ancillary) == 8


class FakeServer:
    """Accepts one client after another and hands each connection to a script in a thread."""

    def __init__(self, path: str, *scripts: Callable[[socket.socket], object]) -> None:
        self.path = path
        self.errors: list[BaseException] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.settimeout(PATIENCE)
        self._listener.bind(path)
        self._listener.listen()
        self._thread = threading.Thread(target=self._run, args=(scripts,))
        self._thread.start()

    def _run(self, scripts: Iterable[Callable[[socket.socket], object]]) -> None:
        try:
            for script in scripts:
                connection, _ = self._listener.accept()
                with connection:
                    connection.settimeout(PATIENCE)
                    script(connection)
        except BaseException as error:
            self.errors.append(error)

    def __enter__(self) -> FakeServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._thread.join(PATIENCE)
        self._listener.close()
        os.unlink(self.path)
        if kind is None:
            assert not self.errors, self.errors


def until_closed(sock: socket.socket) -> None:
    """Wait until the other side has gone."""
    sock.settimeout(PATIENCE)
    try:
        while sock.recv(1):
            pass
    except ConnectionError:
        pass


class Eventfds:
    """Eventfds that are closed together."""

    def __init__(self) -> None:
        self._fds: list[int] = []

    def make(self, count: int = 1) -> list[int]:
        made = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(count)]
        self._fds += made
        return made

    def __enter__(self) -> Eventfds:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        while self._fds:
            os.close(self._fds.pop())


def memory_fd(size: int = 4096) -> int:
    """A memfd of that size, which the caller closes."""
    fd = os.memfd_create("ivshmem-test", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    return fd


def chunks(data: bytes, size: int) -> Iterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]
