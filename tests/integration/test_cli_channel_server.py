"""`ivshmem channel`: commands that run on, when their server ends."""

from __future__ import annotations

import json
import select
import subprocess
from pathlib import Path
from typing import Any

import pytest
from mcap.reader import make_reader
from mcap.writer import Writer
from support.channel_commands import started
from support.waiting import PATIENCE, until

import ivshmem
from ivshmem import Server, channel

pytestmark = pytest.mark.usefixtures("commands")


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "words",
    [
        *("tail a", "tail a --readonly", "cat a", "cat v -n 9", "put a", "put a --lines"),
        *("hz a v -i 60", "bw a -i 0.1", "top --json -i 0.1", "record FILE --json", "replay FILE"),
    ],
)
def test_it_ends_with_its_server(socket_path: str, directory: Path, words: str) -> None:
    """By one line, and status 1; what it printed before is whole."""
    file = directory / "a.mcap"
    if words.startswith("replay"):
        with file.open("wb") as stream:
            recording: Any = Writer(stream)
            recording.start()
            topic = recording.register_channel("r", "", 0)
            for second in (0, 60):
                recording.add_message(topic, second * 10**9, b"x", second * 10**9)
            recording.finish()
    has_place = "--readonly" not in words and "top" not in words
    given = [str(file) if word == "FILE" else word for word in words.split()]
    with Server(socket_path, "2M", channels="1M").start() as server:
        with ivshmem.connect(socket_path, timeout=PATIENCE) as client:
            with channel.open(client, name="a test") as channels:
                log = channels.create_messages("a", limit=8)
                with channels.create_value("v", limit=8).writer() as setter:
                    setter.put(b"content")
                with log.writer() as writer:
                    with started(socket_path, *given, stdin=subprocess.PIPE) as process:
                        if has_place:
                            until(lambda: is_there(channels, process.pid))
                        else:
                            until(lambda: writer.put(b"x") >= 0 and prints(process))
                        if given[0] == "record":
                            until(lambda: log_is_read(channels))
                            writer.put(b"message")
                        server.close()
                        assert process.wait(PATIENCE) == 1
                        assert process.stdout is not None
                        assert process.stderr is not None
                        output = process.stdout.read()
                        *before, line = process.stderr.read().decode().splitlines()
                        assert len(before) == (given[0] == "replay")
    assert line == (
        f"ivshmem: server {socket_path}: the server ended the connection, and with it this command:"
        " start it again at the next server"
    )
    if given[0] == "record":
        with file.open("rb") as stream:
            messages = {each.data for _, _, each in make_reader(stream).iter_messages()}
        assert messages == {b"content", b"message"}
        assert json.loads(output)["messages"] == 2


def log_is_read(channels: channel.Channels) -> bool:
    return any(info.readers for info in channels.list() if info.name == "a")


def prints(process: subprocess.Popen[bytes]) -> bool:
    assert process.stdout is not None
    return bool(select.select([process.stdout], [], [], 0.05)[0])


def is_there(channels: channel.Channels, process: int) -> bool:
    return any(place.process == process for place in channels.places())


def test_a_call_outlives_its_server(socket_path: str) -> None:
    """Whoever serves it is in the same memory."""
    with Server(socket_path, "2M", channels="1M").start() as server:
        with ivshmem.connect(socket_path, timeout=PATIENCE) as client:
            with channel.open(client) as channels:
                calls = channels.create_calls("c", limit=8)
                with calls.server() as serving, started(socket_path, "call", "c", "x") as process:
                    call = serving.take(PATIENCE)
                    assert call is not None
                    server.close()
                    with pytest.raises(subprocess.TimeoutExpired):
                        process.wait(1)
                    call.reply(b"y")
                    assert process.wait(PATIENCE) == 0
                    assert process.stdout is not None
                    assert process.stdout.read().strip() == b"y"
