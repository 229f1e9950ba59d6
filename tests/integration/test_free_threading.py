"""Importing the package leaves a free-threaded CPython free of its lock.

On an ordinary CPython this is asked of a free-threaded one: IVSHMEM_FREE_THREADED names it, or it
is python3.14t or python3.13t on PATH. The checked-in C files are compiled for it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
NAMES = ("python3.14t", "python3.13t")

# -W error: a module that does not declare itself safe turns the lock on, with a warning.
PROBE = """
import importlib, importlib.machinery, pathlib, sys
import ivshmem
endings = tuple(importlib.machinery.EXTENSION_SUFFIXES)
files = pathlib.Path(ivshmem.__file__).parent.iterdir()
names = sorted({file.name.partition(".")[0] for file in files if file.name.endswith(endings)})
for name in names:
    importlib.import_module("ivshmem." + name)
print(sys._is_gil_enabled(), *names)
"""


def probe(interpreter: str, **environment: str) -> list[str]:
    """Whether the lock is on after importing everything, and what that was."""
    environment = {**os.environ, **environment}
    environment.pop("PYTHON_GIL", None)  # it would decide the question
    result = subprocess.run(
        [interpreter, "-W", "error", "-c", PROBE],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        check=False,
        cwd="/",
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def build_for(interpreter: str, directory: Path) -> Path:
    """Compile the package for another interpreter, which need not have setuptools."""
    ask = "import sysconfig as s; print(s.get_path('include'), s.get_config_var('EXT_SUFFIX'))"
    include, ending = subprocess.check_output([interpreter, "-c", ask], text=True).split()
    package = directory / "ivshmem"
    shutil.copytree(CHECKOUT / "src/ivshmem", package, ignore=shutil.ignore_patterns("*.so"))
    for source in package.glob("*.c"):
        command = [os.environ.get("CC", "cc"), "-O0", "-w", "-shared", "-fPIC", f"-I{include}"]
        target = source.with_name(source.stem + ending)
        subprocess.run([*command, "-o", target, source], check=True, timeout=120)
    return directory


def test_the_lock_stays_off(tmp_path: Path) -> None:
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        found = probe(sys.executable)
    else:
        wish = os.environ.get("IVSHMEM_FREE_THREADED")
        interpreter = wish or next(filter(None, map(shutil.which, NAMES)), None)
        if interpreter is None:
            pytest.skip("no free-threaded CPython: name one by IVSHMEM_FREE_THREADED")
        found = probe(interpreter, PYTHONPATH=str(build_for(interpreter, tmp_path)))
    assert found == ["False", "_bell", "_core", "_fds", "_memory", "_spin", "_wire"]
