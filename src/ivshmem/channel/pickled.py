"""Internal: messages that are Python objects: pickle protocol 5, with large buffers beside it.

Knows: the form of such a message. Does not know: channels.

To unpickle executes what the message says. So both ends must ask for it, and it is for regions that
no other user can write to.

    4  "pkl5"
    4  how many buffers, at most 65536; further ones stand in the pickle
    8  bytes of the pickle, and 8 for each buffer: its bytes
    .. the pickle, and the buffers, each at a multiple of 64
"""

from __future__ import annotations

import pickle
import struct
from typing import Any

from ..errors import ChannelTypeError

_MAGIC = b"pkl5"
_ALIGNMENT = 64
_MOST_BUFFERS = 1 << 16


class Pickled:
    """What stands for a type where both ends said pickle=True."""

    in_place = False  # what lies in memory is not the object
    undecodable = (Exception,)  # what `decode` raises again for the same message

    def encode(self, thing: object) -> bytearray:
        """Return a message.

        Raises:
            pickle.PicklingError, TypeError: it cannot be pickled.
        """
        buffers: list[pickle.PickleBuffer] = []

        def goes_inside(buffer: pickle.PickleBuffer) -> bool:
            """Whether it stands in the pickle itself, as there are too many beside it."""
            if len(buffers) == _MOST_BUFFERS:
                return True
            buffers.append(buffer)
            return False

        stream = pickle.dumps(thing, protocol=5, buffer_callback=goes_inside)
        parts = [memoryview(stream), *(buffer.raw() for buffer in buffers)]
        sizes = [part.nbytes for part in parts]
        message = bytearray(_MAGIC + struct.pack(f"<I{len(sizes)}Q", len(buffers), *sizes))
        for part in parts:
            message += bytes(-len(message) % _ALIGNMENT)
            message += part
        return message

    def decode(self, data: bytes) -> Any:
        """Return the object. Its buffers are copies, which it may change.

        Raises:
            ChannelTypeError: it is not such a message; the other end did not say pickle=True.
            Anything that a pickle raises.
        """
        parts = _parts_of(memoryview(bytearray(data)))
        if parts is None:
            raise ChannelTypeError(
                "a message that is not a pickle: the other end must say pickle=True, too"
            )
        return pickle.loads(parts[0], buffers=parts[1:])  # noqa: S301 - the user said pickle=True


def _parts_of(data: memoryview) -> list[memoryview] | None:
    if len(data) < 16 or data[:4] != _MAGIC:
        return None
    (count,) = struct.unpack_from("<I", data, 4)
    if count > _MOST_BUFFERS or len(data) < 16 + 8 * count:
        return None
    at = 16 + 8 * count
    parts = []
    for size in struct.unpack_from(f"<{1 + count}Q", data, 8):
        at += -at % _ALIGNMENT
        if size > len(data) - at:
            return None
        parts.append(data[at : at + size])
        at += size
    return parts
