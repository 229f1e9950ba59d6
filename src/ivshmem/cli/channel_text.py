"""What is told of channels, as tables.

Knows: columns, and how an area's room is counted. Does not know: where the facts come from.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from ..channel import ChannelInfo, Channels, PlaceInfo, SpoiledInfo, records
from ..memory.sizes import format_size, roughly
from ..text import NAME, counted, plain
from . import terminal
from .channel_counting import lost, per_second, waiting
from .tables import Row, Sortable, table

_HEAD = (
    *("NAME", "KIND", "TYPE", "LIMIT", "SLOTS", "WRITERS", "READERS", "WAITING", "LOST"),
    "SIZE",
)
_RIGHT = range(3, len(_HEAD))
_EXPENDABLE = (9, 4, 3, 2, 8)  # SIZE, SLOTS, LIMIT, TYPE, LOST
_RATES = ("NAME", "KIND", "RATE", "LOST/S", "WAITING", "WRITERS", "READERS")
_COUNTED = ("waiting", "writers", "readers")
_PLACES = ("PLACE", "STATE", "ID", "VECTOR", "PID", "NAME")


def listing(found: Iterable[ChannelInfo]) -> list[str]:
    """Return the table of channels, as wide as the terminal."""
    rows = [_HEAD, *map(_row, found)]
    return table(rows, right=_RIGHT, columns=terminal.columns(), expendable=_EXPENDABLE, squeezed=0)


def spoiled_lines(found: Iterable[SpoiledInfo]) -> list[str]:
    """Return a line about each channel whose record is spoiled."""
    return [
        f"record {each.record}, {each.name!r}, made by {each.maker}, is spoiled, and its memory set"
        f" aside: `ivshmem channel rm --record {each.record} --force` frees it"
        for each in found
    ]


def _row(info: ChannelInfo) -> Sequence[str]:
    writers = info.connections if info.kind == "bytes" else len(info.writers)
    return (
        plain(info.name, NAME),
        info.kind,
        plain(info.type, NAME) or "-",
        format_size(info.limit) if info.kind != "bytes" else "-",
        str(info.slots),
        f"{writers}/{info.max_writers}",
        f"{len(info.readers)}/{info.max_readers}",
        str(waiting(info)),
        str(lost(info)),
        roughly(info.size),
    )


def rate_table(found: Sequence[dict[str, Any]]) -> list[str]:
    """Return the table of rates, as wide as the terminal."""
    return rates(found).lines(terminal.columns())


def rates(found: Sequence[dict[str, Any]], indent: int = 0) -> Sortable:
    """Return the rates of channels; those whose readers lose messages are to be looked at."""
    rows = [
        Row(
            (
                plain(each["name"], NAME),
                each["kind"],
                "-" if each["rate"] is None else per_second(each["rate"]),
                "-" if each["lost_rate"] is None else per_second(each["lost_rate"]),
                *(str(each[what]) for what in _COUNTED),
            ),
            [each[what] for what in ("name", "kind", "rate", "lost_rate", *_COUNTED)],
            alarm=bool(each["lost_rate"]),
        )
        for each in found
    ]
    return Sortable(_RATES, rows, range(2, 7), expendable=(5, 6), squeezed=0, indent=indent)


def rates_line(found: Sequence[dict[str, Any]]) -> str:
    """Return how many channels there are, and what passes through all of them."""
    known = [each["rate"] for each in found if each["rate"] is not None]
    total = f", {per_second(sum(known))} in all" if known else ""
    return counted(len(found), "channel") + total


def area_facts(channels: Channels) -> dict[str, int]:
    """Return the size of the area, and how much of it is free."""
    unit, units, free, most = records.room(channels._member)
    return {
        "size": unit * units,
        "free": unit * free,
        "free_in_one_piece": unit * most,
    }


def described(
    area: dict[str, int], places: Sequence[PlaceInfo], found: Sequence[ChannelInfo]
) -> list[str]:
    """Return lines about the area, its places, and each channel."""
    columns = terminal.columns()
    lines = [
        f"{roughly(area['size'])} for channels, {roughly(area['free'])} free,"
        f" {roughly(area['free_in_one_piece'])} of it in one piece",
        f"{len(places)} other process{'' if len(places) == 1 else 'es'}",
    ]
    if places:
        rows: list[Sequence[str]] = [_PLACES, *map(_place_row, places)]
        lines += [f"  {line}" for line in table(rows, right=(0, 2, 3, 4), columns=columns)]
    for info in found:
        lines += ["", *_channel(info, columns)]
    return lines


def _place_row(place: PlaceInfo) -> Sequence[str]:
    return (
        str(place.place),
        place.state,
        str(place.id),
        "polls" if place.vector is None else str(place.vector),
        str(place.process),
        plain(place.name, NAME),
    )


def _channel(info: ChannelInfo, columns: int | None) -> list[str]:
    made = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(min(info.created, 1 << 33)))
    kind = f"{info.kind}, {info.type}" if info.type else info.kind
    lines = [plain(f"channel {info.name}: {kind}; {roughly(info.size)}, created {made}")]
    if info.kind == "bytes":
        lines.append(
            f"  {counted(info.connections, 'connection')} of {info.max_writers},"
            f" {roughly(info.slots)} for each direction"
        )
    else:
        lines.append(
            f"  messages of {format_size(info.limit)} at most, {counted(info.slots, 'slot')};"
            f" {waiting(info)} waiting, {lost(info)} lost"
        )
    if info.overflow:
        lines.append(f"  readers may {', '.join(info.overflow)}")
    rows: list[Sequence[Any]] = [("", "SLOT", "PLACE", "STATE", "WRITTEN", "WAITING", "LOST", "")]
    rows += [
        ("writer", str(each.slot), str(each.place), each.state, str(each.written), "", "", "")
        for each in info.writers
    ]
    rows += [
        (
            *("reader", str(each.slot), str(each.place), each.state, ""),
            *(str(each.waiting), str(each.lost), each.overflow),
        )
        for each in info.readers
    ]
    if len(rows) > 1:
        lines += [f"  {line}" for line in table(rows, right=(1, 2, 4, 5, 6), columns=columns)]
    return lines
