"""Whether a user may reach a path, and the command that lets them.

Knows: permissions of files, and of all directories on the way; the user that QEMU has under
libvirt. Does not know: what the path is.
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import shutil
import stat
import subprocess
from pathlib import Path

from ..qemu.accounts import LIBVIRT_GROUP, LIBVIRT_USERS
from ..text import quoted
from .check import Finding, as_root, failed, ok, warning

_FLAGS = {"r": os.R_OK, "w": os.W_OK, "x": os.X_OK}


def check_user(user: str) -> None:
    """Refuse a user with whose eyes we cannot look.

    Raises:
        ValueError: there is no such user, or we are not root.
    """
    try:
        pwd.getpwnam(user)
    except KeyError:
        raise ValueError(f"no such user: {user}") from None
    if os.geteuid():
        raise ValueError(
            f"only root can check the permissions of {user}: run this as root, or as {user}"
        )


def permission(path: str, rights: str, user: str | None) -> Finding:
    """Whether a user, or we (None), have rights (of "rwx") at `path`, and get there.

    If root asks for itself, the user of libvirt's QEMUs is checked, too, if there is one.
    """
    who = user or _name(os.geteuid())
    if needs := _lacking(path, rights, user):
        start = _from_the_start(path) if user in LIBVIRT_USERS else ""
        return failed(f"{who} may not: {_described(needs[0][0])}{start}", _fix(needs, who))
    if user is None and os.geteuid() == 0:
        for other in LIBVIRT_USERS:
            with contextlib.suppress(KeyError):  # no such user here
                if needs := _lacking(path, rights, other):
                    return warning(
                        f"{who} may; {other}, the user of libvirt's QEMUs, may not:"
                        f" {_described(needs[0][0])}{_from_the_start(path)}",
                        _fix(needs, other),
                    )
    return ok(f"{who} may: {_described(path)}")


def obstacle(folder: str) -> str:
    """What stands in the way of making a directory: a file where one is needed; "" if nothing."""
    for place in (folder, *map(str, Path(folder).parents)):
        if os.path.lexists(place):
            return "" if os.path.isdir(place) else place
    return ""


def free_beside(path: str) -> str:
    """Return a free path in the same directory."""
    number = 2
    while os.path.lexists(f"{path}.{number}"):
        number += 1
    return f"{path}.{number}"


def _lacking(path: str, rights: str, user: str | None) -> list[tuple[str, str]]:
    """Places on the way to `path`, and itself, with the rights that are lacking there."""
    ways = [(str(parent), "x") for parent in reversed(Path(path).parents)]
    wanted = [*ways, (path, rights)]
    lacking = [(place, needs) for place, needs in wanted if not _may(place, needs, user)]
    # Behind a directory that is closed to us, nothing can be seen; but root sees all.
    closed = next((at for at, need in enumerate(lacking) if need[1] == "x"), None)
    return lacking if closed is None or os.geteuid() == 0 else lacking[: closed + 1]


def _may(path: str, rights: str, user: str | None) -> bool:
    if user is None:
        return os.access(path, sum(_FLAGS[right] for right in rights), effective_ids=True)
    entry = pwd.getpwnam(user)
    # Access control lists and all: the kernel is asked, by a process that is that user.
    return all(
        subprocess.run(
            ["test", f"-{right}", path],
            check=False,
            user=entry.pw_uid,
            group=entry.pw_gid,
            extra_groups=os.getgrouplist(user, entry.pw_gid),
            cwd="/",
        ).returncode
        == 0
        for right in rights
    )


def _fix(needs: list[tuple[str, str]], user: str) -> str:
    """The command that grants what is lacking: to this user alone, where that can be done."""
    command = " && ".join(_grant(place, rights, user) for place, rights in needs)
    own = all(os.stat(place).st_uid == os.geteuid() for place, _ in needs)
    return command if own and "apt-get" not in command else as_root(command)


def _from_the_start(path: str) -> str:
    """What gives libvirt's QEMU a socket from the moment on in which it is there."""
    if not stat.S_ISSOCK(os.stat(path).st_mode):
        return ""
    return f" (next time, serve with --group {LIBVIRT_GROUP} --mode 0660)"


def _grant(path: str, rights: str, user: str) -> str:
    """Give rights to one user only: never to the class "others", which is every user."""
    status = os.stat(path)
    try:
        entry = pwd.getpwnam(user)
        uid, groups = entry.pw_uid, os.getgrouplist(user, entry.pw_gid)
    except KeyError:
        uid, groups = int(user), os.getgroups()
    # The first class that fits a user is the one that counts.
    who = "u" if status.st_uid == uid else "g" if status.st_gid in groups else "o"
    if who == "u":
        return f"chmod u+{rights} {quoted(path)}"
    command = f"setfacl -m u:{user}:{rights} {quoted(path)}"
    return command if shutil.which("setfacl") else f"apt-get install -y acl && {command}"


def _described(path: str) -> str:
    """Path, mode and owner."""
    try:
        status = os.stat(path)
    except OSError as error:
        return f"{path} ({error.strerror})"
    try:
        group = grp.getgrgid(status.st_gid).gr_name
    except KeyError:
        group = str(status.st_gid)
    return f"{path} ({stat.filemode(status.st_mode)} {_name(status.st_uid)}:{group})"


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
