"""What a guest carries that must not look at the host: Python and the package, in its initramfs.

Knows: which files an interpreter needs to start, and the libraries of what is compiled.
Does not know: the kernel and its modules (image.py), or what the guest is for.

A guest with the host's files mounted cannot migrate: 9p blocks it, and another host has other
files. This one has all it needs in its own memory, which migrates with it. Files lie at the paths
they have on the host, as the interpreter looks for itself there. Python goes as bytecode without
sources: nothing is compiled in the guest, which takes seconds there, and half the memory is used.
"""

import functools
import hashlib
import importlib.util
import marshal
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import ivshmem

from . import image
from .newc import Newc

ROOT = "root"  # of these files, in the initramfs
INSIDE = Path(__file__).parent / "inside"
PACKAGE = Path(ivshmem.__file__).parent

# Of the standard library: what no program in a guest imports.
LEFT_OUT = {
    *("site-packages", "test", "tests", "idlelib", "tkinter", "turtledemo", "ensurepip"),
    *("lib2to3", "pydoc_data", "distutils", "__pycache__", "unittest", "curses", "dbm", "venv"),
    *("sqlite3", "wsgiref", "xmlrpc"),
}
LEFT_OUT_MODULES = re.compile(r"_test|_xx|xxlimited|_tkinter|_sqlite3|_codecs_|_curses|_dbm|_gdbm")


@functools.cache
def interpreter() -> Path:
    """The archive with the interpreter; it is built once for each, and kept in the cache."""
    binary = _binary()
    library = Path(sysconfig.get_path("stdlib"))
    recipe = hashlib.sha256(Path(__file__).read_bytes())
    recipe.update(f"{binary} {binary.stat().st_mtime_ns} {library} {sys.version}".encode())
    cache = image.cache()
    built = cache / f"python-{recipe.hexdigest()[:12]}"
    with image.locked(cache / "lock"):
        if not built.exists():
            with image.appearing(built) as new:
                new.write_bytes(_interpreter(binary, library))
    return built


@functools.cache
def package() -> bytes:
    """The archive with the package as it is installed here, and what programs in guests import."""
    archive = _Tree()
    for path in sorted((*PACKAGE.rglob("*.py"), *INSIDE.rglob("*.py"))):
        archive.add(path.with_suffix(".pyc"), _bytecode(path))
    for path in sorted(PACKAGE.rglob("*.so")):
        archive.add(path)
    return archive.finish()


def program() -> tuple[Path, list[Path]]:
    """The interpreter's path, and what its PYTHONPATH holds."""
    return _binary(), [INSIDE, PACKAGE.parent]


def _binary() -> Path:
    """Not that of a virtual environment, which is a link."""
    return Path(sys.executable).resolve()


def write(target: Path, base: Path) -> None:
    """An initramfs: `base`, then this. The kernel unpacks one archive after the other."""
    with target.open("wb") as out:
        for part in (base, interpreter()):
            with part.open("rb") as source:
                shutil.copyfileobj(source, out, 1 << 20)
        out.write(package())


def _interpreter(binary: Path, library: Path) -> bytes:
    archive = _Tree()
    compiled = [binary]
    for path in _files(library):
        if path.suffix == ".py":
            archive.add(path.with_suffix(".pyc"), _bytecode(path))
        elif path.suffix == ".so":
            compiled.append(path)
    with tempfile.TemporaryDirectory() as folder:
        for path in (*compiled, *_libraries([*compiled, *PACKAGE.rglob("*.so")])):
            archive.add(path, _stripped(path, Path(folder)), executable=True)
    for name in ("dev", "proc", "sys", "tmp", "run", "root"):
        archive.folder(Path("/", name))
    return archive.finish()


def _files(library: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(library):
        folders[:] = sorted(
            name for name in folders if name not in LEFT_OUT and not name.startswith("config-")
        )
        for name in sorted(names):
            if not LEFT_OUT_MODULES.match(name):
                yield Path(folder, name)


def _bytecode(path: Path) -> bytes:
    """As `python -m compileall -b` would write it; without sources nothing checks its age."""
    code = compile(path.read_bytes(), str(path), "exec", dont_inherit=True)
    return importlib.util.MAGIC_NUMBER + bytes(12) + marshal.dumps(code)


def _libraries(compiled: Iterable[Path]) -> list[Path]:
    """Of these files, and the dynamic linker, under the names by which they are asked for."""
    found = set()
    for path in compiled:
        said = subprocess.run(["ldd", str(path)], capture_output=True, text=True, check=False)
        found |= set(re.findall(r"(/\S+) \(0x", said.stdout))
    return sorted(map(Path, found))


def _stripped(path: Path, folder: Path) -> bytes:
    """Without symbols for debuggers, if there is a tool for that: they can be most of a file."""
    if shutil.which("strip"):
        out = folder / "stripped"
        done = subprocess.run(
            ["strip", "--strip-unneeded", "-o", str(out), str(path)],
            capture_output=True,
            check=False,
        )
        if done.returncode == 0:
            return out.read_bytes()
    return path.read_bytes()


class _Tree:
    """An archive of files at their own paths below ROOT, with the folders above them."""

    def __init__(self) -> None:
        self._archive = Newc()
        self._folders: set[str] = set()

    def add(self, path: Path, data: bytes | None = None, executable: bool = False) -> None:
        self.folder(path.parent)
        content = path.read_bytes() if data is None else data
        self._archive.file(f"{ROOT}{path}", content, executable)

    def folder(self, path: Path) -> None:
        for folder in (*reversed(path.parents), path):
            name = f"{ROOT}{folder}".rstrip("/")
            if name not in self._folders:
                self._folders.add(name)
                self._archive.folder(name)

    def finish(self) -> bytes:
        return self._archive.finish()
