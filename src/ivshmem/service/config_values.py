"""The settings of a configuration file: what each value may be, as a check and as JSON Schema.

Knows: the form of each value, and what is wrong with one. Does not know: files, how settings
contradict one another (config.py does), what a setting does.

One table has both forms of each setting, so that neither is forgotten. A schema is what an editor
checks while somebody types. It cannot know this machine's users and huge pages, nor what settings
say to one another, and leaves that to the check. So a file that a schema refuses is refused by the
check, and not the other way round.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..memory.pages import PAGE, huge_page_size
from ..memory.region import posix_path
from ..memory.sizes import LARGEST, check_size, format_size, parse_size
from ..peer.limits import LEAST_AREA, MAX_SLOTS
from ..protocol.limits import MAX_VECTORS
from ..server.access import Rules
from ..system.accounts import group_id, user_id
from ..system.named_tuple import NamedTuple
from ..system.sockets import MAX_PATH, check_path
from .config import RegionConfig
from .limits import DEFAULT_SIZE, EXISTING, LOG_FORMATS

NAME_OF_A_REGION = "[A-Za-z0-9_-]{1,64}"

_MOST_ID = (1 << 32) - 2  # of a user or group
_MOST = 1 << 31  # peers, or joins
_MODE = "(0o)?0?[0-7]{1,3}"
_ADDRESS = r"(?:(?:\[[0-9A-Fa-f:.]+\]|[^\s:\[\]]*):)?([0-9]{1,5})"


class Setting(NamedTuple):
    """One setting.

    Attributes:
        check: returns the value that RegionConfig or ServiceConfig takes; raises ValueError,
            OverflowError or OSError, with what is wanted, for one that is not allowed.
        schema: what JSON Schema says of such values.
        text: what it is, for people who write a file.
    """

    check: Callable[[object], Any]
    schema: Mapping[str, object]
    text: str


# -- checks ---------------------------------------------------------------------------------------


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("expected true or false")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str) or not value or not value.isprintable():
        raise ValueError("expected a text of printable characters")
    return value


def _path(value: object) -> str:
    path = _text(value)
    if not os.path.isabs(path):
        raise ValueError("expected an absolute path")
    return path


def _socket(value: object) -> str:
    return check_path(_path(value))


def _name(value: object) -> str:
    posix_path(_text(value))
    return _text(value)


def _size(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError('expected a size, such as "4M"')
    if isinstance(value, int) and value > LARGEST:
        raise ValueError(f"the largest is {format_size(LARGEST)}")
    size = parse_size(value)
    check_size(size, PAGE)
    return size


def _number(lowest: int, highest: int) -> Callable[[object], int]:
    def check(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
            raise ValueError(f"expected a number from {lowest} to {highest}")
        return value

    return check


def _hugepages(value: object) -> bool | str:
    if isinstance(value, bool):
        return value
    if not isinstance(value, str):
        raise ValueError('expected true, false, or a size, such as "2M"')
    huge_page_size(_text(value))
    return value


def _existing(value: object) -> str:
    return _one_of(value, EXISTING)


def _log_format(value: object) -> str:
    return _one_of(value, LOG_FORMATS)


def _one_of(value: object, allowed: Sequence[str]) -> str:
    if value not in allowed:
        raise ValueError(f"expected one of {', '.join(allowed)}")
    return str(value)


def _mode(value: object) -> int:
    # A number could be meant as octal or as decimal.
    if not isinstance(value, str) or not re.fullmatch(_MODE, value):
        raise ValueError('expected up to three octal digits in quotes, such as "0660"')
    return int(value, 8)


def _account(find: Callable[[int | str], int]) -> Callable[[object], int | str]:
    def check(value: object) -> int | str:
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise ValueError("expected a name or a number")
        account = value if isinstance(value, int) else _text(value)
        find(account)  # it exists
        return account

    return check


def _users(value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError('expected a list of users, such as ["libvirt-qemu"]')
    return tuple(str(_account(user_id)(user)) for user in value)


def _names(value: object) -> int | None:
    if isinstance(value, bool):
        return 0 if value else None
    return _number(0, MAX_SLOTS)(value)


def _channels(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError('expected a size, such as "1M"')
    size = parse_size(value)
    if size < LEAST_AREA:
        raise ValueError(f"at least {format_size(LEAST_AREA)}")
    if size > LARGEST:
        raise ValueError(f"the largest is {format_size(LARGEST)}")
    return size


def _rules(value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
        raise ValueError('expected a list of texts, such as ["uid:1000"]')
    Rules(allow=value)
    return tuple(value)


def _address(value: object) -> str:
    number = isinstance(value, int) and not isinstance(value, bool)
    match = re.fullmatch(_ADDRESS, str(value)) if number or isinstance(value, str) else None
    if match is None or int(match[1]) > 65535:
        raise ValueError('expected [HOST:]PORT, such as "127.0.0.1:9400" or "[::1]:9400"')
    return match[0]


# -- the settings ---------------------------------------------------------------------------------


def _string(pattern: str, **more: object) -> Mapping[str, object]:
    return {"type": "string", "pattern": f"^{pattern}$", **more}


def _integer(least: int, most: int, **more: object) -> Mapping[str, object]:
    return {"type": "integer", "minimum": least, "maximum": most, **more}


def _either(*schemas: Mapping[str, object]) -> Mapping[str, object]:
    return {"anyOf": list(schemas)}


def _list(items: Mapping[str, object]) -> Mapping[str, object]:
    return {"type": "array", "items": items}


_ANY_TEXT = {"type": "string", "minLength": 1}
_IS_PATH = _string("/.*")
_IS_SOCKET = _string("/.*", maxLength=MAX_PATH)
_IS_FLAG = {"type": "boolean"}
_IS_TEXT_OF_SIZE = _string(
    r"\s*(0[xX][0-9a-fA-F]+|[0-9]+(\.[0-9]*)?|\.[0-9]+)\s*([bBkKmMgGtTpPeE]([iI]?[bB])?)?\s*"
)
_IS_SIZE = _either(_integer(PAGE, LARGEST, multipleOf=PAGE), _IS_TEXT_OF_SIZE)
_IS_ACCOUNT = _either(_integer(0, _MOST_ID), _ANY_TEXT)
_IS_RULES = _list(_string("(all|root|(uid|gid|process):.+)"))
_IS_LIMIT = _integer(1, _MOST)

REGION: dict[str, Setting] = {
    "socket": Setting(_socket, _IS_SOCKET, "path of the Unix socket that peers connect to"),
    "size": Setting(
        _size,
        _IS_SIZE,
        f'of the memory, a power of two: bytes, or a text such as "{DEFAULT_SIZE}" (the default)',
    ),
    "vectors": Setting(
        _number(0, MAX_VECTORS), _integer(0, MAX_VECTORS), "of each peer (default: 1)"
    ),
    "name": Setting(_name, _string("/?[^/]+"), "POSIX name of the memory (shm_open)"),
    "file": Setting(_path, _IS_PATH, "file that is the memory"),
    "directory": Setting(_path, _IS_PATH, "directory in which to make a file without a name"),
    "hugepages": Setting(
        _hugepages,
        _either(_IS_FLAG, _IS_TEXT_OF_SIZE),
        'huge pages: true, or their size, such as "2M"',
    ),
    "prealloc": Setting(_flag, _IS_FLAG, "take all pages of the memory at the start"),
    "existing": Setting(
        _existing, {"enum": list(EXISTING)}, "what to do with a name or file that exists"
    ),
    "readonly": Setting(_flag, _IS_FLAG, "attach to the memory for reading only"),
    "accept_owner": Setting(
        _users, _list(_IS_ACCOUNT), "other users whose name or file is accepted"
    ),
    "keep": Setting(_flag, _IS_FLAG, "leave a name that was made here when the region ends"),
    "names": Setting(
        _names,
        _either(_IS_FLAG, _integer(0, MAX_SLOTS)),
        "a directory of names at the end of the memory: true, or how many slots",
    ),
    "channels": Setting(
        _channels,
        _either(_integer(LEAST_AREA, LARGEST), _IS_TEXT_OF_SIZE),
        "how much of the memory is set aside for channels, before a directory of names",
    ),
    "mode": Setting(_mode, _string(_MODE), 'permissions of the socket, such as "0660"'),
    "owner": Setting(_account(user_id), _IS_ACCOUNT, "user that the socket belongs to"),
    "group": Setting(_account(group_id), _IS_ACCOUNT, "group that the socket belongs to"),
    "allow": Setting(_rules, _IS_RULES, "who may connect: if given, no one else may"),
    "deny": Setting(_rules, _IS_RULES, "who may not connect, whatever allow says"),
    "readonly_for": Setting(_rules, _IS_RULES, "who is given memory that can only be read"),
    "peers_per_uid": Setting(
        _number(1, _MOST), _IS_LIMIT, "how many peers each user can have at a time"
    ),
    "joins_per_minute": Setting(
        _number(1, _MOST), _IS_LIMIT, "how often each user can connect in a minute"
    ),
    "hold_leaves": Setting(
        _flag, _IS_FLAG, "never tell QEMU that a peer left, so that its device can be unplugged"
    ),
}
assert list(REGION) == [*RegionConfig._fields]

SERVICE: dict[str, Setting] = {
    "control": Setting(_socket, _IS_SOCKET, "path of the control socket"),
    "metrics": Setting(
        _address,
        _either(_integer(0, 65535), _string(_ADDRESS.replace("?:", ""))),
        "where Prometheus finds the metrics: [HOST:]PORT",
    ),
    "log_format": Setting(_log_format, {"enum": list(LOG_FORMATS)}, "of the log's lines"),
}
