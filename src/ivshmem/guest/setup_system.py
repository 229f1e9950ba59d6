"""Internal: the machine that is set up: this one, or one whose files are in a folder.

Knows: how files of the system are replaced, the programs that act on them, the record of what was
made. Does not know: which files those are.

Invariants:
1. A path of a machine in a folder never leads out of the folder.
2. A file is whole under its name, or has not changed. It is on the disk before the next step.
3. What is about to be made is in the record before it is made. So what a killed set-up left can be
   found and taken back.
"""

from __future__ import annotations

import contextlib
import errno
import grp
import json
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import IvshmemError
from ..system import locks
from ..system.new_files import NewFile

RECORD = "/var/lib/ivshmem-guest-setup.json"
_VERSION = 1
# What an entry of the record holds beside its kind and its name.
KINDS: dict[str, dict[str, type]] = {
    "file": {"digests": list},
    "folder": {},
    "link": {"target": str},
    "group": {},
    "member": {},
    "module": {},
    "no-iommu mode": {},
    "device": {"driver": str, "override": str, "enabled": bool, "files": list},
    "unit": {},
}
_LOCK_SECONDS = 5.0
_SECONDS = 120.0  # for a program; to load modules under emulation takes some of them
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"

# Debian's packages of the programs.
_PACKAGES = {
    "systemctl": "systemd",
    "systemd-sysusers": "systemd",
    "udevadm": "udev",
    "modprobe": "kmod",
    "groupdel": "passwd",
    "gpasswd": "passwd",
}


class System:
    """A machine by its files; it also runs, if its root is "/".

    Attributes:
        live: whether it is this machine.
    """

    def __init__(self, root: str = "/") -> None:
        self.root = os.path.realpath(root)
        self.live = self.root == "/"
        if not os.path.isdir(self.root):
            raise NotADirectoryError(errno.ENOTDIR, "the root of a system is a folder", root)

    def place(self, path: str) -> Path:
        """Where a path of that machine is for this process.

        Raises:
            IvshmemError: a link leads out of its root.
        """
        if self.live:
            return Path(path)
        folder, name = os.path.split(path)
        inside = os.path.realpath(self.root + folder)
        if os.path.commonpath([inside, self.root]) != self.root:
            raise IvshmemError(f"{folder} is a link that leads out of {self.root}: remove the link")
        return Path(inside, name)

    # -- files ------------------------------------------------------------------------------------

    def read(self, path: str) -> bytes | None:
        """The content of a file; None: there is none.

        Raises:
            OSError: it is no regular file, or may not be read.
        """
        place = self.place(path)
        try:
            # Not by a link, and not waiting for a FIFO.
            fd = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO):
                raise _no_file(place) from None
            raise
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise _no_file(place)
        with open(fd, "rb") as file:
            return file.read()

    def write(self, path: str, data: bytes, mode: int) -> None:
        """Write a file, in the place of the one that is there."""
        place = self.place(path)
        with NewFile(place, mode=0o600) as draft:
            fd = draft.file[0]
            at = 0
            while at < len(data):
                at += os.write(fd, data[at:])
            os.fchmod(fd, mode)
            os.fsync(fd)
            draft.publish(replace=True)
            draft.place.sync()

    def remove(self, path: str) -> None:
        """Remove a file, and before it the drafts that a killed `write` left beside it."""
        place = self.place(path)
        for draft in place.parent.glob(f".{place.name}.ivshmem-*"):
            draft.unlink()
        with contextlib.suppress(FileNotFoundError):
            place.unlink()

    def make_folder(self, path: str) -> None:
        """Make a folder, which all users may enter."""
        place = self.place(path)
        with contextlib.suppress(FileExistsError):
            place.mkdir()
        place.chmod(0o755)

    def make_folders_of(self, path: str) -> None:
        """Make the folders above a path that are missing."""
        for folder in self.missing_folders(path):
            self.make_folder(folder)

    def missing_folders(self, path: str) -> list[str]:
        """The folders above a path that are missing, the outermost one first."""
        missing = []
        folder = os.path.dirname(path)
        while not self.place(folder).is_dir():
            missing.append(folder)
            folder = os.path.dirname(folder)
        return missing[::-1]

    # -- users ------------------------------------------------------------------------------------

    def members(self, group: str) -> list[str] | None:
        """Who is in a group by /etc/group; None: there is no such group."""
        if self.live:
            try:
                return list(grp.getgrnam(group).gr_mem)
            except KeyError:
                return None
        for line in (self.read("/etc/group") or b"").decode(errors="replace").splitlines():
            name, *_, users = line.split(":")
            if name == group:
                return [user for user in users.split(",") if user]
        return None

    def has_user(self, user: str) -> bool:
        """Whether there is such a user."""
        if self.live:
            import pwd  # here: most set-ups name no user

            try:
                pwd.getpwnam(user)
            except KeyError:
                return False
            return True
        lines = (self.read("/etc/passwd") or b"").decode(errors="replace").splitlines()
        return any(line.split(":")[0] == user for line in lines)

    # -- programs ---------------------------------------------------------------------------------

    def run(self, *command: str, rooted: bool = False) -> str:
        """Run a program to its end; return what it printed.

        Args:
            rooted: it knows the option --root.

        Raises:
            IvshmemError: it is missing, or failed; the message has its last line.
        """
        words = list(command)
        if rooted and not self.live:
            words.insert(1, f"--root={self.root}")
        try:
            done = subprocess.run(
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                check=False,
                timeout=_SECONDS,
                env={**os.environ, "PATH": _PATH, "LC_ALL": "C.UTF-8", "SYSTEMD_PAGER": ""},
            )
        except FileNotFoundError:
            package = _PACKAGES.get(command[0], command[0])
            raise IvshmemError(
                f"{command[0]} is not installed: apt-get install {package}"
            ) from None
        except subprocess.TimeoutExpired:
            raise IvshmemError(
                f"`{' '.join(words)}` did not end within {_SECONDS:g} seconds"
            ) from None
        if done.returncode:
            said = [line for line in done.stdout.splitlines() if line.strip()] or [
                "it says nothing"
            ]
            raise IvshmemError(f"`{' '.join(words)}` failed: {said[-1].strip()}")
        return done.stdout

    def tried(self, *command: str) -> bool:
        """Run a program; return whether it succeeded."""
        try:
            self.run(*command)
        except IvshmemError:
            return False
        return True


def _no_file(place: Path) -> OSError:
    reason = (
        "it is not a regular file, and `ivshmem guest setup` did not make it: move it away first"
    )
    return FileExistsError(errno.EEXIST, reason, str(place))


class SetupRecord:
    """What a set-up has made, or was about to make; in a file of the machine.

    Attributes:
        entries: in the order in which they were made. Each has a "kind" and a "name".
    """

    def __init__(self, system: System) -> None:
        self.system = system
        self.entries: list[dict[str, Any]] = []
        data = system.read(RECORD)
        if data is not None:
            try:
                self.entries = _parsed(json.loads(data))
            except (ValueError, TypeError, KeyError):
                raise IvshmemError(
                    f"{system.place(RECORD)} is damaged, or of another version, so what was set up"
                    " is unknown: undo it with that version, or remove it, and the files in /etc"
                    " that `grep -rl 'ivshmem guest setup' /etc` finds"
                ) from None

    def find(self, kind: str, name: str) -> dict[str, Any] | None:
        """The entry of that kind and name."""
        for entry in self.entries:
            if (entry["kind"], entry["name"]) == (kind, name):
                return entry
        return None

    def add(self, entries: list[dict[str, Any]]) -> None:
        """Write down what is about to be made, unless it is known. What was before stays known."""
        changed = False
        for entry in entries:
            known = self.find(entry["kind"], entry["name"])
            if known is None:
                self.entries.append(entry)
                changed = True
            elif new := [each for each in entry.get("digests", ()) if each not in known["digests"]]:
                known["digests"] += new
                changed = True
        if changed:
            text = json.dumps({"version": _VERSION, "entries": self.entries}, indent=1)
            self.system.write(RECORD, text.encode() + b"\n", 0o644)

    def remove(self) -> None:
        """All was taken back."""
        self.system.remove(RECORD)
        self.entries = []


def _parsed(value: Any) -> list[dict[str, Any]]:
    if value["version"] != _VERSION:
        raise ValueError
    entries = value["entries"]
    for entry in entries:
        fields = {"kind": str, "name": str, **KINDS[entry["kind"]]}
        if any(not isinstance(entry[field], its_type) for field, its_type in fields.items()):
            raise ValueError
        if entry["kind"] == "member" and entry["name"].count(":") != 1:
            raise ValueError
    return list(entries)


@contextlib.contextmanager
def alone(system: System) -> Iterator[None]:
    """Keep a second set-up of the machine waiting while the block runs."""
    folder = os.path.dirname(RECORD)
    if not system.place(folder).is_dir():
        raise FileNotFoundError(
            errno.ENOENT,
            "not the root of a system: this folder is missing",
            str(system.place(folder)),
        )
    with locks.locked(system.place(folder), _LOCK_SECONDS):
        yield
