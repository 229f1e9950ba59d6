"""`ivshmem channel record` and `replay`: messages into a file, and from it into channels.

Knows: options, progress, the last line. Does not know: files and threads (recording/).
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from ..errors import ClosedError
from ..memory.sizes import format_size, parse_size, roughly
from ..recording import library
from ..text import counted, plain
from . import new_file, signals
from .arguments import checked, seconds
from .channel_payload import json_line
from .channel_region import ChannelCommand, add_readonly, joined
from .progress import ProgressBar
from .tables import duration

if TYPE_CHECKING:
    from ..recording.recorder import Recorder

_LOOK = 0.2  # seconds between two looks at which channels there are
_LEAST_BUFFER = 4096  # bytes
_FOREVER = (1 << 64) - 1  # the largest time in MCAP


def _add_record(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="the new file")
    parser.add_argument(
        "names",
        metavar="NAME",
        nargs="*",
        default=[],  # or else an error calls it required
        help="of channels (default: all of messages and values, also those that appear later)",
    )
    parser.add_argument(
        "-t", "--duration", metavar="SECONDS", type=seconds, help="end after so long"
    )
    parser.add_argument(
        "--compression",
        choices=tuple(library.COMPRESSIONS),
        default="none",
        help="of the messages in the file (default: %(default)s)",
    )
    parser.add_argument(
        "--buffer",
        metavar="SIZE",
        type=_size,
        default=library.BUFFER,
        help=f"memory for messages that wait for the disk (default: {format_size(library.BUFFER)})",
    )
    new_file.add_force(parser)
    parser.add_argument(
        "--json", action="store_true", help="at the end print what was recorded as a JSON object"
    )
    add_readonly(parser)


def _add_replay(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="of `record`, or of another program")
    parser.add_argument(
        "--speed",
        metavar="X",
        type=_speed,
        default=1.0,
        help="how many times as fast as it was recorded; `inf`: without a pause (default:"
        " %(default)g)",
    )
    for name, words in (("from", "begin"), ("to", "end")):
        parser.add_argument(
            f"--{name}",
            dest=name + "_time",
            metavar="T",
            help=f"{words} there: seconds from the start of the file, or a time such as"
            " 2026-02-03T04:05:06Z",
        )
    parser.add_argument("--loop", action="store_true", help="again and again, until Ctrl-C")
    parser.add_argument(
        "--json", action="store_true", help="at the end print what was sent as a JSON object"
    )


def _size(text: str) -> int:
    size = checked(parse_size, text)
    if size < _LEAST_BUFFER:
        raise argparse.ArgumentTypeError(f"{text}: {format_size(_LEAST_BUFFER)} or more are needed")
    return size


def _speed(text: str) -> float:
    with contextlib.suppress(ValueError):
        if (number := float(text)) > 0:
            return number
    raise argparse.ArgumentTypeError(f"not a speed: {text} (allowed is more than 0, or inf)")


# -- the commands ---------------------------------------------------------------------------------


def _record(options: argparse.Namespace) -> int:
    library.check(options.compression)
    from ..recording.recorder import Recorder  # here: it needs an extra

    begun = time.monotonic()
    # No threading.Event: its lock is not reentrant, and a signal comes while this thread has it.
    stopped: list[bool] = []
    stop = partial(stopped.append, True)
    with (
        joined(options) as channels,
        signals.held(),
        signals.calling(stop),
        _Progress() as progress,
    ):
        with new_file.told():
            recorder = Recorder(
                channels,
                options.file,
                options.names,
                compression=options.compression,
                buffer=options.buffer,
                replace=options.force,
                tell=progress.say,
            )
        try:
            with recorder:
                while not stopped and recorder.error is None:
                    time.sleep(_LOOK)
                    recorder.look()
                    progress.show(None, _so_far(recorder, time.monotonic() - begun))
                    if options.duration is not None and (
                        time.monotonic() - begun >= options.duration
                    ):
                        break
        finally:
            _conclude(
                options,
                progress,
                f"{counted(recorder.messages, 'message')} of"
                f" {counted(len(recorder.lost), 'channel')} recorded,"
                f" {roughly(recorder.bytes)}; {sum(recorder.lost.values())} lost"
                + (f", {recorder.unwritten} not written" if recorder.unwritten else ""),
                messages=recorder.messages,
                bytes=recorder.bytes,
                lost=recorder.lost,
                unwritten=recorder.unwritten,
            )
    return 0


def _so_far(recorder: Recorder, seconds: float) -> str:
    lost = sum(recorder.lost.values())
    return (
        f"{duration(seconds)}: {counted(recorder.messages, 'message')}, {roughly(recorder.bytes)}"
        f"{f', {lost} lost' if lost else ''}"
    )


def _replay(options: argparse.Namespace) -> int:
    library.check()
    from ..recording.player import Player, moment  # here: they need an extra
    from ..recording.source import RecordedFile

    with (
        joined(options) as channels,
        _Progress() as progress,
        RecordedFile(options.file, lambda share: progress.show(share, "reading")) as source,
        contextlib.ExitStack() as stack,
    ):
        if source.damage:
            progress.say(f"{options.file}: {source.damage}: what comes before is replayed")
        since = 0 if options.from_time is None else moment(options.from_time, source.start)
        until = _FOREVER if options.to_time is None else moment(options.to_time, source.start)
        if until < since:
            raise ValueError("--to is before --from")
        player = stack.enter_context(
            Player(
                channels,
                source,
                speed=options.speed,
                since=max(since, 0),
                until=max(until, 0),
                tell=progress.say,
            )
        )
        first, last = max(since, source.start), min(until, source.end)
        try:

            def step() -> None:
                if channels.closed:  # also while no message is due
                    raise ClosedError("the channels are closed")
                share = (player.position - first) / max(last - first, 1)
                progress.show(share, counted(player.sent, "message"))

            while player.play(step) and options.loop:
                pass
            if options.loop:  # it would never end
                raise ValueError(f"{options.file}: no message of these times")
        finally:
            _conclude(
                options,
                progress,
                f"{counted(player.sent, 'message')} sent"
                + (f"; readers missed {player.missed}" if player.missed else ""),
                messages=player.sent,
                missed=player.missed,
            )
    return 0


def _conclude(options: argparse.Namespace, progress: ProgressBar, line: str, **facts: Any) -> None:
    """Say what was done, also after an error."""
    if options.json:
        progress.wipe()
        print(json_line(file=options.file, **facts), flush=True)
    else:
        progress.say(f"{options.file}: {line}")


class _Progress(ProgressBar):
    """On a terminal only, and not more often than a person sees."""

    def __init__(self) -> None:
        super().__init__(sys.stderr, quiet=not sys.stderr.isatty())
        self._due = 0.0

    def show(self, share: float | None, what: str) -> None:
        if (now := time.monotonic()) >= self._due:
            self._due = now + 0.1
            super().show(share, what)

    def say(self, line: str) -> None:
        super().say(f"ivshmem: {plain(line)}")


COMMANDS = (
    ChannelCommand(
        "record",
        _add_record,
        _record,
        "record messages and values into a file (MCAP)",
        "It ends with Ctrl-C, and never slows who writes: what the disk, or this command, is too"
        " slow for is lost, and counted. After a full disk or SIGKILL the file can be read up to"
        " the last second before. It needs a library: `pip install mcap`.",
    ),
    ChannelCommand(
        "replay",
        _add_replay,
        _replay,
        "send the messages of a file (MCAP) to channels, at the pace at which they were recorded",
        "Channels that are missing are created. Files of other programs are replayed as bytes, into"
        " channels of messages whose schema is the name and the encoding of the file's. It needs a"
        " library: `pip install mcap`.",
    ),
)
