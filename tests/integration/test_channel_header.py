"""ivshmem_channel.h alone, as a program in C uses it.

tests/channel/ has the programs: a process is killed, or stopped, at each of its steps (see
`OPERATIONS`: values have none); shared words that a hostile peer spoiled; threads under
ThreadSanitizer; counts of readers that drop messages; an area whose bytes are known. By night they
run optimized as well: that takes the compiler three times as long.
"""

from __future__ import annotations

import itertools
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import shared
from support.compiling import PROGRAMS, WARNINGS, needs

from ivshmem import Directory, Region, channel

ADDRESSES = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

OPERATIONS = {
    "steps_messages": ("write", "adopt", "block", "overwrite", "discard", "create", "remove"),
    "steps_queue": ("put", "take", "get"),
    "steps_calls": ("serve", "call"),
    "steps_bytes": ("call", "accept"),
}
STEPS = [(program, name) for program, names in OPERATIONS.items() for name in names]

Build = Callable[..., Path]


@pytest.fixture(scope="module", params=["-O0", pytest.param("-O2", marks=pytest.mark.nightly)])
def build(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Compiles a program of tests/channel against the installed header."""
    folder = shared.folder(tmp_path_factory, "channel")
    compiler = needs("cc")

    def built(name: str, *options: str) -> Path:
        source = str(PROGRAMS / f"{name}.c")
        include = f"-I{channel.get_include()}"
        command = [compiler, "-std=gnu11", request.param, "-g", *WARNINGS, include, *options]
        words = [name, request.param, *options]
        return shared.made_once(
            folder / "-".join(re.sub(r"\W", "", word) for word in words),
            lambda made: subprocess.run([*command, "-pthread", source, "-o", made], check=True),
        )

    return built


def output_of(*command: str | Path, timeout: float = 300, pass_fds: tuple[int, ...] = ()) -> str:
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, check=False, pass_fds=pass_fds
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.mark.parametrize(
    ("compiler", "language"),
    [
        *(("cc", "c11"), ("c++", "c++17")),
        pytest.param("clang", "c11", marks=pytest.mark.nightly),
        pytest.param("clang++", "c++17", marks=pytest.mark.nightly),
    ],
)
def test_no_compiler_warns(tmp_path: Path, compiler: str, language: str) -> None:
    """It is included twice, as the first thing that a program includes."""
    source = tmp_path / ("program.c" if language == "c11" else "program.cc")
    source.write_text('#include "ivshmem_channel.h"\n' * 2)
    command = [needs(compiler), f"-std={language}", *WARNINGS, "-Wconversion", "-fsyntax-only"]
    if language != "c11":
        command.remove("-Wconversion")
    subprocess.run([*command, f"-I{channel.get_include()}", source], check=True)


def test_a_big_endian_machine_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "program.c"
    source.write_text('#include "ivshmem_channel.h"\n')
    order = ["-U__BYTE_ORDER__", "-D__BYTE_ORDER__=__ORDER_BIG_ENDIAN__"]
    command = [needs("cc"), "-fsyntax-only", *order, f"-I{channel.get_include()}", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "channels are little-endian" in done.stderr


@pytest.mark.sampled(6)
@pytest.mark.parametrize("way", ["kill", "stop"])
@pytest.mark.parametrize(("program", "operation"), STEPS)
def test_at_each_step(build: Build, program: str, operation: str, way: str) -> None:
    """A process is killed there, or stopped and continued later: the others lose nothing."""
    said = output_of(build(program), way, operation)
    found = re.fullmatch(rf"{operation}: (\d+) steps\n", said)
    assert found is not None, said
    assert int(found[1]) > 30  # so the hook was there


@pytest.mark.parametrize("operation", ["block", "overwrite", "discard"])
def test_a_reader_that_lost_its_place_at_each_step(build: Build, operation: str) -> None:
    """It continues when another reader has its slot: that one loses nothing."""
    said = output_of(build("steps_messages"), "evict", operation)
    found = re.fullmatch(rf"{operation}: (\d+) steps\n", said)
    assert found is not None, said
    assert int(found[1]) > 30


# -- the layout -----------------------------------------------------------------------------------

GOLDEN = PROGRAMS / "golden.txt"  # for each run of words that are not 0: where it is, and the words
GOLDEN_AT, GOLDEN_BYTES = 8192, 1 << 16


def written(region: Region, at: int) -> str:
    """An area as golden.txt has it."""
    words = memoryview(region.read(at, GOLDEN_BYTES)).cast("Q")
    lines = []
    for is_zero, run in itertools.groupby(enumerate(words), lambda each: each[1] == 0):
        if not is_zero:
            found = list(run)
            lines.append(" ".join([f"{found[0][0] * 8:04x}:", *(f"{word:x}" for _, word in found)]))
    return "\n".join(lines) + "\n"


def put_golden(region: Region, at: int) -> None:
    for line in GOLDEN.read_text().splitlines():
        offset, words = line.split(": ")
        for i, word in enumerate(words.split()):
            region.write(at + int(offset, 16) + 8 * i, int(word, 16).to_bytes(8, "little"))


def test_the_layout_has_not_changed_without_a_new_version(build: Build, tmp_path: Path) -> None:
    """Each kind of channel, with what it has in the middle of its work."""
    with Region.create("1M") as region:
        fd = region.fileno()
        output_of(build("golden"), "write", str(fd), pass_fds=(fd,))
        made = written(region, GOLDEN_AT)
    if made != GOLDEN.read_text():
        path = tmp_path / "golden.txt"
        path.write_text(made)
        pytest.fail(
            "the layout of areas has changed: raise IVSHMEM_AREA_VERSION in"
            f" ivshmem_channel/area.h, then cp {path} {GOLDEN}"
        )


def test_c_reads_golden_bytes(build: Build) -> None:
    with Region.create("1M") as region:
        put_golden(region, GOLDEN_AT)
        fd = region.fileno()
        assert output_of(build("golden"), "read", str(fd), pass_fds=(fd,)).splitlines() == [
            "messages, schema golden, 1700000000000000000: 2 at 1002 3 at 1003 4 at 1004",
            "queue, schema golden, 1700000000000000000: 1 of 16 2 of 24",
            "value, array <f8 4x6, 1700000000000000000: 5",
            "calls, schema golden, 1700000000000000000: 1 of 192",
            "bytes, schema golden, 1700000000000000000: waits",
        ]


def test_python_reads_golden_bytes() -> None:
    def message(number: int, size: int = 192) -> bytes:
        return number.to_bytes(8, "little") * (size // 8)

    with Region.create("1M") as region:
        with Directory.create(region, channels=GOLDEN_BYTES) as directory:
            area = directory.channels
        assert area is not None
        put_golden(region, area.start)
        with channel.open(region) as channels:
            assert [
                (info.name, info.kind, info.type, info.limit, info.slots, info.max_writers)
                for info in channels.list()
            ] == [
                ("bytes", "bytes", "schema golden", 1, 128, 3),
                ("calls", "calls", "schema golden", 192, 4, 2),
                ("messages", "messages", "schema golden", 192, 4, 2),
                ("queue", "queue", "schema golden", 192, 4, 2),
                ("value", "value", "array <f8 4x6", 192, 4, 1),
            ]
            assert {info.created for info in channels.list()} == {1_700_000_000.0}
            place = channels.places()[0]
            found = place.id, place.vector, place.process, place.name
            assert found == (3, 1, 4711, "golden")
            a: Any = channels.open("messages").reader("overwrite", history=3)  # type: ignore[attr-defined]
            assert [a.get(0) for _ in range(4)] == [message(2), message(3), message(4), None]
            b: Any = channels.open("queue").reader()  # type: ignore[attr-defined]
            assert [b.get(0) for _ in range(3)] == [message(1, 16), message(2, 24), None]
            c: Any = channels.open("value").reader().get()  # type: ignore[attr-defined]
            assert (c.shape, c.tobytes()) == ((4, 6), message(5))
            d: Any = channels.open("calls").server()  # type: ignore[attr-defined]
            assert bytes(d.take(0)) == message(1)
            e: Any = channels.open("bytes").listen()  # type: ignore[attr-defined]
            assert e.accept(0).recv(100) == b"waits\0"


@pytest.mark.nightly
def test_readers_that_drop_the_newest(build: Build) -> None:
    """`missed` counts them, whatever becomes of a reader; no cell is lost, or used too early."""
    assert output_of(build("discard", *ADDRESSES)) == "ended well\n"


def test_a_reader_that_is_overtaken(build: Build) -> None:
    assert output_of(build("overtaken", *ADDRESSES)) == "ended well\n"


@pytest.mark.nightly
def test_an_end_that_is_refused(build: Build) -> None:
    """It leaves no slot taken: else the channel could not be removed, and writers would wait."""
    assert output_of(build("refused", *ADDRESSES)) == "ended well\n"


def test_positions_that_wrap(build: Build) -> None:
    """A value is there, and a history is whole, just after the position is 0 again."""
    assert output_of(build("wrapped", *ADDRESSES)) == "ended well\n"


@pytest.mark.nightly
def test_positions_that_are_old(build: Build) -> None:
    """Also of what a reader keeps while others read 2^27 to 2^40 messages more."""
    assert output_of(build("positions", *ADDRESSES)) == "ended well\n"


def test_it_reads_the_directory(build: Build) -> None:
    """The area, and whom to ring, as Python stored it."""
    program = build("directory", *ADDRESSES)
    with Region.create("1M") as region, Directory.create(region) as directory:
        fd = region.fileno()

        def finds(*names: str) -> list[str]:
            return output_of(program, str(fd), *names, pass_fds=(fd,)).splitlines()

        assert finds("a") == ["no area: -3", "-7"]
        area = Directory.create(region, channels="64K").channels
        assert area is not None
        longest = "n" * 47
        for peer, name in enumerate(["a", "ab", "ä", longest]):
            directory.publish(name, vector_range=range(peer, 9), id=peer + 65532)
        found = [f"{65532 + peer}: {9 - peer} from {peer}" for peer in range(4)]
        assert finds("a", "ab", "ä", longest) == [f"area {area.start} 65536 16 8", *found]
        assert finds("", "b", "abc", longest[1:], longest + "n")[1:] == ["-7"] * 5


def test_hostile_directories(build: Build) -> None:
    assert output_of(build("directory", *ADDRESSES), "hostile", "20000") == "ended well\n"


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.nightly)])
def test_hostile_words(build: Build, seed: int) -> None:
    """No call reaches outside the area, hangs, or returns what its documentation does not name."""
    count = 20_000 if seed == 1 else 1_000_000
    said = output_of(build("hostile", *ADDRESSES), str(count), str(seed), timeout=1800)
    assert said.startswith(f"{count} states"), said
    assert " -2: 0 " not in said  # IVSHMEM_CORRUPT was met


@pytest.mark.parametrize(
    "words",
    [
        *(("3000",), ("1", "300")),
        *(pytest.param(each, marks=pytest.mark.nightly) for each in (("50000",), ("1", "5000"))),
    ],
)
def test_those_that_join_and_create_at_once(build: Build, words: tuple[str, ...]) -> None:
    """No place, no memory and no name is ever two processes'; the killed leave nothing."""
    said = output_of(build("creators"), *words)
    assert re.match(r"ended well: \d{3,} created, \d+ refused", said)


# What each of them takes by a compare-exchange, and how it would be taken without.
CLAIMS = {
    "a place of two processes": (
        *("places.h", "if (!ivshmem_exchange(memory, at, number, joining))"),
        "if ((ivshmem_store(memory, at, joining), 0))",
    ),
    "a unit of two channels": (
        *("records.h", "!ivshmem_exchange(memory, at, before, owner))"),
        "(ivshmem_store(memory, at, owner), 0))",
    ),
    "a name of two channels": (
        *("records.h", "state == 0)\n            continue;"),
        "state == 0 || ivshmem_flags(state) == IVSHMEM_MAKING)\n            continue;",
    ),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("fault", CLAIMS)
def test_each_claim_is_needed(fault: str, tmp_path: Path) -> None:
    """What the test before is worth."""
    done = changed("creators", tmp_path, *CLAIMS[fault], "100000")
    assert done.returncode == 1
    assert fault in done.stdout


def changed(
    program: str, folder: Path, name: str, old: str, new: str, *arguments: str
) -> subprocess.CompletedProcess[str]:
    """What a program does with a header of which one file was changed in one place."""
    shutil.copytree(channel.get_include(), folder / "include")
    header = folder / "include/ivshmem_channel" / name
    text = header.read_text()
    assert text.count(old) == 1
    header.write_text(text.replace(old, new))
    source, built = str(PROGRAMS / f"{program}.c"), folder / program
    include = f"-I{folder}/include"
    subprocess.run([needs("cc"), "-std=gnu11", include, source, "-o", built], check=True)
    return subprocess.run(
        [built, *arguments], capture_output=True, text=True, check=False, timeout=300
    )


# A word that is read again after it was checked, in the place of what was read first.
TWICE = {
    "the cell of a message": (
        *("entries.h", "    message->offset = channel->at + ivshmem_cell_at("),
        "    word = ivshmem_get(channel, at + IVSHMEM_ENTRY_CELL);\n"
        "    message->offset = channel->at + ivshmem_cell_at(",
    ),
    "the length of a message": (
        *("entries.h", "    message->offset = channel->at + ivshmem_cell_at("),
        "    message->length =\n"
        "        (uint32_t)(ivshmem_get(channel, at + IVSHMEM_ENTRY_CELL) >> 16) & 0x7fffffffu;\n"
        "    message->offset = channel->at + ivshmem_cell_at(",
    ),
    "the length of a reply": (
        *("calls.h", "    *length = (uint32_t)ivshmem_value(word);"),
        "    word = ivshmem_get(channel, ivshmem_reply_word_at(channel, caller->slot, position));\n"
        "    *length = (uint32_t)ivshmem_value(word);",
    ),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("word", TWICE)
def test_a_word_that_is_read_twice_is_found(word: str, tmp_path: Path) -> None:
    """What test_hostile_words is worth: words change between any two loads of a call."""
    done = changed("hostile", tmp_path, *TWICE[word], "1000000")
    assert done.returncode in (1, -signal.SIGSEGV, -signal.SIGBUS)
    if done.returncode == 1:
        assert "length <= " in done.stdout + done.stderr


def test_threads(build: Build) -> None:
    """ThreadSanitizer knows no race but the copies of payload that the header marks."""
    assert output_of(build("threads", "-fsanitize=thread"), "1000") == "ended well\n"
