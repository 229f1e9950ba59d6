"""Makes a free-threaded CPython for test_free_threading, from the sources of Debian's python3.13.

    python tests/support/free_threaded.py FOLDER    prints the interpreter's path

No package of Debian and none of PyPI has such an interpreter. Nothing of the system is changed:
apt-get keeps its lists in FOLDER. It takes four minutes of processor time; what is there is kept.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # it is run by its path

from support import unpacked

SUITE, PACKAGE = "trixie", "python3.13"
KEYS = "/usr/share/keyrings/debian-archive-keyring.gpg"


def make(folder: Path) -> Path:
    """Build it, unless it is there; return the interpreter.

    Raises:
        unpacked.CannotError: a step failed; the next call begins anew.
    """
    interpreter = folder / "installed/bin/python3.13t"
    if interpreter.exists():
        return interpreter
    for name in ("etc/apt.conf.d", "state/lists/partial", "cache/archives/partial", "source"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    source = f"deb-src [signed-by={KEYS}] {unpacked.mirror()} {SUITE} main\n"
    (folder / "etc/sources.list").write_text(source)
    places = {
        "Dir::Etc": "etc",
        "Dir::Etc::sourcelist": "etc/sources.list",
        "Dir::State": "state",
        "Dir::Cache": "cache",
    }
    options = ["-qq", "-o", "Dir::Etc::sourceparts=/dev/null", "-o", "Dir::State::status=/dev/null"]
    for key, value in places.items():
        options += ["-o", f"{key}={folder / value}"]
    unpacked.run("apt-get", *options, "update")
    unpacked.run("apt-get", *options, "source", "--download-only", PACKAGE, cwd=folder / "source")
    (archive,) = (folder / "source").glob("*.orig.tar.xz")
    tree = folder / "tree"
    if tree.exists():
        shutil.rmtree(tree)  # of a build that was stopped: make takes half-written files for whole
    tree.mkdir()
    unpacked.run("tar", "-C", str(tree), "--strip-components=1", "-xf", str(archive))
    prefix = f"--prefix={interpreter.parent.parent}"
    flags = ["--disable-gil", "--without-ensurepip", "--disable-test-modules", "CFLAGS=-O1"]
    unpacked.run("./configure", "-q", prefix, *flags, cwd=tree)
    unpacked.run("make", "-s", f"-j{os.cpu_count() or 1}", cwd=tree)
    unpacked.run("make", "-s", "install", cwd=tree)
    return interpreter


if __name__ == "__main__":
    try:
        print(make(Path(sys.argv[1]).absolute()))
    except unpacked.CannotError as error:
        sys.exit(f"free_threaded: {error}")
