"""What a QEMU may say next, in a table: each row is a way in which monitors answer while one moves.

A row says what source and destination answer, and what must come of it: "moved"; or the error's
words. In no row may it be claimed that the guest runs where it does not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support.fake_qmp import FakeMonitor, FakeQemu, Refusal

from ivshmem import migration
from ivshmem.errors import IvshmemError
from ivshmem.migration import Options, Vm
from ivshmem.migration.model import Step
from ivshmem.migration.monitors import Monitors
from ivshmem.migration.transfer import Mover


class Says:
    """Answers one after the other; the last one stands."""

    def __init__(self, *answers: Any) -> None:
        self._answers = list(answers)

    def __call__(self) -> Any:
        return self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]


def at(*words: str, **more: Any) -> Says:
    """Statuses of a migration; "" says nothing."""
    return Says(*({"status": word, **more} if word else {} for word in words))


def in_state(*words: str) -> Says:
    return Says(*({"status": word} for word in words))


COMMANDS = (
    *("migrate", "migrate-incoming", "migrate-set-capabilities", "migrate_cancel"),
    *("migrate-start-postcopy", "cont"),
)


class Two:
    def __init__(self, folder: Path, undo: ExitStack) -> None:
        self.qemus = [FakeQemu("plain", "running", "/m1"), FakeQemu("plain", "inmigrate", "/m2")]
        self.paths = [folder / "source", folder / "destination"]
        self.monitors = [
            undo.enter_context(FakeMonitor(path, qemu))
            for path, qemu in zip(self.paths, self.qemus, strict=True)
        ]
        self.vm = Vm("db", str(self.paths[0]), str(self.paths[1]), f"unix:{folder}/uri")
        self.options = Options(postcopy=True)
        for qemu in self.qemus:
            for command in COMMANDS:
                qemu.instead[command] = {}

    def answer(self, source: dict[str, Any], destination: dict[str, Any]) -> None:
        self.qemus[0].instead.update(source)
        self.qemus[1].instead.update(destination)

    def asked(self, command: str) -> int:
        """How often the source was asked for that."""
        return self.monitors[0].asked.count(command)

    def outcome(self, call: Callable[[Mover], Any], *, running: bool = True) -> str:
        async def main() -> None:
            async with Monitors([self.vm]) as crew:
                step = Step("migrate", "db", running=running, local=True)
                await call(Mover(crew, self.vm, step, self.options, lambda _: None))

        try:
            asyncio.run(main())
        except (IvshmemError, OSError) as error:
            said = str(error)
        else:
            said = ""
        assert "\n" not in said
        return said


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Two]:
    monkeypatch.setattr("ivshmem.migration.transfer._SETTLE", 0.3)
    monkeypatch.setattr("ivshmem.migration.transfer._LOOK", 0.01)
    with ExitStack() as undo:
        yield Two(tmp_path, undo)


THERE = {"query-migrate": at("completed"), "query-status": in_state("running")}
FRESH = {"query-migrate": at("", "completed"), "query-status": in_state("inmigrate", "running")}
LEFT = in_state("running", "postmigrate")

MOVES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    # Begun by us.
    "at once": ({"query-migrate": at("", "completed"), "query-status": LEFT}, FRESH, ""),
    "none means nothing yet": (
        {"query-migrate": at("none", "active", "completed"), "query-status": LEFT},
        FRESH,
        "",
    ),
    "after one that failed": (
        {"query-migrate": at("failed", "setup", "completed"), "query-status": LEFT},
        FRESH,
        "",
    ),
    "after one that was cancelled": (
        {"query-migrate": at("cancelled", "setup", "completed"), "query-status": LEFT},
        FRESH,
        "",
    ),
    "by words of tomorrow": (
        {"query-migrate": at("", "warming-up", "cooling", "completed"), "query-status": LEFT},
        FRESH,
        "",
    ),
    "words of tomorrow at the destination": (
        {"query-migrate": at("", "completed"), "query-status": LEFT},
        {
            "query-migrate": at("", "postcopy-landing", "landing", "completed"),
            "query-status": in_state("inmigrate", "running"),
        },
        "",
    ),
    "through all of postcopy": (
        {
            "query-migrate": at(
                *("", "setup", "active", "postcopy-device", "postcopy-active", "completed")
            ),
            "query-status": LEFT,
        },
        FRESH,
        "",
    ),
    "a run state of tomorrow at the destination": (
        {"query-migrate": at("", "completed"), "query-status": LEFT},
        {
            "query-migrate": at("", "completed"),
            "query-status": in_state("inmigrate", "inmigrate", "resuming"),
        },
        "",
    ),
    "a guest that was paused": (
        {"query-migrate": at("", "completed"), "query-status": in_state("paused", "postmigrate")},
        {
            "query-migrate": at("", "completed"),
            "query-status": in_state("inmigrate", "paused"),
        },
        "",
    ),
    # Gone on with.
    "one that is under way": (
        {"query-migrate": at("active", "active", "completed"), "query-status": LEFT},
        THERE,
        "",
    ),
    "one that is recovered": (
        {
            "query-migrate": at("postcopy-recover-setup", "postcopy-recover", "completed"),
            "query-status": in_state("postmigrate"),
        },
        THERE,
        "",
    ),
    "one that is just ending": (
        {
            "query-migrate": at("completed"),
            "query-status": in_state("finish-migrate", "finish-migrate", "postmigrate"),
        },
        THERE,
        "",
    ),
    # What fails.
    "it fails": (
        {"query-migrate": at("", "active", "failed"), "query-status": in_state("running")},
        FRESH,
        "its migration failed: see the log of the destination's QEMU",
    ),
    "it fails and says why": (
        {
            "query-migrate": Says({}, {"status": "failed", "error-desc": "no\x1b[2J\nroom"}),
            "query-status": in_state("running"),
        },
        FRESH,
        r"its migration failed: no\x1b[2J\nroom",
    ),
    "it fails in the moment of postcopy": (
        {
            "query-migrate": at("", "postcopy-device", "failed"),
            "query-status": in_state("running"),
        },
        FRESH,
        "its migration failed: ",
    ),
    "somebody cancels it": (
        {"query-migrate": at("", "active", "cancelling", "cancelled")},
        FRESH,
        "its migration cancelled: ",
    ),
    "it forgets that it ever migrated": (
        {"query-migrate": at("", "active", "")},
        FRESH,
        "its migration never began: ",
    ),
    "the link is lost": (
        {"query-migrate": at("", "active", "postcopy-paused")},
        FRESH,
        "the connection was lost during postcopy",
    ),
    "the destination runs": (
        {"query-migrate": at("")},
        {"query-status": in_state("running")},
        "its destination is not waiting (it is in state running): start it with -incoming defer",
    ),
    "the destination is left from postcopy that failed": (
        {"query-migrate": at("failed")},
        {"query-migrate": at("postcopy-device"), "query-status": in_state("inmigrate")},
        "its destination is left over from a failed migration (status postcopy-device): end that"
        " QEMU, and start it again with -incoming defer",
    ),
    "the destination is left from one of tomorrow": (
        {"query-migrate": at("")},
        {"query-migrate": at("crash-landing"), "query-status": in_state("inmigrate")},
        "(status crash-landing): end that QEMU, and start it again with -incoming defer",
    ),
    "the destination never goes on": (
        {"query-migrate": at("", "completed"), "query-status": LEFT},
        {"query-migrate": at("", "completed"), "query-status": in_state("inmigrate")},
        "its destination has all the memory, and the guest does not start there",
    ),
    "the source never lets go": (
        {
            "query-migrate": at("", "completed"),
            "query-status": in_state("running", "finish-migrate"),
        },
        FRESH,
        "does not start there",
    ),
    "QEMU refuses to migrate": (
        {"query-migrate": at(""), "migrate": Refusal("GenericError", "not now")},
        FRESH,
        "migrate: not now",
    ),
    "QEMU lacks a capability": (
        {"query-migrate": at(""), "migrate-set-capabilities": Refusal("GenericError", "no rdma")},
        FRESH,
        "migrate-set-capabilities: no rdma",
    ),
    "the status is a number": (
        {"query-migrate": Says({}, {"status": 7})},
        FRESH,
        "query-migrate: status is 7, not text",
    ),
    "the statistics are a text": (
        {"query-migrate": Says({}, {"status": "active", "ram": "much"})},
        FRESH,
        "ram is 'much', not an object",
    ),
    "the statistics are negative": (
        {"query-migrate": Says({}, {"status": "active", "ram": {"remaining": -1}})},
        FRESH,
        "ram.remaining is -1, not a whole number",
    ),
    "the run state is missing": ({"query-status": {}}, FRESH, "status is missing"),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("case", MOVES)
def test_while_it_moves(two: Two, case: str) -> None:
    source, destination, words = MOVES[case]
    two.answer(fresh(source), fresh(destination))
    said = two.outcome(lambda mover: mover.move())
    assert words in said, said
    assert bool(said) == bool(words), said


def fresh(answers: dict[str, Any]) -> dict[str, Any]:
    """The table's answers are used up by each test."""
    return {
        key: Says(*value._answers) if isinstance(value, Says) else value
        for key, value in answers.items()
    }


BACK: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "nothing had begun": ({"query-migrate": at(""), "query-status": in_state("running")}, {}, ""),
    "it takes a moment": (
        {
            "query-migrate": at("active", "cancelling", "cancelling", "cancelled"),
            "query-status": in_state("finish-migrate", "running"),
        },
        {},
        "",
    ),
    "a status of tomorrow": (
        {
            "query-migrate": at("gliding", "gliding", "cancelled"),
            "query-status": in_state("running"),
        },
        {},
        "",
    ),
    "cancelling is refused, since it has just ended": (
        {
            "query-migrate": at("active", "failed"),
            "query-status": in_state("running"),
            "migrate_cancel": Refusal(),
        },
        {},
        "",
    ),
    "it cannot be cancelled at all": (
        {"query-migrate": at("active"), "migrate_cancel": Refusal()},
        {},
        "QEMU does not end its migration (status active): examine that QEMU",
    ),
    "it has arrived": (
        {"query-migrate": at("completed"), "query-status": in_state("postmigrate")},
        {},
        "it has arrived at the destination",
    ),
    "postcopy that fails in time": (
        {
            "query-migrate": at("postcopy-device", "postcopy-device", "failed"),
            "query-status": in_state("finish-migrate", "running"),
        },
        {"query-status": in_state("inmigrate")},
        "",
    ),
    "postcopy that does not fail": (
        {"query-migrate": at("postcopy-device")},
        {"query-status": in_state("inmigrate", "running")},
        "it runs at the destination already (postcopy)",
    ),
    "postcopy that stays so": (
        {"query-migrate": at("postcopy-device")},
        {"query-status": in_state("inmigrate")},
        "it is not known where the guest will run: examine that QEMU",
    ),
    "a run state of tomorrow": (
        {"query-migrate": at("cancelled"), "query-status": in_state("levitating")},
        {},
        "unexpected state levitating at the source: examine that QEMU",
    ),
}


@pytest.mark.parametrize("case", BACK)
def test_on_the_way_back(two: Two, case: str) -> None:
    source, destination, words = BACK[case]
    two.answer(fresh(source), fresh(destination))
    said = two.outcome(lambda mover: mover.take_back())
    assert words in said, said
    assert bool(said) == bool(words), said


def ram(passes: int, remaining: int, mbps: float) -> dict[str, Any]:
    return {
        "status": "active",
        "ram": {"dirty-sync-count": passes, "remaining": remaining, "mbps": mbps},
    }


@pytest.mark.parametrize(
    ("looks", "times"),
    [
        ([ram(1, 1 << 30, 8.0)], 0),
        ([ram(2, 1 << 30, 8.0)], 1),
        ([ram(2, 1 << 30, 8.0)] * 3, 1),
        ([ram(2, 1 << 10, 8.0)], 0),
        ([ram(2, 1_000_000, 8.0), ram(3, 1_000_001, 8.0)], 1),
        ([ram(5, 1 << 30, 0.0)], 0),
        ([ram(6, 1 << 10, 8.0)], 1),
        ([ram(6, 0, 0.0)], 1),
    ],
)
def test_when_postcopy_begins(two: Two, looks: list[Any], times: int) -> None:
    """Not when the passes are about to end by themselves: QEMU 11.1 may fail then."""
    two.answer(
        {"query-migrate": Says({}, *looks, {"status": "completed"}), "query-status": fresh_left()},
        fresh(FRESH),
    )
    assert two.outcome(lambda mover: mover.move()) == ""
    assert two.asked("migrate-start-postcopy") == times


def fresh_left() -> Says:
    return in_state("running", "postmigrate")


@pytest.mark.parametrize("status", ["postcopy-device", "failed", "crash-landing", "completed"])
def test_a_plan_sees_a_destination_that_is_left_over(two: Two, status: str) -> None:
    two.answer({}, {"query-migrate": {"status": status}})
    with pytest.raises(
        migration.MigrationRefused, match=rf"\(status {status}\): end that QEMU, and start"
    ):
        asyncio.run(migration.prepare([two.vm]))
