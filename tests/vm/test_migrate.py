"""`ivshmem migrate` with real QEMUs: two sides as two hosts, each with its own memory or server.

Those marked `qemu` run on Debian's QEMU and on the newest one: one or two for each thing that QEMU
does for us in its own way (migrate by socket, file and several connections, postcopy, cancel,
unplug, and what it says when the other end is gone). The others test our own order and bookkeeping.

A run that is killed or cancelled goes through the same code for both kinds of device, except where
one is unplugged and plugged back. By default the first and the last moment are tried, which are
those, with doorbells, and one kind where both go the same way; `make nightly` tries all.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from support.children import python
from support.mounts import huge_pages, mounted
from support.served import Served
from support.waiting import until

import ivshmem
from ivshmem import channel, migration
from ivshmem.migration import (
    MigrationError,
    MigrationFailed,
    MigrationRefused,
    MigrationUnfinished,
    Options,
    Vm,
)
from ivshmem.migration.state_file import StateFile
from ivshmem.qemu.monitor import Monitor

from .bare import Bare, device

KINDS = ("plain", "doorbell")
# Where a test takes the same way with both.
ONE_BY_DAY = ("plain", pytest.param("doorbell", marks=pytest.mark.nightly))
PATTERN = bytes(range(256)) * 4096
assert len(PATTERN) == 1 << 20


class Group:
    """A master and others at a source, and what waits for them; `where` their memories are.

    Each of `mounts` is where the memory of that side is, if not in `folder`.
    """

    def __init__(
        self,
        folder: Path,
        kind: str,
        undo: ExitStack,
        *,
        size: int = 1 << 20,
        mounts: Mapping[int, Path] = MappingProxyType({}),
    ) -> None:
        self.folder = folder
        self.kind = kind
        self.size = size
        self._undo = undo
        self.servers: list[ivshmem.Server] = []
        self.where: list[str] = []
        self.regions: list[ivshmem.Region] = []
        for number, side in enumerate(("here", "there")):
            path = folder / side
            memory = str(mounts[number] / side) if number in mounts else None
            if kind == "plain":
                path = Path(memory or path)
                region = undo.enter_context(ivshmem.Region.create(size, path=path))
            else:
                served = undo.enter_context(Served(str(path), size=size, file=memory))
                self.servers.append(served.server())
                region = served.server().region
            self.where.append(str(path))
            self.regions.append(region)
        self.state = folder / "state"
        self.source: dict[str, Bare] = {}
        self.destination: dict[str, Bare] = {}

    def bare(self, name: str, *args: str, **how: bool) -> Bare:
        return self._undo.enter_context(Bare(self.folder, name, args, **how))

    def add_master(self, name: str = "a", **differently: str) -> None:
        self.source[name] = self.bare(name, *device(self.kind, self.where[0], size=self.size))
        self.wait_for_master(name, **differently)

    def wait_for_master(self, name: str = "a", options: str = ",master=on") -> None:
        args = device(self.kind, self.where[1], options, size=self.size)
        self.destination[name] = self.bare(f"{name}-there", *args, waits=True)

    def add_other(self, name: str) -> None:
        self.source[name] = self.bare(name)
        self.source[name].plug(self.kind, self.where[0], size=self.size)
        self.destination[name] = self.bare(f"{name}-there", waits=True)

    def vms(self, uris: str = "unix") -> list[Vm]:
        return [
            Vm(
                name,
                str(source.monitor),
                str(self.destination[name].monitor),
                self._uri(uris, name),
            )
            for name, source in self.source.items()
        ]

    def _uri(self, kind: str, name: str) -> str:
        return (
            f"tcp:127.0.0.1:{free_port()}" if kind == "tcp" else f"{kind}:{self.folder}/{name}.uri"
        )

    def plan(self, options: Options | None = None, uris: str = "unix") -> migration.Plan:
        return asyncio.run(migration.prepare(self.vms(uris), options))

    def migrate(self, options: Options | None = None, uris: str = "unix") -> list[str]:
        """The steps that were done."""
        steps: list[str] = []
        asyncio.run(
            migration.migrate(
                self.plan(options, uris),
                state=self.state,
                tell=lambda _, step, back: steps.append(f"{'undo ' if back else ''}{step.kind}"),
            )
        )
        return steps

    def migrate_again(self) -> None:
        """As somebody who does not know that it was begun; the plan is of no matter."""
        with StateFile.load(self.state) as state:
            plan = state.plan
        asyncio.run(migration.migrate(plan, state=self.state))

    def fill(self) -> None:
        with memoryview(self.regions[0]) as memory:
            memory[:] = PATTERN

    def check_there(self) -> None:
        """All are at the destination, and the memory is."""
        assert bytes(self.regions[1]) == PATTERN
        assert [each.status for each in self.source.values()] == ["postmigrate"] * len(self.source)
        for each in self.destination.values():
            assert each.status == "running"
            assert each.devices == ["shm0"]
        if self.servers:
            until(lambda: len(self.servers[1].peers) == len(self.destination))
        assert not self.state.exists()

    def check_here(self, *, waiting: bool = True) -> None:
        """All are at the source, as before."""
        for each in self.source.values():
            assert each.status == "running"
            assert each.devices == ["shm0"]
        if self.servers:
            until(lambda: len(self.servers[0].peers) == len(self.source))
        assert bytes(self.regions[0]) == PATTERN
        assert not self.state.exists()
        if waiting:
            assert {each.status for each in self.destination.values()} == {"inmigrate"}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


MakeGroup = Callable[[str], Group]


@pytest.fixture
def group(directory: Path) -> Iterator[MakeGroup]:
    with ExitStack() as undo:
        yield lambda kind: Group(directory, kind, undo)
    for log in directory.glob("*.log"):
        print(f"--- {log.stem} ---", log.read_text(errors="replace"), sep="\n")


def whole(make: MakeGroup, kind: str) -> Group:
    """A master and two others."""
    group = make(kind)
    group.add_master()
    group.add_other("b")
    group.add_other("c")
    group.fill()
    return group


@pytest.mark.sampled(2)
@pytest.mark.qemu
@pytest.mark.parametrize(
    ("kind", "uris"),
    [
        ("plain", "file"),
        ("doorbell", "unix"),
        *(pytest.param("plain", way, marks=pytest.mark.nightly) for way in ("unix", "tcp")),
        *(pytest.param("doorbell", way, marks=pytest.mark.nightly) for way in ("file", "tcp")),
    ],
)
def test_a_group_moves(group: MakeGroup, kind: str, uris: str) -> None:
    moving = whole(group, kind)
    holds = ["hold"] if kind == "doorbell" else []
    done = moving.migrate(uris=uris)
    assert done == [
        *holds,
        *("unplug", "unplug", "migrate", "migrate", "migrate", "plug", "plug"),
        *(["release"] if holds else []),
    ]
    moving.check_there()
    assert not list(moving.folder.glob("*.uri*"))


@pytest.mark.qemu
@pytest.mark.parametrize("kind", ONE_BY_DAY)
def test_several_connections(group: MakeGroup, kind: str) -> None:
    moving = pair(group, kind)
    moving.migrate(Options(multifd=True))
    moving.check_there()


# The guests' QEMU has no KVM.
POSTCOPY = Options(postcopy=True, force=True)


@pytest.fixture
def on_tmpfs(directory: Path) -> Iterator[MakeGroup]:
    with ExitStack() as undo:
        sides = {side: undo.enter_context(mounted("tmpfs", "size=8M")) for side in (0, 1)}
        yield lambda kind: Group(directory, kind, undo, mounts=sides if kind == "plain" else {})


def postcopied(group: Group, call: Callable[[], object] = lambda: None) -> None:
    """Migrate by postcopy from almost the beginning, and call something in the midst of it."""
    source = group.source["a"]
    source.slow()
    source.qmp("migrate-set-parameters", **{"max-postcopy-bandwidth": 1 << 20})
    states: list[str] = []

    def watch(progress: migration.TransferProgress) -> None:
        if not progress.shared:
            return
        if not states:
            source.qmp("migrate-start-postcopy")
        states.append(source.qmp("query-migrate")["status"])
        if states.count("postcopy-active") == 3 and states[-1] == "postcopy-active":
            call()

    try:
        asyncio.run(migration.migrate(group.plan(POSTCOPY), state=group.state, watch=watch))
    finally:
        assert states.count("postcopy-active") >= 3


@pytest.mark.qemu
@pytest.mark.parametrize("kind", ONE_BY_DAY)
def test_postcopy(on_tmpfs: MakeGroup, kind: str) -> None:
    moving = pair(on_tmpfs, kind)
    postcopied(moving)
    moving.check_there()


def test_postcopy_needs_a_file_system_that_can(directory: Path) -> None:
    with ExitStack() as undo:
        ramfs = undo.enter_context(mounted("ramfs", "size=8M"))
        moving = Group(directory, "plain", undo, mounts={1: ramfs})
        moving.add_master()
        assert "is on ramfs, and with --postcopy its guest would be lost" in refused(
            moving, POSTCOPY
        )


@pytest.mark.nightly
@pytest.mark.qemu
def test_postcopy_is_interrupted(on_tmpfs: MakeGroup) -> None:
    """There is no way back, and the others have to wait for the rest of the memory."""
    moving = pair(on_tmpfs, "plain")

    def interrupt() -> None:
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(
        MigrationUnfinished, match=r"\(postcopy\); it stands at step 2 of 4.*finishes it \("
    ):
        postcopied(moving, interrupt)
    assert moving.source["a"].qmp("query-migrate")["status"] == "postcopy-active"
    with pytest.raises(MigrationUnfinished, match="runs at the destination already"):
        asyncio.run(migration.put_back(moving.state))
    asyncio.run(migration.resume(moving.state))
    moving.check_there()


@pytest.mark.nightly
@pytest.mark.qemu
def test_the_link_is_cut_amid_postcopy(on_tmpfs: MakeGroup) -> None:
    moving = pair(on_tmpfs, "plain")
    uri = next(vm.uri for vm in moving.vms() if vm.name == "a")
    with pytest.raises(
        MigrationUnfinished, match=r"lost during postcopy.*migrate-recover.*step 2 of 4"
    ):
        postcopied(moving, lambda: cut_off(moving.source["a"].process.pid, uri))
    with pytest.raises(MigrationUnfinished, match="lost during postcopy"):
        asyncio.run(migration.resume(moving.state))
    destination = moving.destination["a"]
    until(lambda: destination.qmp("query-migrate")["status"] == "postcopy-paused")
    again = f"unix:{moving.folder}/again"
    destination.qmp("migrate-recover", uri=again)
    source = moving.source["a"]
    source.qmp("migrate", uri=again, resume=True)
    until(lambda: source.qmp("query-migrate")["status"] != "postcopy-paused")
    asyncio.run(migration.resume(moving.state))
    moving.check_there()


@pytest.mark.nightly
@pytest.mark.qemu
def test_there_and_back(group: MakeGroup) -> None:
    """What was plugged back can be unplugged, and its destination be a source."""
    moving = whole(group, "doorbell")
    moving.migrate()
    assert not moving.servers[0].holds_leaves
    for each in moving.source.values():
        each.qmp("quit")
    again = {name: (moving.bare(f"{name}-again", waits=True)) for name in ("b", "c")}
    until(lambda: not moving.servers[0].peers)
    args = device(moving.kind, moving.where[0])
    again["a"] = moving.bare("a-again", *args, waits=True)
    moving.source, moving.destination = moving.destination, {n: again[n] for n in "abc"}
    moving.servers.reverse()
    moving.regions.reverse()
    moving.where.reverse()
    with memoryview(moving.regions[1]) as memory:
        memory[:] = bytes(len(memory))
    moving.migrate()
    moving.check_there()


@pytest.mark.nightly
def test_host_clients(group: MakeGroup) -> None:
    """Told to go at the source, or named in a note; at the destination they attach."""
    moving = pair(group, "doorbell")
    with python(_CLIENT, moving.where[0]) as client:
        client.expect("CONNECTED")
        (note,) = but_for_tcg(moving.plan().notes)
        assert f"pid {client.pid}) of {moving.where[0]} stays at the source" in note
        steps = moving.migrate(Options(evict=True))
        assert steps[:4] == ["hold", "unplug", "evict", "migrate"]
        client.expect("GONE")
        client.finish()
    with ivshmem.connect(moving.where[1], timeout=20) as client_there:
        assert bytes(client_there.region) == PATTERN
    moving.check_there()


def test_channels(group: MakeGroup) -> None:
    """What was committed is read at the destination, where all earlier places count as gone.

    Nobody is rung on their behalf, although another client has the id of one that slept.
    """
    moving = group("doorbell")
    moving.add_master()
    moving.add_other("b")
    ivshmem.Directory.create(moving.regions[0], channels="256K").close()
    with ExitStack() as at_source:
        client = at_source.enter_context(ivshmem.connect(moving.where[0], timeout=20))
        own = at_source.enter_context(channel.open(client, name="left behind"))
        messages = own.create_messages("messages", limit=8, slots=4, writers=1, readers=1)
        queue = own.create_queue("queue", limit=8, slots=4, writers=1, readers=1)
        value = own.create_value("value", limit=8, readers=1)
        ends: list[Any] = [each.writer() for each in (messages, queue, value)]
        reader = messages.reader("block")
        for number in (b"1", b"2"):
            for end in ends:
                end.put(number)
        job = queue.reader().take(0)
        assert job is not None
        while reader.get(0) is not None:
            pass
        reader.fileno()  # it sleeps, as far as the memory tells
        assert moving.migrate().count("free") == 1
        with ExitStack() as there:
            clients = [
                there.enter_context(ivshmem.connect(moving.where[1], timeout=20)) for _ in range(2)
            ]
            (same,) = (each for each in clients if each.id == client.id)
            clients.remove(same)
            channels = there.enter_context(channel.open(clients[0], name="there"))
            assert [place.name for place in channels.places()] == ["there"]
            found: Any = {info.name: channels.open(info.name) for info in channels.list()}
            again = there.enter_context(found["messages"].reader("block", history=4))
            assert [again.get(0) for _ in range(3)] == [b"1", b"2", None]
            writer = there.enter_context(found["messages"].writer())
            writer.put(b"3")
            assert again.get(0) == b"3"
            jobs = there.enter_context(found["queue"].reader())
            with jobs.take(0) as first, jobs.take(0) as second:
                seen = {bytes(each): each.redelivered for each in (first, second)}
            assert seen == {b"1": True, b"2": False}
            assert there.enter_context(found["value"].reader()).get() == b"2"
            there.enter_context(found["value"].writer()).put(b"4")
            assert same.wait(0, timeout=0.2) is None


_CLIENT = """\
import sys
import ivshmem

with ivshmem.connect(sys.argv[1], timeout=20) as client:
    print("CONNECTED")
    for event in client.events(60):
        if isinstance(event, ivshmem.Disconnected):
            print("GONE")
            break
"""


def but_for_tcg(lines: Iterable[str]) -> list[str]:
    """Without what is said of each VM that an old QEMU runs without KVM."""
    return [line for line in lines if "runs it without KVM" not in line]


@pytest.mark.nightly
@pytest.mark.parametrize("huge", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_hugepages_at_one_end(directory: Path, kind: str, huge: int) -> None:
    with ExitStack() as undo:
        if undo.enter_context(huge_pages(2 << 20, 1)) < 1:
            pytest.skip("no huge page is free")
        mount = undo.enter_context(mounted("hugetlbfs", "pagesize=2M"))
        moving = Group(directory, kind, undo, size=2 << 20, mounts={huge: mount})
        moving.add_master()
        moving.add_other("b")
        assert moving.plan().groups[0].master.device.page_size == (4096, 2 << 20)[not huge]
        assert "omit --postcopy" in refused(moving, Options(postcopy=True))
        with memoryview(moving.regions[0]) as memory:
            memory[:] = PATTERN * 2
        moving.migrate()
        assert bytes(moving.regions[1]) == PATTERN * 2


# -- what is refused ------------------------------------------------------------------------------


def refused(group: Group, options: Options | None = None) -> str:
    """All reasons; nothing was touched."""
    with pytest.raises(MigrationRefused) as error:
        group.plan(options)
    assert not group.state.exists()
    return "\n".join(error.value.reasons)


def test_two_masters(group: MakeGroup) -> None:
    """Of a file; a second one of a server QEMU itself does not start."""
    both = group("plain")
    both.add_master()
    both.add_master("b")
    assert "shm0 of a and shm0 of b are masters of the same memory" in refused(both)


@pytest.mark.parametrize("kind", KINDS)
def test_no_master(group: MakeGroup, kind: str) -> None:
    none = group(kind)
    none.add_other("b")
    assert "none of them is the master" in refused(none)


def test_a_server_with_peers(group: MakeGroup) -> None:
    early = pair(group, "doorbell")
    with ivshmem.connect(early.where[1], timeout=20):
        assert "already has peers besides it: 1 (" in refused(early)
    until(lambda: len(early.servers[1].peers) == 1)
    assert early.plan().steps


@pytest.mark.nightly
def test_plugged_back_by_hand_too_early(group: MakeGroup) -> None:
    early = whole(group, "doorbell")
    early.destination["b"].plug("doorbell", early.where[1])
    reasons = refused(early)
    assert "b: its destination has shm0 at port0 00.0, where its source has no master" in reasons
    assert "already has peers besides it: 1 (qemu-system-x86)" in reasons


def test_another_size(group: MakeGroup) -> None:
    other = group("plain")
    other.source["a"] = other.bare("a", *device("plain", other.where[0]))
    with open(other.where[1], "r+b") as file:
        file.truncate(2 << 20)
    args = device("plain", other.where[1], size=2 << 20)
    other.destination["a"] = other.bare("a-there", *args, waits=True)
    assert "its memory has 1M, at the destination 2M" in refused(other)


def test_other_vectors(group: MakeGroup) -> None:
    other = group("doorbell")
    other.source["a"] = other.bare("a", *device("doorbell", other.where[0]))
    args = device("doorbell", other.where[1], vectors=1)
    other.destination["a"] = other.bare("a-there", *args, waits=True)
    assert "it has 2 vectors, at the destination 1" in refused(other)


def test_no_master_at_the_destination(group: MakeGroup) -> None:
    other = group("plain")
    other.add_master(options="")
    assert "at the destination it is not the master" in refused(other)


def test_a_bus_without_plugging(group: MakeGroup) -> None:
    fixed = group("plain")
    fixed.add_master()
    args = [w.replace("bus=port0", "bus=pcie.0") for w in device("plain", fixed.where[0], "")]
    fixed.source["b"] = fixed.bare("b", *args)
    fixed.destination["b"] = fixed.bare("b-there", waits=True)
    assert "its bus pcie.0 cannot do that" in refused(fixed)


@pytest.mark.nightly
def test_a_destination_that_does_not_wait(group: MakeGroup) -> None:
    hasty = whole(group, "plain")
    hasty.destination["b"].kill()
    hasty.destination["b"] = hasty.bare("b-running")
    assert "its destination is not waiting (it is in state running)" in refused(hasty)
    hasty.destination["c"].qmp("migrate-incoming", uri=f"unix:{hasty.folder}/x")
    assert "waits at unix:" in refused(hasty)


def test_a_capability_that_is_of_no_use(group: MakeGroup) -> None:
    other = group("plain")
    other.add_master()
    wanted = [{"capability": "x-ignore-shared", "state": True}]
    other.source["a"].qmp("migrate-set-capabilities", capabilities=wanted)
    assert "its source has the capability x-ignore-shared on" in refused(other)


@pytest.mark.nightly
def test_a_qemu_that_was_told_of_a_leave(group: MakeGroup) -> None:
    told = whole(group, "doorbell")
    ivshmem.connect(told.where[0], timeout=20).close()
    until(lambda: all(report.leaves_told for report in told.servers[0].report()))
    assert "b: its QEMU was sent a leave message" in refused(told)
    assert told.plan(Options(force=True)).steps


@pytest.mark.nightly
def test_a_server_without_a_control_socket(group: MakeGroup) -> None:
    with ExitStack() as undo:
        other = group("doorbell")
        silent = str(other.folder / "silent")
        undo.enter_context(ivshmem.Server(silent, "1M", vectors=2).start())
        other.where[0] = silent
        other.add_master()
        other.add_other("b")
        assert "has no control socket that answers here" in refused(other)
        assert other.plan(Options(force=True)).steps[0].kind == "unplug"
        for each in other.source.values():
            each.kill()


# -- interrupted ----------------------------------------------------------------------------------

_TOOL = """\
import asyncio, json, os, signal, sys
from ivshmem import migration
from ivshmem.qemu.monitor import Monitor

vms, state, command, count = json.loads(sys.argv[1])
execute = Monitor.execute


async def killed(self, name, /, arguments=None, **more):
    global count
    result = await execute(self, name, arguments, **more)
    if name == command:
        count -= 1
        if not count:
            os.kill(os.getpid(), signal.SIGKILL)
    return result


Monitor.execute = killed
plan = asyncio.run(migration.prepare([migration.Vm(*vm) for vm in vms]))
asyncio.run(migration.migrate(plan, state=state))
print("NOT KILLED")
"""


def killed_after(group: Group, command: str, count: int = 1, uris: str = "unix") -> None:
    """Migrate with a tool that is killed after its so-manieth such command."""
    vms = [[vm.name, vm.source, vm.destination, vm.uri] for vm in group.vms(uris)]
    with python(_TOOL, json.dumps([vms, str(group.state), command, count])) as tool:
        assert tool.line() == ""
        assert tool.process.wait(60) == -signal.SIGKILL
    assert group.state.exists()


def pair(make: MakeGroup, kind: str) -> Group:
    """A master and one other."""
    group = make(kind)
    group.add_master()
    group.add_other("b")
    group.fill()
    return group


# Commands that change something.
FILE_MOMENTS = [("migrate", 1), ("migrate-incoming", 1), ("migrate", 2), ("migrate-incoming", 2)]
MOMENTS = {
    "plain": [
        *(("device_del", 1), ("object-del", 1), ("migrate-incoming", 1), ("migrate", 1)),
        *(("migrate-incoming", 2), ("migrate", 2), ("object-add", 1), ("device_add", 1)),
    ],
    "doorbell": [
        *(("device_del", 1), ("chardev-remove", 1), ("migrate-incoming", 1), ("migrate", 1)),
        *(("migrate-incoming", 2), ("migrate", 2), ("chardev-add", 1), ("device_add", 1)),
    ],
}
BEFORE_IT_ARRIVES = slice(4)


def each_moment(which: slice = slice(None), *, first: bool = True, last: bool = True) -> list[Any]:
    """The first and the last one with doorbells, or one of these, and all by night."""
    found = []
    for kind, moments in MOMENTS.items():
        chosen = moments[which]
        by_day = [*chosen[:1] * first, *chosen[-1:] * last] if kind == "doorbell" else []
        for moment in chosen:
            marks: list[pytest.MarkDecorator] = []
            if moment not in by_day:
                marks.append(pytest.mark.nightly)
            if kind == "doorbell" and moment == ("migrate", 1):
                marks.append(pytest.mark.qemu)
            found.append(pytest.param(kind, *moment, marks=marks))
    return found


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("kind", "command", "count"), each_moment())
def test_killed_and_resumed(group: MakeGroup, kind: str, command: str, count: int) -> None:
    moving = pair(group, kind)
    killed_after(moving, command, count)
    with pytest.raises(MigrationError, match="--resume"):
        moving.migrate_again()
    steps: list[int] = []
    asyncio.run(migration.resume(moving.state, tell=lambda number, *_: steps.append(number)))
    moving.check_there()
    assert len(steps) == len(set(steps))


@pytest.mark.nightly
@pytest.mark.parametrize(("kind", "command", "count"), each_moment(BEFORE_IT_ARRIVES, first=False))
def test_killed_and_put_back(group: MakeGroup, kind: str, command: str, count: int) -> None:
    moving = pair(group, kind)
    moving.source["a"].slow()
    killed_after(moving, command, count)
    asyncio.run(migration.put_back(moving.state))
    moving.check_here(waiting=False)


@pytest.mark.nightly
@pytest.mark.parametrize(("command", "count"), FILE_MOMENTS)
def test_killed_and_resumed_through_a_file(group: MakeGroup, command: str, count: int) -> None:
    moving = pair(group, "doorbell")
    killed_after(moving, command, count, uris="file")
    asyncio.run(migration.resume(moving.state))
    moving.check_there()


@pytest.mark.nightly
@pytest.mark.qemu
def test_killed_while_the_destination_waits_for_a_file(group: MakeGroup) -> None:
    """QEMU was told to read it, and says that it does nothing until the first bytes come."""
    moving = pair(group, "doorbell")
    killed_after(moving, "migrate", uris="file")
    file = moving.folder / "a.uri"
    until(file.exists)
    reader = f"exec:sleep 2; cat {file} && rm -f {file}"
    moving.destination["a"].qmp("migrate-incoming", uri=reader)
    asyncio.run(migration.resume(moving.state))
    moving.check_there()


@pytest.mark.nightly
def test_killed_and_put_back_from_a_file(group: MakeGroup) -> None:
    """All was written, and nobody has read it yet."""
    moving = pair(group, "doorbell")
    killed_after(moving, "migrate", uris="file")
    until(lambda: moving.source["a"].status == "postmigrate")
    asyncio.run(migration.put_back(moving.state))
    moving.check_here()


@pytest.mark.nightly
def test_no_way_back_once_one_has_arrived(group: MakeGroup) -> None:
    moving = pair(group, "doorbell")
    killed_after(moving, "migrate-incoming", 2)
    with pytest.raises(
        MigrationUnfinished, match=r"cannot be undone.*step 4 of 6, migrate b: --resume finishes"
    ):
        asyncio.run(migration.put_back(moving.state))
    asyncio.run(migration.resume(moving.state))
    moving.check_there()


class Once:
    """Calls something at a migration's first progress."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call: Callable[[], object] | None = call

    def __call__(self, progress: migration.TransferProgress) -> None:
        assert progress.total > progress.shared
        if self._call is not None:
            call, self._call = self._call, None
            call()


@pytest.mark.nightly
@pytest.mark.qemu
@pytest.mark.parametrize("kind", ONE_BY_DAY)
def test_a_destination_is_killed(group: MakeGroup, kind: str) -> None:
    """The group runs at the source as before."""
    moving = whole(group, kind)
    moving.source["a"].slow()
    watch = Once(moving.destination["a"].kill)
    with pytest.raises(
        MigrationFailed, match=r"a: its migration failed: .*the group runs at the source"
    ):
        asyncio.run(migration.migrate(moving.plan(), state=moving.state, watch=watch))
    moving.check_here(waiting=False)
    # Once more, to another one.
    moving.source["a"].qmp("migrate-set-parameters", **{"max-bandwidth": 0})
    if kind == "doorbell":
        until(lambda: not moving.servers[1].peers)
    with memoryview(moving.regions[1]) as memory:
        memory[:] = bytes(len(memory))
    moving.destination["a"].close()
    moving.destination["a"].monitor.unlink(missing_ok=True)
    moving.wait_for_master()
    moving.migrate()
    moving.check_there()


@pytest.mark.nightly
def test_a_destination_is_killed_after_the_master_has_arrived(group: MakeGroup) -> None:
    moving = pair(group, "doorbell")
    moving.source["b"].slow()

    def kill(progress: migration.TransferProgress) -> None:
        if not progress.shared:
            moving.destination["b"].kill()

    with pytest.raises(MigrationUnfinished, match="step 4 of 6, migrate b: --resume") as stands:
        asyncio.run(migration.migrate(moving.plan(), state=moving.state, watch=kill))
    assert stands.value.vm == "b"
    assert moving.source["b"].status == "running"
    moving.source["b"].qmp("migrate-set-parameters", **{"max-bandwidth": 0})
    moving.destination["b"].monitor.unlink()
    moving.destination["b"] = moving.bare("b-there", waits=True)
    asyncio.run(migration.resume(moving.state))
    moving.check_there()


def test_the_source_is_killed(group: MakeGroup) -> None:
    """The others are put back, and the error says of whom that is not so."""
    moving = pair(group, "doorbell")
    moving.source["a"].slow()
    watch = Once(moving.source["a"].kill)
    with pytest.raises(MigrationUnfinished, match=r"a at the source"):
        asyncio.run(migration.migrate(moving.plan(), state=moving.state, watch=watch))
    assert moving.source["b"].devices == ["shm0"]
    assert moving.source["b"].status == "running"


@pytest.mark.nightly
@pytest.mark.qemu
@pytest.mark.parametrize("uris", ["unix", pytest.param("file", marks=pytest.mark.nightly)])
def test_the_destination_refuses(group: MakeGroup, uris: str) -> None:
    """It lacks a device, which the plan does not look for."""
    moving = group("doorbell")
    args = device("doorbell", moving.where[0])
    moving.source["a"] = moving.bare("a", *args, "-device", "virtio-balloon-pci")
    moving.wait_for_master()
    moving.add_other("b")
    moving.fill()
    with pytest.raises(MigrationFailed, match=r"a: its .*; the group runs at the source as before"):
        moving.migrate(uris=uris)
    moving.check_here(waiting=False)


@pytest.mark.nightly
def test_the_destination_is_full(directory: Path) -> None:
    """Its memory is a file in which no room is reserved, unlike ours, and its QEMU dies of that."""
    with ExitStack() as undo:
        full = undo.enter_context(mounted("tmpfs", "size=2M"))
        moving = Group(directory, "plain", undo, mounts={1: full})
        os.truncate(moving.where[1], 0)
        os.truncate(moving.where[1], moving.size)
        (full / "others").write_bytes(bytes(3 << 19))
        moving.add_master()
        moving.add_other("b")
        moving.fill()
        with pytest.raises(
            MigrationFailed, match=r"a: its migration failed: .*runs at the source as before"
        ):
            moving.migrate()
        moving.check_here(waiting=False)
        assert moving.destination["a"].process.wait(20) == -signal.SIGBUS


@pytest.mark.nightly
def test_no_room_for_the_file(directory: Path) -> None:
    with ExitStack() as undo:
        full = undo.enter_context(mounted("tmpfs", "size=512k"))
        moving = Group(directory, "plain", undo)
        moving.add_master()
        moving.add_other("b")
        moving.fill()
        vms = [replace(vm, uri=f"file:{full}/{vm.name}") for vm in moving.vms()]
        plan = asyncio.run(migration.prepare(vms))
        with pytest.raises(MigrationFailed, match="a: its migration failed"):
            asyncio.run(migration.migrate(plan, state=moving.state))
        moving.check_here()


@pytest.mark.parametrize("uris", ["unix", pytest.param("tcp", marks=pytest.mark.nightly)])
def test_the_link_is_cut(group: MakeGroup, uris: str) -> None:
    moving = pair(group, "plain")
    moving.source["a"].slow()
    plan = moving.plan(uris=uris)
    cut = Once(lambda: cut_off(moving.source["a"].process.pid, plan.vm("a").uri))
    with pytest.raises(
        MigrationFailed, match=r"a: its migration failed: .*runs at the source as before"
    ):
        asyncio.run(migration.migrate(plan, state=moving.state, watch=cut))
    moving.check_here(waiting=False)


def cut_off(pid: int, uri: str) -> None:
    """Shut down a process's socket that is connected to there."""
    libc = ctypes.CDLL(None, use_errno=True)
    pidfd = os.pidfd_open(pid)
    cut = 0
    try:
        for each in Path(f"/proc/{pid}/fd").iterdir():
            mine = libc.syscall(_PIDFD_GETFD, pidfd, int(each.name), 0)
            assert mine >= 0, os.strerror(ctypes.get_errno())
            if not stat.S_ISSOCK(os.fstat(mine).st_mode):
                os.close(mine)
                continue
            with socket.socket(fileno=mine) as link, contextlib.suppress(OSError):
                peer = link.getpeername()
                if uri == (f"unix:{peer}" if isinstance(peer, str) else "tcp:{}:{}".format(*peer)):
                    link.shutdown(socket.SHUT_RDWR)
                    cut += 1
    finally:
        os.close(pidfd)
    assert cut == 1


_PIDFD_GETFD = 438  # the number of the system call


@pytest.mark.nightly
def test_a_file_that_cannot_be_written(group: MakeGroup) -> None:
    moving = pair(group, "plain")
    (moving.folder / "a.uri.part").mkdir()
    with pytest.raises(MigrationFailed, match="a: its migration failed"):
        moving.migrate(uris="file")
    moving.check_here()


async def cancelled_after(group: Group, command: str, count: int) -> None:
    """As Ctrl-C in the moment in which a command is done."""
    task = asyncio.current_task()
    assert task is not None
    execute = Monitor.execute

    async def cancelled(self: Monitor, name: str, /, *args: Any, **more: Any) -> Any:
        nonlocal count
        result = await execute(self, name, *args, **more)
        if name == command:
            count -= 1
            if not count:
                task.cancel()
        return result

    plan = await migration.prepare(group.vms())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Monitor, "execute", cancelled)
        await migration.migrate(plan, state=group.state)


@pytest.mark.parametrize(("kind", "command", "count"), each_moment(last=False))
def test_cancelled(group: MakeGroup, kind: str, command: str, count: int) -> None:
    moving = pair(group, kind)
    if count == 1 and command not in ("object-add", "chardev-add", "device_add"):
        moving.source["a"].slow()
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(cancelled_after(moving, command, count))
        moving.check_here(waiting=False)
        return
    # Of the last step it comes too late.
    with contextlib.suppress(MigrationUnfinished):
        asyncio.run(cancelled_after(moving, command, count))
    assert moving.state.exists() or command == "device_add"
    if moving.state.exists():
        asyncio.run(migration.resume(moving.state))
    moving.check_there()


@pytest.mark.nightly
def test_a_destination_that_hangs(group: MakeGroup) -> None:
    moving = pair(group, "doorbell")
    moving.source["a"].slow()

    async def cancelled() -> None:
        task = asyncio.current_task()
        assert task is not None

        def hang() -> None:
            moving.destination["a"].process.send_signal(signal.SIGSTOP)
            task.cancel()

        plan = await migration.prepare(moving.vms())
        await migration.migrate(plan, state=moving.state, watch=Once(hang))

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(cancelled())
    moving.check_here(waiting=False)


@pytest.mark.qemu
@pytest.mark.parametrize("kind", ONE_BY_DAY)
def test_a_guest_that_does_not_let_go(group: MakeGroup, kind: str) -> None:
    stubborn = pair(group, kind)
    args = device(kind, stubborn.where[0], "")
    stubborn.source["c"] = stubborn.bare("c", *args, obliging=False)
    stubborn.destination["c"] = stubborn.bare("c-there", waits=True, obliging=False)
    with pytest.raises(
        MigrationUnfinished, match="c at the source: the guest did not release shm0"
    ):
        stubborn.migrate(Options(unplug_seconds=1.5))
    assert [each.devices for each in stubborn.source.values()] == [["shm0"]] * 3
    assert stubborn.source["b"].status == "running"
    # Its request stands, and a reset carries it out.
    stubborn.source["c"].qmp("system_reset")
    until(lambda: stubborn.source["c"].devices == [])
    asyncio.run(migration.put_back(stubborn.state))
    stubborn.check_here()


# -- the command ----------------------------------------------------------------------------------


def command(group: Group, *options: str) -> list[str]:
    vms = [f"--vm={vm.name}={vm.source},{vm.destination},{vm.uri}" for vm in group.vms()]
    state = f"--state={group.state}"
    return [sys.executable, "-m", "ivshmem", "migrate", *vms, state, *options]


def run(group: Group, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(group, *options), capture_output=True, text=True, timeout=120)


@pytest.mark.qemu
def test_the_command(group: MakeGroup) -> None:
    moving = pair(group, "doorbell")
    planned = run(moving, "--dry-run")
    assert planned.returncode == 0, planned.stderr
    assert but_for_tcg(planned.stdout.splitlines()) == [
        f"memory of 1M ({moving.where[0]}):",
        "  a: shm0 (doorbell, 2 vectors) at port0 00.0: master, migrates with the memory",
        "  b: shm0 (doorbell, 2 vectors) at port0 00.0: is unplugged, and plugged in again at the"
        " destination",
        "steps:",
        f"  1. hold leaves back from the QEMUs of {moving.where[0]}.control",
        "  2. unplug shm0 from b",
        "  3. migrate a, with the shared memory",
        "  4. migrate b",
        f"  5. plug shm0 into b at the destination, with {moving.where[1]}",
        f"  6. send leaves again to QEMUs that join at {moving.where[0]}.control",
    ]
    moving.check_here()
    done = run(moving)
    assert (done.returncode, done.stdout) == (0, "")
    assert len(but_for_tcg(done.stderr.splitlines())) == 6
    moving.check_there()
    again = run(moving)
    assert again.returncode == 1
    lines = again.stderr.splitlines()
    assert len(lines) > 2
    assert all(line.startswith("ivshmem: ") for line in lines)


def test_a_file_of_vms(group: MakeGroup) -> None:
    moving = pair(group, "plain")
    file = moving.folder / "group.toml"
    file.write_text(
        "".join(
            f'[vm.{vm.name}]\nsource="{vm.source}"\ndestination="{vm.destination}"\nuri="{vm.uri}"\n'
            for vm in moving.vms()
        )
    )
    line = [sys.executable, "-m", "ivshmem", "migrate", "--group", str(file), "-q"]
    done = subprocess.run([*line, "--state", str(moving.state)], capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (note,) = but_for_tcg(done.stderr.decode().splitlines())
    assert "whether host processes use" in note
    moving.check_there()


def test_nobody_there(group: MakeGroup) -> None:
    moving = pair(group, "plain")
    moving.source["b"].kill()
    gone = run(moving)
    assert gone.returncode == 1
    assert gone.stderr.count("\n") == 1
    assert "is the QEMU of b at the source running?" in gone.stderr


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.nightly)]
)
def test_ended_by_a_signal(group: MakeGroup, number: signal.Signals) -> None:
    moving = pair(group, "doorbell")
    moving.source["a"].slow()
    with subprocess.Popen(command(moving), stderr=subprocess.PIPE, text=True) as tool:
        assert tool.stderr is not None
        while "migrate a" not in tool.stderr.readline():
            pass
        tool.send_signal(number)
        said = tool.stderr.read()
    assert tool.returncode == 130, said
    assert said.endswith("ivshmem: interrupted; the group runs at the source as before\n")
    moving.check_here(waiting=False)


@pytest.mark.nightly
def test_cancelled_while_connecting(group: MakeGroup) -> None:
    """Whenever that is: the task does end, and the monitor is free for the next one."""
    monitor = str(group("plain").bare("a").monitor)

    async def stays() -> None:
        async with Monitor(monitor, seconds=5) as connected:
            await connected.execute("query-status")
            await asyncio.sleep(60)

    async def cancelled_at_each_moment() -> None:
        for ticks in range(60):
            task = asyncio.ensure_future(stays())
            for _ in range(ticks):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait({task}, timeout=20)
            assert task.cancelled(), ticks
            async with Monitor(monitor, seconds=5) as connected:
                await connected.execute("query-status")

    asyncio.run(cancelled_at_each_moment())
