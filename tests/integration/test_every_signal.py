"""`serve --supervise`, and its launcher: every signal, to every process, at every stage of life.

What may follow: service, a clean end where the signal asks for one, a stop until SIGCONT, or a
failure status. What may not: a hang, a traceback, a stale socket.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from support.peer import RawPeer
from support.stopping import Stop, state, users_environment
from support.waiting import PATIENCE, until

from ivshmem import connect

VECTORS = 2

# Where a process stops itself to get its signal.
STAGES = {
    "launching": "supervise.py:supervise",  # the parent has no child yet
    "starting": "service.py:open",  # the child has nothing yet
    "opened": "supervised.py:announce",  # all is open and noted down; nobody was told
    "serving": "",
    "reloading": "service.py:reload",
    "ending": "service.py:close",
}
ASKED_TO_END = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
SIGNALS = [number for number in range(1, signal.NSIG) if number not in (32, 33)]  # glibc's own

CASES = [
    (stage, target, number)
    for stage in STAGES
    for target in ("parent", "child", "launcher")
    for number in SIGNALS
    if not (target == "child" and stage == "launching")  # there is none
    if not (target == "launcher" and stage not in ("launching", "starting", "opened"))
]

# In each run of the tests; all others in `make nightly`.
FEW = [
    ("serving", "child", signal.SIGRTMIN + 6),
    ("serving", "child", signal.SIGABRT),
    ("serving", "parent", signal.SIGUSR1),
    ("starting", "child", signal.SIGKILL),
    ("starting", "parent", signal.SIGTERM),
    ("opened", "child", signal.SIGKILL),
    ("opened", "launcher", signal.SIGINT),
    ("reloading", "child", signal.SIGSEGV),
    ("ending", "child", signal.SIGKILL),
    ("launching", "launcher", signal.SIGTERM),
]


def words(case: tuple[str, str, int]) -> str:
    return f"{case[0]}-{case[1]}-{int(case[2])}"


class Life:
    """A supervised server, brought to a stage of its life."""

    def __init__(
        self, directory: Path, stage: str, *, launched: bool, session: bool = True, place: str = ""
    ) -> None:
        self.stage = stage
        self.launched = launched
        self.path = directory / "socket"
        self.pid_file = directory / "pid"
        self.log = directory / "log"
        config = directory / "config.toml"
        config.write_text(
            f'[region.a]\nsocket = "{self.path}"\nsize = "64K"\nvectors = {VECTORS}\n'
        )
        self.stop = Stop(directory / "stop", place or STAGES[stage])
        command = [sys.executable, "-m", "ivshmem", "serve", "--supervise", "--config", str(config)]
        command += ["--pid-file", str(self.pid_file), *(["--daemon", "-v"] if launched else [])]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.stop.environment,
                preexec_fn=partial(_prepare, session),
            )
        self.peer: RawPeer | None = None
        self.stopped = 0

    def arrive(self) -> None:
        """Come to the stage."""
        if self.stage in ("serving", "reloading", "ending"):
            self.peer = until(self._joined, "a peer")
            if self.stage != "serving":
                ask = signal.SIGHUP if self.stage == "reloading" else signal.SIGTERM
                os.kill(int(self.pid_file.read_text()), ask)
        if self.stage != "serving":
            self.stopped = self.stop.reached()

    def _joined(self) -> RawPeer | None:
        with contextlib.suppress(OSError, ValueError, AssertionError):
            peer = RawPeer(str(self.path))
            try:
                return peer.set_up(VECTORS)
            except BaseException:
                peer.close()
                raise
        return None

    def target(self, who: str) -> int:
        if who == "launcher":
            assert self.launched
            return self.process.pid
        if self.stage == "launching":
            return self.stopped
        parent = int(until(self.pid_file.read_text))
        return parent if who == "parent" else _child_of(parent)

    def go_on(self, *targets: int) -> None:
        """Let those continue that have stopped."""
        for pid in {self.stopped, *targets} - {0}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def outcome(self, *, end_is_wanted: bool) -> str:
        """What follows: "service", or "end" when nothing of it is left."""

        def look() -> str:
            if not self.stop.family():
                return "end"
            if not end_is_wanted and (peer := self._joined()):
                peer.close()
                return "service"
            return ""

        return until(look, f"an outcome: {self.log.read_text()}")

    def leave(self) -> None:
        """End a server that serves."""

        def gone() -> bool:
            with contextlib.suppress(OSError, ValueError):
                os.kill(int(self.pid_file.read_text()), signal.SIGTERM)
            return not self.stop.family()

        until(gone, "the end")

    def close(self) -> None:
        self.go_on()
        self.stop.kill_all()
        if self.peer is not None:
            self.peer.close()
        self.process.wait(PATIENCE)


def _prepare(session: bool) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if session:
        os.setsid()  # no terminal: SIGHUP means to reload
    else:
        os.setpgid(0, 0)  # a shell's job: SIGTSTP stops nothing in a session of its own


def _child_of(parent: int) -> int:
    children = Path(f"/proc/{parent}/task/{parent}/children")
    return int(until(lambda: children.read_text().split(), "a child")[0])


@pytest.fixture
def lives() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def check(life: Life, who: str, number: int) -> None:
    """Send a signal, and see that what follows is one of what may."""
    target = life.target(who)
    os.kill(target, number)
    if number in (signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU):
        life.go_on()  # the one that had stopped itself
        with contextlib.suppress(AssertionError):
            _briefly_stopped(target)
    life.go_on(target)
    ends = number in ASKED_TO_END and not (number == signal.SIGHUP and life.stage != "launching")
    if number == signal.SIGHUP:
        ends = False  # it reads its file again, or ends if nothing is to be read yet
    outcome = life.outcome(end_is_wanted=ends or life.stage == "ending")
    if outcome == "service":
        if life.peer is not None:
            newcomer = life._joined()
            assert newcomer is not None
            until(lambda: life.peer is not None and _knows(life.peer, newcomer.id))
            newcomer.close()
        life.leave()
    status = life.process.wait(PATIENCE)
    log = life.log.read_text()
    assert "Traceback" not in log, log
    assert not os.path.lexists(life.path), log
    assert not os.path.lexists(f"{life.path}.control"), log
    if ends and who != "launcher":
        assert status == 0 or (life.stage == "launching" and status in (-number, 130)), log
    elif outcome == "end" and life.stage != "ending" and number not in ASKED_TO_END:
        assert status != 0, log


def _briefly_stopped(pid: int) -> None:
    """It has stopped, if it does not hold that signal back."""
    until(lambda: state(pid) in ("T", "S", "R", ""))


def _knows(peer: RawPeer, ident: int) -> bool:
    while peer.readable(0):
        assert peer.take() is not None, "the server ended the connection"
    return peer.counts.get(ident) == VECTORS


def run(tmp_path: Path, lives: contextlib.ExitStack, case: tuple[str, str, int]) -> None:
    stage, who, number = case
    life = Life(tmp_path, stage, launched=who == "launcher")
    lives.callback(life.close)
    life.arrive()
    check(life, who, number)


def test_killed_before_it_listens(tmp_path: Path, lives: contextlib.ExitStack) -> None:
    """Its socket is bound and noted down; the successor has to let others connect."""
    life = Life(tmp_path, "binding", launched=False, place="listener.py:listen")
    lives.callback(life.close)
    life.arrive()
    os.kill(life.stopped, signal.SIGKILL)
    assert life.outcome(end_is_wanted=False) == "service"
    life.leave()
    assert not os.path.lexists(life.path)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("case", FEW, ids=words)
def test_a_signal(tmp_path: Path, lives: contextlib.ExitStack, case: tuple[str, str, int]) -> None:
    run(tmp_path, lives, case)


@pytest.mark.nightly
@pytest.mark.parametrize("case", CASES, ids=words)
def test_each_signal(
    tmp_path: Path, lives: contextlib.ExitStack, case: tuple[str, str, int]
) -> None:
    run(tmp_path, lives, case)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("number", [signal.SIGTSTP, signal.SIGSTOP], ids=["TSTP", "STOP"])
@pytest.mark.parametrize("who", ["parent", "child"])
def test_a_stop_lasts_until_it_continues(
    tmp_path: Path, lives: contextlib.ExitStack, who: str, number: int
) -> None:
    life = Life(tmp_path, "serving", launched=False, session=False)
    lives.callback(life.close)
    life.arrive()
    target = life.target(who)
    os.kill(target, number)
    until(lambda: state(target) == "T", "a stopped process")
    os.kill(life.target("parent"), signal.SIGTERM)
    assert state(target) == "T"
    os.kill(target, signal.SIGCONT)
    assert life.process.wait(PATIENCE) == 0
    assert not os.path.lexists(life.path)


@pytest.mark.parametrize("stage", ["starting", "opened", "serving"])
def test_told_to_end_and_killed_at_once(
    tmp_path: Path, lives: contextlib.ExitStack, stage: str
) -> None:
    """The child dies before it can obey; the next one has to."""
    life = Life(tmp_path, stage, launched=False)
    lives.callback(life.close)
    life.arrive()
    child = life.target("child")
    os.kill(child, signal.SIGSTOP)  # so that it cannot obey first
    until(lambda: state(child) == "T", "a stopped process")
    os.kill(life.target("parent"), signal.SIGTERM)
    until(lambda: _is_pending(child, signal.SIGTERM), "a signal sent on")
    os.kill(child, signal.SIGKILL)
    assert life.outcome(end_is_wanted=True) == "end"
    assert life.process.wait(PATIENCE) == 0
    assert not os.path.lexists(life.path), life.log.read_text()


def _is_pending(pid: int, number: int) -> bool:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("ShdPnd:"):
            return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


@pytest.mark.sampled(2)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("place", ["supervisor.py:start_anew", "supervise.py:supervise"])
def test_told_to_end_while_it_takes_the_parents_place(
    tmp_path: Path, lives: contextlib.ExitStack, place: str, number: int
) -> None:
    """Before it begins anew, and after, when no handler is set yet."""
    life = Life(tmp_path, "serving", launched=False, place=place)
    lives.callback(life.close)
    if place == "supervise.py:supervise":  # the parent itself stops there first
        first = life.stop.reached()
        life.stop.again()
        os.kill(first, signal.SIGCONT)
    life.arrive()
    os.kill(life.target("parent"), signal.SIGKILL)
    heir = life.stop.reached()
    os.kill(heir, number)
    os.kill(heir, signal.SIGCONT)
    until(lambda: not life.stop.family(), "an end")
    life.process.wait(PATIENCE)
    assert not os.path.lexists(life.path), life.log.read_text()


@pytest.mark.parametrize("first", ["parent", "child"])
def test_parent_and_child_killed_at_once(
    tmp_path: Path, lives: contextlib.ExitStack, first: str
) -> None:
    """Nobody is left who could remove anything; the next server finds its way."""
    life = Life(tmp_path, "serving", launched=False)
    lives.callback(life.close)
    life.arrive()
    pids = {who: life.target(who) for who in ("parent", "child")}
    for pid in pids.values():
        os.kill(pid, signal.SIGSTOP)
    for who in sorted(pids, key=lambda who: who != first):
        os.kill(pids[who], signal.SIGKILL)
    assert life.process.wait(PATIENCE) == -signal.SIGKILL
    until(lambda: not life.stop.family())
    done = subprocess.Popen(
        [sys.executable, "-m", "ivshmem", "serve", "-S", str(life.path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=users_environment(),
    )
    with done:
        until(lambda: _serves(life.path))
        done.terminate()
        assert done.communicate(timeout=PATIENCE)[1].count(b"Traceback") == 0
    assert done.returncode == 0
    assert not os.path.lexists(life.path)


def _serves(path: Path) -> bool:
    """Whether a server is at work: the socket of one that was killed can still be connected to."""
    try:
        connect(path, timeout=PATIENCE).close()
    except OSError:
        return False
    return True


def test_children_that_are_killed_again_and_again_while_they_start(
    tmp_path: Path, lives: contextlib.ExitStack
) -> None:
    """After three of them it ends with a failure, says so, and leaves no socket."""
    life = Life(tmp_path, "starting", launched=False)
    lives.callback(life.close)
    pid = life.stop.reached()
    parent = int(life.pid_file.read_text())
    note = tmp_path / "stop" / "note"
    for _ in range(10):
        note.unlink(missing_ok=True)
        Path(f"{note}.taken").unlink(missing_ok=True)
        os.kill(pid, signal.SIGKILL)
        until(lambda: note.exists() or life.process.poll() is not None)
        if not note.exists():
            break
        pid = life.stop.reached()
    assert parent == life.process.pid
    assert life.process.wait(PATIENCE) == 1
    log = life.log.read_text()
    assert "died of SIGKILL, as did 2 before it, during the start" in log
    assert "Traceback" not in log
    assert not os.path.lexists(life.path)


def test_started_where_sigchld_is_ignored(tmp_path: Path, lives: contextlib.ExitStack) -> None:
    """As by some init scripts: the parent would never hear of its child's death."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        life = Life(tmp_path, "serving", launched=False)
    finally:
        signal.signal(signal.SIGCHLD, before)
    lives.callback(life.close)
    life.arrive()
    check(life, "child", signal.SIGKILL)
