"""docs/tutorial/first-hour.md: each of its commands is typed, in its order, on terminals.

By night all of them are, in a copy of the sources, and the whole is timed. By day its QEMU starts,
and stops before the machine runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest
from support import debian
from support.emulator import QEMU
from support.pages import HOME
from support.served import Served
from support.shells import Shell
from support.waiting import PATIENCE, until

from ivshmem.cli import main
from ivshmem.qemu import cmdline

from . import image

PAGE = HOME / "docs/tutorial/first-hour.md"
LIMIT = 600.0  # seconds for all that is typed, on a machine that does nothing else
_LONG = 400.0  # seconds for one command: to boot two machines under TCG takes 130 here
TOOLS = ("gcc", "make", "qemu-img", "mmdebstrap", "genext2fs")

# What does not end by itself: a person goes on when it says that.
LASTING = {
    r"ivshmem serve ": r"^serving ",
    r"ivshmem guest wait ": r"^listening on ",
}


class Step(NamedTuple):
    """A block: what is typed, and where; or what some terminal shows then."""

    terminals: tuple[str, ...]
    lines: tuple[str, ...]


def steps() -> list[Step]:
    """The page's blocks, in its order. Output has no terminals."""
    found = []
    for kind, text in re.findall(r"^```(\w+)\n(.*?)^```", PAGE.read_text(), re.S | re.M):
        if kind == "text":
            found.append(Step((), tuple(text.splitlines())))
        elif kind == "sh":
            first, *rest = re.sub(r"\\\n\s*", "", text).splitlines()
            assert first.startswith("# "), f"no terminal is named: {text}"
            found.append(Step(tuple(first[2:].split(" and ")), tuple(rest)))
    return found


class Session:
    """A person with some terminals."""

    def __init__(self, folder: Path, undo: ExitStack) -> None:
        self._undo = undo
        self._folder = folder
        self._terminals: dict[str, Shell] = {}
        hidden = re.compile("PYTHON|VIRTUAL_ENV|PS1|CC$|NO_COLOR")
        self._environment = {k: v for k, v in os.environ.items() if not hidden.match(k)}
        self._environment["TERM"] = "xterm"
        self._opening: tuple[str, ...] = ()
        self._silent: set[str] = set()  # terminals that wait for a machine, which then says nothing

    def terminal(self, name: str) -> Shell:
        if name not in self._terminals:
            made = Shell(name, self._folder, self._environment)
            self._terminals[name] = self._undo.enter_context(made)
            made.ready(PATIENCE)
            for line in self._opening:
                self.run(made, line)
        return self._terminals[name]

    def do(self, step: Step) -> None:
        if not step.terminals:
            for line in step.lines:
                self.expect(line)
        elif step.terminals == ("each",):
            self._opening = step.lines
            for terminal in self._terminals.values():
                for line in step.lines:
                    self.run(terminal, line)
        elif step.terminals != ("host, as root",):
            for name in step.terminals:
                for line in step.lines:
                    self.run(self.terminal(name), line)

    def run(self, terminal: Shell, line: str) -> None:
        """Type a line; wait until it has ended, or says that it runs."""
        if terminal.name in self._silent:
            self._silent.remove(terminal.name)
            terminal.press("\n")  # as the page says
        terminal.ready(_LONG)
        began = time.monotonic()
        terminal.enter(line)
        if "-incoming" in line:
            self._silent.add(terminal.name)
        if started := re.match(r"sh vm\.sh (\S+) (\S+)", line):
            self._until_runs(self._folder / f"build/first-hour/{started[1]}-{started[2]}.qmp")
        else:
            said = next((said for kind, said in LASTING.items() if re.match(kind, line)), None)
            if said:
                terminal.wait(said, _LONG)
            else:
                terminal.ready(_LONG)
                assert not re.search(
                    r"^(ivshmem: (?!note: )|usage: |bash: |E: )", terminal.said, re.M
                ), terminal.said
        print(f"{time.monotonic() - began:6.1f} s  {terminal.name}: {line}")

    def _until_runs(self, monitor: Path) -> None:
        """QEMU answers at its monitor when all its devices are there."""

        def greets() -> bool:
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(PATIENCE)
                try:
                    client.connect(str(monitor))
                except OSError:
                    return False
                return client.recv(1) == b"{"

        until(greets)

    def expect(self, line: str) -> None:
        """A line on some terminal has these phrases, which two spaces separate."""
        pattern = re.compile(".*".join(map(re.escape, re.split(" {2,}", line))))

        def found() -> bool:
            for each in self._terminals.values():
                while each.read(0):
                    pass
            return any(pattern.search(each.said) for each in self._terminals.values())

        try:
            until(found)
        except Exception as error:
            screens = "".join(f"--- {t.name}\n{t.said}\n" for t in self._terminals.values())
            raise AssertionError(f"nowhere: {line}\n{screens}") from error

    def end(self) -> None:
        """What the page says in words."""
        for name in ("alice", "bob"):
            self.terminal(name).press("\x01x")
        for name in ("server", "server-there"):
            self.terminal(name).press("\x03")
        for name in ("alice", "bob", "server", "server-there", "alice-there", "bob-there"):
            self.terminal(name).ready(PATIENCE)


@pytest.mark.nightly
@pytest.mark.serial
@pytest.mark.timeout(1800)
def test_each_command_is_typed(directory: Path) -> None:
    """Prints the time of each command: `pytest -s` shows it."""
    if lacking := [tool for tool in (*TOOLS, QEMU) if not shutil.which(tool)]:
        pytest.skip(f"lacks {' '.join(lacking)}: see {PAGE.name} for what to install")
    checkout = directory / "checkout"
    for name in debian.sources():
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(HOME / name, checkout / name)
    script = checkout / "examples/vm.sh"
    script.write_text(without_kvm(script.read_text()))
    with ExitStack() as undo:
        session = Session(checkout, undo)
        # What else runs takes its share.
        crowd = max((os.getloadavg()[1] + 1) / (os.cpu_count() or 1), 1.0)
        began = time.monotonic()
        for step in steps():
            session.do(step)
        session.end()
        took = time.monotonic() - began
        print(f"{took:6.1f} s  all of {PAGE.name}, with downloads; machine {crowd:.1f} times busy")
    assert took < LIMIT * crowd


def without_kvm(script: str) -> str:
    """The script for a machine without KVM: on those that we test on, KVM hangs in a VM."""
    assert "-accel kvm -accel tcg " in script
    return script.replace("-accel kvm ", "").replace("qemu-system-x86_64", QEMU)


@pytest.fixture
def place(directory: Path, vm_image: image.Image) -> Path:
    """A directory as the page has it, with a disk of nothing."""
    (directory / "vm.sh").write_text(without_kvm((HOME / "examples/vm.sh").read_text()))
    (directory / "disk.ext2").write_bytes(bytes(1 << 20))
    (directory / "ivshmem.iso").write_bytes(bytes(1 << 16))
    shutil.copy(vm_image.kernel, directory / "kernel")
    shutil.copy(vm_image.initrd, directory / "initrd")
    return directory


def test_its_qemu_takes_the_device(place: Path) -> None:
    """Those arguments that the page gives the script, with the machine stopped."""
    lines = [line for step in steps() for line in step.lines if line.startswith("sh vm.sh")]
    assert len(lines) == 4
    ivshmem = f"{shlex.quote(sys.executable)} -m ivshmem"
    for line in lines:
        _, _, name, side, *_ = line.split()
        path = place / f"{side}.sock"
        with Served(str(path), size=1 << 20, vectors=1, channels=1 << 19):
            command = line.replace("ivshmem qemu", f"{ivshmem} qemu")
            process = subprocess.Popen(
                ["sh", "-c", f"exec {command} -S"],
                cwd=place,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            try:
                monitor = place / f"{name}-{side}.qmp"
                assert status(process, monitor) in ("prelaunch", "inmigrate"), line
            finally:
                process.terminate()
                said, _ = process.communicate(timeout=PATIENCE)
            assert not re.search(rb"warning|error|not supported", said), said


def status(process: subprocess.Popen[bytes], monitor: Path) -> str:
    """What QEMU says at its monitor, once all its devices are there."""

    def listens() -> bool:
        assert process.poll() is None, process.communicate()[0]
        with contextlib.suppress(OSError):  # it is bound, and listens a moment later
            client.connect(str(monitor))
            return True
        return False

    with socket.socket(socket.AF_UNIX) as client, client.makefile("rwb") as lines:
        client.settimeout(PATIENCE)
        until(listens)
        lines.readline()
        for word in ("qmp_capabilities", "query-status"):
            lines.write(json.dumps({"execute": word}).encode())
            lines.flush()
            answer = json.loads(lines.readline())
        found: str = answer["return"]["status"]
        return found


def test_the_script_has_the_iommu_that_the_command_prints() -> None:
    assert " ".join(cmdline.iommu("x86_64")) in (HOME / "examples/vm.sh").read_text()


def test_its_commands_are_parsed() -> None:
    commands = [line for step in steps() for line in step.lines]
    found = 0
    for line in commands:
        for part in re.split(r"\$\(|\)", line):
            words = shlex.split(part) if part.startswith("ivshmem ") else []
            if words:
                main._parser(words[1:]).parse_args(words[1:])
                found += 1
    assert found > 15
