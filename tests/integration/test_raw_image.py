"""Regions in plain sparse files, with their checksums beside them."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import commands

import ivshmem
from ivshmem import ImageError, Region
from ivshmem.memory.raw_image import SUFFIX

SIZE = 4 << 20


@pytest.fixture
def region() -> Iterator[Region]:
    """With something at both ends, across the border of two blocks, and holes."""
    with Region.create(SIZE) as region:
        region.write(0, b"begin")
        region.write((1 << 20) - 50_000, random.Random(1).randbytes(100_000))  # noqa: S311
        region.write(SIZE - 3, b"end")
        yield region


@pytest.fixture
def file(tmp_path: Path, region: Region) -> Path:
    ivshmem.save(region, tmp_path / "raw", raw=True)
    return tmp_path / "raw"


def sums(file: Path) -> Path:
    return file.with_name(file.name + SUFFIX)


def content(region: Region) -> bytes:
    return region.read(0, region.size)


def test_the_file_is_the_memory(region: Region, file: Path) -> None:
    assert file.read_bytes() == content(region)
    assert file.stat().st_blocks * 512 < 400_000, "holes stay holes"
    assert file.stat().st_mode & 0o777 == sums(file).stat().st_mode & 0o777 == 0o600
    found = json.loads(sums(file).read_text())
    assert found["format"] == "ivshmem raw image"
    assert sorted(map(int, found["crc32"])) == [0, 1, 3]


def test_there_and_back(region: Region, file: Path) -> None:
    info = ivshmem.check_image(file, raw=True)
    assert (info.size, len(info.id), info.source) == (SIZE, 32, "anonymous")
    with Region.create(SIZE) as other:
        other.write(2 << 20, b"to be cleared")
        steps: list[tuple[int, int]] = []
        assert ivshmem.load(other, file, raw=True, progress=lambda *at: steps.append(at)) == info
        assert content(other) == content(region)
        assert steps == sorted(steps)
        assert steps[-1] == (2 * SIZE, 2 * SIZE)
    with Region.create(SIZE) as sparse:
        ivshmem.load(sparse, file, raw=True)
        assert os.fstat(sparse.fileno()).st_blocks * 512 < 400_000


def test_it_replaces_the_one_before(region: Region, file: Path) -> None:
    region.write(0, b"later")
    info = ivshmem.save(region, file, raw=True)
    assert ivshmem.check_image(file, raw=True) == info
    assert file.read_bytes()[:5] == b"later"


@pytest.mark.parametrize("at", [0, (1 << 20) + 10, 2 << 20, SIZE - 1])
def test_damage_is_found_before_anything_changes(file: Path, at: int) -> None:
    with file.open("r+b") as raw:
        raw.seek(at)
        byte = raw.read(1)
        raw.seek(at)
        raw.write(bytes([byte[0] ^ 1]))
    block = at - at % (1 << 20)
    with Region.create(SIZE) as other:
        other.write(5, b"kept")
        with pytest.raises(ImageError, match=f"damaged at byte {block}: .* another checksum"):
            ivshmem.load(other, file, raw=True)
        assert content(other).strip(b"\0") == b"kept"
    with pytest.raises(ImageError, match="another checksum"):
        ivshmem.check_image(file, raw=True)


def test_a_hole_where_there_was_something(file: Path) -> None:
    with file.open("r+b") as raw:
        raw.truncate(1 << 20)
        raw.truncate(SIZE)
    with pytest.raises(ImageError, match=f"damaged at byte {1 << 20}"):
        ivshmem.check_image(file, raw=True)


@pytest.mark.parametrize("size", [SIZE - 1, SIZE + 1, 0])
def test_another_size(file: Path, size: int) -> None:
    os.truncate(file, size)
    with pytest.raises(ImageError, match=f"it should have {SIZE} bytes"):
        ivshmem.check_image(file, raw=True)


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "{}", "null", '"x"', "[" * 50_000),
        '{"format": "other"}',
        *("block:4096", "crc32:[]", 'crc32:{"x": 1}', 'crc32:{"99": 1}', "version:2", "size:-1"),
    ],
    ids=lambda text: text[:20],
)
def test_checksums_that_are_none(file: Path, text: str) -> None:
    if ":" in text and not text.startswith("{"):
        key, _, value = text.partition(":")
        document = json.loads(sums(file).read_text())
        text = json.dumps({**document, key: json.loads(value)})
    sums(file).write_text(text)
    with Region.create(SIZE) as other, pytest.raises(ImageError, match="remove it to load"):
        ivshmem.load(other, file, raw=True)


def test_checksums_without_end(file: Path) -> None:
    sums(file).write_bytes(b" " * 200_000)
    with pytest.raises(ImageError, match="larger than the checksums"):
        ivshmem.check_image(file, raw=True)


def test_any_file_of_the_size_can_be_loaded_without_checksums(region: Region, file: Path) -> None:
    sums(file).unlink()
    with Region.create(SIZE) as other:
        assert ivshmem.load(other, file, raw=True).id == ""
        assert content(other) == content(region)
    with pytest.raises(ImageError, match="cannot be checked"):
        ivshmem.check_image(file, raw=True)
    with Region.create(2 * SIZE) as larger, pytest.raises(ImageError, match="must be the same"):
        ivshmem.load(larger, file, raw=True)


def test_the_two_forms_are_not_mixed_up(region: Region, file: Path, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="--raw"):
        ivshmem.load(region, file)
    with pytest.raises(ValueError, match="omit raw=True or compress=True"):
        ivshmem.save(region, tmp_path / "both", raw=True, compress=True)
    assert not (tmp_path / "both").exists()


def test_a_process_that_maps_the_file_sees_the_memory(region: Region, file: Path) -> None:
    """As QEMU's memory-backend-file does; and loading refuses what that changed."""
    with Region.attach(path=file) as mapped:
        assert content(mapped) == content(region)
        mapped.write(10, b"changed")
    with pytest.raises(ImageError, match="changed it on purpose, remove"):
        ivshmem.check_image(file, raw=True)


@pytest.mark.usefixtures("commands")
def test_a_path_of_bytes(region: Region, tmp_path: Path) -> None:
    path: Any = os.fsencode(tmp_path / "raw")  # not promised, and alike in both forms
    info = ivshmem.save(region, path, raw=True)
    assert ivshmem.check_image(path, raw=True) == info
    assert ivshmem.load(region, path, raw=True) == info


def test_an_error_names_its_file(region: Region, tmp_path: Path) -> None:
    for taken in ("raw", f"raw{SUFFIX}"):
        (tmp_path / taken).mkdir()
        with pytest.raises(OSError, match="irectory") as caught:
            ivshmem.save(region, tmp_path / "raw", raw=True)
        assert caught.value.filename == str(tmp_path / taken)
        (tmp_path / taken).rmdir()
    assert list(tmp_path.iterdir()) == []


def test_the_command_line(region: Region, tmp_path: Path, shm_name: str) -> None:
    run = commands.run
    file = str(tmp_path / "raw")
    with Region.create(SIZE, name=shm_name) as named:
        named.write(0, content(region))
        done = run("save", file, "-M", shm_name, "--raw")
        assert (done.returncode, done.stderr) == (0, "")
        named.write(0, bytes(SIZE))
        checked = run("load", "--check", "--raw", file)
        assert "and nothing was loaded" in checked.stdout
        assert run("load", file, "-M", shm_name, "--raw").returncode == 0
        assert content(named) == content(region)
        os.unlink(file + SUFFIX)
        unchecked = run("load", file, "-M", shm_name, "--raw")
        assert f"not checked: {file}{SUFFIX} is not there" in unchecked.stdout
        assert "--raw" in run("load", file, "-M", shm_name).stderr
    assert run("save", file, "--raw", "--compress").returncode == 2
