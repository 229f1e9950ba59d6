"""`ivshmem channel tail`, `call`, `hz`, `bw` and `top`: what they print, and that nobody waits."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
from support import commands
from support.channel_commands import run, started
from support.waiting import PATIENCE, until

import ivshmem
from ivshmem import Server, channel
from ivshmem.channel import Channels, Messages, Value

pytestmark = pytest.mark.usefixtures("commands")


@pytest.fixture
def channels(socket_path: str) -> Iterator[Channels]:
    """Those of a server's region, as a client uses them."""
    with Server(socket_path, "2M", channels="1M").start():
        with ivshmem.connect(socket_path, timeout=PATIENCE) as client:
            with channel.open(client, name="a test") as channels:
                yield channels


@contextlib.contextmanager
def writing(found: Messages | Value, data: bytes = b"x" * 100) -> Iterator[Callable[[], int]]:
    """A thread that writes to a channel; how many messages it wrote."""
    ended = threading.Event()
    count = 0

    def write() -> None:
        nonlocal count
        with found.writer() as writer:
            while not ended.wait(0.001):
                writer.put(data, timeout=PATIENCE)
                count += 1

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield lambda: count
    finally:
        ended.set()
        thread.join()


def readers(channels: Channels) -> int:
    return sum(len(info.readers) for info in channels.list())


@contextlib.contextmanager
def following(
    channels: Channels, path: str, *words: str, stdout: int = subprocess.PIPE
) -> Iterator[subprocess.Popen[bytes]]:
    """A command that has opened its reader."""
    with started(path, *words, stdout=stdout) as process:
        until(lambda: readers(channels) or process.poll() is not None)
        yield process


def lines_of(process: subprocess.Popen[bytes]) -> list[bytes]:
    """What a command printed until its end, which is no failure."""
    output, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, errors) == (0, b"")
    return output.splitlines()


# -- tail -----------------------------------------------------------------------------------------


def test_tail_begins_now(socket_path: str, channels: Channels) -> None:
    messages = channels.create_messages("log", limit=8)
    with messages.writer() as writer:
        writer.put(b"before")
        with following(channels, socket_path, "tail", "log", "-n", "2", "--lines") as process:
            writer.put(b"one")
            writer.put(b"\xff\0")
            assert lines_of(process) == [b"one", b"\xff\0"]
    assert readers(channels) == 0


def test_tail_as_json(socket_path: str, channels: Channels) -> None:
    messages = channels.create_messages("log", limit=8, times=True)
    with messages.writer() as writer:
        writer.put(b"before")
        with following(channels, socket_path, "tail", "log", "-n", "1", "--json") as process:
            writer.put(b"a\xff\n")
            (line,) = lines_of(process)
    seen = json.loads(line)
    assert seen.pop("time") > 1e9
    assert seen == {"data": {"base64": "Yf8K"}, "writer": 0, "position": 1, "size": 3, "lost": 0}


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("form", "shown", "value"),
    [
        (None, [b"[[1. 2.]", b" [3. 4.]]"], [[1.0, 2.0], [3.0, 4.0]]),
        (
            "hex",
            [b"00 00 80 3f 00 00 00 40 00 00 40 40 00 00 80 40"],
            "0000803f000000400000404000008040",
        ),
    ],
)
def test_tail_of_arrays(
    socket_path: str, channels: Channels, form: str | None, shown: list[bytes], value: Any
) -> None:
    messages = channels.create_messages("frames", dtype="<f4", shape=(2, 2))
    array = numpy.array([[1, 2], [3, 4]], "<f4")
    words = ("tail", "frames", "-n", "1", *(("--as", form) if form else ()))
    with messages.writer() as writer:
        with following(channels, socket_path, *words) as process:
            writer.put(array)
            assert lines_of(process) == shown
        with following(channels, socket_path, *words, "--json") as process:
            writer.put(array)
            assert json.loads(lines_of(process)[0])["data"] == value


def test_tail_of_a_message_that_is_no_array(socket_path: str, channels: Channels) -> None:
    """A program in C can send any size: the bytes are shown, and the command goes on."""
    messages = channels.create_messages("frames", dtype="<f4", shape=(2, 2))
    with following(channels, socket_path, "tail", "frames", "-n", "1") as process:
        messages._type = None
        with messages.writer() as writer:
            writer.put(b"abc")
        assert lines_of(process) == [b"61 62 63"]


def test_tail_of_a_value(socket_path: str, channels: Channels) -> None:
    value = channels.create_value("state", limit=8)
    with value.writer() as writer:
        writer.put(b"before")
        with following(channels, socket_path, "tail", "state", "-n", "1") as process:
            writer.put(b"ready")
            assert lines_of(process) == [b"ready"]


def test_tail_on_a_terminal(socket_path: str, channels: Channels) -> None:
    messages = channels.create_messages("log", limit=100)
    ours, theirs = pty.openpty()
    with messages.writer() as writer:
        with following(channels, socket_path, "tail", "log", "-n", "1", stdout=theirs) as process:
            writer.put(b"\x1b[2Jx\n")
            assert process.wait(PATIENCE) == 0
    os.close(theirs)
    assert os.read(ours, 100) == b"\\x1b[2Jx\r\n"
    os.close(ours)


def test_tail_that_is_stopped_loses(socket_path: str, channels: Channels) -> None:
    """The writer goes on at once, and the command says how many it lost."""
    messages = channels.create_messages("log", limit=8, slots=4)
    with messages.writer() as writer:
        with following(channels, socket_path, "tail", "log", "--lines", "-n", "2") as process:
            writer.put(b"first")
            assert process.stdout is not None
            assert process.stdout.readline() == b"first\n"
            process.send_signal(signal.SIGSTOP)
            for i in range(20):
                writer.put(b"%d" % i, timeout=0)
            process.send_signal(signal.SIGCONT)
            output, errors = process.communicate(timeout=PATIENCE)
            assert output in (b"16\n", b"17\n")  # one cell may be under the reader's eyes
            assert errors in (
                b"ivshmem: 16 messages lost: this command was too slow\n",
                b"ivshmem: 17 messages lost: this command was too slow\n",
            )


def test_tail_is_interrupted(socket_path: str, channels: Channels) -> None:
    channels.create_messages("log", limit=8)
    with following(channels, socket_path, "tail", "log") as process:
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=PATIENCE)
        assert (process.returncode, output, errors) == (130, b"", b"")
    assert readers(channels) == 0


# -- call -----------------------------------------------------------------------------------------


def test_call(socket_path: str, channels: Channels) -> None:
    calls = channels.create_calls("upper", limit=100)
    with calls.server() as server:
        thread = threading.Thread(target=server.serve, args=(bytes.upper, 1))
        thread.start()
        assert run(socket_path, "call", "upper", "hello") == "HELLO"
        assert run(socket_path, "call", "upper", input="words\n") == "WORDS\n"
        assert run(socket_path, "call", "upper", "jk", "--as", "hex") == "4a 4b\n"
        reply = json.loads(run(socket_path, "call", "upper", "x", "--json"))
        assert reply["reply"] == "X"
        assert 0 < reply["seconds"] < PATIENCE
        thread.join()


def test_call_fails(socket_path: str, channels: Channels) -> None:
    calls = channels.create_calls("upper", limit=100)
    said = run(socket_path, "call", "upper", "x", status=3)
    assert said == "channel 'upper': no server is at work that could reply"
    with calls.server() as server:
        said = run(socket_path, "call", "upper", "x", "-t", "0.05", status=5)
        assert said == "call of 'upper': no reply in 0.05 s; no server has begun with it"
        thread = threading.Thread(target=fail_once, args=(server,))
        thread.start()
        said = run(socket_path, "call", "upper", "x", status=1)
        assert said == "call of 'upper': the server failed: not today"
        thread.join()
    said = run(socket_path, "call", "none", "x", status=1)
    assert said == "no channel 'none' (there: upper)"


def fail_once(server: channel.CallServer) -> None:
    call = server.take(timeout=PATIENCE)
    while call is not None and call.size == 0:
        call = server.take(timeout=PATIENCE)
    assert call is not None
    call.fail("not today")


def test_the_server_of_a_call_is_lost(socket_path: str, channels: Channels) -> None:
    calls = channels.create_calls("upper", limit=100)
    server = calls.server()
    with started(socket_path, "call", "upper", "x") as process:
        call = server.take(timeout=PATIENCE)
        server.close()
        output, errors = process.communicate(timeout=PATIENCE)
        assert (process.returncode, output) == (4, b"")
        assert b"the server that had begun with it is gone" in errors
    del call


# -- hz and bw ------------------------------------------------------------------------------------


def test_hz(socket_path: str, channels: Channels) -> None:
    messages = channels.create_messages("log", limit=100)
    value = channels.create_value("state", limit=100)
    channels.create_messages("idle", limit=100)
    with writing(messages), writing(value):
        said = run(socket_path, "hz", "log", "state", "idle", "-n", "2", "-i", "0.1")
    lines = said.splitlines()
    assert [line.split(":")[0] for line in lines] == ["log", "state", "idle"] * 2
    assert lines[2] == lines[5] == "idle: no new messages"
    for line in lines[3:5]:
        assert re.fullmatch(
            r"\w+: [\d.]+/s, interval min [\d.]+ [mu]?s, max [\d.]+ [mu]?s, std dev [\d.]+ [mu]?s,"
            r" window \d+(, \d+ not seen)?",
            line,
        )
    assert readers(channels) == 0


def test_hz_counts_what_it_does_not_see(socket_path: str, channels: Channels) -> None:
    """The rate is the writer's also if most messages are overwritten before they are seen."""
    messages = channels.create_messages("log", limit=8, slots=2)
    with messages.writer() as writer:
        with following(channels, socket_path, "hz", "log", "--json", "-i", "0.1") as process:
            assert process.stdout is not None
            seen: dict[str, Any] = {"lost": 0}
            while not seen["lost"] or seen["rate"] is None:
                for _ in range(5000):
                    writer.put(b"x", timeout=0)
                seen = json.loads(process.stdout.readline())
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=PATIENCE)
    assert seen["channel"] == "log"
    assert seen["rate"] > seen["window"]  # messages of a tenth of a second and what was lost


def test_bw(socket_path: str, channels: Channels) -> None:
    messages = channels.create_messages("log", limit=100)
    with writing(messages, b"x" * 100):
        said = run(socket_path, "bw", "log", "-n", "1", "-i", "0.2")
        facts = json.loads(run(socket_path, "bw", "log", "-n", "1", "-i", "0.2", "--json"))
    assert re.fullmatch(
        r"log: [\d.]+ ?(K|bytes)/s, [\d.]+/s, message mean 100 bytes, min 100 bytes, max 100 bytes,"
        r" window \d+\n",
        said,
    )
    assert facts["size"] == {"mean": 100.0, "min": 100, "max": 100}
    assert facts["bandwidth"] == pytest.approx(100 * facts["rate"])


def test_hz_takes_nothing_from_a_queue(socket_path: str, channels: Channels) -> None:
    queue = channels.create_queue("jobs", limit=8)
    with (
        queue.writer() as writer,
        started(socket_path, "hz", "jobs", "--json", "-i", "0.1") as process,
    ):
        assert process.stdout is not None
        facts = json.loads(process.stdout.readline())
        assert facts["rate"] == facts["done"] == 0
        for _ in range(3):
            writer.put(b"x", timeout=0)
        while not facts["rate"]:
            facts = json.loads(process.stdout.readline())
        while facts["waiting"] != 3:
            facts = json.loads(process.stdout.readline())
        with queue.reader() as reader:
            reader.get(timeout=0)
        while not facts["done"]:
            facts = json.loads(process.stdout.readline())
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=PATIENCE)
    assert channels.list()[0].unfinished == 2


def test_a_channel_that_only_blocks(socket_path: str, channels: Channels) -> None:
    """It is not watched by a reader that blocks, but can be through memory that is only read."""
    messages = channels.create_messages("log", limit=100, overflow="block")
    for command in ("tail", "hz", "bw"):
        said = run(socket_path, command, "log", status=1)
        assert said.startswith("channel 'log' lets its readers only block, so that watching would")
    with writing(messages):
        assert run(socket_path, "tail", "log", "--readonly", "-n", "1") == "x" * 100
        said = run(socket_path, "hz", "log", "--readonly", "-n", "1", "-i", "0.1")
    assert "interval min" in said


def test_a_channel_that_is_removed(socket_path: str, channels: Channels) -> None:
    channels.create_messages("log", limit=100)
    with following(channels, socket_path, "hz", "log", "-i", "0.1") as process:
        channels.remove("log", force=True)
        _, errors = process.communicate(timeout=PATIENCE)
        assert (process.returncode, errors) == (1, b"ivshmem: channel 'log' was removed\n")


# -- top ------------------------------------------------------------------------------------------


def test_top(socket_path: str, channels: Channels) -> None:
    messages = channels.create_messages("log", limit=100)
    channels.create_bytes("shell", connections=1)
    with writing(messages):
        said = run(socket_path, "top", "-n", "2", "-i", "0.1")
        facts = json.loads(run(socket_path, "top", "--json", "-n", "1", "-i", "0.1"))
    first, second = said.strip("\n").split("\n\n")
    for table in first, second:
        head, log, shell = table.splitlines()
        assert head.split() == ["NAME", "KIND", "RATE", "LOST/S", "WAITING", "WRITERS", "READERS"]
        assert re.fullmatch(r"log +messages +[\d.]+/s +0/s +0 +1 +0", log)
        assert shell.split() == ["shell", "bytes", "-", "-", "0", "0", "0"]
    log = facts["channels"][0]
    assert log["rate"] > 0
    assert log["published"] > 0


def test_top_on_a_terminal(socket_path: str, channels: Channels) -> None:
    messages = channels.create_messages("log", limit=100)
    ours, theirs = pty.openpty()
    shown = b""
    with writing(messages):
        process = subprocess.Popen(
            [sys.executable, "-m", "ivshmem", "channel", "top", "-S", socket_path, "-i", "0.1"],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "TERM": "xterm"},
        )
        while not re.search(rb"log +messages +[\d.]+/s", shown):
            shown += os.read(ours, 4096)
        os.write(ours, b"q")
        while b"\x1b[?1049l" not in shown:
            shown += os.read(ours, 4096)
        assert process.wait(PATIENCE) == 0
    os.close(theirs)
    os.close(ours)


def test_what_ended_writers_published_counts(socket_path: str, channels: Channels) -> None:
    messages = channels.create_messages("log", limit=8)
    for i in range(3):
        with messages.writer() as writer:
            writer.put(b"x")
        assert channels.list()[0].published == i + 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("tail jobs", "is a queue, whose messages each go to one reader"),
        ("tail log --as array", "has no dtype"),
        ("bw jobs", "its messages have to be taken to see their sizes"),
        ("hz shell", "only the two ends of a stream can count it"),
        ("tail shell", "is of kind bytes"),
        ("call log x", "is of kind messages, not calls"),
        ("hz none", "no channel 'none'"),
        ("tail log --guest --readonly", "--readonly is for a host"),
    ],
)
def test_wrong_use(socket_path: str, channels: Channels, words: str, said: str) -> None:
    channels.create_queue("jobs", limit=8)
    channels.create_messages("log", limit=8)
    channels.create_bytes("shell", connections=1)
    name, *others = words.split()
    if "--guest" in others:
        done = commands.run("channel", name, *others)
        assert (done.returncode, done.stdout) == (1, "")
        assert said in done.stderr
    else:
        assert said in run(socket_path, name, *others, status=1)


# -- a channel that is removed --------------------------------------------------------------------


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("messages", ("tail", "x")),
        ("messages", ("tail", "x", "-t", "60")),
        ("messages", ("cat", "x")),
        ("messages", ("hz", "x")),
        ("messages", ("bw", "x")),
        ("queue", ("cat", "x")),
        ("value", ("tail", "x")),
        ("value", ("cat", "x", "-n", "2")),
    ],
)
def test_a_channel_that_is_removed_by_force(
    socket_path: str, channels: Channels, kind: str, words: tuple[str, ...]
) -> None:
    """Who waits for it ends, and says so."""
    found = getattr(channels, f"create_{kind}")("x", limit=8)
    if kind == "value":
        with found.writer() as writer:
            writer.put(b"content")
    with started(socket_path, *words) as process:
        until(lambda: readers(channels))
        channels.remove("x", force=True)
        _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert errors == b"ivshmem: channel 'x' was removed\n"


def test_a_full_channel_that_is_removed_by_force(socket_path: str, channels: Channels) -> None:
    messages = channels.create_messages("x", limit=8, slots=1)
    with messages.reader("block"):
        with started(socket_path, "put", "x", "--lines", stdin=subprocess.PIPE) as process:
            assert process.stdin is not None
            process.stdin.write(b"one\ntwo\n")
            process.stdin.flush()
            until(lambda: channels.list()[0].published)
            channels.remove("x", force=True)
            _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert errors == b"ivshmem: channel 'x' was removed\n"


def test_a_call_whose_channel_is_removed_by_force(socket_path: str, channels: Channels) -> None:
    calls = channels.create_calls("x", limit=8)
    with calls.server(), started(socket_path, "call", "x", "question") as process:
        until(lambda: channels.list()[0].unfinished)
        channels.remove("x", force=True)
        _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert errors == b"ivshmem: channel 'x' was removed\n"
