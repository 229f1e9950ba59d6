"""`ivshmem channel record` and `replay`: what is in a file, and what comes out of one."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
from mcap.exceptions import EndOfFile
from mcap.reader import NonSeekingReader, make_reader
from mcap.writer import CompressionType, Writer
from support import commands
from support.channel_commands import run, started
from support.mounts import mounted, root
from support.unread import Output
from support.waiting import PATIENCE, until

import ivshmem
from ivshmem import Server, channel
from ivshmem.channel import Channels
from ivshmem.recording.facts import metadata_of
from ivshmem.recording.recorder import Recorder
from ivshmem.recording.source import RecordedFile
from ivshmem.system.sink import Sink
from ivshmem.text import counted

pytestmark = pytest.mark.usefixtures("commands")

SECOND = 1_000_000_000


@pytest.fixture
def channels(socket_path: str) -> Iterator[Channels]:
    """Those of a server's region, as a client uses them."""
    with Server(socket_path, "8M", channels="4M").start():
        with ivshmem.connect(socket_path, timeout=PATIENCE) as client:
            with channel.open(client, name="a test") as channels:
                yield channels


@contextlib.contextmanager
def recording(
    channels: Channels, path: str, file: Path, *words: str, readers: int = 1
) -> Iterator[subprocess.Popen[bytes]]:
    """A recorder that reads so many channels."""
    with started(path, "record", str(file), *words) as process:
        until(lambda: read_by(channels) >= readers or process.poll() is not None)
        yield process


def read_by(channels: Channels) -> int:
    return sum(len(info.readers) for info in channels.list())


def waiting(channels: Channels) -> int:
    return sum(reader.waiting for info in channels.list() for reader in info.readers)


def ended(process: subprocess.Popen[bytes], status: int = 0) -> str:
    """End a recorder as Ctrl-C does, and return what it says of itself."""
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == status, errors
    assert output == b""
    return errors.decode()


def stored(file: Path) -> list[tuple[str, bytes]]:
    """Topic and bytes of the messages in a finished file, by the library's reader."""
    with file.open("rb") as stream:
        return [
            (topic.topic, message.data)
            for _, topic, message in make_reader(stream, validate_crcs=True).iter_messages()
        ]


def salvaged(file: Path) -> list[bytes]:
    """The messages of a file that was not finished, by the library's reader."""
    found = []
    with file.open("rb") as stream, contextlib.suppress(EndOfFile, struct.error):
        reader = NonSeekingReader(stream, validate_crcs=True)
        for _, _, message in reader.iter_messages(log_time_order=False):
            found.append(message.data)
    return found


def received(path: str, channels: Channels, names: list[str], file: Path, *words: str) -> list[Any]:
    """What a replay sends to channels that are there, as (name, bytes)."""
    got = []
    with contextlib.ExitStack() as stack:
        readers = {}
        for name in names:
            found: Any = channels.open(name)
            found._type = None
            readers[name] = stack.enter_context(found.reader())
        done = commands.run("channel", "replay", "-S", path, str(file), *words)
        assert done.returncode == 0, done.stderr
        for name, reader in readers.items():
            while (message := reader.get(timeout=0)) is not None:
                got.append((name, message))
    return got


def foreign(file: Path, **how: Any) -> None:
    """A file of another program: three topics, ten seconds."""
    with file.open("wb") as stream:
        writer: Any = Writer(stream, **how)
        writer.start("ros2")
        image = writer.register_schema("sensor_msgs/msg/Image", "ros2msg", b"uint8[] data")
        point = writer.register_schema("Point", "jsonschema", b"{}")
        frames = writer.register_channel("/camera/front", "cdr", image)
        points = writer.register_channel("/points\n" + "x" * 80, "json", point)
        again = writer.register_channel("/camera/front", "json", point)
        for i in range(10):
            writer.add_message(frames, i * SECOND, bytes([i]) * 5000, i * SECOND)
        writer.add_message(points, 5 * SECOND, b'{"x": 1}', 5 * SECOND)
        writer.add_message(again, 6 * SECOND, b"{}", 6 * SECOND)
        writer.finish()


# -- there and back -------------------------------------------------------------------------------


def test_there_and_back(socket_path: str, channels: Channels, directory: Path) -> None:
    """All facts of channels come back, in a region that does not have them."""
    file = directory / "a.mcap"
    frames = channels.create_messages(
        "frames", dtype="<f4", shape=(None, 3), limit=120, slots=4, writers=2, loans=2, times=True
    )
    state = channels.create_value("state", limit=100, readers=3, schema="state v2")
    channels.create_queue("jobs", limit=8)
    with frames.writer() as writer, state.writer() as setter:
        with recording(channels, socket_path, file, readers=2) as process:
            for i in range(3):
                writer.put(numpy.full((2, 3), i, "<f4"))
            setter.put(b"ready")
            late = channels.create_messages("late", limit=8, overflow="discard")
            until(lambda: read_by(channels) == 3)
            with late.writer() as third:
                third.put(b"late")
            said = ended(process)
    assert said == f"ivshmem: {file}: 5 messages of 3 channels recorded, 81 bytes; 0 lost\n"
    before = {info.name: info for info in channels.list()}
    facts = {name: dict(channels.open(name)._facts) for name in before}
    with file.open("rb") as stream:
        found = list(make_reader(stream).iter_messages())
    for _, topic, message in found:
        spread = message.log_time - message.publish_time
        assert 0 <= spread < PATIENCE * SECOND
        assert (spread > 0) == (topic.topic == "frames")  # whose times are kept
    assert {schema.name: schema.data for schema, _, _ in found if schema} == {
        "array <f4 ?x3": b'{"dtype": "<f4", "shape": [-1, 3]}',
        "state v2": b"",
    }
    assert [message.sequence for _, topic, message in found if topic.topic == "frames"] == [0, 1, 2]
    for name in before:
        channels.remove(name)
    run_quietly(socket_path, "replay", str(file), "--speed", "inf")
    channels.open("frames", "messages", dtype="<f4", shape=(None, 3))
    for name in ("frames", "late", "state"):
        again = dict(channels.open(name)._facts)
        for what in ("index", "created", "state"):  # which say which record it has
            del facts[name][what], again[what]
        assert again == facts[name]
    sent = received(socket_path, channels, ["frames", "late"], file)
    assert sent == [
        *(("frames", numpy.full((2, 3), i, "<f4").tobytes()) for i in range(3)),
        ("late", b"late"),
    ]
    assert run(socket_path, "cat", "state") == "ready"


def run_quietly(path: str, *words: str) -> str:
    done = commands.run("channel", words[0], "-S", path, *words[1:])
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    return done.stderr


def test_the_file_says_what_was_lost(socket_path: str, channels: Channels, directory: Path) -> None:
    """A recorder that is stopped does not hold up the writer, and counts what it lost."""
    file = directory / "a.mcap"
    messages = channels.create_messages("log", limit=8, slots=4)
    with messages.writer() as writer:
        with recording(channels, socket_path, file, "log", "--json") as process:
            process.send_signal(signal.SIGSTOP)
            for i in range(100):
                writer.put(b"%d" % i, timeout=0)
            process.send_signal(signal.SIGCONT)
            until(lambda: channels.list()[0].readers[0].waiting == 0)
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=PATIENCE)
    assert errors == b""
    said = json.loads(output)
    assert said["messages"] + said["lost"]["log"] == 100
    assert said["lost"]["log"] >= 90
    with file.open("rb") as stream:
        (metadata,) = make_reader(stream).iter_metadata()
    assert metadata.name == "ivshmem.recording"
    assert metadata.metadata == {
        "messages": str(said["messages"]),
        "lost": str(said["lost"]["log"]),
        "lost of log": str(said["lost"]["log"]),
    }


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_compression(
    socket_path: str, channels: Channels, directory: Path, compression: str
) -> None:
    file = directory / "a.mcap"
    messages = channels.create_messages("log", limit=100_000, slots=4)
    with messages.writer() as writer:
        with recording(channels, socket_path, file, "--compression", compression) as process:
            writer.put(bytes(100_000))
            ended(process)
    assert file.stat().st_size < 5000
    assert stored(file) == [("log", bytes(100_000))]
    assert received(socket_path, channels, ["log"], file) == [("log", bytes(100_000))]


def test_a_removed_channel_comes_back(
    socket_path: str, channels: Channels, directory: Path
) -> None:
    file = directory / "a.mcap"
    for i in range(2):
        messages = channels.create_messages("log", limit=8)
        if not i:
            process = started(socket_path, "record", str(file), "log")
        until(lambda: read_by(channels))
        with messages.writer() as writer:
            writer.put(b"%d" % i)
        until(lambda: channels.list()[0].readers[0].waiting == 0)
        channels.remove("log", force=True)
    with process:
        assert "2 messages of 1 channel recorded" in ended(process)
    assert stored(file) == [("log", b"0"), ("log", b"1")]


# -- pace -----------------------------------------------------------------------------------------


def test_pace(socket_path: str, channels: Channels, directory: Path) -> None:
    """Twenty times as fast: half a second instead of ten."""
    file = directory / "a.mcap"
    foreign(file)
    begun = time.monotonic()
    run_quietly(socket_path, "replay", str(file), "--speed", "20")
    assert 0.45 <= time.monotonic() - begun < PATIENCE


@pytest.mark.parametrize(
    ("words", "sent"),
    [
        ("--from 8", [8, 9]),
        ("--to 1", [0, 1]),
        ("--from 1970-01-01T00:00:02Z --to 1970-01-01T01:00:03.5+01:00", [2, 3]),
        ("--from 6.5 --to 7.5", [7]),
    ],
)
def test_a_part(
    socket_path: str, channels: Channels, directory: Path, words: str, sent: list[int]
) -> None:
    file = directory / "a.mcap"
    foreign(file)
    run_quietly(socket_path, "replay", str(file), "--speed", "inf")
    got = received(socket_path, channels, ["/camera/front"], file, "--speed", "inf", *words.split())
    assert [message[0] for _, message in got] == sent


def test_loop(socket_path: str, channels: Channels, directory: Path) -> None:
    file = directory / "a.mcap"
    foreign(file)
    run_quietly(socket_path, "replay", str(file), "--speed", "inf")
    words = ("--loop", "--speed", "1000", "--from", "8")
    with channels.open("/camera/front").reader() as reader:  # type: ignore[attr-defined]
        with started(socket_path, "replay", str(file), *words) as process:
            got = [reader.get(timeout=PATIENCE)[0] for _ in range(6)]
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=PATIENCE)
            assert process.returncode == 130
    assert got == [8, 9, 8, 9, 8, 9]


# -- files of others ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"compression": CompressionType.LZ4, "chunk_size": 100},
        {"use_chunking": False},
        {"repeat_channels": False, "compression": CompressionType.NONE},
        {"use_statistics": False},
        {"enable_crcs": False},
    ],
    ids=str,
)
def test_files_of_others(
    socket_path: str, channels: Channels, directory: Path, how: dict[str, Any]
) -> None:
    file = directory / "a.mcap"
    foreign(file, **how)
    said = run_quietly(socket_path, "replay", str(file), "--speed", "inf")
    first, second, last = said.splitlines()
    assert first.startswith("ivshmem: topic '/points\\nxxx")
    assert second == "ivshmem: topic '/camera/front' becomes channel '/camera/front~3'"
    assert last == f"ivshmem: {file}: 12 messages sent"
    front, other, points = channels.list()
    assert (front.name, front.type) == ("/camera/front", "schema sensor_msgs/msg/Image ros2msg")
    assert (front.kind, front.limit) == ("messages", 5000)
    assert (other.name, other.type) == ("/camera/front~3", "schema Point jsonschema")
    assert points.name.startswith("/points_xxx")
    assert len(points.name) == 63
    got = received(socket_path, channels, ["/camera/front", points.name], file, "--speed", "inf")
    assert got == [
        *(("/camera/front", bytes([i]) * 5000) for i in range(10)),
        (points.name, b'{"x": 1}'),
    ]


def test_a_channel_that_does_not_fit(socket_path: str, channels: Channels, directory: Path) -> None:
    file = directory / "a.mcap"
    foreign(file)
    name = "/camera/front"
    for create, there in (
        ({"limit": 5000}, "without a type, messages of 5000 bytes at most"),
        (
            {"limit": 4999, "schema": "sensor_msgs/msg/Image ros2msg"},
            "of type 'schema sensor_msgs/msg/Image ros2msg', messages of 4999 bytes at most",
        ),
    ):
        channels.create_messages(name, **create)
        said = run(socket_path, "replay", str(file), status=1)
        assert said == (
            f"channel '{name}' is there, of kind messages {there}, and the file has of kind"
            " messages of type 'schema sensor_msgs/msg/Image ros2msg', messages of 5000 bytes at"
            " most: remove the channel (`ivshmem channel rm`), or replay into another region"
        )
        channels.remove(name)


@pytest.mark.parametrize("how", ["no room", "another kind", "nothing to send"])
def test_a_replay_that_fails_leaves_no_channels(
    socket_path: str, channels: Channels, directory: Path, how: str
) -> None:
    """Which it made; those that were there stay."""
    file = directory / "a.mcap"
    foreign(file)
    words = ["replay", str(file), "--speed", "inf"]
    there: list[str] = []
    if how == "no room":
        with file.open("wb") as stream:
            writer: Any = Writer(stream)
            writer.start()
            for i, data in enumerate((b"small", bytes(5 << 20))):
                topic = writer.register_channel(f"topic {i}", "", 0)
                writer.add_message(topic, i * SECOND, data, i * SECOND)
            writer.finish()
    elif how == "another kind":
        there = ["/camera/front~3"]
        channels.create_queue(there[0], limit=8)
    else:
        words += ["--from", "99", "--loop"]
    assert commands.run("channel", words[0], "-S", socket_path, *words[1:]).returncode == 1
    assert [info.name for info in channels.list()] == there


# -- files that end early -------------------------------------------------------------------------


def test_sigkill_of_the_recorder(socket_path: str, channels: Channels, directory: Path) -> None:
    """What was published more than a second before is in the file."""
    file = directory / "a.mcap"
    messages = channels.create_messages("log", limit=8, slots=64)
    with messages.writer() as writer:
        with recording(channels, socket_path, file) as process:
            for i in range(10):
                writer.put(b"%d" % i)
            until(lambda: len(salvaged(file)) == 10)
            process.kill()
    expected = [b"%d" % i for i in range(10)]
    assert salvaged(file) == expected
    with file.open("ab") as stream:
        stream.write(b"\x06" + b"\xff\0\0\0\0\0\0\0" + b"half a chunk")  # killed in a write
    assert salvaged(file) == expected
    with messages.reader() as reader:
        said = run_quietly(socket_path, "replay", str(file))
        assert [reader.get(timeout=0) for _ in range(10)] == expected
    first, second = said.splitlines()
    assert first == f"ivshmem: {file}: it ends in the middle: what comes before is replayed"
    assert second == f"ivshmem: {file}: 10 messages sent"


def test_sigkill_of_the_player(socket_path: str, channels: Channels, directory: Path) -> None:
    """The next one sends to the same channels."""
    file = directory / "a.mcap"
    foreign(file)
    with started(socket_path, "replay", str(file), "--speed", "5") as process:
        until(lambda: any(info.published for info in channels.list()))
        process.kill()
    got = received(socket_path, channels, ["/camera/front"], file, "--speed", "inf")
    assert len(got) == 10


@pytest.mark.sampled(8)
@pytest.mark.parametrize("share", [i / 16 for i in range(16)])
def test_a_file_that_was_cut(
    socket_path: str, channels: Channels, directory: Path, share: float
) -> None:
    """Wherever it was cut: whole messages from the beginning, and nothing else."""
    whole, file = directory / "whole.mcap", directory / "a.mcap"
    foreign(whole, chunk_size=9000, compression=CompressionType.NONE)
    data = whole.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])
    done = commands.run("channel", "replay", "-S", socket_path, str(file), "--speed", "inf")
    if share == 0:
        assert done.returncode == 1
        (*_, line) = done.stderr.splitlines()
        assert "not an MCAP file" in line
    else:
        assert done.returncode == 0, done.stderr
        assert "it ends in the middle" in done.stderr
        assert done.stderr.endswith(f": {counted(len(salvaged(file)), 'message')} sent\n")


@pytest.mark.parametrize(
    ("offset", "reason"),
    [
        (1 << 62, "its index or a record leads past the end of the file"),
        ((1 << 64) - 1, "its index or a record leads past the end of the file"),
        (None, "a checksum is wrong"),
    ],
    ids=str,
)
def test_a_damaged_file(
    socket_path: str, channels: Channels, directory: Path, offset: int | None, reason: str
) -> None:
    """One line says which file, and why; what comes before can be replayed.

    Args:
        offset: of the last chunk, in the index; None: a byte of the chunk is another one.
    """
    file = directory / "a.mcap"
    with file.open("wb") as stream:
        writer: Any = Writer(stream, chunk_size=100, compression=CompressionType.NONE)
        writer.start()
        metadata = metadata_of(channels.create_messages("log", limit=100)._facts)
        topic = writer.register_channel("log", "", 0, metadata)
        for i in range(10):
            writer.add_message(topic, i * SECOND, bytes(80), i * SECOND)
        writer.finish()
    data = bytearray(file.read_bytes())
    with file.open("rb") as stream:
        summary = make_reader(stream).get_summary()
    assert summary is not None
    last = max(summary.chunk_indexes, key=lambda chunk: chunk.message_start_time)
    if offset is None:
        data[last.chunk_start_offset + 100] ^= 1
    else:
        at = data.rindex(struct.pack("<Q", last.chunk_start_offset))
        data[at : at + 8] = struct.pack("<Q", offset)
    file.write_bytes(data)
    done = commands.run("channel", "replay", "-S", socket_path, str(file), "--speed", "inf")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"ivshmem: {file}: damaged: {reason}: replay an undamaged copy, or the part before the"
        " damage (--to)"
    )
    said = run_quietly(socket_path, "replay", str(file), "--speed", "inf", "--to", "5")
    assert said == f"ivshmem: {file}: 6 messages sent\n"


def test_a_damaged_file_of_others(socket_path: str, channels: Channels, directory: Path) -> None:
    """What comes before is replayed, also if the file has an index."""
    file = directory / "a.mcap"
    foreign(file, chunk_size=9000, compression=CompressionType.NONE)
    data = bytearray(file.read_bytes())
    data[data.rindex(bytes([9]) * 5000)] ^= 1
    file.write_bytes(data)
    said = run_quietly(socket_path, "replay", str(file), "--speed", "inf")
    assert re.search("a.mcap: it is damaged at byte [0-9]+: what comes before is replayed", said)
    assert said.endswith(": 8 messages sent\n")


@pytest.mark.skipif(not root, reason="mounts a file system: run it as root")
def test_a_full_disk(socket_path: str, channels: Channels) -> None:
    """The recorder ends with one line, and the file has everything before."""
    messages = channels.create_messages("log", limit=100_000, slots=4, writers=1, readers=1)
    with mounted("tmpfs", "size=3M") as small, messages.writer() as writer:
        file = small / "a.mcap"
        with recording(channels, socket_path, file, "--json") as process:
            for i in range(100):
                if process.poll() is not None:
                    break
                writer.put(bytes([i]) * 100_000)
                until(lambda: not waiting(channels) or process.poll() is not None)
            output, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 1
        (line,) = errors.decode().splitlines()
        assert line == (
            f"ivshmem: {file}: no space left on device: free some space, or choose another file"
            " system"
        )
        said = json.loads(output)
        assert said["messages"] >= 20
        assert said["unwritten"] + said["lost"]["log"] > 0
        assert salvaged(file) == [bytes([i]) * 100_000 for i in range(said["messages"])]


def test_an_index_that_has_no_place(
    channels: Channels, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is counted is what is in the file: a chunk, also if its index is not."""
    messages = channels.create_messages("log", limit=100, slots=8)
    file = directory / "a.mcap"
    real = Sink.write
    refused: list[bytes] = []

    def write(sink: Sink, data: bytes) -> int:
        if data[:1] == b"\x07" or refused:  # an index of messages, and what follows it
            refused.append(data)
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        return real(sink, data)

    monkeypatch.setattr(Sink, "write", write)
    with messages.writer() as writer:
        recorder = Recorder(channels, str(file), tell=print, flush=0.01)
        writer.put(b"message")
        until(lambda: recorder.error)
        with pytest.raises(OSError, match="No space"):
            recorder.close()
    assert salvaged(file) == [b"message"]
    assert (recorder.messages, recorder.bytes, recorder.unwritten) == (1, 7, 0)


def test_a_value_s_content_is_recorded(
    socket_path: str, channels: Channels, directory: Path
) -> None:
    """It was set before, and belongs to the state that a replay brings back."""
    file = directory / "a.mcap"
    state = channels.create_value("state", limit=100)
    with state.writer() as writer:
        writer.put(b"ready")
        with recording(channels, socket_path, file) as process:
            until(lambda: file.exists())
            ended(process)
    assert stored(file) == [("state", b"ready")]
    state.remove()
    assert commands.run("channel", "replay", "-S", socket_path, str(file)).returncode == 0
    found: Any = channels.open("state")
    with found.reader() as reader:
        assert reader.get() == b"ready"


def test_topics_without_messages(socket_path: str, channels: Channels, directory: Path) -> None:
    """Another program's file does not say how large they can be: replay creates no channel."""
    file = directory / "a.mcap"
    with file.open("wb") as stream:
        writer: Any = Writer(stream)
        writer.start("ros2")
        used, _ = (writer.register_channel(name, "json", 0) for name in ("/used", "/unused"))
        writer.add_message(used, SECOND, b"", SECOND)
        writer.finish()
    done = commands.run("channel", "replay", "-S", socket_path, str(file))
    assert done.returncode == 0, done.stderr
    assert [info.name for info in channels.list()] == ["/used"]


# -- wrong use ------------------------------------------------------------------------------------


def test_wrong_use(socket_path: str, channels: Channels, directory: Path) -> None:
    file = directory / "a.mcap"
    channels.create_queue("jobs", limit=8)
    channels.create_messages("strict", limit=8, overflow="block")
    said = run(socket_path, "record", str(file), "jobs", status=1)
    assert (
        said == "channel 'jobs' is of kind queue: recorded can be those of kind messages and value"
    )
    said = run(socket_path, "record", str(file), "strict", status=1)
    assert said.startswith("channel 'strict' lets its readers only block")
    assert not file.exists()
    file.write_bytes(b"x")
    run(socket_path, "record", str(file), "strict", "--force", status=1)
    assert file.read_bytes() == b"x"
    fifo = directory / "fifo"
    os.mkfifo(fifo)
    channels.create_messages("log", limit=8)
    said = run(socket_path, "record", str(fifo), "log", "--force", status=1)
    assert said == f"{fifo}: it is not a regular file: choose another path"
    read, write = os.pipe()
    with open(read, "rb"), open(write, "wb"):
        path = f"/proc/self/fd/{read}"
        with pytest.raises(OSError, match="not a regular file, in which one can go back"):
            RecordedFile(path, lambda _: None)
    for words, said in (
        (("record", str(file)), f"{file}: file exists: choose another path, or write over it with"
         " --force"),
        (("record", str(directory / "none" / "a")), f"{directory}/none/a: its directory does not"
         " exist: create that first, or choose another path"),
        (("record", str(directory), "--force"), f"{directory}: it is a directory: give a file in"
         " that directory"),
        (("replay", str(directory)), f"{directory}: it is a directory: give a file in that"
         " directory"),
        (("replay", str(directory / "none")), f"{directory}/none: no such file: give the path of a"
         " recording"),
    ):  # fmt: skip
        assert run(socket_path, *words, status=1) == said
    assert run(socket_path, "replay", str(file), status=1) == f"{file}: not an MCAP file"
    foreign(file)
    for more, said in (
        ("--from x", "'x': seconds from the start (12.5), or a time with its zone"),
        ("--from 3 --to 2", "--to is before --from"),
        ("--from 99 --loop", f"{file}: no message of these times"),
    ):
        assert (
            commands.run(
                "channel", "replay", "-S", socket_path, str(file), "--speed", "inf", *more.split()
            )
            .stderr.splitlines()[-1]
            .startswith(f"ivshmem: {said}")
        )


def test_without_the_library(socket_path: str, channels: Channels, directory: Path) -> None:
    code = (
        "import sys, importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'mcap' else find(name, *a)\n"
        "from ivshmem.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    for command in ("record", "replay"):
        words = ("channel", command, "-S", socket_path, str(directory / "a.mcap"))
        done = subprocess.run(
            [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (
            1,
            "ivshmem: recordings need the library mcap: pip install mcap\n",
        )
    assert not (directory / "a.mcap").exists()


def test_a_channel_that_cannot_be_read_is_told_of(
    socket_path: str, channels: Channels, directory: Path
) -> None:
    """The others are recorded."""
    file = directory / "a.mcap"
    channels.create_messages("strict", limit=8, overflow="block")
    messages = channels.create_messages("log", limit=8)
    with messages.writer() as writer, recording(channels, socket_path, file) as process:
        writer.put(b"x")
        first, second = ended(process).splitlines()
    assert first.startswith("ivshmem: not recorded: channel 'strict' lets its readers only block")
    assert second.endswith("1 message of 1 channel recorded, 1 byte; 0 lost")
    assert stored(file) == [("log", b"x")]


def test_the_bar_of_a_replay(socket_path: str, channels: Channels, directory: Path) -> None:
    """It grows with the time of the recording, not with the number of its messages."""
    file = directory / "a.mcap"
    foreign(file)
    with contextlib.closing(Output("terminal")) as output:
        command = ["replay", str(file), "--speed", "10"]
        with started(socket_path, *command, stderr=output.end) as process:
            said = b""
            while b"messages sent" not in said:
                said += output.read_on()
            assert process.wait(PATIENCE) == 0
    shown = re.findall(rb"\r\[(#*)(\.*)\] +(\d+)%  (\d+) message", said)
    shares = [int(share) for _, _, share, _ in shown]
    assert shares == sorted(shares)
    assert len(set(shares)) > 3
    assert shares[0] < 30 < 60 < shares[-1]
    for full, empty, share, sent in shown:
        assert len(full) + len(empty) == 24
        assert abs(len(full) / 24 - int(share) / 100) < 0.03
        assert int(share) // 10 <= int(sent)


@pytest.mark.nightly
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_progress_on_a_terminal_that_nobody_reads(
    socket_path: str, channels: Channels, directory: Path, number: int
) -> None:
    """A recorder records on, and a signal ends it with a whole file; a replay runs to its end."""
    file = directory / "a.mcap"
    log = channels.create_messages("log", limit=8, slots=64)
    with log.writer() as writer, contextlib.closing(Output("terminal, Ctrl-S")) as output:
        with started(socket_path, "record", str(file), stderr=output.end) as process:
            until(lambda: read_by(channels) == 1)
            until(lambda: b"0 messages" in output.read_on())
            output.block()
            for count in range(50):
                writer.put(b"%d" % count)
            until(lambda: waiting(channels) == 0)
            process.send_signal(number)
            assert process.wait(PATIENCE) == 0
        assert stored(file) == [("log", b"%d" % count) for count in range(50)]
        with log.reader("block") as reader:
            with started(socket_path, "replay", str(file), stderr=output.end) as process:
                assert [reader.get(PATIENCE) for _ in range(50)] == [b"%d" % n for n in range(50)]
                assert process.wait(PATIENCE) == 0
