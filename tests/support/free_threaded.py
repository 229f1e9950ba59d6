"""Makes a free-threaded CPython for test_free_threading, from the sources of Debian's python3.13.

    python tests/support/free_threaded.py FOLDER    prints the interpreter's path

No package of Debian and none of PyPI has such an interpreter. Nothing of the system is changed:
apt-get keeps its lists in FOLDER. It takes four minutes of processor time; what is there is kept.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

SUITE, PACKAGE = "trixie", "python3.13"
KEYS = "/usr/share/keyrings/debian-archive-keyring.gpg"


def mirror() -> str:
    """Where this machine's own apt configuration gets Debian from."""
    texts = [
        path.read_text()
        for path in [*Path("/etc/apt").glob("sources.list*"), *Path("/etc/apt").glob("*/*.sources")]
        if path.is_file()
    ]
    found = re.search(r"https?://\S+/debian/?(?=\s)", "\n".join(texts))
    if found is None:
        raise SystemExit("no mirror of Debian in /etc/apt: name an interpreter by hand")
    return found[0]


def run(*command: str | Path, cwd: Path | None = None) -> None:
    """Run it quietly; what it says goes to stderr if it fails."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command[0]}: {done.stdout[-2000:]}{done.stderr[-2000:]}")


def make(folder: Path) -> Path:
    """Build it, unless it is there; return the interpreter."""
    interpreter = folder / "installed/bin/python3.13t"
    if interpreter.exists():
        return interpreter
    for name in ("etc/apt.conf.d", "state/lists/partial", "cache/archives/partial", "source"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    source = f"deb-src [signed-by={KEYS}] {mirror()} {SUITE} main\n"
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
    run("apt-get", *options, "update")
    run("apt-get", *options, "source", "--download-only", PACKAGE, cwd=folder / "source")
    (archive,) = (folder / "source").glob("*.orig.tar.xz")
    tree = folder / "tree"
    tree.mkdir(exist_ok=True)
    run("tar", "-C", tree, "--strip-components=1", "-xf", archive)
    prefix = f"--prefix={interpreter.parent.parent}"
    flags = ["--disable-gil", "--without-ensurepip", "--disable-test-modules", "CFLAGS=-O1"]
    run("./configure", "-q", prefix, *flags, cwd=tree)
    run("make", "-s", f"-j{os.cpu_count() or 1}", cwd=tree)
    run("make", "-s", "install", cwd=tree)
    return interpreter


if __name__ == "__main__":
    print(make(Path(sys.argv[1]).absolute()))
