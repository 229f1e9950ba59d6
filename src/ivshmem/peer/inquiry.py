"""Asks a server what it serves, without becoming its peer.

Knows: the address that marks a question, the form of the answer. Does not know: how a server
answers.
"""

from __future__ import annotations

import contextlib
import os
import time

from ..errors import Misshapen, ServerGone
from ..system import json_shapes
from .connecting import connect

# The abstract address, unix(7), of a process that connects only to ask; random bytes follow. QEMU
# and clients of the protocol have no address.
ASK = b"\0ivshmem-ask-"
_MOST_ANSWER = 4096  # bytes


def question(path: str | os.PathLike[str], timeout: float) -> bytes:
    """Return the first bytes that a server sends to a process that asks; there may be none.

    Raises:
        TimeoutError, OSError: as of `connect`.
    """
    deadline = time.monotonic() + timeout
    with connect(path, timeout, address=ASK + os.urandom(8).hex().encode()) as sock:
        data = b""
        # An answer is JSON. A server of another kind greets us as a peer at once, and then sends
        # nothing, or something once in a while: this waits for neither.
        with contextlib.suppress(TimeoutError, ConnectionResetError):
            while len(data) < _MOST_ANSWER and data[:1] in (b"", b"{"):
                sock.settimeout(max(deadline - time.monotonic(), 0.001))
                if not (more := sock.recv(_MOST_ANSWER)):
                    break
                data += more
    return data


def answer_in(data: bytes) -> dict[str, int]:
    """Parse the answer of a server of this package.

    Raises:
        Misshapen: the bytes are not such an answer.
    """
    answer = json_shapes.loads(data)
    _ANSWER(answer, "answer")
    return {key: value for key, value in answer.items() if type(value) is int}


def ask(path: str | os.PathLike[str], timeout: float) -> dict[str, int]:
    """Ask a server of this package what it serves, without becoming its peer.

    A server answers a process that connects from an abstract address that begins with ASK, in JSON,
    and does not announce it.

    Returns:
        protocol, vectors, size, page_size (bytes) and peers; from newer servers also device and
        inode (of the memory's file) and name_lost (1: the memory's name does not lead to it).

    Raises:
        ServerGone: this server does not answer questions, or its answer makes no sense. (It may
            have announced this process as a peer.)
        TimeoutError, OSError: as of `connect`.
    """
    data = question(path, timeout)
    try:
        return answer_in(data)
    except Misshapen as error:
        why = f": its answer makes no sense ({error})" if data[:1] == b"{" else ""
        where = os.fsdecode(path)
        raise ServerGone(f"{where}: this server does not answer questions{why}") from None


_ANSWER = json_shapes.record(
    protocol=json_shapes.integer(0),
    vectors=json_shapes.integer(0, 2048),
    size=json_shapes.integer(1, 1 << 62),
    page_size=json_shapes.integer(1, 1 << 62),
    peers=json_shapes.integer(0, 1 << 16),
)


def only_asks(address: object) -> bool:
    """Whether an accepted connection comes from `ask`."""
    return isinstance(address, bytes) and address.startswith(ASK)
