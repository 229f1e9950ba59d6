"""`ivshmem channel ls`, `info` and `rm`: what a region's area for channels has."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from .. import channel
from ..channel.membership import NO_AREA
from ..errors import ChannelError, NoChannels
from ..native import areas
from ..peer.channel_area import obstacle
from ..text import plain
from . import channel_text, endpoints
from .channel_region import ChannelCommand, joined, observe, others


def _add_ls(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _add_info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", nargs="?", help="of a channel (default: all)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


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
        "--record",
        metavar="N",
        type=int,
        help="with --force: remove a channel whose record is spoiled, by the number of the record"
        " (see `channel info`)",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="also if a process uses it. If that process still stores into the memory, it can"
        " spoil other messages",
    )


def _ls(options: argparse.Namespace) -> int:
    with joined(options, "reads") as channels:
        found, spoiled = channels.list(), channels.spoiled()
    if options.json:
        print(json.dumps({"channels": _as_json(found), "spoiled": _as_json(spoiled)}))
    elif found or spoiled:
        lines = channel_text.listing(found) if found else []
        print(*lines, *channel_text.spoiled_lines(spoiled), sep="\n")
    else:
        put = "ivshmem channel put NAME --create messages --limit 1K"
        print(f"ivshmem: no channels yet: a program makes one, or `{put}`", file=sys.stderr)
    return 0


def _info(options: argparse.Namespace) -> int:
    with joined(options, "observes") as channels:
        if options.name is not None:
            channels.open(options.name)  # or it says which there are
        places = others(channels)
        if places and not channels.readonly:
            observe()
            places = others(channels)
        found = [
            info for info in channels.list() if options.name is None or info.name == options.name
        ]
        spoiled = channels.spoiled() if options.name is None else ()
        area = channel_text.area_facts(channels)
    if options.json:
        parts = {"places": places, "channels": found, "spoiled": spoiled}
        print(json.dumps({"area": area, **{name: _as_json(each) for name, each in parts.items()}}))
    else:
        lines = channel_text.described(area, places, found)
        print(*lines, *channel_text.spoiled_lines(spoiled), sep="\n")
    return 0


def _as_json(facts: Any) -> Any:
    """Return facts as json.dumps takes them: of each with names a dict."""
    if hasattr(facts, "_asdict"):
        return {name: _as_json(value) for name, value in facts._asdict().items()}
    if isinstance(facts, tuple | list):
        return [_as_json(each) for each in facts]
    return facts


def _rm(options: argparse.Namespace) -> int:
    if [options.name, options.place, options.record].count(None) != 2:
        raise ValueError("give the NAME of a channel, --place N, or --record N")
    if options.record is not None:
        if not options.force:
            raise ValueError(
                "--record N needs --force: it is not known which processes use the channel; give it"
                " only if you know that none of them stores into its memory any more"
            )
        with joined(options) as channels:
            channels.remove_spoiled(options.record)
        print(f"the channel of record {options.record} was removed")
        return 0
    if options.name is not None:
        with joined(options) as channels:
            try:
                channels.remove(options.name, force=options.force)
            except ChannelError as error:
                if type(error) is not ChannelError or options.force:
                    raise
                raise ChannelError(
                    f"channel {options.name!r} is in use: `ivshmem channel info` says by which"
                    " processes (--force: only if you know that none of them stores into its memory"
                    " any more)"
                ) from None
        print(plain(f"channel {options.name} was removed"))
        return 0
    if options.place < 0:
        raise ValueError(f"place {options.place}: places have numbers from 0 on")
    if options.force:
        freed = _freed_at_once(options)
    else:
        with joined(options) as channels:
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
            raise NoChannels(obstacle(endpoint.region) or NO_AREA)
        return areas.free_place(endpoint.region, area.offset, options.place)


def _freed(channels: channel.Channels, number: int) -> bool:
    """Free a place whose process shows no sign of life."""
    if all(place.place != number for place in others(channels)):
        return False
    observe()
    for place in others(channels):
        if place.place == number and place.state != "silent":
            raise ChannelError(
                f"place {number} is {place.state} (PID {place.process}, {place.name!r}): --force"
                " frees it nevertheless"
            )
    # This process, or another one, may have proven during that time that it is gone.
    channels.free_place(number)
    return True


COMMANDS = (
    ChannelCommand(
        "ls",
        _add_ls,
        _ls,
        "list the channels",
        "WAITING: messages that the slowest reader has yet to take; of a queue: that no reader is"
        " done with; of calls: that have no reply yet. LOST: messages that readers lost because"
        " they were too slow. Of bytes, WRITERS are connections, and READERS are listeners.",
    ),
    ChannelCommand(
        "info",
        _add_info,
        _info,
        "show the area, the processes that use channels, and who writes and reads each channel",
        "The command observes for a second which processes show signs of life. What it shows is"
        " what these processes say of themselves.",
    ),
    ChannelCommand(
        "rm", _add_rm, _rm, "remove a channel, or free the place of a process that is gone"
    ),
)
