"""`ivshmem top` and `ivshmem channel top` on terminals: keys, sizes, signals, strangers' words."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import tempfile
import termios
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from support import commands
from support.children import Child, python
from support.peer import RawPeer
from support.served import Served
from support.terminals import Terminal
from support.waiting import PATIENCE, sleeps_in_write_of, until

import ivshmem
from ivshmem import Region, channel
from ivshmem.channel import Channels
from ivshmem.cli import served_memory

pytestmark = pytest.mark.usefixtures("commands")
VECTORS = 2
HOSTILE = "\x1b[31m\x1b]0;b\x07\x9b2J\u202eé"
# What the screen itself sends: it moves, wipes, colours, and changes the terminal's modes.
OURS = re.compile(rb"\x1b\[(H|K|J|m|7m|1m|1;31m|\?(1049|7|25)[hl])")

# A server with names, channels and a control socket, in a process that can be killed.
SERVE = """
    import signal, sys
    from ivshmem.service import control
    from ivshmem.service.config import RegionConfig, ServiceConfig
    from ivshmem.service.service import Service
    path = sys.argv[1]
    region = RegionConfig(path, 1 << 20, 2, names=True, channels=1 << 19)
    with Service(ServiceConfig({"default": region})) as service:
        with control.Control(control.listen(path + ".control"), service) as made:
            service.open()
            service.watch(made.fileno(), made.step)
            signal.signal(signal.SIGTERM, lambda *_: service.stop())
            print("READY", flush=True)
            service.run()
"""


@contextlib.contextmanager
def serving(path: str) -> Iterator[Child]:
    with python(SERVE, path) as child:
        child.expect("READY")
        yield child
        child.process.terminate()
        child.finish()


@pytest.fixture
def served(socket_path: str) -> Iterator[Child]:
    with serving(socket_path) as child:
        yield child


@pytest.fixture
def channels(served: Child, socket_path: str) -> Iterator[Channels]:
    with ivshmem.connect(socket_path, timeout=PATIENCE) as client:
        with channel.open(client, name="a test") as channels:
            yield channels


def run(*arguments: str, status: int = 0) -> str:
    """Standard output of the command; its one line of errors, if it is to fail."""
    done = commands.run(*arguments)
    assert done.returncode == status, done.stderr
    if not status:
        return done.stdout
    (line,) = done.stderr.splitlines()
    return line


def first_words(lines: list[str], head: str) -> list[str]:
    """Of the rows below this head."""
    at = next(number for number, line in enumerate(lines) if line.lstrip().startswith(head))
    return [line.split()[0] for line in lines[at + 1 : -1] if line.strip()]


# -- ivshmem top ----------------------------------------------------------------------------------


@pytest.mark.sampled(3)
@pytest.mark.parametrize("key", [b"q", b"Q", b"\x03"])
def test_it_lives_until_a_key(served: Child, socket_path: str, key: bytes) -> None:
    with Terminal("top", "-S", socket_path, "-i", "0.1") as top:
        top.expect("0 peers")
        with ivshmem.connect(socket_path, timeout=PATIENCE) as client:
            top.expect(rf"1 peer; per second: [0-9.]+ joins.*{os.getpid()}")
            client.ring(0, 0)
            top.expect("0:1")
            assert client.wait(0, timeout=0) == 1
        top.expect("% CPU now")
        top.expect("0 peers")
        top.type(key)
        assert top.end() == 0


def test_it_sees_channels_and_is_no_peer(channels: Channels, socket_path: str) -> None:
    log = channels.create_messages("log", limit=8, slots=4, overflow="overwrite")
    channels.create_queue("jobs", limit=8)
    with Terminal("top", "-S", socket_path, "-i", "0.1") as top, log.writer() as writer:
        top.drawn(r"^  2 channels$")
        with log.reader() as reader:
            for _ in range(20):
                writer.put(b"x", PATIENCE)
            assert reader.get(PATIENCE)
            # The reader lost what it did not take: this row comes in the colour of an alarm.
            top.expect(r"\033\[1;31m  log +messages +[\d.]+/s +[\d.]+/s")
        lines = top.drawn(r"^  2 channels, [\d.]+/s in all$")
        assert first_words(lines, "NAME") == ["jobs", "log"]
        assert "1 peer; per second" in lines[3]
        top.type(b"q")
        assert top.end() == 0
        (region,) = json.loads(run("status", "--json", "-S", socket_path))["regions"]
        assert region["counts"]["joins"] == 1


def test_channels_of_a_server_that_is_replaced(socket_path: str) -> None:
    with ExitStack() as stack:
        first = stack.enter_context(ExitStack())
        first.enter_context(serving(socket_path))
        with ivshmem.connect(socket_path, timeout=PATIENCE) as client:
            with channel.open(client) as channels:
                channels.create_queue("old", limit=8)
                top = stack.enter_context(Terminal("top", "-S", socket_path, "-i", "0.1"))
                top.drawn(r"^  old +queue")
        first.close()
        assert top.drawn("^no answer: ")[0].startswith("no answer: ")
        child = stack.enter_context(serving(socket_path))
        lines = top.drawn(rf"^server pid {child.pid}")
        assert not any("old" in line for line in lines)
        top.type(b"q")
        assert top.end() == 0


def test_it_wants_a_terminal(served: Child, socket_path: str) -> None:
    line = run("top", "-S", socket_path, status=1)
    assert line == (
        "ivshmem: standard input and output are not a terminal: `ivshmem status` prints the"
        " same once"
    )


@pytest.mark.sampled(5)
@pytest.mark.parametrize("seconds", ["0", "-1", "x", "nan", "inf", "3601"])
@pytest.mark.parametrize("command", [["top"], ["channel", "top"], ["channel", "hz", "log"]])
def test_intervals(command: list[str], seconds: str) -> None:
    assert "allowed are 0.1 to 3600" in run(*command, f"--interval={seconds}", status=2)


def test_hostile_names(
    channels: Channels, socket_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A channel of a peer that checks nothing, and a filter that is pasted."""
    monkeypatch.setattr("ivshmem.channel.channels.check_name", lambda _: None)
    channels.create_queue(HOSTILE, limit=8)
    for command in ("top",), ("channel", "top"):
        with Terminal(*command, "-S", socket_path, "-i", "0.1") as top:
            top.drawn(r"\\x1b\[31m.* +queue")
            top.type(b"/" + HOSTILE.replace("\x1b", "").encode() + b"\r")
            top.drawn("/ only: ")
            top.type(b"q")
            assert top.end() == 0
            assert b"\x1b" not in OURS.sub(b"", top.output)
            assert "\u202e".encode() not in top.output


# -- keys, in both --------------------------------------------------------------------------------


@pytest.fixture(params=[("top",), ("channel", "top")], ids=" ".join)
def top(request: pytest.FixtureRequest, channels: Channels, socket_path: str) -> Iterator[Terminal]:
    """It shows three queues, with 2, 0 and 1 jobs."""
    for name, count in (("ant", 2), ("bee", 0), ("cat", 1)):
        writer = channels.create_queue(name, limit=8).writer()
        for _ in range(count):
            writer.put(b"x")
        writer.close()
    with Terminal(*request.param, "-S", socket_path, "-i", "3600", rows=30) as top:
        top.drawn("cat")
        yield top
        top.type(b"q")
        assert top.end() == 0


def queues(lines: list[str]) -> str:
    """The initials of the queues that are shown."""
    return "".join(word[0] for word in first_words(lines, "NAME"))


def test_sort(top: Terminal) -> None:
    foot = ""
    while "sort: WAITING descending" not in foot:
        top.type(b"s")
        foot = top.drawn("sort: [A-Z]")[-1]
    assert queues(top.screen()) == "acb"
    top.type(b"r")
    assert queues(top.drawn()) == "bca"
    top.type(b"<")
    top.drawn("sort: LOST/S")
    top.type(b"\x1b[C")
    assert queues(top.drawn("sort: WAITING")) == "acb"
    top.type(b"\x1bOD")
    top.drawn("sort: LOST/S")
    top.type(b"u")
    assert queues(top.drawn("sort: as it comes")) == "abc"


def test_filter(top: Terminal) -> None:
    top.type(b"/")
    top.drawn("show only rows with: _")
    top.type(b"Bxx\x7f\x7f")
    assert queues(top.drawn("with: B_")) == "b"
    top.type(b"\r")
    assert queues(top.drawn("/ only: B")) == "b"
    top.type(b"\x1b")
    assert queues(top.drawn("/ filter")) == "abc"
    top.type("/é".encode())
    assert queues(top.drawn("with: é_")) == ""
    top.type(b"\x1b")
    assert queues(top.drawn("/ filter")) == "abc"


def test_help(top: Terminal) -> None:
    for key in b"h", b"?":
        top.type(key)
        assert top.drawn("^q +end$")[0] != ""
        top.type(b"q")  # any key leaves the help
        assert queues(top.drawn("/ filter")) == "abc"


@pytest.mark.sampled(2)
def test_scroll(top: Terminal) -> None:
    top.resize(5, 60)
    assert re.match(r"1-3 of \d+  q end", top.drawn(" of ")[-1])
    top.type(b"\x1b[F")  # End
    last = top.drawn("cat")
    assert len(last) == 5
    assert last[-2].split()[0] == "cat"
    assert last[1].split()[0] == "NAME"  # the head stays
    top.type(b"\x1b[A")
    assert top.drawn()[-2].split()[0] == "bee"
    top.type(b"\x1b[5~\x1b[6~\x1b[H")
    top.drawn("^1-3 of ")


@pytest.mark.sampled(2)
def test_unknown_keys_do_nothing(top: Terminal) -> None:
    before = top.screen()
    for keys in (b"\x1b[15~", b"\x1b[1;5C", b"\xff\xfe", b"\x1b[200~", b"\x00", b"zZ1"):
        top.type(keys)
    top.type(b"\xc3")  # half of a character
    top.type(b"\xa9")
    top.type(b"h")
    top.drawn("^q +end$")
    top.type(b"x")
    assert top.drawn("/ filter")[1:] == before[1:]


@pytest.mark.sampled(12)
@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (2, 1), (1, 200), (3, 3), (4, 7), (500, 10), (24, 120)]
)
def test_sizes(top: Terminal, rows: int, columns: int) -> None:
    top.resize(rows, columns)
    lines = top.drawn()
    while len(lines) != min(rows, 500):
        lines = top.drawn()
    assert all(len(line) <= columns for line in lines)
    for key in (b"h", b"x", b"s", b"/", b"\r", b"G", b"g"):
        top.type(key)
        assert len(top.drawn()) <= rows


@pytest.mark.sampled(2)
def test_stopped_and_continued(top: Terminal) -> None:
    top.type(b"\x1a")
    top.expect("<stopped>")
    assert top.output.endswith(b"\033[?1049l<stopped>")
    assert termios.tcgetattr(top.slave) == top.before
    top.type(b"\n")
    top.expect(r"\033\[\?1049h")
    assert queues(top.drawn("cat")) == "abc"


@pytest.mark.sampled(4)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("command", [("top",), ("channel", "top")], ids=" ".join)
def test_signals(
    served: Child, socket_path: str, command: tuple[str, ...], number: signal.Signals
) -> None:
    with Terminal(*command, "-S", socket_path) as top:
        top.drawn()
        os.kill(top.child(), number)
        assert top.end() == 128 + number


@pytest.mark.nightly
@pytest.mark.parametrize("command", [("top",), ("channel", "top")], ids=" ".join)
def test_nobody_reads(served: Child, socket_path: str, command: tuple[str, ...]) -> None:
    """What it draws fills the terminal's buffer, and SIGTERM ends it all the same."""
    with Terminal(*command, "-S", socket_path, "-i", "0.1", rows=200, columns=400) as top:
        top.drawn()
        child = top.child()

        top.type(b"h" * 50)
        until(lambda: sleeps_in_write_of(child))
        os.kill(child, signal.SIGTERM)
        assert top.process.wait(PATIENCE) == 128 + signal.SIGTERM


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("environment", "coloured"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"CLICOLOR": "0"}, False)],
)
def test_colours(
    served: Child, socket_path: str, environment: dict[str, str], coloured: bool
) -> None:
    with Terminal("top", "-S", socket_path, environment=environment) as top:
        top.drawn("q end")
        assert (b"\033[7m" in top.output) == coloured
        top.type(b"q")
        assert top.end() == 0


def test_a_small_window_and_another_size(served: Child, socket_path: str) -> None:
    with ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(RawPeer(socket_path)).set_up(VECTORS)
        top = stack.enter_context(
            Terminal("top", "-S", socket_path, "-i", "3600", rows=5, columns=20)
        )
        lines = top.drawn()
        assert len(lines) == 5
        assert all(len(line) <= 20 for line in lines)
        top.resize(30, 100)
        assert len(top.drawn("/ filter")) == 30
        assert first_words(top.screen(), "ID")[:8] == [str(number) for number in range(8)]
        top.type(b"q")
        assert top.end() == 0


def test_a_server_that_ends_ends_channel_top(served: Child, socket_path: str) -> None:
    """All that start from then on meet in the memory of another server."""
    with Terminal("channel", "top", "-S", socket_path, "-i", "3600") as top:
        top.drawn("0 channels")
        served.process.terminate()
        assert top.end() == 1
        assert b"and with it this command: start it again" in top.output


def test_a_server_in_another_process_tree(socket_path: str) -> None:
    """One that has threads: the memory is found all the same."""
    with Served(socket_path, size=1 << 20, vectors=1, channels=1 << 19):
        with ivshmem.connect(socket_path, timeout=PATIENCE) as client:
            with channel.open(client) as channels:
                channels.create_queue("jobs", limit=8)
                with Terminal("top", "-S", socket_path) as top:
                    top.drawn("jobs")
                    top.type(b"q")
                    assert top.end() == 0


def test_a_descriptor_that_becomes_another_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user's process may hold it: `top` checks the file that it opened, and never waits."""
    with Region.create(1 << 20) as region, tempfile.TemporaryDirectory() as folder:
        found = os.fstat(region.fileno())
        fifo = f"{folder}/fifo"
        os.mkfifo(fifo)
        opened = os.open

        def open_fifo(_path: str, flags: int) -> int:
            return opened(fifo, flags)

        with monkeypatch.context() as patch:
            patch.setattr(os, "open", open_fifo)
            with pytest.raises(FileNotFoundError, match="has no such memory"):
                served_memory._memory(os.getpid(), found.st_dev, found.st_ino)
        with served_memory._memory(os.getpid(), found.st_dev, found.st_ino) as same:
            assert len(same) == len(region)
