"""Every kind of channel, live, between Python and a program that has ivshmem_channel.h alone.

Both send and receive at the same time, numbered messages of many sizes with checksums, and each
checks every byte that it gets. The program is tests/channel/partner.c, as C and as C++.
"""

from __future__ import annotations

import subprocess
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.compiling import PROGRAMS, WARNINGS, needs
from support.waiting import PATIENCE, Background

from ivshmem import Directory, Region, channel
from ivshmem.channel import Channels

LIMIT = 272
FRAME = 8 + LIMIT
TO_PYTHON, TO_C, REPLY_OF_PYTHON, REPLY_OF_C = 1, 2, 3, 4  # salts
LANGUAGES = {"c11": ("cc", "c"), "c++17": ("c++", "c++")}


def message(number: int, salt: int) -> bytes:
    size = 16 + (number * 37 + salt) % 257
    text = bytes((number * 7 + salt + i) & 255 for i in range(16, size))
    return number.to_bytes(8, "little") + zlib.crc32(text).to_bytes(8, "little") + text


def frame(number: int, salt: int) -> bytes:
    text = message(number, salt)
    return len(text).to_bytes(8, "little") + text


@pytest.fixture(scope="module", params=LANGUAGES)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler, language = LANGUAGES[request.param]
    found = tmp_path_factory.mktemp("partner") / "partner"
    subprocess.run(
        [
            *(needs(compiler), f"-std={request.param}", "-O1", *WARNINGS, "-x", language),
            *(f"-I{channel.get_include()}", str(PROGRAMS / "partner.c"), "-o", str(found)),
        ],
        check=True,
    )
    return found


@pytest.fixture
def region() -> Iterator[Region]:
    with Region.create("4M") as region:
        Directory.create(region, channels="2M").close()
        yield region


# -- what Python does, for each kind: (both channels, how it sends, how it receives) ---------------


def in_order(get: Callable[[], Any], salt: int, count: int) -> None:
    for number in range(count):
        assert get() == message(number, salt)


def messages(channels: Channels, there: Callable[[], None], count: int) -> None:
    made = {
        name: channels.create_messages(name, limit=LIMIT, slots=16, overflow="block")
        for name in ("to python", "to c")
    }
    with made["to python"].reader("block") as reader, made["to c"].writer() as writer:
        there()
        receiving = Background(lambda: in_order(lambda: reader.get(PATIENCE), TO_PYTHON, count))
        for number in range(count):
            writer.put(message(number, TO_C), PATIENCE)
        receiving.result()


def queue(channels: Channels, there: Callable[[], None], count: int) -> None:
    made = {
        name: channels.create_queue(name, limit=LIMIT, slots=16) for name in ("to python", "to c")
    }
    with made["to python"].reader() as reader, made["to c"].writer() as writer:
        there()
        receiving = Background(lambda: in_order(lambda: reader.get(PATIENCE), TO_PYTHON, count))
        for number in range(count):
            writer.put(message(number, TO_C), PATIENCE)
        receiving.result()


def value(channels: Channels, there: Callable[[], None], count: int) -> None:
    """Numbers from 1 on, which never go back; the last one is seen."""
    made = {name: channels.create_value(name, limit=LIMIT) for name in ("to python", "to c")}

    def look() -> None:
        number = 0
        while number < count:
            text = reader.wait_changed(PATIENCE)
            assert text is not None
            seen = int.from_bytes(text[:8], "little")
            assert text == message(seen, TO_PYTHON)
            assert number < seen <= count
            number = seen

    with made["to python"].reader() as reader, made["to c"].writer() as writer:
        there()
        looking = Background(look)
        for number in range(1, count + 1):
            writer.put(message(number, TO_C))
        looking.result()


def calls(channels: Channels, there: Callable[[], None], count: int) -> None:
    made = {
        name: channels.create_calls(name, limit=LIMIT, slots=8) for name in ("to python", "to c")
    }
    with made["to python"].server() as server, made["to c"].caller() as caller:
        there()

        def serve() -> None:
            for number in range(count):
                call = server.take(PATIENCE)
                assert call is not None
                assert bytes(call) == message(number, TO_PYTHON)
                assert call.reply(message(number, REPLY_OF_PYTHON))

        serving = Background(serve)
        under_way: list[Any] = []
        for number in range(count + 4):
            if number < count:
                under_way.append(caller.submit(message(number, TO_C), PATIENCE))
            if number >= 4:
                assert under_way.pop(0).result(PATIENCE) == message(number - 4, REPLY_OF_C)
        serving.result()


def converse(stream: Any, count: int) -> None:
    """Send and receive at once; each ends its direction alone."""
    with stream, stream.makefile("rb") as file:
        stream.settimeout(PATIENCE)

        def receive() -> None:
            for number in range(count):
                found = file.read(FRAME)
                expected = frame(number, TO_PYTHON)
                assert found[: len(expected)] == expected
            assert file.read() == b""

        receiving = Background(receive)
        for number in range(count):
            stream.sendall(frame(number, TO_C).ljust(FRAME, b"\0"))
        stream.shutdown(1)
        receiving.result()


def streams(channels: Channels, there: Callable[[], None], count: int) -> None:
    """Each side listens once, and connects once."""
    made = {
        name: channels.create_bytes(name, buffer=1024, connections=2)
        for name in ("to python", "to c")
    }
    with made["to python"].listen() as listener:
        there()
        stream = listener.accept(PATIENCE)
        conversations = [stream, made["to c"].connect()]
        both = [Background(partial(converse, each, count)) for each in conversations]
        for each in both:
            each.result()


KINDS = {"messages": messages, "queue": queue, "value": value, "calls": calls, "bytes": streams}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1000, pytest.param(50_000, marks=pytest.mark.nightly)])
def test_python_and_c(region: Region, program: Path, kind: str, count: int) -> None:
    fd = region.fileno()
    with channel.open(region) as channels:
        running: list[subprocess.Popen[str]] = []

        def there() -> None:
            running.append(
                subprocess.Popen(
                    [program, str(fd), kind, str(count)],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    pass_fds=(fd,),
                    text=True,
                )
            )
            assert running[0].stdout is not None
            running[0].stdout.readline()

        try:
            KINDS[kind](channels, there, count)
        finally:
            for each in running:
                said, errors = each.communicate(timeout=2 * PATIENCE)
                print(errors)
        assert (said, errors) == (f"sent {count}, received {count}\n", "")
        assert [place.name for place in channels.places()].count("partner") == 0
