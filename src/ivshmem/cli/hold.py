"""`ivshmem hold`: let a server send a peer no news while its device is unplugged."""

from __future__ import annotations

import argparse

from ..server.limits import LINGER, LONGEST_LINGER
from ..text import counted
from . import control_connection
from .evict import peer_id


def add_to(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "hold",
        description="Let a running server send a peer no news: who joins, who leaves. QEMU 10.0 and"
        " newer can crash if any comes while its device is being unplugged, so hold them before"
        " device_del. This returns when the peer has read all that it was sent.",
        epilog="It ends with `ivshmem release ID`, when the peer disconnects (chardev-remove), or"
        " after --seconds. Then the peer is told what has changed.",
    )
    parser.add_argument("id", metavar="ID", type=peer_id, help="the peer's")
    parser.add_argument("--region", metavar="NAME", help="its region, if there are several")
    parser.add_argument(
        "--seconds",
        type=seconds,
        default=LINGER,
        metavar="SECONDS",
        help="until it ends by itself (default: %(default)g)",
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
            f"{text}: allowed are more than 0 and at most {LONGEST_LINGER:g} seconds"
        )
    return number


def run(options: argparse.Namespace) -> int:
    """Ask for it, and wait until the peer has read all."""
    with control_connection.connect(options) as client:
        client.hold(options.id, linger=options.seconds, region=options.region)
    print(f"peer {options.id} is sent no news for {counted(options.seconds, 'second')}")
    return 0
