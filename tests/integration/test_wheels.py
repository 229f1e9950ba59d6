"""The wheels of `make wheels`, as an administrator gets them.

test_limited_api.py runs the modules on the oldest CPython, and test_free_threading.py those without
a GIL. Wheels for aarch64 run under qemu-user, on Debian's Python for arm64.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import venv
import zipfile
from pathlib import Path

import pytest
from support import arm64, debian, unpacked, wheels
from support.pages import blocks

import ivshmem

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(3600)]

# All but the modules is 670 KiB of each wheel: docs/howto/install.md has the parts.
LIMITS = {
    "cp310-abi3-manylinux_2_28_x86_64": 1250,
    "cp310-abi3-manylinux_2_28_aarch64": 1250,
    "cp3*-cp3*t-manylinux_2_28_x86_64": 1320,
}  # KiB
AARCH64 = "cp310-abi3-*_aarch64"

# qemu-user 7.2 has no preadv2(2), by which the package recognises an eventfd: so there are no
# vectors. And its /proc/PID/stat of the process itself differs from what others see: channels take
# such a process for a dead one. So both ends are of one process.
TWO = """
import os, sys, ivshmem, ivshmem.channel, ivshmem.guest, ivshmem.bench
path = sys.argv[1]
with ivshmem.Server(path, "1M", vectors=0, channels="512K").start():
    with ivshmem.connect(path) as a, ivshmem.connect(path) as b:
        child = os.fork()
        if not child:
            a.region.write(100, b"bytes")
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert b.region.read(100, 5) == b"bytes"
        with ivshmem.channel.open(a) as one, ivshmem.channel.open(b) as other:
            log = one.create_messages("log", limit=100)
            with log.reader() as reader, other.open("log").writer() as writer:
                writer.put(b"hello")
                print(os.uname().machine, reader.get(timeout=60).decode())
"""
# Of the kind of debian/rules: without a network, a guest, or what Debian lacks.
TESTS = (
    *("events", "framing", "plain", "roster", "session", "sizes"),
    "region_array",
)


@pytest.fixture(scope="module", autouse=True)
def made() -> None:
    if lacking := wheels.missing():
        pytest.skip(lacking)
    try:
        wheels.folder()
    except unpacked.CannotError as error:
        pytest.fail(str(error), pytrace=False)


def test_there_is_one_of_each_kind() -> None:
    found = set(wheels.folder().glob("*.whl"))
    assert found == {wheels.wheel(tags) for tags in LIMITS}
    assert len(found) == len(LIMITS)


@pytest.mark.parametrize("tags", LIMITS)
def test_sizes(tags: str) -> None:
    assert wheels.wheel(tags).stat().st_size <= LIMITS[tags] * 1024


@pytest.mark.parametrize("tags", LIMITS)
def test_pages_are_inside(tags: str) -> None:
    with zipfile.ZipFile(wheels.wheel(tags)) as archive:
        names = {name.partition(".data/data/")[2] for name in archive.namelist()}
    for command in ("ivshmem", "ivshmem-server"):
        assert f"share/man/man1/{command}.1" in names
        assert f"share/bash-completion/completions/{command}" in names
        assert f"share/zsh/site-functions/_{command}" in names


def test_pip_installs_it(tmp_path: Path) -> None:
    venv.create(tmp_path, with_pip=True)
    wheel = wheels.wheel("cp310-abi3-*_x86_64")
    command = [
        str(tmp_path / "bin/python"),
        *["-m", "pip", "install", "--no-index", "--quiet"],
        str(wheel),
    ]
    subprocess.run(command, check=True, timeout=300)
    shown = subprocess.check_output([tmp_path / "bin/ivshmem", "--version"], text=True, timeout=60)
    assert shown == f"ivshmem {ivshmem.__version__}\n"
    assert (tmp_path / "share/man/man1/ivshmem.1").read_text().startswith(".TH IVSHMEM")


def test_pyroma_lacks_only_what_a_publisher_has(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(wheels.HOME / name, tree)
    shutil.copytree(wheels.HOME / "src", tree / "src")

    def rating() -> str:
        pyroma = wheels.HOME / "build/wheel-tools/bin/pyroma"
        command = [str(pyroma), "--min", "10", str(tree)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == (0 if "10/10" in done.stdout else 2), done.stderr
        return done.stdout

    assert "Final rating: 8/10" in rating()
    (block,) = blocks(wheels.HOME / "docs/howto/install.md", "toml")
    authors, urls = block.removeprefix("[project]\n").split("\n\n")
    project = tree / "pyproject.toml"
    text, count = re.subn(r"^authors = .*$", authors, project.read_text(), flags=re.MULTILINE)
    assert count == 1
    project.write_text(f"{text}\n{urls}".replace("ADDRESS", "authors@host.example"))
    assert "Final rating: 10/10" in rating()


@pytest.fixture(scope="module")
def place() -> Path:
    """The root with Python for arm64."""
    try:
        return arm64.root(arm64.cache_folder())
    except unpacked.CannotError as error:
        pytest.fail(str(error), pytrace=False)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wheels.extracted(AARCH64, tmp_path_factory.mktemp("aarch64"))


def test_aarch64(place: Path, package: Path, tmp_path: Path) -> None:
    done = arm64.ran(place, "-c", TWO, tmp_path / "socket", path=package, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "aarch64 hello\n"), done.stdout


def test_unit_tests_on_aarch64(place: Path, package: Path) -> None:
    # Its pytest is Debian's, which lacks plugins that pyproject.toml configures.
    options = ("-q", "-p", "no:cacheprovider", "-o", "addopts=", "-o", "filterwarnings=default")
    files = [f"tests/unit/test_{name}.py" for name in TESTS]
    arguments = ("-m", "pytest", *options, "-m", "not nightly", *files)
    done = arm64.ran(place, *arguments, path=package, cwd=wheels.HOME)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout


# What debian/tests/control has for the same test, and what makes an environment for a wheel.
BESIDE = (
    *("python3-venv", "python3-hypothesis", "python3-pytest", "python3-pytest-timeout"),
    *("busybox-static", "qemu-system-x86", "zstd"),
)
IN_ROOT = """
set -e
mount -t proc proc "$1/proc"
mount --rbind /dev "$1/dev"
exec chroot "$1" /bin/sh -ec '
cd /root
export HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 IVSHMEM_VM_CACHE=/root/vm
! command -v cc
python3 -m venv --system-site-packages env
env/bin/pip install -q --no-index *.whl
env/bin/ivshmem guest bundle -o ivshmem.pyz
env/bin/python -B -m pytest -m "" -p no:cacheprovider -q \
    tests/vm/test_sharing.py::test_host_and_guest_ring_each_other \
    "tests/vm/test_guest_bundle.py::test_a_guest_with_the_bundle_alone[pyz]"
'
"""


@pytest.mark.parametrize("suite", debian.SUITES)
def test_a_real_guest_of_a_minimal_root(suite: str) -> None:
    """Wheel and bundle, where there is no compiler; the packages are in test_debian.py."""
    with debian.root(debian.cache_folder(), suite, "minimal") as place:
        debian.install(place, *BESIDE)
        shutil.copy(wheels.wheel("cp310-abi3-*_x86_64"), place / "root")
        shutil.copytree(wheels.HOME / "tests", place / "root/tests")
        shutil.copy(wheels.HOME / "pyproject.toml", place / "root")
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", IN_ROOT, "sh", str(place)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=3000,
        )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "2 passed" in done.stdout, done.stdout[-4000:]
