"""Who starts first: what is at a path, what comes there, and what a client that waits gets."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.children import NOBODY, children_of, needs_root
from support.leaks import open_fds
from support.peer import memory_fd, send_raw
from support.stopping import state, users_environment
from support.waiting import PATIENCE, Background, interrupt_when_asleep, pauses, until

import ivshmem
from ivshmem.aio import connect_async

IVSHMEM = [sys.executable, "-m", "ivshmem"]
SHORT = 0.25  # seconds; of a limit that ends

# -- those who wait: each tells its outcome in one line -------------------------------------------


class Library:
    """A call in a thread of its own."""

    def __init__(self, call: Callable[[], int]) -> None:
        self._call = Background(lambda: self._outcome(call))

    @staticmethod
    def _outcome(call: Callable[[], int]) -> str:
        try:
            return f"id {call()}"
        except (OSError, ValueError, ivshmem.IvshmemError) as error:
            return f"{type(error).__name__}: {error}"

    def wait_until_paused(self) -> None:
        until(lambda: pauses(self._call.native_id), "a pause")

    def outcome(self) -> str:
        return str(self._call.result())

    def end(self) -> None:
        with contextlib.suppress(BaseException):
            self._call.result()


class Command:
    """`ivshmem connect --wait`, in a process of its own."""

    def __init__(self, path: str, timeout: float | None = PATIENCE) -> None:
        limit = [] if timeout is None else ["--timeout", str(timeout)]
        self.process = subprocess.Popen(
            [*IVSHMEM, "connect", "--wait", "-S", path, *limit, "-c", "dump"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=users_environment(),
        )

    def wait_until_paused(self) -> None:
        # Imports take a while before it; none of them sleeps.
        until(lambda: pauses(self.process.pid), "a pause")

    def outcome(self) -> str:
        output, errors = self.process.communicate(timeout=PATIENCE)
        if self.process.returncode:
            assert self.process.returncode == (2 if "--help" in errors else 1), errors
            assert not output
            assert errors.count("\n") == 1, errors
            return errors.rstrip()
        assert not errors
        return output.partition(",")[0]

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


Waiter = Library | Command


def sync(path: str, timeout: float | None = PATIENCE, **more: Any) -> Library:
    def call() -> int:
        with ivshmem.connect(path, timeout=timeout, wait_for_server=True, **more) as client:
            return client.id

    return Library(call)


async def joined(path: str, timeout: float | None, **more: Any) -> int:
    async with connect_async(path, timeout=timeout, wait_for_server=True, **more) as client:
        return client.id


def in_loop(path: str, timeout: float | None = PATIENCE, **more: Any) -> Library:
    return Library(lambda: asyncio.run(joined(path, timeout, **more)))


WAYS: dict[str, Callable[..., Waiter]] = {"sync": sync, "asyncio": in_loop, "command": Command}

# -- scenes: up to the first yield, what is there first; then, what comes --------------------------

Scene = Iterator[None]


def served(path: Path | str) -> contextlib.AbstractContextManager[object]:
    return ivshmem.Server(str(path), "64K").start()


@contextlib.contextmanager
def listening(path: Path, backlog: int = 5) -> Iterator[socket.socket]:
    """A socket at a path, which is removed afterwards."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PATIENCE)
        sock.bind(str(path))
        sock.listen(backlog)
        yield sock
    path.unlink(missing_ok=True)


def stale(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


def comes(path: Path) -> Scene:
    yield
    with served(path):
        yield


def no_directory(path: Path) -> Scene:
    path.parent.rmdir()
    yield
    path.parent.mkdir()
    yield from later(path)


def no_directories(path: Path) -> Scene:
    """A whole tree is renamed into place."""
    shutil.rmtree(path.parent)
    yield
    aside = path.parent.with_name("aside")
    aside.mkdir()
    with served(aside / path.name):
        aside.rename(path.parent)
        yield
        path.unlink()


def later(path: Path) -> Scene:
    with served(path):
        yield


def over_a_stale_one(path: Path) -> Scene:
    stale(path)
    yield from comes(path)


def stale_one_removed(path: Path) -> Scene:
    stale(path)
    yield
    path.unlink()
    yield from later(path)


def bound_first(path: Path) -> Scene:
    """A server between bind(2) and listen(2)."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        yield
        sock.close()
    yield from later(path)


def dangling_link(path: Path) -> Scene:
    path.symlink_to(path.with_name("real"))
    yield
    with served(path.with_name("real")):
        yield


def link_turned(path: Path) -> Scene:
    """A link that leads to a stale socket first, then to a server's."""
    stale(path.with_name("old"))
    path.symlink_to(path.with_name("old"))
    yield
    with served(path.with_name("real")):
        path.with_name("new").symlink_to(path.with_name("real"))
        path.with_name("new").rename(path)
        yield


def directory_link(path: Path) -> Scene:
    """The directory is a link that leads nowhere yet."""
    path.parent.rmdir()
    real = path.parent.with_name("real")
    path.parent.symlink_to(real)
    yield
    real.mkdir()
    with served(real / path.name):
        yield


def renamed_into_place(path: Path) -> Scene:
    other = path.with_name("other")
    with served(other):
        yield
        other.rename(path)
        yield
        path.unlink()


def linked_into_place(path: Path) -> Scene:
    other = path.with_name("other")
    with served(other):
        yield
        os.link(other, path)
        yield
        path.unlink()


def directory_renamed(path: Path) -> Scene:
    path.parent.rmdir()
    other = path.parent.with_name("other")
    other.mkdir()
    with served(other / path.name):
        yield
        other.rename(path.parent)
        yield
        (path.parent / path.name).unlink()


def former_one_ends(path: Path) -> Scene:
    """A server was there a moment ago."""
    with served(path):
        pass
    yield from comes(path)


def is_there(path: Path) -> Scene:
    with served(path):
        yield
        yield


def full_backlog(path: Path) -> Scene:
    """Nobody is accepted until the others in the queue are."""
    with listening(path, 0) as sock, socket.socket(socket.AF_UNIX) as first:
        first.connect(str(path))
        yield
        with sock.accept()[0], sock.accept()[0] as ours:
            set_up(ours)
            yield
            gone(ours)


def full_backlog_dies(path: Path) -> Scene:
    """The one that accepts nobody is killed, and another comes."""
    with listening(path, 0), socket.socket(socket.AF_UNIX) as first:
        first.connect(str(path))
        yield
    yield from later(path)


def set_up(sock: socket.socket) -> None:
    memory = memory_fd()
    send_raw(sock, 0)
    send_raw(sock, 0)
    send_raw(sock, -1, memory)
    os.close(memory)
    bell = os.eventfd(0)
    send_raw(sock, 0, bell)
    os.close(bell)


def gone(sock: socket.socket) -> None:
    sock.settimeout(PATIENCE)
    with contextlib.suppress(ConnectionError):
        while sock.recv(64):
            pass


def in_the_queue(path: Path) -> Scene:
    """One that listens, and accepts only later, like a socket unit's."""
    with listening(path) as sock:
        yield
        with sock.accept()[0] as ours:
            set_up(ours)
            yield
            gone(ours)


def slow_to_tell(path: Path) -> Scene:
    """The set-up stops in the middle of a message, for a while."""
    with listening(path) as sock:
        yield
        with sock.accept()[0] as ours:
            ours.send(bytes(5))
            ours.send(bytes(3))
            send_raw(ours, 0)
            memory = memory_fd()
            send_raw(ours, -1, memory)
            os.close(memory)
            bell = os.eventfd(0)
            send_raw(ours, 0, bell)
            os.close(bell)
            yield
            gone(ours)


COMES: dict[str, Callable[[Path], Scene]] = {
    each.__name__.replace("_", " "): each
    for each in (
        *(comes, no_directory, no_directories, over_a_stale_one, stale_one_removed, bound_first),
        *(dangling_link, link_turned, directory_link, renamed_into_place, linked_into_place),
        *(directory_renamed, former_one_ends, is_there, full_backlog, full_backlog_dies),
        *(in_the_queue, slow_to_tell),
    )
}

# -- what ends a wait: scenes that need no second part --------------------------------------------


def regular_file(path: Path) -> Scene:
    path.write_text("x")
    yield


def directory_there(path: Path) -> Scene:
    path.mkdir()
    yield


def fifo(path: Path) -> Scene:
    os.mkfifo(path)
    yield


def device(path: Path) -> Scene:
    path.symlink_to("/dev/null")
    yield


def bound(kind: socket.SocketKind) -> Callable[[Path], Scene]:
    def scene(path: Path) -> Scene:
        with socket.socket(socket.AF_UNIX, kind) as sock:
            sock.bind(str(path))
            if kind != socket.SOCK_DGRAM:
                sock.listen()
            yield

    return scene


def parent_is_a_file(path: Path) -> Scene:
    path.parent.rmdir()
    path.parent.write_text("x")
    yield


def parent_is_a_socket(path: Path) -> Scene:
    path.parent.rmdir()
    stale(path.parent)
    yield


def link_to_itself(path: Path) -> Scene:
    path.symlink_to(path)
    yield


def answers(*texts: bytes, accept: bool = True) -> Callable[[Path], Scene]:
    """Somebody listens and says this, then hangs up."""

    def scene(path: Path) -> Scene:
        with listening(path) as sock:

            def run() -> None:
                ours, _ = sock.accept()
                with ours, contextlib.suppress(ConnectionError):
                    for text in texts:
                        ours.sendall(text)

            talk = Background(run)
            yield
            talk.result()

    return scene


def dies_with_a_queue(path: Path) -> Scene:
    """The one who listens is killed before it accepts."""
    with listening(path):
        yield
    yield


def half_a_set_up(path: Path) -> Scene:
    with listening(path) as sock:

        def run() -> None:
            ours, _ = sock.accept()
            with ours:
                send_raw(ours, 0)
                send_raw(ours, 0)

        talk = Background(run)
        yield
        talk.result()


GONE = "the server ended the connection before it had sent"
AT_ONCE: dict[str, tuple[Callable[[Path], Scene], str]] = {
    "regular file": (regular_file, "not a socket: no server listens here, choose another path"),
    "directory": (directory_there, "not a socket: no server listens here"),
    "FIFO": (fifo, "not a socket: no server listens here"),
    "device": (device, "not a socket: no server listens here"),
    "datagram socket": (bound(socket.SOCK_DGRAM), "this socket is of another type"),
    "seqpacket socket": (bound(socket.SOCK_SEQPACKET), "this socket is of another type"),
    "parent a file": (parent_is_a_file, "(?i)not a directory"),
    "parent a socket": (parent_is_a_socket, "(?i)not a directory"),
    "link to itself": (link_to_itself, "(?i)too many levels of symbolic links"),
    "hangs up": (answers(), f"{GONE} the protocol version"),
    "half a message": (answers(bytes(4)), GONE),
    "half a set-up": (half_a_set_up, f"{GONE} the memory"),
    "dies with a queue": (dies_with_a_queue, GONE),
    "ssh": (answers(b"SSH-2.0-OpenSSH_9.2p1\r\n"), "protocol"),
    "http": (answers(b"HTTP/1.1 400 Bad Request\r\n\r\n"), "protocol"),
    "qmp": (answers(b'{"QMP": {"version": {}}}\r\n'), "protocol"),
    "newer protocol": (answers((1).to_bytes(8, "little")), "protocol"),
    "negative protocol": (answers(b"\xff" * 8), "protocol"),
}


def nothing(path: Path) -> Scene:
    yield


def silent(path: Path) -> Scene:
    with listening(path):
        yield


def accepts_and_is_silent(path: Path) -> Scene:
    with listening(path) as sock:

        def run() -> None:
            with sock.accept()[0] as ours:
                gone(ours)

        talk = Background(run)
        yield
        talk.result()


def accepts_nobody(path: Path) -> Scene:
    with listening(path, 0), socket.socket(socket.AF_UNIX) as first:
        first.connect(str(path))
        yield


def version_only(path: Path) -> Scene:
    with listening(path) as sock:

        def run() -> None:
            ours, _ = sock.accept()
            with ours:
                send_raw(ours, 0)
                gone(ours)

        talk = Background(run)
        yield
        talk.result()


def left_by_the_dead(path: Path) -> Scene:
    stale(path)
    yield


def flaps(path: Path) -> Scene:
    """Sockets that come and go, and never listen."""
    done = threading.Event()

    def run() -> None:
        while not done.wait(0.001):
            stale(path)
            path.unlink()

    talk = Background(run)
    yield
    done.set()
    talk.result()


def no_parent(path: Path) -> Scene:
    path.parent.rmdir()
    yield


def link_to_nothing(path: Path) -> Scene:
    path.symlink_to("nowhere")
    yield


NONE_CAME = f"no server came in {SHORT:g} seconds: start it"
TOO_LATE: dict[str, tuple[Callable[[Path], Scene], str]] = {
    "nothing": (nothing, NONE_CAME),
    "no directory": (no_parent, NONE_CAME),
    "dangling link": (link_to_nothing, NONE_CAME),
    "stale": (left_by_the_dead, NONE_CAME),
    "flapping": (flaps, NONE_CAME),
    "accepts nobody": (accepts_nobody, f"accepts nobody: no answer in {SHORT:g} seconds"),
    "silent": (silent, "set-up was not complete in time"),
    "accepts and is silent": (accepts_and_is_silent, "set-up was not complete in time"),
    "version only": (version_only, "set-up was not complete in time"),
}


@pytest.fixture(autouse=True)
def settled(leak_guard: None) -> Iterator[None]:
    """The thread of an asynchronous wait that was cut short closes its socket a moment later."""
    before = set(open_fds())
    yield
    until(lambda: set(open_fds()) <= before, "an end of all descriptors")


@pytest.fixture
def place(directory: Path) -> Path:
    (directory / "sub").mkdir()
    return directory / "sub" / "s"


def table(names: Any, *quick: tuple[str, str]) -> list[Any]:
    """Each name with each way; without a mark the named ones, and none that is a command."""
    return [
        pytest.param(name, way, marks=() if (name, way) in quick else pytest.mark.nightly)
        for name in names
        for way in WAYS
    ]


QUICK_COMES = [
    *(("comes", "command"), ("no directory", "sync"), ("over a stale one", "asyncio")),
    *(("bound first", "sync"), ("link turned", "asyncio"), ("in the queue", "asyncio")),
    *(("full backlog", "sync"), ("directory renamed", "asyncio"), ("is there", "command")),
]


@pytest.mark.parametrize(("scene", "way"), table(COMES, *QUICK_COMES))
def test_it_comes(place: Path, scene: str, way: str) -> None:
    with contextlib.closing(COMES[scene](place)) as run:  # type: ignore[type-var]
        next(run)
        waiter = WAYS[way](str(place))
        try:
            if scene != "is there":
                waiter.wait_until_paused()
            next(run)
            assert waiter.outcome() == "id 0"
        finally:
            waiter.end()


QUICK_AT_ONCE = [
    *(("regular file", "sync"), ("datagram socket", "asyncio"), ("hangs up", "command")),
    *(("ssh", "asyncio"), ("dies with a queue", "sync"), ("dies with a queue", "asyncio")),
    *(("parent a file", "asyncio"), ("newer protocol", "sync")),
]


@pytest.mark.parametrize(("scene", "way"), table(AT_ONCE, *QUICK_AT_ONCE))
def test_waiting_does_not_help(place: Path, scene: str, way: str) -> None:
    """What is in the way does not go by itself; whoever refuses would be asked again and again."""
    make, expected = AT_ONCE[scene]
    with contextlib.closing(make(place)) as run:  # type: ignore[type-var]
        next(run)
        waiter = WAYS[way](str(place), None)
        try:
            if make is dies_with_a_queue:
                waiter.wait_until_paused()
                next(run)
            said = waiter.outcome()
        finally:
            waiter.end()
    assert re.search(expected, said), said
    assert "TimeoutError" not in said
    # Once it is out of the way, the next one waits and joins.
    tidy(place)
    with served(place):
        assert WAYS["sync"](str(place)).outcome() == "id 0"


def tidy(place: Path) -> None:
    if not place.parent.exists():
        pass
    elif place.parent.is_dir():
        shutil.rmtree(place.parent)
    else:
        place.parent.unlink()
    place.parent.mkdir()


QUICK_TOO_LATE = [
    *(("nothing", "sync"), ("flapping", "asyncio"), ("accepts nobody", "asyncio")),
    *(("silent", "sync"), ("stale", "command")),
]


@pytest.mark.parametrize(("scene", "way"), table(TOO_LATE, *QUICK_TOO_LATE))
def test_the_limit_ends(place: Path, scene: str, way: str) -> None:
    make, expected = TOO_LATE[scene]
    with contextlib.closing(make(place)) as run:  # type: ignore[type-var]
        next(run)
        begun = time.monotonic()
        waiter = WAYS[way](str(place), SHORT)
        try:
            said = waiter.outcome()
            assert SHORT <= time.monotonic() - begun < 15
        finally:
            waiter.end()
    assert re.search(expected, said), said


# -- paths ----------------------------------------------------------------------------------------

PATHS: dict[str, str] = {
    "relative": "s",
    "relative with a dot": "./s",
    "up and down": "../sub/s",
    "doubled slashes": "{place.parent}//s",
    "dots inside": "{place.parent}/./../sub/s",
}


@pytest.mark.parametrize(
    ("path", "way"),
    table(PATHS, ("relative", "sync"), ("relative", "command"), ("up and down", "asyncio")),
)
def test_paths(place: Path, path: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place.parent)
    waiter = WAYS[way](PATHS[path].format(place=place))
    try:
        waiter.wait_until_paused()
        with served(place):
            assert waiter.outcome() == "id 0"
    finally:
        waiter.end()


WRONG: dict[str, tuple[str, str]] = {
    "too long": ("/tmp/" + "x" * 200, "at most 107 bytes, this one 205: use a shorter one"),
    "empty": ("", "a socket needs a path"),
    "a name too long": ("/tmp/" + "x" * 100 + "/../../" + "y", "at most|No such|no server"),
    "home of nobody": ("/dev/null/s", "(?i)not a directory"),
    "root": ("/", "not a socket"),
    "slash at the end": ("/tmp/", "not a socket"),
}


@pytest.mark.parametrize(("path", "way"), table(WRONG, ("too long", "sync"), ("empty", "asyncio")))
def test_wrong_paths(path: str, way: str) -> None:
    text, expected = WRONG[path]
    waiter = WAYS[way](text, SHORT)
    try:
        said = waiter.outcome()
    finally:
        waiter.end()
    assert re.search(expected, said), said


@pytest.mark.parametrize("way", ["sync", "asyncio"])
@pytest.mark.parametrize("path", ["\0abstract", "a\0b"])
def test_no_abstract_names(path: str, way: str) -> None:
    assert "a socket needs a path" in WAYS[way](path, None).outcome()


@pytest.mark.parametrize("way", ["sync", "asyncio"])
@pytest.mark.parametrize("kind", [os.fsencode, Path])
def test_kinds_of_paths(place: Path, kind: Callable[[str], Any], way: str) -> None:
    waiter = WAYS[way](kind(str(place)))
    waiter.wait_until_paused()
    with served(place):
        assert waiter.outcome() == "id 0"


@pytest.mark.nightly
@pytest.mark.parametrize("way", ["sync", "asyncio"])
@pytest.mark.parametrize("more", [{"vectors": 1}, {"readonly": True}, {"vectors": 2}])
def test_with_other_options(place: Path, more: dict[str, Any], way: str) -> None:
    waiter = WAYS[way](str(place), **more)
    waiter.wait_until_paused()
    with served(place):
        said = waiter.outcome()
    if more == {"vectors": 2}:
        assert "2" in said
        assert "Error" in said
    else:
        assert said == "id 0"


# -- several --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ways",
    [
        "sync asyncio command",
        pytest.param("sync sync sync sync", marks=pytest.mark.nightly),
        pytest.param("asyncio asyncio asyncio asyncio", marks=pytest.mark.nightly),
        pytest.param("command command command", marks=pytest.mark.nightly),
    ],
)
def test_several_wait(place: Path, ways: str) -> None:
    """Every client joins. Each leaves at once, so an id may be given again."""
    waiters = [WAYS[way](str(place)) for way in ways.split()]
    try:
        for waiter in waiters:
            waiter.wait_until_paused()
        with ivshmem.Server(str(place), "64K").start() as server:
            for waiter in waiters:
                assert re.fullmatch("id [0-9]", waiter.outcome())
            assert server.counts.joins == len(waiters)
    finally:
        for waiter in waiters:
            waiter.end()


@pytest.mark.parametrize("tasks", [2, pytest.param(40, marks=pytest.mark.nightly)])
def test_tasks_of_one_loop(place: Path, tasks: int) -> None:
    """Some are cancelled; the others are not disturbed."""

    async def main() -> None:
        waiting = [asyncio.ensure_future(joined(str(place), PATIENCE)) for _ in range(tasks)]
        await asyncio.sleep(0)
        assert not any(task.done() for task in waiting)
        for task in waiting[::2]:
            task.cancel()
        with ivshmem.Server(str(place), "64K").start() as server:
            done = await asyncio.gather(*waiting, return_exceptions=True)
            assert server.counts.joins == tasks // 2
        for each in done[::2]:
            assert isinstance(each, asyncio.CancelledError)
        assert all(isinstance(each, int) for each in done[1::2])

    asyncio.run(main())


@pytest.mark.parametrize(
    "limit", [0.02, *(pytest.param(t, marks=pytest.mark.nightly) for t in (0, 0.1))]
)
def test_wait_for_ends_it(place: Path, limit: float) -> None:
    """asyncio's own limit leaves nothing behind, and the loop free."""

    async def main() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(joined(str(place), None), limit)
        with served(place):
            assert await joined(str(place), PATIENCE) == 0

    asyncio.run(main())


@pytest.mark.parametrize("times", [5, pytest.param(60, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("way", ["sync", "asyncio"])
def test_servers_that_come_and_go(place: Path, way: str, times: int) -> None:
    """Each wait ends with an id, or with a server that ended in the middle of a set-up."""
    done = threading.Event()

    def flap() -> None:
        while not done.is_set():
            with served(place):
                done.wait(0.002)

    flapping = Background(flap)
    try:
        for _ in range(times):
            said = WAYS[way](str(place)).outcome()
            assert re.search(f"^id 0$|{GONE}|reset", said), said
    finally:
        done.set()
        flapping.result()


# -- the end of a wait by a signal ----------------------------------------------------------------

STAGES: dict[str, Callable[[Path], Scene]] = {
    "nothing": nothing,
    "no directory": no_parent,
    "silent": silent,
    "accepts nobody": accepts_nobody,
    "version only": version_only,
}
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGALRM]


@pytest.mark.parametrize(
    ("stage", "number"),
    [
        pytest.param(
            stage,
            number,
            marks=()
            if (stage, number) in [("nothing", signal.SIGINT), ("silent", signal.SIGTERM)]
            else pytest.mark.nightly,
        )
        for stage in STAGES
        for number in SIGNALS
    ],
)
def test_a_signal_ends_the_command(place: Path, stage: str, number: signal.Signals) -> None:
    with contextlib.closing(STAGES[stage](place)) as run:  # type: ignore[type-var]
        next(run)
        command = Command(str(place), None)
        try:
            # With SIGINT a shell's child may ignore it; a terminal's does not.
            command.wait_until_paused()
            command.process.send_signal(number)
            output, errors = command.process.communicate(timeout=PATIENCE)
        finally:
            command.end()
    assert "Traceback" not in errors
    assert not output
    assert command.process.returncode in (-number, 128 + number)


IN_MAIN: dict[str, Callable[[Path], object]] = {
    "sync": lambda place: ivshmem.connect(str(place), wait_for_server=True),
    "asyncio": lambda place: asyncio.run(joined(str(place), None)),
}


@pytest.mark.parametrize("way", ["sync", "asyncio"])
@pytest.mark.parametrize(
    "stage",
    [
        pytest.param(stage, marks=() if stage in ("nothing", "silent") else pytest.mark.nightly)
        for stage in STAGES
    ],
)
def test_ctrl_c_in_the_library(place: Path, stage: str, way: str) -> None:
    with contextlib.closing(STAGES[stage](place)) as run:  # type: ignore[type-var]
        next(run)
        begun = time.monotonic()
        with pytest.raises(KeyboardInterrupt), interrupt_when_asleep(pauses):
            IN_MAIN[way](place)
        assert time.monotonic() - begun < 10
    tidy(place)
    with served(place):
        assert WAYS[way](str(place)).outcome() == "id 0"


# -- permissions ----------------------------------------------------------------------------------


def as_nobody(way: str, path: Path) -> Library:
    """The thread, and the threads that it starts, have an unprivileged user's rights to files."""
    libc = ctypes.CDLL(None)

    def call() -> int:
        libc.setfsgid(NOBODY)
        libc.setfsuid(NOBODY)
        if way == "sync":
            with ivshmem.connect(str(path), timeout=PATIENCE, wait_for_server=True) as client:
                return client.id
        return asyncio.run(joined(str(path), PATIENCE))

    return Library(call)


@needs_root
@pytest.mark.parametrize("way", ["sync", "asyncio"])
@pytest.mark.parametrize("mode", [0o666, pytest.param(0o602, marks=pytest.mark.nightly)])
def test_a_server_that_lets_in_a_moment_later(place: Path, mode: int, way: str) -> None:
    """A socket that is bound, and whose mode is still to be set, is not taken for a refusal."""
    with socket.socket(socket.AF_UNIX) as sock:
        os.fchmod(sock.fileno(), 0)
        sock.bind(str(place))  # as Listener does it
        waiter = as_nobody(way, place)
        until(lambda: pauses(waiter._call.native_id), "a pause")
    with served(place):
        place.chmod(mode)
        assert waiter.outcome() == "id 0"


@needs_root
@pytest.mark.nightly
@pytest.mark.parametrize("way", ["sync", "asyncio"])
def test_a_directory_that_is_opened_up(place: Path, way: str) -> None:
    place.parent.chmod(0o700)
    waiter = as_nobody(way, place)
    until(lambda: pauses(waiter._call.native_id), "a pause")
    with served(place):
        place.chmod(0o666)
        place.parent.chmod(0o711)
        assert waiter.outcome() == "id 0"


@needs_root
@pytest.mark.nightly
@pytest.mark.parametrize("way", ["sync", "asyncio"])
@pytest.mark.parametrize("closed", ["socket", "directory"])
def test_no_permission_is_said_soon(place: Path, closed: str, way: str) -> None:
    """And not at the end of the time limit: nobody comes to change it."""
    begun = time.monotonic()
    with served(place):
        place.chmod(0o600)
        if closed == "directory":
            place.parent.chmod(0o700)
        said = as_nobody(way, place).outcome()
        assert "permission denied: the server's user must let you write to its socket" in said
    assert time.monotonic() - begun < PATIENCE / 2


# -- real servers ---------------------------------------------------------------------------------


@contextlib.contextmanager
def server_process(*words: str, **how: Any) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [*IVSHMEM, "serve", "-q", *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=users_environment(),
        **how,
    )
    try:
        yield process
        assert process.poll() is None
    finally:
        process.terminate()
        process.wait(PATIENCE)


@pytest.mark.parametrize(
    ("options", "way"),
    [
        ("", "sync"),
        ("--supervise", "asyncio"),
        pytest.param("", "command", marks=pytest.mark.nightly),
        pytest.param("--names", "asyncio", marks=pytest.mark.nightly),
        pytest.param("--mode 0666", "sync", marks=pytest.mark.nightly),
        pytest.param("--supervise", "command", marks=pytest.mark.nightly),
    ],
)
def test_the_command_comes_later(place: Path, options: str, way: str) -> None:
    waiter = WAYS[way](str(place))
    try:
        waiter.wait_until_paused()
        with server_process("-S", str(place), *options.split()):
            assert waiter.outcome() == "id 0"
    finally:
        waiter.end()


@pytest.mark.parametrize(
    "ways",
    [
        "sync asyncio",
        pytest.param("command sync", marks=pytest.mark.nightly),
        pytest.param("asyncio asyncio sync sync", marks=pytest.mark.nightly),
    ],
)
def test_a_supervised_server_is_killed_while_they_wait(place: Path, ways: str) -> None:
    """They are in the queue of a socket that the supervisor holds: its next child accepts them."""
    with server_process("-S", str(place), "--supervise") as parent:
        assert sync(str(place)).outcome() == "id 0"
        (child,) = children_of(parent.pid)
        os.kill(child, signal.SIGSTOP)
        until(lambda: state(child) == "T", "a stopped server")
        waiters = [WAYS[way](str(place)) for way in ways.split()]
        try:
            for waiter in waiters:
                waiter.wait_until_paused()
            os.kill(child, signal.SIGKILL)
            for waiter in waiters:
                assert re.fullmatch("id [0-9]+", waiter.outcome())
        finally:
            for waiter in waiters:
                waiter.end()


@pytest.mark.parametrize(
    "way",
    [
        "asyncio",
        *(pytest.param(way, marks=pytest.mark.nightly) for way in ("sync", "command")),
    ],
)
def test_a_stopped_server_continues(place: Path, way: str) -> None:
    with server_process("-S", str(place)) as process:
        assert sync(str(place)).outcome() == "id 0"
        process.send_signal(signal.SIGSTOP)
        until(lambda: state(process.pid) == "T", "a stopped server")
        waiter = WAYS[way](str(place))
        try:
            waiter.wait_until_paused()
            process.send_signal(signal.SIGCONT)
            assert waiter.outcome() == "id 0"
        finally:
            process.send_signal(signal.SIGCONT)
            waiter.end()


ACTIVATED = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
os.execv(sys.executable, [sys.executable, "-m", "ivshmem", "serve", "-q", "-S", sys.argv[2]])
"""


@pytest.mark.parametrize(
    "way",
    [
        "sync",
        *(pytest.param(way, marks=pytest.mark.nightly) for way in ("asyncio", "command")),
    ],
)
def test_socket_activation(place: Path, way: str) -> None:
    """A service manager listens; the server that it starts for the first client accepts it."""
    waiter = WAYS[way](str(place))
    try:
        waiter.wait_until_paused()
        with listening(place) as sock:
            until(lambda: in_queue(sock), "a client in the queue")
            process = subprocess.Popen(
                [sys.executable, "-c", ACTIVATED, str(sock.fileno()), str(place)],
                pass_fds=[sock.fileno()],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=users_environment(),
            )
            try:
                assert waiter.outcome() == "id 0"
            finally:
                process.terminate()
                process.wait(PATIENCE)
            assert place.exists(), "a socket unit's path is not the server's"
    finally:
        waiter.end()


def in_queue(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))
