"""Internal: files over a connection of a channel of bytes.

Knows: io's layers. Does not know: how a connection works.
"""

from __future__ import annotations

import io
from typing import Any, Protocol

from ..system.uncopied import Uncopied


class ByteConnection(Protocol):
    """What a file needs of a stream; both raise BlockingIOError as a socket does."""

    def recv_into(self, buffer: Any, /) -> int: ...
    def send(self, data: Any, /) -> int: ...


class _Raw(Uncopied, io.RawIOBase):
    """A connection's bytes, unbuffered."""

    def __init__(self, stream: ByteConnection, mode: str) -> None:
        self._stream = stream
        self._mode = mode

    def readable(self) -> bool:
        return "r" in self._mode

    def writable(self) -> bool:
        return "w" in self._mode

    def readinto(self, buffer: Any) -> int | None:
        try:
            return self._stream.recv_into(buffer)
        except BlockingIOError:
            return None

    def write(self, data: Any) -> int | None:
        try:
            return self._stream.send(data)
        except BlockingIOError:
            return None


def over(
    stream: ByteConnection,
    mode: str,
    buffering: int | None,
    encoding: str | None,
    errors: str | None,
    newline: str | None,
) -> Any:
    """Return a file as socket.makefile does; the arguments are those of open().

    Raises:
        ValueError: a mode that has other letters than r, w and b; text without a buffer.
    """
    if not mode or not set(mode) <= {"r", "w", "b"}:
        raise ValueError(f"mode {mode!r}: r, w, rw, and b for bytes")
    raw = _Raw(stream, mode)
    if buffering is None or buffering < 0:
        buffering = io.DEFAULT_BUFFER_SIZE
    if buffering == 0:
        if "b" not in mode:
            raise ValueError("a file of text has a buffer")
        return raw
    buffered: Any
    if raw.readable() and raw.writable():
        buffered = io.BufferedRWPair(raw, raw, buffering)
    elif raw.readable():
        buffered = io.BufferedReader(raw, buffering)
    else:
        buffered = io.BufferedWriter(raw, buffering)
    return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)
