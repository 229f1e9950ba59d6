"""How far a migration is, in a file: whole, locked, and not taken for another one."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivshmem.config import ConfigError
from ivshmem.migration import MigrationError, Options, Plan, Step, Vm, default_path, group_file
from ivshmem.migration.state_file import StateFile, Word

VMS = (Vm("a", "/a", "/a2", "unix:/u"), Vm("b", "/b", "/b2", "tcp:h:1"))
STEPS = (
    Step("hold", control="/c", region="default"),
    Step("migrate", "a", size=4096),
    Step("migrate", "b"),
)
PLAN = Plan(VMS, Options(), (), STEPS, ("a note",))


def test_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "state"
    with StateFile.create(path, PLAN) as state:
        assert state.next == 0
        state.note("begin", 0)
        state.note("done", 0)
        state.note("begin", 1)
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(path.parent) == ["state"]
    with StateFile.load(path) as state:
        assert state.plan == PLAN
        assert state.words == ["done", "begin", "undone"]
        assert (state.next, state.arrived) == (1, False)
        state.note("done", 1)
        assert (state.next, state.arrived) == (2, True)
        state.remove()
    assert not path.exists()


def test_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "state"
    with StateFile.create(path, PLAN):
        with pytest.raises(MigrationError, match="another process works on this migration"):
            StateFile.load(path)
        with pytest.raises(MigrationError, match="--resume"):
            StateFile.create(path, PLAN)
    StateFile.load(path).__exit__()


def test_a_torn_line_was_never_written(tmp_path: Path) -> None:
    path = tmp_path / "state"
    with StateFile.create(path, PLAN) as state:
        state.note("begin", 0)
    whole = path.read_bytes()
    for end in range(whole.index(b"\n") + 1, len(whole)):
        path.write_bytes(whole[:end])
        with StateFile.load(path) as state:
            assert state.words[0] == "undone"
            state.note("done", 0)
        with StateFile.load(path) as state:
            assert state.words[0] == "done"


def test_a_plan_that_is_not_whole(tmp_path: Path) -> None:
    path = tmp_path / "state"
    with StateFile.create(path, PLAN):
        whole = path.read_bytes()
    for end in (0, 1, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(MigrationError, match="not the state of a migration"):
            StateFile.load(path)
        assert path.read_bytes() == whole[:end], "it may be somebody's, named by mistake"


def test_somebody_finishes_it_in_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = StateFile.create(tmp_path / "state", PLAN)
    flock = fcntl.flock

    def finished(fd: int, how: int) -> None:
        with state:
            state.remove()
        flock(fd, how)

    monkeypatch.setattr("fcntl.flock", finished)
    with pytest.raises(FileNotFoundError, match="no unfinished migration of these VMs"):
        StateFile.load(tmp_path / "state")


def test_the_same_vms_have_the_same_path_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vms = [Vm("a", "host:4444", "there:4444", "tcp:there:1")]
    here = default_path(vms)
    monkeypatch.chdir(tmp_path)
    assert default_path(vms) == here


def test_a_file_that_is_too_long(tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"\n" * ((1 << 24) + 1))
    with pytest.raises(MigrationError, match="too long"):
        StateFile.load(tmp_path / "state")


def test_nothing_to_go_on_with(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no unfinished migration of these VMs"):
        StateFile.load(tmp_path / "state")


@given(
    st.lists(
        st.binary(max_size=30)
        | st.dictionaries(st.sampled_from(["begin", "done", "x"]), st.integers(-1, 5)).map(
            lambda value: json.dumps(value).encode()
        ),
        max_size=5,
    )
)
def test_whatever_is_in_it(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]) -> None:
    path = tmp_path_factory.mktemp("state") / "state"
    with StateFile.create(path, PLAN):
        first = path.read_bytes()
    path.write_bytes(first + b"\n".join(lines))
    with contextlib.suppress(MigrationError), StateFile.load(path) as state:
        assert len(state.words) == len(STEPS)


@given(st.lists(st.tuples(st.sampled_from(["begin", "done", "undone"]), st.integers(0, 2))))
def test_the_last_word_counts(
    tmp_path_factory: pytest.TempPathFactory, said: list[tuple[Word, int]]
) -> None:
    path = tmp_path_factory.mktemp("state") / "state"
    last: dict[int, Word] = {}
    with StateFile.create(path, PLAN) as state:
        for word, index in said:
            state.note(word, index)
            last[index] = word
    with StateFile.load(path) as state:
        assert state.words == [last.get(index, "undone") for index in range(3)]


def test_the_default_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert default_path(VMS).startswith("/state/ivshmem/migration-")
    assert default_path(VMS) == default_path(VMS[::-1])
    assert default_path(VMS) != default_path(VMS[:1])


# -- a file of VMs --------------------------------------------------------------------------------

FILE = """
[vm.db]
source = "/run/db"
destination = "host:1"
uri = "tcp:host:2"

[control]
destination = ["/run/there.control"]
"""


def test_a_group_file(tmp_path: Path) -> None:
    path = tmp_path / "group.toml"
    path.write_text(FILE)
    vms, controls = group_file.load(path)
    assert vms == [Vm("db", "/run/db", "host:1", "tcp:host:2")]
    assert controls == {"source": [], "destination": ["/run/there.control"]}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no VM"),
        ("vm = 1", "no VM"),
        ("[vm]", "no VM"),
        ("[", "not TOML"),
        ("[vms.a]", "unknown key 'vms'"),
        ("[vm]\na = 1", "vm.'a': not a table"),
        ("[vm.a]\nsource='x'", "vm.'a': destination is missing"),
        ("[vm.a]\nsource=1\ndestination='x'\nuri='y'", "vm.'a': source = 1: not a string"),
        ("[vm.a]\nsource='x'\ndestination='x'\nuri=''", "vm.'a': uri = '': not a string"),
        ("[vm.a]\nsource='x'\ndestination='x'\nuri='y'\nmaster=true", "unknown key 'master'"),
        (FILE.replace('["/run/there.control"]', "3"), "each a list of paths"),
        (FILE.replace('["/run/there.control"]', "[3]"), "each a list of paths"),
        (FILE.replace("destination = [", "here = ["), "each a list of paths"),
    ],
)
def test_what_is_no_group_file(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        group_file.parse(text.encode(), "group.toml")


@given(st.binary(max_size=200))
def test_any_bytes_as_a_group_file(data: bytes) -> None:
    with contextlib.suppress(ConfigError):
        group_file.parse(data, "group.toml")
