"""`ivshmem evict`: hang up on a peer."""

from __future__ import annotations

import argparse

from ..protocol.limits import MAX_ID
from ..text import plain
from . import control_connection


def add_to(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "evict",
        description="Let a running server hang up on a peer: the others are told that it left. It"
        " keeps the memory and the doorbells that it has, and can go on using them; a guest's QEMU"
        " gets no more news and does not connect again, and one that was still starting spins.",
    )
    parser.add_argument("id", metavar="ID", type=peer_id, help="the peer's")
    parser.add_argument("--region", metavar="NAME", help="its region, if there are several")
    control_connection.add_options(parser)
    parser.set_defaults(run=run)


def peer_id(text: str) -> int:
    """A peer's id from the command line."""
    try:
        number = int(text, 0)
    except ValueError:
        number = -1
    if not 0 <= number <= MAX_ID:
        raise argparse.ArgumentTypeError(f"{text} is not a peer's id: allowed are 0 to {MAX_ID}")
    return number


def run(options: argparse.Namespace) -> int:
    """Ask for it."""
    with control_connection.connect(options) as client:
        done = client.ask({"do": "evict", "id": options.id, "region": options.region})
    whose = control_connection.says_who(client)
    print(plain(f"peer {options.id} of region {done['region']} was evicted{whose}"))
    return 0
