"""Internal: addresses of sockets as text: tcp:HOST:PORT, unix:PATH, unix:@NAME.

Knows: their form, and the names of hosts. Does not know: connecting and listening.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
import socket
from typing import Any

from ..system.named_tuple import NamedTuple
from ..system.sockets import check_path
from ..text import plain

FORMS = "tcp:HOST:PORT, tcp:[IPv6]:PORT, unix:PATH or unix:@NAME"

_KINDS = ("tcp", "unix")
_TCP = re.compile(r"(?:\[([^\[\]]+)\]|([^:\[\]\s]+)):([0-9]{1,5})")


class Address(NamedTuple):
    """Where a socket listens or connects.

    Attributes:
        text: as it was given.
        host, port: of TCP; "" and 0 of a Unix socket.
        path: of a Unix socket, absolute; an abstract one begins with "@". "": it is TCP.
    """

    text: str
    host: str = ""
    port: int = 0
    path: str = ""


class SocketPlace(NamedTuple):
    """What socket(2), bind(2) and connect(2) take."""

    family: int
    address: Any


def parse(text: str) -> Address:
    """Return the address that a text names.

    Raises:
        ValueError: it names none; the message shows the forms.
    """
    kind, colon, rest = text.partition(":")
    if kind not in _KINDS or not colon:
        like = difflib.get_close_matches(kind.lower(), _KINDS, 1) if colon else []
        meant = f" (is {like[0]}:{plain(rest)} meant?)" if like else ""
        raise ValueError(f"address {text!r}: expected {FORMS}{meant}")
    if kind == "unix":
        try:
            path = check_path(rest)
        except OSError as error:
            raise ValueError(f"address {text!r}: {error.strerror}") from None
        if path == "@":
            raise ValueError(f"address {text!r}: an abstract socket needs a name after the @")
        if path[0] != "@":
            path = os.path.abspath(path)
        return Address(text, path=path)
    match = _TCP.fullmatch(rest)
    if match is None:
        raise ValueError(
            f"address {text!r}: expected tcp:HOST:PORT, or tcp:[IPv6]:PORT with its brackets"
        )
    port = int(match[3])
    if port > 65535:
        raise ValueError(f"address {text!r}: port {port}: 65535 is the highest")
    return Address(text, host=match[1] or match[2], port=port)


def places(address: Address, *, listen: bool = False) -> list[SocketPlace]:
    """Return the places that an address leads to, in the order in which they are to be tried.

    A name is looked up, which can take seconds.

    Raises:
        OSError: the name has no address, or cannot be looked up now.
        ValueError: a port of 0, where something listens.
    """
    if address.path:
        name = address.path
        return [SocketPlace(socket.AF_UNIX, "\0" + name[1:] if name[0] == "@" else name)]
    if not address.port and not listen:
        raise ValueError(f"address {address.text!r}: port 0: nothing listens there")
    try:
        found = socket.getaddrinfo(
            address.host,
            address.port,
            type=socket.SOCK_STREAM,
            flags=socket.AI_PASSIVE if listen else 0,
        )
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a name of a host"
        raise OSError(
            errno.EADDRNOTAVAIL,
            f"host {address.host!r} cannot be looked up ({reason}): check the name, or give its"
            " number",
            address.text,
        ) from None
    return [SocketPlace(family, sockaddr) for family, _, _, _, sockaddr in found]


def shown(name: object) -> str:
    """Return the text of what getsockname(2) says."""
    if isinstance(name, tuple):
        host, port = name[:2]
        return f"tcp:[{host}]:{port}" if ":" in host else f"tcp:{host}:{port}"
    if isinstance(name, bytes):
        return plain("unix:@" + name[1:].decode(errors="backslashreplace"))
    return f"unix:{name}"
