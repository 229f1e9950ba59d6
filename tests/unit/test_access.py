"""Rules about who may become a peer: what they mean, what wins, what is refused and why."""

from __future__ import annotations

import grp
import os
import pwd
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence

import pytest

from ivshmem.server.access import Rules, Verdict
from ivshmem.system.accounts import group_id, user_id
from ivshmem.system.credentials import Credentials

NO_PID = 2**22 + 1  # beyond what pid_max can be
PROGRAM = os.path.basename(os.readlink("/proc/self/exe"))


def who(
    uid: int = 1000,
    gid: int = 1000,
    groups: tuple[int, ...] | None = (),
    *,
    pid: int = NO_PID,
    process: str = "qemu-system-x86",
) -> Credentials:
    return Credentials(pid, uid, gid, process, groups)


# -- what a rule means ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "peer", "matches"),
    [
        ("all", who(), True),
        ("root", who(0), True),
        ("root", who(1), False),
        ("uid:1000", who(), True),
        ("uid:1001", who(gid=1001, groups=(1001,)), False),
        ("uid:root", who(0), True),
        ("uid:nobody", who(pwd.getpwnam("nobody").pw_uid), True),
        ("gid:1000", who(uid=5), True),
        ("gid:107", who(groups=(4, 107)), True),
        ("gid:107", who(uid=107, groups=(4,)), False),
        (f"gid:{grp.getgrgid(0).gr_name}", who(gid=0), True),
        # of a process that is gone, or may not be looked at, what it called itself
        ("process:qemu-system-x86_64", who(), True),
        ("process:qemu-system-x86", who(), True),
        ("process:qemu-system-aarch64", who(), False),
        ("process:qemu", who(), False),
        ("process:qemu", who(process="qemu"), True),
        # of one that lives, the file that it runs
        (f"process:{PROGRAM}", who(pid=os.getpid(), process="?"), True),
        ("process:qemu-system-x86_64", who(pid=os.getpid()), False),
    ],
)
def test_rule(rule: str, peer: Credentials, matches: bool) -> None:
    assert Rules(allow=[rule]).judge(peer).allowed is matches
    assert Rules(deny=[rule]).judge(peer).allowed is not matches
    assert Rules(readonly=[rule]).judge(peer) == (True, matches, f"readonly {rule}" * matches)


@pytest.mark.parametrize(
    ("rule", "peer"),
    [
        ("gid:107", who(groups=None)),
        ("process:qemu", who(process="?")),
        ("process:qemu", who(pid=0, process="?")),
    ],
)
def test_what_cannot_be_known_counts_against(rule: str, peer: Credentials) -> None:
    assert not Rules(allow=[rule]).judge(peer).allowed
    assert not Rules(deny=[rule]).judge(peer).allowed
    assert Rules(readonly=[rule]).judge(peer).readonly


def test_a_program_that_was_replaced_since(tmp_path: os.PathLike[str]) -> None:
    """An upgrade removes the file of a running QEMU."""
    program = shutil.copy("/bin/sleep", os.path.join(tmp_path, "qemu-copy"))
    with subprocess.Popen([program, "60"]) as process:
        try:
            os.unlink(program)
            assert os.readlink(f"/proc/{process.pid}/exe").endswith(" (deleted)")
            peer = who(pid=process.pid, process="x")
            assert Rules(allow=["process:qemu-copy"]).judge(peer).allowed
        finally:
            process.kill()


# -- what several of them mean --------------------------------------------------------------------


def test_without_rules_everybody_gets_everything() -> None:
    assert Rules().judge(who(), 10**6) == Verdict(True, False, "")


def test_deny_wins_over_allow() -> None:
    rules = Rules(allow=["gid:1000", "uid:7"], deny=["uid:7"])
    assert rules.judge(who()).allowed
    assert rules.judge(who(7)) == (False, False, "deny uid:7")
    assert rules.judge(who(8, 8)) == (False, False, "no rule of allow matches")


def test_one_rule_of_allow_is_enough() -> None:
    rules = Rules(allow=["uid:1", "uid:2", "gid:3"])
    assert [rules.judge(who(n, n)).allowed for n in range(5)] == [False, True, True, True, False]


def test_readonly_allows_nobody() -> None:
    rules = Rules(allow=["uid:1"], readonly=["uid:1", "uid:2"])
    assert rules.judge(who(1)) == (True, True, "readonly uid:1")
    assert not rules.judge(who(2)).allowed


@pytest.mark.parametrize("uid", [0, 1000])
def test_limit_for_each_user(uid: int) -> None:
    """root is no exception."""
    rules = Rules(peers_per_uid=2)
    assert [rules.judge(who(uid), n).allowed for n in range(4)] == [True, True, False, False]
    assert rules.judge(who(uid), 2).reason == f"uid {uid} has 2 of 2 peers"


def test_joins_per_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many at once, and then each after its share; refusals and questions count for nothing."""
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    rules = Rules(joins_per_minute=3, deny=["uid:9"])
    assert [rules.judge(who(), 0).allowed for _ in range(5)] == [True] * 3 + [False] * 2
    assert rules.judge(who(), 0).reason == "uid 1000 has joined 3 times in a minute"
    assert rules.judge(who(), None).allowed
    assert rules.judge(who(0), 0).allowed, "another user"
    assert [rules.judge(who(9), 0).allowed for _ in range(5)] == [False] * 5
    now += 19
    assert not rules.judge(who(), 0).allowed
    now += 1
    assert rules.judge(who(), 0).allowed
    assert not rules.judge(who(), 0).allowed
    now += 60
    assert [rules.judge(who(), 0).allowed for _ in range(4)] == [True] * 3 + [False]


@pytest.mark.parametrize("limit", [1, 7, 1000, 10**6])
def test_joins_per_minute_are_that_many(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    now = 12345.678
    monkeypatch.setattr(time, "monotonic", lambda: now)
    rules = Rules(joins_per_minute=limit)
    tries = min(limit, 2000)
    assert all(rules.judge(who(), 0).allowed for _ in range(tries))
    assert rules.judge(who(), 0).allowed is (tries < limit)


def test_joins_of_many_users_take_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    rules = Rules(joins_per_minute=60)
    for uid in range(10_000):
        now += 0.01
        assert rules.judge(who(uid), 0).allowed
    assert len(rules._joins) <= 1024


def test_nobody() -> None:
    assert not Rules(deny=["all"]).judge(who(0)).allowed


def test_equal_rules_are_equal() -> None:
    """So that a reload can see that nothing has changed."""
    rules = Rules(["root"], ["uid:1"], ["gid:2"], 3)
    same = Rules(allow=("root",), deny=("uid:1",), readonly=("gid:2",), peers_per_uid=3)
    assert rules == same
    assert hash(rules) == hash(same)
    assert rules != Rules(["root"])
    assert rules != "root"
    assert repr(rules) == (
        "Rules(allow=('root',), deny=('uid:1',), readonly=('gid:2',), peers_per_uid=3,"
        " joins_per_minute=None)"
    )


# -- what is no rule ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("", "the rule '' cannot be read: allowed are uid:USER, gid:GROUP, process:PROGRAM, root"),
        ("qemu", "the rule 'qemu' cannot be read: allowed are"),
        ("uid:", "the rule 'uid:' cannot be read"),
        ("uid: 7", "the rule 'uid: 7' cannot be read"),
        ("user:qemu", "the rule 'user:qemu' cannot be read"),
        ("ALL", "the rule 'ALL' cannot be read"),
        ("uid:ivshmem-nobody", "the rule 'uid:ivshmem-nobody': no user 'ivshmem-nobody' on this"),
        ("gid:ivshmem-nobody", "the rule 'gid:ivshmem-nobody': no group 'ivshmem-nobody' on"),
        ("uid:-1", "the rule 'uid:-1': uid -1: allowed are 0 to 4294967294"),
        ("gid:4294967295", "the rule 'gid:4294967295': gid 4294967295: allowed are 0 to"),
        ("process:/usr/bin/qemu", 'expected a file name without its directory, for example "proc'),
        ("uid:a\0b", "no user"),
    ],
)
@pytest.mark.parametrize(
    "make",
    [
        lambda rule: Rules(allow=[rule]),
        lambda rule: Rules(deny=["all", rule]),
        lambda rule: Rules(readonly=[rule]),
    ],
)
def test_no_rule(rule: str, message: str, make: Callable[[str], Rules]) -> None:
    with pytest.raises(ValueError) as caught:
        make(rule)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("rules", [[7], [None], ["all", b"root"]])
def test_no_text(rules: Sequence[str]) -> None:
    with pytest.raises(ValueError, match="is not a text: allowed are"):
        Rules(deny=rules)


def test_a_text_is_no_list_of_rules() -> None:
    with pytest.raises(ValueError, match=r"allow: expected a list of rules, got the text 'root'"):
        Rules(allow="root")


@pytest.mark.parametrize("limit", [0, -1])
def test_no_limit(limit: int) -> None:
    with pytest.raises(ValueError, match=r"peers_per_uid .*: 1 is the least"):
        Rules(peers_per_uid=limit)
    with pytest.raises(ValueError, match=r"joins_per_minute .*: 1 is the least"):
        Rules(joins_per_minute=limit)


# -- users and groups -----------------------------------------------------------------------------


def test_accounts() -> None:
    assert user_id(7) == user_id("7") == group_id("7") == group_id(7) == 7
    assert user_id("root") == group_id(grp.getgrgid(0).gr_name) == 0
    for lookup in (user_id, group_id):
        for wrong in ("", "-1", -1, 2**32 - 1, "no such", "\N{ARABIC-INDIC DIGIT ONE}"):
            with pytest.raises(ValueError):
                lookup(wrong)
        with pytest.raises(TypeError):
            lookup(1.5)  # type: ignore[arg-type]
