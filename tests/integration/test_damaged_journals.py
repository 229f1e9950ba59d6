"""A journal that is damaged, or whose writer lied: one line, and no peer is harmed."""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.children import children_of
from support.manager import Manager
from support.waiting import until

from ivshmem import connect
from ivshmem.config import RegionConfig, ServiceConfig
from ivshmem.errors import JournalError, Misshapen
from ivshmem.lasting.journal import Journal
from ivshmem.service import snapshots
from ivshmem.service.service import Service

RECORDS = 0x10000 + (1 << 28)  # where the first ones are
WRONG: list[Any] = [None, True, -1, 1 << 70, 0.5, float("nan"), "x", [], [[]], {}, {"a": 1}]


@pytest.fixture
def told(socket_path: str) -> tuple[Any, list[Any]]:
    """What a service with two peers says: its snapshot, and the same as records."""
    journal = Journal()
    found = _told_by(journal, socket_path)
    gc.collect()  # the service holds the journal's memory
    journal.close()
    return found


def _told_by(journal: Journal, path: str) -> tuple[Any, list[Any]]:
    config = ServiceConfig({"r": RegionConfig(path, size="64K", vectors=2)})
    with Service(config, journal=journal) as service, contextlib.ExitStack() as peers:
        service.open()
        for _ in range(2):
            peers.enter_context(_connected(service, path))
        state, records = journal.read()
        assert state is None
        return json.loads(json.dumps(service.snapshot())), records


def _connected(service: Service, path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    server = service.regions["r"].server
    before = len(server.peers)
    while len(server.peers) == before:
        service.step(0)
    service.step(0)
    return sock


def _places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield place
    if not isinstance(value, dict | list):
        return
    for key, each in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _places(each, (*place, key))


def _mutants(value: Any) -> Iterator[tuple[str, Any]]:
    for place in _places(value):
        for wrong in WRONG if place else ():
            mutant = copy.deepcopy(value)
            home = mutant
            for key in place[:-1]:
                home = home[key]
            home[place[-1]] = wrong
            yield f"{place} = {wrong!r}", mutant
            if wrong is None:
                del home[place[-1]]
                yield f"no {place}", mutant


def _resumed(write: Callable[[Journal], None]) -> str:
    """What is said of a journal that nobody can continue by; "": a service would."""
    with contextlib.closing(Journal()) as journal:
        return _said_of(journal, write)


def _said_of(journal: Journal, write: Callable[[Journal], None]) -> str:
    journal._end.store(1 << 32)  # as a new one
    write(journal)
    try:
        snapshots.rehearse(snapshots.read(journal))
    except JournalError as error:
        said = str(error)
    else:
        return ""
    assert "\n" not in said
    assert len(said) < 300
    return said


def _apply(write: Callable[[Journal, Any], None], value: Any, journal: Journal) -> None:
    write(journal, value)


def _append(journal: Journal, records: list[Any]) -> None:
    for record in records:
        journal.append(record)


def test_true_ones(told: tuple[Any, list[Any]]) -> None:
    state, records = told
    assert not _resumed(lambda journal: journal.rewrite(state))
    assert not _resumed(lambda journal: _append(journal, records))


def test_every_value_of_a_state(told: tuple[Any, list[Any]]) -> None:
    """It is refused, or a service continues by it: nothing else is ever raised."""
    assert _refused(told[0], Journal.rewrite) > 500


def test_every_value_of_the_records(told: tuple[Any, list[Any]]) -> None:
    assert _refused(told[1], _append) > 300


def _refused(value: Any, write: Callable[[Journal, Any], None]) -> int:
    """How many of the mutants of this value are refused."""
    found = 0
    with contextlib.closing(Journal()) as journal:
        for what, mutant in _mutants(value):
            try:
                found += bool(_said_of(journal, partial(_apply, write, mutant)))
            except Exception as error:
                pytest.fail(f"{what}: {error!r}")
    return found


@pytest.mark.parametrize(
    ("record", "seen"),
    [
        pytest.param([1, "join", 1, 5, [6, 7], "now", False], 'is "now"', id="a moment"),
        pytest.param([1, "join", 1, 5, 6, 1.0, False], "expected an array", id="eventfds"),
        pytest.param([1, "join", 1, -1, [], 1.0, False], "allowed are 0 to", id="a descriptor"),
        pytest.param([1, "leave", 77], "makes no sense", id="nobody leaves"),
        pytest.param([1, "sent", 77, 1], "makes no sense", id="sent to nobody"),
        pytest.param([1, "mute", 1, "long"], "expected a number", id="muted for how long"),
        pytest.param([1, "sing", 1], 'of an unknown kind, "sing"', id="another kind"),
        pytest.param([0, "sing", 1], 'of an unknown kind, "sing"', id="another of the service"),
        pytest.param([0, "region", 2, "b"], "expected 10", id="half a region"),
        pytest.param([0, "config", 1, {"vectors": 2}], "has no socket", id="half a configuration"),
        pytest.param([0, "service", {"log_format": "x"}], 'is "x"', id="half a service"),
        pytest.param([], "has 0 elements", id="nothing"),
        pytest.param({"a": 1}, "expected an array", id="an object"),
        pytest.param("join", "expected an array", id="a word"),
    ],
)
def test_a_record(told: tuple[Any, list[Any]], record: Any, seen: str) -> None:
    said = _resumed(lambda journal: _append(journal, [*told[1], record]))
    assert said.startswith("the journal is damaged: ")
    assert seen in said


def _make_deep(journal: Journal) -> None:
    journal._memory.write(RECORDS, b"[" * 200000)
    journal._end.store(1 << 32 | 200000)


@pytest.mark.parametrize(
    ("damage", "seen"),
    [
        (lambda j: j._end.store(j._end.load() - 3), "not JSON"),
        (lambda j: j._end.store(j._end.load() | 0xFFFFFFFF), "bytes too far"),
        (lambda j: j._end.store(9 << 32), "has no state"),
        (lambda j: j._memory.write(RECORDS, b"\xff\xfe{"), "not JSON"),
        (_make_deep, "not JSON"),
    ],
    ids=["cut", "an end beyond", "no state", "bytes", "deep"],
)
def test_bytes(told: tuple[Any, list[Any]], damage: Callable[[Journal], object], seen: str) -> None:
    def write(journal: Journal) -> None:
        _append(journal, told[1])
        damage(journal)

    assert seen in _resumed(write)


def test_nothing_is_opened_by_a_damaged_one(told: tuple[Any, list[Any]], directory: Path) -> None:
    """The second region is wrong, and the first one's descriptors stay what they were."""
    state = copy.deepcopy(told[0])
    record, server = copy.deepcopy(state["regions"][0])
    record[:2] = [2, "other"]
    state["regions"].append([record, {**server, "roster": {}}])
    with contextlib.closing(Journal()) as journal, Service(ServiceConfig()) as service:
        journal.rewrite(state)
        with pytest.raises(JournalError, match="makes no sense"):
            service.resume(journal, os.dup)
        assert not service.regions


def test_an_offer_with_every_setting_wrong(told: tuple[Any, list[Any]]) -> None:
    """No setting of a region passes unchecked, also one that is added later."""
    wrong: dict[str, Any] = dict.fromkeys(RegionConfig._fields, 0.5)
    for name, value in wrong.items():
        state = copy.deepcopy(told[0])
        state["regions"][0][0][2][name] = value
        with pytest.raises(Misshapen, match=name):
            snapshots.check(state)


# -- real processes --------------------------------------------------------------------------------

_DAMAGE = """
import sys
from ivshmem.lasting.journal import Journal
j = Journal(int(sys.argv[1]))
j.append([1, "leave", 77])
"""


def _journal_of(pid: int) -> str:
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            if "memfd:ivshmem-journal" in os.readlink(f"/proc/{pid}/fd/{fd}"):
                return f"/proc/{pid}/fd/{fd}"
    raise AssertionError("no journal")


def _damage(pid: int) -> None:
    fd = os.open(_journal_of(pid), os.O_RDWR)
    try:
        subprocess.run(
            [sys.executable, "-c", _DAMAGE, str(fd)], pass_fds=[fd], check=True, timeout=60
        )
    finally:
        os.close(fd)


def test_a_manager_gives_back_a_damaged_one(socket_path: str, directory: Path) -> None:
    """The new process says so in one line, and serves newcomers."""
    command = [sys.executable, "-m", "ivshmem", "serve", "-S", socket_path, "-l", "64K"]
    command += ["--no-control", "--fd-store"]
    with contextlib.closing(Manager(command, directory)) as manager:
        manager.start()
        with connect(socket_path, timeout=10) as peer:
            _damage(manager.pid)
            manager.kill()
            manager.start()
            told = manager.log.read_text()
            assert "Traceback" not in told
            (line,) = [each for each in told.splitlines() if "damaged" in each]
            assert "all peers of the last process are cut off: the journal is damaged" in line
            peer.region.write(0, b"same")
            with connect(socket_path, timeout=10) as fresh:
                assert fresh.region.read(0, 4) == bytes(4)
        manager.close_stored()
    os.unlink(socket_path)  # the manager's service can be started again


def test_a_supervisor_with_a_damaged_one(socket_path: str) -> None:
    """Nobody can serve, so peers keep what they have: their memory, doorbells and connections."""
    command = [sys.executable, "-m", "ivshmem", "serve", "-S", socket_path, "-l", "64K"]
    command += ["--no-control", "--supervise", "-q"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as parent:
        assert parent.stderr is not None
        try:
            with (
                connect(socket_path, timeout=10, wait_for_server=True) as one,
                connect(socket_path, timeout=10) as two,
            ):
                until(lambda: two.id in one.peers)
                (child,) = children_of(parent.pid)
                _damage(child)
                os.kill(child, signal.SIGKILL)
                line = ""
                while "cannot continue" not in line:
                    line = parent.stderr.readline()
                    assert line
                    assert "Traceback" not in line
                assert "the journal is damaged" in line
                one.ring(two.id)
                assert two.wait(timeout=10)
                assert parent.poll() is None
            parent.send_signal(signal.SIGTERM)
            assert parent.wait(30)
        finally:
            parent.kill()
    with contextlib.suppress(FileNotFoundError):
        os.unlink(socket_path)
