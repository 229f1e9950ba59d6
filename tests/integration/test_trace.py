"""`ivshmem trace`: what it sees of rings, that it disturbs none, and what is in the file."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.mounts import mounted, root
from support.waiting import PATIENCE, until

import ivshmem
from ivshmem import Client, Server
from ivshmem.tracing.watcher import InterruptTaken, RingWatcher, Rung

VECTORS = 2


@pytest.fixture
def served(socket_path: str) -> Iterator[Server]:
    with Server(socket_path, "4K", vectors=VECTORS).start() as server:
        yield server


@pytest.fixture
def pair(served: Server) -> Iterator[tuple[Client, Client]]:
    with ivshmem.connect(served.path) as one, ivshmem.connect(served.path) as two:
        yield one, two


def watched(watcher: RingWatcher, wanted: int) -> list[Any]:
    """The next events: at least so many."""
    found: list[Any] = []

    def come() -> bool:
        found.extend(watcher.watch(0.01))
        return len(found) >= wanted

    until(come, "events come")
    return found


def plainly(events: list[Any]) -> list[tuple[object, ...]]:
    """Without the times."""
    return [(type(event).__name__, *event[1:]) for event in events]


def quiet(watcher: RingWatcher) -> None:
    """Let it see who is there."""
    watched(watcher, 2)
    assert not list(watcher.watch(0.1))


# -- what a watcher sees --------------------------------------------------------------------------


def test_a_ring_and_its_taking(served: Server, pair: tuple[Client, Client]) -> None:
    one, two = pair
    with RingWatcher(served.path) as watcher:
        assert plainly(watched(watcher, 2)) == [("Joined", one.id), ("Joined", two.id)]
        for _ in range(3):
            before = time.monotonic_ns()
            one.ring(two.id, 1)
            (ring,) = watched(watcher, 1)
            assert ring == Rung(ring.at, two.id, 1, False, one.id)
            assert before < ring.at < time.monotonic_ns()
            assert two.wait(1, timeout=PATIENCE) == 1  # it is still there
            (taken,) = watched(watcher, 1)
            assert taken == InterruptTaken(taken.at, two.id, 1)
            assert taken.at > ring.at


def test_rings_that_are_not_taken_yet(served: Server, pair: tuple[Client, Client]) -> None:
    one, two = pair
    with RingWatcher(served.path) as watcher:
        quiet(watcher)
        one.ring(two.id, 0)
        assert plainly(watched(watcher, 1)) == [("Rung", two.id, 0, False, one.id)]
        one.ring(two.id, 0)
        assert plainly(watched(watcher, 1)) == [("Rung", two.id, 0, False, one.id)]
        assert two.wait(0, timeout=PATIENCE) == 2
        assert plainly(watched(watcher, 1)) == [("InterruptTaken", two.id, 0)]


def test_a_ring_that_was_taken_before_the_look(served: Server, pair: tuple[Client, Client]) -> None:
    one, two = pair
    with RingWatcher(served.path) as watcher:
        quiet(watcher)
        one.ring(two.id, 0)
        assert two.wait(0, timeout=PATIENCE) == 1
        assert plainly(watched(watcher, 1)) == [("Rung", two.id, 0, True, one.id)]


def test_a_ring_from_before(served: Server, pair: tuple[Client, Client]) -> None:
    one, two = pair
    one.ring(two.id, 1)
    with RingWatcher(served.path) as watcher:
        joined = [("Joined", one.id), ("Joined", two.id)]
        assert plainly(watched(watcher, 3)) == [*joined, ("Rung", two.id, 1, False, -1)]


def test_who_rang_is_not_known_among_three(served: Server, pair: tuple[Client, Client]) -> None:
    one, two = pair
    with ivshmem.connect(served.path) as three, RingWatcher(served.path) as watcher:
        watched(watcher, 3)
        list(watcher.watch(0.1))
        one.ring(two.id, 0)
        assert plainly(watched(watcher, 1)) == [("Rung", two.id, 0, False, -1)]
        three.close()
        assert plainly(watched(watcher, 1)) == [("Left", three.id)]
        two.ring(one.id, 0)
        assert plainly(watched(watcher, 1)) == [("Rung", one.id, 0, False, two.id)]


def test_its_own_vectors(served: Server, pair: tuple[Client, Client]) -> None:
    one, two = pair
    with RingWatcher(served.path) as watcher:
        quiet(watcher)
        two.close()
        assert plainly(watched(watcher, 1)) == [("Left", two.id)]
        for _ in range(2):
            until(lambda: watcher.id in one.peers, "it is there")
            one.ring(watcher.id, 1)
            assert plainly(watched(watcher, 1)) == [("Rung", watcher.id, 1, True, one.id)]


def test_who_comes_and_goes(served: Server) -> None:
    with RingWatcher(served.path) as watcher:
        for _ in range(3):
            with ivshmem.connect(served.path) as client:
                number = client.id
                assert plainly(watched(watcher, 1)) == [("Joined", number)]
            assert plainly(watched(watcher, 1)) == [("Left", number)]
        served.close()
        until(lambda: list(watcher.watch(0.01)) or watcher.over, "the server has ended")
        assert "the server has ended the connection" in watcher.over


# -- the command ----------------------------------------------------------------------------------


@contextlib.contextmanager
def tracing(server: Server, file: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    """The command, as soon as it is a peer."""
    command = [sys.executable, "-m", "ivshmem", "trace", str(file), "-S", server.path, *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            assert line.endswith(": Ctrl-C ends this\n"), line
            yield process
        finally:
            process.kill()


def ended(process: subprocess.Popen[str], number: int = signal.SIGINT) -> str:
    """Its last words."""
    process.send_signal(number)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, said
    return said


def ring_and_take(one: Client, two: Client, count: int) -> None:
    for _ in range(count):
        one.ring(two.id, 1)
        assert two.wait(1, timeout=PATIENCE) == 1
        time.sleep(0.01)


def stands_in(file: Path, words: str) -> Callable[[], bool]:
    return lambda: words in file.read_text()


def slices(events: list[Any]) -> dict[tuple[int, int], int]:
    """Slices of each track; each that begins ends, in order, and none is inside of itself."""
    found: dict[tuple[int, int], int] = {}
    since: dict[tuple[int, int], float] = {}
    for event in events:
        track = event["pid"], event["tid"]
        if event["ph"] == "B":
            assert track not in since
            since[track] = event["ts"]
            found[track] = found.get(track, 0) + 1
        elif event["ph"] == "E":
            assert since.pop(track) <= event["ts"]
    assert not since
    return found


def test_a_ring_that_is_taken_at_once_is_one_ring(
    served: Server, pair: tuple[Client, Client]
) -> None:
    """Also if the watcher looks while it is taken: a process of its own looks all the time."""
    one, two = pair
    with mmap.mmap(-1, mmap.PAGESIZE) as shared, memoryview(shared).cast("Q") as words:
        pid = os.fork()
        if pid == 0:
            try:
                with RingWatcher(served.path) as watcher:
                    quiet(watcher)
                    words[1] = 1
                    while words[2] == 0:
                        words[0] += [type(sight) for sight in watcher.watch(0)].count(Rung)
            finally:
                os._exit(0)
        try:
            until(lambda: words[1], "a watcher")
            twice = 0
            for _ in range(2000):
                before = words[0]
                one.ring(two.id, 1)
                assert two.wait(1, timeout=PATIENCE) == 1
                spin_until(lambda before=before: words[0] != before, 0.01)  # type: ignore[misc]
                spin_until(lambda: False, 0.0001)
                twice += words[0] - before > 1
        finally:
            words[2] = 1
            os.waitpid(pid, 0)
        assert words[0] > 1000
        assert twice == 0


def spin_until(condition: Callable[[], bool], most: float) -> None:
    end = time.perf_counter() + most
    while not condition() and time.perf_counter() < end:
        pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_file(served: Server, pair: tuple[Client, Client], directory: Path, number: int) -> None:
    one, two = pair
    file = directory / "trace.json"
    with tracing(served, file) as process:
        ring_and_take(one, two, 3)
        one.ring(two.id, 0)
        until(stands_in(file, '"vector 0"'), "the ring is in the file")
        said = ended(process, number)
    assert said.startswith("ivshmem: 4 rings in ")
    assert said.endswith(f" s, 3 taken: open {file} at https://ui.perfetto.dev\n")
    events = json.loads(file.read_text())
    found = slices(events)
    assert found.pop((one.id + 1, 0)) == found.pop((two.id + 1, 0)) == 1  # connected
    assert found.pop((two.id + 1, 1)) == 1  # vector 0
    instants = [event for event in events if event["ph"] == "i"]
    assert sum(found.values()) + len(instants) == 3
    assert all(track == (two.id + 1, 2) for track in found)
    rung = [each for each in events if each.get("name") in ("interrupt", "ring, taken at once")]
    assert all(each["args"] == {"from": f"peer {one.id}"} for each in rung)
    names = [each["args"]["name"] for each in events if each.get("name") == "process_name"]
    assert {f"peer {one.id}", f"peer {two.id}"} <= set(names)
    times = [event["ts"] for event in events if event["ph"] in "BEi"]
    assert times == sorted(times)
    assert times[-1] * 1000 < time.monotonic_ns()


def test_sigkill_leaves_what_came_before(
    served: Server, pair: tuple[Client, Client], directory: Path
) -> None:
    """The viewers accept a file that lacks the closing bracket."""
    one, two = pair
    file = directory / "trace.json"
    with tracing(served, file) as process:
        one.ring(two.id, 1)
        until(stands_in(file, '"interrupt"'), "it is written while it goes on")
        process.kill()
        process.wait(PATIENCE)
    events = json.loads(file.read_text() + "]")
    assert [each["name"] for each in events if each["ph"] == "B"].count("interrupt") == 1


def test_limits(served: Server, pair: tuple[Client, Client], directory: Path) -> None:
    one, two = pair
    file = directory / "trace.json"
    with tracing(served, file, "--limit", "3") as process:
        while process.poll() is None:
            ring_and_take(one, two, 1)
        said = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 0
    assert said.startswith("ivshmem: 3 rings were recorded: this ends (--limit)\n")
    with tracing(served, file, "-t", "0.3", "--force") as process:
        said = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 0
    assert said.startswith("ivshmem: 0 rings in ")
    slices(json.loads(file.read_text()))


def test_the_servers_end(served: Server, directory: Path) -> None:
    file = directory / "trace.json"
    with tracing(served, file) as process:
        served.close()
        said = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 1
    assert said.splitlines()[-1] == (
        f"ivshmem: {served.path}: the server has ended the connection: the file has what came"
        " before"
    )
    assert json.loads(file.read_text()) == []


def failed(server: Server, *words: str) -> list[str]:
    """The lines of errors of a command that fails."""
    command = [sys.executable, "-m", "ivshmem", "trace", "-S", server.path, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode in (1, 2)
    return done.stderr.splitlines()


def test_what_cannot_be(served: Server, directory: Path) -> None:
    file = directory / "trace.json"
    file.write_text("mine")
    (line,) = failed(served, str(file))
    assert line == (
        f"ivshmem: {file}: file exists: choose another path, or write over it with --force"
    )
    assert file.read_text() == "mine"
    (line,) = failed(served, str(directory / "none" / "trace.json"))
    assert line.endswith(
        "trace.json: its directory does not exist: create that first, or choose another path"
    )
    (line,) = failed(served, str(directory), "--force")
    assert line == f"ivshmem: {directory}: it is a directory: give a file in that directory"
    assert "not a number of rings: 0" in failed(served, str(file), "--limit", "0")[-1]
    (line,) = failed(served, "/dev/full", "--force", "-t", "0.1")
    assert line == "ivshmem: /dev/full: it is not a regular file: choose another path"


@pytest.mark.skipif(not root, reason="mounts a file system: run it as root")
def test_a_full_disk(served: Server) -> None:
    with mounted("tmpfs", "size=4K") as small:
        (small / "most").write_bytes(bytes(4096))
        lines = failed(served, str(small / "trace.json"), "-t", "0.1")
    assert lines[-1].count("trace.json: no space left on device") == 1


def test_without_descriptors(served: Server, directory: Path) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(ivshmem.connect(served.path))
        command = f'ulimit -n 30; exec "{sys.executable}" -m ivshmem trace "$0" -S "$1" -t 1'
        done = subprocess.run(
            ["sh", "-c", command, str(directory / "trace.json"), served.path],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "ulimit -n" in done.stderr or "descriptors" in done.stderr, done.stderr


@pytest.mark.skipif(os.getuid() != 0, reason="only root may ask the server of another user")
def test_processes_have_names(socket_path: str, directory: Path) -> None:
    """Where the control socket answers."""
    file = directory / "trace.json"
    words = [sys.executable, "-m", "ivshmem"]
    with subprocess.Popen([*words, "serve", "-S", socket_path], stderr=subprocess.PIPE) as server:
        try:
            with ivshmem.connect(socket_path, timeout=PATIENCE, wait_for_server=True) as client:
                command = [*words, "trace", str(file), "-S", socket_path]
                with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
                    until(file.exists, "it has its file")
                    until(stands_in(file, f"({os.getpid()})"), "it knows this process")
                    process.send_signal(signal.SIGINT)
        finally:
            server.terminate()
            server.communicate()
    assert f'"peer {client.id}: ' in file.read_text()
