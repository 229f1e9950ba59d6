"""`ivshmem channel`: the channels of a region, by hand or from a script.

Knows: which commands there are. The modules channel_* have them, one for each family.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from . import endpoints

# Each family's commands, and the module that has them: a command imports no other family.
_FAMILIES = {
    "channel_area": ("ls", "info", "rm"),
    "channel_messages": ("put", "cat", "tail", "call"),
    "channel_rates": ("hz", "bw", "top"),
    "channel_recordings": ("record", "replay"),
}


def add_to(
    subparsers: argparse._SubParsersAction[argparse.ArgumentParser], words: Sequence[str] = ()
) -> None:
    """Add the command that the first of these words names; without a name, add all."""
    parser = subparsers.add_parser(
        "channel",
        description="List the channels of a region; send, receive, watch, record and replay"
        " messages; remove what is not needed any more. The region is that of a server, or of a"
        " device in a virtual machine.",
    )
    named = [family for family, names in _FAMILIES.items() if words and words[0] in names]
    modules = [
        __import__(f"{__package__}.{name}", fromlist=("COMMANDS",)) for name in named or _FAMILIES
    ]
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for each in (each for module in modules for each in module.COMMANDS):
        command = commands.add_parser(
            each.name,
            help=each.text,
            description=f"{each.text[0].upper()}{each.text[1:]}.",
            epilog=each.epilog,
        )
        command.set_defaults(run=each.run)
        each.arguments(command)
        endpoints.add_to(command)
