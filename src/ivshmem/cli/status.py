"""`ivshmem status`: what a server does at the moment."""

from __future__ import annotations

import argparse
import json
import shutil
import sys

from ..text import plain
from . import control_connection, status_text


def add_to(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "status",
        description="Print the regions of a running server and their peers: their processes, the"
        " number of messages not sent yet, and the pending interrupts, as"
        " vector:count. The command consumes no interrupt. Only root and the server's"
        " user may use it.",
        epilog="A guest's name is QEMU's -name; other names are from the region's directory of"
        " names. Both are claims of the peer itself. `stalled since`: the peer has not"
        " read since then.",
    )
    control_connection.add_options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Ask, and print."""
    with control_connection.connect(options) as client:
        status = client.ask({"do": "status"})
    status_text.Guests().name(status)
    print(json.dumps(status) if options.json else text(status, control_connection.says_who(client)))
    return 0


def text(status: status_text.StatusReply, whose: str = "") -> str:
    """A status as a person reads it; `whose`: what stands behind the line about the server."""
    server = status["server"]
    columns = shutil.get_terminal_size().columns - 2 if sys.stdout.isatty() else None
    lines = [status_text.server_line(server) + whose]
    for region in status["regions"]:
        lines += ["", status_text.region_line(region), f"  {status_text.counts_line(region)}"]
        if region.get("unreachable"):  # servers of older versions do not say
            lines.append(f"  nobody can connect: {region['socket']} {region['unreachable']}")
        if region["paused"]:
            lines.append(f"  newcomers wait: {region['paused']}")
        if region["peers"]:
            rows = [status_text.peer_row(peer, server["time"]) for peer in region["peers"]]
            lines += [f"  {line}" for line in status_text.table(rows, columns)]
    return "\n".join(map(plain, lines))
