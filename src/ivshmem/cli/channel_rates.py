"""`ivshmem channel hz`, `bw` and `top`: how many messages pass, and how many bytes.

Knows: what is counted, and when it is printed. Does not know: how a rate is computed
(channel_counting.py), and how messages are read without slowing their writers
(channel/watching.py).
"""

from __future__ import annotations

import argparse
import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from .. import channel
from ..channel.kinds import Bytes, Calls, Channel, Messages, Queue, Value
from ..channel.watching import Watcher
from ..errors import ChannelTypeError, IvshmemError, NoSuchChannel
from ..system.time_limits import left_until
from ..text import plain
from . import browser, channel_text, screen
from .arguments import add_interval, positive
from .channel_counting import Arrivals, Positions, Rates, bandwidth_line, rate_line
from .channel_payload import json_line
from .channel_region import ChannelCommand, add_readonly, joined

_LOOK = 0.1  # seconds after which a thread looks whether it is to end


def _add_watched(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", metavar="NAME", nargs="+", help="of channels")
    _add_times(parser)
    parser.add_argument(
        "-w",
        "--window",
        metavar="N",
        type=positive,
        default=10_000,
        help="compute over the last N messages (default: %(default)s)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object for each channel and time"
    )
    add_readonly(parser)


def _add_times(parser: argparse.ArgumentParser) -> None:
    add_interval(parser)
    parser.add_argument(
        "-n", "--count", metavar="N", type=positive, help="end after N reports (default: never)"
    )


def _add_top(parser: argparse.ArgumentParser) -> None:
    _add_times(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object for each report")


# -- hz and bw ------------------------------------------------------------------------------------


def _hz(options: argparse.Namespace) -> int:
    return _report(options, rate_line)


def _bw(options: argparse.Namespace) -> int:
    return _report(options, bandwidth_line)


def _report(options: argparse.Namespace, line_of: Callable[[dict[str, object]], str]) -> int:
    """Watch the channels, and print a line for each at each interval."""
    sized = line_of is bandwidth_line
    with joined(options) as channels, contextlib.ExitStack() as stack:
        counted: dict[str, Arrivals | Positions] = {}
        for name in dict.fromkeys(options.names):
            found = channels.open(name)
            if isinstance(found, Messages | Value):
                found._type = None  # bytes, also of arrays, and without numpy
                counted[name] = stack.enter_context(_arrivals(found, options.window))
            else:
                counted[name] = _positions(found, sized)
        for number in _each_time(options, channels):
            positions = {info.name: info for info in channels.list()}
            for name, count in counted.items():
                if plain(name) not in positions:
                    raise NoSuchChannel(f"channel {name!r} was removed")
                facts = count.report(positions[plain(name)], time.monotonic())
                if not number:
                    continue
                if options.json:
                    print(json_line(channel=name, time=time.time(), **facts), flush=True)
                else:
                    print(plain(f"{name}: {line_of(facts)}"), flush=True)
    return 0


def _positions(found: Channel, sized: bool) -> Positions:
    """What counts a channel whose messages may not be taken."""
    if isinstance(found, Bytes):
        raise ChannelTypeError(
            f"channel {found.name!r} is of kind bytes: only the two ends of a stream can count it"
        )
    assert isinstance(found, Queue | Calls)
    if sized:
        raise ChannelTypeError(
            f"channel {found.name!r} is of kind {found.kind}: its messages have to be taken to see"
            " their sizes; `hz` counts them without taking any"
        )
    return Positions()


@contextlib.contextmanager
def _arrivals(found: Messages | Value, window: int) -> Iterator[Arrivals]:
    """Note in a thread what arrives, while the block runs."""
    arrivals = Arrivals(window)
    ended = threading.Event()

    def note() -> None:
        try:
            while not ended.is_set():
                seen = watcher.take(_LOOK, copied=False)
                if seen is not None:
                    arrivals.add(time.monotonic(), seen.size, seen.lost)
        except IvshmemError as error:
            arrivals.error = error  # which the next report raises

    with Watcher(found) as watcher:
        thread = threading.Thread(target=note, name=f"watches {found.name}", daemon=True)
        thread.start()
        try:
            yield arrivals
        finally:
            ended.set()
            thread.join()


def _each_time(options: argparse.Namespace, channels: channel.Channels) -> Iterator[int]:
    """Count from 0 on: at once, and after each interval, of which there are as many as wanted.

    If the channels are closed, the interval ends at once.
    """
    due = time.monotonic()
    yield 0
    number = 0
    while number != options.count:
        due += options.interval
        while (left := left_until(due)) and not channels.closed:
            time.sleep(min(left, _LOOK))
        number += 1
        yield number


# -- top ------------------------------------------------------------------------------------------


def _top(options: argparse.Namespace) -> int:
    with joined(options, "reads") as channels:
        rates = Rates()
        if screen.is_there() and not options.json:

            def content() -> browser.Content:
                rows = rates.next(channels.list(), time.monotonic())
                return [channel_text.rates_line(rows), channel_text.rates(rows)]

            browser.browse(
                content(),
                content,
                options.interval,
                count=options.count,
                ended=lambda: channels.closed,
            )
            return 0
        for number in _each_time(options, channels):
            rows = rates.next(channels.list(), time.monotonic())
            if not number:
                continue  # no rates yet
            if options.json:
                print(json_line(time=time.time(), channels=rows), flush=True)
            else:
                lines = channel_text.rate_table(rows)
                print(*([""] if number > 1 else []), *lines, sep="\n", flush=True)
    return 0


COMMANDS = (
    ChannelCommand(
        "hz",
        _add_watched,
        _hz,
        "print how many messages pass per second, and the intervals between them",
        "No writer is slowed: what this command does not see in time still counts. Of a queue and"
        " of calls it takes nothing, and counts what was put and what was done. The intervals are"
        " those at which messages arrive here.",
    ),
    ChannelCommand(
        "bw",
        _add_watched,
        _bw,
        "print how many bytes pass per second, and the sizes of messages",
        "No writer is slowed: messages that this command does not see in time count with the mean"
        " size of the others.",
    ),
    ChannelCommand(
        "top",
        _add_top,
        _top,
        "show the rates of all channels, again and again",
        "It reads positions only: it takes no message, and needs no reader's slot. RATE: messages"
        " per second. LOST/S: messages per second that readers lost. h shows the keys that sort,"
        " filter and scroll; q or Ctrl-C ends it. If the output is not a terminal, one table"
        " follows the other.",
    ),
)
