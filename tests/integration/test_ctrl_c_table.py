"""Ctrl-C at each line of making memory, of servers and of asyncio's connect: nothing stays."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support.children import python
from support.ctrl_c import SERVER, ctrl_c_anywhere
from support.waiting import until

import ivshmem
from ivshmem import Region, Server, connect
from ivshmem.aio import connect_async
from ivshmem.system.listener import Listener

# The interpreter ignores what is raised while it finalizes an object.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

SIZE = 1 << 16


def table(names: object, *quick: str) -> list[object]:
    """The names; those that are not quick by night."""
    return [
        pytest.param(name, marks=() if name in quick else pytest.mark.nightly)
        for name in names  # type: ignore[attr-defined]
    ]


class Place:
    """A directory and a POSIX name; what was in the directory before, and must be after."""

    def __init__(self, directory: Path, name: str) -> None:
        self.directory = directory
        self.name = name
        self.shm = Path("/dev/shm") / name
        self.new = directory / "new"
        self.old = directory / "old"
        self.empty = directory / "empty"
        self.inside = directory / "inside"
        self.inside.mkdir()
        self.remake()
        self.before = self.seen()

    def remake(self) -> None:
        """What a call may have changed is as it was."""
        self.shm.unlink(missing_ok=True)
        self.new.unlink(missing_ok=True)
        self.old.write_bytes(bytes(SIZE))
        self.old.chmod(0o600)
        self.empty.write_bytes(b"")

    def seen(self) -> list[str]:
        """Hidden names, too."""
        return sorted([*os.listdir(self.directory), *os.listdir(self.inside)])

    def nothing_left(self, where: str) -> None:
        """No name that was not there before; what was there is, whole."""
        assert self.seen() == self.before, f"left by a Ctrl-C at {where}"
        left = [name for name in os.listdir("/dev/shm") if self.name in name]
        assert not left, f"left by a Ctrl-C at {where}"
        assert self.old.stat().st_size == SIZE, where
        assert self.empty.stat().st_size in (0, SIZE), where


@pytest.fixture
def place(directory: Path, shm_name: str) -> Place:
    return Place(directory, shm_name)


# -- memory: each call leaves no region behind when it is not interrupted, either ------------------


GOT: list[bool] = []  # whether the caller was given its region


def made(region: Region) -> None:
    """From here on the caller has the region, and its name stays until the caller removes it."""
    GOT.append(True)
    with region:
        assert region.size >= SIZE


def refused(call: Callable[[], object]) -> None:
    with pytest.raises((ivshmem.IvshmemError, OSError, ValueError)):
        call()


def emptied(place: Place) -> None:
    with Region.create(SIZE, path=place.empty):
        pass
    os.truncate(place.empty, 0)


def replaced(place: Place) -> None:
    with Region.create(SIZE, path=place.old, replace=True):
        pass


MEMORY: dict[str, Callable[[Place], object]] = {
    "anonymous": lambda _: made(Region.create(SIZE)),
    "populated": lambda _: made(Region.create(SIZE, prealloc=True)),
    "name": lambda at: made(Region.create(SIZE, name=at.name)),
    "name, populated": lambda at: made(Region.create(SIZE, name=at.name, prealloc=True)),
    "name, mode": lambda at: made(Region.create(SIZE, name=at.name, mode=0o666)),
    "name with a slash": lambda at: made(Region.create(SIZE, name="/" + at.name)),
    "name, replace nothing": lambda at: made(Region.create(SIZE, name=at.name, replace=True)),
    "path": lambda at: made(Region.create(SIZE, path=at.new)),
    "path, populated": lambda at: made(Region.create(SIZE, path=at.new, prealloc=True)),
    "path, replace": replaced,
    "path, empty file": emptied,
    "directory": lambda at: made(Region.create(SIZE, directory=at.inside)),
    "exists": lambda at: refused(lambda: Region.create(SIZE, path=at.old)),
    "no directory": lambda at: refused(lambda: Region.create(SIZE, path=at.new / "x")),
    "wrong size": lambda at: refused(lambda: Region.create(SIZE + 1, path=at.new)),
    "attach": lambda at: made(Region.attach(path=at.old)),
    "attach, readonly": lambda at: Region.attach(path=at.old, readonly=True).close(),
    "attach, populated": lambda at: made(Region.attach(path=at.old, prealloc=True)),
    "attach, wrong size": lambda at: refused(lambda: Region.attach(path=at.old, size=SIZE * 2)),
    "attach to nothing": lambda at: refused(lambda: Region.attach(name=at.name)),
    "attach to an empty file": lambda at: refused(lambda: Region.attach(path=at.empty)),
    "open, new name": lambda at: made(Region.open(SIZE, name=at.name)),
    "open, new path": lambda at: made(Region.open(SIZE, path=at.new)),
    "open, old path": lambda at: made(Region.open(SIZE, path=at.old)),
    "open, wrong size": lambda at: refused(lambda: Region.open(SIZE * 2, path=at.old)),
    "extents": lambda at: read(at, lambda region: list(region.extents())),
    "repr": lambda at: read(at, repr),
}


def read(place: Place, look: Callable[[Region], object]) -> None:
    with Region.attach(path=place.old) as region:
        look(region)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("way", table(MEMORY, "path, empty file", "attach"))
def test_memory(place: Place, way: str) -> None:
    def after(where: str) -> None:
        if GOT:
            place.shm.unlink(missing_ok=True)
            place.new.unlink(missing_ok=True)
            GOT.clear()
        place.nothing_left(where)
        place.remake()

    assert ctrl_c_anywhere(lambda: MEMORY[way](place), after, calls=True) > 5
    MEMORY[way](place)
    after("nowhere")


# -- servers --------------------------------------------------------------------------------------


class ServerPlace(Place):
    def __init__(self, directory: Path, name: str) -> None:
        self.undo = ExitStack()
        self.path = str(directory / "socket")
        self.stale = directory / "stale"
        super().__init__(directory, name)
        self.region = self.undo.enter_context(Region.create(SIZE))
        self.named = self.undo.enter_context(Region.create(SIZE, name=f"named-{os.getpid()}"))
        self.undo.callback(self.named.unlink)

    def remake(self) -> None:
        super().remake()
        if not self.stale.exists():
            with socket.socket(socket.AF_UNIX) as sock:
                sock.bind(str(self.stale))


@pytest.fixture
def server_place(directory: Path, shm_name: str) -> Iterator[ServerPlace]:
    made = ServerPlace(directory, shm_name)
    with made.undo:
        yield made


def serves(made: Callable[[], Server], *calls: Callable[[Server], object]) -> None:
    with made() as server:
        for call in calls:
            call(server)


def over_a_stale_one(at: ServerPlace) -> None:
    """An interrupted call may have removed the stale socket."""
    serves(lambda: Server(str(at.stale), SIZE))


def by_listener(at: ServerPlace, **how: Any) -> None:
    with Listener(at.path, **how) as listener:
        serves(lambda: Server(listener, at.region))


def twice(at: ServerPlace) -> None:
    with Server(at.path, at.region):
        refused(lambda: Server(at.path, at.region))


def of_a_name(at: ServerPlace) -> None:
    """`test_memory` interrupts the making of a region: `with` alone may lose one, and its name."""
    serves(lambda: Server(at.path, at.named, names=True))


def with_a_peer(at: ServerPlace) -> None:
    """One that connects while nobody serves, and has gone when somebody does."""
    with Server(at.path, at.region) as server:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(at.path)
            server.step(0)
        server.step(0)


STARTED: list[Server] = []


def started(at: ServerPlace) -> None:
    """A close that was interrupted is followed by another."""
    STARTED.append(Server(at.path, at.region))
    STARTED[0].start()
    STARTED[0].close()


SERVERS: dict[str, Callable[[ServerPlace], object]] = {
    "size": lambda at: serves(lambda: Server(at.path, SIZE)),
    "region": lambda at: serves(lambda: Server(at.path, at.region)),
    "vectors": lambda at: serves(lambda: Server(at.path, at.region, 8)),
    "no vectors": lambda at: serves(lambda: Server(at.path, at.region, 0)),
    "names": lambda at: serves(lambda: Server(at.path, SIZE, names=True)),
    "names, counted": lambda at: serves(lambda: Server(at.path, SIZE, names=8)),
    "stale": over_a_stale_one,
    "listener": by_listener,
    "listener with a mode": lambda at: by_listener(at, mode=0o660),
    "listener with a group": lambda at: by_listener(at, mode=0o660, group=os.getegid()),
    "another is there": twice,
    "a name's memory": of_a_name,
    "no directory": lambda at: refused(lambda: Server(f"{at.directory}/no/s", SIZE)),
    "a file there": lambda at: refused(lambda: Server(str(at.old), SIZE)),
    "path too long": lambda _: refused(lambda: Server("/tmp/" + "x" * 200, SIZE)),
    "wrong size": lambda at: refused(lambda: Server(at.path, SIZE + 1)),
    "wrong vectors": lambda at: refused(lambda: Server(at.path, SIZE, -1)),
    "a step": lambda at: serves(lambda: Server(at.path, at.region), lambda s: s.step(0)),
    "a peer": with_a_peer,
    "report": lambda at: serves(lambda: Server(at.path, at.region), lambda s: s.report()),
    "started": started,
    "closed twice": lambda at: serves(lambda: Server(at.path, at.region), Server.close),
}


@pytest.mark.nightly
@pytest.mark.parametrize("way", table(SERVERS, "region", "listener with a group"))
def test_server(server_place: ServerPlace, way: str) -> None:
    place = server_place

    def after(where: str) -> None:
        while STARTED:
            STARTED.pop().close()
            gc.collect()  # ExitStack forgets a callback before it calls it
        place.stale.touch()
        place.nothing_left(where)
        if not place.stale.is_socket():
            place.stale.unlink()
        place.remake()

    call = SERVERS[way]
    assert ctrl_c_anywhere(lambda: call(place), after, calls=True) > 1
    call(place)
    after("nowhere")


# -- asyncio --------------------------------------------------------------------------------------


class Served:
    """A server in a process of its own, with a peer that is told of all others."""

    def __init__(self, directory: Path) -> None:
        self.undo = ExitStack()
        self.directory = directory
        self.path = str(directory / "served")
        self.undo.enter_context(python(SERVER, self.path, str(SIZE))).expect("READY")
        self.undo.callback(os.unlink, self.path)
        self.other = self.undo.enter_context(connect(self.path))

    def alone(self, where: str = "") -> None:
        until(lambda: not self.other.peers, f"the end of the peer that was interrupted at {where}")


@pytest.fixture
def scene(directory: Path) -> Iterator[Served]:
    made = Served(directory)
    with made.undo:
        yield made


async def joined(path: str, **more: Any) -> None:
    async with connect_async(path, **more) as client:
        assert client.id >= 0


async def awaited(path: str) -> None:
    client = await connect_async(path)
    await client.aclose()


async def rung(path: str) -> None:
    async with connect_async(path) as client:
        client.ring(client.id, 1)
        assert await client.wait(1)


async def in_vain(path: str, **more: Any) -> None:
    with pytest.raises((ivshmem.IvshmemError, OSError)):
        await joined(path, **more)


ASYNC: dict[str, Callable[[Served], Any]] = {
    "plain": lambda scene: joined(scene.path),
    "await": lambda scene: awaited(scene.path),
    "timeout": lambda scene: joined(scene.path, timeout=20),
    "vectors": lambda scene: joined(scene.path, vectors=2),
    "readonly": lambda scene: joined(scene.path, readonly=True),
    "wait": lambda scene: joined(scene.path, wait_for_server=True, timeout=20),
    "wait in vain": lambda scene: in_vain(f"{scene.path}no", wait_for_server=True, timeout=0.002),
    "ring": lambda scene: rung(scene.path),
    "nobody there": lambda scene: in_vain(f"{scene.path}no"),
    "wrong vectors": lambda scene: in_vain(scene.path, vectors=5),
}


@pytest.mark.sampled(3)
@pytest.mark.timeout(600)
@pytest.mark.parametrize("way", table(ASYNC, "plain", "nobody there", "wait in vain"))
def test_asyncio(scene: Served, way: str) -> None:
    loop = asyncio.new_event_loop()

    def run() -> None:
        """As asyncio.run does it, in a loop that stays, since making one is not ours."""
        task = loop.create_task(ASYNC[way](scene))
        try:
            loop.run_until_complete(task)
        finally:
            for each in asyncio.all_tasks(loop):
                each.cancel()
            while left := asyncio.all_tasks(loop):
                loop.run_until_complete(asyncio.wait(left))
            loop.run_until_complete(asyncio.sleep(0))  # what is scheduled holds the exception

    try:
        run()
        assert ctrl_c_anywhere(run, scene.alone, calls=True) > 1
        run()
    finally:
        loop.close()
    scene.alone()
