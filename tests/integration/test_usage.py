"""What a person gets who calls the command line wrong, or asks what there is."""

from __future__ import annotations

import importlib
import json
import os
import re
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from support import commands
from support.stopping import users_environment

import ivshmem
from ivshmem import control
from ivshmem.cli.main import SUBCOMMANDS

IVSHMEM = [sys.executable, "-m", "ivshmem"]
pytestmark = pytest.mark.usefixtures("commands")
SERVER = [str(Path(sysconfig.get_path("scripts"), "ivshmem-server"))]


def run(*arguments: str, command: list[str] | None = None) -> subprocess.CompletedProcess[str]:
    if command is None:
        return commands.run(*arguments, env=users_environment())
    return subprocess.run(
        [*command, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=users_environment(),
    )


def test_the_bare_command_prints_help() -> None:
    helps = [run(*arguments) for arguments in ([], ["help"], ["--help"], ["-h"])]
    assert {each.returncode for each in helps} == {0}
    assert len({each.stdout for each in helps}) == 1
    for name in SUBCOMMANDS:
        assert re.search(rf"^    {name} ", helps[0].stdout, re.MULTILINE), name


@pytest.mark.parametrize(
    "words",
    [
        *(["serve"], ["connect"], ["status"], ["top"], ["reload"], ["qemu"], ["doctor"]),
        *(["evict", "1"], ["hold", "1"], ["release", "1"], ["save", "image"], ["load", "image"]),
        *(["bench"], ["guest", "serve"], ["channel", "ls"]),
    ],
    ids=" ".join,
)
def test_a_socket_needs_a_path(words: list[str]) -> None:
    options = ["-S"] if words[0] in {"guest", "qemu"} else ["-S", "--socket"]
    options += ["--control"] if words[0] in {"serve", "status"} else []
    for option in options:
        done = run(*words, option, "")
        assert (done.returncode, done.stdout) == (2, ""), option
        assert "a socket needs a path" in done.stderr


def test_no_server_has_no_path() -> None:
    with pytest.raises(OSError, match="a socket needs a path"):
        control.default_path("")


def test_help_of_a_subcommand() -> None:
    assert run("help", "evict").stdout == run("evict", "--help").stdout != ""


@pytest.mark.parametrize("group", ["guest", "systemd"])
def test_a_group_of_commands_alone_prints_help(group: str) -> None:
    wanted = run(group, "--help").stdout
    for words in ([group], [group, "help"], ["help", group], ["--", group]):
        done = run(*words)
        assert (done.returncode, done.stdout) == (0, wanted), words


@pytest.mark.parametrize(
    "words",
    [["help", "guest", "list"], ["guest", "help", "list"], ["guest", "list", "--help"]],
)
def test_help_of_a_command_below(words: list[str]) -> None:
    assert run(*words).stdout.startswith("usage: ivshmem guest list ")


@pytest.mark.parametrize("words", [["-h", "serve"], ["help", "help"], ["help", "--help"]])
def test_help_of_the_whole(words: list[str]) -> None:
    assert run(*words).stdout == run("--help").stdout


@pytest.mark.parametrize(("columns", "most"), [("0", 80), ("-5", 80), ("x", 80), ("60", 60)])
def test_help_is_as_wide_as_columns_says(
    monkeypatch: pytest.MonkeyPatch, columns: str, most: int
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    done = run("evict", "--help")
    assert most / 2 < max(map(len, done.stdout.splitlines())) <= most


def test_a_command_of_the_shell_that_is_misspelt(socket_path: str) -> None:
    with ivshmem.Server(socket_path, "64K").start():
        done = run("connect", "-S", socket_path, "-c", "hlep")
        assert done.stderr == "ivshmem: no command 'hlep': did you mean help?\n"
        done = run("connect", "-S", socket_path, "-c", "zzz")
        assert done.stderr == "ivshmem: no command 'zzz': help lists them\n"


def test_version() -> None:
    assert run("-V", command=SERVER).stdout == f"ivshmem {ivshmem.__version__}\n"
    for option in ("-V", "--version"):
        assert run(option).stdout == f"ivshmem {ivshmem.__version__}\n"


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_each_subcommand_is_where_the_table_says(name: str) -> None:
    home, text = SUBCOMMANDS[name]
    module = importlib.import_module(f"ivshmem.cli.{home}")
    assert module.add_to
    assert text
    assert text[0].islower()
    done = run(name, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: ivshmem {name} ")


WRONG = {
    "a subcommand": (["serv"], "'serv': did you mean serve?", "ivshmem --help"),
    "letters that changed places": (["sttaus"], "did you mean status?", "ivshmem --help"),
    "nothing like it": (["frobnicate"], "allowed are serve, connect,", "ivshmem --help"),
    "an option": (["serve", "--szie", "4M"], "did you mean --size?", "ivshmem serve --help"),
    "with =": (["serve", "--szie=4M"], "did you mean --size?", "ivshmem serve --help"),
    "an option of none": (["serve", "--zzz"], "arguments: --zzz (see", "ivshmem serve --help"),
    "another's option": (["qemu", "--supervise"], "--supervise", "ivshmem qemu --help"),
    "below a subcommand": (["guest", "lst"], "did you mean list?", "ivshmem guest --help"),
    "an option below": (["guest", "serve", "--pers"], "--peers?", "ivshmem guest serve --help"),
    "before the subcommand": (["--versoin"], "did you mean --version?", "ivshmem --help"),
    "a choice": (["serve", "--existing", "growx"], "did you mean grow?", "ivshmem serve --help"),
    "a word too many": (["status", "now"], "arguments: now", "ivshmem status --help"),
    "in capitals": (["SERVE"], "did you mean serve?", "ivshmem --help"),
    "help of nothing below": (["help", "guest", "lst"], "mean list?", "ivshmem guest --help"),
    "help of nothing": (["help", "serv"], "did you mean serve?", "ivshmem --help"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_usage(case: str) -> None:
    arguments, meant, page = WRONG[case]
    done = run(*arguments)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert meant in line
    assert line.endswith(f"(see {page})")
    assert run(*page.split()[1:]).returncode == 0


def test_wrong_usage_of_the_example_servers_command_line() -> None:
    done = run("-Q", command=SERVER)
    assert done.returncode == 2
    assert done.stderr.endswith("(see ivshmem-server --help)\n")


def test_doctor_knows_a_socket_for_datagrams(socket_path: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(socket_path)
        done = run("doctor", "--json", "-S", socket_path)
        os.unlink(socket_path)
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert checks["socket"]["state"] == "failed"
    assert "is a datagram socket" in checks["socket"]["found"]
    assert f"serve --daemon --socket {socket_path}.2" in checks["socket"]["fix"]
