"""Ctrl-C at each line of a client's life: nothing stays, and the next try works."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support.children import python
from support.ctrl_c import SERVER, ctrl_c_anywhere, interrupted
from support.waiting import Background, until

import ivshmem
from ivshmem import Disconnected, PeerJoined, Region, connect
from ivshmem.native.descriptors import FdArray
from ivshmem.peer.client import Client
from ivshmem.protocol.framing import encode

# The interpreter ignores what is raised while it finalizes an object.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

SIZE = 1 << 16


class Scene:
    """A directory with what a call may need, and a served region in it."""

    def __init__(self, place: Path, peers: int) -> None:
        self.undo = ExitStack()
        self.path = str(place / "served")
        self.new = str(place / "new")
        self.place = place
        self.undo.enter_context(python(SERVER, self.path, str(SIZE))).expect("READY")
        self.undo.callback(os.unlink, self.path)
        self.others = [self.undo.enter_context(connect(self.path)) for _ in range(peers)]
        self.region = self.undo.enter_context(Region.create(SIZE, path=place / "old"))

        self.alone()

    def alone(self, where: str = "") -> None:
        """Wait until the others are told that each peer has left again."""
        known = [each.id for each in self.others]
        for each in self.others:
            until(
                lambda: sorted([*each.peers, each.id]) == known,  # noqa: B023
                f"an end of the peer that was interrupted at {where}",
            )


@pytest.fixture
def scene(directory: Path) -> Iterator[Scene]:
    made = Scene(directory, peers=1)
    with made.undo:
        yield made


def refused(call: Callable[[], object]) -> None:
    with pytest.raises((ivshmem.IvshmemError, OSError)):
        call()


# -- clients --------------------------------------------------------------------------------------

CONNECTS: dict[str, Callable[[Scene], object]] = {
    "plain": lambda scene: connect(scene.path).close(),
    "timeout": lambda scene: connect(scene.path, timeout=20).close(),
    "vectors": lambda scene: connect(scene.path, vectors=2).close(),
    "readonly": lambda scene: connect(scene.path, readonly=True).close(),
    "wait": lambda scene: connect(scene.path, wait_for_server=True, timeout=20).close(),
    "wait in vain": lambda scene: refused(
        lambda: connect(scene.new, wait_for_server=True, timeout=0)
    ),
    "with": lambda scene: in_a_block(scene),
    "nobody there": lambda scene: refused(lambda: connect(scene.new)),
    "no socket": lambda scene: refused(lambda: connect(scene.place / "old")),
    "wrong vectors": lambda scene: refused(lambda: connect(scene.path, vectors=5)),
    "no time": lambda scene: out_of_time(scene),
    "collected": lambda scene: connect(scene.path) and None,
}


def in_a_block(scene: Scene) -> None:
    with connect(scene.path) as client:
        client.ring(client.id)
        assert client.wait(0, timeout=20)


def out_of_time(scene: Scene) -> None:
    with contextlib.suppress(TimeoutError):
        connect(scene.path, timeout=0.000001).close()


# By day at some moments; a prime number, so that no loop of the call has the same one each time.
EVERY = pytest.mark.parametrize("every", [11, pytest.param(1, marks=pytest.mark.nightly)])
QUICK = ("plain", "nobody there", "no socket", "wait in vain")
LONG = [pytest.param(way, marks=pytest.mark.nightly) for way in CONNECTS if way not in QUICK]


@pytest.mark.sampled(2)
@EVERY
@pytest.mark.parametrize("way", [*QUICK, *LONG])
def test_connect(scene: Scene, way: str, every: int) -> None:
    assert ctrl_c_anywhere(lambda: CONNECTS[way](scene), scene.alone, every=every) > 10
    with connect(scene.path) as client:
        assert len(client.peers) == 1


@pytest.mark.nightly
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("way", ["plain", "readonly", "vectors", "wait", "wrong vectors"])
def test_connect_at_each_bytecode(scene: Scene, way: str) -> None:
    assert ctrl_c_anywhere(lambda: CONNECTS[way](scene), scene.alone, opcodes=True) > 100


@pytest.mark.nightly
@pytest.mark.parametrize("peers", [0, 2, 5])
def test_connect_beside(directory: Path, peers: int) -> None:
    scene = Scene(directory, peers)
    with scene.undo:
        ctrl_c_anywhere(lambda: connect(scene.path).close(), scene.alone)


# -- news: an interrupted look loses nothing, and tells nothing twice ------------------------------


class Told:
    """A client whose server is the test: it is sent what the test says."""

    def __init__(self, place: Path) -> None:
        path = str(place / "by-hand")
        self.undo = ExitStack()
        listener = self.undo.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(path)
        listener.listen()
        self.undo.callback(os.unlink, path)
        memory = self.undo.enter_context(Region.create(SIZE))
        self.bells = FdArray.eventfds(6)
        self.undo.callback(self.bells.close)
        joining = Background(lambda: connect(path, vectors=2))
        self.server = self.undo.enter_context(listener.accept()[0])
        for value in (0, 3):
            self.server.send(encode(value))
        self.say(-1, memory.fileno())
        self.join(3)
        client = joining.result()
        assert isinstance(client, Client)
        self.client = client
        self.undo.callback(self.client.close)

    def say(self, value: int, *fds: int) -> None:
        socket.send_fds(self.server, [encode(value)], fds)

    def join(self, peer: int) -> None:
        for vector in range(2):
            self.say(peer, self.bells[(peer - 3) * 2 + vector])


LOOKS: dict[str, Callable[[Any], object]] = {
    "peers": lambda client: client.peers,
    "event": lambda client: client._read_news(),
    "ring": lambda client: refused(lambda: client.ring(77)),
}
NEWS: dict[str, tuple[str, list[object], list[int]]] = {
    "join": ("4", [PeerJoined(4)], [4]),
    "joins": ("4 5", [PeerJoined(4), PeerJoined(5)], [4, 5]),
    "join and leave": ("4 -4", [], []),
    "leave and join": ("4 -4 5", [PeerJoined(5)], [5]),
    "again": ("4 -4 4", [PeerJoined(4)], [4]),
    "end": ("4 .", [PeerJoined(4), Disconnected("the server ended the connection")], [4]),
}


def said(told: Told, words: str) -> None:
    for word in words.split():
        if word == ".":
            told.server.close()
        elif word[0] == "-":
            told.say(int(word[1:]))
        else:
            told.join(int(word))


@pytest.mark.parametrize(
    ("look", "opcodes"),
    [("peers", False)]
    + [
        pytest.param(look, opcodes, marks=pytest.mark.nightly)
        for look in LOOKS
        for opcodes in (False, True)
        if (look, opcodes) != ("peers", False)
    ],
)
@EVERY
@pytest.mark.parametrize("news", NEWS)
def test_news(directory: Path, news: str, every: int, look: str, opcodes: bool) -> None:
    words, events, peers = NEWS[news]
    for at in range(1, 100_000, every):
        told = Told(directory)
        with told.undo:
            said(told, words)
            came, where = interrupted(lambda: LOOKS[look](told.client), at, opcodes)  # noqa: B023
            found = list(told.client.events(timeout=0))
            assert found == events, f"after a Ctrl-C at {where}"
            assert told.client.peers == peers, f"after a Ctrl-C at {where}"
            for peer in peers:
                for vector in range(2):
                    told.client.ring(peer, vector)
                    number = (peer - 3) * 2 + vector
                    assert told.bells.drain(number) == 1, f"after a Ctrl-C at {where}"
        if not came:
            break
    assert at > 10


# -- leaving --------------------------------------------------------------------------------------


LIVES = ["alone", "waited", "watched"]


@pytest.mark.parametrize(
    "joined", ["read news", *(pytest.param(life, marks=pytest.mark.nightly) for life in LIVES)]
)
@EVERY
def test_close(scene: Scene, joined: str, every: int) -> None:
    """A close that was interrupted is followed by another, which closes what is left."""
    clients: list[Client] = []

    def leave() -> None:
        if not clients:
            clients.append(connect(scene.path))
        client = clients[0]
        if joined == "read news":
            client.peers  # noqa: B018
        elif joined == "waited":
            client.wait(timeout=0)
        elif joined == "watched":
            client.fileno()
        client.close()

    def again(_where: str) -> None:
        for client in clients:
            client.close()
            assert client.closed
            assert client.region.closed
        clients.clear()
        scene.alone()

    # Of each moment only those inside close count: the others leave `clients` empty.
    assert ctrl_c_anywhere(leave, again, every=every) > 10
