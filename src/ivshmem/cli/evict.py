"""`ivshmem evict`: disconnect a peer from its server."""

from __future__ import annotations

import argparse

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
    control_connection.add_peer(parser)
    control_connection.add_options(parser)
    parser.set_defaults(run=run)


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
