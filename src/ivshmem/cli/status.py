"""`ivshmem status`: what a server does at the moment."""

from __future__ import annotations

import argparse
import json
import shutil
import sys

from ..plain import plain
from . import asking, peers


def add_to(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "status",
        description="Print the regions of a running server and their peers: who they are, what they"
        " must still be told, and the interrupts that they have not taken yet, as vector:count."
        " Looking takes no interrupt away. Only root and the server's user may ask.",
        epilog="A guest's name is QEMU's -name; other names are those in the region's directory of"
        " names. Either is what a peer says of itself. `stalled since`: it has not read since.",
    )
    asking.add_options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Ask, and print."""
    with asking.connect(options) as client:
        status = client.ask({"do": "status"})
    peers.Guests().name(status)
    print(json.dumps(status) if options.json else text(status, asking.says_who(client)))
    return 0


def text(status: peers.Status, whose: str = "") -> str:
    """A status as a person reads it; `whose`: what stands behind the line about the server."""
    server = status["server"]
    columns = shutil.get_terminal_size().columns - 2 if sys.stdout.isatty() else None
    lines = [peers.server_line(server) + whose]
    for region in status["regions"]:
        lines += ["", peers.region_line(region), f"  {peers.counts_line(region)}"]
        if region.get("unreachable"):  # servers of older versions do not say
            lines.append(f"  nobody can connect: {region['socket']} {region['unreachable']}")
        if region["paused"]:
            lines.append(f"  newcomers wait: {region['paused']}")
        if region["peers"]:
            rows = [peers.peer_row(peer, server["time"]) for peer in region["peers"]]
            lines += [f"  {line}" for line in peers.table(rows, columns)]
    return "\n".join(map(plain, lines))
