"""`ivshmem bench` as a person or a script runs it: here alone, and against real peers."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from fcntl import ioctl
from pathlib import Path
from typing import Any

import pytest
from support.waiting import PATIENCE, until

import ivshmem
from ivshmem.bench import remote
from ivshmem.cli import main as cli
from ivshmem.errors import NoAnswer
from ivshmem.testing.fake_pci import FakePci

BENCH = [sys.executable, "-W", "error", "-m", "ivshmem", "bench"]

MakeServer = Callable[..., ivshmem.Server]


class Running:
    """A command that runs; what it writes is read line by line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.said = ""

    def expect(self, start: str) -> str:
        """The next line on stderr that begins like this."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said += line
            if line.startswith(start):
                return line
        raise AssertionError(f"no line {start!r} in {self.said!r}")

    def end(self, number: int | None = None) -> tuple[int, str, str]:
        """Status, and the rest of stdout and stderr; perhaps by a signal."""
        if number is not None:
            self.process.send_signal(number)
        out, errors = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, out, errors


@contextlib.contextmanager
def running(*arguments: str, **kwargs: Any) -> Iterator[Running]:
    process = subprocess.Popen(
        [*BENCH, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )
    with process:
        try:
            yield Running(process)
        finally:
            process.kill()


def run(*arguments: str, status: int = 0) -> tuple[str, str]:
    """What it wrote to stdout and to stderr."""
    with running(*arguments) as command:
        ended, out, errors = command.end()
    assert ended == status, errors
    return out, errors


def one_error_line(*arguments: str) -> str:
    out, errors = run(*arguments, status=1)
    assert out == ""
    assert len(errors.splitlines()) == 1, errors
    assert errors.startswith("ivshmem")
    return errors


def shown_well(out: str) -> None:
    for line in out.splitlines():
        assert len(line) <= 80, line
        assert line == line.rstrip()


def numbers_of(group: dict[str, Any]) -> None:
    for result in group["results"]:
        times = result["nanoseconds"]
        assert 0 <= times["p50"] <= times["p99"] <= times["p99.9"] <= times["max"]
        assert result["count"] > 0
        assert (result["ratio"] is None) == (result["yardstick"] is None)


@pytest.fixture
def one_core() -> Iterator[None]:
    """What is started now may use only one."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where temporary files go; nothing must be left there, and nobody who was started there."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    yield tmp_path
    until(lambda: not started_for(tmp_path), "the end of all processes")


def started_for(path: Path) -> list[int]:
    """Processes that were told a path in this directory."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(path) in (entry / "cmdline").read_text() and int(entry.name) != os.getpid():
                found.append(int(entry.name))
    return found


class TestHere:
    @pytest.mark.nightly
    def test_a_table(self, temporary: Path) -> None:
        out, errors = run("--seconds", "0.2")
        shown_well(out)
        lines = out.splitlines()
        titles = [line.split("  ")[0] for line in lines if "p99.9" in line]
        assert titles[0] == "ring, nobody waiting"
        assert titles[-3:] == ["round trip, one core", "copy", "huge pages"]
        assert any("os.eventfd, blocking" in line and line.endswith(" 1") for line in lines)
        assert "\r" not in errors
        assert errors.splitlines()[0] == "  0%  ring, nobody waiting"
        assert errors.splitlines()[-1] == "100%  done"
        assert list(temporary.iterdir()) == []

    @pytest.mark.nightly
    def test_json(self, temporary: Path) -> None:
        out, errors = run("--seconds", "0.2", "--json")
        assert errors == ""
        values = json.loads(out)
        groups = {group["title"]: group for group in values["groups"]}
        assert list(groups) == [
            "ring, nobody waiting",
            "round trip, two cores",
            "round trip, one core",
            "copy",
            "huge pages",
        ]
        for group in groups.values():
            numbers_of(group)
        ways = [result["what"] for result in groups["round trip, one core"]["results"]]
        assert ways[:3] == ["os.eventfd, blocking", "wait(0)", 'wait(0, spin="auto")']
        copies = {result["bytes"] for result in groups["copy"]["results"]}
        assert copies == {4096, 1 << 20}
        assert values["machine"]["ivshmem"] == "0.1.0"
        assert 0 < values["seconds"] < PATIENCE

    @pytest.mark.nightly
    def test_one_core(self, one_core: None, temporary: Path) -> None:
        out, errors = run("--seconds", "0.2", "--quiet")
        assert errors == ""
        shown_well(out)
        assert "round trip, two cores\n  not measured: two cores are needed" in out

    @pytest.mark.nightly
    def test_a_terminal(self) -> None:
        """A bar, which is gone in the end; and no line is too long for it."""
        main, terminal = pty.openpty()
        try:
            ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
            environment = {**os.environ, "TERM": "xterm"}
            environment.pop("COLUMNS", None)
            process = subprocess.Popen(
                [*BENCH, "--seconds", "0.1"],
                stdin=terminal,
                stdout=subprocess.DEVNULL,
                stderr=terminal,
                env=environment,
            )
            os.close(terminal)
            said = b""
            with process, contextlib.suppress(OSError):  # EIO: nobody has the terminal any more
                while select.select([main], [], [], PATIENCE)[0]:
                    said += os.read(main, 4096)
        finally:
            os.close(main)
        assert process.returncode == 0
        drawn = said.decode().split("\r")
        assert drawn[0] == ""
        assert drawn[1].startswith("[" + "." * 24 + "]   0%  ring")
        assert drawn[-2].startswith("[" + "#" * 24 + "] 100%  done")
        assert drawn[-1] == "\033[K"
        assert all(len(line.removesuffix("\033[K")) < 60 for line in drawn)

    @pytest.mark.nightly
    @pytest.mark.parametrize(
        ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
    )
    def test_signals_end_it(self, temporary: Path, number: int, status: int) -> None:
        with running("--seconds", "60") as command:
            command.expect("  5%  round trip")
            assert command.end(number) == (status, "", "")
        assert list(temporary.iterdir()) == []

    @pytest.mark.nightly
    def test_nobody_survives_it(self, temporary: Path) -> None:
        """Killed, it leaves a socket behind, but no process: see `temporary`."""
        with running("--seconds", "60") as command:
            command.expect("  5%  round trip")
            until(lambda: len(started_for(temporary)) > 2)
            command.end(signal.SIGKILL)

    @pytest.mark.nightly  # by day the one that answers dies
    def test_an_end_that_dies(self, temporary: Path) -> None:
        with running("--seconds", "60") as command:
            command.expect("  5%  round trip")
            until(lambda: len(started_for(temporary)) > 2)
            os.kill(started_for(temporary)[-1], signal.SIGKILL)
            status, out, errors = command.end()
        assert (status, out) == (1, "")
        assert "was ended by signal 9" in errors
        assert errors.startswith("ivshmem: the measurement failed: the ")
        assert len(errors.splitlines()) == 1
        assert list(temporary.iterdir()) == []


class TestWrongUsage:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--rounds", "3"], "need --echo"),
            (["--peer", "0", "--spin"], "need --echo"),
            (["-S", "x"], "give --peer PEER to measure, or --echo"),
            (["--vector", "0"], "give --peer PEER to measure, or --echo"),
            (["--peer", "0", "--echo"], "not allowed with"),
            (["--echo", "-S", "x", "-a", "y"], "not allowed with"),
            (["--seconds", "0"], "not a time"),
            (["--seconds", "nan"], "not a time"),
            (["--echo", "--rounds", "0"], "not a number of rounds"),
            (["--echo", "--vector", "2048"], "0 to 2047"),
        ],
    )
    def test_it_says_so(
        self, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit, match="2"):
            cli.main(["bench", *arguments])
        (said,) = capsys.readouterr().err.splitlines()
        assert message in said


class TestPeers:
    def test_round_trips(self, server: MakeServer, temporary: Path) -> None:
        path = server(vectors=2).path
        with running("--echo", "-S", path, "--vector", "1") as echo:
            said = echo.expect("this is peer 0, waiting for a peer")
            assert said.endswith("start there: ivshmem bench --peer 0 --vector 1\n")
            out, errors = run(
                *("--peer", "0", "-S", path, "--vector", "1", "--seconds", "0.3", "--json")
            )
            assert errors == ""
            (group,) = json.loads(out)["groups"]
            numbers_of(group)
            assert group["title"] == "peer 0, vector 1"
            trips = sum(result["count"] for result in group["results"][1:])
            assert trips >= 100
            status, out, errors = echo.end(signal.SIGINT)
        assert (status, errors) == (0, "")
        words = out.split()
        assert words[:3] == ["answered", "peer", "1"]
        assert int(words[3]) >= trips

    @pytest.mark.nightly  # by day as JSON
    def test_a_table(self, server: MakeServer) -> None:
        path = server().path
        with running("--echo", "-S", path, "--spin") as echo:
            echo.expect("this is peer 0")
            out, errors = run("--peer", "0", "-S", path, "--seconds", "0.2")
            assert echo.end(signal.SIGTERM)[0] == 0
        shown_well(out)
        assert "peer 0, vector 0" in out
        assert "os.eventfd, two processes here" in out
        assert errors.splitlines()[0] == "  0%  round trip to peer 0"

    @pytest.mark.nightly
    def test_the_memory_is_left_alone(self, server: MakeServer) -> None:
        path = server(1 << 16).path
        with ivshmem.connect(path, timeout=PATIENCE) as witness:
            pattern = os.urandom(1 << 16)
            with memoryview(witness.region) as memory:
                memory[:] = pattern
            with running("--echo", "-S", path) as echo:
                echo.expect("this is peer 1")
                run("--peer", "1", "-S", path, "--seconds", "0.1", "-q")
                assert echo.end(signal.SIGINT)[0] == 0
            with memoryview(witness.region) as memory:
                assert bytes(memory) == pattern

    @pytest.mark.nightly
    def test_the_ping_comes_first(self, server: MakeServer) -> None:
        """It goes on ringing, and says what to start."""
        path = server(vectors=3).path
        with ivshmem.connect(path, timeout=PATIENCE) as other:
            with running(
                *("--peer", str(other.id), "-S", path, "--vector", "2", "--seconds", "0.1")
            ) as ping:
                said = ping.expect("no answer yet; this is peer 1: ")
                assert said.endswith("start there: ivshmem bench --echo 1 --vector 2\n")
                assert (other.wait(2, PATIENCE) or 0) > 1
                answer_until(other, lambda: ping.process.poll() is not None, 1, 2)
                status, out, _ = ping.end()
            assert status == 0
            assert "peer 0, vector 2" in out

    def test_nobody_answers(self, server: MakeServer) -> None:
        path = server().path
        with ivshmem.connect(path, timeout=PATIENCE):
            said = one_error_line("--peer", "0", "-S", path, "--timeout", "0.2")
        assert "peer 0 did not answer for 0.2 seconds: is `ivshmem bench --echo 1` running" in said

    @pytest.mark.nightly
    def test_ctrl_c_while_nobody_answers(self, server: MakeServer) -> None:
        path = server().path
        with (
            ivshmem.connect(path, timeout=PATIENCE),
            running("--peer", "0", "-S", path) as ping,
        ):
            ping.expect("no answer yet")
            assert ping.end(signal.SIGINT) == (130, "", "")

    @pytest.mark.nightly
    def test_the_echo_dies_in_the_middle(self, server: MakeServer, temporary: Path) -> None:
        path = server().path
        with running("--echo", "-S", path) as echo:
            echo.expect("this is peer 0")
            with running("--peer", "0", "-S", path, "--seconds", "60") as ping:
                ping.expect("  0%  round trip to peer 0")
                echo.end(signal.SIGKILL)
                status, out, errors = ping.end()
        assert (status, out) == (1, "")
        last = errors.splitlines()[-1]
        assert last.startswith("ivshmem: peer 0 ")
        assert " left after " in last or "not connected" in last

    @pytest.mark.nightly
    def test_who_is_there_falls_silent(
        self, server: MakeServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(remote, "STALL", 0.3)
        handler = signal.getsignal(signal.SIGALRM)
        path = server().path
        with (
            ivshmem.connect(path, timeout=PATIENCE) as end,
            ivshmem.connect(path, timeout=PATIENCE) as other,
        ):
            thread = threading.Thread(target=lambda: other.echo(end.id, rounds=100))
            thread.start()
            remote.knock(end, other.id, 0, PATIENCE, lambda: None)
            with pytest.raises(NoAnswer, match=r"stopped answering after \d+ round trips"):
                list(remote.round_trips(end, other.id, 0, 30))
            thread.join()
        assert signal.getsignal(signal.SIGALRM) is handler

    def test_somebody_rings_all_the_time(
        self, server: MakeServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(remote, "_SILENCE", 0.1)
        path = server().path
        with (
            ivshmem.connect(path, timeout=PATIENCE) as end,
            ivshmem.connect(path, timeout=PATIENCE) as other,
        ):
            done = threading.Event()

            def ring() -> None:
                while not done.wait(0.001):
                    other.ring(end.id)

            thread = threading.Thread(target=ring)
            thread.start()
            try:
                with pytest.raises(NoAnswer, match="choose another vector"):
                    remote.knock(end, other.id, 0, PATIENCE, lambda: None)
            finally:
                done.set()
                thread.join()

    @pytest.mark.sampled(2)
    @pytest.mark.parametrize("end", ["--peer", "--echo"])
    def test_who_is_not_there(self, server: MakeServer, end: str) -> None:
        path = server().path
        with ivshmem.connect(path, timeout=PATIENCE):
            # The first one, whose id is known.
            said = one_error_line(end, "1", "-S", path, "-q")
            assert said == "ivshmem: peer 1 is this end itself: give the id of the other end\n"
            said = one_error_line(end, "7", "-S", path, "-q")
            assert said == "ivshmem: peer 7 is not connected (connected: 0)\n"
            said = one_error_line(end, "abc", "-S", path, "-q")
            assert "not a peer: 'abc' (give a number" in said

    @pytest.mark.parametrize("end", ["--peer", "--echo"])
    def test_no_such_vector(self, server: MakeServer, end: str) -> None:
        path = server(vectors=2).path
        with ivshmem.connect(path, timeout=PATIENCE):
            said = one_error_line(end, "0", "-S", path, "--vector", "2", "-q")
        assert said == "ivshmem: vector 2: this endpoint has 2 vectors\n"

    @pytest.mark.parametrize("end", ["--peer", "--echo"])
    def test_no_vectors(self, server: MakeServer, end: str) -> None:
        path = server(vectors=0).path
        with ivshmem.connect(path, timeout=PATIENCE):
            said = one_error_line(end, "0", "-S", path, "-q")
        assert said == "ivshmem: vector 0: this endpoint has 0 vectors\n"

    @pytest.mark.parametrize("end", ["--peer", "--echo"])
    def test_no_server(self, tmp_path: Path, end: str) -> None:
        said = one_error_line(end, "0", "-S", str(tmp_path / "socket"))
        assert str(tmp_path / "socket") in said


def answer_until(end: ivshmem.Client, over: Callable[[], bool], peer: int, vector: int) -> None:
    while not over():
        with contextlib.suppress(ivshmem.NoSuchPeer):  # it has left
            end.echo(peer, vector, timeout=0.01)


def rung_back(end: ivshmem.Client, peer: int) -> None:
    """Ring until an answer comes."""

    def asked() -> int | None:
        end.ring(peer)
        return end.wait(0, 0.02)

    until(asked, "an answer")


class TestEcho:
    def test_rounds(self, server: MakeServer) -> None:
        path = server().path
        with running("--echo", "-S", path, "--rounds", "3", "--json") as echo:
            echo.expect("this is peer 0")
            with ivshmem.connect(path, timeout=PATIENCE) as end:
                for _ in range(3):
                    end.ring(0)
                    assert end.wait(0, PATIENCE)
                status, out, errors = echo.end()
        assert (status, json.loads(out), errors) == (0, {"peer": 1, "answered": 3}, "")

    def test_it_answers_who_joined_last(self, server: MakeServer) -> None:
        """Ids of those who have left are used again; the first one goes away, the second stays."""
        path = server().path
        with ivshmem.connect(path, timeout=PATIENCE) as idle:
            with running("--echo", "-S", path) as echo:
                echo.expect("this is peer 1, waiting for peer 0")  # the only one there
                rung_back(idle, 1)
                with ivshmem.connect(path, timeout=PATIENCE) as first:
                    rung_back(first, 1)
                    with ivshmem.connect(path, timeout=PATIENCE) as second:
                        rung_back(second, 1)
                status, out, _ = echo.end(signal.SIGINT)
        assert status == 0
        assert [line.split()[:3] for line in out.splitlines()] == [
            ["answered", "peer", str(peer)] for peer in (0, 2, 3)
        ]

    def test_of_several_it_waits_for_another(self, server: MakeServer) -> None:
        path = server().path
        with (
            ivshmem.connect(path, timeout=PATIENCE),
            ivshmem.connect(path, timeout=PATIENCE),
            running("--echo", "-S", path, "--timeout", "0.1") as echo,
        ):
            echo.expect("this is peer 2, waiting for a peer: ")
            status, out, errors = echo.end()
        assert (status, out) == (1, "")
        assert errors == "ivshmem: no ring on vector 0 for 0.1 seconds\n"

    def test_the_peer_that_was_named_leaves(self, server: MakeServer) -> None:
        path = server().path
        with ivshmem.connect(path, timeout=PATIENCE) as end:
            echo = running("--echo", "0", "-S", path)
            with echo as command:
                command.expect("this is peer 1, waiting for peer 0")
                rung_back(end, 1)
                end.close()
                status, out, errors = command.end()
        assert (status, errors) == (0, "")
        assert out.startswith("answered peer 0")

    def test_a_server_that_is_gone(self, server: MakeServer) -> None:
        """Doorbells go on working; who is there is not known any more."""
        made = server()
        with ivshmem.connect(made.path, timeout=PATIENCE) as end:
            with running("--echo", "0", "-S", made.path, "--rounds", "1") as echo:
                echo.expect("this is peer 1")
                until(lambda: end.peers)
                made.close()
                rung_back(end, 1)
                assert echo.end()[:2] == (0, "answered peer 0\n")


class TestNames:
    @pytest.fixture
    def named(self, server: MakeServer) -> Iterator[tuple[str, ivshmem.Directory]]:
        path = server(1 << 16, vectors=2).path
        with (
            ivshmem.connect(path, timeout=PATIENCE) as end,
            ivshmem.Directory.create(end) as names,
        ):
            yield path, names

    @pytest.mark.nightly
    def test_the_ping_says_who_it_is(self, named: tuple[str, ivshmem.Directory]) -> None:
        """As long as nobody answers."""
        path, names = named
        with (
            ivshmem.connect(path, timeout=PATIENCE) as other,
            ivshmem.Directory.open(other) as theirs,
            theirs.publish("other"),
            running("--peer", "other", "-S", path, "--vector", "1", "--seconds", "0.1") as ping,
        ):
            entry = names.wait_for("bench", PATIENCE)
            assert (entry.id, entry.vector_range) == (2, range(1, 2))
            answer_until(other, lambda: ping.process.poll() is not None, 2, 1)
            assert ping.end()[0] == 0
        with pytest.raises(ivshmem.NoSuchName):
            names.lookup("bench")

    def test_the_echo_finds_it(self, named: tuple[str, ivshmem.Directory]) -> None:
        """Although somebody else has joined later."""
        path, _ = named
        with running("--echo", "-S", path) as echo:
            echo.expect("this is peer 1")
            with (
                ivshmem.connect(path, timeout=PATIENCE) as end,
                ivshmem.connect(path, timeout=PATIENCE),
                ivshmem.Directory.open(end) as names,
            ):
                with names.publish("bench"):
                    rung_back(end, 1)
                rung_back(end, 1)  # it goes on
                _, out, _ = echo.end(signal.SIGINT)
        assert out.splitlines()[-1].startswith("answered peer 2")

    def test_a_name_for_the_echo(self, named: tuple[str, ivshmem.Directory]) -> None:
        path, names = named
        with names.publish("pinger"), running("--echo", "pinger", "-S", path) as echo:
            echo.expect("this is peer 1, waiting for peer 0")
            assert "no entry 'x'" in one_error_line("--echo", "x", "-S", path, "-q")
            assert echo.end(signal.SIGINT) == (0, "", "")


class TestInAGuest:
    """Devices without interrupts; the others are in tests/vm."""

    @pytest.fixture(autouse=True)
    def signals_as_before(self) -> Iterator[None]:
        """The command line ends with the process, and leaves its signals ignored."""
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = [signal.getsignal(number) for number in numbers]
        yield
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)

    @pytest.mark.parametrize("end", ["--peer", "--echo"])
    @pytest.mark.parametrize("vectors", [2, 0])
    def test_no_interrupts(
        self,
        end: str,
        vectors: int,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        FakePci(tmp_path / "pci", monkeypatch).add(vectors=vectors)
        assert cli.main(["bench", end, "1", "-q"]) == 1
        (said,) = capsys.readouterr().err.splitlines()
        assert "interrupts" in said
