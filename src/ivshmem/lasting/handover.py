"""Hands a running service from one process to another, over a Unix socket.

Knows: what the two processes send each other, and which of them serves when. Does not know: how
they found each other.

Both processes first ask the kernel which user is at the other end. Then:
1. The old process sends a line of JSON: its version, the state as a journal would hold it, and the
   numbers of its descriptors.
2. It sends the descriptors, up to 200 with each byte. The new process answers each such byte with
   one. So at most 200 are in flight, fewer than an unprivileged process may have there (unix(7),
   ETOOMANYREFS).
3. When the new process has checked all of that, it sends MINE.
4. The old process lets go, sends YOURS, and ends.
Until step 4 the service belongs to the old process, and continues with it if anything fails. During
the steps the old process serves nobody.

Invariants:
1. Never do both processes serve. Never does neither, unless one of them dies between the last two
   bytes.
2. Neither side gives to, or takes from, a process of a user other than root and its own.
3. The new process sends MINE only after it has checked the state and the descriptors.
4. A new process that is stopped or silent delays the service for SILENCE seconds, not longer.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Mapping

from ..errors import HandoverError, Misshapen, reason_of
from ..system import credentials, json_shapes
from ..system.accounts import user_name
from ..text import counted, plain
from .journal import Journal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol

    class Given(Protocol):
        """What is handed over."""

        @property
        def descriptors(self) -> list[int]: ...
        def snapshot(self) -> Any: ...
        def let_go(self, *, back: bool = ...) -> None: ...

    class States(Protocol):
        """Checks a state, compares it with descriptors, and replaces their numbers."""

        def check(self, state: Any, /) -> Any: ...
        def examine(self, state: Any, found: Mapping[int, int], /) -> Any: ...
        def renumbered(self, state: Any, found: Mapping[int, int], /) -> Any: ...


SECONDS = 10.0  # that the new process waits for all of it
# The old process serves nobody during a takeover. Therefore it waits only for a process that makes
# progress. It gives up one that is stopped (Ctrl-Z) at the next look, and one that is silent after
# this many seconds, plus the time that it takes to read a large state.
SILENCE = 1.0
_LOOK = 0.05  # seconds between two looks at the other process
_BYTES_A_SECOND = 1 << 20  # of a state; even a slow machine reads 5 MiB in a second

_BATCH = 200  # descriptors in a message; the kernel takes 253
_LONGEST = 1 << 26  # bytes of an offer
_NEXT, _MINE, _YOURS = b"n", b"m", b"y"
_MOST_FDS = 1 << 20
_VERSION = 1  # to be raised if a program that reads the states of today cannot read the new ones

_OFFER = json_shapes.record(
    {"error": json_shapes.text()},
    ok=json_shapes.flag(),
)
_NUMBERS = json_shapes.record(
    version=json_shapes.integer(),
    numbers=json_shapes.array(json_shapes.integer(0, (1 << 31) - 1), _MOST_FDS),
)


def give(service: Given, sock: socket.socket) -> bool:
    """Hand everything to the process at the other end of `sock`; return whether that succeeded.

    If so, the caller closes its copies of what the other process has now, and `sock` last. If not,
    the caller continues to serve. Only a process of root or of this process's user is given
    anything. This blocks as long as the other process makes progress: see SILENCE.
    """
    who = credentials.credentials(sock)
    if who.uid not in {0, os.geteuid()}:
        return False
    taker = _Taker(sock, who.pid)
    numbers = service.descriptors
    try:
        state = service.snapshot()
        offer = {"ok": True, "version": _VERSION, "state": state, "numbers": numbers}
        data = json.dumps(offer).encode() + b"\n"
        taker.send(data)
        patience = SILENCE + len(data) / _BYTES_A_SECOND
        for first in range(0, len(numbers), _BATCH):
            taker.send_fds(numbers[first : first + _BATCH])
            if taker.answer(patience) != _NEXT:
                return False
            patience = SILENCE
        if taker.answer(patience) != _MINE:
            return False
        # Let go before the other process begins. If this process were killed in between, its child
        # would continue by the journal, and both would serve.
        service.let_go()
        try:
            sock.sendall(_YOURS)
        except OSError:
            service.let_go(back=True)
            return False
    except OSError:
        return False
    return True


class _Taker:
    """The process that takes over, and how long this process waits for it."""

    def __init__(self, sock: socket.socket, pid: int) -> None:
        self._sock = sock
        self._pid = pid
        sock.settimeout(_LOOK)

    def send(self, data: bytes) -> None:
        """Send all of it.

        Raises:
            TimeoutError: the other process is stopped, or has read nothing for SILENCE seconds.
        """
        rest = memoryview(data)
        heard = time.monotonic()
        while rest:
            try:
                rest = rest[self._sock.send(rest) :]
                heard = time.monotonic()
            except TimeoutError:
                self._look(heard + SILENCE)

    def send_fds(self, fds: list[int]) -> None:
        """Send these descriptors with one byte.

        Raises:
            TimeoutError: as `send`.
        """
        give_up = time.monotonic() + SILENCE
        while True:
            try:
                socket.send_fds(self._sock, [_NEXT], fds)
                return
            except TimeoutError:
                self._look(give_up)

    def answer(self, patience: float) -> bytes:
        """Return the next byte, or b"" if the other process has closed the connection.

        Raises:
            TimeoutError: it is stopped, or sent nothing for `patience` seconds.
        """
        give_up = time.monotonic() + patience
        while True:
            try:
                return self._sock.recv(1)
            except TimeoutError:
                self._look(give_up)

    def _look(self, give_up: float) -> None:
        if time.monotonic() > give_up or _is_stopped(self._pid):
            raise TimeoutError


def _is_stopped(pid: int) -> bool:
    """Whether a signal or a debugger has stopped a process; False if /proc does not show it."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            return stat.read().rpartition(b") ")[2][:1] in (b"T", b"t")
    except OSError:
        return False


def take(sock: socket.socket, states: States) -> tuple[Journal, set[int]]:
    """Take over the service of the process at the other end of `sock`.

    That process must be of root or of this process's user. Its state is checked before it lets go.

    Args:
        states: checks the state.

    Returns:
        A journal for `Service.resume`, and the descriptors that the journal names.

    Raises:
        HandoverError: the other process did not let go, or its state is wrong. The other process
            continues to serve, and no descriptor is left open here.
    """
    who = credentials.credentials(sock)
    if who.uid not in {0, os.geteuid()}:
        trusted = " and ".join(user_name(uid) for uid in sorted({0, os.geteuid()}))
        raise HandoverError(
            f"nothing was taken over: {user_name(who.uid)} offers it (pid {who.pid}), and this"
            f" process trusts only {trusted}: if that is your server, take over as its user; if"
            " not, use a directory where only you can write (-S PATH)"
        )
    deadline = time.monotonic() + SECONDS
    try:
        with contextlib.ExitStack() as undo:
            journal, fds = _take(sock, states, deadline, undo)
            undo.pop_all()
    except TimeoutError:
        raise HandoverError(
            f"nothing was taken over: no answer within {counted(SECONDS, 'second')}: is the server"
            " stopped?"
        ) from None
    except OSError as error:
        raise HandoverError(f"nothing was taken over: {reason_of(error)}") from None
    except Misshapen as error:
        raise HandoverError(f"nothing was taken over: {error}") from None
    return journal, fds


def _take(
    sock: socket.socket, states: States, deadline: float, undo: contextlib.ExitStack
) -> tuple[Journal, set[int]]:
    """Do what `take` does. `undo` closes what was received."""
    state, numbers = _offer(sock, states, deadline)
    found: dict[int, int] = {}
    received: list[int] = []  # more than `found` if the other process sends too many
    undo.callback(_close_all, received)
    while len(found) < len(numbers):
        _within(sock, deadline)
        byte, fds, flags, _ = socket.recv_fds(sock, 1, _BATCH)
        received += fds
        for fd in fds:
            os.set_inheritable(fd, False)
        found.update(zip(numbers[len(found) :], fds, strict=False))
        if flags & socket.MSG_CTRUNC:
            raise HandoverError(
                f"{len(numbers)} descriptors are too many for this process: raise the limit"
                " with `ulimit -n`"
            )
        if byte != _NEXT or not fds:
            raise HandoverError("the running server ended, or cancelled the takeover")
        if len(received) > len(found):
            raise HandoverError("the running server sent descriptors that it does not name")
        sock.sendall(_NEXT)
    states.examine(state, found)
    journal = Journal()
    undo.callback(journal.close)
    journal.rewrite(states.renumbered(state, found))
    sock.sendall(_MINE)
    if sock.recv(1) != _YOURS:
        raise HandoverError("the running server did not let go")
    _within(sock, deadline)
    with contextlib.suppress(OSError):
        sock.recv(1)  # b"": it has closed its copies
    return journal, set(received)


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def _offer(sock: socket.socket, states: States, deadline: float) -> tuple[Any, list[int]]:
    """Return the state that the other process offers, checked, and the numbers of descriptors."""
    offer = _line(sock, deadline)
    _OFFER(offer, "offer")
    if not offer["ok"]:
        reason = plain(offer.get("error", "no reason"))
        raise HandoverError(f"the running server refuses: {reason}")
    _NUMBERS(offer, "offer")
    if offer["version"] != _VERSION:
        raise HandoverError("the running server is of a version that this one does not know")
    numbers = offer["numbers"]
    if len(numbers) != len(set(numbers)):
        raise Misshapen("offer.numbers has one number twice")
    if "state" not in offer:
        raise Misshapen("offer has no state")
    states.check(offer["state"])
    return offer["state"], numbers


def _within(sock: socket.socket, deadline: float) -> None:
    sock.settimeout(max(deadline - time.monotonic(), 0.001))


def _line(sock: socket.socket, deadline: float) -> Any:
    """Read the first line, and no byte more: descriptors come with the next byte."""
    data = bytearray()
    while not data.endswith(b"\n"):
        _within(sock, deadline)
        ahead = sock.recv(1 << 16, socket.MSG_PEEK)
        if not ahead:
            raise ConnectionResetError(errno.ECONNRESET, "the running server ended the connection")
        data += sock.recv(ahead.find(b"\n") + 1 or len(ahead))
        if len(data) > _LONGEST:
            raise Misshapen(f"the offer has more than {_LONGEST} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError
    return json_shapes.loads(data)
