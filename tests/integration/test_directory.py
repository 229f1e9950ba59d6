"""The directory of names between real processes: races, deaths, stops, forks, a hostile one."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from support.children import Child, python
from support.waiting import Background, until

import ivshmem
from ivshmem import Directory, Region, Server

# Publishes argv[2] as peer argv[3] of the region argv[1], and ends when told to.
PUBLISHER = """
import sys
import ivshmem
with ivshmem.Region.attach(name=sys.argv[1]) as region:
    with ivshmem.Directory.open(region, beat=0.01, lease=float(sys.argv[4])) as table:
        print("READY")
        sys.stdin.readline()
        try:
            table.publish(sys.argv[2], id=int(sys.argv[3]))
            print("THERE")
        except (ivshmem.NameTaken, ivshmem.DirectoryFull) as error:
            print(type(error).__name__)
        sys.stdin.readline()
"""

# A client of the server argv[1] that publishes argv[2].
CLIENT = """
import sys
import ivshmem
with ivshmem.connect(sys.argv[1], timeout=30) as client, ivshmem.Directory.open(client) as table:
    table.publish(sys.argv[2])
    print(client.id)
    sys.stdin.readline()
"""


@pytest.fixture
def region(shm_name: str) -> Iterator[Region]:
    with Region.create("4K", name=shm_name) as made:
        yield made
        made.unlink()


Publish = Callable[..., Child]


@pytest.fixture
def publisher(region: Region) -> Iterator[Publish]:
    """Starts processes that will publish a name when they are told to."""
    with ExitStack() as children:

        def start(name: str, peer: int, *, lease: float = 5, go: bool = True) -> Child:
            arguments = (str(region.name), name, str(peer), str(lease))
            child = children.enter_context(python(PUBLISHER, *arguments))
            child.expect("READY")
            if go:
                child.tell()
                child.expect("THERE")
            return child

        yield start


def names(table: Directory) -> list[str]:
    return [entry.name for entry in table.entries()]


def owners(region: Region, table: Directory) -> list[int]:
    return [region.atomic_u64(table.start + 128 * n).load() for n in range(table.slots)]


def test_many_at_once(region: Region, publisher: Publish) -> None:
    """Into a table with room for all but one."""
    with Directory.create(region, 7) as table:
        children = [publisher(f"name {n}", n, lease=0.5, go=False) for n in range(8)]
        for child in children:
            child.tell()
        answers = [child.line() for child in children]
        assert sorted(answers) == ["DirectoryFull", *["THERE"] * 7]
        there = [f"name {n}" for n, answer in enumerate(answers) if answer == "THERE"]
        assert names(table) == there
        for child in children:
            child.tell()
            child.finish()
        assert owners(region, table) == [0] * 7


@pytest.mark.sampled(2)
@pytest.mark.parametrize("ids", ["all the same", "each its own"])
def test_one_name_for_many_at_once(region: Region, publisher: Publish, ids: str) -> None:
    with Directory.create(region) as table:
        children = [
            publisher("one", n if ids == "each its own" else 3, lease=0.5, go=False)
            for n in range(8)
        ]
        for child in children:
            child.tell()
        answers = [child.line() for child in children]
        assert sorted(answers) == [*["NameTaken"] * 7, "THERE"]
        (entry,) = table.entries()
        assert ids == "all the same" or entry.id == answers.index("THERE")


def test_who_was_killed_is_recognised_and_removed(region: Region, publisher: Publish) -> None:
    reader = Directory.create(region, beat=0.01, lease=0.3)
    with Directory.open(region, beat=0.01, lease=0.3) as table:
        table.publish("here", id=1)
        child = publisher("there", 2)
        until(lambda: [entry.alive for entry in reader.entries()] == [True, True])
        child.kill()
        until(lambda: names(reader) == ["here"])
        with pytest.raises(ivshmem.NoSuchName):
            reader.lookup("there")
        until(lambda: sum(owner != 0 for owner in owners(region, table)) == 1)


def test_who_was_stopped_comes_back(region: Region, publisher: Publish) -> None:
    with Directory.create(region, beat=0.01, lease=0.2) as table:
        table.publish("here", id=1)
        child = publisher("there", 2, lease=0.2)
        until(lambda: names(table) == ["here", "there"])
        before = owners(region, table)
        os.kill(child.pid, signal.SIGSTOP)
        until(lambda: sum(owner != 0 for owner in owners(region, table)) == 1)
        os.kill(child.pid, signal.SIGCONT)
        assert table.wait_for("there", 30).id == 2
        assert table.lookup("here").id == 1
        assert owners(region, table) != before
        child.tell()
        child.finish()
        assert names(table) == ["here"]


# For as many seconds as each line says, writes over the region argv[1] from argv[2] on.
SCRIBBLER = """
import os, random, sys, time
import ivshmem
with ivshmem.Region.attach(name=sys.argv[1]) as region, memoryview(region) as memory:
    start = int(sys.argv[2])
    dice = random.Random()
    print("READY")
    for line in sys.stdin:
        end = time.monotonic() + float(line)
        while time.monotonic() < end:
            at = dice.randrange(start, len(memory))
            length = min(dice.choice([1, 2, 8, 128]), len(memory) - at)
            what = dice.randrange(3)
            if what == 0:
                memory[at : at + length] = os.urandom(length)
            elif what == 1:
                memory[at] ^= 1 << dice.randrange(8)
            else:  # the beginning of one slot over another
                at, there = (dice.randrange(start, len(memory)) & ~127 for _ in range(2))
                memory[at : at + length] = memory[there : there + length]
        print("READY")
"""


def test_a_hostile_peer(region: Region, publisher: Publish) -> None:
    """It writes anything anywhere, as fast as it can, and the others go on."""
    with Directory.create(region, 4, beat=0.01, lease=0.1) as table:
        table.publish("here", "a role", range(4), id=1)
        publisher("there", 2, lease=0.1)
        with python(SCRIBBLER, str(region.name), str(table.start)) as hostile:
            hostile.expect("READY")
            for _ in range(4):
                hostile.tell("0.2")
                resting = Background(lambda: hostile.expect("READY"))
                while resting.running:
                    with suppress(ivshmem.NameTaken, ivshmem.DirectoryFull):
                        table.publish("late", id=9).withdraw()
                    with suppress(ivshmem.NoDirectory):
                        Directory.open(region)
                    for _ in range(100):
                        for entry in table.entries():
                            assert (entry.id, entry.name) in PUBLISHED
                resting.result()
                until(lambda: names(table) == ["here", "there"])
                until(lambda: directory_is_there(region))
        assert table.lookup("here") == ivshmem.Entry(1, "here", "a role", range(4), True)


PUBLISHED = ((1, "here"), (2, "there"), (9, "late"))


def directory_is_there(region: Region) -> bool:
    with suppress(ivshmem.NoDirectory):
        return names(Directory.open(region)) == ["here", "there"]
    return False


class TestClients:
    def test_a_host_knows_at_once_who_left(self, server: Callable[..., Server]) -> None:
        """Without waiting for a lease of five seconds."""
        with ivshmem.connect(server().path) as client, Directory.create(client) as table:
            with python(CLIENT, client.path, "there") as child:
                peer = int(child.line())
                assert table.lookup("there").id == peer
                child.kill()
                until(lambda: peer not in client.peers)
                assert table.entries() == []

    def test_a_lost_server_tells_nothing(self, server: Callable[..., Server]) -> None:
        serving = server()
        with ivshmem.connect(serving.path) as a, ivshmem.connect(serving.path) as b:
            with Directory.create(a) as here, Directory.open(b) as there:
                here.publish("a")
                there.publish("b")
                serving.close()
                until(lambda: not a.connected or a.peer_events())
                assert names(here) == ["a", "b"]

    def test_a_restart_has_its_name_at_once(self, server: Callable[..., Server]) -> None:
        serving = server()
        with Directory.create(serving.region) as table:
            for _ in range(2):
                with python(CLIENT, serving.path, "there") as child:
                    assert child.line() == "0"
                    (entry,) = table.entries()
                    assert (entry.id, entry.name) == (0, "there")
                    child.kill()
                    until(lambda: not serving.peers)

    def test_ring_by_name(self, server: Callable[..., Server]) -> None:
        with (
            ivshmem.connect(server(vectors=3).path) as client,
            ivshmem.connect(client.path) as other,
            Directory.create(client) as table,
            Directory.open(other) as theirs,
        ):
            theirs.publish("them", vector_range=range(2, 3))
            entry = table.wait_for("them", timeout=30)
            client.ring(entry.id, entry.vector_range[0])
            assert other.wait(2, timeout=30) == 1


FORKER = """
import os, sys, warnings
import ivshmem
warnings.simplefilter("ignore", DeprecationWarning)  # threads and fork, which is what is tested
region = ivshmem.Region.attach(name=sys.argv[1])
table = ivshmem.Directory.open(region, beat=0.01)
mine = table.publish("forker", id=1)
read, write = os.pipe()
child = os.fork()
if child == 0:
    os.read(read, 1)
    region.close()
    sys.exit(0)  # with all that Python does at its end
os.write(write, b"x")
assert os.waitpid(child, 0)[1] == 0
print("READY", flush=True)
if os.fork() == 0:
    os.close(write)
    print("READY", flush=True)
    os.read(read, 1)
    os._exit(0)
sys.stdin.readline()
table.close()
region.close()
"""


def test_forked_children_neither_withdraw_nor_beat(region: Region) -> None:
    with Directory.create(region, beat=0.01, lease=0.3) as table:
        with python(FORKER, str(region.name)) as child:
            child.expect("READY")
            child.expect("READY")
            assert names(table) == ["forker"]
            until(lambda: table.lookup("forker").alive)
            os.kill(child.pid, signal.SIGSTOP)  # the other child goes on
            until(lambda: names(table) == [])
            os.kill(child.pid, signal.SIGCONT)
            until(lambda: names(table) == ["forker"])


FORGETTER = """
import sys
import ivshmem
region = ivshmem.Region.attach(name=sys.argv[1])
table = ivshmem.Directory.open(region)
table.publish("forgotten", id=1)
"""


def test_the_example_of_the_documentation(server: Callable[..., Server]) -> None:
    page = (Path(__file__).parents[2] / "docs/howto/names.md").read_text()
    (example,) = (e for e in re.findall(r"```python\n(.*?)```", page, re.S) if "wait_for(" in e)
    serving = server()
    example = example.replace("/run/ivshmem.sock", serving.path)
    with ivshmem.connect(serving.path) as client, Directory.create(client) as table:
        table.publish("sensor")
        with python(example) as child:
            assert client.wait(0, timeout=30) == 1
            child.finish()
        assert names(table) == ["sensor"]


def test_an_end_without_close_withdraws_and_says_so(region: Region) -> None:
    with Directory.create(region) as table:
        with python(FORGETTER, str(region.name)) as child:
            errors = child.finish()
        assert "ResourceWarning: unclosed <ivshmem.Directory, 15 slots" in errors
        assert owners(region, table) == [0] * 15
