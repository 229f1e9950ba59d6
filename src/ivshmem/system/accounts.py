"""Numbers of users and groups, from numbers or names.

Knows: the system's user database. Does not know: what they may do.
"""

from __future__ import annotations

import grp
import operator
import pwd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import SupportsIndex

_MOST = 2**32 - 2  # 2**32 - 1 means "leave it as it is" to chown(2)


def user_id(user: SupportsIndex | str) -> int:
    """The uid of a user, given by name or number ("1000" is a number).

    Raises:
        ValueError: there is none of that name, or the number cannot be one.
    """
    if isinstance(user, str) and not _is_number(user):
        try:
            return pwd.getpwnam(user).pw_uid
        except (KeyError, ValueError):
            raise ValueError(f"no user {user!r} on this system: give a name or a uid") from None
    return _checked(user, "uid")


def group_id(group: SupportsIndex | str) -> int:
    """The gid of a group, given by name or number ("107" is a number).

    Raises:
        ValueError: there is none of that name, or the number cannot be one.
    """
    if isinstance(group, str) and not _is_number(group):
        try:
            return grp.getgrnam(group).gr_gid
        except (KeyError, ValueError):
            raise ValueError(f"no group {group!r} on this system: give a name or a gid") from None
    return _checked(group, "gid")


def user_name(uid: int) -> str:
    """Return a user for a message: "nobody (uid 65534)"; "uid 4711" if it has no name."""
    try:
        return f"{pwd.getpwuid(uid).pw_name} (uid {uid})"
    except KeyError:
        return f"uid {uid}"


def user_option(uid: int) -> str:
    """Return a user as an option takes one: its name; its uid if it has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _is_number(text: str) -> bool:
    return text.removeprefix("-").isdecimal() and text.isascii()


def _checked(value: SupportsIndex | str, what: str) -> int:
    number = int(value) if isinstance(value, str) else operator.index(value)
    if not 0 <= number <= _MOST:
        raise ValueError(f"{what} {number}: allowed are 0 to {_MOST}")
    return number
