"""What all commands of `ivshmem channel` share: a region's channels, the form of a command.

Knows: how a command joins channels and leaves them. Does not know: how the region is opened
(endpoints.py), what a command does.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from .. import channel
from ..channel.channels import BEAT, LEASE
from ..channel.kinds import Channel, Messages, Queue, Value
from ..errors import ChannelError, ChannelTypeError, IvshmemError
from ..peer.client import Client
from ..peer.endpoint import Disconnected
from . import endpoints, signals

_NAME = "ivshmem channel"  # of this process in the table of places
_LOOK = 0.2  # seconds between two looks whether the server is there
KINDS = ("messages", "queue", "value")  # whose contents commands send and receive


class ChannelCommand(NamedTuple):
    """One command: its name, what adds its options, what runs it, and its help."""

    name: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    text: str
    epilog: str | None = None


def add_readonly(parser: argparse.ArgumentParser) -> None:
    """Add the option by which a host watches without a place and a slot."""
    parser.add_argument(
        "--readonly",
        action="store_true",
        help="on a host: map the region for reading only. That needs no place and no reader's slot,"
        " works where readers may only block, and looks for messages again and again",
    )


@contextlib.contextmanager
def joined(
    options: argparse.Namespace, use: str = "", *, outlives_server: bool = False
) -> Iterator[channel.Channels]:
    """The channels of the region; this process leaves them also if a signal ends the block.

    Args:
        use: "reads": a place in the table is not needed; "observes": it is, if one is free.
        outlives_server: the block continues when the server's connection ends, since the processes
            of the old memory are those that it is about. Otherwise it would wait for ever, while
            all that start from then on meet in the memory of a new server.

    Raises:
        IvshmemError: the connection to the server ended; then calls of the block raised.
        ValueError: a guest's device cannot be mapped for reading only, as the options want it.
    """
    wanted = getattr(options, "readonly", False)
    if wanted and (options.guest or options.address is not None):
        raise ValueError("--readonly is for a host: a guest's device is always mapped for writing")
    readonly = wanted or use == "reads"
    with contextlib.ExitStack() as stack:
        while True:
            endpoint = stack.enter_context(endpoints.opened(options, readonly=readonly))
            stack.enter_context(signals.held())
            try:
                channels = stack.enter_context(channel.open(endpoint, name=_NAME))
                break
            except ChannelError as error:
                # All places are taken. The device of a guest is always mapped for writing.
                if type(error) is not ChannelError or use != "observes" or readonly:
                    raise
                readonly = True
                stack.close()
        stack.enter_context(signals.raised())
        if isinstance(endpoint, Client) and not outlives_server:
            stack.enter_context(_ending_with_server(endpoint, channels))
        yield channels


@contextlib.contextmanager
def _ending_with_server(client: Client, channels: channel.Channels) -> Iterator[None]:
    """Close the channels when the server's connection ends, so that all calls of the block raise.

    Raises:
        IvshmemError: it has ended.
    """
    over = threading.Event()
    reasons: list[str] = []

    def watch() -> None:
        while not over.wait(_LOOK):
            # Or the server would take this client for stalled.
            reasons.extend(
                event.reason for event in client.peer_events() if isinstance(event, Disconnected)
            )
            if not client.connected:
                with contextlib.suppress(BufferError):  # the block looks at a message
                    channels.close()
                break

    thread = threading.Thread(target=watch, name="watches the server", daemon=True)
    thread.start()
    try:
        yield
    except IvshmemError as error:
        if client.connected:
            raise
        reason = reasons[0] if reasons else error
        raise IvshmemError(
            f"server {client.path}: {reason}, and with it this command: start it again at the next"
            " server"
        ) from None
    finally:
        over.set()
        thread.join()


def opened(
    channels: channel.Channels, name: str, kinds: Sequence[str] = KINDS
) -> Messages | Queue | Value:
    """The channel of that name, if its messages can be printed one by one.

    Args:
        kinds: which a message says that the command is for.

    Raises:
        NoSuchChannel, ChannelTypeError: there is none, or it is of another kind.
    """
    found: Channel = channels.open(name)
    if not isinstance(found, Messages | Queue | Value):
        raise ChannelTypeError(
            f"channel {name!r} is of kind {found.kind}: this command is for {', '.join(kinds)}"
        )
    return found


def others(channels: channel.Channels) -> list[channel.PlaceInfo]:
    """The places of all processes except this one."""
    return [
        place for place in channels.places() if place.process != os.getpid() or place.name != _NAME
    ]


def observe() -> None:
    """Wait as long as it takes to see that a process shows no sign of life."""
    time.sleep(LEASE + 2 * BEAT)
