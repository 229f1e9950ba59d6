"""Which processes are taken for a QEMU: real ones, by the names that a QEMU can have."""

from __future__ import annotations

import inspect
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ivshmem.qemu import programs
from ivshmem.qemu.programs import is_qemu, is_qemu_name

SLEEPER = """
import sys
if sys.argv[1:]:
    open('/proc/self/comm', 'w').write(sys.argv[1])
print('ready', flush=True)
sys.stdin.read()
"""


class Runs:
    """Starts copies of this interpreter under other names."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started: list[subprocess.Popen[str]] = []

    def start(self, name: str, comm: str = "") -> int:
        program = self._folder / name
        shutil.copy(os.path.realpath(sys.executable), program)
        started = subprocess.Popen(
            [str(program), "-S", "-c", SLEEPER, *filter(None, [comm])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={"PYTHONHOME": sys.base_prefix},
        )
        self._started.append(started)
        assert started.stdout is not None
        assert started.stdout.readline() == "ready\n"
        return started.pid

    def end(self) -> None:
        for started in self._started:
            started.communicate("")


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Runs]:
    runs = Runs(tmp_path)
    yield runs
    runs.end()


@pytest.mark.parametrize(
    "name",
    ["qemu-system-x86_64", "qemu-system-aarch64", "qemu-kvm", "kvm", ".qemu-system-x86_64-wrapped"],
)
def test_by_its_own_name(runs: Runs, name: str) -> None:
    pid = runs.start(name)
    assert is_qemu(pid)
    assert is_qemu(pid, ask_process=True)


@pytest.mark.parametrize("name", ["python3", "my-qemu", "ivshmem", "xkvm"])
def test_others_are_none(runs: Runs, name: str) -> None:
    pid = runs.start(name)
    assert is_qemu(pid, name, ask_process=True) is False


@pytest.mark.parametrize("ask", [False, True])
def test_by_its_program_where_it_was_given_another_name(runs: Runs, ask: bool) -> None:
    """qemu-system-x86_64 -name x,process=web1"""
    pid = runs.start("qemu-system-x86_64", "web1")
    assert Path(f"/proc/{pid}/comm").read_text() == "web1\n"
    assert is_qemu(pid, "web1", ask_process=ask)


def test_by_a_program_that_was_deleted(runs: Runs, tmp_path: Path) -> None:
    """By an upgrade of the package, say."""
    pid = runs.start("qemu-system-x86_64", "web1")
    (tmp_path / "qemu-system-x86_64").unlink()
    assert os.readlink(f"/proc/{pid}/exe").endswith("(deleted)")
    assert is_qemu(pid, "web1")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_another_users(runs: Runs) -> None:
    """Whose program is hidden, and whose command line is not."""
    pid = runs.start("qemu-system-x86_64", "web1")
    program = (
        f"{inspect.getsource(programs)}\n"
        "os.setgroups([]), os.setgid(65534), os.setuid(65534)\n"
        f"print(is_qemu({pid}, 'web1'), is_qemu({pid}, 'web1', ask_process=True))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-"], input=program, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "True"], "the server does not look at command lines"


@pytest.mark.parametrize(
    ("process", "answer"),
    [("qemu-system-x86", True), ("kvm", True), ("python", False), ("my-qemu", False), ("?", None)],
)
@pytest.mark.parametrize("pid", [0, 1 << 30])
def test_of_one_that_is_gone_or_hidden_by_its_name(process: str, answer: object, pid: int) -> None:
    assert is_qemu(pid, process, ask_process=True) is answer


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("/usr/bin/qemu-system-x86_64", True),
        ("/usr/libexec/qemu-kvm", True),
        ("/usr/bin/kvm", True),
        ("qemu-system-x86_64 (deleted)", True),
        ("/nix/store/x/bin/.qemu-system-x86_64-wrapped", True),
        ("/opt/qemu/bin/python", False),
        ("", False),
    ],
)
def test_names(name: str, answer: bool) -> None:
    assert is_qemu_name(name) == answer
