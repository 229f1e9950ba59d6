"""Files that get their name when they are whole, on file systems that know no others."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.mounts import mounted, root

import ivshmem
from ivshmem.cli import pid_file
from ivshmem.errors import MigrationError
from ivshmem.memory import image
from ivshmem.migration.model import Options, Plan
from ivshmem.migration.state_file import StateFile

pytestmark = pytest.mark.skipif(not root, reason="mounts file systems: needs root")

PLAN = Plan((), Options(), (), ())


@pytest.fixture
def unnamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No file system has files without names; open(2) then says EISDIR, as kernels before 3.11."""
    monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY)


@pytest.fixture
def fat() -> Iterator[Path]:
    """A FAT file system: no files without names, no hard links, no RENAME_NOREPLACE, no sizes."""
    if not (shutil.which("fusefat") and shutil.which("mkfs.vfat") and os.path.exists("/dev/fuse")):
        pytest.skip("needs fusefat and dosfstools (Debian's packages), and FUSE")
    place = Path(tempfile.mkdtemp(prefix="ivt", dir="/tmp"))
    disk, home = place / "disk", place / "home"
    home.mkdir()
    with disk.open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mkfs.vfat", str(disk)], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["fusefat", "-o", "rw+", str(disk), str(home)], check=True)
    try:
        yield home
    finally:
        subprocess.run(["fusermount", "-u", "-z", str(home)], check=True)
        shutil.rmtree(place)


@pytest.mark.usefixtures("unnamed")
@pytest.mark.parametrize("replace", [False, True])
def test_no_room_leaves_nothing(replace: bool) -> None:
    with mounted("tmpfs", "size=1M") as place:
        if replace:
            ivshmem.Region.create("64K", path=place / "it").close()
        before = os.listdir(place)
        with pytest.raises(OSError, match="are needed"):
            ivshmem.Region.create("4M", path=place / "it", replace=replace)
        assert os.listdir(place) == before
        with pytest.raises(OSError, match="are needed"):
            ivshmem.Region.create("4M", directory=place)
        assert os.listdir(place) == before


@pytest.mark.usefixtures("unnamed")
def test_all_at_once() -> None:
    with mounted("tmpfs", "size=1M") as place:
        with ivshmem.Region.create("64K", path=place / "it") as region:
            region.write(0, b"one")
            assert region.name_leads_to() == "this"
            image.save(region, place / "image")
            image.save(region, place / "image")
            image.load(region, place / "image")
        with StateFile.create(place / "state", PLAN):
            pass
        assert sorted(os.listdir(place)) == ["image", "it", "state"]


def test_fat(fat: Path) -> None:
    with StateFile.create(fat / "state", PLAN):
        with pytest.raises(MigrationError, match="an earlier migration of these VMs is unfinished"):
            StateFile.create(fat / "state", PLAN)
        assert os.listdir(fat) == ["state"]
    with StateFile.load(fat / "state") as state:
        state.remove()
    assert os.listdir(fat) == []
    with ivshmem.Region.create("64K") as region:
        region.write(0, b"kept")
        for _ in range(2):  # a new file, and one that replaces it
            image.save(region, fat / "image")
        region.write(0, b"lost")
        image.load(region, fat / "image")
        assert region.read(0, 4) == b"kept"
    with pid_file.held(str(fat / "pid")):
        assert (fat / "pid").read_text() == f"{os.getpid()}\n"
    assert os.listdir(fat) == ["image"]


def test_fat_has_no_room_for_memory(fat: Path) -> None:
    """This one cannot make a file longer without writing: an error with a remedy, and no rest."""
    for place in ({"path": fat / "it"}, {"directory": fat}):
        with pytest.raises(OSError, match="choose a path on another file system") as caught:
            ivshmem.Region.create("64K", **place)  # type: ignore[arg-type]
        assert str(caught.value.filename).startswith(str(fat))
    assert os.listdir(fat) == []
