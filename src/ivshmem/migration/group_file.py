"""Internal: the VMs of a migration in a TOML file.

Knows: the file's form. Does not know: what a migration is.

    [vm.db]
    source = "/run/db.qmp"              # the monitor of the QEMU that runs it: a path, or HOST:PORT
    destination = "/run/db-there.qmp"   # that of the one that waits for it
    uri = "tcp:192.0.2.7:4444"          # where the two meet

    [control]                           # control sockets of servers that are elsewhere
    source = ["/run/ivshmem.service.control"]
    destination = ["/run/there.control"]
"""

from __future__ import annotations

import os
from typing import Any

from ..errors import ConfigError
from ..service.config_file import read_toml
from ..system import safe_files
from .inspection import Controls
from .model import PLACES, Vm

_KEYS = ("source", "destination", "uri")
_MOST_BYTES = 1 << 20


def load(path: str | os.PathLike[str]) -> tuple[list[Vm], Controls]:
    """The VMs that a file names, and the control sockets.

    Raises:
        ConfigError: what is wrong in it.
        OSError: it cannot be read.
    """
    with safe_files.reading(path) as file:
        return parse(file.read(_MOST_BYTES + 1), os.fspath(path))


def parse(data: bytes, source: str) -> tuple[list[Vm], Controls]:
    """The same, of what was read from `source`."""
    tables = read_toml(data, source)
    for key in tables:
        if key not in ("vm", "control"):
            raise ConfigError(
                f"{source}: unknown key {key!r}: allowed are the tables [vm.NAME] and [control]"
            )
    vms, controls = tables.get("vm"), tables.get("control", {})
    if not isinstance(vms, dict) or not vms:
        raise ConfigError(f"{source}: no VM: add a table [vm.NAME] for each")
    return [_vm(name, table, source) for name, table in vms.items()], _controls(controls, source)


def _vm(name: str, table: Any, source: str) -> Vm:
    where = f"{source}: vm.{name!r}"
    if not isinstance(table, dict):
        raise ConfigError(f"{where}: not a table: it needs {', '.join(_KEYS)}")
    for key in table:
        if key not in _KEYS:
            raise ConfigError(f"{where}: unknown key {key!r}: allowed are {', '.join(_KEYS)}")
    for key in _KEYS:
        if key not in table:
            raise ConfigError(f"{where}: {key} is missing")
        if not isinstance(table[key], str) or not table[key]:
            raise ConfigError(f"{where}: {key} = {table[key]!r}: not a string")
    return Vm(name, *(table[key] for key in _KEYS))


def _controls(table: Any, source: str) -> Controls:
    if isinstance(table, dict) and set(table) <= set(PLACES):
        lists = [paths for paths in table.values() if isinstance(paths, list)]
        if len(lists) == len(table) and all(isinstance(p, str) for paths in lists for p in paths):
            return {place: table.get(place, []) for place in PLACES}
    raise ConfigError(
        f"{source}: control: allowed are source and destination, each a list of paths"
    )
