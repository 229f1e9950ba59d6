"""`ivshmem channel`: the channels of a region, by hand or from a script."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict

from .. import channel
from ..channel import records
from ..channel.channels import BEAT, LEASE
from ..channel.kinds import Channel, Messages, Queue, Value
from ..channel.membership import NO_AREA
from ..errors import (
    ChannelError,
    ChannelTypeError,
    NoChannels,
)
from ..memory.sizes import parse_size
from ..native import areas
from ..text import counted, plain
from . import channel_text, endpoints, signals
from .arguments import positive, seconds

_NAME = "ivshmem channel"  # of this process in the table of places
_KINDS = ("messages", "queue", "value")  # whose contents this command sends and receives


def add_to(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "channel",
        description="List the channels of a region, send and receive messages, and remove what is"
        " not needed any more. The region is that of a server, or of a device in a virtual"
        " machine.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, run, text, epilog in _COMMANDS:
        command = commands.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}.", epilog=epilog
        )
        command.set_defaults(run=run)
        _ARGUMENTS[name](command)
        endpoints.add_to(command)


def _add_ls(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _add_info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", nargs="?", help="of a channel (default: all)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _add_put(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="of the channel")
    parser.add_argument(
        "data",
        metavar="DATA",
        nargs="?",
        help="the message (default: all of the standard input)",
    )
    parser.add_argument(
        "--lines", action="store_true", help="send each line of the standard input as a message"
    )
    parser.add_argument(
        "-t",
        "--timeout",
        metavar="SECONDS",
        type=seconds,
        help="time limit for each message, if the channel is full (default: none)",
    )
    parser.add_argument(
        "--create",
        metavar="KIND",
        choices=_KINDS,
        help="create the channel if it does not exist: messages, queue or value; needs --limit",
    )
    parser.add_argument(
        "--limit", metavar="SIZE", help="with --create: size of the longest message"
    )
    parser.add_argument(
        "--slots",
        metavar="N",
        type=positive,
        help="with --create: number of messages of each writer that are kept (default: 16)",
    )
    parser.add_argument(
        "--writers",
        metavar="N",
        type=positive,
        help="with --create: number of writers at once, 64 at most (default: 4). In a queue each"
        " call of this command counts as one until its messages were taken",
    )


def _add_cat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="of the channel")
    parser.add_argument(
        "-n",
        "--count",
        metavar="N",
        type=positive,
        help="end after N messages (default: never; of a value: 1)",
    )
    parser.add_argument(
        "-t",
        "--timeout",
        metavar="SECONDS",
        type=seconds,
        help="end if no message comes for so long (default: none)",
    )
    parser.add_argument("--lines", action="store_true", help="write a newline after each message")
    parser.add_argument(
        "--history",
        metavar="N",
        type=int,
        default=0,
        help="begin with the last N messages of each writer, as far as they are there",
    )
    parser.add_argument(
        "--overflow",
        choices=tuple(records.OVERFLOW),
        help="what happens if this command is too slow for the writers of messages (default: the"
        " first of overwrite, discard and block that the channel allows)",
    )


def _add_rm(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", nargs="?", help="of the channel to remove")
    parser.add_argument(
        "--place",
        metavar="N",
        type=int,
        help="free the place of a process that will never run again, instead of removing a channel"
        " (see `channel info`)",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="also if a process uses it. If that process still stores into the memory, it can"
        " spoil other messages",
    )


# -- the commands ---------------------------------------------------------------------------------


def _ls(options: argparse.Namespace) -> int:
    with _joined(options, "reads") as channels:
        found = channels.list()
    if options.json:
        print(json.dumps({"channels": [asdict(info) for info in found]}))
    elif found:
        print(*channel_text.listing(found), sep="\n")
    else:
        print("ivshmem: no channels yet: a program, or `put --create`, makes one", file=sys.stderr)
    return 0


def _info(options: argparse.Namespace) -> int:
    with _joined(options, "observes") as channels:
        if options.name is not None:
            channels.open(options.name)  # or it says which there are
        places = _others(channels)
        if places and not channels.readonly:
            _observe()
            places = _others(channels)
        found = [
            info for info in channels.list() if options.name is None or info.name == options.name
        ]
        area = channel_text.area_facts(channels)
    if options.json:
        shown = {
            "area": area,
            "places": [asdict(place) for place in places],
            "channels": [asdict(info) for info in found],
        }
        print(json.dumps(shown))
    else:
        print(*channel_text.described(area, places, found), sep="\n")
    return 0


def _put(options: argparse.Namespace) -> int:
    if options.lines and options.data is not None:
        raise ValueError("--lines is for lines of the standard input: it excludes DATA")
    given = [f"--{name}" for name in ("limit", "slots", "writers") if getattr(options, name)]
    if options.create is None and given:
        raise ValueError(f"{' and '.join(given)}: only with --create KIND")
    if options.create is not None and options.limit is None:
        raise ValueError("--create needs --limit SIZE: how long the longest message can be")
    if options.create == "value" and given != ["--limit"]:
        raise ValueError("--slots and --writers: a value has one writer, and no slots")
    with _joined(options) as channels:
        found = _created(channels, options) if options.create else _opened(channels, options.name)
        kind, found._type = found._type, None  # bytes, also of arrays, and without numpy
        with found.writer() as writer:
            for message in _given(options):
                if kind is not None:
                    kind.interface(len(message))  # or it says that the size is wrong
                writer.put(message, options.timeout)
            if isinstance(found, Messages) and writer.missed:
                missed = counted(writer.missed, "message")
                print(f"ivshmem: readers that were too slow missed {missed}", file=sys.stderr)
    return 0


def _given(options: argparse.Namespace) -> Iterable[bytes]:
    """The messages: of the command line, or of standard input."""
    if options.data is not None:
        return [os.fsencode(options.data)]
    if options.lines:
        return (line.removesuffix(b"\n") for line in sys.stdin.buffer)
    return [sys.stdin.buffer.read()]


def _created(channels: channel.Channels, options: argparse.Namespace) -> Messages | Queue | Value:
    limit = parse_size(options.limit)
    if options.create == "value":
        return channels.create_value(options.name, limit=limit, exist_ok=True)
    create = channels.create_queue if options.create == "queue" else channels.create_messages
    return create(
        options.name,
        limit=limit,
        slots=options.slots or 16,
        writers=options.writers or 4,
        exist_ok=True,
    )


class _Output:
    """Writes messages to standard output, and counts them."""

    def __init__(self, most: int | None, lines: bool) -> None:
        self.most = most
        self.shown = 0
        self._end = b"\n" if lines else b""
        self._terminal = sys.stdout.isatty()

    def show(self, message: bytes) -> bool:
        """Write one; whether more are to come."""
        if self._terminal:
            print(plain(message.removesuffix(b"\n")), flush=True)
        else:
            sys.stdout.buffer.write(message + self._end)
            sys.stdout.buffer.flush()
        self.shown += 1
        return self.shown != self.most


def _cat(options: argparse.Namespace) -> int:
    count = options.count
    with _joined(options) as channels:
        found = _opened(channels, options.name)
        found._type = None  # bytes, also of arrays, and without numpy
        if count is None and isinstance(found, Value):
            count = 1
        output = _Output(count, options.lines)
        if isinstance(found, Value):
            _show_content(found, output, options)
        elif isinstance(found, Queue):
            _take(found, output, options)
        else:
            _follow(found, output, options)
    if count is None or output.shown == count:
        return 0
    after = "" if options.timeout is None else f" within {counted(options.timeout, 'second')}"
    if isinstance(found, Value) and not output.shown:
        raise TimeoutError(f"channel {options.name!r} has no content yet{after}")
    raise TimeoutError(f"channel {options.name!r}: {output.shown} of {count} messages came{after}")


def _follow(found: Messages, output: _Output, options: argparse.Namespace) -> None:
    """Show the messages that come, until none comes in time."""
    overflow = options.overflow
    if overflow is None:  # first what holds up no writer
        overflow = next((way for way in ("overwrite", "discard") if way in found.overflow), "block")
    with found.reader(overflow, history=options.history) as reader:
        try:
            while (message := reader.get(options.timeout)) is not None:
                if not output.show(message):
                    break
        finally:
            if reader.lost:
                lost = counted(reader.lost, "message")
                print(f"ivshmem: {lost} lost: this command was too slow", file=sys.stderr)


def _take(found: Queue, output: _Output, options: argparse.Namespace) -> None:
    """Show the messages of a queue. One that cannot be written is given back."""
    with found.reader() as reader:
        while (taken := reader.take(options.timeout)) is not None:
            with taken:
                more = output.show(bytes(taken))
            if not more:
                break


def _show_content(found: Value, output: _Output, options: argparse.Namespace) -> None:
    """Show what a value has, and what it has after each change."""
    with found.reader() as reader:
        content = reader.get()
        if content is None:
            content = reader.wait_changed(options.timeout or 0)
        while content is not None and output.show(content):
            content = reader.wait_changed(options.timeout)


def _rm(options: argparse.Namespace) -> int:
    if (options.name is None) == (options.place is None):
        raise ValueError("give the NAME of a channel, or --place N")
    if options.name is not None:
        with _joined(options) as channels:
            channels.remove(options.name, force=options.force)
        print(plain(f"channel {options.name} was removed"))
        return 0
    if options.place < 0:
        raise ValueError(f"place {options.place}: places have numbers from 0 on")
    if options.force:
        freed = _freed_at_once(options)
    else:
        with _joined(options) as channels:
            freed = _freed(channels, options.place)
    if not freed:
        raise ChannelError(f"place {options.place} is free: no process has it")
    print(f"place {options.place} was freed")
    return 0


def _freed_at_once(options: argparse.Namespace) -> bool:
    """Free a place without having one: perhaps all are taken."""
    with endpoints.opened(options) as endpoint:
        area = areas.find_area(endpoint.region)
        if area is None:
            raise NoChannels(NO_AREA)
        return areas.free_place(endpoint.region, area.offset, options.place)


def _freed(channels: channel.Channels, number: int) -> bool:
    """Free a place whose process shows no sign of life."""
    if all(place.place != number for place in _others(channels)):
        return False
    _observe()
    for place in _others(channels):
        if place.place == number and place.state != "silent":
            raise ChannelError(
                f"place {number} is {place.state} (PID {place.process}, {place.name!r}): --force"
                " frees it nevertheless"
            )
    # This process, or another one, may have proven during that time that it is gone.
    channels.free_place(number)
    return True


# -- the region -----------------------------------------------------------------------------------


@contextlib.contextmanager
def _joined(options: argparse.Namespace, use: str = "") -> Iterator[channel.Channels]:
    """The channels of the region; this process leaves them also if a signal ends the block.

    Args:
        use: "reads": a place in the table is not needed; "observes": it is, if one is free.
    """
    readonly = use == "reads"
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
        yield channels


def _opened(channels: channel.Channels, name: str) -> Messages | Queue | Value:
    """The channel of that name, if its messages can be printed one by one.

    Raises:
        NoSuchChannel, ChannelTypeError: there is none, or it is of another kind.
    """
    found: Channel = channels.open(name)
    if not isinstance(found, Messages | Queue | Value):
        raise ChannelTypeError(
            f"channel {name!r} is of kind {found.kind}: this command is for {', '.join(_KINDS)}"
        )
    return found


def _others(channels: channel.Channels) -> list[channel.PlaceInfo]:
    """The places of all processes except this one."""
    return [
        place for place in channels.places() if place.process != os.getpid() or place.name != _NAME
    ]


def _observe() -> None:
    """Wait as long as it takes to see that a process shows no sign of life."""
    time.sleep(LEASE + 2 * BEAT)


_ARGUMENTS = {
    "ls": _add_ls,
    "info": _add_info,
    "put": _add_put,
    "cat": _add_cat,
    "rm": _add_rm,
}
_COMMANDS = (
    (
        "ls",
        _ls,
        "list the channels",
        "WAITING: messages that the slowest reader has yet to take; of a queue: that no reader is"
        " done with; of calls: that have no reply yet. LOST: messages that readers lost because"
        " they were too slow. Of bytes, WRITERS are connections, and READERS are listeners.",
    ),
    (
        "info",
        _info,
        "show the area, the processes that use channels, and who writes and reads each channel",
        "The command observes for a second which processes show signs of life. What it shows is"
        " what these processes say of themselves.",
    ),
    (
        "put",
        _put,
        "send a message to a channel of messages or a queue, or set a value",
        "Examples: `ivshmem channel put log hello`;"
        " `ivshmem channel put log hello --create messages --limit 4K`",
    ),
    (
        "cat",
        _cat,
        "print the messages that come, take those of a queue, or print the content of a value",
        "On a terminal each message is a line, with its control characters written out. Otherwise"
        " the bytes are written as they are. Exit status 1: fewer than N messages came in time.",
    ),
    ("rm", _rm, "remove a channel, or free the place of a process that is gone", None),
)
