"""`ivshmem channel`: what it prints, what it sends and receives, and how it fails."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import commands
from support.channel_commands import run, started
from support.channel_records import Record
from support.waiting import PATIENCE, until

import ivshmem
from ivshmem import Server, channel
from ivshmem.channel import Channels

pytestmark = pytest.mark.usefixtures("commands")


@pytest.fixture
def channels(socket_path: str) -> Iterator[Channels]:
    """Those of a server's region, as a client uses them."""
    with Server(socket_path, "2M", channels="1M").start():
        with ivshmem.connect(socket_path, timeout=PATIENCE) as client:
            with channel.open(client, name="a test") as channels:
                yield channels


# -- what there is --------------------------------------------------------------------------------


def test_ls(socket_path: str, channels: Channels) -> None:
    messages = channels.create_messages("frames", dtype="<f4", shape=(2, 3), slots=4)
    channels.create_bytes("shell", connections=2)
    with messages.writer() as writer, messages.reader("overwrite"), messages.reader("block"):
        writer.put_parts([bytes(24)])
        head, *rows = run(socket_path, "ls").splitlines()
        assert head.split()[:3] == ["NAME", "KIND", "TYPE"]
        assert rows[0].split()[:-1] == [
            *("frames", "messages", "array", "<f4", "2x3"),
            *("24", "bytes", "4", "1/4", "2/8", "1", "0"),
        ]
        assert rows[1].split()[:-1] == ["shell", "bytes", "-", "-", "65536", "0/2", "0/1", "0", "0"]
    (first, _) = json.loads(run(socket_path, "ls", "--json"))["channels"]
    assert (first["name"], first["slots"], first["writers"]) == ("frames", 4, [])


def test_ls_of_nothing(socket_path: str, channels: Channels) -> None:
    done = commands.run("channel", "ls", "-S", socket_path)
    assert (done.returncode, done.stdout) == (0, "")
    said = re.search("no channels yet: .*`ivshmem channel (put) NAME (.*)`", done.stderr)
    assert said is not None
    # What it tells to type makes a channel.
    run(socket_path, said[1], "log", "hello", *said[2].split())
    assert run(socket_path, "cat", "log", "--history", "1", "-n", "1").strip() == "hello"


def test_info(socket_path: str, channels: Channels) -> None:
    messages = channels.create_messages("log", limit=100, slots=4)
    channels.create_queue("jobs", limit=8)
    with messages.writer() as writer, messages.reader("overwrite"):
        for _ in range(6):
            writer.put(b"x")
        said = run(socket_path, "info", "log")
        assert "channel log: messages" in said
        assert "jobs" not in said
        assert re.search(rf"^ +\d+ +at work +\d+ +0 +{os.getpid()}  a test$", said, re.MULTILINE)
        assert re.search(r"^  writer +0 +0 +open +6$", said, re.MULTILINE)
        assert re.search(r"^  reader +0 +0 +open +4 +\d +overwrite$", said, re.MULTILINE)
        facts = json.loads(run(socket_path, "info", "--json"))
    assert facts["area"]["size"] > facts["area"]["free"] >= facts["area"]["free_in_one_piece"] > 0
    assert [place["name"] for place in facts["places"]] == ["a test"]
    assert [info["name"] for info in facts["channels"]] == ["jobs", "log"]


# -- messages -------------------------------------------------------------------------------------


def test_a_queue_through_the_command_line(socket_path: str, channels: Channels) -> None:
    create = ("--create", "queue", "--limit", "1K")
    assert run(socket_path, "put", "jobs", *create, "--lines", input="one\ntwo\nthree") == ""
    assert channels.list()[0].unfinished == 3
    assert run(socket_path, "cat", "jobs", "--lines", "-n", "2") == "one\ntwo\n"
    assert channels.list()[0].unfinished == 1
    assert run(socket_path, "cat", "jobs", "-t", "0") == "three"
    assert run(socket_path, "put", "jobs", input="a\nb\n") == ""
    assert run(socket_path, "put", "jobs", "c") == ""
    taken = run(socket_path, "cat", "jobs", "--lines", "-n", "2")
    assert sorted(taken.splitlines(keepends=True)) == ["\n", "a\n", "b\n", "c\n"]
    assert channels.list()[0].unfinished == 0
    assert run(socket_path, "rm", "jobs") == "channel jobs was removed\n"
    assert channels.list() == []


def test_a_value(socket_path: str, channels: Channels) -> None:
    said = "channel 'state' has no content yet"
    value = channels.create_value("state", limit=8)
    assert run(socket_path, "cat", "state", status=1) == said
    assert run(socket_path, "cat", "state", "-t", "0.01", status=1).startswith(said)
    run(socket_path, "put", "state", "ready")
    assert run(socket_path, "cat", "state") == "ready"
    with value.reader() as reader:
        assert reader.get() == b"ready"


def test_cat_prints_messages_as_they_come(socket_path: str, channels: Channels) -> None:
    messages = channels.create_messages("log", limit=8)
    with messages.writer() as writer, started(socket_path, "cat", "log", "--lines") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        until(lambda: channels.list()[0].readers)
        writer.put(b"one")
        assert process.stdout.readline() == b"one\n"
        writer.put(b"\xff\0")
        assert process.stdout.readline() == b"\xff\0\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 130
        assert process.stderr.read() == b""
    assert channels.list()[0].readers == ()
    assert len(channels.places()) == 1


def test_a_reader_that_has_seen_enough(socket_path: str, channels: Channels) -> None:
    messages = channels.create_messages("log", limit=8)
    with messages.writer() as writer, started(socket_path, "cat", "log") as process:
        until(lambda: channels.list()[0].readers)
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        writer.put(b"x")
        process.wait(PATIENCE)
        assert process.stderr.read() == b""
    assert channels.list()[0].readers == ()


def test_a_terminal_gets_plain_lines(socket_path: str, channels: Channels) -> None:
    run(socket_path, "put", "state", "\x1b[2Jx\n", "--create", "value", "--limit", "16")
    ours, theirs = pty.openpty()
    with started(socket_path, "cat", "state", stdout=theirs) as process:
        assert process.wait(PATIENCE) == 0
    os.close(theirs)
    assert os.read(ours, 100) == b"\\x1b[2Jx\r\n"
    os.close(ours)


def test_history_and_losses(socket_path: str, channels: Channels) -> None:
    messages = channels.create_messages("log", limit=8, slots=4)
    with messages.writer() as writer:
        for i in range(9):
            writer.put(b"%d" % i)
        assert run(socket_path, "cat", "log", "--history", "3", "-t", "0") == "678"
        said = run(socket_path, "cat", "log", "-n", "1", "-t", "0.01", status=1)
        assert said == "channel 'log': 0 of 1 messages came within 0.01 seconds"


def test_history_of_commands_that_ended(socket_path: str, channels: Channels) -> None:
    channels.create_messages("log", limit=8)
    for word in "hello", "again":
        run(socket_path, "put", "log", word)
    assert (
        run(socket_path, "cat", "log", "--history", "2", "-t", "0", "--lines") == "hello\nagain\n"
    )


def test_arrays_are_bytes(socket_path: str, channels: Channels) -> None:
    channels.create_queue("frames", dtype="<u4", shape=(2,))
    run(socket_path, "put", "frames", "abcdefgh")
    assert run(socket_path, "cat", "frames", "-n", "1") == "abcdefgh"
    said = run(socket_path, "put", "frames", "abc", status=1)
    assert said == "a message of 3 bytes is not array <u4 2"


# -- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["ls"], ["put", "a", "x"]], ids="-".join)
def test_no_server(directory: Path, words: list[str]) -> None:
    path = str(directory / "none")
    said = run(path, *words, status=1)
    assert said.startswith(f"{path}: ")
    assert "server" in said


def test_a_region_without_channels(socket_path: str) -> None:
    with Server(socket_path, "1M").start():
        for words in (["ls"], ["info"], ["put", "a", "x"], ["rm", "--place", "1", "--force"]):
            said = run(socket_path, *words, status=1)
            assert said.startswith("the region has no room for channels: make it by `ivshmem serve")


@pytest.mark.parametrize("command", ["info", "put", "cat", "rm"])
def test_no_such_channel(socket_path: str, channels: Channels, command: str) -> None:
    channels.create_value("there", limit=1)
    assert run(socket_path, command, "a", status=1) == "no channel 'a' (there: there)"


@pytest.mark.parametrize("command", ["put", "cat", "tail"])
def test_wrong_kinds(socket_path: str, channels: Channels, command: str) -> None:
    channels.create_bytes("a", connections=1)
    channels.create_calls("b", limit=8)
    for name, kind in (("a", "bytes"), ("b", "calls")):
        said = run(socket_path, command, name, status=1)
        assert said == (
            f"channel {name!r} is of kind {kind}: this command is for messages,"
            f" {'value' if command == 'tail' else 'queue, value'}"
        )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("put a x --create queue", "--create needs --limit"),
        ("put a x --limit 8 --writers 1", "--limit and --writers: only with --create KIND"),
        ("put a x --create value --limit 8 --slots 3", "a value has one writer, and no slots"),
        ("put a x --lines", "it excludes DATA"),
        ("put a longer --create queue --limit 2", "its limit is 2"),
        ("rm", "give the NAME of a channel, --place N, or --record N"),
        ("rm a --place 1", "give the NAME of a channel, --place N, or --record N"),
        ("rm --record 0", "--record N needs --force"),
        ("rm --record 0 --force", "record 0 is not that of a channel that is spoiled"),
        ("rm --place -1", "places have numbers from 0 on"),
        ("rm --place 5", "place 5 is free"),
        ("rm --place 5000 --force", "place 5000: the area has"),
    ],
)
def test_wrong_use(socket_path: str, channels: Channels, words: str, said: str) -> None:
    assert said in run(socket_path, *words.split(), status=1)


@pytest.mark.parametrize(
    "words",
    ["messages --limit 1K", "queue --limit 1", "value --limit 1", "messages --limit 1 --slots 2"],
)
def test_create_of_what_is_there(socket_path: str, channels: Channels, words: str) -> None:
    """It says what to do, and both ways do it."""
    channels.create_messages("m", limit=1)
    create = ("m", "x", "--create", *words.split())
    said = run(socket_path, "put", *create, status=1)
    assert said.startswith("channel 'm' is there, ")
    assert said.endswith(
        ": omit --create and its options to use it as it is, or remove it: `ivshmem channel rm m`"
    )
    run(socket_path, "put", "m", "x")
    run(socket_path, "rm", "m")
    run(socket_path, "put", *create)


def test_a_put_that_fails_leaves_no_channel(socket_path: str, channels: Channels) -> None:
    """Unless something was sent, or it was there before, or another process uses it."""
    words = ("put", "late", "--lines", "--create", "messages", "--limit", "2")
    for lines, left in (("hello", 0), ("1\nhello", 1), ("hello", 1)):
        assert "its limit is 2" in run(socket_path, *words, input=lines, status=1)
        assert len(channels.list()) == left


def test_a_full_queue(socket_path: str, channels: Channels) -> None:
    channels.create_queue("a", limit=8, slots=2)
    said = run(socket_path, "put", "a", "--lines", "-t", "0", input="1\n2\n3", status=1)
    assert said.startswith("channel 'a' is full")


def test_rm_of_a_channel_in_use(socket_path: str, channels: Channels) -> None:
    with channels.create_messages("a", limit=8).reader():
        said = run(socket_path, "rm", "a", status=1)
        assert "channel 'a' is in use" in said
        assert "(--force: only if" in said
        run(socket_path, "rm", "a", "--force")
    assert channels.list() == []


def test_a_channel_whose_record_is_spoiled(socket_path: str, channels: Channels) -> None:
    channels.create_messages("a", limit=8)
    with ivshmem.connect(socket_path, timeout=PATIENCE) as client:
        Record(client.region, "a").flip(80)
    line = (
        f"record 0, 'a', made by place 0 (process {os.getpid()}, 'a test'), is spoiled, and its"
        " memory set aside: `ivshmem channel rm --record 0 --force` frees it\n"
    )
    assert run(socket_path, "ls") == line
    assert run(socket_path, "info").endswith(line)
    (found,) = json.loads(run(socket_path, "info", "--json"))["spoiled"]
    assert found["name"] == "a"
    assert "--record 0 --force" in run(socket_path, "rm", "a", status=1)
    said = run(socket_path, "rm", "--record", "0", "--force")
    assert said == "the channel of record 0 was removed\n"
    assert channels.spoiled() == ()


# -- places ---------------------------------------------------------------------------------------


def test_a_place_at_work_is_freed_by_force_only(socket_path: str, channels: Channels) -> None:
    (place,) = channels.places()
    number = str(place.place)
    said = run(socket_path, "rm", "--place", number, status=1)
    assert said == (
        f"place {number} is at work (PID {os.getpid()}, 'a test'): --force frees it nevertheless"
    )
    assert run(socket_path, "rm", "--place", number, "--force") == f"place {number} was freed\n"
    until(lambda: channels.closed)


@pytest.mark.nightly
def test_a_silent_place_is_freed(socket_path: str, channels: Channels) -> None:
    """That of a process that is stopped; when it continues, it finds out and ends."""
    channels.create_queue("jobs", limit=8)
    with started(socket_path, "cat", "jobs") as process:
        until(lambda: channels.list()[0].readers)
        process.send_signal(signal.SIGSTOP)
        (place,) = [each for each in channels.places() if each.process == process.pid]
        said = run(socket_path, "info")
        assert re.search(rf"^ +{place.place}  silent +\d+ +0 +{process.pid}  ", said, re.MULTILINE)
        assert run(socket_path, "rm", "--place", str(place.place)).endswith("was freed\n")
        assert process.pid not in [each.process for each in channels.places()]
        assert channels.list()[0].readers == ()
        process.send_signal(signal.SIGCONT)
        _, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 1
        assert len(errors.splitlines()) == 1
    run(socket_path, "rm", "jobs")


def test_no_device() -> None:
    """On a host without one."""
    done = commands.run("channel", "ls", "--guest")
    assert (done.returncode, done.stdout) == (1, "")
    assert "no ivshmem device" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_all_places_are_taken(socket_path: str) -> None:
    """Then the table can still be shown, and places be freed."""
    with Server(socket_path, "1M", channels="64K").start():
        with ivshmem.connect(socket_path, timeout=PATIENCE) as client:
            joined = [channel.open(client, name=f"no. {i}") for i in range(16)]
            with pytest.raises(channel.ChannelError, match="all 16 places"):
                channel.open(client)
            places = json.loads(run(socket_path, "info", "--json"))["places"]
            assert [place["name"] for place in places] == [f"no. {i}" for i in range(16)]
            assert "all 16 places" in run(socket_path, "rm", "--place", "7", status=1)
            run(socket_path, "rm", "--place", "7", "--force")
            channel.open(client).close()
            for each in joined:
                each.close()
