"""Messages of protocol version 0: 8 bytes, each with at most one descriptor.

Knows: where a message ends, which descriptor belongs to which. Does not know: what a message means.
Source: QEMU, docs/specs/ivshmem-spec.rst, "Client-Server protocol".
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from ..system.named_tuple import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

VERSION = 0
MEMORY = -1  # the message value that brings the region's descriptor

_MESSAGE = struct.Struct("<q")


# -- framing --------------------------------------------------------------------------------------


class Message(NamedTuple):
    """One message: a value, and the descriptors that came with it (none or one, if correct)."""

    value: int
    fds: tuple[Any, ...] = ()


def encode(value: int) -> bytes:
    """Return the 8 bytes of a message: a signed little-endian integer."""
    return _MESSAGE.pack(value)


class Framer:
    """Assembles messages from chunks as they come from the socket, however they were cut."""

    def __init__(self) -> None:
        self._data = b""
        self._fds: tuple[Any, ...] = ()

    @property
    def partial(self) -> bool:
        """Whether a message has begun and not ended."""
        return bool(self._data)

    @property
    def held(self) -> tuple[Any, ...]:
        """Descriptors that came with the message that has not ended."""
        return self._fds

    def after(self, data: bytes, fds: tuple[Any, ...]) -> tuple[Framer, Iterable[Message]]:
        """Do what `feed` does on a copy; return the copy and the messages. This is unchanged."""
        if not self._data and len(data) == _MESSAGE.size:
            return self, [Message(_MESSAGE.unpack(data)[0], fds)]
        framer = Framer()
        framer._data, framer._fds = self._data, self._fds
        return framer, framer.feed(data, fds)

    def feed(self, data: bytes, fds: tuple[Any, ...] = ()) -> Iterable[Message]:
        """Take a chunk and return the messages that it ends.

        `fds` belong to the message with the chunk's last byte: the kernel never reads past a byte
        that carried descriptors.
        """
        if not self._data and len(data) == _MESSAGE.size:
            return [Message(_MESSAGE.unpack(data)[0], fds)]
        if not data:
            return []
        data = self._data + data
        whole = len(data) // _MESSAGE.size
        messages = [Message(value) for (value,) in _MESSAGE.iter_unpack(data[: whole * 8])]
        self._data = data[whole * 8 :]
        if self._data:
            earlier, self._fds = self._fds, fds if messages else self._fds + fds
        else:
            earlier, self._fds = self._fds, ()
            messages[-1] = Message(messages[-1].value, fds)
        if messages and earlier:
            messages[0] = Message(messages[0].value, earlier + messages[0].fds)
        return messages
