"""A service's configuration in a TOML file.

Knows: the form of each value, and how to say what is wrong. Does not know: what a setting means.

A file has a table for each region, and one for the service:

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

Invariants:
1. All that is wrong is found before anything is done, and said with file, table, key and value.
2. Nothing that a file can hold raises anything but ConfigError.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..errors import ConfigError, WrongKind
from ..memory.pages import PAGE, huge_page_size
from ..memory.region import posix_path
from ..memory.sizes import LARGEST, check_size, format_size, parse_size
from ..peer.limits import MAX_SLOTS
from ..protocol.limits import MAX_VECTORS
from ..server.access import Rules
from ..system import safe_files
from ..system.accounts import group_id, user_id
from ..system.sockets import check_path
from ..text import NAME, plain
from .config import RegionConfig, ServiceConfig, conflicts, problems
from .limits import EXISTING, LOG_FORMATS

_MOST_ERRORS = 5  # that are told at once
_MOST_BYTES = 1 << 20  # of a file: thousands of regions, and not the memory of a machine
_MOST_BITS = 63  # of a number, as TOML has it; Python's parser takes any, and its printer does not

_NAME = re.compile("[A-Za-z0-9_-]{1,64}")


# -- files ----------------------------------------------------------------------------------------


def load(path: str | os.PathLike[str]) -> ServiceConfig:
    """What a TOML file says.

    Raises:
        ConfigError: with all that is wrong in it, or the first of that.
        OSError: it cannot be read.
    """
    where = os.fspath(path)
    try:
        with safe_files.reading(where) as file:
            data = file.read(_MOST_BYTES + 1)
    except WrongKind as error:
        if error.errno == errno.EISDIR:
            raise
        raise ConfigError(f"{where}: {error.strerror}") from None
    return parse(data, where)


def parse(data: bytes, source: str) -> ServiceConfig:
    """The same, of what was read from `source`.

    Raises:
        ConfigError: as of `load`.
    """
    tables = read_toml(data, source)
    errors: list[str] = []
    config = _read(tables, errors, source)
    if errors:
        more = f" (and {len(errors) - _MOST_ERRORS} more)" if len(errors) > _MOST_ERRORS else ""
        raise config.error(f"{'; '.join(errors[:_MOST_ERRORS])}{more}")
    return config


def read_toml(data: bytes, source: str) -> dict[str, Any]:
    """A file's tables, whatever they say.

    Raises:
        ConfigError: it is no TOML, or not of a size that anybody writes.
    """
    try:
        import tomllib
    except ImportError:  # Python 3.10
        try:
            import tomli as tomllib  # type: ignore[no-redef, import-not-found, unused-ignore]
        except ImportError:
            raise ConfigError(
                "Python before 3.11 reads TOML only with tomli: pip install tomli (Debian:"
                " apt-get install python3-tomli)"
            ) from None
    if len(data) > _MOST_BYTES:
        raise ConfigError(
            f"{source}: more than {format_size(_MOST_BYTES)}: no configuration is that"
        )
    try:
        tables = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:  # ValueError also of numbers without end
        raise ConfigError(f"{source}: no TOML: {plain(str(error), 200)}") from None
    return tables


def _read(tables: Mapping[str, Any], errors: list[str], source: str) -> ServiceConfig:
    known = ("service", "region")
    errors += [
        f"{plain(key, NAME)}: unknown{_nearest(key, known)}" for key in tables if key not in known
    ]
    service = _table("service", tables.get("service", {}), _SERVICE, errors)
    named = tables.get("region", {})
    if not isinstance(named, dict) or not named:
        errors.append("no region: a table [region.NAME] with a socket is wanted")
        named = {}
    regions = {}
    for name, table in named.items():
        if not _NAME.fullmatch(name):
            errors.append(f"region.{_shown(name)}: a name has up to 64 letters, digits, - and _")
            continue
        before = len(errors)
        settings = _table(f"region.{name}", table, _REGION, errors)
        if isinstance(table, dict) and "socket" not in table:
            errors.append(f"region.{name}: no socket: its path is wanted")
        if "socket" in settings:
            regions[name] = RegionConfig(**settings)
        if len(errors) == before:
            errors += [f"region.{name}{problem}" for problem in problems(regions[name])]
    config = ServiceConfig(regions, **service, source=source)
    errors += conflicts(config)
    return config


def _table(
    where: str, table: object, known: Mapping[str, Callable[[object], Any]], errors: list[str]
) -> dict[str, Any]:
    if not isinstance(table, dict):
        errors.append(f"{where}: a table is wanted")
        return {}
    found = {}
    for key, value in table.items():
        if key not in known:
            errors.append(f"{where}.{plain(key, NAME)}: unknown{_nearest(key, known)}")
            continue
        try:
            if isinstance(value, int) and value.bit_length() > _MOST_BITS:
                raise ValueError(f"TOML's numbers have {_MOST_BITS} bits and a sign")
            found[key] = known[key](value)
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


def _nearest(key: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(key, list(known), 1)
    return f" (is {found[0]} meant?)" if found else f" (known are {', '.join(known)})"


# -- what a value may be --------------------------------------------------------------------------


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false is wanted")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str) or not value or not value.isprintable():
        raise ValueError("a text of printable characters is wanted")
    return value


def _path(value: object) -> str:
    path = _text(value)
    if not os.path.isabs(path):
        raise ValueError("a path from the root on is wanted")
    return path


def _socket(value: object) -> str:
    return check_path(_path(value))


def _name(value: object) -> str:
    posix_path(_text(value))
    return _text(value)


def _size(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError('a size is wanted, such as "4M"')
    if isinstance(value, int) and value > LARGEST:
        raise ValueError(f"the largest is {format_size(LARGEST)}")
    size = parse_size(value)
    check_size(size, PAGE)
    return size


def _number(lowest: int, highest: int) -> Callable[[object], int]:
    def check(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
            raise ValueError(f"a number from {lowest} to {highest} is wanted")
        return value

    return check


def _hugepages(value: object) -> bool | str:
    if isinstance(value, bool):
        return value
    huge_page_size(_text(value))
    return _text(value)


def _existing(value: object) -> str:
    return _one_of(value, EXISTING)


def _log_format(value: object) -> str:
    return _one_of(value, LOG_FORMATS)


def _one_of(value: object, allowed: Sequence[str]) -> str:
    if value not in allowed:
        raise ValueError(f"one of {', '.join(allowed)} is wanted")
    return str(value)


def _mode(value: object) -> int:
    # A number could be meant as octal or as decimal.
    if not isinstance(value, str) or not re.fullmatch("(0o)?0?[0-7]{1,3}", value):
        raise ValueError('up to three octal digits in quotes are wanted, such as "0660"')
    return int(value, 8)


def _account(find: Callable[[int | str], int]) -> Callable[[object], int | str]:
    def check(value: object) -> int | str:
        account = value if isinstance(value, int) and not isinstance(value, bool) else _text(value)
        find(account)  # it exists
        return account

    return check


def _users(value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError('a list of users is wanted, such as ["libvirt-qemu"]')
    return tuple(str(_account(user_id)(user)) for user in value)


def _names(value: object) -> int | None:
    if isinstance(value, bool):
        return 0 if value else None
    return _number(0, MAX_SLOTS)(value)


def _rules(value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
        raise ValueError('a list of texts is wanted, such as ["uid:1000"]')
    Rules(allow=value)
    return tuple(value)


def _address(value: object) -> str:
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else _text(value)
    match = re.fullmatch(r"(?:(?:\[[0-9A-Fa-f:.]+\]|[^\s:\[\]]*):)?([0-9]{1,5})", text)
    if match is None or int(match[1]) > 65535:
        raise ValueError('[HOST:]PORT is wanted, such as "127.0.0.1:9400" or "[::1]:9400"')
    return text


_REGION: dict[str, Callable[[object], Any]] = {
    "socket": _socket,
    "size": _size,
    "vectors": _number(0, MAX_VECTORS),
    "name": _name,
    "file": _path,
    "directory": _path,
    "hugepages": _hugepages,
    "prealloc": _flag,
    "existing": _existing,
    "readonly": _flag,
    "accept_owner": _users,
    "keep": _flag,
    "names": _names,
    "mode": _mode,
    "owner": _account(user_id),
    "group": _account(group_id),
    "allow": _rules,
    "deny": _rules,
    "readonly_for": _rules,
    "peers_per_uid": _number(1, 1 << 31),
    "joins_per_minute": _number(1, 1 << 31),
    "hold_leaves": _flag,
}
assert list(_REGION) == [*RegionConfig._fields]

_SERVICE: dict[str, Callable[[object], Any]] = {
    "control": _socket,
    "metrics": _address,
    "log_format": _log_format,
}
