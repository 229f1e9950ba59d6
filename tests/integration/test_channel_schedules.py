"""The C header of channels under schedules, in memory that is as weak as it allows.

tests/channel/schedules.h says what that memory is. The parties of a script run the header in one
process, one step at a time. A schedule says who is next, and which store becomes visible. There are
all schedules with one preemption, or two, schedules by chance, and those that the explorer of the
model (tests/model) found.

`NEEDED` removes each barrier, fence, comparison of an epoch and second look of some files of the
header (`FILES` in support/header_points.py) in turn: some schedule must fail. `UNSEEN` says of each
of the others why none can. places.h and records.h are not among these files: the model explores
their protocol (model/places.py, model/creation.py), and test_channel_header.py kills and stops
processes at each step of their C.
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
from support import header_points, shared

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
        "a-removed-reader-beats",
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
        "the-next-owner",
        "the-claim-of-a-dead-one",
    ),
    "schedules_value": (
        "latest",
        "two-readers",
        "the-next-owner",
        "the-writer-dies",
        "the-next-owner-dies",
        "a-removed-writer-lives",
    ),
    "schedules_calls": (
        "one-by-one",
        "two-at-once",
        "two-callers",
        "one-each",
        "given-up",
        "a-server-dies",
        "the-next-server",
        "a-caller-dies",
        "a-server-is-silent",
        "a-removed-server-lives",
    ),
    "schedules_bytes": (
        "one-way",
        "both-ways",
        "used-again",
        "two-at-once",
        "two-listeners",
        "one-each",
        "aborted",
        "refused",
        "a-caller-dies",
        "an-acceptor-dies",
        "a-listener-leaves",
        "nobody-accepts",
        "the-bytes-of-a-dead-caller",
        "a-removed-acceptor-lives",
        "a-removed-caller-lives",
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
        "claim_ends: the owner is looked at again": "the-claim-of-a-dead-one",
        "queue_publish: a new owner's claims are others": "the-claim-of-a-dead-one",
        "queue_claim: claims are exchanged": "a-reader-dies",
        "queue_claim: another reader has it": "a-reader-is-silent",
        "queue_take: epoch": "in-order",
        "queue_done: a message that is done wakes writers": "in-order",
        "queue_return: a message that is given back wakes a reader": "return-and-leave",
        "queue_pass_on: who was rung passes it on": "one-each",
        "queue_sleep: a reader looks again before it sleeps": "in-order",
        "wake_readers: full fence": "in-order",
        "sleep_begin: full fence": "in-order",
    },
    "schedules_value": {
        "value_look: a value stays while its slot changes hands": "the-next-owner-dies",
        "value_look: epoch": "a-removed-writer-lives",
        "writer_adopt_one: a value's entry stays as it is": "the-next-owner-dies",
        "writer_adopt: what is kept keeps its cell": "the-next-owner",
        "writer_adopt: what is not kept is void": "the-next-owner",
        "writer_open: announce": "the-next-owner",
        "writer_announce: announce": "latest",
        "entry_store: store barrier": "two-readers",
        "entry_read: the stamp before the entry": "two-readers",
        "entry_read: the stamp behind the entry": "latest",
        "entry_read: epoch": "a-removed-writer-lives",
        "entry_read: epoch 2": "a-removed-writer-lives",
        "check: load barrier": "the-next-owner",
        "check: the stamp behind the payload": "latest",
        "wake_readers: full fence": "latest",
        "sleep_begin: full fence": "latest",
    },
    "schedules_calls": {
        "claimer: epoch": "the-next-server",
        "claim_ends: the owner is looked at again": "a-caller-dies",
        "queue_claim: claims are exchanged": "a-server-dies",
        "queue_may: no second server gets a call": "a-server-is-silent",
        "queue_take: epoch": "the-next-server",
        "queue_sleep: a reader looks again before it sleeps": "one-by-one",
        "queue_pass_on: who was rung passes it on": "one-each",
        "reply: a reply is exchanged": "two-at-once",
        "reply: a reply wakes its caller": "one-by-one",
        "call_look: a server that is gone is told": "a-server-dies",
        "call_look: epoch": "a-removed-server-lives",
        "call_end: a call under way is not over": "given-up",
        "call_end: a call is taken back by exchange": "given-up",
        "wake_readers: full fence": "one-by-one",
        "sleep_begin: full fence": "one-by-one",
    },
    "schedules_bytes": {
        "stream_store: load barrier": "one-way",
        "stream_store: announce": "one-way",
        "stream_wake_for: full fence": "both-ways",
        "connection_is_free: epoch": "used-again",
        "stream_take: epoch": "the-bytes-of-a-dead-caller",
        "caller_waits: epoch": "used-again",
        "caller_waits: epoch 2": "a-caller-dies",
        "accept: epoch": "one-way",
        "accept: epoch 3": "the-bytes-of-a-dead-caller",
        "stream_look: epoch": "one-way",
        "stream_look: a caller of another epoch has closed": "the-bytes-of-a-dead-caller",
        "stream_look: whether an end is gone comes first": "both-ways",
        "stream_look: epoch 2": "a-caller-dies",
        "stream_look: epoch 3": "used-again",
        "stream_free: epoch": "a-removed-acceptor-lives",
        "stream_close: epoch": "used-again",
        "listener_pass_on: who was rung passes it on": "one-each",
        "wake_readers: full fence": "one-way",
        "sleep_begin: full fence": "two-listeners",
    },
}
ALONE = "what this party stored before needs no order to it; on write-combining memory it hurries"
ACQUIRED = "the loads before it acquire; it stands for compilers without that"
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
    "reply: full fence": BESIDE,
    "entry_read: load barrier": ACQUIRED,
    "call_look: load barrier": ACQUIRED,
    "stream_look: load barrier": ACQUIRED,
    "stream_store: announce 2": ALONE,
    "reply: announce": "nobody looks at it before the exchange behind it, which is a fence as well",
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
    "listener_pass_on: full fence": (
        "only a caller that rings, in that moment, a listener which then leaves would show it"
    ),
    "queue_done: load barrier": "the exchange behind it is a fence as well",
    "queue_take: epoch 2": "a claim says itself of which message it is",
    "queue_ready: an unread message is not passed over": (
        "with one reader the slot before is free first; with several, no order is promised"
    ),
    "accept: epoch 2": "a caller that has stored nothing yet does so, or is gone: that is told",
    "stream_silence: epoch": "it is only shown to people",
    "wake_one: epoch": "one ring too many",
    "look_at: epoch 2": "a store that is late by the time of two owners, who have both ended",
}


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


Build = Callable[..., Program]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Compiles a program against a copy of the installed header that has its points."""
    if shutil.which("cc") is None:
        pytest.skip("no cc: apt-get install gcc")
    folder = tmp_path_factory.mktemp("schedules")
    programs = shared.folder(tmp_path_factory, "schedules")
    points = header_points.write_copy(Path(channel.get_include()), folder)

    def built(name: str, optimized: str = "-O0") -> Program:  # which by day costs less in all
        # The macro of copies, which may leave by setcontext, confuses that one warning.
        warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-maybe-uninitialized"]
        options = ["-std=gnu11", optimized, *warnings, f"-I{folder}"]
        command = ["cc", *options, str(PROGRAMS / f"{name}.c"), "-o"]
        path = shared.made_once(
            programs / f"{name}{optimized}",
            lambda made: subprocess.run([*command, made], check=True),
        )
        return Program(path, points)

    return built


@pytest.mark.sampled(8)
@pytest.mark.parametrize(("program", "script"), ALL)
def test_schedules_by_chance(build: Build, program: str, script: str) -> None:
    assert build(program).output("random", script, "500") == f"{script}: 500 schedules\n"


@pytest.mark.nightly
@pytest.mark.parametrize(("program", "script"), ALL)
def test_many_schedules_by_chance(build: Build, program: str, script: str) -> None:
    build(program, "-O1").output("random", script, "300000", "1000")


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("program", "script"), ALL)
def test_all_schedules_with_one_preemption(build: Build, program: str, script: str) -> None:
    said = build(program).output("bounded", script, "1")
    found = re.fullmatch(rf"{script}: (\d+) schedules\n", said)
    assert found is not None, said
    assert int(found[1]) > 10


@pytest.mark.sampled(32)
@pytest.mark.parametrize(("program", "script"), ALL)
def test_all_schedules_in_which_one_store_is_late(build: Build, program: str, script: str) -> None:
    """With one preemption, each with one store that stays in its buffer as long as it can."""
    build(program).output("bounded", script, "1", "held")


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("program", "script"), ALL)
def test_all_schedules_with_two_preemptions(build: Build, program: str, script: str) -> None:
    build(program, "-O1").output("bounded", script, "2", "held")


# Here a step of the model is a step of the C, and the C follows each schedule to its end.
EACH = [
    ("schedules_messages", "as-block"),  # by chance; by night along every edge
    ("schedules_messages", "as-two-writers"),  # 3549
    ("schedules_messages", "as-discard"),  # 1895
    ("schedules_messages", "as-a-writer-dies"),  # by chance; by night along every edge
    ("schedules_messages", "as-a-reader-dies"),  # by chance; by night along every edge
    ("schedules_queue", "as-get"),  # by chance; by night along every edge
    ("schedules_queue", "as-take"),  # by chance; by night along every edge
    ("schedules_queue", "as-a-writer-dies"),  # 3698: before and after each step of the writer
    ("schedules_queue", "as-a-reader-comes-back"),  # by chance: another one took it for silent
    ("schedules_value", "as-latest"),  # 1521
    ("schedules_value", "as-the-writer-dies"),  # by chance; by night along every edge
    ("schedules_value", "as-the-next-owner"),  # 4446: of a writer that may have died
    ("schedules_value", "as-the-writer-comes-back"),  # 309: it keeps its slot
    ("schedules_calls", "as-call"),  # 4722 schedules along every edge, with CPython 3.11
    ("schedules_calls", "as-two-servers"),  # by chance; by night along every edge
    ("schedules_calls", "as-a-server-dies"),  # by chance: the graph has millions of edges
    ("schedules_calls", "as-a-server-comes-back"),  # by chance
    ("schedules_calls", "as-a-caller-dies"),  # by chance; by night along every edge
    ("schedules_bytes", "as-one"),  # 3277
    ("schedules_bytes", "as-one-way"),  # by chance; by night along every edge
    ("schedules_bytes", "as-refused"),  # 1819
    ("schedules_bytes", "as-a-caller-dies"),  # by chance; by night along every edge
    ("schedules_bytes", "as-used-again"),  # by chance: the graph has millions of states
]
# Points without which these schedules show a fault, or that the C could do more than the model.
SEEN = {
    ("schedules_messages", "as-block"): (
        "reader_tail: a tail wakes writers",
        "reader_sleep: a reader looks again before it sleeps",
        "writer_announce: announce",
        "writer_sleep: a writer looks again before it sleeps",
        "entry_store: store barrier",
        "wake_readers: full fence",
        "wake_writers: full fence",
        "sleep_say: announce",
        "sleep_begin: full fence",
    ),
    ("schedules_messages", "as-discard"): (
        "reader_tail: announce",
        "backlogs_add: announce",
        "entry_store: store barrier",
        "wake_readers: full fence",
        "sleep_begin: full fence",
    ),
    ("schedules_messages", "as-a-writer-dies"): (
        "reader_sleep: a reader looks again before it sleeps",
        "writer_announce: announce",
        "wake_readers: full fence",
        "wake_writers: full fence",
    ),
    ("schedules_messages", "as-a-reader-dies"): (
        "reader_tail: a tail wakes writers",
        "writer_announce: announce",
        "writer_sleep: a writer looks again before it sleeps",
        "entry_store: store barrier",
        "sleep_begin: full fence",
    ),
    ("schedules_queue", "as-a-writer-dies"): (
        "queue_publish: announce",
        "queue_publish: announce 2",
        "wake_readers: full fence",
        "sleep_begin: full fence",
    ),
    ("schedules_queue", "as-a-reader-comes-back"): (
        "queue_claim: claims are exchanged",
        "queue_publish: announce 2",
        "queue_sleep: a reader looks again before it sleeps",
        "sleep_begin: full fence",
    ),
    ("schedules_value", "as-the-writer-dies"): (
        "writer_announce: announce",
        "entry_store: store barrier",
        "entry_read: the stamp before the entry",
        "entry_read: the stamp behind the entry",
        "check: the stamp behind the payload",
        "wake_readers: full fence",
        "sleep_begin: full fence",
    ),
    ("schedules_value", "as-the-next-owner"): (
        "value_look: a value stays while its slot changes hands",
        "writer_adopt_one: a value's entry stays as it is",
        "writer_adopt: what is kept keeps its cell",
        "writer_adopt: what is not kept is void",
        "writer_open: announce",
        "entry_read: the stamp before the entry",
    ),
    ("schedules_calls", "as-two-servers"): (
        "entry_store: store barrier",
        "queue_publish: announce",
        "queue_publish: announce 2",
        "queue_claim: claims are exchanged",
        "wake_readers: full fence",
        "sleep_begin: full fence",
    ),
    ("schedules_calls", "as-a-server-dies"): (
        "queue_claim: claims are exchanged",
        "reply: a reply is exchanged",
        "reply: a reply wakes its caller",
        "call_look: a server that is gone is told",
        "queue_sleep: a reader looks again before it sleeps",
        "wake_readers: full fence",
        "sleep_begin: full fence",
    ),
    ("schedules_calls", "as-a-server-comes-back"): (
        "queue_may: no second server gets a call",
        "queue_claim: claims are exchanged",
        "call_look: a server that is gone is told",
    ),
    ("schedules_calls", "as-a-caller-dies"): (
        "queue_publish: announce",
        "queue_publish: announce 2",
        "entry_store: store barrier",
        "call_end: a call is taken back by exchange",
        "wake_readers: full fence",
        "sleep_begin: full fence",
    ),
    ("schedules_bytes", "as-one-way"): (
        "stream_store: load barrier",
        "stream_store: announce",
        "stream_wake_for: full fence",
        "accept: epoch",
        "sleep_begin: full fence",
        "wake_readers: full fence",
    ),
    ("schedules_bytes", "as-a-caller-dies"): (
        "stream_wake_for: full fence",
        "stream_store: announce",
        "accept: epoch",
        "stream_look: whether an end is gone comes first",
    ),
    ("schedules_bytes", "as-used-again"): (
        "accept: epoch 2",
        "stream_look: epoch",
        "stream_look: epoch 3",
    ),
}
BY_NIGHT = [
    ("schedules_messages", "as-block", 0),
    ("schedules_messages", "as-a-writer-dies", 0),
    ("schedules_messages", "as-a-reader-dies", 0),
    ("schedules_queue", "as-get", 0),
    ("schedules_queue", "as-take", 0),
    ("schedules_queue", "as-a-reader-comes-back", 20000),
    ("schedules_value", "as-the-writer-dies", 0),
    ("schedules_calls", "as-two-servers", 0),
    ("schedules_calls", "as-a-server-dies", 10000),
    ("schedules_calls", "as-a-server-comes-back", 10000),
    ("schedules_calls", "as-a-caller-dies", 0),
    ("schedules_bytes", "as-one-way", 0),
    ("schedules_bytes", "as-a-caller-dies", 0),
    ("schedules_bytes", "as-used-again", 10000),
]
# Here the C has looks that the model has not, or has them in another order. What it follows to the
# end, at least, of those schedules that its barriers permit; and what may be loose, at most.
FOLLOWED = [
    ("schedules_queue", "as-fail", 1.0, 0.0),  # the C looks for what was given back once more
    # The C loses several messages at once, and looks at the head less often.
    pytest.param("schedules_messages", "as-overwrite", 1.0, 0.0, marks=pytest.mark.nightly),
    # A reader joins in another order. With its payload in the buffer, the C's writer looks at that
    # reader first, and the model's waits at its fence already.
    pytest.param("schedules_messages", "as-join", 0.9, 0.05, marks=pytest.mark.nightly),
]


class Followed(NamedTuple):
    given: int
    followed: int
    forbidden: int  # a barrier of the C orders what the model leaves free
    loose: int  # a barrier or a fence of the model has no counterpart in the C
    said: str

    def is_exact(self) -> bool:
        """Whether each step of the model was done, and none besides was possible.

        Nor may a process ask whether another is gone, or silent, where the model's does not.
        """
        return (
            self.followed == self.given
            and self.forbidden == self.loose == 0
            and re.search(r" -[1-9]| number -", self.said) is None
        )


def follow(program: Program, script: str, given: list[str]) -> Followed:
    said = program.output("follow", script, given="\n".join(given) + "\n")
    followed = told(script, said)
    assert followed.given == len(given)
    return followed


def told(script: str, said: str) -> Followed:
    counts = r"(\d+) schedules, (\d+) followed, (\d+) forbidden, (\d+) loose;"
    found = re.match(f"{script}: {counts}", said)
    assert found is not None, said
    given, followed, forbidden, loose = map(int, found.groups())
    return Followed(given, followed, forbidden, loose, said)


@pytest.mark.sampled(6)
@pytest.mark.parametrize(("program", "script"), EACH)
def test_the_c_follows_each_schedule(build: Build, program: str, script: str) -> None:
    followed = follow(build(program), script, schedules.lines(program, script))
    assert followed.given >= 50
    assert followed.is_exact(), followed.said


@pytest.mark.sampled(9)
@pytest.mark.parametrize(("program", "script"), SEEN)
def test_what_follows_shows_each_point_that_is_missing(
    build: Build, program: str, script: str
) -> None:
    built = build(program)
    given = "\n".join(schedules.lines(program, script)) + "\n"

    def is_seen(point: str) -> bool:
        ended = built.run("-without", str(built.points[point]), "follow", script, given=given)
        return ended.returncode != 0 or not told(script, ended.stdout).is_exact()

    unseen = [point for point in SEEN[program, script] if not is_seen(point)]
    assert not unseen


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("program", "script", "walks"), BY_NIGHT)
def test_the_c_follows_each_of_many_schedules(
    build: Build, program: str, script: str, walks: int
) -> None:
    built = build(program, "-O1")
    followed = follow(built, script, schedules.lines(program, script, walks=walks))
    assert followed.given >= 3000
    assert followed.is_exact(), followed.said


@pytest.mark.parametrize(("program", "script", "share", "loose"), FOLLOWED)
def test_the_c_follows_the_model(
    build: Build, program: str, script: str, share: float, loose: float
) -> None:
    """Schedules that go along every edge of the model's state graph."""
    followed = follow(build(program), script, schedules.lines(program, script))
    assert followed.followed >= 0.25 * followed.given, followed.said
    assert followed.followed >= share * (followed.given - followed.forbidden), followed.said
    assert followed.loose <= loose * followed.given, followed.said


@pytest.mark.sampled(2)
@pytest.mark.parametrize("program", [*NEEDED])
def test_each_point_of_the_header_is_needed(build: Build, program: str) -> None:
    built = build(program)

    def fails(point: str, script: str) -> bool:
        number = str(built.points[point])
        return built.run("-without", number, "random", script, "30000").returncode == 1

    held = {point: script for point, script in NEEDED[program].items() if not fails(point, script)}
    assert not held  # these scripts did not fail


def test_every_point_of_the_header_is_listed(build: Build) -> None:
    needed = {point for points in NEEDED.values() for point in points}
    listed = needed | set(UNSEEN)
    points = set(build("schedules_messages").points)
    assert listed == points
    assert not needed & set(UNSEEN)


def test_loads_must_acquire(build: Build) -> None:
    """IVSHMEM_LOAD may not be weaker than it is."""
    ended = build("schedules_messages").run("-relaxed", "random", "block", "5000")
    assert ended.returncode == 1, ended.stdout
