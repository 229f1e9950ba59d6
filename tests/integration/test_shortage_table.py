"""Commands while descriptors, memory or file sizes are short.

Each works, or says in one line what is short and what fixes that. It leaves nothing behind.

A limit begins when Python imports the command's first module: a limit under which Python itself
cannot start says nothing about this package.
"""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from support.leaks import OWN, SHM
from support.stopping import users_environment
from support.waiting import PATIENCE, until

import ivshmem
from ivshmem.cli.run import guarded

MIB = 1 << 20
SIZE = MIB  # of the regions: more than any file may be long here

# The limit stands for the command alone: sockets, names and drafts are looked for outside.
_LIMITED = """\
import resource, sys
from ivshmem.cli{of} import main
kind, amount = sys.argv[1], int(sys.argv[2])
del sys.argv[1:3]
if kind:
    resource.setrlimit(getattr(resource, "RLIMIT_" + kind), (amount, amount))
raise SystemExit(main())
"""

# What is short, and what a person types to have more of it.
_SAYS = {
    "NOFILE": re.compile(r"open files|descriptors|RLIMIT_NOFILE"),
    "FSIZE": re.compile(r"(?i)file too large"),
}
_REMEDY = {
    "NOFILE": re.compile(r"ulimit -n|--no-control"),
    "AS": re.compile(r"ulimit -v unlimited.*LimitAS=infinity"),
    "FSIZE": re.compile(r"smaller size|ulimit -f"),
}
# A warning comes before the line; it does not end the command.
_WARNS = re.compile(
    r"ivshmem: (RLIMIT_NOFILE is \d+: enough for|no control socket: (?!.*--no-control)"
    r"|serving, but stdout cannot be written: |newcomers have to wait: )"
)


class Ended(NamedTuple):
    status: int
    out: str
    err: str
    served: bool  # whether a peer could join; a server was then ended by SIGTERM


class Place:
    """A directory with a server, an image of its region, and what the commands may make."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.name = f"{OWN}short"
        self.commands = {
            "serve": ["serve", "-S", self.at("s"), "-l", "1M", "--no-control"],
            "serve control": ["serve", "-S", self.at("s"), "-l", "1M"],
            "serve name": ["serve", "-S", self.at("s"), "-l", "1M", "-M", self.name],
            "serve file": ["serve", "-S", self.at("s"), "-l", "1M", "-f", self.at("memory")],
            "serve names": ["serve", "-S", self.at("s"), "-l", "1M", "--names"],
            "compat": ["-F", "-S", self.at("s"), "-l", "1M", "-M", self.name],
            "connect": ["connect", "-S", self.at("main"), "-c", "peers"],
            "status": ["status", "-S", self.at("main")],
            "doctor": ["doctor", "-S", self.at("main")],
            "qemu": ["qemu", "-S", self.at("main")],
            "save": ["save", "-q", "-S", self.at("main"), self.at("saved")],
            "load": ["load", "-q", "-S", self.at("main"), self.at("image")],
        }

    def at(self, name: str) -> str:
        return str(self.directory / name)

    def things(self) -> set[str]:
        """What lies in the directory and, of ours, in /dev/shm."""
        names = {f"/dev/shm/{n}" for n in os.listdir(SHM) if n.strip(".").startswith(self.name)}
        return {*os.listdir(self.directory), *names}

    def run(self, command: str, kind: str = "", amount: int = 0) -> Ended:
        """Run it under the limit. A server that comes up serves one peer and gets SIGTERM."""
        of = ".compat" if command == "compat" else ".main"
        process = subprocess.Popen(
            [
                sys.executable, "-c", _LIMITED.format(of=of), kind, str(amount),
                *self.commands[command],
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=users_environment(),
            cwd=self.directory,
        )  # fmt: skip
        with process:
            try:
                serves = command.startswith("serve") or command == "compat"
                served = serves and until(lambda: _ended(process) or self._joined()) == "joined"
                if served:
                    process.terminate()
                out, err = process.communicate(timeout=PATIENCE)
            finally:
                process.kill()
        return Ended(process.returncode, out, err, served)

    def _joined(self) -> str:
        try:
            with ivshmem.connect(self.at("s"), timeout=5):
                return "joined"
        except (OSError, ivshmem.IvshmemError):
            return ""


def _ended(process: subprocess.Popen[str]) -> str:
    # The process stays a zombie for communicate().
    waited = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    return "ended" if waited else ""


@pytest.fixture(scope="module")
def server_place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    place = Place(tmp_path_factory.mktemp("short"))
    with ivshmem.Region.create(SIZE) as region:
        region.write(0, b"saved")
        ivshmem.save(region, place.at("image"))
    process = subprocess.Popen(
        [sys.executable, "-m", "ivshmem", "serve", "-q", "-l", "1M", "-S", place.at("main")],
        stdout=subprocess.DEVNULL,
        env=users_environment(),
    )
    with process:
        try:
            # It makes its control socket after the other, and answers there when all is ready.
            until(lambda: os.path.exists(place.at("main.control")), "a control socket")
            yield place
        finally:
            process.terminate()


@pytest.fixture
def place(server_place: Place) -> Iterator[Place]:
    """The same place for each test, without what the test before made there."""
    yield server_place
    for name in ("saved", "memory"):
        Path(server_place.at(name)).unlink(missing_ok=True)


def _check(ended: Ended, kind: str) -> None:
    """It worked, or it said in one line what is short and what fixes that."""
    assert "Traceback" not in ended.err, ended.err
    assert "Exception ignored" not in ended.err, ended.err
    assert ended.status in (0, 1, 2), ended
    lines = [line for line in ended.err.splitlines() if not _WARNS.match(line)]
    if ended.status == 0 or ended.out.rstrip().endswith("not checked"):
        return  # doctor's table has a line of its own for what it could not look at
    assert not ended.served, ended
    assert len(lines) == 1, ended.err
    assert lines[0].startswith("ivshmem: "), lines
    assert _SAYS[kind].search(lines[0]), lines
    assert _REMEDY[kind].search(lines[0]), lines


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("command", "limit"),
    [
        *[(command, 3) for command in ("serve", "compat", "connect", "status", "doctor", "qemu")],
        ("serve", 7), ("serve name", 7), ("serve file", 8), ("compat", 40),
        ("connect", 6), ("save", 9), ("load", 8),
    ],
)  # fmt: skip
def test_few_descriptors(place: Place, command: str, limit: int) -> None:
    before = place.things()
    _check(place.run(command, "NOFILE", limit), "NOFILE")
    assert place.things() - before <= {"saved", "memory"}


# No process runs under RLIMIT_AS here: at some limits Python cannot even print a line.
@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (MemoryError(), _REMEDY["AS"]),
        (OSError(12, os.strerror(12)), _REMEDY["AS"]),
        (RuntimeError("can't start new thread"), re.compile(r"ulimit -v unlimited.*ulimit -u")),
        (ImportError("a.so: failed to map segment from shared object"), _REMEDY["AS"]),
        (ImportError("a.so: cannot open it: Too many open files"), _REMEDY["NOFILE"]),
        (OSError(28, os.strerror(28)), re.compile("free some space")),
    ],
    ids=repr,
)
def test_errors_that_mean_a_shortage(
    error: Exception, remedy: re.Pattern[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def run() -> int:
        raise error

    assert guarded(run) == 1
    line = capsys.readouterr().err
    assert line.startswith("ivshmem: ")
    assert line.count("\n") == 1
    assert remedy.search(line), line


_LOST = SystemError("error return without exception set")


@pytest.mark.parametrize("limited", [resource.RLIMIT_AS, resource.RLIMIT_DATA])
def test_a_lost_error_under_a_limit_is_a_shortage(
    limited: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def limits(which: int) -> tuple[int, int]:
        return (1 << 30 if which == limited else resource.RLIM_INFINITY, resource.RLIM_INFINITY)

    monkeypatch.setattr(resource, "getrlimit", limits)
    test_errors_that_mean_a_shortage(_LOST, _REMEDY["AS"], capsys)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("a fault"), ImportError("no module"), SystemError("NULL"), _LOST],
    ids=repr,
)
def test_other_errors_stay_faults(error: Exception) -> None:
    def run() -> int:
        raise error

    with pytest.raises(type(error)):
        guarded(run)


@pytest.mark.parametrize(
    ("command", "limit"),
    [
        ("serve", 4096),
        ("serve name", SIZE - 1),
        ("serve file", 0),
        ("compat", 65536),
        ("status", 0),
        ("save", 0),
        ("load", 0),
    ],
)
def test_files_that_may_not_be_long(place: Place, command: str, limit: int) -> None:
    before = place.things()
    ended = place.run(command, "FSIZE", limit)
    _check(ended, "FSIZE")
    if command.startswith("serve") or command == "compat":
        assert ended.status == 1, ended
    assert place.things() - before <= {"saved"}
