"""Internal: the channel of a forward: found, or made by the side that comes first.

Knows: how large it is. Does not know: what passes through it.
"""

from __future__ import annotations

from ..channel import Bytes, Channels
from ..channel.kinds import Channel
from ..errors import ChannelError, ChannelExists, ChannelTypeError, NoSuchChannel
from ..memory.sizes import format_size
from ..system.named_tuple import NamedTuple
from .config import BUFFER, CONNECTIONS, ForwardConfig

_LISTENERS = 8  # a guest that was started anew listens while its former place is still taken


class Sizes(NamedTuple):
    """Of a channel: how many connections, and the bytes that each holds in each direction."""

    connections: int
    buffer: int


def opened(channels: Channels, config: ForwardConfig, former: dict[str, Sizes]) -> Bytes:
    """Return the channel of a forward; make it if there is none.

    Args:
        former: by name, the sizes that channels had, which they are made with if they are gone. So
            it does not matter which side comes back first. Changed by this call.

    Raises:
        ChannelTypeError: there is one of that name, of another kind or of other sizes than those
            that were asked for.
        ChannelError: there is no room for it; the message says how much it needs.
    """
    while True:
        try:
            found = channels.open(config.name, "bytes")
        except NoSuchChannel:
            try:
                found = _made(channels, config, former)
            except ChannelExists:
                continue  # the other side was quicker
        assert isinstance(found, Bytes)
        for what, wanted, there in (
            ("connections", config.connections, found.connections),
            ("buffer", config.buffer, found.slots),
        ):
            if wanted not in (None, there):
                raise ChannelTypeError(
                    f"forward {config.name}: {what} {wanted}: the channel is there with {there};"
                    f" omit --{what}, or remove the channel: `ivshmem channel rm {config.name}`"
                )
        former[config.name] = Sizes(found.connections, found.slots)
        return found


def said_of(error: ChannelError, name: str) -> str:
    """Return the text of an error of `Bytes.connect`, with what a user of forwards can do."""
    return str(error).replace(
        "; create it with more connections",
        f": wait until one ends; or for more, end both sides, `ivshmem channel rm {name}`, and"
        " start them again with --connections N",
    )


def _made(channels: Channels, config: ForwardConfig, former: dict[str, Sizes]) -> Channel:
    sizes = former.get(config.name, Sizes(CONNECTIONS, BUFFER))
    connections = config.connections or sizes.connections
    buffer = config.buffer or sizes.buffer
    try:
        return channels.create_bytes(
            config.name, buffer=buffer, connections=connections, listeners=_LISTENERS
        )
    except ChannelExists:
        raise
    except ChannelError as error:
        if type(error) is not ChannelError:
            raise
        raise ChannelError(
            f"forward {config.name}: {connections} connections with {format_size(buffer)} in each"
            f" direction need {format_size(2 * connections * buffer)}: take fewer with"
            " --connections or --buffer, or make the region with more by `ivshmem serve --channels"
            f" SIZE` ({error})"
        ) from None
