"""`ivshmem serve --channels`: the area, and the places in it when a server starts on old memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
from support import commands
from support.waiting import PATIENCE, until

import ivshmem
from ivshmem import Directory, Region, RegionError, Server
from ivshmem.native import areas

pytestmark = pytest.mark.usefixtures("commands")

SIZE, AREA = 1 << 20, 65536
LIVE = 7 << 24 | 1 << 20 | 3  # the number of a place: random, live, epoch


class Serving:
    """`ivshmem serve` in a process of its own."""

    def __init__(self, path: str, *options: str) -> None:
        command = [sys.executable, "-m", "ivshmem", "serve", "-S", path, "-l", "1M", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.first = self.process.stdout.readline()
        assert self.first.startswith("serving")

    def child(self) -> int:
        """What serves, if this is a supervisor."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children")
        return int(until(lambda: children.read_text().split())[0])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(PATIENCE)


Serve = Callable[..., Serving]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    with ExitStack() as stack:

        def start(*options: str) -> Serving:
            serving = Serving(str(tmp_path / "socket"), "--channels", "64K", *options)
            stack.enter_context(serving.process)
            stack.callback(serving.process.kill)
            return serving

        yield start


def connected(tmp_path: Path) -> ivshmem.Client:
    return ivshmem.connect(tmp_path / "socket", timeout=PATIENCE)


def area_of(client: ivshmem.Client) -> range:
    area = Directory.open(client).channels
    assert area is not None
    return area


def take_a_place(client: ivshmem.Client) -> None:
    """As a guest has one, of which no process here can say whether it is alive."""
    client.region.atomic_u64(area_of(client).start + 4096).store(LIVE)


def has_its_place(client: ivshmem.Client) -> bool:
    return client.region.atomic_u64(area_of(client).start + 4096).load() == LIVE


def has_changed(serving: Serving, before: int) -> bool:
    return serving.child() != before


def test_a_session(serve: Serve, tmp_path: Path) -> None:
    serving = serve()
    assert serving.process.stdout is not None
    lines: list[str] = []
    while not lines or not lines[-1].startswith("  channels:"):
        lines.append(serving.process.stdout.readline())
    assert lines[-2] == "  names:   63 slots in the last 8K, from 0xfe000 on\n"
    assert lines[-1] == "  channels: 64K from 0xee000 on\n"
    with connected(tmp_path) as client:
        assert area_of(client) == range(0xEE000, 0xFE000)
        assert areas.find_area(client.region) is not None
    shown = commands.run("status", "--json", "-S", str(tmp_path / "socket"))
    assert json.loads(shown.stdout)["regions"][0]["channels"] == AREA
    shown = commands.run("status", "-S", str(tmp_path / "socket"))
    assert ": 1M (anonymous), 64K for channels, 1 vector, on" in shown.stdout


def test_a_new_server_on_old_memory(serve: Serve, tmp_path: Path, shm_name: str) -> None:
    """It frees the places if all former peers are gone, and not while one has the memory."""
    first = serve("--name", shm_name)
    with connected(tmp_path) as survivor:
        take_a_place(survivor)
        first.kill()
        second = serve("--name", shm_name)
        with connected(tmp_path) as other:
            assert has_its_place(other)
        second.kill()
        third = serve("--name", shm_name)
        assert has_its_place(survivor)
        third.kill()
    serve("--name", shm_name)
    with connected(tmp_path) as client:
        assert not has_its_place(client)
        assert area_of(client) == range(0xEE000, 0xFE000)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("names", [[], ["--names", "31"]], ids=["alone", "with names"])
def test_a_successor_changes_nothing(serve: Serve, tmp_path: Path, names: list[str]) -> None:
    """After SIGKILL, and then by a takeover."""
    serving = serve("--supervise", *names)
    with connected(tmp_path) as client:
        take_a_place(client)
        area = area_of(client)
        for _ in range(2):
            before = serving.child()
            os.kill(before, signal.SIGKILL)
            until(partial(has_changed, serving, before))
            with connected(tmp_path) as other:
                assert has_its_place(other)
                assert area_of(other) == area
        taker = serve("--supervise", "--takeover", *names)
        serving.process.wait(PATIENCE)
        with connected(tmp_path) as other:
            assert has_its_place(other)
        shown = commands.run("status", "--json", "-S", str(tmp_path / "socket"))
        assert json.loads(shown.stdout)["regions"][0]["channels"] == AREA
    taker.end()


@pytest.mark.parametrize("raw", [False, True], ids=["image", "raw"])
def test_a_load_frees_all_places(tmp_path: Path, raw: bool) -> None:
    with Region.create("1M") as region, Region.create("1M") as other:
        area = Directory.create(region, channels=AREA).channels
        assert area is not None
        region.atomic_u64(area.start + 4096).store(LIVE)
        region.write(area.stop - 8, b"contents")
        ivshmem.save(region, tmp_path / "image", raw=raw)
        ivshmem.load(other, tmp_path / "image", raw=raw)
        assert Directory.open(other).channels == area
        assert other.atomic_u64(area.start + 4096).load() == 3  # free; the epoch stays
        assert other.read(area.stop - 8, 8) == b"contents"


class TestServer:
    def test_channels(self, socket_path: str) -> None:
        with Server(socket_path, "1M", channels="64K").start() as server:
            assert server.directory is not None
            assert server.directory.slots == 63
            with ivshmem.connect(socket_path, timeout=PATIENCE) as client:
                assert Directory.open(client).channels == server.directory.channels

    def test_with_few_names(self, socket_path: str) -> None:
        with Server(socket_path, "1M", names=7, channels=16384) as server:
            assert server.directory is not None
            assert server.directory.channels == range(SIZE - 1024 * 4 - 16384, SIZE - 4096)

    def test_no_room(self, socket_path: str) -> None:
        with pytest.raises(RegionError, match="has room for 16K to 1008K"):
            Server(socket_path, "1M", channels="1M")
