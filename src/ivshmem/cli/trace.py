"""`ivshmem trace`: who is rung, and when, in a file for Perfetto.

Knows: options, when to end, the last line. Does not know: how rings are seen (tracing/).
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from functools import partial
from typing import Any

from ..errors import IvshmemError
from ..text import NAME, counted, plain
from ..tracing.chrome import ChromeTrace
from ..tracing.watcher import Joined, RingWatcher
from . import control_connection, new_file, signals
from .arguments import add_socket, seconds, server_of

_LOOK = 0.2  # seconds between two looks at the clock and at names
_SETTLE = 0.5  # seconds after which who is there is known, if the server does not say so
_LIMIT = 1_000_000  # events: 100 MB of JSON, which the viewers can still open
_TRIES = 50  # to find out which processes the peers are: a server that has just begun answers late
_SECONDS = 2.0  # for the server to say which processes the peers are


def add_to(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "trace",
        description="Record which peer was rung, on which vector, when, and when its process took"
        " the interrupt, until Ctrl-C. The file is JSON that https://ui.perfetto.dev and"
        " chrome://tracing open. This is a peer, which rings nobody and takes no interrupt from"
        " others.",
        epilog="Who rang is known only where one other peer can have done it. Rings that follow one"
        " another too quickly, and their takings, are seen as one.",
    )
    parser.add_argument("file", metavar="FILE", help="the new file")
    parser.add_argument(
        "-t", "--duration", metavar="SECONDS", type=seconds, help="end after so long"
    )
    parser.add_argument(
        "--limit",
        metavar="N",
        type=_count,
        default=_LIMIT,
        help="end after so many rings (default: %(default)s)",
    )
    new_file.add_force(parser)
    add_socket(parser)
    parser.set_defaults(run=run, control=None)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"not a number of rings: {text} (allowed is 1 or more)")
    return int(text)


def run(options: argparse.Namespace) -> int:
    """Record until a signal, a limit, or the server's end."""
    stopped: list[bool] = []
    told = False
    with contextlib.ExitStack() as stack:
        watcher = stack.enter_context(RingWatcher(server_of(options)))
        with new_file.told():
            trace = ChromeTrace(options.file, replace=options.force)
        stack.callback(trace.close)
        stack.enter_context(signals.held())
        stack.enter_context(signals.calling(partial(stopped.append, True)))
        names = _Names(options, watcher)
        begun = flushed = time.monotonic()
        end = float("inf") if options.duration is None else begun + options.duration
        try:
            while not stopped and not watcher.over and time.monotonic() < end:
                for event in watcher.watch(_LOOK):
                    trace.add(event)
                    if isinstance(event, Joined):
                        names.ask()
                for peer, name in names.found().items():
                    trace.name(peer, name)
                if not told and (watcher.ready or time.monotonic() >= begun + _SETTLE):
                    told = True
                    _tell(f"watching {counted(len(watcher.peers), 'peer')}: Ctrl-C ends this")
                if time.monotonic() >= flushed + _LOOK:  # what is killed leaves what came before
                    trace.flush()
                    flushed = time.monotonic()
                if trace.rings >= options.limit:
                    _tell(f"{counted(trace.rings, 'ring')} were recorded: this ends (--limit)")
                    break
        finally:
            trace.end(time.monotonic_ns())
            _tell(
                f"{counted(trace.rings, 'ring')} in {time.monotonic() - begun:.1f} s,"
                f" {trace.taken} taken: open {plain(options.file)} at https://ui.perfetto.dev"
            )
    if watcher.over and not stopped:
        raise IvshmemError(f"{watcher.over}: the file has what came before")
    return 0


class _Names:
    """Which processes the peers are, if this user may ask the server; asked again after a join."""

    def __init__(self, options: argparse.Namespace, watcher: RingWatcher) -> None:
        self._options = options
        self._watcher = watcher
        self._tries = 0
        self._due = 0.0

    def ask(self) -> None:
        """A peer has joined."""
        self._tries = _TRIES

    def found(self) -> dict[int, str]:
        """Return the names by id; none, unless they were to be asked for and are known."""
        if not self._tries or time.monotonic() < self._due:
            return {}
        names = self._asked()
        self._tries = 0 if names else self._tries - 1
        self._due = time.monotonic() + _LOOK
        return names

    def _asked(self) -> dict[int, str]:
        here = self._watcher.peers
        with contextlib.suppress(OSError, IvshmemError):
            with control_connection.connect(self._options, _SECONDS) as client:
                for region in client.ask({"do": "status"})["regions"]:
                    found = {peer["id"]: peer for peer in region["peers"]}
                    if found.keys() >= here | {self._watcher.id}:  # else it is another region
                        return {number: _process(found[number]) for number in here}
        return {}


def _process(peer: dict[str, Any]) -> str:
    return f"peer {peer['id']}: {plain(peer['process'], NAME)} ({peer['pid']})"


def _tell(text: str) -> None:
    print(f"ivshmem: {text}", file=sys.stderr)
