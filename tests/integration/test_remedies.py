"""What our messages tell people to do: each is typed, and works."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.messages import said
from support.peer import FakeServer
from support.waiting import PATIENCE

import ivshmem
from ivshmem.cli import main as cli
from ivshmem.text import command

HOME = Path(ivshmem.__file__).parent
IVSHMEM = command([sys.executable, "-m", "ivshmem"])


# -- all of them, by reading the source ------------------------------------------------------------


def commands_said() -> list[str]:
    return sorted(
        {
            found
            for _, text in said()
            for found in re.findall(r"`((?:python -m )?ivshmem [^`]*)`", text)
            if "|" not in found and not found.endswith("[")
        }
    )


def test_the_source_is_read() -> None:
    assert len(said()) > 500
    assert len(commands_said()) > 5


def test_commands_in_messages_are_ours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each has a subcommand and options that there are."""
    monkeypatch.setattr(cli, "guarded", lambda *_: 0)
    for line in commands_said():
        try:
            check_command(line)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{line}: {error!r}\n{capsys.readouterr().err}") from error


def check_command(line: str) -> None:
    words = shlex.split(line.replace("python -m ", "").replace("..", ""))[1:]
    # What stands for a value of the reader's.
    words = ["1" if re.fullmatch("X|N|ID|PEER|SECONDS", word) else word for word in words]
    words = ["4M" if word == "SIZE" else word for word in words]
    shown_as_prefix = len(words) == 1  # as in "`ivshmem guest` opens it"
    with contextlib.ExitStack() as stack:
        if shown_as_prefix:
            stack.enter_context(contextlib.suppress(SystemExit))
            assert words[0] in cli_help()
        assert cli.main(words) == 0


@functools.cache
def cli_help() -> str:
    done = subprocess.run(
        [sys.executable, "-m", "ivshmem", "--help"], capture_output=True, text=True, check=True
    )
    return done.stdout


def test_no_message_installs_what_is_on_no_index() -> None:
    """The package itself is on none, so its extras are not either."""
    for path, text in said():
        assert "ivshmem[" not in text, (path, text)
        assert "pip install ivshmem" not in text, (path, text)


def test_libraries_in_messages_are_the_ones_that_are_missing() -> None:
    named = {name for _, text in said() for name in re.findall(r"pip install ([a-z][\w.-]*)", text)}
    modules = {
        "prometheus-client": "prometheus_client",
        "qemu.qmp": "qemu.qmp",
        "tomli": "tomli",
        "mcap": "mcap",
        "numpy": "numpy",
    }
    assert named == set(modules)
    for name in named - {"tomli"}:  # which Python before 3.11 needs
        assert importlib.util.find_spec(modules[name]), name


def test_no_message_opens_something_to_everybody() -> None:
    for path, text in said():
        assert not re.search(r"chmod (o|a|[+]|0?[0-7][0-7][2367])", text), (path, text)


# -- some of them, by typing them ----------------------------------------------------------------


def sh(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    line = re.sub(r"(^|\| |&& )ivshmem ", rf"\1{IVSHMEM} ", line)
    return subprocess.run(
        ["sh", "-c", line],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        cwd=folder,
    )


CONFIG = """
[region.a]
socket = "{0}/a"
[region.b]
socket = "{0}/b"
"""

# What somebody types; a part of what is said then; what they type instead.
TYPED: dict[str, tuple[str, str, str]] = {
    "a region of no file": (
        "ivshmem qemu --region a",
        "needs --config FILE",
        "ivshmem qemu --region a --config c.toml",
    ),
    "a master of several": (
        "ivshmem qemu --config c.toml --master",
        "choose one with --region NAME",
        "ivshmem qemu --config c.toml --master --region a",
    ),
    "an id of several": (
        "ivshmem qemu --config c.toml --id x",
        "choose one with --region NAME",
        "ivshmem qemu --config c.toml --id x --region a",
    ),
    "another size": (
        "ivshmem qemu -f m -l 1M",
        "omit --size",
        "ivshmem qemu -f m",
    ),
    "libvirt and a file": (
        "ivshmem qemu -f m --libvirt",
        "use --name",
        "ivshmem qemu --name ivshmem-remedy --libvirt",
    ),
    "an old chardev alone": (
        "ivshmem qemu -chardev socket,path=s,id=c",
        "needs -device ivshmem,...",
        "ivshmem qemu -chardev socket,path=s,id=c -device ivshmem,chardev=c",
    ),
    "an old device without its chardev": (
        "ivshmem qemu -device ivshmem,chardev=c",
        "give `-chardev socket,path=PATH,id=c`",
        "ivshmem qemu -device ivshmem,chardev=c -chardev socket,path=PATH,id=c",
    ),
    "a foreign server": (
        "ivshmem qemu -S foreign",
        "give --vectors",
        "ivshmem qemu -S foreign --vectors 2",
    ),
    "a check of no file": (
        "ivshmem serve --check",
        "needs --config FILE",
        "ivshmem serve --check --config c.toml",
    ),
    "a file where a socket goes": (
        "ivshmem serve -S m --daemon",
        "choose another path",
        "ivshmem serve -S {0}/m.2 --check --config c.toml || ivshmem serve --check --config c.toml",
    ),
    "top in a pipe": (
        "ivshmem top -S ours | cat; ivshmem top -S ours",
        "`ivshmem status` prints the same once",
        "ivshmem status -S ours",
    ),
    "status of nobody": (
        "ivshmem status -S nobody",
        "start the server (ivshmem serve), or give the path of one that runs",
        "ivshmem status -S ours",
    ),
    "a unit that is there": (
        "ivshmem systemd install --user --directory units",
        "--directory DIR writes elsewhere",
        "ivshmem systemd install --user --directory elsewhere",
    ),
    "that unit, replaced": (
        "ivshmem systemd install --user --directory units",
        "--force",
        "ivshmem systemd install --user --directory units --force",
    ),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("remedies")
    (folder / "c.toml").write_text(CONFIG.format(folder))
    (folder / "m").write_bytes(bytes(1 << 16))
    (folder / "units").mkdir()
    (folder / "units" / "ivshmem.service").write_text("mine")
    serve = sh(f"ivshmem serve --daemon -S {folder}/ours -p {folder}/pid", folder)
    assert serve.returncode == 0, serve.stderr
    yield folder
    os.kill(int((folder / "pid").read_text()), 15)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("case", TYPED)
def test_what_is_advised_works(case: str, place: Path) -> None:
    typed, said, instead = TYPED[case]
    with contextlib.ExitStack() as stack:
        if "foreign" in typed:
            greet: Callable[[socket.socket], object] = lambda s: (s.send(bytes(8)), s.recv(1))  # noqa: E731
            stack.enter_context(FakeServer(str(place / "foreign"), greet))
        wrong = sh(typed, place)
    assert wrong.returncode != 0
    assert said in wrong.stderr
    assert len(wrong.stderr.splitlines()) <= 2
    right = sh(instead.format(place), place)
    assert right.returncode == 0, right.stderr


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="needs root")
def test_a_hugetlbfs_is_mounted_by_what_is_printed(tmp_path: Path) -> None:
    line = f"""
        for place in $(awk '$3 == "hugetlbfs" {{print $2}}' /proc/self/mounts); do
            umount $place; done
        said=$({IVSHMEM} qemu --hugepages 2M 2>&1) && exit 3
        fix=${{said#*as root: }}
        mkdir -p dev && mount -t tmpfs none /dev/shm
        eval "$(echo "$fix" | sed 's,/dev/hugepages,{tmp_path}/hugepages,g')" || exit 4
        {IVSHMEM} qemu --hugepages 2M
    """
    if not Path("/sys/kernel/mm/hugepages/hugepages-2048kB").exists():
        pytest.skip("no huge pages in this kernel")
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", line],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert f"mem-path={tmp_path}/hugepages2M/ivshmem" in done.stdout
