"""Internal: what one forward does, as settings.

Knows: defaults, and which settings contradict each other. Does not know: where they were given.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..memory.sizes import format_size
from ..system.named_tuple import NamedTuple
from .addresses import Address

CONNECTIONS = 64
BUFFER = 1 << 16  # bytes
MOST_CONNECTIONS = 4096
LEAST_BUFFER, MOST_BUFFER = 1 << 12, 1 << 30
SILENCE = 10.0  # seconds


class ForwardConfig(NamedTuple):
    """One forward: the channel, and the sockets at this side of it.

    Attributes:
        name: of the channel.
        connect: where each connection that comes through the channel leads to.
        listen: where sockets are accepted, which connect through the channel.
        mode: permissions of the file of a Unix socket that listens; None: as the umask says.
        connections, buffer: of the channel, if it must be made: how many there can be at once, and
            the bytes that each holds in each direction. None: it is as it is, or the default.
    """

    name: str
    connect: Address | None = None
    listen: Address | None = None
    mode: int | None = None
    connections: int | None = None
    buffer: int | None = None


def check_connections(number: int) -> int:
    """Return the number, if a channel can have so many connections; ValueError."""
    if not 1 <= number <= MOST_CONNECTIONS:
        raise ValueError(f"1 to {MOST_CONNECTIONS} connections are possible")
    return number


def check_buffer(size: int) -> int:
    """Return the size, if a connection can have such a buffer; ValueError."""
    if size & (size - 1) or not LEAST_BUFFER <= size <= MOST_BUFFER:
        raise ValueError(
            f"a buffer of {format_size(size)}: allowed are powers of two from"
            f" {format_size(LEAST_BUFFER)} to {format_size(MOST_BUFFER)}"
        )
    return size


def problems(config: ForwardConfig) -> list[str]:
    """Return what is wrong with a forward, each as the rest of a line."""
    found = []
    if config.connect is None and config.listen is None:
        found.append(
            "it needs connect (where each connection leads to) or listen (where connections come"
            " from)"
        )
    if config.connect is not None and config.listen is not None:
        found.append(
            "connect and listen are for its two sides: take one of them here, and the other one"
            " where the other side runs"
        )
    if config.mode is not None and (config.listen is None or config.listen.path[:1] != "/"):
        found.append("mode is for listen = unix:PATH: only a socket with a path has permissions")
    return found


def check_addresses(configs: Sequence[ForwardConfig]) -> None:
    """Refuse two forwards that listen at one address.

    Raises:
        ValueError: which ones.
    """
    first: dict[Address, str] = {}
    for config in configs:
        if config.listen is None or not (config.listen.port or config.listen.path):
            continue  # for port 0 the kernel chooses one
        other = first.setdefault(config.listen._replace(text=""), config.name)
        if other != config.name:
            raise ValueError(
                f"forward {config.name}: forward {other} listens at {config.listen.text}, too: give"
                " each an address of its own"
            )
