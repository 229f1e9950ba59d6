"""Reads a service's configuration from a TOML file.

Knows: tables and keys, and how to report errors. Does not know: which values are allowed
(config_values.py does), what a setting means.

A file has a table for each region, and one for the service:

    #:schema ivshmem.schema.json
    [service]
    control = "/run/ivshmem/control"    # the control socket
    metrics = "127.0.0.1:9400"          # where Prometheus finds the metrics

    [region.db]
    socket = "/run/ivshmem/db"
    size = "64M"
    vectors = 4
    name = "db"                         # or file, or directory; none: anonymous memory
    mode = "0660"
    group = "kvm"
    allow = ["gid:kvm", "root"]

The first line is a comment. Editors with a TOML language server (taplo) find by it the JSON Schema,
which `ivshmem serve --print-schema` prints.

Invariants:
1. All errors are found before anything is done, and reported with file, table, key and value.
2. Whatever a file holds, only ConfigError is raised.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import ConfigError, WrongKind
from ..memory.sizes import format_size
from ..system import safe_files
from ..text import NAME, plain
from .config import RegionConfig, ServiceConfig, conflicts, problems
from .config_values import NAME_OF_A_REGION, REGION, SERVICE, Setting

_MOST_ERRORS = 5  # that are told at once
_MOST_BYTES = 1 << 20  # of a file: thousands of regions, and not the memory of a machine
_MOST_BITS = 63  # of a number, as TOML has it; Python's parser takes any, and its printer does not

_NAME = re.compile(NAME_OF_A_REGION)


# -- files ----------------------------------------------------------------------------------------


def load(path: str | os.PathLike[str]) -> ServiceConfig:
    """Return the configuration in a TOML file.

    Raises:
        ConfigError: the file has errors. The message has all of them, or the first five.
        OSError: it cannot be read.
    """
    return parse(read_file(path), os.fspath(path))


def read_file(path: str | os.PathLike[str]) -> bytes:
    """Return the bytes of a configuration file; those beyond its limit are left out.

    Raises:
        ConfigError: it is no regular file.
        OSError: it cannot be read.
    """
    where = os.fspath(path)
    try:
        with safe_files.reading(where) as file:
            return file.read(_MOST_BYTES + 1)
    except WrongKind as error:
        if error.errno == errno.EISDIR:
            raise
        raise ConfigError(f"{where}: {error.strerror}") from None


def parse(data: bytes, source: str) -> ServiceConfig:
    """Return the configuration in bytes that were read from `source`.

    Raises:
        ConfigError: as `load`.
        TypeError: `data` is text: encode it.
    """
    if not isinstance(data, bytes | bytearray):
        raise TypeError(f"expected the bytes of a configuration, not {type(data).__name__}")
    tables = read_toml(data, source)
    errors: list[str] = []
    config = _read(tables, errors, source)
    if errors:
        raise config.error(listed(errors))
    return config


def listed(errors: list[str]) -> str:
    """Return the first errors, and how many more there are, for one line."""
    more = f" (and {len(errors) - _MOST_ERRORS} more)" if len(errors) > _MOST_ERRORS else ""
    return f"{'; '.join(errors[:_MOST_ERRORS])}{more}"


def read_toml(data: bytes, source: str) -> dict[str, Any]:
    """Return a file's tables, without checking them.

    Raises:
        ConfigError: it is not TOML, or larger than 1 MiB.
    """
    try:
        import tomllib  # here: Python 3.11 has it, and this module can be used without any
    except ImportError:
        try:
            # Here, for Python 3.10.
            import tomli as tomllib  # type: ignore[no-redef, import-not-found, unused-ignore]
        except ImportError:
            raise ConfigError(
                "Python before 3.11 reads TOML only with tomli: pip install tomli (Debian:"
                " apt-get install python3-tomli)"
            ) from None
    if len(data) > _MOST_BYTES:
        raise ConfigError(
            f"{source}: the file is larger than {format_size(_MOST_BYTES)}, the limit"
        )
    try:
        tables = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:  # ValueError also of numbers without end
        raise ConfigError(f"{source}: not TOML: {plain(str(error), 200)}") from None
    return tables


def _read(tables: Mapping[str, Any], errors: list[str], source: str) -> ServiceConfig:
    known = ("service", "region")
    errors += [
        f"{plain(key, NAME)}: unknown{nearest(key, known)}" for key in tables if key not in known
    ]
    service = read_table("service", tables.get("service", {}), SERVICE, errors)
    named = tables.get("region", {})
    if not isinstance(named, dict) or not named:
        errors.append("no region: add a table [region.NAME] with a socket")
        named = {}
    regions = {}
    for name, table in named.items():
        if not _NAME.fullmatch(name):
            errors.append(f"region.{_shown(name)}: a name has up to 64 letters, digits, - and _")
            continue
        before = len(errors)
        settings = read_table(f"region.{name}", table, REGION, errors)
        if isinstance(table, dict) and "socket" not in table:
            errors.append(f"region.{name}: no socket: add its path")
        if "socket" in settings:
            regions[name] = RegionConfig(**settings)
        if len(errors) == before:
            errors += [f"region.{name}{problem}" for problem in problems(regions[name])]
    config = ServiceConfig(regions, **service, source=source)
    errors += conflicts(config)
    return config


def read_table(
    where: str, table: object, known: Mapping[str, Setting], errors: list[str]
) -> dict[str, Any]:
    """Return the settings of a table as their checks return them; append what is wrong."""
    if not isinstance(table, dict):
        errors.append(f"{where}: expected a table")
        return {}
    found = {}
    for key, value in table.items():
        if key not in known:
            errors.append(f"{where}.{plain(key, NAME)}: unknown{nearest(key, known)}")
            continue
        try:
            if isinstance(value, int) and value.bit_length() > _MOST_BITS:
                raise ValueError(f"TOML's numbers have {_MOST_BITS} bits and a sign")
            found[key] = known[key].check(value)
        except (ValueError, OverflowError, OSError) as error:
            text = error.strerror if isinstance(error, OSError) else error
            errors.append(f"{where}.{key} = {_shown(value)}: {plain(str(text), 300)}")
    return found


def _shown(value: object) -> str:
    """A value as it stands in a file, or near to that, on a part of a line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    try:
        text = f'"{value}"' if isinstance(value, str) else str(value)
    except (ValueError, RecursionError):  # too many digits, too deep
        return "..."
    return plain(text, NAME)


def nearest(key: str, known: Iterable[str]) -> str:
    """Say which known key is meant, or which there are."""
    found = difflib.get_close_matches(key, list(known), 1)
    return f" (is {found[0]} meant?)" if found else f" (known are {', '.join(known)})"
