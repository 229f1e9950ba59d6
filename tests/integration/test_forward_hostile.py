"""`ivshmem forward` and a peer that stores what it likes into a connection's words."""

from __future__ import annotations

import contextlib
import random
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.forwards import Forward, Pair, exchanged, received
from support.waiting import PATIENCE

import ivshmem
from ivshmem import Server, channel
from ivshmem.channel import Stream

SENT = 12_345  # bytes, by which its words are found


@pytest.fixture
def pair(directory: Path) -> Iterator[Pair]:
    path = str(directory / "s")
    with Server(path, "8M", channels="4M").start():
        pair = Pair(directory, path, "p", "--connections", 8, "--buffer", "16K")
        try:
            yield pair
        finally:
            pair.close()


class Attacker:
    """A peer with a connection to the side that connects; it knows where its own words are."""

    def __init__(self, client: ivshmem.Client, stream: Stream) -> None:
        self.stream = stream
        stream.sendall(bytes(SENT))
        self.words = memoryview(client.region).cast("B").cast("Q")
        # How much it has sent; behind that is how much the other side has received.
        self.at = min(at for at, word in enumerate(self.words) if word >> 24 == SENT)

    def store(self, offset: int, value: int) -> None:
        self.words[self.at + offset] = value

    @contextlib.contextmanager
    def storing(self, offset: int, value: int) -> Iterator[None]:
        """Store a word again and again: the stream's beat would set it right."""
        over = threading.Event()

        def store() -> None:
            while not over.wait(0.01):
                self.store(offset, value)

        thread = threading.Thread(target=store)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def close(self) -> None:
        self.words.release()


@contextlib.contextmanager
def attacking(path: str) -> Iterator[Attacker]:
    with ivshmem.connect(path, timeout=10) as client, channel.open(client) as channels:
        found = channels.open("p")
        assert isinstance(found, channel.Bytes)
        with found.connect() as stream:
            attacker = Attacker(client, stream)
            with contextlib.closing(attacker):
                yield attacker


@pytest.fixture
def attacker(pair: Pair) -> Iterator[Attacker]:
    with attacking(pair.path) as attacker:
        yield attacker


def test_an_impossible_word_ends_its_connection_alone(pair: Pair, attacker: Attacker) -> None:
    with pair.accept() as own, pair.joined() as (near, far):
        assert len(received(own, SENT)) == SENT
        with attacker.storing(0, attacker.words[attacker.at] + (1 << 54)):  # seen at the next beat
            pair.far.says("reset .*the (head|tail) at .* is impossible")
        assert exchanged(near, far, 100_000, 1)


def others_are_served(pair: Pair) -> bool:
    """Whether one of some new connections works: the first may get the slot that was spoiled."""
    pair.target.settimeout(3)
    with contextlib.ExitStack() as stack:
        for _ in range(4):  # a connection that does not work keeps its slot
            near = stack.enter_context(pair.dial())
            with contextlib.suppress(OSError):
                near.sendall(b"hello")
                near.shutdown(socket.SHUT_WR)
                far = stack.enter_context(pair.target.accept()[0])
                far.settimeout(3)
                if received(far) == b"hello":
                    return True
    return False


def test_any_words_reach_the_target_alone(pair: Pair, attacker: Attacker) -> None:
    """Whatever it stores, others are served, and the loop neither ends nor hangs."""
    chance = random.Random(1)  # noqa: S311 - no secret
    with pair.accept() as own, pair.joined() as (near, far):
        own.settimeout(0.01)
        store_wild_words(attacker, chance)
        assert exchanged(near, far, 100_000, 2)
    assert others_are_served(pair)
    assert pair.far.process.poll() is None


def store_wild_words(attacker: Attacker, chance: random.Random) -> None:
    """For half a second: into its own three lines, and those of the side that accepted it."""
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        word = attacker.words[attacker.at + chance.randrange(-8, 16)]
        wild = word ^ chance.choice((1 << 20, 1 << 24, 1 << 36, 1 << 63, chance.getrandbits(64)))
        attacker.store(chance.randrange(-8, 16), wild)


@pytest.mark.skipif(shutil.which("strace") is None, reason="no strace: apt-get install strace")
def test_it_connects_to_what_is_named_and_nothing_else(directory: Path) -> None:
    """All that its process connects to while it is attacked; another channel of it works on."""
    path, calls = str(directory / "s"), directory / "calls"
    trace = ["strace", "-D", "-f", "-qq", "-e", "trace=connect", "-o", str(calls)]
    with contextlib.ExitStack() as stack:
        stack.enter_context(Server(path, "8M", channels="4M").start())
        words: list[object] = []
        targets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in "pq"]
        ports = [target.getsockname()[1] for target in targets]
        for name, port in zip("pq", ports, strict=True):
            words += [name, "--connect", f"tcp:127.0.0.1:{port}", "--buffer", "16K"]
            words += ["--connections", 8]
        far = Forward(directory, "far", path, "-v", *words, under=trace)
        stack.callback(far.end)
        far.says("q: connects to")
        near = Forward(directory, "near", path, "q", "--listen", "tcp:127.0.0.1:0")
        stack.callback(near.end)
        attacker = stack.enter_context(attacking(path))
        targets[0].accept()[0].close()

        def passes(seed: int) -> bool:
            """Whether a new connection of the other channel works."""
            address = ("127.0.0.1", near.port())
            with socket.create_connection(address, PATIENCE) as one, targets[1].accept()[0] as two:
                return exchanged(one, two, 100_000, seed)

        chance = random.Random(2)  # noqa: S311 - no secret
        thread = threading.Thread(target=store_wild_words, args=(attacker, chance))
        thread.start()
        for seed in range(3):
            assert passes(seed)
        thread.join()
        assert passes(3)
    connected = set(re.findall(r"sin_port=htons\((\d+)\)", calls.read_text()))
    assert connected == {str(port) for port in ports}
    assert set(re.findall(r'sun_path="([^"]*)"', calls.read_text())) == {path}
