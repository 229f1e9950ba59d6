"""Runs the command line from a bundle: `__main__.py` there imports this, and nothing before.

Knows: where compiled modules can be loaded from, and who may have put them there.
Does not know: what is in the bundle.

Python loads a compiled module only from a file. Beside an unpacked bundle (a tar archive, a disk
image) they lie as files. A .pyz has them inside, and unpacks them once into a folder that belongs
to its user alone.

Invariants:
1. A user who cannot write to the bundle cannot write to what it loads: neither to a module, nor to
   a folder in which a module could be replaced. In /tmp, any user can make the folder beside it.
2. What belongs to another user is not opened, changed or removed.
"""

from __future__ import annotations

import os
import stat
import sys
from importlib.machinery import ExtensionFileLoader, ModuleSpec
from importlib.util import spec_from_file_location

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType
    from typing import NoReturn

BESIDE = "modules"  # the folder of an unpacked bundle
PACKED = "modules.tar.xz"  # in a .pyz
ABSENT = {"bench", "migrate"}  # subcommands for hosts
PLACE = "IVSHMEM_UNPACK"  # the variable with another folder to unpack into

_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_OVERFLOW = 65534  # how the kernel shows a user whom this user namespace does not have


class Finder:
    """Finds compiled modules in a folder, where a.b.c is in `a.b.c.abi3.so`."""

    def __init__(self, folder: str, names: Sequence[str]) -> None:
        self._files = {
            name.partition(".abi3.")[0].partition(".cpython-")[0]: os.path.join(folder, name)
            for name in names
        }

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        file = self._files.get(name)
        if file is None:
            return None
        return spec_from_file_location(name, file, loader=ExtensionFileLoader(name, file))


def run(bundle: str, made: dict[str, str]) -> int:
    """Run the command line of the bundle at a path.

    Args:
        made: "machine", "python" (a version that alone fits, or ""), "digest" of the modules,
            "packed" ("" if they are not in the bundle).
    """
    folder = _folder(bundle, made)
    sys.meta_path.insert(0, Finder(folder, os.listdir(folder)))
    try:
        # Here: to say why it cannot be loaded.
        import ivshmem._core  # noqa: F401
    except ImportError as error:
        _fail(_why(folder, error))
    # The compiled modules are found from here on.
    from ivshmem.cli.main import SUBCOMMANDS, main

    if sys.argv[1:] and sys.argv[1] in ABSENT & SUBCOMMANDS.keys():
        print(
            f"ivshmem: this bundle is for guests, and has no {sys.argv[1]!r}: run it on the host",
            file=sys.stderr,
        )
        return 1
    return main()


def _fail(why: str) -> NoReturn:
    sys.exit(f"ivshmem: {why}")


def _folder(bundle: str, made: dict[str, str]) -> str:
    """Where the compiled modules are."""
    machine, version = os.uname().machine, ".".join(map(str, sys.version_info[:2]))
    if machine != made["machine"]:
        _fail(
            f"this bundle is for {made['machine']}, and this machine is {machine}: make the bundle"
            " on a host of this kind"
        )
    if made["python"] not in ("", version):
        _fail(
            f"this bundle is for Python {made['python']}, and this is {version}: make the bundle"
            " with a package from `make wheels`, whose modules fit Python 3.10 and all newer ones"
        )
    bundle = os.path.realpath(bundle)  # /usr/local/bin has a link to it
    beside = os.path.join(os.path.dirname(bundle), BESIDE)
    if os.path.isdir(beside):
        stranger = _foreign_beside(bundle, beside)
        if not stranger:
            return beside
        if not made["packed"]:
            _fail(
                f"{stranger} belongs to another user than {bundle}, or more users can write to it:"
                " copy both into a folder that only you can write to"
            )
    elif not made["packed"]:
        _fail(f"{beside} is missing: unpack the whole archive")
    place = _place()
    target = os.path.join(place, f"ivshmem-{made['digest']}")
    if not os.path.isdir(target):
        _unpack(bundle, target)
    _check_ours(target)
    return target


def _inside(folder: str) -> list[str]:
    return [folder, *(os.path.join(folder, name) for name in os.listdir(folder))]


def _foreign_beside(bundle: str, folder: str) -> str:
    """What of a folder was written by a user who could not write the bundle; "": nothing.

    In /tmp, where a .pyz was copied to, the folder can be another user's.
    """
    program = os.stat(bundle)
    forbidden = _OTHERS & ~program.st_mode
    for path in _inside(folder):
        found = os.lstat(path)
        whose = (0, os.geteuid(), program.st_uid)
        if found.st_uid not in whose or found.st_mode & forbidden or stat.S_ISLNK(found.st_mode):
            return path
    return ""


def _place() -> str:
    """The folder to unpack into, which is made if it is missing."""
    place = os.environ.get(PLACE)
    if not place:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        place = os.path.join(home, "ivshmem")
    try:
        os.makedirs(place, mode=0o700, exist_ok=True)
    except OSError as error:
        _fail(
            f"the compiled modules cannot be unpacked into {place} ({error.strerror}): set"
            f" {PLACE}=DIR to a folder of yours"
        )
    place = os.path.realpath(place)
    _check_way(place)
    return place


def _check_way(place: str) -> None:
    """Nobody else may put another folder in the place of this one, or of one above it."""
    path, above = place, ""
    while path != above:
        found = os.stat(path)
        owner = found.st_uid in (0, os.geteuid()) or _is_outside(found.st_uid)
        # What is in a sticky folder, such as /tmp, only its owner can rename.
        if not owner or (_writers(found) and not found.st_mode & stat.S_ISVTX):
            _refuse(path)
        path, above = os.path.dirname(path), path


def _writers(found: os.stat_result) -> int:
    """The bits by which others can write; a user's own group has nobody else in it."""
    own = found.st_uid == found.st_gid == os.geteuid() == os.getegid()
    return found.st_mode & (stat.S_IWOTH if own else _OTHERS)


def _is_outside(uid: int) -> bool:
    """Whether a user stands for root outside of this user namespace: user_namespaces(7)."""
    if uid != _OVERFLOW:
        return False
    try:
        with open("/proc/self/uid_map") as lines:
            spans = [[int(number) for number in line.split()] for line in lines]
    except OSError:
        return False
    return not any(first <= uid < first + count for first, _, count in spans)


def _check_ours(target: str) -> None:
    """Nobody else may have written what is loaded into this process."""
    for path in _inside(target):
        found = os.lstat(path)
        if found.st_uid != os.geteuid() or found.st_mode & _OTHERS or stat.S_ISLNK(found.st_mode):
            _refuse(path)


def _refuse(path: str) -> NoReturn:
    _fail(
        f"{path} belongs to another user, or others can write to it: set {PLACE}=DIR to a folder"
        " that only you can write to"
    )


def _unpack(bundle: str, target: str) -> None:
    """Unpack the modules: all of them appear, or none."""
    import io  # here: most runs find the modules unpacked
    import shutil
    import tarfile
    import tempfile
    import zipfile

    try:
        with zipfile.ZipFile(bundle) as archive:
            packed = archive.read(PACKED)
        work = tempfile.mkdtemp(dir=os.path.dirname(target), prefix=".unpacking-")
        try:
            with tarfile.open(fileobj=io.BytesIO(packed), mode="r:xz") as modules:
                for member in modules:
                    source = modules.extractfile(member)
                    if source is None or "/" in member.name:
                        _fail(f"{bundle} is damaged: copy it again")
                    with open(os.path.join(work, member.name), "xb") as file:
                        os.fchmod(file.fileno(), 0o700)
                        shutil.copyfileobj(source, file)
            os.rename(work, target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except (OSError, EOFError, KeyError, tarfile.TarError, zipfile.BadZipFile) as error:
        if not os.path.isdir(target):  # or another process was quicker
            _fail(
                f"the compiled modules cannot be unpacked into {os.path.dirname(target)} ({error}):"
                f" set {PLACE}=DIR to a folder of yours with 2 MiB of space"
            )


def _why(folder: str, error: ImportError) -> str:
    if "failed to map" in str(error) or "Permission denied" in str(error):
        return (
            f"{folder} may not hold programs (it is mounted noexec): set {PLACE}=DIR to a folder"
            " that may"
        )
    return f"a compiled module cannot be loaded: {error}"
