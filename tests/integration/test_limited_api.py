"""The modules that `make wheels` makes fit the oldest CPython.

They are built for the limited API of CPython 3.10, and take some functions beside it that 3.10 has:
src/ivshmem/native/limited_api.h says which. A function that 3.10 lacks would make `import` fail
there, on a machine where nobody can see this test.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from support import pythons

HOME = Path(__file__).parents[2]

pytestmark = pytest.mark.nightly  # it builds all modules

# What others publish with; `make wheels` takes the same.
FLAGS = dict(
    re.findall(r'(IVSHMEM_ABI3|CFLAGS|LDFLAGS) = "([^"]*)"', (HOME / "pyproject.toml").read_text())
)
# Bytes to copy, and unpacked.
LIMITS = {"pyz": (940, 1290), "tar.xz": (940, 1820), "tar": (1820, 1820), "iso": (1860, 1820)}

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


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, built as a wheel is."""
    if sys.version_info < (3, 11) or sysconfig.get_config_var("Py_GIL_DISABLED"):
        pytest.skip("this CPython builds modules for itself alone")
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(HOME / name, folder)
    for name in ("src", "systemd"):
        shutil.copytree(HOME / name, folder / name, ignore=shutil.ignore_patterns("*.so"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", "made", "."]
    subprocess.run(command, cwd=folder, check=True, timeout=600, env={**os.environ, **FLAGS})
    (wheel,) = (folder / "made").glob("*-cp310-abi3-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked" / "ivshmem"


@pytest.mark.parametrize("name", ["CFLAGS", "LDFLAGS"])
def test_make_builds_with_the_same_flags(name: str) -> None:
    command = ["make", "-s", f"--eval=show:; @echo '$(WHEEL_{name})'", "show"]
    shown = subprocess.check_output(command, cwd=HOME, text=True, timeout=60)
    assert shown.split() == FLAGS[name].split()


def modules(package: Path) -> list[Path]:
    return sorted(package.rglob("*.so"))


def test_the_modules_say_whom_they_fit(package: Path) -> None:
    assert [path.name for path in modules(package)] == ["_joined.abi3.so"]


def test_each_module_is_found(package: Path) -> None:
    """Also by threads that import the same one at once."""
    source = HOME / "src"
    paths = [path.relative_to(source).with_suffix("") for path in source.rglob("*.pyx")]
    names = sorted(".".join(path.parts) for path in paths)
    code = """if True:
        import importlib, sys, threading
        def look():
            for name in sys.argv[1:]:
                module = importlib.import_module(name)
                found.append((name, module.__name__, module.__file__.rpartition("/")[2]))
                assert module.__doc__ and "__test__" in vars(module)  # the last that is set
        found = []
        threads = [threading.Thread(target=look) for _ in range(3)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        assert sorted(found) == sorted([(n, n, "_joined.abi3.so") for n in sys.argv[1:]] * 3)
        print("found")
        """
    environment = {**os.environ, "PYTHONPATH": str(package.parent)}
    command = [sys.executable, "-c", code, *names]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env=environment
    )
    assert (done.stdout, done.stderr) == ("found\n", "")


@pytest.mark.parametrize("form", LIMITS)
def test_the_size_of_a_bundle(package: Path, tmp_path: Path, form: str) -> None:
    file = tmp_path / f"ivshmem.{form}"
    make = [sys.executable, "-m", "ivshmem", "guest", "bundle", "-o", str(file)]
    subprocess.run(make, check=True, env={**os.environ, "PYTHONPATH": str(package.parent)})
    copied, unpacked = LIMITS[form]
    assert file.stat().st_size <= copied * 1024
    if form.startswith("tar"):
        shutil.unpack_archive(file, tmp_path / "unpacked")
        files = [path for path in (tmp_path / "unpacked").rglob("*") if path.is_file()]
        assert sum(path.stat().st_size for path in files) <= unpacked * 1024


def symbols(path: Path, kind: str) -> set[str]:
    listed = subprocess.check_output(["nm", "-D", f"--{kind}-only", str(path)], text=True)
    return {line.split()[-1] for line in listed.splitlines()}


def test_the_oldest_python_has_all_that_they_take(package: Path, tmp_path: Path) -> None:
    oldest = pythons.oldest()
    if oldest is None or not shutil.which("nm"):
        pytest.skip("this needs CPython 3.10, and nm (Debian: binutils)")
    command = [oldest, "-c", OLDER, str(package.parent), str(tmp_path / "socket")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("hello 3 10\n", "")
    files = subprocess.check_output([oldest, "-c", FILES], text=True).split()
    has = {name for file in files for name in symbols(Path(file), "defined")}
    assert "PyObject_VectorcallDict" in has
    takes = {name for path in modules(package) for name in symbols(path, "undefined")}
    assert {name for name in takes if name.startswith(("Py", "_Py"))} - has == set()


def test_the_modules_take_nothing_newer_than_a_wheel_may(package: Path) -> None:
    """manylinux_2_28: glibc 2.28."""
    if not shutil.which("nm"):
        pytest.skip("this needs nm (Debian: binutils)")
    if tuple(map(int, platform.libc_ver()[1].split("."))) > (2, 36):
        pytest.skip("a wheel is built where the C library is older: Debian 12 has 2.36")
    versions = {
        name.partition("@GLIBC_")[2]
        for path in modules(package)
        for name in symbols(path, "undefined")
        if "@GLIBC_" in name
    }
    numbers = {tuple(map(int, version.split("."))) for version in versions}
    assert numbers
    assert max(numbers) <= (2, 28), versions


def test_the_oldest_python_runs_its_bundle(package: Path, tmp_path: Path) -> None:
    """`ivshmem guest bundle` of such a package fits a guest with any Python."""
    oldest = pythons.oldest()
    if oldest is None:
        pytest.skip("this needs CPython 3.10")
    file = tmp_path / "ivshmem.pyz"
    make = [sys.executable, "-m", "ivshmem", "guest", "bundle", "-o", str(file)]
    subprocess.run(make, check=True, env={**os.environ, "PYTHONPATH": str(package.parent)})
    run = [oldest, "-I", "-S", str(file), "--version"]
    folder = {**os.environ, "IVSHMEM_UNPACK": str(tmp_path / "unpacked")}
    assert subprocess.check_output(run, text=True, env=folder).startswith("ivshmem ")
    modules = (tmp_path / "unpacked").rglob("*.so")
    assert sum(each.stat().st_size for each in modules) <= LIMITS["pyz"][1] * 1024
