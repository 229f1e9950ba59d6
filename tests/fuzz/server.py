"""Peers that send bytes and descriptors, read now and then or never, and go at any moment.

Beside them there can be honest ones. They read by the protocol, which must never be violated, and
know in the end that nobody else is there.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import tempfile
from collections.abc import Sequence

import ivshmem
from ivshmem.native import wire
from ivshmem.protocol.framing import Framer
from ivshmem.protocol.session import GotMemory, GotVector, Session

from .client import KINDS
from .script import Grammar, Op
from .target import Finding, Scripted

_MOST = 40  # connections in an input
_STEPS = 200  # in which a server has done what there is to do
_VECTORS = 2

FORMS = {
    "connect": "b",  # how many
    "honest": "",
    "send": "bsb",  # which, what, kind of descriptor
    "flood": "bw",  # which, how many bytes
    "read": "bb",  # which, messages
    "shut": "bb",  # which, how
    "small": "b",  # which gets a small buffer
    "close": "b",  # which
    "reset": "b",  # which closes with something unread, or at once
    "evict": "b",  # id
    "step": "b",  # how often
}


class _Honest:
    """A peer that reads, and believes only what the protocol allows."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.session = Session(_VECTORS)
        self._framer = Framer()
        self._gone = False

    def read(self) -> None:
        while not self._gone:
            try:
                chunks, self._gone = wire.receive(self.socket.fileno(), 64)
            except ConnectionError:
                self._gone = True
                return
            for data, fds in chunks:
                for fd in fds:
                    fd.close()
                for message in self._framer.feed(data, fds):
                    event = self.session.receive(message)
                    if isinstance(event, GotMemory | GotVector) and not message.fds:
                        raise Finding(f"{message} without a descriptor")
            if len(chunks) < 64:
                return

    @property
    def here(self) -> bool:
        return not self._gone


class Player:
    """One input: who connects, and what they do."""

    def __init__(self, server: ivshmem.Server) -> None:
        self.server = server
        self.sockets: list[socket.socket] = []
        self.honest: list[_Honest] = []

    def play(self, script: Sequence[Op]) -> None:
        try:
            for op in script:
                with contextlib.suppress(OSError, ivshmem.NoSuchPeer):
                    getattr(self, f"_op_{op.name}")(*op.args)
            self._settle()
            there = len([peer for peer in self.honest if peer.here])
            for sock in self.sockets:
                sock.close()
            self._settle()
            self._agree(there)
        finally:
            for peer in self.honest:
                peer.socket.close()
            self.honest.clear()
            self._settle()
        if self.server.peers:
            raise Finding(f"{self.server.peers} are still here")

    def _settle(self) -> None:
        """Let the server do what there is to do, and the honest read."""
        for _ in range(_STEPS):
            self.server.step(0)
            for peer in self.honest:
                peer.read()
            if not _readable(self.server):
                return
        raise Finding("the server's loop spins")

    def _agree(self, there: int) -> None:
        here = [peer for peer in self.honest if peer.here]
        ids = sorted(peer.session.id for peer in here)
        if len(here) != there or sorted(peer.id for peer in self.server.peers) != ids:
            raise Finding(f"{ids} of {there} are here, and the server has {self.server.peers}")
        for peer in here:
            others = [each for each in ids if each != peer.session.id]
            if peer.session.peers != others:
                raise Finding(f"{peer.session.id} knows of {peer.session.peers}, not {others}")

    def _connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            sock.connect(self.server.path)
        except BaseException:
            sock.close()
            raise
        return sock

    def _op_connect(self, count: int) -> None:
        for _ in range(min(count % 8 + 1, _MOST - len(self.sockets))):
            self.sockets.append(self._connect())

    def _op_honest(self) -> None:
        if len(self.honest) < 4:
            self.honest.append(_Honest(self._connect()))

    def _op_send(self, which: int, data: bytes, number: int) -> None:
        kind = KINDS[number % len(KINDS)]
        fds = [] if kind is None else [kind.make()]
        try:
            if (sock := self._which(which)) is not None:
                socket.send_fds(sock, [data or b"\0"], fds)
        finally:
            for fd in fds:
                os.close(fd)

    def _op_flood(self, which: int, count: int) -> None:
        if (sock := self._which(which)) is not None:
            sock.send(bytes(count * 4))

    def _op_read(self, which: int, count: int) -> None:
        if (sock := self._which(which)) is not None:
            sock.recv(8 * count + 1)

    def _op_shut(self, which: int, how: int) -> None:
        if (sock := self._which(which)) is not None:
            sock.shutdown(how % 3)

    def _op_small(self, which: int) -> None:
        if (sock := self._which(which)) is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)

    def _op_close(self, which: int) -> None:
        if (sock := self._which(which)) is not None:
            self.sockets.remove(sock)
            sock.close()

    def _op_reset(self, which: int) -> None:
        self._op_connect(0)
        self._op_close(len(self.sockets) - 1 - which % 2 if self.sockets else 0)

    def _op_evict(self, peer: int) -> None:
        self.server.evict(peer % 32)

    def _op_step(self, count: int) -> None:
        for _ in range(count % 4 + 1):
            self.server.step(0)

    def _which(self, which: int) -> socket.socket | None:
        return self.sockets[which % len(self.sockets)] if self.sockets else None


class ServerTarget(Scripted):
    """What peers send."""

    name = "server"
    modules = ("server/server", "server/engine", "protocol/roster")
    share = 2
    grammar = Grammar(
        FORMS,
        [[Op("honest"), Op("connect", (3,)), Op("step", (3,))], [Op("connect", (7,))], []],
        [bytes(8), b"\xff" * 8, b"GET / HTTP/1.1\r\n\r\n"],
    )

    def set_up(self) -> None:
        home = self.undo.enter_context(tempfile.TemporaryDirectory(prefix="ivf", dir="/tmp"))
        self._server = self.undo.enter_context(ivshmem.Server(f"{home}/s", 4096, _VECTORS))
        Player(self._server).play([Op("honest"), Op("step", (3,))])  # what is made at first use

    def play(self, script: Sequence[Op]) -> None:
        Player(self._server).play(script)

    def scripts(self) -> Sequence[Sequence[Op]]:
        step = Op("step", (3,))
        return [
            [Op("honest"), Op("connect", (2,)), step, Op("send", (0, b"x" * 8, 1)), step],
            [Op("connect", (7,)), step, Op("flood", (0, 65535)), step, Op("close", (1,)), step],
            [Op("honest"), Op("connect", (1,)), step, Op("read", (0, 3)), Op("shut", (0, 1)), step],
            [Op("honest"), Op("reset", (0,)), step, Op("honest"), step, Op("evict", (1,)), step],
        ]


def _readable(server: ivshmem.Server) -> bool:
    poll = select.poll()
    poll.register(server.fileno(), select.POLLIN)
    return bool(poll.poll(0))
