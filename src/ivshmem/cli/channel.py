"""`ivshmem channel`: the channels of a region, by hand or from a script.

Knows: which commands there are. The modules channel_* have them, one for each family.
"""

from __future__ import annotations

import argparse

from . import channel_area, channel_messages, channel_rates, channel_recordings, endpoints

_COMMANDS = (
    *channel_area.COMMANDS,
    *channel_messages.COMMANDS,
    *channel_rates.COMMANDS,
    *channel_recordings.COMMANDS,
)


def add_to(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "channel",
        description="List the channels of a region; send, receive, watch, record and replay"
        " messages; remove what is not needed any more. The region is that of a server, or of a"
        " device in a virtual machine.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for each in _COMMANDS:
        command = commands.add_parser(
            each.name,
            help=each.text,
            description=f"{each.text[0].upper()}{each.text[1:]}.",
            epilog=each.epilog,
        )
        command.set_defaults(run=each.run)
        each.arguments(command)
        endpoints.add_to(command)
