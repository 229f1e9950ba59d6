"""`ivshmem top`: a server's status, live, and what passes through its channels.

Knows: what is shown of a server. Does not know: terminals and keys (browser.py), how the memory is
found (served_memory.py).
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..errors import IvshmemError
from ..service import control_client
from . import browser, channel_text, control_connection, status_text
from .arguments import add_interval
from .served_memory import ServedChannels
from .tables import Sortable

_SECONDS = 3.0  # for an answer; the keys have to wait for it
_RATES = ("joins", "leaves", "messages", "refused")


def add_to(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "top",
        description="Show what `ivshmem status` prints, and rates per second, again and again, also"
        " those of channels; peers that need attention come first. h shows the keys that sort,"
        " filter and scroll. If the server ends, this waits until it is back. q or Ctrl-C ends it.",
    )
    control_connection.add_options(parser)
    add_interval(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Show the screen until q or Ctrl-C."""
    with contextlib.closing(StatusPoller(options)) as poller:
        browser.browse(poller.first(), poller.next, options.interval)
    return 0


class StatusPoller:
    """Asks again and again, and compares each answer with the one before."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._client: control_client.ControlClient | None = None
        self._guests = status_text.Guests()
        self._before: status_text.StatusReply | None = None
        self._content: browser.Content = []
        self._channels = ServedChannels()

    def first(self) -> browser.Content:
        """Raises what prevents it."""
        return self._ask()

    def next(self) -> browser.Content:
        """What prevents it stands before the last answer then."""
        try:
            return self._ask()
        except (IvshmemError, OSError) as error:
            self.close()
            self._before = None
            return [f"no answer: {' '.join(str(error).split())}", *self._content]

    def _ask(self) -> browser.Content:
        if self._client is None:
            self._client = control_connection.connect(self._options, _SECONDS)
        status = self._client.ask({"do": "status"})
        self._guests.name(status)
        channels = self._channels.rates(status)
        self._content = list(content_of(status, self._before, channels))
        self._before = status
        return self._content

    def close(self) -> None:
        self._channels.close()
        if self._client is not None:
            self._client.close()
        self._client = None


def content_of(
    status: status_text.StatusReply,
    before: status_text.StatusReply | None,
    channels: Mapping[str, Sequence[dict[str, Any]] | str],
) -> Iterator[str | Sortable]:
    """What is shown of a status, if this was the one before.

    Args:
        channels: of each region with channels: their rates, or why they cannot be seen.
    """
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
            yield status_text.sortable(ordered, server["time"])
        rates = channels.get(region["name"], ())
        if isinstance(rates, str):
            yield f"  its channels cannot be seen: {rates}"
        elif rates:
            yield f"  {channel_text.rates_line(rates)}"
            yield channel_text.rates(rates, indent=2)


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
