"""The C header of channels under schedules, in memory that is as weak as it allows.

tests/channel/schedules.h says what that memory is. The parties of a script run the header in one
process, one step at a time. A schedule says who is next, and which store becomes visible. There are
all schedules with one preemption, or two, schedules by chance, and those that the explorer of the
model (tests/model) found.

`NEEDED` removes each barrier, fence, comparison of an epoch and second look of the header in turn:
some schedule must fail. `UNSEEN` says of each of the others why none can.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from model import schedules
from support import header_points

from ivshmem import channel

PROGRAMS = Path(__file__).parents[1] / "channel"

SCRIPTS = {
    "schedules_messages": (
        "block",
        "overwrite",
        "discard",
        "together",
        "join",
        "leave",
        "two-writers",
        "two-readers",
        "a-writer-dies",
        "a-reader-dies",
        "a-discarding-reader-dies",
        "one-blocks-after-it",
        "one-discards-after-it",
        "a-reader-is-silent",
        "the-next-owner",
        "the-next-owner-of-a-dead-one",
        "history",
        "a-removed-writer-lives",
        "a-removed-reader-lives",
        "a-removed-reader-discards",
    ),
    "schedules_queue": (
        "in-order",
        "get",
        "acknowledge",
        "fail-first",
        "return-and-leave",
        "two-writers",
        "one-each",
        "a-reader-dies",
        "a-getting-reader-dies",
        "a-reader-is-silent",
    ),
}
ALL = [(program, script) for program, scripts in SCRIPTS.items() for script in scripts]

# Each point, and the script that fails without it.
NEEDED = {
    "schedules_messages": {
        "reader_tail: load barrier": "together",
        "reader_tail: a tail wakes writers": "block",
        "reader_join: joins are counted": "join",
        "reader_join: a joining reader looks at the heads again": "a-removed-reader-lives",
        "reader_join: a joining reader's margin of one": "a-removed-reader-lives",
        "source_read: epoch": "history",
        "reader_open: announce": "history",
        "look_at: epoch": "a-removed-writer-lives",
        "reader_sleep: a reader looks again before it sleeps": "one-blocks-after-it",
        "reader_close: a reader that leaves wakes writers": "leave",
        "backlog_drop: a former reader's cells come back": "one-blocks-after-it",
        "writer_open: announce": "history",
        "writer_look: epoch 2": "a-discarding-reader-dies",
        "writer_look: epoch 4": "one-discards-after-it",
        "writer_look: epoch 5": "a-removed-reader-lives",
        "writer_ready: joins before each message": "join",
        "backlogs_add: announce": "discard",
        "writer_announce: announce": "overwrite",
        "writer_sleep: a writer looks again before it sleeps": "block",
        "entry_store: store barrier": "overwrite",
        "entry_read: the stamp before the entry": "overwrite",
        "entry_read: the stamp behind the entry": "overwrite",
        "entry_read: the cell's epoch": "a-removed-writer-lives",
        "entry_read: epoch": "a-removed-writer-lives",
        "entry_read: epoch 2": "a-removed-writer-lives",
        "check: load barrier": "overwrite",
        "check: the stamp behind the payload": "overwrite",
        "wake_readers: full fence": "block",
        "wake_writers: full fence": "block",
        "sleep_begin: full fence": "together",
    },
    "schedules_queue": {
        "queue_publish: announce 2": "in-order",
        "queue_claim: another reader has it": "a-reader-is-silent",
        "queue_take: epoch": "in-order",
        "queue_done: a message that is done wakes writers": "in-order",
        "queue_return: a message that is given back wakes a reader": "return-and-leave",
        "queue_pass_on: who was rung passes it on": "one-each",
        "queue_sleep: a reader looks again before it sleeps": "in-order",
        "wake_readers: full fence": "in-order",
        "sleep_begin: full fence": "in-order",
    },
}
ALONE = "what this party stored before needs no order to it; on write-combining memory it hurries"
BESIDE = "an exchange stands before it, which is a fence as well"
LATE = "only a store that is late by the time of a whole join, at one place, would show it"
UNSEEN = {
    "reader_tail: announce": ALONE,
    "reader_beat: announce": ALONE,
    "reader_beat: announce 2": ALONE,
    "sleep_say: announce": ALONE,
    "sleep_end: announce": ALONE,
    "backlogs_begin: announce": "the head of an empty backlog announces nothing",
    "reader_join: full fence": BESIDE,
    "is_there: full fence": BESIDE,
    "remove: full fence": BESIDE,
    "entry_read: load barrier": "the loads before it acquire; it stands for compilers without that",
    "writer_reap: epoch": "the next owner keeps what was published, also if it comes too early",
    "reader_beat: epoch": "what is lost until a removed reader's store is undone, is told",
    "writer_look: epoch": "a backlog that no reader uses, until it has stored what it wants",
    "writer_look: epoch 3": "a wait that no reader needs, until it has stored what it wants",
    "backlogs_add: epoch": LATE,
    "backlogs_add: epoch 2": "one message more that is told to have been missed",
    "backlog_drop: a former reader's entries are void": LATE,
    "backlog_drop: store barrier": LATE,
    "queue_publish: announce": "the announcement of the head orders the same stores",
    "queue_pass_on: full fence": (
        "only a second writer that rings, in that moment, a reader which then leaves would show it"
    ),
    "queue_done: load barrier": "the exchange behind it is a fence as well",
    "queue_take: epoch 2": "a claim says itself of which message it is",
    "queue_ready: an unread message is not passed over": (
        "with one reader the slot before is free first; with several, no order is promised"
    ),
    "claimer: epoch": "only the next reader of a slot, at once after a dead one, would show it",
    "wake_one: epoch": "one ring too many",
    "look_at: epoch 2": "a store that is late by the time of two owners, who have both ended",
}
# Points of kinds whose scripts come with them.
KINDS = re.compile("stream_|caller_waits|accept|value_look|reply|call_look")


class Program(NamedTuple):
    path: Path
    points: dict[str, int]

    def run(self, *arguments: str, given: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.path, *arguments],
            input=given,
            capture_output=True,
            text=True,
            timeout=1800,
            check=False,
        )

    def output(self, *arguments: str, given: str = "") -> str:
        ended = self.run(*arguments, given=given)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout


Build = Callable[[str], Program]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Compiles a program against a copy of the installed header that has its points."""
    if shutil.which("cc") is None:
        pytest.skip("no cc: apt-get install gcc")
    folder = tmp_path_factory.mktemp("schedules")
    points = header_points.write_copy(Path(channel.get_include()), folder)

    def built(name: str) -> Program:
        path = folder / name
        if not path.exists():
            source = str(PROGRAMS / f"{name}.c")
            options = ["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", f"-I{folder}"]
            subprocess.run(["cc", *options, source, "-o", str(path)], check=True)
        return Program(path, points)

    return built


@pytest.mark.parametrize(("program", "script"), ALL)
def test_schedules_by_chance(build: Build, program: str, script: str) -> None:
    assert build(program).output("random", script, "1000") == f"{script}: 1000 schedules\n"


@pytest.mark.nightly
@pytest.mark.parametrize(("program", "script"), ALL)
def test_many_schedules_by_chance(build: Build, program: str, script: str) -> None:
    build(program).output("random", script, "300000", "1000")


@pytest.mark.parametrize(("program", "script"), ALL)
def test_all_schedules_with_one_preemption(build: Build, program: str, script: str) -> None:
    """Each with one store, too, that stays in its buffer as long as it can."""
    said = build(program).output("bounded", script, "1", "held")
    found = re.fullmatch(rf"{script}: (\d+) schedules\n", said)
    assert found is not None, said
    assert int(found[1]) > 100


@pytest.mark.nightly
@pytest.mark.parametrize(("program", "script"), ALL)
def test_all_schedules_with_two_preemptions(build: Build, program: str, script: str) -> None:
    build(program).output("bounded", script, "2", "held")


# What the C follows to the end, at least, of those schedules that its barriers permit.
FOLLOWED = [
    ("schedules_messages", "as-block", 1.0),
    ("schedules_messages", "as-two-writers", 1.0),
    pytest.param("schedules_messages", "as-overwrite", 1.0, marks=pytest.mark.nightly),
    pytest.param("schedules_messages", "as-join", 0.9, marks=pytest.mark.nightly),
]


@pytest.mark.parametrize(("program", "script", "share"), FOLLOWED)
def test_the_c_follows_the_model(build: Build, program: str, script: str, share: float) -> None:
    """Schedules that go along every edge of the model's state graph."""
    given = schedules.lines(schedules.FOLLOWED[program][script])
    said = build(program).output("follow", script, given="\n".join(given) + "\n")
    found = re.match(rf"{script}: (\d+) schedules, (\d+) followed, (\d+) forbidden;", said)
    assert found is not None, said
    count, followed, forbidden = map(int, found.groups())
    assert count == len(given)
    assert followed >= 0.25 * count, said
    assert followed >= share * (count - forbidden), said


@pytest.mark.parametrize("program", [*NEEDED])
def test_each_point_of_the_header_is_needed(build: Build, program: str) -> None:
    built = build(program)
    held = {
        point: script
        for point, script in NEEDED[program].items()
        if built.run("-without", str(built.points[point]), "random", script, "5000").returncode != 1
    }
    assert not held  # these scripts did not fail


def test_every_point_of_the_header_is_listed(build: Build) -> None:
    needed = {point for points in NEEDED.values() for point in points}
    listed = needed | set(UNSEEN)
    points = set(build("schedules_messages").points)
    assert listed <= points
    assert not {point for point in points - listed if KINDS.match(point) is None}
    assert not needed & set(UNSEEN)


def test_loads_must_acquire(build: Build) -> None:
    """IVSHMEM_LOAD may not be weaker than it is."""
    ended = build("schedules_messages").run("-relaxed", "random", "block", "5000")
    assert ended.returncode == 1, ended.stdout
