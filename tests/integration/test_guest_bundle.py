"""`ivshmem guest bundle`: one file that runs where there is Python, and no package, pip or network.

tests/vm/test_guest_bundle.py runs it in a guest.
"""

from __future__ import annotations

import ast
import os
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import shared

import ivshmem
from ivshmem.cli import disk_image as iso
from ivshmem.cli import guest_bundle as bundle

# Of what a guest must copy, and of modules. A wheel's are a third smaller than those of the package
# that is tested here: test_limited_api.py has the limits for that.
PYZ_LIMIT = 1.2 * 2**20
UNPACKED_LIMIT = 2.5 * 2**20


def ran(
    *command: str | Path, python: str = sys.executable, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a bundle by an interpreter that finds no other package."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return subprocess.run(
        [python, "-I", "-S", *map(str, command)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**kept, **environment},
        cwd="/",
    )


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bundle in each form, as the command writes them."""

    def make(folder: Path) -> None:
        folder.mkdir()
        for form in bundle.FORMS:
            command = [sys.executable, "-m", "ivshmem", "guest", "bundle", "-o", f"ivshmem.{form}"]
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=60, check=False, cwd=folder
            )
            assert done.returncode == 0, done
            assert done.stdout.startswith(f"wrote ivshmem.{form}: ")

    return shared.made_once(shared.folder(tmp_path_factory, "bundles") / "all", make)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "home"
    shutil.rmtree(tmp_path / "home", ignore_errors=True)


def unpacked(home: Path) -> list[Path]:
    return sorted((home / "ivshmem").glob("*/*"))


@pytest.mark.nightly
def test_a_program_runs_alone(bundles: Path, home: Path) -> None:
    file = bundles / "ivshmem.pyz"
    assert file.stat().st_size <= PYZ_LIMIT
    done = ran(file, "--version", XDG_CACHE_HOME=str(home))
    assert (done.stdout, done.stderr) == (f"ivshmem {ivshmem.__version__}\n", "")
    modules = unpacked(home)
    assert len(modules) == len(bundle.compiled())
    assert sum(module.stat().st_size for module in modules) <= UNPACKED_LIMIT
    before = [module.stat().st_ino for module in modules]
    done = ran(file, "guest", "list", XDG_CACHE_HOME=str(home))
    assert "no ivshmem device in this machine" in done.stderr
    assert [module.stat().st_ino for module in unpacked(home)] == before  # unpacked once


@pytest.mark.sampled(2)
@pytest.mark.parametrize("command", ["guest", "channel", "connect", "forward", "doctor", "serve"])
def test_a_guest_has_what_it_uses(bundles: Path, home: Path, command: str) -> None:
    done = ran(bundles / "ivshmem.pyz", command, "--help", XDG_CACHE_HOME=str(home))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: ivshmem {command}")


def test_what_stays_on_the_host_is_said_in_one_line(bundles: Path, home: Path) -> None:
    for command in ("bench", "migrate"):
        done = ran(bundles / "ivshmem.pyz", command, "--help", XDG_CACHE_HOME=str(home))
        assert done.returncode == 1
        assert "this bundle is for guests" in done.stderr
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("form", ["tar", "tar.xz"])
def test_an_archive_needs_no_place_to_unpack(bundles: Path, tmp_path: Path, form: str) -> None:
    file = bundles / f"ivshmem.{form}"
    subprocess.run(["tar", "-C", tmp_path, "-xf", file], check=True, timeout=60)
    assert form == "tar" or file.stat().st_size <= PYZ_LIMIT
    program = tmp_path / "ivshmem/ivshmem.pyz"
    done = ran(program, "--version", HOME="/nowhere", XDG_CACHE_HOME="/nowhere")
    assert (done.stdout, done.stderr) == (f"ivshmem {ivshmem.__version__}\n", "")
    sizes = [path.stat().st_size for path in (tmp_path / "ivshmem").rglob("*") if path.is_file()]
    assert sum(sizes) <= UNPACKED_LIMIT * 1.3


def test_others_cannot_put_modules_there(bundles: Path, home: Path) -> None:
    """A remedy, too: the folder that the message asks for works."""
    file = bundles / "ivshmem.pyz"
    assert ran(file, "--version", XDG_CACHE_HOME=str(home)).returncode == 0
    unpacked(home)[0].chmod(0o777)
    done = ran(file, "--version", XDG_CACHE_HOME=str(home))
    assert done.returncode == 1
    assert "others can write to it: set IVSHMEM_UNPACK=DIR" in done.stderr
    done = ran(file, "--version", XDG_CACHE_HOME=str(home), IVSHMEM_UNPACK=str(home / "mine"))
    assert done.returncode == 0


def test_no_place(bundles: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = ran(bundles / "ivshmem.pyz", "--version", IVSHMEM_UNPACK=str(tmp_path / "file/below"))
    assert done.returncode == 1
    assert "cannot be unpacked into" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_where_nothing_may_execute(bundles: Path, tmp_path: Path) -> None:
    mount = "mount -t tmpfs -o noexec none {0} && exec {1} -I -S {2} --version"
    script = mount.format(tmp_path, sys.executable, bundles / "ivshmem.pyz")
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script],
        env={**os.environ, "IVSHMEM_UNPACK": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no mount in a namespace of its own here: {done.stderr.strip()}")
    assert done.returncode == 1
    assert "it is mounted noexec): set IVSHMEM_UNPACK=DIR" in done.stderr


def test_an_old_python(bundles: Path) -> None:
    """It understands the file that it starts with, and says what is needed."""
    file = bundles / "ivshmem.pyz"
    with zipfile.ZipFile(file) as archive:
        ast.parse(archive.read("__main__.py"), feature_version=(3, 4))
    code = "import runpy, sys; sys.version_info = (3, 9, 2); runpy.run_path(sys.argv[1])"
    done = ran("-c", code, file)
    assert done.returncode == 1
    assert done.stderr == "ivshmem: Python 3.10 or newer is needed, and this is Python 3.9\n"


@pytest.mark.nightly
def test_another_machine(bundles: Path, home: Path, tmp_path: Path) -> None:
    shutil.unpack_archive(bundles / "ivshmem.pyz", tmp_path / "tree", "zip")
    start = tmp_path / "tree/__main__.py"
    start.write_text(start.read_text().replace(f"'{os.uname().machine}'", "'vax'"))
    done = ran(start.parent, "--version", XDG_CACHE_HOME=str(home))
    assert "this bundle is for vax" in done.stderr
    assert not home.exists()


def test_a_name_without_an_ending() -> None:
    command = [sys.executable, "-m", "ivshmem", "guest", "bundle", "-o", "/tmp/x.zip"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "End its name in .pyz (a program), .tar, .tar.xz, or .iso (a disk image)" in done.stderr


# -- what another user of the guest can do --------------------------------------------------------

STRANGER = 65533
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="makes files of another user")


def hostile_modules(folder: Path, *, owner: int = STRANGER) -> Path:
    """A folder with all modules; to load one fails, which would be seen."""
    folder.mkdir(parents=True, mode=0o755)
    for name in bundle.compiled():
        (folder / name).write_bytes(b"hostile")
        os.chown(folder / name, owner, owner)
    os.chown(folder, owner, owner)
    return folder


def digest_of(file: Path, tmp_path: Path) -> str:
    """The folder that a program unpacks into."""
    place = tmp_path / "probe"
    assert ran(file, "--version", IVSHMEM_UNPACK=str(place)).returncode == 0
    (made,) = place.iterdir()
    return made.name


def refused(done: subprocess.CompletedProcess[str], path: Path) -> None:
    assert done.returncode == 1, done
    assert done.stderr.startswith(f"ivshmem: {path} belongs to another user, or"), done.stderr
    assert len(done.stderr.splitlines()) == 1


def into_the_folder(place: Path, name: str) -> Path:
    """It is another user's, with all that is looked for."""
    hostile_modules(place / name)
    os.chown(place, STRANGER, STRANGER)
    return place


def into_a_folder_below(place: Path, name: str) -> Path:
    """Its user can rename what is in it, and so exchange it at any time."""
    hostile_modules(place / "mine" / name, owner=0)
    os.chown(place, STRANGER, STRANGER)
    return place


def first_in_a_sticky_folder(place: Path, name: str) -> Path:
    place.mkdir()
    place.chmod(0o1777)
    return hostile_modules(place / name)


def by_a_link(place: Path, name: str) -> Path:
    place.mkdir()
    place.chmod(0o1777)
    hostile_modules(place / "elsewhere", owner=0)
    (place / name).symlink_to("elsewhere")
    os.chown(place / name, STRANGER, STRANGER, follow_symlinks=False)
    return place / name


def by_a_link_of_a_module(place: Path, name: str) -> Path:
    folder = hostile_modules(place / name, owner=0)
    first = sorted(folder.iterdir())[0]
    first.rename(place / "elsewhere")
    first.symlink_to(place / "elsewhere")
    return first


def by_a_mode(place: Path, name: str) -> Path:
    folder = hostile_modules(place / name, owner=0)
    folder.chmod(0o777)
    return folder


def by_the_mode_of_the_place(place: Path, name: str) -> Path:
    hostile_modules(place / name, owner=0)
    place.chmod(0o777)
    return place


ATTACKS = (
    *(into_the_folder, into_a_folder_below, first_in_a_sticky_folder, by_a_link),
    *(by_a_link_of_a_module, by_a_mode, by_the_mode_of_the_place),
)


@pytest.mark.sampled(6)
@as_root
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_no_module_of_another_user_is_loaded(
    bundles: Path, tmp_path: Path, attack: Callable[[Path, str], Path]
) -> None:
    file, place = bundles / "ivshmem.pyz", tmp_path / "place"
    bad = attack(place, digest_of(file, tmp_path))
    place_of = place / "mine" if attack is into_a_folder_below else place
    before = sorted(tmp_path.rglob("*"))
    refused(ran(file, "--version", IVSHMEM_UNPACK=str(place_of)), bad)
    assert sorted(tmp_path.rglob("*")) == before  # nothing was written either


@as_root
def test_a_link_of_another_user_on_the_way(bundles: Path, tmp_path: Path) -> None:
    """The folder that it leads to counts; to change it later changes nothing."""
    (tmp_path / "theirs").mkdir()
    os.chown(tmp_path / "theirs", STRANGER, STRANGER)
    (tmp_path / "link").symlink_to("theirs")
    done = ran(bundles / "ivshmem.pyz", "--version", IVSHMEM_UNPACK=str(tmp_path / "link"))
    refused(done, tmp_path / "theirs")


def test_a_dangling_link_is_not_followed(bundles: Path, tmp_path: Path) -> None:
    file, place = bundles / "ivshmem.pyz", tmp_path / "place"
    place.mkdir()
    (place / digest_of(file, tmp_path)).symlink_to(tmp_path / "created")
    done = ran(file, "--version", IVSHMEM_UNPACK=str(place))
    assert done.returncode == 1
    assert "set IVSHMEM_UNPACK=DIR" in done.stderr
    assert not (tmp_path / "created").exists()


@as_root
def test_another_user_s_folder_beside_the_program(bundles: Path, tmp_path: Path) -> None:
    """As in /tmp, where root runs what was copied there: a .pyz needs no folder beside it."""
    work = tmp_path / "tmp"
    work.mkdir()
    work.chmod(0o1777)
    shutil.copy(bundles / "ivshmem.pyz", work)
    hostile_modules(work / "modules")
    done = ran(work / "ivshmem.pyz", "--version", XDG_CACHE_HOME=str(tmp_path / "home"))
    assert (done.stdout, done.stderr) == (f"ivshmem {ivshmem.__version__}\n", "")
    # What needs the folder says that it is another's.
    shutil.unpack_archive(bundles / "ivshmem.tar", tmp_path, "tar")
    shutil.copy(tmp_path / "ivshmem/ivshmem.pyz", work)
    done = ran(work / "ivshmem.pyz", "--version")
    refused_start = f"ivshmem: {work / 'modules'} belongs to another user than"
    assert done.returncode == 1
    assert done.stderr.startswith(refused_start), done.stderr
    shutil.rmtree(work / "modules")
    done = ran(work / "ivshmem.pyz", "--version")
    assert f"{work / 'modules'} is missing: unpack the whole archive" in done.stderr
    shutil.copytree(tmp_path / "ivshmem/modules", work / "modules")
    assert ran(work / "ivshmem.pyz", "--version").returncode == 0


def test_a_link_to_the_program(bundles: Path, tmp_path: Path) -> None:
    shutil.unpack_archive(bundles / "ivshmem.tar", tmp_path, "tar")
    (tmp_path / "command").symlink_to("ivshmem/ivshmem.pyz")
    done = ran(tmp_path / "command", "--version", XDG_CACHE_HOME="/nowhere")
    assert (done.stdout, done.stderr) == (f"ivshmem {ivshmem.__version__}\n", "")


# -- the disk image -------------------------------------------------------------------------------


def files_of(image: bytes) -> dict[str, bytes]:
    """What a reader of ISO 9660 finds, from the root directory on."""
    primary = image[16 * iso.SECTOR :][: iso.SECTOR]
    assert primary[:7] == b"\1CD001\1"
    assert struct.unpack_from("<I", primary, 80)[0] * iso.SECTOR == len(image)
    return dict(walk(image, primary[156:190], ""))


def walk(image: bytes, record: bytes, above: str) -> Iterator[tuple[str, bytes]]:
    start, size = struct.unpack_from("<I4xI", record, 2)
    assert struct.unpack_from(">I4xI", record, 6) == (start, size)
    data, at = image[start * iso.SECTOR :][:size], 0
    while at < size:
        length = data[at]
        if not length:  # the rest of a sector
            at += iso.SECTOR - at % iso.SECTOR
            continue
        entry, at = data[at : at + length], at + length
        name = entry[33 : 33 + entry[32]].decode().lower().removesuffix(";1")
        if name in ("\0", "\1"):
            continue
        if entry[25] & 2:
            yield from walk(image, entry, f"{above}{name}/")
        else:
            begin, long = struct.unpack_from("<I4xI", entry, 2)
            yield above + name, image[begin * iso.SECTOR :][:long]


def test_an_image_has_the_files(bundles: Path, tmp_path: Path) -> None:
    files = files_of((bundles / "ivshmem.iso").read_bytes())
    assert {name for name in files if "/" in name} == {f"modules/{n}" for n in bundle.compiled()}
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    done = ran(tmp_path / bundle.PROGRAM, "--version", XDG_CACHE_HOME="/nowhere")
    assert (done.stdout, done.stderr) == (f"ivshmem {ivshmem.__version__}\n", "")


def test_an_image_of_any_name(tmp_path: Path) -> None:
    file = tmp_path / "kit.img"
    command = [sys.executable, "-m", "ivshmem", "guest", "bundle", "--iso", "-o", str(file)]
    subprocess.run(command, capture_output=True, timeout=60, check=True)
    assert bundle.PROGRAM in files_of(file.read_bytes())


@pytest.mark.parametrize("count", [0, 1, 27, 28, 29, 120])
def test_images_of_many_files(count: int) -> None:
    """A directory longer than a sector: no entry crosses the end of one."""
    files = {f"folder/{'n' * 30}{number}.so": bytes(number) for number in range(count)}
    files |= {"one.pyz": b"x" * 2048, "two": b"y" * 2049}
    assert files_of(iso.image("LABEL", files)) == files


@pytest.mark.parametrize("name", ["Upper", "a/b/c"])
def test_names_that_an_image_cannot_have(name: str) -> None:
    with pytest.raises(ValueError, match="not a name for this image"):
        iso.image("LABEL", {name: b""})
