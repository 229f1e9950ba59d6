"""The options of a command that works the same on a host and in a virtual machine.

Knows: a server's socket, a guest's device. Does not know: what is done with the region.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator

from ..peer.client import connect
from ..peer.endpoint import Endpoint
from .arguments import add_socket, server_of

_TIMEOUT = 10.0  # seconds for a server that is there


def add_to(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a server's region, or a guest's device."""
    place = parser.add_mutually_exclusive_group()
    add_socket(place)
    place.add_argument(
        "--guest", action="store_true", help="in a virtual machine: use its only ivshmem device"
    )
    place.add_argument(
        "-a",
        "--address",
        metavar="ADDRESS",
        help="in a virtual machine: use the device with this PCI address, see `guest list`",
    )
    parser.add_argument(
        "--memory",
        choices=("vfio", "uio", "resource2", "resource2_wc"),
        help="in a virtual machine: how to map the device's memory",
    )
    parser.set_defaults(access=None)  # as `guest` has it


@contextlib.contextmanager
def opened(options: argparse.Namespace, *, readonly: bool = False) -> Iterator[Endpoint]:
    """Open the server's client, or the guest's device, that the options name."""
    if options.guest or options.address is not None:
        from . import guest  # here: it is used in virtual machines only

        with guest.opened(options) as device:
            yield device
    else:
        with connect(_server_of(options), timeout=_TIMEOUT, readonly=readonly) as client:
            yield client


def _server_of(options: argparse.Namespace) -> str:
    """The server's path; where there is none, a machine with a device hears of `--guest`."""
    try:
        return server_of(options)
    except FileNotFoundError as error:
        from ..guest import pci  # here: it is used in virtual machines only

        if not pci.devices():
            raise
        text = f"{error.strerror}; or --guest for the device of this virtual machine"
        raise FileNotFoundError(error.errno, text) from None
