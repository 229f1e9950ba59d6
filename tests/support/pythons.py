#!/usr/bin/env python3
"""Prints the interpreters that the package is tested with, beside the usual one; a path on a line.

    for python in $(python3 tests/support/pythons.py FOLDER); do
        make test-python PYTHON=$python
    done

These are the oldest CPython that pyproject.toml allows, if this machine has it (Debian has none),
and the newest one of Debian's newest suite. That one is unpacked into the folder; it makes virtual
environments, and builds extensions with the machine's own compiler. stderr says which they are, and
what could not be found, a free-threaded one for instance, which no suite of Debian has had.
`tests/support/free_threaded.py` builds that.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # it is run by its path

from support import unpacked


class Python(unpacked.Program):
    """python3.N with headers and venv; N is the highest that there is."""

    name = "pythons"
    # No free-threaded one has existed yet: its name may be like the program's, or like Ubuntu's.
    packages = ('?and(?name("^python3\\.[0-9]+(-dev|-venv|t|-nogil)?$"),?not(?virtual))',)

    def path(self, root: Path) -> Path:
        found = {
            int(match[1]): path
            for path in (root / "usr/bin").glob("python3.*")
            if (match := re.fullmatch(r"python3\.(\d+)", path.name))
        }
        return found[max(found)] if found else root / "usr/bin/python3"

    def version(self, root: Path) -> str:
        program = self.path(root)
        shown = unpacked.done(str(program), "-c", PROBE) if program.exists() else None
        return shown.stdout.strip() if shown is not None and shown.returncode == 0 else ""

    def settle(self, new: Path, target: Path) -> None:
        super().settle(new, target)
        name = self.path(new).name
        # Debian builds for several architectures: its own header leads to that of one of them, by a
        # path below /usr/include.
        (header,) = (new / "usr/include").glob(f"*-linux-gnu/{name}/pyconfig.h")
        shutil.copy(header, new / f"usr/include/{name}/pyconfig.h")
        ensurepip = new / f"usr/lib/{name}/ensurepip/__init__.py"
        asks, wheels = "sysconfig.get_config_var('WHEEL_PKG_DIR')", target / WHEELS
        text = ensurepip.read_text()
        if asks not in text:
            raise unpacked.CannotError(f"{ensurepip} finds pip in another way")
        ensurepip.write_text(text.replace(asks, repr(str(wheels))))


WHEELS = "usr/share/python-wheels"  # pip's, for virtual environments

# What it is for: it has venv, and modules that come with libraries of their own.
PROBE = "import sys, ssl, ctypes, ensurepip, venv; print('CPython', sys.version.partition(' ')[0])"


def oldest() -> str | None:
    """The path of a CPython of the oldest version, on PATH or where pyenv installs."""
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    (version,) = re.findall(r'requires-python = ">=([\d.]+)"', text)
    installed = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python{version}"))
    for path in (shutil.which(f"python{version}"), *map(str, installed)):
        if path is not None and (shown := unpacked.done(path, "-c", PROBE)).returncode == 0:
            tell(shown.stdout.strip())
            return path
    tell(f"this machine has no CPython {version}, the oldest one that is supported: not tested")
    return None


def newest(folder: Path) -> str:
    """The path of the newest CPython that Debian has.

    Raises:
        unpacked.CannotError: it could not be unpacked.
    """
    python = Python()
    root = unpacked.newest(python, folder)
    tell(f"{python.version(root)}, of {root.name}")
    if not any((root / "usr/bin").glob("python3.*t")):
        tell(f"{root.name} has no free-threaded CPython: not tested, except by `make nightly`")
    return str(python.path(root))


def tell(line: str) -> None:
    print(f"pythons: {line}", file=sys.stderr)


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print(f"usage: {sys.argv[0]} FOLDER", file=sys.stderr)
        return 2
    try:
        found = [oldest(), newest(Path(arguments[0]).absolute())]
    except unpacked.CannotError as error:
        tell(str(error))
        return 1
    print(*filter(None, found), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
