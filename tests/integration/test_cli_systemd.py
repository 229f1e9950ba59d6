"""`ivshmem systemd install`: the units fit this installation, and nothing is overwritten."""

from __future__ import annotations

import configparser
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import commands
from support.waiting import PATIENCE

from ivshmem.cli import systemd
from ivshmem.system.systemd import unit_words

pytestmark = pytest.mark.usefixtures("commands")

UNITS = ["ivshmem.service", "ivshmem@.service", "ivshmem@.socket"]


def install(*arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = commands.run("systemd", "install", *arguments)
    assert done.returncode == status, done.stderr
    return done


def settings(path: Path) -> dict[str, dict[str, str]]:
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[method-assign, assignment]
    parser.read(path)
    return {section: dict(parser[section]) for section in parser.sections()}


def test_a_user_s_own(tmp_path: Path) -> None:
    done = install("--user", "--directory", str(tmp_path))
    assert done.stdout.splitlines() == [f"wrote {tmp_path / name}" for name in UNITS]
    assert sorted(os.listdir(tmp_path)) == UNITS
    service = settings(tmp_path / "ivshmem.service")
    program = shlex.split(service["Service"]["ExecStart"])
    assert program[-3:] == ["--config", "%E/ivshmem.toml", "--fd-store"]
    shown = subprocess.run(
        [*program[:-4], "--version"], capture_output=True, text=True, timeout=PATIENCE, check=True
    )
    assert shown.stdout.startswith("ivshmem ")
    assert service["Install"]["WantedBy"] == "default.target"
    for name in UNITS[:2]:
        left = settings(tmp_path / name)["Service"]
        assert not [
            key for key in left if key.startswith(("Protect", "Private", "User", "Dynamic"))
        ]
    assert settings(tmp_path / UNITS[2])["Socket"]["ListenStream"] == "%t/ivshmem-%i.sock"


def test_twice_is_as_once_and_another_s_file_stays(tmp_path: Path) -> None:
    install("--user", "--directory", str(tmp_path))
    again = install("--user", "--directory", str(tmp_path))
    assert again.stdout.splitlines() == [f"{tmp_path / name} is up to date" for name in UNITS]
    mine = tmp_path / "ivshmem@.socket"
    mine.write_text("mine")
    (tmp_path / "ivshmem.service").unlink()
    said = install("--user", "--directory", str(tmp_path), status=1).stderr
    assert said.startswith(f"ivshmem: {mine} exists and is different")
    assert "--force" in said
    assert mine.read_text() == "mine"
    assert not (tmp_path / "ivshmem.service").exists()  # all or nothing
    install("--user", "--directory", str(tmp_path), "--force")
    assert "[Socket]" in mine.read_text()
    assert sorted(os.listdir(tmp_path)) == UNITS  # no drafts


def test_the_system_s_keep_every_line_but_one() -> None:
    for name in UNITS:
        before = systemd._read(name)
        after = systemd.unit(before, ["/opt/a b/bin/ivshmem"], user=False)
        changed = [
            line
            for line, old in zip(after.splitlines(), before.splitlines(), strict=True)
            if line != old
        ]
        assert all(line.startswith('ExecStart="/opt/a b/bin/ivshmem" serve') for line in changed)
        assert len(changed) == name.endswith(".service")


@pytest.mark.parametrize(
    ("word", "written"),
    [("/opt/x", "/opt/x"), ("/a b", '"/a b"'), ("/100%", "/100%%"), ('/"', '"/\\""')],
)
def test_words_as_systemd_reads_them(word: str, written: str) -> None:
    assert unit_words([word]) == written


@pytest.mark.parametrize("place", ["/home/me/venv/bin/ivshmem", "/root/v/bin/python", "/tmp/v/x"])
def test_a_place_that_the_units_hide(place: str) -> None:
    with pytest.raises(ValueError, match="or give --user"):
        systemd.check_place([place])


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze")
@pytest.mark.parametrize("user", [True, False])
def test_systemd_reads_them(tmp_path: Path, user: bool) -> None:
    for name in UNITS:
        text = systemd.unit(systemd._read(name), [sys.executable, "-m", "ivshmem"], user=user)
        (tmp_path / name).write_text(text)
    scope = ["--user"] if user else []
    done = subprocess.run(
        ["systemd-analyze", "verify", *scope, "--man=no", str(tmp_path / "ivshmem.service")],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
    )
    mine = [line for line in done.stderr.splitlines() if "ivshmem" in line]
    assert not mine, mine
