"""A running service, handed from one process to another over a Unix socket.

Knows: what passes between the two, and when which of them serves. Does not know: how they found
one another.

The old one says, in a line of JSON, the version of that, what a journal would say, and the numbers
that its descriptors have; then come the descriptors, up to 200 with each byte, of which each is
answered by one, so that no more are on their way than an unprivileged process may send (unix(7),
ETOOMANYREFS). When the new one has understood all that, it says so (MINE); the old one lets go
(YOURS) and ends. Until then the old one serves, whatever becomes of the new one; it makes no step
while it gives. Both ask the kernel first who is at the other end.

Invariants:
1. Never do both serve, and never neither, unless one dies between two bytes at the end.
2. Neither side gives to, or takes from, a process of a user other than root and its own.
3. The new one says MINE only after it has checked what it was told and what it was given.
4. A new one that is stopped or silent holds up the peers for SILENCE seconds, not longer.
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
        """What understands a state: checks it, compares it with descriptors, renumbers them."""

        def check(self, state: Any, /) -> Any: ...
        def examine(self, state: Any, found: Mapping[int, int], /) -> Any: ...
        def renumbered(self, state: Any, found: Mapping[int, int], /) -> Any: ...


SECONDS = 10.0  # for the whole of it, at the taking side
# The giving side serves nobody during a takeover. So it waits only for a process that makes
# progress: one that is stopped (Ctrl-Z) is given up at the next look, and a silent one after this
# long, plus what it needs to read a large state.
SILENCE = 1.0
_LOOK = 0.05  # seconds between two looks at a process that is waited for
_BYTES_A_SECOND = 1 << 20  # of a state; a slow machine reads 5 MiB of it in one

_BATCH = 200  # descriptors in a message; the kernel takes 253
_LONGEST = 1 << 26  # bytes of an offer
_NEXT, _MINE, _YOURS = b"n", b"m", b"y"
_MOST_FDS = 1 << 20
_VERSION = 1  # raised when a state cannot be read by those who read the one before

_OFFER = json_shapes.record(
    {"error": json_shapes.text()},
    ok=json_shapes.flag(),
)
_NUMBERS = json_shapes.record(
    version=json_shapes.integer(),
    numbers=json_shapes.array(json_shapes.integer(0, (1 << 31) - 1), _MOST_FDS),
)


def give(service: Given, sock: socket.socket) -> bool:
    """Hand everything to the process at the other end of `sock`; return whether it has it now.

    Then this process has only to `abandon` the service, to close whatever is to be the other's,
    and `sock` last. Otherwise it continues with it. Only root and this process's user are given
    anything. Blocks for as long as the other makes progress, see SILENCE.
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
        # First of all no child may go on if this process is killed now: both would serve.
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
    """The process that takes, and how long it is waited for."""

    def __init__(self, sock: socket.socket, pid: int) -> None:
        self._sock = sock
        self._pid = pid
        sock.settimeout(_LOOK)

    def send(self, data: bytes) -> None:
        """Send all of it; TimeoutError: the other has read nothing for SILENCE."""
        rest = memoryview(data)
        heard = time.monotonic()
        while rest:
            try:
                rest = rest[self._sock.send(rest) :]
                heard = time.monotonic()
            except TimeoutError:
                self._look(heard + SILENCE)

    def send_fds(self, fds: list[int]) -> None:
        """Send these with one byte; TimeoutError: the other has read nothing for SILENCE."""
        give_up = time.monotonic() + SILENCE
        while True:
            try:
                socket.send_fds(self._sock, [_NEXT], fds)
                return
            except TimeoutError:
                self._look(give_up)

    def answer(self, patience: float) -> bytes:
        """Return one byte; nothing at its end. TimeoutError: it said nothing for so long."""
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
    """Whether a signal or a debugger stopped a process; False if it cannot be seen from here."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            return stat.read().rpartition(b") ")[2][:1] in (b"T", b"t")
    except OSError:
        return False


def take(sock: socket.socket, states: States) -> tuple[Journal, set[int]]:
    """Take over what the process at the other end of `sock` gives.

    Args:
        states: understands what it says of itself.

    It must be root's or this process's user's. What it says is checked before it lets go.

    Returns:
        A journal by which `Service.resume` continues, and the descriptors that it names.

    Raises:
        HandoverError: the other did not let go, or what it said cannot be understood: it continues,
            and nothing is left open here.
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
    """Do it; `undo` closes what came."""
    state, numbers = _offer(sock, states, deadline)
    found: dict[int, int] = {}
    came: list[int] = []  # also what nobody has a number for
    undo.callback(_close_all, came)
    while len(found) < len(numbers):
        _within(sock, deadline)
        byte, fds, flags, _ = socket.recv_fds(sock, 1, _BATCH)
        came += fds
        for fd in fds:
            os.set_inheritable(fd, False)
        found.update(zip(numbers[len(found) :], fds, strict=False))
        if flags & socket.MSG_CTRUNC:
            raise HandoverError(
                f"{len(numbers)} descriptors are too many for this process: raise the limit"
                " with `ulimit -n`"
            )
        if byte != _NEXT or not fds:
            raise HandoverError("the running server ended in the midst of it, or gave us up")
        if len(came) > len(found):
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
        sock.recv(1)  # nothing: it has closed all it had
    return journal, set(came)


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def _offer(sock: socket.socket, states: States, deadline: float) -> tuple[Any, list[int]]:
    """The state that the other offers, checked, and the numbers of its descriptors."""
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
    """The first line, and nothing after it: descriptors come with the byte that follows."""
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
