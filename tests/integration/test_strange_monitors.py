"""Whatever a monitor answers, `migrate` says one line that names it and the command.

The table: each answer that a plan rests on, by each of the wrong values; and what is no answer.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support import commands
from support.fake_qmp import FakeMonitor, FakeQemu, Refusal

from ivshmem import migration
from ivshmem.errors import AlreadyMigrated, QmpError, StepFailed, WrongAnswer
from ivshmem.migration import MigrationRefused, Options, Step, Vm
from ivshmem.migration.monitors import Monitors
from ivshmem.migration.transfer import Mover
from ivshmem.qemu.monitor import Monitor
from ivshmem.system.answers import Answer


class Pair:
    """A source and a destination."""

    def __init__(self, folder: Path, kind: str, undo: ExitStack) -> None:
        self.source = FakeQemu(kind, "running", str(folder / "here"))
        self.destination = FakeQemu(kind, "inmigrate", str(folder / "there"))
        self.paths = [folder / "s.qmp", folder / "d.qmp"]
        self.monitors = [
            undo.enter_context(FakeMonitor(path, answers))
            for path, answers in zip(self.paths, (self.source, self.destination), strict=True)
        ]
        self.vm = Vm("db", str(self.paths[0]), str(self.paths[1]), f"unix:{folder}/uri")

    def prepare(self) -> str:
        """What is said: "" if there is a plan."""
        said = ""
        try:
            asyncio.run(migration.prepare([self.vm]))
        except (QmpError, MigrationRefused) as error:
            said = str(error)
        assert "\n" not in said
        said.encode()
        return said


@pytest.fixture(params=["plain", "doorbell"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pair]:
    with ExitStack() as undo:
        yield Pair(tmp_path, request.param, undo)


def test_as_it_should_be(pair: Pair) -> None:
    assert pair.prepare() == ""


WRONG: tuple[Any, ...] = (
    *(None, True, 0, -1, 5, 1.5, float("nan"), 10**30, 10**400),
    *("", "x", "\ud800", "\x1b[2J\nivshmem: all is well", "x" * 100_000, "\0"),
    *([], {}, [None], [5], [{}], {"a": 1}, {"status": 5}, {"qemu": []}),
    *([{"name": 5, "type": "child<x>"}], [{"name": "m", "type": None}], {"path": 5}),
)


def test_each_answer_by_wrong_values(pair: Pair) -> None:
    """Each by three of them in turn, which takes seconds; the values by type are below."""
    said = 0
    values = itertools.cycle(WRONG)
    for key in pair.source.keys:
        for value in itertools.islice(values, 3):
            pair.source.instead = {key: value}
            text = pair.prepare()
            said += bool(text)
            if " is missing" in text or ", not " in text:
                assert text.startswith("db at the source: ")
                assert any(c in text for c in ("query-", "qom-list", "qom-get")), text
    assert said > 30


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "its answer is not QMP"),
        (b"nonsense", "its answer is not QMP"),
        (b"\xff\xfe", "its answer is not QMP"),
        (b"[]", "its answer is not QMP"),
        (b"5", "its answer is not QMP"),
        (
            b'{"return": ' + b"[" * 100_000 + b"]" * 100_000 + b', "id": ID}',
            "its answer is not QMP",
        ),
        (b'{"return": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b', "id": ID}', "not QMP"),
        (b'{"return": ' + b"9" * 10_000 + b', "id": ID}', ""),
        (b'{"id": ID}', "is this a monitor of QEMU (-qmp)?"),
        (b'{"return": {}, "id": []}', "its answer is not QMP"),
        (b'{"return": {}, "id": 5}', "no answer to"),
        (b'{"return": {}}', "no answer to"),
        (b'{"error": 5, "id": ID}', "is this a monitor of QEMU (-qmp)?"),
        (b'{"error": {}, "id": ID}', "is this a monitor of QEMU (-qmp)?"),
        (b'{"error": {"class": 5, "desc": "x"}, "id": ID}', "is this a monitor of QEMU (-qmp)?"),
        (b'{"error": {"class": "X", "desc": "a\\n\\u001b[2Jb"}, "id": ID}', r"a \x1b[2Jb"),
        (b'{"error": {"class": "X", "desc": "\\ud800"}, "id": ID}', r"\ud800"),
        (b'{"event": 5}\n{"return": {}, "id": ID}', "is missing"),
        (b'{"event": "X", "data": []}\n{"return": {}, "id": ID}', "is missing"),
        (b'{"event": {"a": 1}, "data": 5}\n{"return": {}, "id": ID}', "is missing"),
    ],
)
def test_what_is_no_answer(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, raw: bytes, words: str
) -> None:
    monkeypatch.setattr(Monitor.__init__, "__defaults__", ("", 0.5))
    pair.source.instead = {"query-status": raw}
    text = pair.prepare()
    assert text.startswith("db at the source: ")
    assert "query-status" in text
    assert words in text


@pytest.mark.usefixtures("commands")
def test_what_a_user_sees(pair: Pair) -> None:
    """One line and exit status 1."""
    pair.source.instead = {"query-status": {"status": 5}}
    vm = pair.vm
    named = f"db={vm.source},{vm.destination},{vm.uri}"
    done = commands.run("migrate", "--dry-run", "--vm", named)
    assert done.returncode == 1
    assert done.stderr == (
        "ivshmem: db at the source: query-status: status is 5, not text: is this a monitor of QEMU"
        " (-qmp)?\n"
    )


@pytest.mark.parametrize("value", [*WRONG, 1 << 64, True, "1", 7.0])
def test_values_by_type(value: Any) -> None:
    """Each method gives its type, or WrongAnswer."""
    types = {"text": str, "number": int, "real": float, "flag": bool}
    for method, kind in types.items():
        for answer in (Answer(value, "who"), Answer({"k": value}, "who"), Answer([value], "who")):
            for key in ("", "k"):
                said = "who: "
                try:
                    found = getattr(answer, method)(key)
                except WrongAnswer as error:
                    said = str(error)
                else:
                    assert type(found) is kind
                    json.dumps(found, ensure_ascii=False, allow_nan=False).encode()
                assert said.startswith("who: ")
                assert said.isprintable()
                assert len(said) < 200


# -- statuses of a migration ----------------------------------------------------------------------


def mover(pair: Pair, crew: Monitors, *, running: bool = True) -> Mover:
    step = Step("migrate", "db", running=running, local=True)
    return Mover(crew, pair.vm, step, Options(postcopy=True), lambda _: None)


def until_back(pair: Pair) -> None:
    async def main() -> None:
        async with Monitors([pair.vm]) as crew:
            await mover(pair, crew).take_back()

    asyncio.run(main())


def until_moved(pair: Pair) -> None:
    async def main() -> None:
        async with Monitors([pair.vm]) as crew:
            await mover(pair, crew).move()

    asyncio.run(main())


class Scripted:
    """Says one thing after the other, and the last one again and again."""

    def __init__(self, *values: Any) -> None:
        self._values = list(values)

    def __call__(self) -> Any:
        return self._values.pop(0) if len(self._values) > 1 else self._values[0]


def statuses(*words: str) -> Scripted:
    return Scripted(*({"status": word} for word in words))


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "busy", ["setup", "active", "device", "failing", "postcopy-device", "postcopy-tomorrow", "new"]
)
def test_a_status_that_is_not_known_is_asked_for_again(pair: Pair, busy: str) -> None:
    pair.source.instead = {
        "query-migrate": statuses(busy, busy, busy, "completed"),
        "query-status": {"status": "postmigrate"},
    }
    pair.destination.instead = {
        "query-migrate": statuses("completed"),
        "query-status": {"status": "running"},
    }
    until_moved(pair)
    assert pair.monitors[0].asked.count("query-migrate") >= 4
    assert "migrate" not in pair.monitors[0].asked


@pytest.mark.parametrize("status", ["postcopy-device", "postcopy-tomorrow", "postcopy-active"])
def test_postcopy_before_the_destination_runs(pair: Pair, status: str) -> None:
    """It may fail, and the source go on: nobody says that the guest runs there."""
    pair.source.instead = {
        "query-migrate": statuses(status, status, "failed"),
        "query-status": {"status": "running"},
    }
    until_back(pair)
    assert "migrate_cancel" not in pair.monitors[0].asked


@pytest.mark.parametrize("status", ["postcopy-device", "postcopy-tomorrow", "postcopy-active"])
def test_postcopy_when_the_destination_runs(pair: Pair, status: str) -> None:
    pair.source.instead = {"query-migrate": statuses(status)}
    pair.destination.instead = {
        "query-status": Scripted({"status": "inmigrate"}, {"status": "running"})
    }
    with pytest.raises(AlreadyMigrated, match="runs at the destination") as error:
        until_back(pair)
    assert not error.value.wholly


def test_postcopy_whose_destination_is_gone(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the guest runs is known by the word in some states only."""
    monkeypatch.setattr("ivshmem.migration.transfer._SETTLE", 0.3)
    pair.destination.instead = {"query-status": Refusal()}
    pair.source.instead = {"query-migrate": statuses("postcopy-paused")}
    with pytest.raises(AlreadyMigrated):
        until_back(pair)
    pair.source.instead = {"query-migrate": statuses("postcopy-device")}
    with pytest.raises(StepFailed, match=r"status postcopy-device.*not known where the guest"):
        until_back(pair)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("status", ["setup", "active", "new"])
def test_what_is_under_way_is_cancelled(pair: Pair, status: str) -> None:
    pair.source.instead = {
        "query-migrate": statuses(status, status, "cancelling", "cancelled"),
        "query-status": {"status": "running"},
        "migrate_cancel": {},
    }
    until_back(pair)
    assert pair.monitors[0].asked.count("migrate_cancel") == 2


@pytest.mark.parametrize("status", ["active", "postcopy-active", "postcopy-device", "new"])
def test_a_migration_that_is_under_way_is_no_start(pair: Pair, status: str) -> None:
    pair.source.instead = {"query-migrate": {"status": status}}
    assert f"is under way (its status is {status})" in pair.prepare()


@pytest.mark.parametrize("status", ["none", "completed", "failed", "cancelled"])
def test_one_that_has_ended_is(pair: Pair, status: str) -> None:
    pair.source.instead = {"query-migrate": {"status": status}}
    assert pair.prepare() == ""


@pytest.mark.parametrize(("address", "slot"), [(0, "00.0"), (56, "07.0"), (255, "1f.7")])
def test_where_a_device_is(pair: Pair, address: int, slot: str) -> None:
    """QEMU 11 tells it only as a number."""
    pair.source.instead = pair.destination.instead = {"m0.addr": address}
    plan = asyncio.run(migration.prepare([pair.vm]))
    assert plan.groups[0].master.device.slot == slot
