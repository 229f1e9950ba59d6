"""A server's status as text: regions, and a table of their peers.

Knows: what a status has (control.py documents it), how to say it in columns. Does not know: where
it comes from, and what it is printed on.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence

from ..memory.sizes import format_size
from ..qemu.guest_name import guest_of
from ..system import processes
from ..text import NAME, counted, plain
from .tables import Row, Sortable, duration
from .tables import table as columned

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypeAlias

    StatusReply: TypeAlias = Mapping[str, Any]

HEAD = ("ID", "PID", "UID", "PROCESS", "GUEST OR NAMES", "FOR", "VECTORS", "STATE", "INTERRUPTS")
_RIGHT = {0, 1, 2, 6}  # columns of numbers
# Left out on a narrow terminal, in this order: VECTORS, FOR, UID, INTERRUPTS, PROCESS, PID.
_EXPENDABLE = (6, 5, 2, 8, 3, 1)
_COUNTED = ("join", "leave", "message")  # since the start, each under its plural
_MOST_NAMES = 3
_MOST_CALLED = 4 * NAME  # characters of a guest and its names
_MOST_INTERRUPTS = 8

# What is said of memory whose name is not its own any more.
_LOST = {
    "nothing": "; its name was removed: a process that opens the name now does not share this"
    " memory. Restart the server and its guests",
    "another": "; its name now belongs to another file: a process that opens the name does not"
    " share this memory. Restart the server and its guests",
}


class Guests:
    """Names of the guests that peers run, each looked up once.

    The asking process does this, not the server: a process can make the reader of its command line
    wait for as long as it likes.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[int, float], str] = {}

    def name(self, status: StatusReply) -> None:
        """Give each peer of a status a "guest", "" if it is none that is to be seen from here."""
        before, self._known = self._known, {}
        visible = status["server"]["pid_namespace"] == processes.pid_namespace() != 0
        for region in status["regions"]:
            for peer in region.get("peers", ()):
                key = (peer["pid"], peer["since"])
                name = before.get(key)
                if name is None:
                    name = guest_of(*key) if visible else ""
                peer["guest"] = self._known[key] = name


def server_line(server: StatusReply) -> str:
    """The process: who it is, and what it takes."""
    fds = server["fds"]
    limit = "any number of" if fds["limit"] is None else fds["limit"]
    return (
        f"server pid {server['pid']}, ivshmem {server['version']}, up"
        f" {duration(server['time'] - server['since'])}: {fds['open']} of {limit} descriptors,"
        f" {server['resident'] / 2**20:.1f} MiB, {server['cpu']:.2f} s of CPU"
    )


def region_line(region: StatusReply) -> str:
    """What is served, and where."""
    where = " ".join(filter(None, (region["source"], region["memory"])))
    vectors = counted(region["vectors"], "vector")
    channels = region.get("channels", 0)
    aside = f", {format_size(channels)} for channels" if channels else ""
    return (
        f"region {region['name']}: {format_size(region['size'])} ({where}){aside}, {vectors}, on"
        f" {region['socket']}{_LOST.get(region.get('memory_leads_to', ''), '')}"
    )


def counts_line(region: StatusReply) -> str:
    """How many there are, and what there was since the start."""
    counts = region["counts"]
    since = ", ".join(counted(counts.get(f"{what}s", 0), what) for what in _COUNTED)
    since += f", {counts.get('refused', 0)} refused"
    return f"{number_of_peers(region)}; since the start {since}"


def number_of_peers(region: StatusReply) -> str:
    return counted(len(region["peers"]), "peer")


def peer_row(peer: StatusReply, now: float) -> list[str]:
    """A peer as a row under HEAD."""
    return [
        str(peer["id"]),
        str(peer["pid"]),
        str(peer["uid"]),
        plain(peer["process"], NAME),
        _called(peer),
        duration(now - peer["since"]),
        str(peer["vectors"]),
        _state(peer, now),
        _interrupts(peer["interrupts"]),
    ]


def sortable(peers: Sequence[StatusReply], now: float) -> Sortable:
    """Peers as a table that a person can sort; those that do not read are to be looked at."""
    rows = [
        Row(
            cells := peer_row(peer, now),
            [
                *(peer["id"], peer["pid"], peer["uid"], *cells[3:5], now - peer["since"]),
                *(peer["vectors"], cells[7], sum(peer["interrupts"])),
            ],
            alarm=peer["stalled_since"] is not None,
        )
        for peer in peers
    ]
    return Sortable(HEAD, rows, _RIGHT, _EXPENDABLE, indent=2)


def table(rows: Iterable[Sequence[str]], columns: int | None = None) -> list[str]:
    """Rows under HEAD, as wide as a terminal with so many columns; None: as wide as they are."""
    return columned([HEAD, *rows], right=_RIGHT, columns=columns, expendable=_EXPENDABLE)


def _called(peer: StatusReply) -> str:
    names = peer["names"][:_MOST_NAMES]
    more = [".."] if len(peer["names"]) > _MOST_NAMES else []
    guest = [peer["guest"]] if peer.get("guest") else []
    return plain(", ".join(guest + names + more), _MOST_CALLED) or "-"


def _state(peer: StatusReply, now: float) -> str:
    parts = []
    if peer["stalled_since"] is not None:
        clock = time.strftime("%H:%M:%S", time.localtime(peer["stalled_since"]))
        parts.append(f"stalled since {clock} ({duration(now - peer['stalled_since'])})")
    if peer["pending"]:
        parts.append(f"{peer['pending']} unsent")
    if not peer["set_up"]:
        parts.append("setting up")
    if peer["readonly"]:
        parts.append("read-only")
    if peer.get("held"):  # servers of older versions do not say
        until = peer["held_until"]
        parts.append("held" if until is None else f"held for {duration(until - now)}")
    if peer.get("leaves_held"):
        parts.append(f"{counted(peer['leaves_held'], 'leave')} held back")
    return ", ".join(parts) or "up to date"


def _interrupts(counts: Sequence[int]) -> str:
    """Those pending, as vector:count."""
    pending = [f"{vector}:{count}" for vector, count in enumerate(counts) if count]
    more = (
        [f"and {len(pending) - _MOST_INTERRUPTS} more"] if len(pending) > _MOST_INTERRUPTS else []
    )
    return " ".join(pending[:_MOST_INTERRUPTS] + more) or "-"
