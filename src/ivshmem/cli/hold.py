"""`ivshmem hold`: hold back messages to a peer while its device is unplugged."""

from __future__ import annotations

import argparse

from ..server.limits import LINGER, LONGEST_LINGER
from ..text import counted
from . import control_connection


def add_to(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "hold",
        description="Make a running server hold back all messages to a peer about joins and"
        " leaves. QEMU 10.0 and newer can crash if a message comes while its device"
        " is being unplugged: run this before device_del. It returns when the peer"
        " has read all that was sent before.",
        epilog="The hold ends with `ivshmem release ID`, when the peer disconnects"
        " (chardev-remove), or after --seconds. Then the server sends the peer what has"
        " changed.",
    )
    control_connection.add_peer(parser)
    parser.add_argument(
        "--seconds",
        type=seconds,
        default=LINGER,
        metavar="SECONDS",
        help="time after which the hold ends by itself (default: %(default)g)",
    )
    control_connection.add_options(parser)
    parser.set_defaults(run=run)


def seconds(text: str) -> float:
    """A time from the command line."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number <= LONGEST_LINGER:
        raise argparse.ArgumentTypeError(
            f"not a time: {text} (allowed are more than 0 and at most {LONGEST_LINGER:g} seconds)"
        )
    return number


def run(options: argparse.Namespace) -> int:
    """Ask for it, and wait until the peer has read all."""
    with control_connection.connect(options) as client:
        control_connection.in_region(
            client,
            options,
            lambda region: client.hold(options.id, linger=options.seconds, region=region),
        )
    print(f"messages to peer {options.id} are held back for {counted(options.seconds, 'second')}")
    return 0
