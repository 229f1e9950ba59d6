"""`ivshmem top`: a server's status, live."""

from __future__ import annotations

import argparse
import contextlib
import shutil
import time
from collections.abc import Iterator

from ..errors import IvshmemError
from ..service import control_client
from ..system.time_limits import left_until
from . import control_connection, screen, status_text
from .arguments import interval

_SECONDS = 3.0  # for an answer; the keys have to wait for it
_RATES = ("joins", "leaves", "messages", "refused")


def add_to(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "top",
        description="Show what `ivshmem status` prints, and rates per second, again and again;"
        " peers that need attention come first. If the server ends, this waits until"
        " it is back. q or Ctrl-C ends it.",
    )
    control_connection.add_options(parser)
    parser.add_argument(
        "-i",
        "--interval",
        metavar="SECONDS",
        type=interval,
        default=1.0,
        help="time between two updates, 0.1 to 3600 (default: %(default)g)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Show the screen until q or Ctrl-C."""
    with contextlib.closing(StatusPoller(options)) as poller:
        lines = poller.first()
        with contextlib.suppress(KeyboardInterrupt), screen.shown() as shown:
            due = time.monotonic() + options.interval
            while True:
                shown.draw(lines)
                if shown.key(left_until(due)) in ("q", "Q"):
                    break
                if time.monotonic() >= due:
                    lines = poller.next()
                    due = time.monotonic() + options.interval
    return 0


class StatusPoller:
    """Asks again and again, and compares each answer with the one before."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._client: control_client.ControlClient | None = None
        self._guests = status_text.Guests()
        self._before: status_text.StatusReply | None = None
        self._lines: list[str] = []

    def first(self) -> list[str]:
        """Raises what prevents it."""
        return self._ask()

    def next(self) -> list[str]:
        """What prevents it stands before the last answer then."""
        try:
            return self._ask()
        except (IvshmemError, OSError) as error:
            self.close()
            self._before = None
            return [f"no answer: {' '.join(str(error).split())}", *self._lines]

    def _ask(self) -> list[str]:
        if self._client is None:
            self._client = control_connection.connect(self._options, _SECONDS)
        status = self._client.ask({"do": "status"})
        self._guests.name(status)
        self._lines = list(lines_of(status, self._before, shutil.get_terminal_size().columns))
        self._before = status
        return self._lines

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
        self._client = None


def lines_of(
    status: status_text.StatusReply,
    before: status_text.StatusReply | None,
    columns: int | None = None,
) -> Iterator[str]:
    """What a screen of so many columns shows of a status, if this was the one before."""
    server = status["server"]
    if before is not None and before["server"]["pid"] != server["pid"]:
        before = None
    seconds = 0.0 if before is None else server["time"] - before["server"]["time"]
    yield status_text.server_line(server) + _share(server, before, seconds)
    earlier = {} if before is None else {r["name"]: r["counts"] for r in before["regions"]}
    for region in status["regions"]:
        yield ""
        yield status_text.region_line(region)
        yield f"  {status_text.number_of_peers(region)}; per second: " + ", ".join(
            f"{_rate(region['counts'], earlier.get(region['name']), name, seconds)} {name}"
            for name in _RATES
        )
        if region.get("unreachable"):
            yield f"  nobody can connect: {region['socket']} {region['unreachable']}"
        if region["paused"]:
            yield f"  newcomers wait: {region['paused']}"
        if region["peers"]:
            ordered = sorted(region["peers"], key=_attention)
            rows = [status_text.peer_row(peer, server["time"]) for peer in ordered]
            yield from (f"  {line}" for line in status_text.table(rows, columns and columns - 2))


def _share(
    server: status_text.StatusReply, before: status_text.StatusReply | None, seconds: float
) -> str:
    if before is None or seconds <= 0:
        return ""
    return f", {(server['cpu'] - before['server']['cpu']) / seconds:.1%} CPU now"


def _rate(
    now: status_text.StatusReply, before: status_text.StatusReply | None, name: str, seconds: float
) -> str:
    if before is None or seconds <= 0:
        return "-"
    return f"{(now.get(name, 0) - before.get(name, 0)) / seconds:.1f}"


def _attention(peer: status_text.StatusReply) -> tuple[object, ...]:
    """The stalled first, then those with most to be told or to take, then by id."""
    stalled = peer["stalled_since"]
    return (
        stalled is None,
        stalled or 0.0,
        -peer["pending"],
        -sum(peer["interrupts"]),
        peer["id"],
    )
