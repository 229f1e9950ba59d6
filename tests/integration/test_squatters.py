"""Another user was at a path first, or interferes later: nothing of root's is harmed.

Each attack is made by an unprivileged user in a /tmp and a /run that only this test sees. Then
every command is run. None makes, removes or changes a file of root's or of the attacker's, beside
what it was told to make; none hangs or shows a traceback; what fails says so in one line.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from support.isolated import NOBODY, OTHER, isolated, needs_root, start

pytestmark = needs_root

SECONDS = 90.0  # for a command: `reload` waits 60 for memory to be taken
SOCKET, CONTROL, PID = Path("/tmp/s"), Path("/tmp/s.control"), Path("/tmp/s.pid")
PLACE = Path("/tmp/d")
OWN = Path(f"/tmp/ivshmem-{OTHER}")
EXAMPLE = Path("/tmp/ivshmem_socket")
VICTIMS = Path("/run/root")
VICTIM = VICTIMS / "s"  # as the socket is called
NEW = Path("/run/new")  # what a link leads to that is not there

_PR_SET_PDEATHSIG = 1

Attack = Callable[[], object]


# -- what the attacker does ------------------------------------------------------------------------


def by(uid: int, act: Attack) -> None:
    """Do something as another user, in a child that keeps what it made until its parent ends."""
    ready, tell = os.pipe()
    if os.fork() == 0:
        status = 1
        try:
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            os.umask(0)
            signal.alarm(300)
            kept = act()
            os.write(tell, b"y")
            if kept is not None:
                signal.pause()
            status = 0
        finally:
            os._exit(status)
    os.close(tell)
    assert os.read(ready, 1) == b"y", "the attack failed"
    os.close(ready)


def listening(path: Path, kind: int = socket.SOCK_STREAM) -> Attack:
    def act() -> object:
        sock = socket.socket(socket.AF_UNIX, kind)
        sock.bind(str(path))
        if kind != socket.SOCK_DGRAM:
            sock.listen(64)
        return sock

    return act


def answering(path: Path, words: bytes) -> Attack:
    """Say this to everybody, and close."""

    def answer(sock: socket.socket) -> None:
        while True:
            other, _ = sock.accept()
            with contextlib.suppress(OSError), other:
                other.sendall(words)

    def act() -> object:
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(str(path))
        sock.listen(64)
        threading.Thread(target=answer, args=[sock], daemon=True).start()
        return sock

    return act


def stale(path: Path) -> Attack:
    def act() -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(path))

    return act


def file(path: Path) -> Attack:
    def act() -> None:
        path.write_text("1\n")

    return act


def fifo(path: Path) -> Attack:
    return partial(os.mkfifo, path, 0o666)


def folder(path: Path, mode: int = 0o777) -> Attack:
    return partial(path.mkdir, mode)


def link(path: Path, to: Path) -> Attack:
    return partial(path.symlink_to, to)


def hard_link(path: Path, to: Path) -> Attack:
    return partial(path.hardlink_to, to)


def removed(path: Path) -> Attack:
    return path.unlink


def moved(path: Path, to: Path) -> Attack:
    def act() -> None:
        path.rename(to)

    return act


def then(first: Attack, second: Attack) -> Attack:
    def act() -> object:
        first()
        return second()

    return act


def kinds(path: Path) -> dict[str, Attack]:
    """What can be at a path."""
    return {
        "a listener": listening(path),
        "a listener of packets": listening(path, socket.SOCK_SEQPACKET),
        "a datagram socket": listening(path, socket.SOCK_DGRAM),
        "a stale socket": stale(path),
        "words": answering(path, b"hello\n"),
        "a refusal": answering(path, b'{"ok":false,"error":"\\u001b[31mfix: rm -rf /"}\n'),
        "an offer": answering(path, b'{"ok":true,"version":1,"state":{},"numbers":[]}\n'),
        "a file": file(path),
        "a fifo": fifo(path),
        "a directory": folder(path),
        "a link to a file": link(path, VICTIM),
        "a link to nothing": link(path, NEW),
        "a link to a directory": link(path, VICTIMS),
        "a link to itself": link(path, path),
        "a hard link": hard_link(path, Path("/tmp/open")),
    }


ATTACKS: dict[str, Attack] = {}
for place in (SOCKET, CONTROL, PID):
    ATTACKS |= {f"{place.name}: {what}": act for what, act in kinds(place).items()}
PLACES: dict[str, Attack] = {f"own: {what}": act for what, act in kinds(OWN).items()} | {
    "own: closed": folder(OWN, 0o700),
    "own: with a server": then(folder(OWN), listening(OWN / "ivshmem.sock")),
    "example: a listener": listening(EXAMPLE),
    "example: an offer": answering(Path(f"{EXAMPLE}.control"), b'{"ok":true}\n'),
    "example: a link": link(EXAMPLE, VICTIM),
}
_MOVED = Path("/tmp/d.moved")
LATER: dict[str, Attack] = {
    "the socket becomes a link": then(removed(PLACE / "s"), link(PLACE / "s", VICTIM)),
    "the socket becomes a fifo": then(removed(PLACE / "s"), fifo(PLACE / "s")),
    "the socket becomes theirs": then(removed(PLACE / "s"), listening(PLACE / "s")),
    "the socket is removed": removed(PLACE / "s"),
    "the control socket becomes theirs": then(
        removed(PLACE / "s.control"), listening(PLACE / "s.control")
    ),
    "the directory becomes a link": then(moved(PLACE, _MOVED), link(PLACE, VICTIMS)),
    "the directory becomes another": then(moved(PLACE, _MOVED), folder(PLACE)),
    "the directory is gone": moved(PLACE, _MOVED),
}
# What a user can set the variable to by mistake, or an attacker can reach by it.
RUNTIME: dict[str, tuple[str, Attack]] = {
    "of another": ("/tmp/x", folder(Path("/tmp/x"), 0o777)),
    "of another, closed": ("/tmp/x", folder(Path("/tmp/x"), 0o700)),
    "/tmp itself": ("/tmp", lambda: None),
    "a link to root's": ("/tmp/x", link(Path("/tmp/x"), VICTIMS)),
    "a link to another's": (
        "/tmp/x",
        then(folder(Path("/tmp/y")), link(Path("/tmp/x"), Path("/tmp/y"))),
    ),
    "a file": ("/tmp/x", file(Path("/tmp/x"))),
    "a fifo": ("/tmp/x", fifo(Path("/tmp/x"))),
    "a socket": ("/tmp/x", listening(Path("/tmp/x"))),
    "nothing": ("/tmp/missing", lambda: None),
    "relative": ("x", folder(Path("/tmp/x"))),
    "root's": (str(VICTIMS), lambda: None),
    "too long": ("/tmp/" + "x" * 200, lambda: None),
}

_SOME = {"s.control: a link to nothing", "s.pid: a link to a file", "own: a link to a directory"}


def table(attacks: dict[str, object]) -> pytest.MarkDecorator:
    """All of them at night, some by day."""
    return pytest.mark.parametrize(
        "what",
        [pytest.param(k, marks=() if k in _SOME else pytest.mark.nightly) for k in attacks],
    )


# -- what is looked at -----------------------------------------------------------------------------


def seen() -> dict[str, tuple[object, ...]]:
    """All files: what they are, whose, and what they say."""
    found: dict[str, tuple[object, ...]] = {}
    for top in ("/tmp", "/run"):
        for home, folders, files in os.walk(top):
            for path in [os.path.join(home, name) for name in folders + files]:
                status = os.lstat(path)
                regular = stat.S_ISREG(status.st_mode)
                said = Path(path).read_bytes() if regular and status.st_size < 1 << 16 else b""
                found[path] = (status.st_ino, status.st_mode, status.st_uid, status.st_gid, said)
    return found


def prepare() -> None:
    VICTIMS.mkdir(0o755)
    VICTIM.write_text("root's\n")
    VICTIM.chmod(0o600)
    other = Path("/tmp/open")  # which anybody may link to, as fs.protected_hardlinks has it
    other.write_text("root's\n")
    other.chmod(0o666)


def run(
    commands: list[list[str]],
    user: int = 0,
    more: dict[str, str] | None = None,
    may_make: tuple[str, ...] = (),
) -> None:
    before = seen()
    processes = [(words, start(*words, user=user, **(more or {}))) for words in commands]
    for words, process in processes:
        judge(words, process)
    after = seen()
    for path in before:
        assert after.get(path) == before[path], f"{path} was changed by {commands}"
    made = [each for each in after.keys() - before.keys() if each not in may_make]
    assert not made, f"{commands} made {made}"


def judge(words: list[str], process: subprocess.Popen[str]) -> None:
    """Wait for a command's end, or a server's start, which is then ended."""
    assert process.stdout is not None
    if words[0] == "serve":
        select.select([process.stdout], [], [], SECONDS)  # its banner, or its end
        if process.poll() is None:
            process.terminate()
    try:
        out, err = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise AssertionError(f"{words} hangs") from None
    assert "Traceback" not in out + err, f"{words}: {err}"
    assert "\x1b" not in out + err, f"{words}: {out + err!r}"
    if process.returncode > 0 and words[0] != "doctor":
        assert err.count("\n") == 1, f"{words}: {err!r}"
        assert len(err) < 1000


def clients(*place: str) -> list[list[str]]:
    return [
        ["status", *place],
        ["evict", *place, "1"],
        ["reload", *place],
        ["connect", *place, "--timeout", "2"],
        ["qemu", *place],
        ["doctor", *place],
        ["hold", *place, "1"],
        ["peers", *place],
    ]


def servers(*place: str) -> list[list[str]]:
    serve = ["serve", *place, "-l", "64K"]
    return [serve, [*serve, "--takeover"], [*serve, "--supervise"], [*serve, "--mode", "0660"]]


# -- the table -------------------------------------------------------------------------------------


@pytest.mark.sampled(4)
@table(dict(ATTACKS))
def test_who_came_first(what: str) -> None:
    def body() -> None:
        prepare()
        by(NOBODY, ATTACKS[what])
        place = ("-S", str(SOCKET))
        if not what.startswith("s.pid"):
            run(clients(*place))
        for words in servers(*place):
            # A stale socket is replaced, as of a server that was killed.
            gone = [str(p) for p in (SOCKET, CONTROL) if is_stale(p)]
            if gone:
                for each in gone:
                    os.unlink(each)
            run([[*words, "--pid-file", str(PID)]])

    isolated(body)


def is_stale(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        is_socket = os.path.lexists(path) and stat.S_ISSOCK(os.lstat(path).st_mode)
        return is_socket and probe.connect_ex(str(path)) != 0 and not _lives(path)


def _lives(path: Path) -> bool:
    from ivshmem.system.sockets import is_live

    return is_live(str(path))


@table(dict(PLACES))
def test_default_places(what: str) -> None:
    """Of a user without a runtime directory; and of root, whose place nobody can reach."""

    def body() -> None:
        prepare()
        by(NOBODY, PLACES[what])
        made = (str(OWN),) if what.startswith("example") else ()
        for user in (OTHER, 0):
            run(clients(), user)
            for words in servers()[:2]:
                run([words], user, may_make=made)

    isolated(body)


@table(dict(RUNTIME))
def test_runtime_directories(what: str) -> None:
    def body() -> None:
        prepare()
        value, act = RUNTIME[what]
        by(NOBODY, act)
        more = {"XDG_RUNTIME_DIR": value}
        run(clients(), OTHER, more)
        for words in servers()[:2]:
            run([words], OTHER, more, may_make=(str(OWN),))

    isolated(body)


@table(dict(LATER))
def test_who_interferes_later(what: str) -> None:
    """Root serves in a directory of another user, and stays what it was when that user acts."""

    def body() -> None:
        prepare()
        by(NOBODY, folder(PLACE))
        path = str(PLACE / "s")
        server = start("serve", "-S", path, "-l", "64K", "--pid-file", "/run/pid")
        assert server.stdout is not None
        assert server.stdout.readline()
        by(NOBODY, LATER[what])
        before = seen()
        for words in clients("-S", path):
            judge(words, start(*words))
        time.sleep(2.5)  # until the server has looked at its path
        assert server.poll() is None
        server.terminate()
        _, err = server.communicate(timeout=SECONDS)
        assert server.returncode == 0, err
        assert "Traceback" not in err
        after = seen()
        for victim in (str(VICTIMS), str(VICTIM), "/tmp/open"):
            assert after[victim] == before[victim]
        theirs = {k: v for k, v in before.items() if v[2] == NOBODY}
        assert {k: after.get(k) for k in theirs} == theirs
        root = {k for k, v in after.items() if v[2] == 0}
        assert not root - before.keys(), f"left behind: {root - before.keys()}"

    isolated(body)


@pytest.mark.parametrize(
    "said",
    [
        pytest.param(b'{"do": "takeover"}\n', id="taken over"),
        pytest.param(b'{"do": "evict", "id": 0}\n', id="evicted", marks=pytest.mark.nightly),
        pytest.param(b'{"do": "reload"}\n', id="reloaded", marks=pytest.mark.nightly),
        pytest.param(b"x" * 70000, id="much", marks=pytest.mark.nightly),
    ],
)
def test_a_stranger_asks_root_s_server(said: bytes) -> None:
    """Also where somebody has opened the control socket up."""

    def body() -> None:
        prepare()
        server = start("serve", "-S", str(SOCKET), "-l", "64K")
        assert server.stdout is not None
        assert server.stdout.readline()
        CONTROL.chmod(0o666)

        def ask() -> None:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(SECONDS)
                sock.connect(str(CONTROL))
                try:
                    sock.sendall(said)
                    data = sock.recv(1000)
                except (ConnectionResetError, BrokenPipeError):
                    return
                assert b'"ok":true' not in data
                assert b"is not answered here" in data

        by(NOBODY, ask)
        judge(["status"], start("status", "-S", str(SOCKET)))
        assert server.poll() is None
        server.terminate()
        server.communicate(timeout=SECONDS)
        assert server.returncode == 0

    isolated(body)
