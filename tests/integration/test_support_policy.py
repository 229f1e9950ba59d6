"""docs/reference/support.md: the versions that it lists are those of the source, and what it says
of two versions that meet is what happens.

The others meet elsewhere: test_foreign_servers.py (QEMU's protocol, end of set-up, question),
test_control.py, test_cli_succession.py (state that is handed over), test_image.py.
"""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.pages import HOME

import ivshmem
from ivshmem import Directory, NoDirectory, Region, RegionError, channel
from ivshmem.errors import JournalError, MigrationError
from ivshmem.lasting.journal import Journal
from ivshmem.migration.state_file import StateFile
from ivshmem.peer import channel_area

PAGE = (HOME / "docs/reference/support.md").read_text()
SOURCE = HOME / "src/ivshmem"


@pytest.fixture
def region() -> Iterator[Region]:
    with Region.create("1M", name=f"support-{os.getpid()}") as made:
        Directory.create(made, channels="64K").close()
        yield made
        made.unlink()


def newer_directory(region: Region) -> None:
    raw = bytearray(region.read(region.size - 128, 128))
    struct.pack_into("<I", raw, 20, 2)
    struct.pack_into("<I", raw, 16, zlib.crc32(raw[:8] + raw[20:]))
    region.write(region.size - 128, raw)


def newer_area(region: Region) -> None:
    where = Directory.open(region).channels
    assert where is not None
    raw = bytearray(region.read(where.start, 48))
    struct.pack_into("<I", raw, 8, 2)
    struct.pack_into("<Q", raw, 40, zlib.crc32(raw[:40]))
    region.write(where.start, raw)


def test_the_versions_on_the_page_are_those_of_the_source() -> None:
    rows = re.findall(r"^\| [^|]+ \| (\w+) \| `([\w/.]+): (\w+)` \|$", PAGE, re.MULTILINE)
    assert len(rows) == 12
    for version, path, name in rows:
        text = (SOURCE / path).read_text()
        (value,) = re.findall(
            rf"^(?:#define )?(?:\w+, )?{name}(?: =)? (.*?)(?:  #.*)?$", text, re.M
        )
        if version != "none":
            assert re.findall(r"\d+", value)[-1] == version, (path, value)
    assert channel_area.VERSION == 1


def test_each_format_of_the_source_is_on_the_page() -> None:
    """What has a version of its own has a row."""
    found = set()
    for file in [*SOURCE.rglob("*.py"), *SOURCE.rglob("*.h")]:
        for name in re.findall(
            r"^(?:#define )?\w*, ?(_?VERSION) = |^(_?VERSION) = ", file.read_text(), re.M
        ):
            found |= {(str(file.relative_to(SOURCE)), "".join(name))}
    listed = set(re.findall(r"^\|.*\| `([\w/.]+): (\w+)` \|$", PAGE, re.MULTILINE))
    assert found - listed == {("peer/channel_area.py", "VERSION")}  # that of area.h again


def test_a_directory_of_another_version(region: Region) -> None:
    newer_directory(region)
    before = region.read(0, region.size)
    for call in (Directory.open, Directory.create):
        with pytest.raises(NoDirectory, match=r"version 2, which is not known here \(version 1 is"):
            call(region)
    with pytest.raises(channel.NoChannels, match=r"directory of version 2.*or make new memory"):
        channel.open(region)
    assert not_served(region, "--names").endswith("or make new memory\n")
    assert region.read(0, region.size) == before


def test_an_area_of_another_version(region: Region) -> None:
    """It is not taken for a damaged one, which `Directory.create` makes again."""
    newer_area(region)
    before = region.read(0, region.size)
    with pytest.raises(channel.NoChannels, match=r"channels are of version 2, .*make new memory"):
        channel.open(region)
    with pytest.raises(RegionError, match="channels are of version 2"):
        Directory.create(region, channels="64K")
    assert "channels are of version 2" in not_served(region, "--channels", "64K")
    Directory.create(region).close()  # its names can be used nevertheless
    assert region.read(0, region.size) == before


def test_a_damaged_area_is_not_one_of_another_version(region: Region) -> None:
    newer_area(region)
    where = Directory.open(region).channels
    assert where is not None
    region.write(where.start + 40, bytes(4))
    with pytest.raises(channel.NoChannels, match="no room for channels"):
        channel.open(region)
    Directory.create(region, channels="64K").close()
    channel.open(region).close()


def test_new_memory_is_what_helps(region: Region) -> None:
    newer_directory(region)
    with Region.create("1M", name=region.name, replace=True) as made:
        Directory.create(made, channels="64K").close()
        channel.open(made).close()
        made.unlink()


def not_served(region: Region, *options: str) -> str:
    """What `serve` says to memory that it does not serve."""
    command = [sys.executable, "-m", "ivshmem", "serve", "-S", f"/tmp/{region.name}", "-M"]
    done = subprocess.run(
        [*command, str(region.name), *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    return done.stderr


def test_a_journal_of_another_version() -> None:
    journal = Journal()
    fd = os.dup(journal.fileno())
    os.pwrite(fd, b"ivshmem journal 2\n", 0x8000)
    with pytest.raises(JournalError, match="another version's"):
        Journal(fd)
    journal.close()


def test_checksums_of_another_version(region: Region, tmp_path: Path) -> None:
    path = tmp_path / "raw"
    ivshmem.save(region, path, raw=True)
    sums = tmp_path / "raw.ivshmem.json"
    document = json.loads(sums.read_text())
    sums.write_text(json.dumps({**document, "further": 1}))
    ivshmem.load(region, path, raw=True)
    sums.write_text(json.dumps({**document, "version": 2}))
    with pytest.raises(ivshmem.ImageError, match=r"version 2\): remove it to load .* unchecked"):
        ivshmem.load(region, path, raw=True)
    sums.unlink()
    assert ivshmem.load(region, path, raw=True).id == ""


def test_a_migration_of_another_version(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_text('{"version": 2, "plan": {}}\n')
    path.chmod(0o600)
    with pytest.raises(MigrationError, match=r"or one of another version \(version 2\)"):
        StateFile.load(str(path))
