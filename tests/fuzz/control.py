"""Callers of the control socket: any bytes, any cuts, many at once, who read or do not.

What is asked is checked as well: every reply is an object on a line, an error is one line, and none
says that the server itself has failed. In the end it still answers.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import tempfile
from collections.abc import Sequence

from ivshmem.config import ConfigError, RegionConfig, ServiceConfig
from ivshmem.service import control
from ivshmem.service.service import Service
from ivshmem.system.requests import LONGEST

from .script import Grammar, Op
from .target import Finding, Scripted

_MOST = 90  # callers in an input: more than are kept
_STEPS = 20000  # in which all is answered

FORMS = {
    "call": "b",  # how many
    "send": "bs",  # which caller, what
    "ask": "bb",  # which, number of a request that makes sense
    "json": "bbs",  # which, number of a request, with this in the place of a value
    "long": "bw",  # which, how many bytes without an end
    "read": "bw",  # which, how many
    "shut": "bb",  # which, how
    "hang up": "b",  # which
    "peer": "",  # one joins the region
    "leave": "",  # and leaves
    "load": "b",  # what comes of a reload
    "step": "b",  # how often
}

REQUESTS = (
    b'{"do": "version"}',
    b'{"do": "status"}',
    b'{"do": "status", "peers": false}',
    b'{"do": "status", "region": "one"}',
    b'{"do": "evict", "id": 0}',
    b'{"do": "evict", "id": 1, "region": "one"}',
    b'{"do": "reload"}',
    b'{"do": "nothing"}',
    b'{"do": null, "x": [1, 2]}',
)
TOKENS = (
    *(b"\n", b"{", b"}", b"[", b"]", b'"', b":", b",", b"null", b"true", b"-1", b"1e999", b"NaN"),
    *(b'"do"', b'"id"', b'"region"', b'"peers"', b'"one"', b'"status"', b'"\\ud800"', b"\xff"),
    *(b'"\\u0000"', b"9" * 200, b"[" * 200, b'{"a":' * 40, b"\0", b"\xef\xbb\xbf", b"\r\n"),
    *(request + b"\n" for request in REQUESTS),
)


class _Caller:
    """One of them; it checks what it is told."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            self.socket.connect(path)
        except BaseException:
            self.socket.close()
            raise
        self._text = b""
        self.replies: list[object] = []

    def send(self, data: bytes) -> None:
        with contextlib.suppress(OSError):
            self.socket.send(data)

    def read(self, count: int) -> bool:
        """Whether there was anything."""
        try:
            data = self.socket.recv(count)
        except OSError:
            return False
        *lines, self._text = (self._text + data).split(b"\n")
        self.replies += map(_checked, lines)
        return bool(data)


def _checked(line: bytes) -> object:
    reply = json.loads(line)
    if not isinstance(reply, dict) or not isinstance(reply.get("ok"), bool):
        raise Finding(f"no reply: {line!r}")
    if not reply["ok"]:
        error = reply["error"]
        if not error or not error.isprintable() or "the server has an error" in error:
            raise Finding(f"the error is {error!r}")
    return reply


class Player:
    """One input: who calls, and what they send."""

    def __init__(self, target: ControlTarget) -> None:
        self.target = target
        self.callers: list[_Caller] = []
        self.peers: list[socket.socket] = []

    def play(self, script: Sequence[Op]) -> None:
        try:
            for op in script:
                with contextlib.suppress(OSError):
                    getattr(self, f"_op_{op.name.replace(' ', '_')}")(*op.args)
            self._settle()
            self._answers()
        finally:
            for caller in self.callers:
                caller.socket.close()
            self.callers.clear()
            for sock in self.peers:
                sock.close()
            self.target.load = 0
            self._settle()
        if any(served.server.peers for served in self.target.service.regions.values()):
            raise Finding("a peer is still here")

    def _settle(self) -> None:
        """Let all be answered that was asked, and read."""
        steps = 0
        while True:
            while self.target.step():
                steps += 1
                if steps > _STEPS:
                    raise Finding("the server's loop spins")
            read = [caller.read(1 << 20) for caller in self.callers]
            if not any(read):
                return

    def _answers(self) -> None:
        honest = _Caller(self.target.control.path)
        self.callers.append(honest)
        honest.send(REQUESTS[0] + b"\n")
        self._settle()
        if len(honest.replies) != 1:
            raise Finding(f"what it said in the end: {honest.replies}")

    def _which(self, which: int) -> _Caller:
        if not self.callers:
            self._op_call(0)
        return self.callers[which % len(self.callers)]

    def _op_call(self, count: int) -> None:
        for _ in range(min(count or 1, _MOST - len(self.callers))):
            self.callers.append(_Caller(self.target.control.path))

    def _op_send(self, which: int, data: bytes) -> None:
        self._which(which).send(data)

    def _op_ask(self, which: int, number: int) -> None:
        self._which(which).send(REQUESTS[number % len(REQUESTS)] + b"\n")

    def _op_json(self, which: int, number: int, value: bytes) -> None:
        begin, colon, _ = REQUESTS[number % len(REQUESTS)].rpartition(b":")
        self._which(which).send(begin + colon + value + b"}\n")

    def _op_long(self, which: int, count: int) -> None:
        self._which(which).send(b"[" * min(2 * count, LONGEST + 100))

    def _op_read(self, which: int, count: int) -> None:
        self._which(which).read(count + 1)

    def _op_shut(self, which: int, how: int) -> None:
        self._which(which).socket.shutdown(how % 3)

    def _op_hang_up(self, which: int) -> None:
        caller = self._which(which)
        self.callers.remove(caller)
        caller.socket.close()

    def _op_peer(self) -> None:
        if len(self.peers) < 8:
            sock = socket.socket(socket.AF_UNIX)
            self.peers.append(sock)
            sock.connect(self.target.service.regions["one"].server.path)

    def _op_leave(self) -> None:
        if self.peers:
            self.peers.pop().close()

    def _op_load(self, what: int) -> None:
        self.target.load = what

    def _op_step(self, count: int) -> None:
        for _ in range(count % 8 + 1):
            self.target.step()


class ControlTarget(Scripted):
    """What callers of the control socket send."""

    name = "control"
    modules = (
        "service/control",
        "service/status",
        "system/requests",
        "service/service",
        "service/reload_plan",
    )
    share = 1
    grammar = Grammar(
        FORMS,
        [[Op("peer"), Op("call", (3,)), Op("step", (3,))], []],
        TOKENS,
    )
    load = 0  # what comes of a reload

    def set_up(self) -> None:
        home = self.undo.enter_context(tempfile.TemporaryDirectory(prefix="ivf", dir="/tmp"))
        self._config = ServiceConfig({"one": RegionConfig(f"{home}/one", size=4096, names=0)})
        self.service = self.undo.enter_context(Service(self._config, load=self._load))
        self.service.open()
        listener = control.listen(f"{home}/control")
        self.control = self.undo.enter_context(control.Control(listener, self.service))
        self._poll = select.poll()
        self._parts = {
            self.control.fileno(): self.control.step,
            **{each.fd: self._serve for each in self.service.regions.values()},
        }
        for fd in self._parts:
            self._poll.register(fd, select.POLLIN)
        for script in self.scripts():  # what is made at first use
            self.play(script)

    def _load(self) -> ServiceConfig:
        if self.load % 3 == 1:
            raise ConfigError("the file is wrong\nin two lines")
        if self.load % 3 == 2:
            raise FileNotFoundError(2, "No such file", "/etc/a\nb")
        return self._config

    def _serve(self) -> None:
        for served in self.service.regions.values():
            served.server.step(0)

    def step(self) -> bool:
        """Let everybody do what there is to do; whether there was anything."""
        ready = self._poll.poll(0)
        for fd, _ in ready:
            self._parts[fd]()
        return bool(ready)

    def play(self, script: Sequence[Op]) -> None:
        Player(self).play(script)

    def scripts(self) -> Sequence[Sequence[Op]]:
        step = Op("step", (7,))
        every = [Op("ask", (0, number)) for number in range(len(REQUESTS))]
        return [
            [Op("peer"), step, Op("call", (1,)), *every, step, Op("read", (0, 9)), step],
            [Op("call", (85,)), *[Op("ask", (n, n)) for n in range(85)], step],
            [Op("load", (1,)), Op("ask", (0, 6)), step, Op("load", (2,)), Op("ask", (0, 6)), step],
            [Op("send", (0, b'{"do": "ver')), step, Op("send", (0, b'sion"}\n')), step],
            [Op("long", (0, 40000)), step, Op("ask", (1, 0)), Op("shut", (0, 1)), step],
            [Op("call", (2,)), Op("ask", (0, 1)), Op("hang up", (0,)), step, Op("peer"), step],
        ]
