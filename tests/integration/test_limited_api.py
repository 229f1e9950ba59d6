"""The modules fit the oldest CPython, and what `make wheels` makes fits it too.

They are built for the limited API of CPython 3.10, and take some functions beside it that 3.10 has:
src/ivshmem/native/limited_api.h says which. A function that 3.10 lacks would make `import` fail
there, on a machine where nobody can see this test.
"""

from __future__ import annotations

import importlib.machinery
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from support import pythons

import ivshmem

PACKAGE = Path(ivshmem.__file__).parent

OLDER = """
import sys
sys.path.insert(0, sys.argv[1])
import ivshmem, ivshmem.channel, ivshmem.guest, ivshmem.bench
with ivshmem.Server(sys.argv[2], "1M", vectors=2, channels="512K").start() as server:
    with ivshmem.connect(server.path) as a, ivshmem.connect(server.path) as b:
        a.ring(b.id, vector=1)
        assert b.wait(1, timeout=10) == 1
        with ivshmem.channel.open(a) as channels:
            log = channels.create_messages("log", limit=100)
            with log.reader() as reader, log.writer() as writer:
                writer.put(b"hello")
                with reader.view(timeout=10) as view:
                    print(bytes(memoryview(view)).decode(), *sys.version_info[:2])
"""

# The program and its library, one of which has the functions.
FILES = """
import os, sys, sysconfig
library = os.path.join(*sysconfig.get_config_vars("LIBDIR", "LDLIBRARY"))
print(os.path.realpath(sys.executable), *[library] * (not library.endswith(".a")))
"""


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.so"))


def is_abi3() -> bool:
    return (
        sys.version_info >= (3, 11)
        and not sysconfig.get_config_var("Py_GIL_DISABLED")
        and os.environ.get("IVSHMEM_ABI3") != "0"
    )


def test_the_modules_say_whom_they_fit() -> None:
    ending = ".abi3.so" if is_abi3() else importlib.machinery.EXTENSION_SUFFIXES[0]
    assert modules()
    assert [path.name for path in modules() if not path.name.endswith(ending)] == []


def symbols(path: Path, kind: str) -> set[str]:
    listed = subprocess.check_output(["nm", "-D", f"--{kind}-only", str(path)], text=True)
    return {line.split()[-1] for line in listed.splitlines()}


@pytest.mark.skipif(not is_abi3(), reason="the modules are for this CPython alone")
def test_the_oldest_python_has_all_that_they_take(tmp_path: Path) -> None:
    oldest = pythons.oldest()
    if oldest is None or not shutil.which("nm"):
        pytest.skip("this needs CPython 3.10, and nm (Debian: binutils)")
    copy = tmp_path / "ivshmem"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    command = [oldest, "-c", OLDER, str(tmp_path), str(tmp_path / "socket")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("hello 3 10\n", "")
    files = subprocess.check_output([oldest, "-c", FILES], text=True).split()
    has = {name for file in files for name in symbols(Path(file), "defined")}
    assert "PyObject_VectorcallDict" in has
    takes = {name for path in modules() for name in symbols(path, "undefined")}
    assert {name for name in takes if name.startswith(("Py", "_Py"))} - has == set()


def test_the_modules_take_nothing_newer_than_a_wheel_may() -> None:
    """manylinux_2_28: glibc 2.28."""
    if not shutil.which("nm"):
        pytest.skip("this needs nm (Debian: binutils)")
    if tuple(map(int, platform.libc_ver()[1].split("."))) > (2, 36):
        pytest.skip("a wheel is built where the C library is older: Debian 12 has 2.36")
    versions = {
        name.partition("@GLIBC_")[2]
        for path in modules()
        for name in symbols(path, "undefined")
        if "@GLIBC_" in name
    }
    numbers = {tuple(map(int, version.split("."))) for version in versions}
    assert numbers
    assert max(numbers) <= (2, 28), versions
