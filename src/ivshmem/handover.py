"""A running service, handed from one process to another over a Unix socket.

Knows: what passes between the two, and when which of them serves. Does not know: how they found
one another.

The old one says, in a line of JSON, the version of that, what a journal would say, and the numbers
that its descriptors have; then come the descriptors, up to 200 with each byte, of which each is
answered by one, so that no more are on their way than an unprivileged process may send (unix(7),
ETOOMANYREFS). When the new one has understood all that, it says so (MINE); the old one lets go
(YOURS) and ends. Until then the old one serves, whatever becomes of the new one; it makes no step
meanwhile.

Invariants:
1. Never do both serve, and never neither, unless one dies between two bytes at the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Mapping
from typing import Any

from .config import ServiceConfig, from_json
from .errors import IvshmemError
from .journal import Journal
from .protocol import Roster
from .replay import replay
from .service import Service

SECONDS = 10.0  # for the whole of it: nobody is served meanwhile

_BATCH = 200  # descriptors in a message; the kernel takes 253
_NEXT, _MINE, _YOURS = b"n", b"m", b"y"
_VERSION = 1  # raised when a state cannot be read by those who read the one before


class HandoverError(IvshmemError):
    """A service was not handed over; the old process goes on with it."""


def give(service: Service, sock: socket.socket) -> bool:
    """Hand everything to the process at the other end of `sock`; whether it has it now.

    Then this process has only to `abandon` the service, to close whatever is to be the other's,
    and `sock` last. Otherwise it goes on with it.
    """
    deadline = time.monotonic() + SECONDS
    numbers = service.descriptors
    try:
        state = service.snapshot()
        offer = {"ok": True, "version": _VERSION, "state": state, "numbers": numbers}
        _within(sock, deadline)
        sock.sendall(json.dumps(offer).encode() + b"\n")
        for first in range(0, len(numbers), _BATCH):
            _within(sock, deadline)
            socket.send_fds(sock, [_NEXT], numbers[first : first + _BATCH])
            if sock.recv(1) != _NEXT:
                return False
        _within(sock, deadline)
        if sock.recv(1) != _MINE:
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


def take(sock: socket.socket) -> tuple[Journal, set[int]]:
    """Take over what the process at the other end of `sock` gives.

    Returns:
        A journal by which `Service.resume` goes on, and the descriptors that it names.

    Raises:
        HandoverError: the other did not let go, or what it said cannot be understood: it goes on.
    """
    deadline = time.monotonic() + SECONDS
    found: dict[int, int] = {}
    try:
        _within(sock, deadline)
        offer = _line(sock, deadline)
        if not offer.get("ok"):
            raise HandoverError(f"the running server refuses: {offer.get('error')}")
        if offer.get("version") != _VERSION:
            raise HandoverError("the running server is of a version that this one does not know")
        numbers = [int(number) for number in offer["numbers"]]
        _rehearse(offer["state"])
        while len(found) < len(numbers):
            _within(sock, deadline)
            byte, fds, flags, _ = socket.recv_fds(sock, 1, _BATCH)
            found.update(zip(numbers[len(found) :], fds, strict=False))
            for fd in fds:
                os.set_inheritable(fd, False)
            if flags & socket.MSG_CTRUNC:
                raise HandoverError(
                    f"{len(numbers)} descriptors are too many for this process: raise the limit"
                    " with `ulimit -n`"
                )
            if byte != _NEXT or not fds:
                raise HandoverError("the running server ended in the midst of it")
            sock.sendall(_NEXT)
        journal = Journal()
        journal.rewrite(_renumbered(offer["state"], found))
        sock.sendall(_MINE)
        if sock.recv(1) != _YOURS:
            raise HandoverError("the running server did not let go")
        _within(sock, deadline)
        with contextlib.suppress(OSError):
            sock.recv(1)  # nothing: it has closed all it had
    except TimeoutError:
        for fd in found.values():
            os.close(fd)
        raise HandoverError(
            f"nothing was taken over: no answer within {SECONDS:g} seconds: is the server stopped?"
        ) from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        for fd in found.values():
            os.close(fd)
        raise HandoverError(f"nothing was taken over: {error}") from None
    except HandoverError:
        for fd in found.values():
            os.close(fd)
        raise
    return journal, set(found.values())


def _within(sock: socket.socket, deadline: float) -> None:
    sock.settimeout(max(deadline - time.monotonic(), 0.001))


def _line(sock: socket.socket, deadline: float) -> dict[str, Any]:
    """The first line, and nothing after it: descriptors come with the byte that follows."""
    data = bytearray()
    while b"\n" not in data:
        _within(sock, deadline)
        ahead = sock.recv(1 << 16, socket.MSG_PEEK)
        if not ahead:
            raise HandoverError("the running server ended the connection")
        data += sock.recv(ahead.find(b"\n") + 1 or len(ahead))
    offer = json.loads(data)
    if not isinstance(offer, dict):
        raise ValueError("no object in the first line")
    return offer


def _rehearse(state: Any) -> None:
    """Read all of a state once, for who has let go cannot be asked again.

    Raises:
        ValueError, LookupError, TypeError, AttributeError: it cannot be read.
    """
    int(state["next"])
    ServiceConfig.from_json({"regions": {}, **state["service"]})
    for record, server in state["regions"]:
        _, _, values, _, _, _, _, _, _, _ = record
        config = from_json(values)
        replay(Roster(config.vectors, ()), server, (), None)


def _renumbered(state: Any, found: Mapping[int, int]) -> Any:
    """What a service said of itself, with the numbers that its descriptors have here."""
    for record, server in state["regions"]:
        record[3], record[5] = found[record[3]], found[record[5]]
        for held in server["held"].values():
            held[0] = found[held[0]]
            held[1] = [found[fd] for fd in held[1]]
    return state
