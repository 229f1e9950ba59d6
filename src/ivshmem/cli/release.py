"""`ivshmem release`: undo `ivshmem hold`."""

from __future__ import annotations

import argparse

from . import control_connection


def add_to(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "release",
        description="End `ivshmem hold`: the server sends the peer what has changed since, and"
        " all later messages.",
    )
    control_connection.add_peer(parser)
    control_connection.add_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Ask for it."""
    with control_connection.connect(options) as client:
        held = control_connection.in_region(
            client, options, lambda region: client.release(options.id, region=region)
        )
    if held:
        print(f"messages to peer {options.id} are sent again")
    else:
        print(f"peer {options.id} was not held")
    return 0
