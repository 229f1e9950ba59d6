"""Advice is typed and works; what is strange is not called well. Fifty variations and more.

Each case makes one trouble, in a directory of its own. Nothing that was there before may change.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.peer import FakeServer
from support.waiting import PATIENCE

import ivshmem
from ivshmem.cli import main as cli
from ivshmem.doctor import server

IVSHMEM = [sys.executable, "-m", "ivshmem"]
# A user has none of what a developer's shell sets for Python.
USER = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory with a path that is short enough for sockets, and whose servers end with it."""
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="ivadvice"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def said(capfd: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Run a command line in this process; its exit status, stdout and stderr."""
    try:
        status = cli.main(list(words))
    except SystemExit as end:
        status = int(end.code or 0)
    out, err = capfd.readouterr()
    return status, out, err


# -- (a) messages: one line, and what they say to do is done and helps -----------------------------


def typed(line: str, place: Path) -> list[int]:
    """Type a line into a shell, as a user would; the servers that it started."""
    line = re.sub(r"^ivshmem ", f"{shlex.join(IVSHMEM)} ", line)
    done = subprocess.run(
        ["sh", "-c", line], cwd=place, env=USER, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, (line, done.stderr)
    return [int(pid) for pid in re.findall(r", pid ([0-9]+)$", done.stdout, re.MULTILINE)]


def gone(pid: int) -> bool:
    """Whether a process has ended. Who takes its status, and when, is not ours: it may be init."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


# The command that is wrong, and the words of its last line that name the one that is right.
WRONG: dict[str, tuple[list[str], str, list[str]]] = {
    "serv": (["serv"], "did you mean serve?", ["serve", "--help"]),
    "docter": (["docter"], "did you mean doctor?", ["doctor", "--help"]),
    "evcit": (["evcit", "1"], "did you mean evict?", ["evict", "--help"]),
    "--szie": (["serve", "--szie", "1M"], "did you mean --size?", ["serve", "--help"]),
    "--vectros": (["serve", "--vectros=2"], "did you mean --vectors?", ["serve", "--help"]),
    "--sokcet": (["qemu", "--sokcet", "s"], "did you mean --socket?", ["qemu", "--help"]),
    "--libvrit": (["qemu", "--libvrit"], "did you mean --libvirt?", ["qemu", "--help"]),
    "--chekc": (["load", "f", "--chekc"], "did you mean --check?", ["load", "--help"]),
    "--jsno": (["status", "--jsno"], "did you mean --json?", ["status", "--help"]),
    "99999 vectors": (["serve", "-n", "99999"], "allowed are 0 to 2048", ["serve", "--help"]),
    "evict abc": (["evict", "abc"], "allowed are 0 to 65535", ["evict", "--help"]),
    "evict nobody": (["evict"], "ID", ["evict", "--help"]),
    "save to nothing": (["save"], "FILE", ["save", "--help"]),
    "migrate what": (["migrate"], "--vm", ["migrate", "--help"]),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_usage_names_the_page_that_helps(
    what: str, capfd: pytest.CaptureFixture[str]
) -> None:
    words, hint, page = WRONG[what]
    status, out, err = said(capfd, *words)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert hint in err
    named = re.search(r"\(see ivshmem ?(.*) --help\)$", err.rstrip())
    assert named, err
    status, out, err = said(capfd, *shlex.split(named[1]), "--help")
    assert (status, err) == (0, "")
    assert out.startswith("usage: ivshmem")
    assert said(capfd, *page)[0] == 0  # the word that was suggested is one


@pytest.mark.parametrize("kind", ["file", "directory", "fifo", "dangling link", "link to a file"])
@pytest.mark.parametrize(
    "words", [["serve", "-S"], ["connect", "-c", "dump", "-S"], ["qemu", "-S"]]
)
def test_a_thing_at_the_socket_path_stays(
    kind: str, words: list[str], place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """No message tells to remove it: who made it may need it."""
    path = place / "s"
    MAKE[kind](path)
    before = seen(place)
    status, out, err = said(capfd, *words, str(path))
    assert (status, out, err.count("\n")) == (1, "", 1), (out, err)
    assert str(path) in err
    assert not re.search(r"\b(rm|remove|delete|mv|chmod|truncate)\b", err), err
    assert seen(place) == before


@pytest.mark.parametrize(
    ("size", "offered"),
    [("3M", "4M"), ("5000", "4K"), ("1", "4K"), ("0", "4K"), ("100K", "128K"), ("65535", "64K")],
)
def test_the_nearest_size_works(
    size: str, offered: str, place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    status, _, err = said(capfd, "serve", "-S", str(place / "s"), "-l", size)
    assert status == 1
    named = re.search(r"the nearest that works is (\S+)", err)
    assert named, err
    ivshmem.Region.create(named[1]).close()
    assert (named[1], os.listdir(place)) == (offered, [])


@pytest.mark.parametrize("words", [["load"], ["load", "--check"]])
def test_what_is_to_be_loaded_is_saved_first(
    words: list[str], place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    memory, path = place / "m", str(place / "image")
    with ivshmem.Region.create("64K", path=memory) as region:
        region.write(0, b"kept")
    where = ["--file", str(memory)]
    status, _, err = said(capfd, *words, path, *([] if "--check" in words else where))
    assert (status, "`ivshmem save FILE` writes one" in err) == (1, True), err
    typed(f"ivshmem save {shlex.quote(path)} --file {shlex.quote(str(memory))}", place)
    status, out, err = said(capfd, *words, path, *([] if "--check" in words else where))
    assert (status, err) == (0, ""), err
    assert ("the file is intact" in out) == ("--check" in words)


@pytest.mark.parametrize("contents", [b"", b"x", b"root:x:0:0\n", bytes(4096)])
def test_what_is_not_a_saved_region(
    contents: bytes, place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = place / "image"
    path.write_bytes(contents)
    status, _, err = said(capfd, "load", "--check", str(path))
    assert (status, err.count("\n")) == (1, 1)
    assert f"{path} is not a saved region: give a file that `ivshmem save FILE` wrote" in err
    assert path.read_bytes() == contents


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "what",
    ["status", "top", "reload", "evict 1", "hold 1", "release 1", "qemu", "connect", "save f"],
)
def test_who_asks_a_server_that_is_not_there(
    what: str, place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = place / "s o"  # a space, for whoever quotes it
    status, _, err = said(capfd, *what.split(), "-S", str(path))
    assert (status, err.count("\n")) == (1, 1)
    assert "start the server (ivshmem serve), or give the path of one that runs" in err
    with ivshmem.Server(str(path), "64K").start():
        typed(f"ivshmem connect -S {shlex.quote(str(path))} -c dump", place)


# -- (b) doctor ------------------------------------------------------------------------------------


def silent(peer: socket.socket) -> None:
    with contextlib.suppress(OSError):
        peer.recv(1)


def hangs_up(peer: socket.socket) -> None:
    peer.close()


def says(what: bytes) -> Callable[[socket.socket], None]:
    def answer(peer: socket.socket) -> None:
        with contextlib.suppress(OSError):
            peer.sendall(what)
            peer.shutdown(socket.SHUT_WR)
            peer.recv(1)

    return answer


def stale(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind(str(path))
        sock.listen()


def datagram(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(path))


def loop(path: Path) -> None:
    path.symlink_to(path)


def text(path: Path) -> None:
    path.write_bytes(b"not memory\n")


def link(path: Path) -> None:
    text(path.with_name("t"))
    path.symlink_to("t")


MAKE: dict[str, Callable[[Path], object]] = {
    "file": Path.touch,
    "text": text,
    "directory": Path.mkdir,
    "fifo": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/null"),
    "dangling link": lambda path: path.symlink_to(path.with_name("nowhere")),
    "link to a file": link,
    "link to itself": loop,
    "stale socket": stale,
    "datagram socket": datagram,
    "nothing": Path.absolute,
}

LISTENS: dict[str, Callable[[socket.socket], None]] = {
    "silent": silent,
    "hangs up": hangs_up,
    "QMP": says(b'{"QMP": {"version": {}, "capabilities": []}}\r\n'),
    "HTTP": says(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
    "SSH": says(b"SSH-2.0-OpenSSH_9.2\r\n"),
    "zeros": says(bytes(64)),
    "version 7": says((7).to_bytes(8, "little")),
    "a list": says(b"[]\n"),
    "null": says(b"null\n"),
    "a terminal's escapes": says(b"\x1b[2J\x1b]0;x\x07all is well\n"),
    "half an answer": says(b'{"protocol": 0, "size"'),
}


def seen(folder: Path) -> dict[str, tuple[int, int, int, int]]:
    """What is in a directory: inode, kind and mode, size, time of the last change."""
    found = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        found[str(path)] = (status.st_ino, status.st_mode, status.st_size, status.st_ctime_ns)
    return found


def examined(capfd: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, list[str]]:
    """The doctor's exit status, last line, and the marks of the checks."""
    status, out, err = said(capfd, "doctor", "--host", "--qemu", "/bin/true", *words)
    assert err == ""
    lines = out.splitlines()
    marks = [line.split()[0] for line in lines if re.match(r"  (ok|warn|FAIL|skip) ", line)]
    assert out.isascii()
    assert out.replace("\n", "").isprintable()
    assert len(marks) > 5
    return status, lines[-1], marks


def consistent(status: int, verdict: str, marks: list[str]) -> None:
    assert status == ("FAIL" in marks)
    assert verdict.startswith("all is well") == (not {"FAIL", "warn"} & set(marks))
    assert ("not checked" in verdict) == ("skip" in marks)
    assert f"{marks.count('FAIL')} failed" in verdict or "FAIL" not in marks


@pytest.mark.parametrize("kind", MAKE)
def test_doctor_meets_at_the_socket(
    kind: str, place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = place / "s"
    MAKE[kind](path)
    before = seen(place)
    status, verdict, marks = examined(capfd, "-S", str(path))
    consistent(status, verdict, marks)
    assert status == 1
    assert seen(place) == before


@pytest.mark.parametrize("kind", LISTENS)
def test_doctor_meets_a_server(
    kind: str, place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_SECONDS", 0.2)
    path = place / "s"
    with FakeServer(str(path), LISTENS[kind]):
        before = seen(place)
        _, out, _ = said(
            capfd, "doctor", "--host", "--json", "--qemu", "/bin/true", "-S", str(path)
        )
        assert seen(place) == before
    found = {check["name"]: check for check in json.loads(out)["checks"]}
    assert found["server"]["state"] in ("warning", "failed"), found["server"]
    assert found["server"]["fix"]
    assert all("fix" in check and "mend" not in check for check in found.values())
    assert not re.search(r"\b(rm|mv|chmod|kill)\b", found["server"]["fix"])


@pytest.mark.parametrize("option", ["--file", "--directory"])
@pytest.mark.parametrize("kind", MAKE)
def test_doctor_meets_at_the_memory(
    kind: str, option: str, place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = place / "memory"
    MAKE[kind](path)
    before = seen(place)
    status, verdict, marks = examined(capfd, option, str(path), "-l", "64K")
    consistent(status, verdict, marks)
    assert seen(place) == before
    if (option, kind) not in GOOD:
        assert status == 1, verdict


# What can become memory: an empty file and a new name; a directory to put it into. /bin/true is not
# a QEMU, so the exit status is 1 in any case, and the check itself is looked at here.
GOOD = {
    ("--file", "file"),
    ("--file", "nothing"),
    ("--file", "dangling link"),
    ("--directory", "directory"),
}


@pytest.mark.sampled(18)
@pytest.mark.parametrize(
    ("option", "kind"), [(o, k) for o in ("--file", "--directory") for k in MAKE]
)
def test_the_fix_for_memory_is_typed(
    option: str, kind: str, place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It works, and then the same question about what it made finds nothing wrong."""
    path = place / "memory"
    MAKE[kind](path)
    before = seen(place)
    words = ["doctor", "--host", "--json", "--qemu", "/bin/true", "-l", "64K"]
    _, out, _ = said(capfd, *words, option, str(path))
    found = {check["name"]: check for check in json.loads(out)["checks"]}["memory"]
    assert (found["state"] == "ok") == ((option, kind) in GOOD), found
    if found["state"] == "ok":
        return
    fix = found["fix"]
    assert fix, found
    pids = typed(fix + f" -S {shlex.quote(str(place / 's'))}" * (" serve --daemon" in fix), place)
    after = seen(place)
    for name, was in before.items():
        assert after[name][:2] == was[:2]
        # A file that is too short grows; a link is what it was.
        grown = stat.S_ISREG(was[1]) and " serve " not in fix
        assert (
            after[name][2] >= was[2] if grown else stat.S_ISDIR(was[1]) or after[name][2] == was[2]
        )
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + PATIENCE
        while not gone(pid) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert gone(pid)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", ["text", "fifo", "device", "dangling link", "stale socket"])
@pytest.mark.parametrize("option", ["-S", "--file"])
def test_a_file_where_a_directory_is_needed(
    kind: str, option: str, place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A `mkdir` cannot help there, so it is not what is printed."""
    path = place / "folder"
    MAKE[kind](path)
    before = seen(place)
    words = ["doctor", "--host", "--json", "--qemu", "/bin/true", "-l", "64K"]
    _, out, _ = said(capfd, *words, option, str(path / "x"))
    found = {check["name"]: check for check in json.loads(out)["checks"]}
    check = found["socket" if option == "-S" else "memory"]
    assert check["state"] == "failed"
    assert "mkdir" not in check["fix"]
    pids = typed(check["fix"] + f" -S {shlex.quote(str(place / 's'))}", place)
    assert len(pids) == 1
    os.kill(pids[0], signal.SIGTERM)
    deadline = time.monotonic() + PATIENCE
    while not gone(pids[0]) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert seen(place).items() >= before.items()
