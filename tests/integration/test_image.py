"""Regions in files: what is saved comes back, what is damaged does not, and nothing is lost."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import commands
from support.mounts import huge_pages, mounted, root
from support.waiting import in_child, until

import ivshmem
from ivshmem import ImageError, Region, testing
from ivshmem.memory import image

pytestmark = pytest.mark.usefixtures("commands")
IVSHMEM = [sys.executable, "-m", "ivshmem"]
SIZE = 4 << 20


@pytest.fixture
def region() -> Iterator[Region]:
    """With something in it: at both ends, a long piece, a word in the middle of nowhere."""
    with Region.create(SIZE) as region:
        region.write(0, b"begin")
        region.write(1 << 20, random.Random(1).randbytes(100_000))  # noqa: S311
        region.write(3 << 20, b"easily compressed " * 50_000)
        region.write((2 << 20) + 4093, b"word!")
        region.write(SIZE - 3, b"end")
        yield region


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "saved"


def content(region: Region) -> bytes:
    return region.read(0, region.size)


def blocks(region: Region) -> int:
    return os.fstat(region.fileno()).st_blocks


@pytest.mark.parametrize("compress", [False, True], ids=["plain", "compressed"])
def test_there_and_back(region: Region, file: Path, compress: bool) -> None:
    before = blocks(region)
    info = ivshmem.save(region, file, compress=compress)
    assert blocks(region) == before, "looking filled the holes"
    assert info.size == SIZE
    assert image.read_info(file) == image.check_image(file) == info
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.stat().st_size < (200_000 if compress else 1_400_000)
    with Region.create(SIZE) as other:
        other.write(500_000, b"to be cleared")
        assert ivshmem.load(other, file) == info
        assert blocks(other) <= before + 8  # the page that was cleared
        assert content(other) == content(region)
        other.write(0, b"something else")
        ivshmem.load(other, file)
        assert content(other) == content(region)
    assert content(region)[-3:] == b"end"


def test_an_empty_one_and_a_full_one(file: Path) -> None:
    with Region.create("2M") as empty, Region.create("2M") as full:
        full.write(0, random.Random(2).randbytes(2 << 20))  # noqa: S311
        ivshmem.save(empty, file)
        assert file.stat().st_size < 400
        ivshmem.load(full, file)
        assert content(full) == bytes(2 << 20)
        full.write(0, b"x" * (2 << 20))
        ivshmem.save(full, file)
        ivshmem.load(empty, file)
        assert content(empty) == b"x" * (2 << 20)


def test_huge_pages_that_nobody_has_touched(file: Path) -> None:
    """They are not taken by being looked at."""
    with huge_pages(2 << 20, 8) as got:
        if got < 8:
            pytest.skip("needs 8 huge pages of 2 MiB, and to be root")
        with Region.create("16M", hugepages="2M") as region:
            region.write(5 << 20, b"here")
            before = region.info().resident
            assert before == 2 << 20
            ivshmem.save(region, file)
            ivshmem.load(region, file)
            assert file.stat().st_size < 8192
            assert region.info().resident == before
            assert region.read(5 << 20, 4) == b"here"


def test_progress_ends_at_its_end(region: Region, file: Path) -> None:
    told: list[tuple[int, int]] = []

    def note(done: int, total: int) -> None:
        told.append((done, total))

    for number in range(3):
        told.clear()
        if number == 0:
            ivshmem.save(region, file, progress=note)
        elif number == 1:
            image.check_image(file, progress=note)
        else:
            ivshmem.load(region, file, progress=note)
        assert told[-1][0] == told[-1][1] > 0
        assert [done for done, _ in told] == sorted(done for done, _ in told)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("compress", [False, True], ids=["plain", "compressed"])
def test_any_damage_is_found(region: Region, file: Path, tmp_path: Path, compress: bool) -> None:
    """Every bit of the headers of records, some of the data, every way to end too early."""
    ivshmem.save(region, file, compress=compress)
    good = file.read_bytes()
    bad = tmp_path / "bad"
    dice = random.Random(3)  # noqa: S311
    places = {*range(300), *(dice.randrange(len(good)) for _ in range(100))}
    places |= {len(good) - 1 - n for n in range(40)}
    with Region.create(SIZE) as other:
        other.write(0, b"as before")
        for place in places:
            bad.write_bytes(
                good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :]
            )
            with pytest.raises(ImageError, match=r"damaged at byte|not a saved region|of version"):
                ivshmem.load(other, bad)
            bad.write_bytes(good[:place])
            with pytest.raises(ImageError, match=r"damaged at byte|not a saved region"):
                ivshmem.load(other, bad)
        bad.write_bytes(good + b"\0")
        with pytest.raises(ImageError, match=f"damaged at byte {len(good)}"):
            ivshmem.load(other, bad)
        assert content(other).rstrip(b"\0") == b"as before"


def test_the_damage_is_where_it_is_said_to_be(region: Region, file: Path) -> None:
    ivshmem.save(region, file)
    starts = records(file.read_bytes())
    for start, end in zip(starts, [*starts[1:], file.stat().st_size], strict=True):
        data = bytearray(file.read_bytes())
        data[end - 1] ^= 1
        damaged = file.with_name("damaged")
        damaged.write_bytes(data)
        with pytest.raises(ImageError, match=rf"/damaged is damaged at byte {start}: .*; nothing "):
            image.check_image(damaged)


def records(data: bytes) -> list[int]:
    """Where the records begin."""
    at = 12 + struct.unpack_from("<I", data, 8)[0] + 4
    found = []
    while at < len(data):
        found.append(at)
        at += 20 + struct.unpack_from("<QII", data, at)[2]
    return found


def test_a_record_that_is_missing_or_stands_elsewhere(region: Region, file: Path) -> None:
    """Each for itself is good: the checksums are a chain."""
    ivshmem.save(region, file)
    data = file.read_bytes()
    starts = records(data)
    assert len(starts) >= 5
    one, two, three = starts[1:4]
    for wrong in (
        data[:one] + data[two:],
        data[:one] + data[two:three] + data[one:two] + data[three:],
        data[:two] + data[one:],
    ):
        file.write_bytes(wrong)
        with pytest.raises(ImageError, match=rf"damaged at byte ({one}|{two}):"):
            image.check_image(file)


def with_header(header: bytes) -> bytes:
    data = b"IVSHSAVE" + struct.pack("<I", len(header)) + header
    return data + struct.pack("<I", zlib.crc32(data))


def forged(size: object, *pieces: tuple[int, int, bytes], **values: object) -> bytes:
    """A file with good checksums."""
    common = {"version": 1, "id": "0", "compressed": True, "source": "anonymous", "name": None}
    data = with_header(json.dumps({**common, "size": size, "saved": 0, **values}).encode())
    crc = zlib.crc32(data[:-4])
    for offset, length, stored in pieces:
        record = struct.pack("<QII", offset, length, len(stored))
        crc = zlib.crc32(stored, zlib.crc32(record, crc))
        data += record + struct.pack("<I", crc) + stored
    return data


SMALL = zlib.compress(bytes(4096))
BOMB = zlib.compress(bytes(8 << 20), 9)[:4000]  # how one of any length begins


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (forged(4096, (0, 4096, BOMB), (4096, 0, b"")), "another length"),
        (forged(4096, (0, 4096, SMALL + b"more"), (4096, 0, b"")), "another length"),
        (forged(4096, (0, 4096, SMALL[:-1]), (4096, 0, b"")), "another length"),
        (forged(4096, (0, 100, b"x" * 90), (4096, 0, b"")), "incorrect header"),
        (forged(4096, (4000, 100, b"x" * 100), (4096, 0, b"")), "cannot be"),
        (forged(4096, (1 << 63, 100, b"x" * 100), (4096, 0, b"")), "cannot be"),
        (forged(4096, (100, 9, b"x" * 9), (99, 9, b"x" * 9), (4096, 0, b"")), "cannot be"),
        (forged(4096, (0, 9, b"x" * 10), (4096, 0, b"")), "cannot be"),
        (forged(4096, (0, 9, b"x" * 9), (100, 0, b"")), "more bytes follow its end"),
        (forged(4096, (0, 1 << 31, b"x" * (2 << 20)), (4096, 0, b"")), "a record of 2097152"),
        (forged(4096), "ends too early"),
        (
            forged(4096, version=2),
            r"saved in version 2 of the format, .* newer than this .*\(1\): load it with a newer",
        ),
        (forged(True, (1, 0, b"")), "no header: a size of True"),
        (forged(1 << 64), "no header: a size of"),
        (forged(4096, (4096, 0, b""), saved="now"), "no header: saved at 'now'"),
        (forged(4096, (4096, 0, b""), saved=1e300), r"no header: saved at 1e\+300"),
        (forged(4096, (4096, 0, b""), saved=float("nan")), "no header: saved at nan"),
        (forged(4096, (4096, 0, b""), source={}), "no header: values of other types"),
        (with_header(b"[" * 60_000), "no header: maximum recursion depth"),
        (forged(4096, (4096, 0, b""), name=1), "no header: values of other types"),
        (forged(4096, (4096, 0, b""), compressed=1), "no header: values of other types"),
        (b"IVSHSAVE\xff\xff\xff\xff", "a header of 4294967295 bytes"),
        (b"", "not a saved region"),
        (b"something else altogether", "not a saved region"),
    ],
)
def test_files_by_somebody_else(file: Path, data: bytes, reason: str) -> None:
    file.write_bytes(data)
    with Region.create("4K") as region:
        region.write(0, b"as before")
        with pytest.raises(ImageError, match=reason):
            ivshmem.load(region, file)
        assert content(region).rstrip(b"\0") == b"as before"


def test_what_does_not_fit(region: Region, file: Path, tmp_path: Path) -> None:
    ivshmem.save(region, file)
    with Region.create("8M") as larger:
        with pytest.raises(ImageError, match="holds 4M, and the region has 8M"):
            ivshmem.load(larger, file)
    with Region.create(SIZE, path=tmp_path / "memory"):
        with Region.attach(path=tmp_path / "memory", readonly=True) as readonly:
            with pytest.raises(ImageError, match="may only be read"):
                ivshmem.load(readonly, file)


def test_what_is_no_place(region: Region, tmp_path: Path) -> None:
    """A device is not replaced by a file, a link leads where it leads."""
    for place in (tmp_path, tmp_path / "pipe"):
        if place.name == "pipe":
            os.mkfifo(place)
        with pytest.raises(FileExistsError, match="not a regular file"):
            ivshmem.save(region, place)
    with pytest.raises(ImageError, match="not a regular file"):
        ivshmem.load(region, tmp_path / "pipe")  # nor does it wait for somebody to open it
    with pytest.raises(FileNotFoundError):
        ivshmem.save(region, tmp_path / "no" / "such")
    with Region.create("4K", path=tmp_path / "memory") as itself:
        with pytest.raises(FileExistsError, match="the region itself"):
            ivshmem.save(itself, tmp_path / "memory")
        itself.unlink()
    (tmp_path / "link").symlink_to("real")
    ivshmem.save(region, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    image.check_image(tmp_path / "real")
    assert {path.name for path in tmp_path.iterdir()} == {"pipe", "link", "real"}


@pytest.mark.parametrize("how", ["killed", "no space", "exception"])
def test_a_save_that_is_cut_off(region: Region, file: Path, how: str) -> None:
    """What was there stays, and nothing else is."""
    file.write_bytes(b"the last one")

    def stop(done: int, _total: int) -> None:
        if done > 2 << 20:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise InterruptedError

    def save() -> None:
        if how == "no space":
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with pytest.raises(OSError, match=str(file)):
            ivshmem.save(region, file, progress=stop)

    if how == "killed":
        with pytest.raises(AssertionError):
            in_child(save)
    else:
        in_child(save)
    assert file.read_bytes() == b"the last one"
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize("at", [0, 1 << 20, SIZE])
def test_memory_that_somebody_truncates(
    region: Region, file: Path, tmp_path: Path, at: int
) -> None:
    """That is an error, and no signal that ends us; a file that is loaded makes it whole again."""
    ivshmem.save(region, file)
    saved = file.read_bytes()
    memory = tmp_path / "memory"
    with Region.create(SIZE, path=memory) as truncated:
        ivshmem.load(truncated, file)

        def truncate(done: int, _total: int) -> None:
            if done >= at:
                os.truncate(memory, 4096)

        with pytest.raises(OSError, match="truncated"):
            ivshmem.save(truncated, file, progress=truncate)
        assert file.read_bytes() == saved
        ivshmem.load(truncated, file)
        assert memory.read_bytes() == content(region)


@pytest.mark.skipif(not root, reason="mounts")
def test_no_room_for_what_is_loaded(region: Region, file: Path) -> None:
    ivshmem.save(region, file)
    with mounted("tmpfs", "size=512k") as full:
        with (full / "memory").open("wb") as memory:
            memory.truncate(SIZE)
        with Region.attach(path=full / "memory") as sparse:
            with pytest.raises(OSError, match="No space left") as error:
                ivshmem.load(sparse, file)
            assert error.value.filename == str(full / "memory")


def test_saved_while_somebody_writes(region: Region, file: Path) -> None:
    """The file is good, whatever of it was written when."""
    end = threading.Event()

    def write() -> None:
        while not end.is_set():
            for offset in range(0, SIZE, 65536):
                region.write(offset, os.urandom(8))

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for compress in (False, True) * 3:
            ivshmem.save(region, file, compress=compress)
            image.check_image(file)
    finally:
        end.set()
        thread.join()


# -- the command line -----------------------------------------------------------------------------


def run(*arguments: str | Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = commands.run(*arguments, timeout=60)
    assert done.returncode == status, done.stderr
    return done


def test_commands_and_a_server(file: Path) -> None:
    with testing.server("64K") as server:
        with ivshmem.connect(server.path) as client:
            client.region.write(100, b"precious")
            said = run("save", file, "-S", server.path, "--compress").stdout
            assert said.startswith(f"{file}: 64K (descriptor), saved ")
            client.region.write(100, b"spoiled!")
            assert run("load", file, "-S", server.path).stdout == said
            assert client.region.read(100, 8) == b"precious"


def test_commands_and_a_file(file: Path, tmp_path: Path) -> None:
    memory = tmp_path / "memory"
    with Region.create("64K", path=memory) as region:
        region.write(0, b"precious")
        run("save", file, "--file", memory)
        region.write(0, b"spoiled!")
        assert run("load", file, "--check").stdout.startswith(f"{file}: 64K (file {memory}), ")
        run("load", file, "--file", memory)
        assert region.read(0, 8) == b"precious"
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    for arguments in (["--check"], ["--file", memory]):
        said = run("load", file, *arguments, status=1).stderr
        assert said.startswith(f"ivshmem: {file} is damaged at byte ")
        assert len(said.splitlines()) == 1
    assert "no such file" in run("save", file, "--file", tmp_path / "none", status=1).stderr
    assert "a pipe cannot be replaced" in run("save", Path("-"), "--file", memory, status=2).stderr


def test_what_a_file_says_of_itself_is_no_command_to_a_terminal(file: Path) -> None:
    file.write_bytes(forged(4096, (4096, 0, b""), source="\x1b[2J", name="\n", saved=200_000))
    assert run("load", file, "--check").stdout.startswith(
        f"{file}: 4K (\\x1b[2J \\n), saved 1970-01-0"
    )


def test_ctrl_c(file: Path, tmp_path: Path) -> None:
    memory = tmp_path / "memory"
    with Region.create("64M", path=memory) as region:
        for offset in range(0, region.size, 1 << 20):
            region.write(offset, os.urandom(1 << 20))
    file.write_bytes(b"the last one")
    command = [*IVSHMEM, "save", str(file), "--file", str(memory), "--compress"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as saving:
        until(lambda: str(tmp_path) in " ".join(open_files(saving.pid)))
        saving.send_signal(signal.SIGINT)
    assert saving.returncode == 130
    assert file.read_bytes() == b"the last one"
    assert {path.name for path in tmp_path.iterdir()} == {"memory", "saved"}


def open_files(pid: int) -> list[str]:
    found = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            name = os.readlink(fd)
        except OSError:
            continue
        if not name.endswith("/memory"):
            found.append(name)
    return found
