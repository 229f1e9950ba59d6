"""Round trips between two processes, really run; ends that die; and nothing is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest
from bench import roundtrips
from bench.ways import PEERS, ROOT, Way
from support.waiting import until

from ivshmem.bench import roundtrip
from ivshmem.bench.cores import cores_for
from ivshmem.bench.roundtrip import End, Pair, measure, python_end
from ivshmem.errors import WorkerFailed

(EVENTFD,) = [way for way in PEERS if way.name == "os.eventfd"]

needs_compiler = pytest.mark.skipif(
    shutil.which("cc") is None and shutil.which("gcc") is None, reason="no C compiler"
)


def shell(script: str) -> End:
    return End(["sh", "-c", script])


WAITS = shell("echo ready; read line; read line")


class Ends(Way):
    """A way of two given ends."""

    def __init__(self, name: str, ping: End, echo: End) -> None:
        super().__init__(name)
        self._both = ping, echo

    @contextlib.contextmanager
    def ends(self) -> Iterator[tuple[End, End]]:
        yield self._both


# -- pairs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", PEERS[:3], ids=lambda way: way.name)
def test_round_trips(way: Way) -> None:
    with way.ends() as ends, Pair(*ends, cores_for("free")) as pair:
        durations, noise = measure(pair, trips=60)
        assert len(durations) == 60
        assert all(duration > 0 for duration in durations)
        assert noise.share >= 0
        assert len(pair.trips(1)) == 1


def test_what_statements_assign_lives_on(directory: Path) -> None:
    """An end that counts must not begin anew: the other may be a turn ahead by then."""
    (directory / "counting.py").write_text(
        "import contextlib, os\n"
        "from ivshmem.bench.worker import Steps\n"
        "@contextlib.contextmanager\n"
        "def end(role, there, here):\n"
        "    names = dict(write=os.eventfd_write, read=os.eventfd_read, there=there, here=here)\n"
        "    names |= dict(out=0, seen=0)\n"
        "    ring = 'out += 1; write(there, out)'\n"
        "    yield Steps(ring, 'seen += 1; assert read(here) == seen, seen', names)\n"
    )
    a, b = fds = os.eventfd(0), os.eventfd(0)
    try:
        with Pair(
            python_end("ping", "counting:end", a, b, fds=fds, directory=directory),
            python_end("echo", "counting:end", b, a, fds=fds, directory=directory),
            cores_for("free"),
        ) as pair:
            for count in (3, 1, 4):
                assert len(pair.trips(count)) == count
    finally:
        for fd in fds:
            os.close(fd)


def test_ends_run_where_they_are_told() -> None:
    here, there = cores_for("same")
    with EVENTFD.ends() as ends, Pair(*ends, (here, there)) as pair:
        assert [os.sched_getaffinity(pid) for pid in pair.pids] == [here, there]


def test_a_measurement_keeps_to_its_time_if_it_can() -> None:
    with EVENTFD.ends() as ends, Pair(*ends, cores_for("free")) as pair:
        assert len(measure(pair, trips=10**6, seconds=1e-9).durations) == roundtrip.LEAST


def test_an_end_that_dies_in_the_middle() -> None:
    dies = shell("echo ready; read line; echo first; echo it broke >&2; exit 3")
    with Pair(WAITS, dies, cores_for("free")) as pair:
        with pytest.raises(WorkerFailed) as caught:
            pair.trips(5)
    assert str(caught.value) == "the echo end ended with exit status 3: it broke"


def test_an_end_that_is_killed() -> None:
    with Pair(shell("echo ready; read line; kill -9 $$"), WAITS, cores_for("free")) as pair:
        with pytest.raises(WorkerFailed, match="the ping end was ended by signal 9: no message"):
            pair.trips(5)


def test_an_end_that_does_not_start() -> None:
    with pytest.raises(WorkerFailed, match=r"the echo end .*No module named 'nowhere'"):
        Pair(WAITS, python_end("echo", "nowhere:at_all"), cores_for("free"))
    with pytest.raises(FileNotFoundError):
        Pair(WAITS, End(["/nowhere/at/all"]), cores_for("free"))


def test_an_end_that_is_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    with Pair(WAITS, WAITS, cores_for("free")) as pair:
        monkeypatch.setattr(roundtrip, "PATIENCE", 0.01)
        with pytest.raises(WorkerFailed, match="no result from either end for"):
            pair.trips(5)


def test_ends_end_with_the_pair() -> None:
    stubborn = shell("trap '' TERM HUP; echo ready; while :; do sleep 1000; done")
    with Pair(stubborn, stubborn, cores_for("free")) as pair:
        pids = pair.pids
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
    pair.close()


# -- the suite -------------------------------------------------------------------------------------


def test_a_way_that_fails_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    fails = Ends("bad", WAITS, shell("echo ready; read line; echo broken >&2; exit 1"))
    absent = Ends("absent", WAITS, shell("exit 1"))
    suite = roundtrips.Suite(
        [fails, EVENTFD, absent], trips=50, seconds=1, rounds=2, news=StringIO()
    )
    measured = suite.run("free")
    assert list(measured) == ["os.eventfd"]
    assert [len(each.durations) for each in measured["os.eventfd"]] == [50, 50]
    assert suite.failures == [
        "absent (free): the echo end ended with exit status 1: no message",
        "bad (free): the echo end ended with exit status 1: broken",
    ]
    assert capsys.readouterr().err.count("left out: ") == 2


def test_ways_are_chosen_by_words() -> None:
    assert [way.name for way in roundtrips.chosen(PEERS, "PIPE, zmq")] == [
        "os.pipe",
        "multiprocessing.Pipe",
        "pyzmq PAIR, ipc",
    ]
    with pytest.raises(SystemExit, match="no way has 'carrier pigeon' in its name"):
        roundtrips.chosen(PEERS, "pipe,carrier pigeon")


@pytest.mark.nightly
@needs_compiler
def test_the_command(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    command = [sys.executable, "-W", "error", "-m", "bench.roundtrips", "--pinning", "same"]
    command += ["--ways", "os.eventfd,wait(0)", "--trips", "60", "--rounds", "1"]
    done = subprocess.run(
        [*command, "--json", str(file)], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "| os.eventfd |" in done.stdout
    names = {each["params"]["way"] for each in json.loads(file.read_text())["benchmarks"]}
    assert {"C: eventfd, blocking read", "os.eventfd", "ivshmem: wait(0)"} <= names
    again = subprocess.run(
        [*command[:5], "--table", str(file)], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert again.stdout == done.stdout


def marked(mark: str) -> list[str]:
    """The command lines of processes that inherited this in their environment."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if mark.encode() in Path(f"/proc/{name}/environ").read_bytes():
                found.append(Path(f"/proc/{name}/cmdline").read_text().replace("\0", " "))
    return found


@pytest.mark.nightly  # takes four seconds of the processor; killed, by day, is the stricter case
@needs_compiler
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_it_leaves_nothing(number: int, status: int) -> None:
    mark = f"ivshmem-{uuid.uuid4()}"
    command = [sys.executable, "-m", "bench.roundtrips", "--pinning", "busy", "--trips", "1000000"]
    command += ["--ways", "multiprocessing,wait(0)", "--seconds", "60"]
    with subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "MARK": mark},
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("busy: round 1"):
                break
        assert len(marked(mark)) > 8  # the suite, two ends each, servers, who keeps a core busy
        process.send_signal(number)
        errors = process.stderr.read()
        assert process.wait(60) == status, errors
    assert "Traceback" not in errors
    until(lambda: not marked(mark), "the end of all processes")


@needs_compiler
def test_killed_it_leaves_no_end_that_waits_for_ever() -> None:
    mark = f"ivshmem-{uuid.uuid4()}"
    command = [sys.executable, "-m", "bench.roundtrips", "--pinning", "busy", "--trips", "1000000"]
    command += ["--ways", "os.eventfd", "--seconds", "60"]
    with subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "MARK": mark},
    ) as process:
        assert process.stderr is not None
        process.stderr.readline()
        process.kill()
    until(lambda: not marked(mark), "the end of all processes")
