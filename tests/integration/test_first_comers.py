"""Another user is first at a path, and root's command comes after: a table of who does what where.

Each case puts something at a path that root's command opens or creates, or on the way to it. Root's
own files, to which these lead, must stay as they are: content, owner, mode, size, names. A command
that refuses does so in one line with the path and what to do, with exit status 1, and soon.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.children import NOBODY
from support.leaks import names_in

import ivshmem
from ivshmem.cli import main as cli
from ivshmem.cli import pid_file
from ivshmem.errors import IvshmemError, MigrationError
from ivshmem.memory import image
from ivshmem.migration.model import Options, Plan
from ivshmem.migration.state_file import StateFile
from ivshmem.system import safe_files

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user: needs root")

SECONDS = 20.0  # for a command, on a busy machine
SIZE = 65536
REMEDIES = (
    "choose another path",
    "remove it",
    "remove this name",
    "name a file",
    "name the file",
    "replace it",
    "make it",
    "makes it",
    "create it",
    "give the path",
    "--accept-owner",
)

PLAN = Plan((), Options(), (), ())

SHM = Path("/dev/shm")


@contextlib.contextmanager
def stranger() -> Iterator[None]:
    """What is made in the block is another user's."""
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


class Outside:
    """Root's own files, which nobody may touch on the way to something else."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        path.chmod(0o755)  # names in it can be guessed and linked to
        self.secret = path / "secret"
        self.secret.write_bytes(bytes(range(256)) * (SIZE // 256))
        self.secret.chmod(0o600)
        self.empty = path / "empty"
        self.empty.touch(0o600)
        self.missing = path / "missing"
        (path / "sub").mkdir(0o755)
        (path / "sub" / "own").write_bytes(b"\1" * SIZE)

    def state(self) -> dict[str, object]:
        return {str(path): _file_state(path) for path in [self.path, *self.path.rglob("*")]}


def _file_state(path: Path) -> object:
    found = path.lstat()
    content = path.read_bytes() if stat.S_ISREG(found.st_mode) else None
    return found.st_ino, found.st_mode, found.st_uid, found.st_gid, found.st_size, content


# -- what another user does at a path -------------------------------------------------------------

Trap = Callable[[Path, Outside], None]


def link(path: Path, outside: Outside) -> None:
    with stranger():
        path.symlink_to(outside.secret)


def link_to_empty(path: Path, outside: Outside) -> None:
    with stranger():
        path.symlink_to(outside.empty)


def dangling(path: Path, outside: Outside) -> None:
    with stranger():
        path.symlink_to(outside.missing)


def relative(path: Path, outside: Outside) -> None:
    with stranger():
        path.symlink_to(os.path.relpath(outside.secret, path.parent))


def chain(path: Path, outside: Outside) -> None:
    with stranger():
        for number in range(5):
            Path(f"{path}-{number}").symlink_to(f"{path}-{number + 1}")
        Path(f"{path}-5").symlink_to(outside.secret)
        path.symlink_to(f"{path}-0")


def loop(path: Path, _outside: Outside) -> None:
    with stranger():
        path.symlink_to(path)


def link_by_proc(path: Path, _outside: Outside) -> None:
    with stranger():
        path.symlink_to("/proc/self/fd/0")


def hard_link(path: Path, outside: Outside) -> None:
    # By root, as the other user could with fs.protected_hardlinks=0.
    try:
        os.link(outside.secret, path)
    except OSError:  # /dev/shm is another file system: the same for root's file in it
        own = Path(f"{path}-own")
        own.write_bytes(b"\1" * SIZE)
        own.chmod(0o600)
        os.link(own, path)


def hard_link_to_empty(path: Path, _outside: Outside) -> None:
    own = Path(f"{path}-own")
    own.touch(0o600)
    os.link(own, path)


def fifo(path: Path, _outside: Outside) -> None:
    with stranger():
        os.mkfifo(path, 0o666)


def listening(path: Path, _outside: Outside) -> None:
    with stranger(), socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


def folder(path: Path, _outside: Outside) -> None:
    with stranger():
        path.mkdir(0o777)


def regular(path: Path, _outside: Outside) -> None:
    with stranger():
        path.write_bytes(b"\2" * SIZE)
        path.chmod(0o666)


def empty(path: Path, _outside: Outside) -> None:
    with stranger():
        path.touch(0o666)
        path.chmod(0o666)


def sparse(path: Path, _outside: Outside) -> None:
    with stranger():
        path.touch(0o600)
        os.truncate(path, 1 << 40)


def given_away(path: Path, _outside: Outside) -> None:
    """Made by another user, then handed to a third one."""
    path.write_bytes(b"\2" * SIZE)
    os.chown(path, 1000, 1000)


def device(path: Path, _outside: Outside) -> None:
    os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 7))  # /dev/full


def link_to_device(path: Path, _outside: Outside) -> None:
    with stranger():
        path.symlink_to("/dev/full")


TRAPS: list[Trap] = [
    link, link_to_empty, dangling, relative, chain, loop, link_by_proc, hard_link,
    hard_link_to_empty, fifo, listening, folder, regular, empty, sparse, given_away, device,
    link_to_device,
]  # fmt: skip


def parent(path: Path, outside: Outside) -> None:
    """Not the path, but a directory on the way to it is a link: for that `path` is below it."""
    with stranger():
        path.parent.symlink_to(outside.path)


# -- what root does -------------------------------------------------------------------------------


def said(*arguments: str, stop: float = SECONDS) -> tuple[int, str]:
    """Run a command in a copy of this process; its exit status, and what it wrote to stderr."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        status = 99
        try:
            os.setsid()
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, 0)
            os.dup2(null, 1)
            os.dup2(writer, 2)
            sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
            status = cli.main(arguments)
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 98
        finally:
            os._exit(status)
    os.close(writer)
    give_up = time.monotonic() + stop
    while True:
        pid, result = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        if time.monotonic() > give_up:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(reader)
            raise AssertionError(f"{arguments} did not end")
        time.sleep(0.002)
    with open(reader) as stream:
        return os.waitstatus_to_exitcode(result), stream.read()


class Command:
    """A command of root's, and the path in it at which another user has been."""

    def __init__(
        self, name: str, *words: str, posix: bool = False, fine: tuple[Trap, ...] = ()
    ) -> None:
        self.name = name
        self.words = words
        self.posix = posix
        self.fine = fine  # what stops it not, and does no harm: it replaces the name, or reads

    def run(self, path: Path, directory: Path) -> tuple[int, str]:
        values = {"PATH": path.name if self.posix else path, "DIR": directory}
        return said(*(word.format(**values) for word in self.words))


SERVE = ("serve", "-q", "-S", "{DIR}/socket", "-l", "64K")
# `save` gives the name to a new file: whatever regular file had it is not touched.
REPLACED = (hard_link, hard_link_to_empty, regular, empty, sparse, given_away)

COMMANDS = [
    Command("name", *SERVE, "-M", "{PATH}", posix=True),
    Command("name-refuse", *SERVE, "-M", "{PATH}", "--existing", "refuse", posix=True),
    Command("name-grow", *SERVE, "-M", "{PATH}", "--existing", "grow", posix=True),
    Command("name-require", *SERVE, "-M", "{PATH}", "--existing", "require", posix=True),
    Command("name-readonly", *SERVE, "-M", "{PATH}", "--readonly", posix=True),
    Command("save-name", "save", "-q", "-M", "{PATH}", "{DIR}/saved", posix=True),
    Command("load-name", "load", "-q", "-M", "{PATH}", "{DIR}/image", posix=True),
    Command("file", *SERVE, "-f", "{PATH}"),
    Command("file-refuse", *SERVE, "-f", "{PATH}", "--existing", "refuse"),
    Command("file-require", *SERVE, "-f", "{PATH}", "--existing", "require"),
    Command("file-readonly", *SERVE, "-f", "{PATH}", "--readonly"),
    Command("save-file", "save", "-q", "-f", "{PATH}", "{DIR}/saved"),
    Command("load-file", "load", "-q", "-f", "{PATH}", "{DIR}/image"),
    Command("pid", *SERVE, "-p", "{PATH}"),
    Command("save", "save", "-q", "-f", "{DIR}/memory", "{PATH}", fine=REPLACED),
    Command("load", "load", "-q", "-f", "{DIR}/memory", "{PATH}"),
    Command("load-check", "load", "-q", "--check", "{PATH}"),
    Command("config", "serve", "-q", "--config", "{PATH}"),
    Command("config-check", "serve", "--check", "--config", "{PATH}"),
    Command("group", "migrate", "-q", "--group", "{PATH}"),
    Command("state", "migrate", "-q", "--vm", "a=/x,/y,unix:/z", "--resume", "--state", "{PATH}"),
]


@pytest.fixture
def outside(directory: Path) -> Outside:
    return Outside(directory / "root's")


@pytest.fixture
def place(directory: Path, request: pytest.FixtureRequest) -> Iterator[Callable[[bool], Path]]:
    """A free path where everybody can make names; afterwards nothing of the test's is there."""
    made: list[Path] = []

    def free(posix: bool) -> Path:
        (directory / "open").mkdir()
        (directory / "open").chmod(0o1777)
        name = f"ivt-first-{os.getpid()}"
        made.append(SHM / name if posix else directory / "open" / name)
        return made[0]

    yield free
    for path in made:
        for each in (path, *path.parent.glob(f"{path.name}-*")):
            if each.is_dir() and not each.is_symlink():
                each.rmdir()
            else:
                each.unlink(missing_ok=True)


def _prepare(directory: Path) -> None:
    """What commands need besides the path: root's memory, and an image of it."""
    with ivshmem.Region.create(SIZE, path=directory / "memory") as region:
        region.write(0, b"memory")
        image.save(region, directory / "image")


def _table() -> Iterator[object]:
    for row, command in enumerate(COMMANDS):
        for column, trap in enumerate(TRAPS):
            marks = [] if (row + column) % 6 == 0 else [pytest.mark.nightly]
            name = f"{command.name}-{trap.__name__}"
            yield pytest.param(command, trap, id=name, marks=marks)


@pytest.mark.sampled(6)
@pytest.mark.parametrize(("command", "trap"), list(_table()))
def test_path(
    command: Command,
    trap: Trap,
    directory: Path,
    outside: Outside,
    place: Callable[[bool], Path],
) -> None:
    _prepare(directory)
    path = place(command.posix)
    trap(path, outside)
    _judge(command, path, outside, directory, fine=trap in command.fine)


@pytest.mark.parametrize(
    "command", [each for each in COMMANDS if not each.posix], ids=lambda each: each.name
)
def test_directory_on_the_way(
    command: Command, directory: Path, outside: Outside, place: Callable[[bool], Path]
) -> None:
    _prepare(directory)
    way = place(False)
    parent(way / "secret", outside)
    _judge(command, way / "secret", outside, directory, fine=False)


def _judge(command: Command, path: Path, outside: Outside, directory: Path, *, fine: bool) -> None:
    own = list(path.parent.glob(f"{path.name}-own"))
    before = outside.state(), list(map(_file_state, own))
    names = names_in(path.parent)
    status, errors = command.run(path, directory)
    assert (outside.state(), list(map(_file_state, own))) == before
    assert names_in(path.parent) == names
    if fine:
        assert (status, errors) == (0, "")
        assert path.lstat().st_uid == 0
        assert image.read_info(path).size == SIZE
        return
    assert status == 1, errors
    assert errors.count("\n") == 1, errors
    assert str(path) in errors or f"{path.parent}" in errors
    assert any(remedy in errors for remedy in REMEDIES), errors
    assert not (directory / "saved").exists()
    assert not (directory / "socket").exists()


# -- what Python programs do ----------------------------------------------------------------------


def _create(path: Path) -> None:
    ivshmem.Region.create(SIZE, path=path).close()


def _replace(path: Path) -> None:
    ivshmem.Region.create(SIZE, path=path, replace=True).close()


def _open(path: Path) -> None:
    ivshmem.Region.open(SIZE, path=path).close()


def _nameless(path: Path) -> None:
    ivshmem.Region.create(SIZE, directory=path).close()


def _begin(path: Path) -> None:
    with StateFile.create(path, PLAN):
        pass


def _pid(path: Path) -> None:
    with pid_file.held(str(path)):
        pass


CALLS: list[Callable[[Path], None]] = [_create, _replace, _open, _nameless, _begin, _pid]
# These do no harm: the name gets a new file, or the directory a file that never has a name.
HARMLESS: dict[str, list[Trap]] = {
    "_replace": [hard_link, regular, sparse, given_away],
    "_nameless": [folder],
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.__name__)
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_call(
    call: Callable[[Path], None], trap: Trap, outside: Outside, place: Callable[[bool], Path]
) -> None:
    path = place(False)
    trap(path, outside)
    before = outside.state()
    names = names_in(path.parent)
    if trap in HARMLESS.get(call.__name__, []):
        call(path)
    else:
        with pytest.raises((OSError, IvshmemError, MigrationError)) as caught:
            call(path)
        assert str(path) in str(caught.value)
    assert outside.state() == before
    assert names_in(path.parent) == names


# -- at the names that drafts have, where a file cannot be made without a name ---------------------


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.__name__)
def test_draft(
    trap: Trap, directory: Path, outside: Outside, place: Callable[[bool], Path]
) -> None:
    """`save` over a file: the new one has a name beside it for a moment, known to everybody."""
    _prepare(directory)
    path = place(False)
    path.write_bytes(b"before")
    for number in range(3):
        trap(path.with_name(f".{path.name}.ivshmem-{number}"), outside)
    before = outside.state()
    names = names_in(path.parent)
    with ivshmem.Region.attach(path=directory / "memory") as region:
        image.save(region, path)
    assert image.check_image(path).size == SIZE
    assert outside.state() == before
    if trap not in (hard_link, hard_link_to_empty):  # a draft of root's, for all one can see
        assert names_in(path.parent) == names
    for each in path.parent.iterdir():
        if each != path:
            each.rmdir() if each.is_dir() and not each.is_symlink() else each.unlink()


# -- locks, which need no right to write ----------------------------------------------------------

_LOCK = """
import fcntl, os, sys
user, kind = int(sys.argv[2]), getattr(fcntl, sys.argv[3])
os.setresgid(user, user, user); os.setresuid(user, user, user)
file = open(sys.argv[1])
fcntl.flock(file, kind)
print("READY", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def locked(path: Path, user: int, kind: str) -> Iterator[int]:
    with subprocess.Popen(
        [sys.executable, "-c", _LOCK, str(path), str(user), kind],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"READY\n"
        yield holder.pid


@pytest.mark.parametrize("kind", ["LOCK_EX", "LOCK_SH"])
@pytest.mark.parametrize("content", ["", "4000000\n"], ids=["empty", "stale"])
def test_pid_file_that_a_reader_locks(
    kind: str, content: str, place: Callable[[bool], Path]
) -> None:
    path = place(False)
    path.write_text(content)
    path.chmod(0o644)
    with locked(path, NOBODY, kind), pid_file.held(str(path)):
        assert path.read_text() == f"{os.getpid()}\n"
        assert stat.S_IMODE(path.stat().st_mode) & 0o444 == 0o444
        # It is the one that counts: a second server is refused.
        with pytest.raises(FileExistsError, match="runs already"), pid_file.held(str(path)):
            pass
    assert not path.exists()


@pytest.mark.parametrize("user", [0, NOBODY])
def test_pid_file_that_a_server_locks(user: int, place: Callable[[bool], Path]) -> None:
    """By root, or by the process that it names."""
    path = place(False)
    path.touch(0o644)
    path.chmod(0o644)
    with locked(path, user, "LOCK_EX") as holder:
        path.write_text(f"{holder}\n")
        before = path.stat().st_ino
        with pytest.raises(FileExistsError, match=f"pid {holder}"), pid_file.held(str(path)):
            pass
        assert path.stat().st_ino == before


# -- between two steps ----------------------------------------------------------------------------

_SWAP = """
import os, random, sys, time
path, outside, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
spare = path + "-spare"
def regular():
    open(spare, "wb").write(bytes(65536)); os.chmod(spare, 0o666)
def empty():
    open(spare, "wb"); os.chmod(spare, 0o666)
traps = [
    regular,
    empty,
    lambda: os.symlink(outside + "/secret", spare),
    lambda: os.symlink(outside + "/missing", spare),
    lambda: os.symlink(outside, spare),
    lambda: os.mkfifo(spare, 0o666),
    lambda: os.mkdir(spare, 0o777),
]
print("READY", flush=True)
end = time.monotonic() + seconds
while time.monotonic() < end:
    trap = random.choice(traps)
    try:
        trap()
        try:
            os.rename(spare, path)
        except OSError:
            (os.rmdir if os.path.isdir(spare) and not os.path.islink(spare) else os.unlink)(spare)
        if random.random() < 0.5:
            (os.rmdir if os.path.isdir(path) and not os.path.islink(path) else os.unlink)(path)
    except OSError:
        pass
"""


def _attach(path: Path) -> None:
    # An empty file is that of a region which is not made yet.
    ivshmem.Region.attach(path=path).close()


def _read(path: Path) -> None:
    with safe_files.reading(path) as file:
        assert file.read(2) != b"\0\1", "it is root's secret"


def _save(path: Path) -> None:
    with ivshmem.Region.attach(path=path.parent.parent / "memory") as region:
        image.save(region, path)


RACES: list[Callable[[Path], None]] = [*CALLS, _attach, _read, _save]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "seconds", [0.3, pytest.param(6.0, marks=pytest.mark.nightly)], ids=["short", "long"]
)
@pytest.mark.parametrize("call", RACES, ids=lambda call: call.__name__)
def test_replaced_between_two_steps(
    call: Callable[[Path], None],
    seconds: float,
    directory: Path,
    outside: Outside,
    place: Callable[[bool], Path],
) -> None:
    """Another user puts one thing after another at the path, and removes it, in a loop."""
    _prepare(directory)
    path = place(False)
    path.parent.chmod(0o777)  # else only its owner could rename over what root has made there
    before = outside.state()
    done, reasons = 0, list[str]()
    with subprocess.Popen(
        [sys.executable, "-c", _SWAP, str(path), str(outside.path), str(seconds)],
        stdout=subprocess.PIPE,
    ) as swapper:
        assert swapper.stdout is not None
        swapper.stdout.readline()
        slowest = 0.0
        while swapper.poll() is None:
            begun = time.monotonic()
            try:
                call(path)
                done += 1
            except (OSError, IvshmemError, MigrationError) as error:
                reasons.append(str(error))
            slowest = max(slowest, time.monotonic() - begun)
    assert swapper.returncode == 0
    assert outside.state() == before
    assert reasons, done
    assert not [reason for reason in reasons if str(path) not in reason]
    assert slowest < SECONDS / 4
    left = {each.name for each in path.parent.iterdir()} - {path.name, f"{path.name}-spare"}
    assert not left
    for each in path.parent.iterdir():
        each.rmdir() if each.is_dir() and not each.is_symlink() else each.unlink()
