"""What is installed: everything that is needed, and nothing else."""

import importlib.metadata
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from support import generated

HOME = Path(__file__).parents[2]
DISTRIBUTION = importlib.metadata.distribution("ivshmem")


def test_the_files_of_the_wheel() -> None:
    origin = json.loads(DISTRIBUTION.read_text("direct_url.json") or "{}")
    if origin.get("dir_info", {}).get("editable"):
        pytest.skip("an editable install has no files; `make test` installs the wheel")
    files = [file for file in DISTRIBUTION.files or [] if file.parts[0] == "ivshmem"]
    names = {str(file) for file in files if "__pycache__" not in file.parts}
    endings = {name.rpartition(".")[2] for name in names}
    assert endings == {"py", "pyi", "pxd", "typed", "so", "h"}
    assert {"ivshmem/__init__.py", "ivshmem/_core.pyi", "ivshmem/py.typed"} <= names
    assert {"ivshmem/channel/ivshmem_channel.h", "ivshmem/channel/ivshmem_channel/area.h"} <= names
    assert {"ivshmem/cli/serve.py", "ivshmem/qemu/cmdline.py", "ivshmem/_core.pxd"} <= names


def test_the_units_of_the_wheel() -> None:
    origin = json.loads(DISTRIBUTION.read_text("direct_url.json") or "{}")
    if origin.get("dir_info", {}).get("editable"):
        pytest.skip("an editable install has no files; `make test` installs the wheel")
    prefix = Path(sys.prefix)
    for name in ("ivshmem.service", "ivshmem@.service", "ivshmem@.socket"):
        assert "[Install]" in (prefix / "lib/systemd/system" / name).read_text()
    assert (prefix / "lib/sysusers.d/ivshmem.conf").read_text().splitlines()[-1].startswith("u ")


def tracked() -> set[str]:
    """The files that git knows."""
    if not (HOME / ".git").exists():
        pytest.skip("this is an sdist: git, which knows what belongs to it, is not here")
    listed = subprocess.check_output(["git", "ls-files"], cwd=HOME, text=True, timeout=60)
    return {name for name in listed.splitlines() if (HOME / name).is_file()}


def sdist(copy: Path) -> Path:
    """The archive that setuptools makes of a tree."""
    (copy / "src/ivshmem/left_over.so").touch()  # of a build in place
    code = """if True:
        import sys
        sys.modules["Cython.Build"] = None  # it would generate all C files afresh
        from setuptools import build_meta
        build_meta.build_sdist(sys.argv[1])
        """
    command = [sys.executable, "-c", code, str(copy.parent)]
    subprocess.run(command, cwd=copy, check=True, capture_output=True, timeout=120)
    (archive,) = copy.parent.glob("*.tar.gz")
    return archive


@pytest.mark.nightly
def test_the_files_of_the_sdist(tmp_path: Path) -> None:
    """All that git has: so `make test` works from an sdist, too."""
    copy, known = tmp_path / "copy", tracked()
    for name in known:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".c"):  # 15 MB, which take seconds to compress
            (copy / name).touch()
        else:
            shutil.copy(HOME / name, copy / name)
    with tarfile.open(sdist(copy)) as tar:
        files = {member.name.partition("/")[2] for member in tar if member.isfile()}
    made = {name for name in files if ".egg-info/" in name} | {"PKG-INFO", "setup.cfg"}
    assert files - made == known


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_make_test_from_the_sdist(tmp_path: Path) -> None:
    """With all its checks, and the unit tests: what it is made of is the same for the others."""
    copy = tmp_path / "copy"
    for name in tracked():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(HOME / name, copy / name)
    (tmp_path / "unpacked").mkdir()
    subprocess.run(["tar", "-xf", sdist(copy), "-C", tmp_path / "unpacked"], check=True)
    (tree,) = (tmp_path / "unpacked").iterdir()
    few = "-m 'not nightly and not serial' tests/unit tests/integration/test_packaging.py"
    with (tmp_path / "log").open("w") as log:
        status = subprocess.call(["make", "test", f"ARGS={few}"], cwd=tree, stdout=log, stderr=log)
    text = (tmp_path / "log").read_text()
    assert status == 0, text[-5000:]
    assert " passed" in text


def test_what_others_rely_on_stays() -> None:
    """Paths and names in packagers' recipes and other projects' builds.

    test_embedding.py compiles `from ivshmem._core cimport Doorbells`.
    """
    files = "setup.py pyproject.toml README.md src/ivshmem/_core.pyx src/ivshmem/_core.c"
    assert all((HOME / name).is_file() for name in files.split())
    assert all((HOME / name).is_dir() for name in ("tests", "bench"))
    command = [sys.executable, "-m", "ivshmem", "serve", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert shown.stdout.startswith("usage: ivshmem serve")


def test_generated_files_are_marked() -> None:
    """Diffs, statistics and reviews leave them out."""
    lines = (HOME / ".gitattributes").read_text().splitlines()
    marked = ["src/ivshmem/**/*.c", "bench/latency.svg"]
    assert lines == [
        *(f"{files} linguist-generated=true -diff" for files in marked),
        "src/ivshmem/generated.sha256 linguist-generated=true merge=union",
    ]
    for path in (HOME / "src").rglob("*.c"):
        assert path.with_suffix(".pyx").exists(), path


def test_nothing_is_needed_at_run_time() -> None:
    assert all("extra ==" in need for need in DISTRIBUTION.requires or [])


def test_importing_imports_nothing_else() -> None:
    """A program pays for what it uses, when it uses it."""
    code = "import sys, ivshmem; print(*[m for m in sys.modules if m.startswith('ivshmem.')])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    loaded = set(result.stdout.split())
    assert not loaded


def test_the_version_is_the_same_everywhere() -> None:
    command = [sys.executable, "-m", "ivshmem", "--version"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert printed.stdout == f"ivshmem {DISTRIBUTION.version}\n"


def test_what_is_known_to_be_generated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A change of anything that takes part makes it unknown, and a line too many does no harm."""
    monkeypatch.setattr(generated, "SOURCES", tmp_path)
    monkeypatch.setattr(generated, "DIGESTS", tmp_path / "digests")
    monkeypatch.setattr("sys.argv", ["generated.py", "know", "a", "b"])
    files = [tmp_path / name for name in ("a.pyx", "a.c", "b.pyx", "b.c", "b.pxd")]
    for file in files:
        file.write_text("as it was")
    assert generated.unknown(["a", "b"]) == ["a", "b"]
    generated.main()
    assert generated.unknown(["a", "b"]) == []
    for file, changed in zip(files, ("a", "a", "b", "b", "ab"), strict=True):
        file.write_text("changed")
        assert generated.unknown(["a", "b"]) == list(changed), file
        file.write_text("as it was")
    (tmp_path / "digests").write_text("0  a\n" + (tmp_path / "digests").read_text())
    assert generated.unknown(["a", "b"]) == []
