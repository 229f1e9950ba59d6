"""Channels: messages, queues, values, calls and bytes between the peers of a region.

Their layout and protocol are those of `ivshmem_channel.h`, which a program in C can use alone.
"""

from __future__ import annotations

import os

from ..errors import (
    CallFailed,
    ChannelCorrupt,
    ChannelError,
    ChannelExists,
    ChannelTypeError,
    MessagesLost,
    MessageTooLong,
    NoChannels,
    NoSuchChannel,
    Overtaken,
    Redelivered,
    ServerLost,
)
from ..system.late_names import late_name
from .calls import Call, Caller, CallServer, PendingCall
from .channels import Channels, open  # noqa: A004 - as guest.open
from .info import ChannelInfo, PlaceInfo, ReaderInfo, SpoiledInfo, WriterInfo
from .kinds import Bytes, Calls, Channel, Messages, Queue, Value
from .queues import QueueReader, Taken
from .readers import Reader
from .streams import Stream, StreamListener
from .values import ValueReader
from .views import View
from .writers import Loan, Writer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .transport import StreamServer

__all__ = [
    "Bytes",
    "Call",
    "CallFailed",
    "CallServer",
    "Caller",
    "Calls",
    "Channel",
    "ChannelCorrupt",
    "ChannelError",
    "ChannelExists",
    "ChannelInfo",
    "ChannelTypeError",
    "Channels",
    "Loan",
    "MessageTooLong",
    "Messages",
    "MessagesLost",
    "NoChannels",
    "NoSuchChannel",
    "Overtaken",
    "PendingCall",
    "PlaceInfo",
    "Queue",
    "QueueReader",
    "Reader",
    "ReaderInfo",
    "Redelivered",
    "ServerLost",
    "SpoiledInfo",
    "Stream",
    "StreamListener",
    "StreamServer",
    "Taken",
    "Value",
    "ValueReader",
    "View",
    "Writer",
    "WriterInfo",
    "get_include",
    "open",
]


def get_include() -> str:
    """Return the folder of `ivshmem_channel.h`, for a compiler's -I."""
    return os.path.dirname(__file__)


def __getattr__(name: str) -> object:
    """Import what needs asyncio when it is first used: asyncio takes half of the time of it all."""
    return late_name(__name__, name, {"StreamServer": f"{__name__}.transport"})


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
