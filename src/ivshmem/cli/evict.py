"""`ivshmem evict`: disconnect a peer from its server."""

from __future__ import annotations

import argparse

from ..protocol.limits import MAX_ID
from ..text import plain
from . import control_connection


def add_to(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "evict",
        description="Make a running server disconnect a peer, and tell the other peers that it"
        " left. The evicted peer keeps its memory and doorbells and can continue to"
        " use them. A guest's QEMU gets no more messages and does not reconnect; a"
        " QEMU that was still starting busy-loops.",
    )
    add_peer(parser)
    control_connection.add_options(parser)
    parser.set_defaults(run=run)


def add_peer(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which peer is meant."""
    parser.add_argument(
        "id", metavar="ID", type=peer_id, help="the peer's id, as in `ivshmem status`"
    )
    parser.add_argument(
        "--region",
        metavar="NAME",
        help="the peer's region, if the server has several (default: that of -S)",
    )


def peer_id(text: str) -> int:
    """A peer's id from the command line."""
    try:
        number = int(text, 0)
    except ValueError:
        number = -1
    if not 0 <= number <= MAX_ID:
        raise argparse.ArgumentTypeError(f"not a peer's id: {text} (allowed are 0 to {MAX_ID})")
    return number


def run(options: argparse.Namespace) -> int:
    """Ask for it."""
    with control_connection.connect(options) as client:
        done = control_connection.in_region(
            client,
            options,
            lambda region: client.ask({"do": "evict", "id": options.id, "region": region}),
        )
    whose = control_connection.says_who(client)
    print(plain(f"peer {options.id} of region {done['region']} was evicted{whose}"))
    return 0
