"""Finding a server's control socket, for the subcommands that ask something of it.

Knows: what can be wrong there, and how to say it. Does not know: what is asked.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
from collections.abc import Iterator

from .. import control, sockets
from .arguments import OF_THE_SERVER, server_of

SECONDS = 10.0  # for an answer


def add_options(parser: argparse.ArgumentParser) -> None:
    place = parser.add_mutually_exclusive_group()
    place.add_argument(
        "-S",
        "--socket",
        metavar="PATH",
        help=f"of the server; its control socket is PATH.control ({OF_THE_SERVER})",
    )
    place.add_argument(
        "--control", metavar="PATH", help="the control socket, if the server has it elsewhere"
    )


def connect(options: argparse.Namespace, timeout: float = SECONDS) -> control.Client:
    """Connect to the control socket that the options mean; errors say what to do."""
    if options.control is not None:
        return _connect(options.control, timeout)
    server = os.path.abspath(server_of(options))
    path = control.default_path(server)
    try:
        return _connect(path, timeout)
    except (FileNotFoundError, ConnectionRefusedError):
        error = _without_control(server)
    raise error


@contextlib.contextmanager
def understood() -> Iterator[None]:
    """While a reply is looked at: what is not in it, or is nonsense, is worth one line."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        what = f"{type(error).__name__}: {error}"[:100]
        raise control.ControlError(
            f"the server's reply makes no sense ({what}): is it of another version?"
        ) from None


def _connect(path: str, timeout: float) -> control.Client:
    try:
        return control.Client(path, timeout)
    except PermissionError:
        reason = "permission denied: only root and the server's user may ask"
        raise PermissionError(errno.EACCES, reason, path) from None


def _without_control(server: str) -> Exception:
    """What to say of a server whose control socket is not there, or stale."""
    try:
        if sockets.is_live(server):
            return control.ControlError(
                f"{server}: the server there has no control socket: it is of another kind (as"
                " QEMU's example), or has it elsewhere: give --control PATH"
            )
    except OSError as error:
        return error
    there = os.path.lexists(server)
    code = errno.ECONNREFUSED if there else errno.ENOENT
    reason = "nobody listens here" if there else "no such socket"
    return OSError(code, f"{reason}: start the server (ivshmem serve), or give -S PATH", server)
