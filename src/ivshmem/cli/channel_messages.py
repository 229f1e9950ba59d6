"""`ivshmem channel put`, `cat`, `tail` and `call`: messages by hand, or from a script."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
import time
from collections.abc import Iterable

from .. import channel
from ..channel import records
from ..channel.kinds import Calls, Messages, Queue, Value
from ..channel.watching import Seen, Watcher
from ..errors import (
    ChannelError,
    ChannelExists,
    ChannelTypeError,
    ClosedError,
    IvshmemError,
    ServerLost,
)
from ..memory.sizes import parse_size
from ..text import counted, plain
from . import standard_input
from .arguments import positive, seconds
from .channel_payload import Form, Output, add_form, json_line
from .channel_region import KINDS, ChannelCommand, add_readonly, joined, opened
from .run import fail

# Exit statuses of `call`, beside 1 for all else that fails.
NO_SERVER = 3
SERVER_LOST = 4
TIME_LIMIT = 5


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
        choices=KINDS,
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


def _add_tail(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="of the channel")
    _add_end(parser)
    add_form(parser)
    parser.add_argument("--lines", action="store_true", help="write a newline after each message")
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object for each message: its data, time, writer, position and size,"
        " and how many were lost before it",
    )
    add_readonly(parser)


def _add_end(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-n", "--count", metavar="N", type=positive, help="end after N messages (default: never)"
    )
    parser.add_argument(
        "-t",
        "--timeout",
        metavar="SECONDS",
        type=seconds,
        help="end if no message comes for so long (default: none)",
    )


def _add_call(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="of the channel")
    parser.add_argument(
        "data",
        metavar="REQUEST",
        nargs="?",
        help="what is asked (default: all of the standard input)",
    )
    parser.add_argument(
        "-t",
        "--timeout",
        metavar="SECONDS",
        type=seconds,
        default=10.0,
        help="time limit for the reply (default: %(default)g); `inf`: none",
    )
    add_form(parser)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object: the reply and its time"
    )


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
    with joined(options) as channels:
        found, made = (
            _created(channels, options)
            if options.create
            else (opened(channels, options.name), False)
        )
        kind, found._type = found._type, None  # bytes, also of arrays, and without numpy
        try:
            with found.writer() as writer:
                for message in _given(options, channels):
                    if kind is not None:
                        kind.interface(len(message))  # or it says that the size is wrong
                    writer.put(message, options.timeout)
                    made = False  # it has something that a reader can take
                if isinstance(found, Messages) and writer.missed:
                    missed = counted(writer.missed, "message")
                    print(f"ivshmem: readers that were too slow missed {missed}", file=sys.stderr)
        except Exception:
            if made:
                with contextlib.suppress(IvshmemError):  # another process uses it already
                    found.remove()
            raise
    return 0


def _given(options: argparse.Namespace, channels: channel.Channels) -> Iterable[bytes]:
    """The messages: of the command line, or of standard input as long as the channels are open."""
    if options.data is not None:
        return [os.fsencode(options.data)]

    def check() -> None:
        if channels.closed:
            raise ClosedError("channels are closed")  # `joined` says by whom

    if options.lines:
        return standard_input.lines(check)
    return [b"".join(standard_input.pieces(check))]


def _created(
    channels: channel.Channels, options: argparse.Namespace
) -> tuple[Messages | Queue | Value, bool]:
    """Return the channel that the options describe, and whether this call made it.

    Raises:
        ChannelExists, ChannelTypeError: there is one that is different.
    """
    limit = parse_size(options.limit)

    def create(*, exist_ok: bool) -> Messages | Queue | Value:
        if options.create == "value":
            return channels.create_value(options.name, limit=limit, exist_ok=exist_ok)
        create = channels.create_queue if options.create == "queue" else channels.create_messages
        return create(
            options.name,
            limit=limit,
            slots=options.slots or 16,
            writers=options.writers or 4,
            exist_ok=exist_ok,
        )

    try:
        return create(exist_ok=False), True
    except ChannelExists:
        pass
    try:
        return create(exist_ok=True), False
    except (ChannelExists, ChannelTypeError) as error:
        raise type(error)(
            f"{error}: omit --create and its options to use it as it is, or remove it: `ivshmem"
            f" channel rm {options.name}`"
        ) from None


def _cat(options: argparse.Namespace) -> int:
    count = options.count
    with joined(options) as channels:
        found = opened(channels, options.name)
        found._type = None  # bytes, also of arrays, and without numpy
        if count is None and isinstance(found, Value):
            count = 1
        output = Output(count, options.lines)
        if isinstance(found, Value):
            _show_content(found, output, options)
        elif isinstance(found, Queue):
            _take(found, output, options)
        else:
            _follow(found, output, options)
    if isinstance(found, Value) and not output.shown:
        raise TimeoutError(f"channel {options.name!r} has no content yet{_after(options)}")
    return _ended(output, options)


def _ended(output: Output, options: argparse.Namespace) -> int:
    """Return 0, or raise TimeoutError: fewer messages came than were wanted."""
    if output.most is None or output.shown == output.most:
        return 0
    raise TimeoutError(
        f"channel {options.name!r}: {output.shown} of {output.most} messages came{_after(options)}"
    )


def _after(options: argparse.Namespace) -> str:
    return "" if options.timeout is None else f" within {counted(options.timeout, 'second')}"


def _follow(found: Messages, output: Output, options: argparse.Namespace) -> None:
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


def _take(found: Queue, output: Output, options: argparse.Namespace) -> None:
    """Show the messages of a queue. One that cannot be written is given back."""
    with found.reader() as reader:
        while (taken := reader.take(options.timeout)) is not None:
            with taken:
                more = output.show(bytes(taken))
            if not more:
                break


def _show_content(found: Value, output: Output, options: argparse.Namespace) -> None:
    """Show what a value has, and what it has after each change."""
    with found.reader() as reader:
        content = reader.get()
        if content is None:
            content = reader.wait_changed(options.timeout or 0)
        while content is not None and output.show(content):
            content = reader.wait_changed(options.timeout)


def _tail(options: argparse.Namespace) -> int:
    with joined(options) as channels:
        found = opened(channels, options.name, ("messages", "value"))
        if isinstance(found, Queue):
            raise ChannelTypeError(
                f"channel {options.name!r} is a queue, whose messages each go to one reader: `cat`"
                " takes them, and `hz` counts them without taking any"
            )
        kind, found._type = found._type, None  # bytes, which `form` shows
        form = Form(options.form, kind, options.name)
        output = Output(options.count, options.lines, form)
        with Watcher(found) as watcher:
            try:
                while (seen := watcher.take(options.timeout)) is not None:
                    if not (
                        output.print(_described(seen, form))
                        if options.json
                        else output.show(seen.data)
                    ):
                        break
            finally:
                if watcher.lost and not options.json:
                    lost = counted(watcher.lost, "message")
                    print(f"ivshmem: {lost} lost: this command was too slow", file=sys.stderr)
    return _ended(output, options)


def _described(seen: Seen, form: Form) -> str:
    """A message that was seen, as JSON."""
    return json_line(
        data=form.value(seen.data),
        time=seen.time,
        writer=seen.writer,
        position=seen.position,
        size=seen.size,
        lost=seen.lost,
    )


def _call(options: argparse.Namespace) -> int:
    limit = None if math.isinf(options.timeout) else options.timeout
    request = sys.stdin.buffer.read() if options.data is None else os.fsencode(options.data)
    with joined(options, outlives_server=True) as channels:
        found = channels.open(options.name, "calls")
        assert isinstance(found, Calls)
        kind, found._type = found._type, None  # bytes, also of arrays, and without numpy
        form = Form(options.form, kind, options.name)
        if kind is not None:
            kind.interface(len(request))  # or it says that the size is wrong
        (info,) = [info for info in channels.list() if info.name == plain(options.name)]
        if all(server.state != "open" for server in info.readers):
            fail(ChannelError(f"channel {options.name!r}: no server is at work that could reply"))
            return NO_SERVER
        begun = time.monotonic()
        try:
            with found.caller() as caller:
                reply = caller.call(request, limit)
        except ServerLost as error:
            fail(error)
            return SERVER_LOST
        except TimeoutError as error:
            fail(error)
            return TIME_LIMIT
        took = time.monotonic() - begun
    output = Output(1, False, form)
    if options.json:
        output.print(json_line(reply=form.value(reply), seconds=took))
    else:
        output.show(reply)
    return 0


COMMANDS = (
    ChannelCommand(
        "put",
        _add_put,
        _put,
        "send a message to a channel of messages or a queue, or set a value",
        "Examples: `ivshmem channel put log hello`;"
        " `ivshmem channel put log hello --create messages --limit 4K`",
    ),
    ChannelCommand(
        "cat",
        _add_cat,
        _cat,
        "print the messages that come, take those of a queue, or print the content of a value",
        "On a terminal each message is a line, with its control characters written out. Otherwise"
        " the bytes are written as they are. Exit status 1: fewer than N messages came in time.",
    ),
    ChannelCommand(
        "tail",
        _add_tail,
        _tail,
        "print the messages that come from now on, or the contents of a value as it changes",
        "It never slows who writes: if it is too slow, it loses messages, and says how many. On a"
        " terminal each message is a line, with its control characters written out. Otherwise text"
        " is written as it is.",
    ),
    ChannelCommand(
        "call",
        _add_call,
        _call,
        "send a request, and print the reply",
        "Exit status 3: no server is at work; 4: the server that had begun is gone, and whether it"
        " did the work is not known; 5: no reply came in time; 1: all else, for instance that the"
        " server replied that it failed.",
    ),
)
