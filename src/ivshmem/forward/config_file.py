"""Internal: forwards in a TOML file, a table for each.

Knows: the file's form. Does not know: what a forward does.

    [forward.ssh]
    connect = "tcp:127.0.0.1:22"

    [forward.web]
    listen = "unix:/run/web.sock"
    mode = "0660"               # of the socket's file
    connections = 256           # of the channel, if it must be made
    buffer = "256K"             # that each connection holds in each direction
"""

from __future__ import annotations

import os
from typing import Any

from ..channel.geometry import check_name
from ..errors import ConfigError
from ..memory.sizes import parse_size
from ..service.config_file import listed, nearest, read_file, read_table, read_toml
from ..service.config_values import REGION, Setting
from ..text import NAME, plain
from . import addresses
from .config import ForwardConfig, check_buffer, check_connections, problems


def load(path: str | os.PathLike[str]) -> list[ForwardConfig]:
    """Return the forwards that a file names.

    Raises:
        ConfigError: what is wrong in it: all of it, or the first five things.
        OSError: it cannot be read.
    """
    return parse(read_file(path), os.fspath(path))


def parse(data: bytes, source: str) -> list[ForwardConfig]:
    """Return the forwards in bytes that were read from `source`."""
    tables = read_toml(data, source)
    errors = [
        f"{plain(key, NAME)}: unknown{nearest(key, ('forward',))}"
        for key in tables
        if key != "forward"
    ]
    named = tables.get("forward", {})
    if not isinstance(named, dict) or not named:
        errors.append("no forward: add a table [forward.NAME] with connect or listen")
        named = {}
    found = []
    for name, table in named.items():
        where = f"forward.{plain(name, NAME)}"
        try:
            check_name(name)
        except ValueError as error:
            errors.append(f"{where}: {error}")
            continue
        if not isinstance(table, dict):
            errors.append(
                f"{where}: it is not in a table of a forward: put it below [forward.NAME]"
            )
            continue
        before = len(errors)
        settings = read_table(where, table, _SETTINGS, errors)
        if len(errors) == before:
            found.append(ForwardConfig(name, **settings))
            errors += [f"{where}: {problem}" for problem in problems(found[-1])]
    if errors:
        raise ConfigError(f"{source}: {listed(errors)}")
    return found


def _address(value: object) -> addresses.Address:
    if not isinstance(value, str):
        raise ValueError(f"expected {addresses.FORMS}")
    return addresses.parse(value)


def _connections(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("expected a number")
    return check_connections(value)


def _buffer(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError('expected a size, such as "64K"')
    return check_buffer(parse_size(value))


def _setting(check: Any, text: str) -> Setting:
    return Setting(check, {}, text)


_SETTINGS = {
    "connect": _setting(_address, "where each connection leads to"),
    "listen": _setting(_address, "where connections come from"),
    "mode": _setting(REGION["mode"].check, "permissions of the file of a listening Unix socket"),
    "connections": _setting(_connections, "of the channel, at once"),
    "buffer": _setting(_buffer, "bytes that each connection holds in each direction"),
}
