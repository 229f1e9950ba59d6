"""`ivshmem guest setup` on a system in a folder: what it writes, refuses, and takes back.

tests/vm/test_guest_setup.py does it in a guest with systemd and udev.
"""

from __future__ import annotations

import argparse
import configparser
import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import commands

from ivshmem.cli import guest_setup, main
from ivshmem.errors import IvshmemError
from ivshmem.guest import (
    pci,
    setup_files,
    setup_plan,
    setup_steps,
    setup_system,
    setup_undo,
    vfio,
)
from ivshmem.guest.setup_files import MARK
from ivshmem.guest.setup_system import RECORD, SetupRecord, System
from ivshmem.testing.fake_pci import FakePci

A = "0000:00:04.0"
UNIT = "etc/systemd/system/ivshmem-guest"
FILES = {
    "etc/sysusers.d/ivshmem-guest.conf",
    "etc/modules-load.d/ivshmem.conf",
    "etc/udev/rules.d/70-ivshmem.rules",
    f"{UNIT}.socket",
    f"{UNIT}.service",
}


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The programs that were run; they do what they are for to the files below the root."""
    done: list[tuple[str, ...]] = []

    def run(system: System, *command: str, rooted: bool = False) -> str:
        done.append(command)
        root = Path(system.root)
        if command[0] == "systemd-sysusers":
            text = (root / "etc/sysusers.d" / command[1]).read_text()
            make_groups(root / "etc/group", text)
        elif command[0] == "groupdel":
            path = root / "etc/group"
            lines = path.read_text().splitlines(keepends=True)
            path.write_text("".join(x for x in lines if not x.startswith(f"{command[-1]}:")))
        elif command[0] == "gpasswd":
            path, user, group = root / "etc/group", command[-2], command[-1]
            path.write_text(re.sub(rf"^({group}:.*:){user}$", r"\1", path.read_text(), flags=re.M))
        elif command[:2] == ("systemctl", "enable"):
            for unit in command[3:]:
                wants = root / "etc/systemd/system" / f"{setup_steps.target_of(unit)}.wants"
                wants.mkdir(exist_ok=True)
                (wants / unit).unlink(missing_ok=True)
                (wants / unit).symlink_to(f"/etc/systemd/system/{unit}")
        elif command[:2] == ("systemctl", "disable"):
            for wants in (root / "etc/systemd/system").glob("*.wants"):
                (wants / command[-1]).unlink(missing_ok=True)
        else:
            raise AssertionError(command)
        return ""

    monkeypatch.setattr(System, "run", run)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # hundreds of them
    return done


def make_groups(path: Path, text: str) -> None:
    lines = path.read_text().splitlines()
    for kind, *words in (line.split() for line in text.splitlines() if line[0] != "#"):
        if kind == "g" and not any(line.startswith(f"{words[0]}:") for line in lines):
            lines.append(f"{words[0]}:x:990:")
        elif kind == "m":
            at = next(n for n, line in enumerate(lines) if line.startswith(f"{words[1]}:"))
            if words[0] not in lines[at]:
                lines[at] += "," * (lines[at][-1] != ":") + words[0]
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A small system."""
    root = tmp_path / "root"
    for folder in ("etc/udev/rules.d", "var/lib", "usr/bin", "etc/systemd/system"):
        (root / folder).mkdir(parents=True)
    (root / "etc/group").write_text("root:x:0:\nvideo:x:44:\n")
    (root / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\nalice:x:1000:1000::/:/bin/sh\n")
    (root / "usr/bin/ivshmem").touch(mode=0o755)
    return root


def setup(root: Path, *options: str, yes: bool = True) -> int:
    """Run the command in this process."""
    words = ["guest", "setup", "--root", str(root), *(["--yes"] if yes else []), *options]
    return main.main(words)


def tree(root: Path) -> dict[str, Any]:
    """All that is below, with modes and contents."""
    found: dict[str, Any] = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_dir():
            found[name] = path.stat().st_mode
        else:
            found[name] = (path.stat().st_mode, path.read_bytes())
    return found


def test_all_comes_and_goes(
    root: Path, ran: list[tuple[str, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(root)
    assert setup(root, "--user", "alice", "--peers", "0,5-7") == 0
    said = capsys.readouterr().out
    for name in FILES:
        assert f"write {root / name}" in said
        text = (root / name).read_text()
        assert text.startswith(MARK)
        assert (root / name).stat().st_mode & 0o777 == 0o644
        for line in text.splitlines():  # each line was shown
            assert f"    +{line}" in said
    assert "ivshmem:x:990:alice" in (root / "etc/group").read_text()
    wants = root / "etc/systemd/system"
    assert (wants / "sockets.target.wants/ivshmem-guest.socket").is_symlink()
    assert (wants / "multi-user.target.wants/ivshmem-guest.service").is_symlink()
    once, commands_of_once = tree(root), len(ran)
    assert setup(root, "--user", "alice", "--peers", "0,5-7") == 0  # twice is as once
    assert capsys.readouterr().out.count(": done already") == 7
    assert (tree(root), len(ran)) == (once, commands_of_once)
    assert setup(root, "--undo") == 0
    assert capsys.readouterr().out.endswith("all is taken back\n")
    assert tree(root) == before
    assert setup(root, "--undo") == 0
    assert capsys.readouterr().out == "nothing is set up here\n"
    assert tree(root) == before


def test_what_was_there_before_stays(root: Path, ran: list[tuple[str, ...]]) -> None:
    """A group with its members, folders, and files of others beside ours."""
    (root / "etc/group").write_text("ivshmem:x:7:bob\n")
    (root / "etc/modules-load.d").mkdir()
    (root / "etc/udev/rules.d/99-other.rules").write_text("# mine\n")
    before = tree(root)
    assert setup(root, "--user", "alice") == 0
    made = setup_system.System(str(root)).members("ivshmem")
    assert made is not None
    assert made == ["bob", "alice"]
    # What an administrator adds afterwards stays, too.
    (root / "etc/sysusers.d/mine.conf").write_text("# mine\n")
    (root / "etc/group").write_text("ivshmem:x:7:alice\n")
    assert setup(root, "--undo") == 0
    assert ("gpasswd", "--root", str(root), "--delete", "alice", "ivshmem") in ran
    assert not [command for command in ran if command[0] == "groupdel"]
    after = tree(root)
    assert after.pop("etc/sysusers.d/mine.conf")[1] == b"# mine\n"
    assert after.pop("etc/sysusers.d")
    assert {**after, "etc/group": ""} == {**before, "etc/group": ""}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize("kind", ["file", "link", "folder"])
def test_another_s_file_is_never_replaced(
    root: Path, ran: list[tuple[str, ...]], capsys: pytest.CaptureFixture[str], name: str, kind: str
) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "file":
        path.write_text("mine\n")
    elif kind == "link":
        path.symlink_to("/dev/null")  # as `systemctl mask` makes it
    else:
        path.mkdir()
    before = tree(root)
    assert setup(root) == 1
    said = capsys.readouterr().err
    assert str(path) in said
    assert len(said.splitlines()) == 1
    assert tree(root) == before, "nothing at all was made"
    assert not ran
    path.rmdir() if kind == "folder" else path.unlink()  # the remedy: "move it away first"
    assert setup(root) == 0


def test_our_own_file_is_replaced_and_the_difference_shown(
    root: Path, ran: list[tuple[str, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert setup(root, "--peers", "0") == 0
    service = root / f"{UNIT}.service"
    service.write_text(service.read_text().replace("LimitNOFILE=12288", "LimitNOFILE=99"))
    capsys.readouterr()
    assert setup(root, "--peers", "1") == 0
    shown = capsys.readouterr().out
    assert "    -LimitNOFILE=99\n    +LimitNOFILE=12288\n" in shown
    assert '    -Environment="OPTIONS=--peers 0"\n    +Environment="OPTIONS=--peers 1"' in shown
    assert "LimitNOFILE=12288" in service.read_text()


def test_other_options_first_take_the_old_ones_back(
    root: Path, ran: list[tuple[str, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(root)
    assert setup(root) == 0
    once = tree(root)
    for options in (["--no-serve"], ["--group", "video"], ["--access", "sysfs", "--no-serve"]):
        assert setup(root, *options) == 1
        said = capsys.readouterr().err
        assert "was set up with other options" in said
        assert said.endswith("first `ivshmem guest setup --undo`\n")
        assert tree(root) == once
    assert setup(root, "--undo") == 0
    assert setup(root, "--no-serve") == 0
    assert setup(root, "--undo") == 0
    assert tree(root) == before


# -- what ends it in the middle -------------------------------------------------------------------


def act_of(number: int, act: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Do something before the nth change of the system, or after its half; the count of changes."""
    count = [0]

    def before(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            count[0] += 1
            if count[0] == number:
                act()
            return call(*arguments, **options)

        return counted

    for name in ("write", "make_folder", "run"):
        monkeypatch.setattr(System, name, before(getattr(System, name)))
    for name in ("unlink", "rmdir", "symlink_to"):
        monkeypatch.setattr(Path, name, before(getattr(Path, name)))
    return count


def killed_at(number: int, root: Path, *options: str) -> bool:
    """Run the command in a child, which is killed at that change; whether it came so far."""
    child = os.fork()
    if child == 0:
        with pytest.MonkeyPatch.context() as patch:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            act_of(number, lambda: os.kill(os.getpid(), signal.SIGKILL), patch)
            os._exit(setup(root, *options))
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.nightly
def test_killed_anywhere(root: Path, ran: list[tuple[str, ...]]) -> None:
    """Whether the set-up or its undo is killed: both can be repeated, and nothing is left."""
    before = tree(root)
    options = ("--user", "alice")
    number = 1
    while killed_at(number, root, *options):
        if number % 2:
            assert setup(root, *options) == 0
            assert (root / f"{UNIT}.service").exists()
        assert setup(root, "--undo") == 0
        assert tree(root) == before, number
        number += 1
    assert number > 15
    for undone in range(1, 100):
        assert setup(root, *options) == 0
        if not killed_at(undone, root, "--undo"):
            break
        assert setup(root, "--undo") == 0
        assert tree(root) == before, undone
    assert undone > 10


@pytest.mark.sampled(3)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EPERM, errno.EROFS])
@pytest.mark.parametrize("number", [1, 4, 9])
def test_what_cannot_be_written_is_said_in_one_line(
    root: Path,
    ran: list[tuple[str, ...]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    number: int,
) -> None:
    before = tree(root)

    def fail() -> None:
        raise OSError(code, os.strerror(code), "/etc/x")

    with monkeypatch.context() as patch:
        act_of(number, fail, patch)
        assert setup(root) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"ivshmem: /etc/x: {os.strerror(code)[0].lower()}")
    assert re.search(
        r"\(step \d was not made, \d steps? before it w\w+: repeat the command, or", said
    )
    assert len(said.splitlines()) == 1
    assert setup(root) == 0  # each of the two remedies
    assert setup(root, "--undo") == 0
    assert tree(root) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_a_full_disk(root: Path) -> None:
    """The real one: no half of a file is there afterwards."""
    words = [sys.executable, "-m", "ivshmem", "guest", "setup", "--yes", "--root", str(root)]
    script = 'mount -t tmpfs -o size=4k none "$1/etc/udev" && mkdir "$1/etc/udev/rules.d" && '
    script += 'head -c 4096 /dev/zero > "$1/etc/udev/full" 2>/dev/null; shift; exec "$@" --no-serve'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", str(root), *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if "unshare" in done.stderr or "systemd-sysusers" in done.stderr:
        pytest.skip(f"not here: {done.stderr.strip()}")
    assert done.returncode == 1, done
    assert "no space left on device" in done.stderr
    assert len(done.stderr.splitlines()) == 1


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--user", "nobody-here"], "no user 'nobody-here' here: useradd nobody-here"),
        (["--user", "a b"], "not a name for a user or group: 'a b'"),
        (["--group", 'x", RUN+="/bin/sh'], "not a name for a user or group"),
        (["--group", "x%n"], "not a name for a user or group"),
        (["--address", '04.0", RUN+="x'], "not a PCI address"),
        (["--address", "*"], "not a PCI address"),
    ],
)
def test_names_that_would_mean_something_else(
    root: Path, capsys: pytest.CaptureFixture[str], options: list[str], reason: str
) -> None:
    before = tree(root)
    assert setup(root, *options) == 1
    said = capsys.readouterr().err
    assert reason in said
    assert len(said.splitlines()) == 1
    assert tree(root) == before


def test_a_root_without_the_program(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "usr/bin/ivshmem").unlink()
    assert setup(root) == 1
    assert "has no /usr/bin/ivshmem and no /usr/local/bin/ivshmem" in capsys.readouterr().err


def test_a_folder_that_is_no_system(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert setup(tmp_path) == 1
    assert "not the root of a system" in capsys.readouterr().err
    assert setup(tmp_path / "nothing") == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_link_does_not_lead_out_of_the_root(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "outside").mkdir()
    (root / "etc/modules-load.d").symlink_to(tmp_path / "outside")
    assert setup(root) == 1
    assert "is a link that leads out of" in capsys.readouterr().err
    assert not [*(tmp_path / "outside").iterdir()]


def test_nobody_can_be_asked(root: Path) -> None:
    before = tree(root)
    with commands.forking():
        done = commands.run("guest", "setup", "--root", str(root))
    assert done.returncode == 1
    assert done.stderr.endswith("not a terminal: give --yes, or --dry-run to see the steps\n")
    assert len(done.stderr.splitlines()) == 1
    assert tree(root) == before


DAMAGED_ENTRIES = [
    {},
    {"kind": [], "name": "/etc/x"},
    {"kind": "tree", "name": "/etc/x"},
    {"kind": "folder", "name": 7},
    {"kind": "file", "name": "/etc/x"},
    {"kind": "link", "name": "/etc/x", "target": 7},
    {"kind": "member", "name": "ivshmem"},
    {"kind": "device", "name": A, "driver": "", "override": "", "enabled": True},
]


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", '{"version": 2}'),
        *(json.dumps({"version": 1, "entries": [entry]}) for entry in DAMAGED_ENTRIES),
    ],
)
def test_a_damaged_record(root: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    (root / RECORD[1:]).write_text(text)
    for options in ([], ["--undo"]):
        assert setup(root, *options) == 1
        said = capsys.readouterr().err
        assert "is damaged, or of another version, so what was set up is unknown: undo it" in said
        assert len(said.splitlines()) == 1


def test_each_kind_of_entry_can_be_taken_back() -> None:
    assert {*setup_undo.UNDO} == {*setup_system.KINDS}


def test_a_dry_run_changes_nothing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(root)
    assert setup(root, "--dry-run", yes=False) == 0
    said = capsys.readouterr().out
    assert said.endswith("nothing was changed\n")
    assert all(name in said for name in FILES)
    assert tree(root) == before


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("answers", "status", "made"),
    [("y\nq\n", 1, 1), ("q\n", 1, 0), ("", 1, 0), ("what\ny\nno\n", 1, 1), ("y\na\n", 0, 5)],
)
def test_each_step_is_asked_for(
    root: Path,
    ran: list[tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    answers: str,
    status: int,
    made: int,
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal(answers))
    assert setup(root, yes=False) == status
    said = capsys.readouterr().out
    assert sum((root / name).exists() for name in FILES) == made
    assert "make it? [y]es, [a]ll, [q]uit: " in said
    if status:
        assert "stopped before step" in said
    monkeypatch.setattr(sys, "stdin", Terminal("q\n"))
    if made:
        assert setup(root, "--undo", yes=False) == 1
        assert sum((root / name).exists() for name in FILES) == made
    monkeypatch.setattr(sys, "stdin", Terminal("y\n"))
    assert setup(root, "--undo", yes=False) == 0
    assert not any((root / name).exists() for name in FILES)


def test_drafts_of_a_killed_process_go_too(root: Path, ran: list[tuple[str, ...]]) -> None:
    """A file that replaces another one has a draft's name for a moment."""
    before = tree(root)
    assert setup(root) == 0
    for name in (RECORD[1:], "etc/udev/rules.d/70-ivshmem.rules"):
        path = root / name
        path.with_name(f".{path.name}.ivshmem-0").write_text("half")
    assert setup(root, "--undo") == 0
    assert tree(root) == before


def test_a_file_that_was_replaced_since_stays(
    root: Path, ran: list[tuple[str, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert setup(root) == 0
    rules = root / "etc/udev/rules.d/70-ivshmem.rules"
    rules.write_text("# mine now\n")
    assert setup(root, "--undo") == 0
    assert f"{rules} stays: it was replaced since" in capsys.readouterr().out
    assert rules.read_text() == "# mine now\n"
    assert not (root / RECORD[1:]).exists()


# -- what the files say ---------------------------------------------------------------------------


def test_the_rules_name_one_device() -> None:
    every = setup_files.rules("vfio", "g", [])
    one = setup_files.rules("vfio", "g", [A])
    assert 'ATTR{vendor}=="0x1af4", ATTR{device}=="0x1110"' in every
    assert 'ATTR{driver_override}="vfio-pci"' in every
    assert "KERNEL==" not in every.replace('KERNEL=="[0-9]*"', "")
    assert f'KERNEL=="{A}"' in one
    assert f'TEST=="/sys/kernel/iommu_groups/%k/devices/{A}"' in one
    for text in (setup_files.rules("uio", "g", []), setup_files.rules("sysfs", "g", [])):
        assert "driver_override" not in text
        assert "vfio" not in text


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze")
@pytest.mark.parametrize("access", ["vfio", "noiommu", "uio", "sysfs"])
def test_systemd_reads_the_units(tmp_path: Path, access: Any) -> None:
    program = [sys.executable, "-m", "ivshmem"]
    socket = setup_files.socket_unit("/run/ivshmem.sock", "root")
    service = setup_files.service_unit(program, access, "root", socket="x.socket", address=A)
    (tmp_path / "x.socket").write_text(socket)
    (tmp_path / "x.service").write_text(service)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / "x.service")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert not [line for line in done.stderr.splitlines() if str(tmp_path) in line], done
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[method-assign, assignment]
    parser.read_string(service)
    words = parser["Service"]["ExecStart"].split()
    assert words == [*program, "guest", "serve", "--address", A, "--access", access, "$OPTIONS"]


# -- this machine ---------------------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakePci:
    return FakePci(tmp_path / "pci", monkeypatch)


def settings(*options: str) -> tuple[setup_plan.Settings, list[str]]:
    parser = main._parser(["guest"])
    words = ["guest", "setup", "--no-serve", *options]
    namespace: argparse.Namespace = parser.parse_args(words)
    return guest_setup._settings(namespace, System())


def test_the_way_that_a_device_needs(machine: FakePci) -> None:
    with pytest.raises(IvshmemError, match="no ivshmem device in this machine"):
        settings()
    assert settings("--access", "vfio")[0].access == "vfio"  # the remedy
    machine.add(A)
    found, notes = settings()
    assert found.access == "sysfs"
    assert "interrupts do not come" in notes[0]
    machine.set_group(A, 7)
    assert settings()[0].access == "vfio"
    found, notes = settings("--access", "noiommu")
    assert notes[0].startswith("warning: without an IOMMU the device can write to all")


def test_devices_that_need_several_ways(machine: FakePci) -> None:
    machine.add(A, group=7)
    machine.add("0000:00:05.0")
    with pytest.raises(IvshmemError, match=r"several ways .*: choose with --address"):
        settings()
    assert settings("--address", A)[0].access == "vfio"
    assert settings("--address", "00:05.0")[0].access == "sysfs"


def test_no_unit_where_there_are_no_interrupts(machine: FakePci) -> None:
    machine.add(A)
    assert setup_plan.why_not_served([pci.look(A)], "sysfs")
    machine.add("0000:00:05.0", vectors=0)
    assert not setup_plan.why_not_served([pci.look("0000:00:05.0")], "sysfs")


def test_a_record_keeps_what_was_before(root: Path) -> None:
    """A second set-up finds a device that is bound already: it had no driver before the first."""
    record = SetupRecord(System(str(root)))
    before = {"driver": "", "override": "", "enabled": False, "files": []}
    record.add([{"kind": "device", "name": A, **before}])
    record.add([{"kind": "device", "name": A, "driver": "vfio-pci", "override": "vfio-pci"}])
    record.add([{"kind": "file", "name": "/x", "digests": ["1"]}])
    record.add([{"kind": "file", "name": "/x", "digests": ["2"]}])
    again = SetupRecord(System(str(root)))
    assert again.entries == [
        {"kind": "device", "name": A, **before},
        {"kind": "file", "name": "/x", "digests": ["1", "2"]},
    ]


def test_a_device_gets_its_driver_back(machine: FakePci, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.add_driver("pci-stub", takes=lambda _: True)
    machine.add_driver("vfio-pci")
    path = machine.add(A, driver="pci-stub", group=7)
    (path / "resource2").chmod(0o600)
    step = setup_steps.Permit(System(), A, "vfio", "root")
    (entry,) = step.entries()
    pci.bind(pci.look(A), "vfio-pci")
    (path / "resource2").chmod(0o660)
    undo = setup_undo.undo_of(System(), entry)
    assert undo.title == f"give {A} back to pci-stub"
    # A program that has it open is not waited for: the kernel would wait without end.
    with monkeypatch.context() as patch:
        patch.setattr(vfio, "is_held", lambda _: True)
        with pytest.raises(OSError, match="has the device open: stop that first"):
            undo.make()
    assert pci.look(A).driver == "vfio-pci"
    undo.make()
    assert pci.look(A).driver == "pci-stub"
    assert (path / "resource2").stat().st_mode & 0o777 == 0o600
    assert undo.title == ""
    undo.make()
