"""Finding a server's control socket, for the subcommands that ask something of it.

Knows: what can be wrong there, how to say it, and the options that say which peer is meant.
Does not know: what is asked of that peer.
"""

from __future__ import annotations

import argparse
import errno
import os

from ..errors import ControlError
from ..peer import connecting
from ..protocol.limits import MAX_ID
from ..service import control_client
from ..system import sockets
from ..system.accounts import user_name
from .arguments import add_socket, server_of, socket_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    _T = TypeVar("_T")

SECONDS = 10.0  # for an answer


def add_options(parser: argparse.ArgumentParser) -> None:
    place = parser.add_mutually_exclusive_group()
    add_socket(place, "socket of the server; its control socket is PATH.control")
    place.add_argument(
        "--control",
        metavar="PATH",
        type=socket_path,
        help="the control socket, if it is not PATH.control",
    )


def connect(options: argparse.Namespace, timeout: float = SECONDS) -> control_client.ControlClient:
    """Connect to the control socket that the options mean; errors say what to do."""
    if options.control is not None:
        return _connect(options.control, timeout)
    server = os.path.abspath(server_of(options))
    path = control_client.default_path(server)
    try:
        return _connect(path, timeout)
    except (FileNotFoundError, ConnectionRefusedError):
        error = _without_control(server)
    raise error


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


def in_region(
    client: control_client.ControlClient,
    options: argparse.Namespace,
    ask: Callable[[str | None], _T],
) -> _T:
    """Ask for something in the region that --region names, or else the one whose socket -S is."""
    try:
        return ask(options.region)
    except ControlError as error:
        if error.code != "region-needed" or options.socket is None:
            raise
        path = os.path.realpath(options.socket)
        regions = client.ask({"do": "status", "peers": False})["regions"]
        names = [each["name"] for each in regions if os.path.realpath(each["socket"]) == path]
        if len(names) != 1:
            raise
    return ask(names[0])


def says_who(client: control_client.ControlClient) -> str:
    """Return whose server it is that answered, if that is neither root's nor the asker's."""
    uid = client.server.uid
    return "" if uid in {0, os.geteuid()} else f" (according to the server of {user_name(uid)})"


def _connect(path: str, timeout: float) -> control_client.ControlClient:
    try:
        return control_client.ControlClient(path, timeout)
    except PermissionError:
        reason = "permission denied: only root and the server's user may use the control socket"
        raise PermissionError(errno.EACCES, reason, path) from None


def _without_control(server: str) -> Exception:
    """What to say of a server whose control socket is not there, or stale."""
    try:
        if sockets.is_live(server):
            return ControlError(
                f"{server}: this server has no control socket there. If it has one elsewhere, give"
                " --control PATH; QEMU's example server has none"
            )
    except OSError as error:
        return error
    code = errno.ECONNREFUSED if os.path.lexists(server) else errno.ENOENT
    return OSError(code, connecting.CONNECT_HINTS[code], server)
