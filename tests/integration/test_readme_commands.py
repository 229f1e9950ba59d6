"""The commands in README.md and docs/: a shell runs each, in the order of its page.

A page is a session. A `serve` listens until the next one takes its place, and the other commands
ask it. Where a page names no server, one with names and several vectors is there. Four peers are
connected, and answer what rings them. Paths, users and ports are replaced by those of a test.
"""

from __future__ import annotations

import contextlib
import getpass
import grp
import io
import os
import re
import select
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.pages import HOME, PAGES, blocks, indented, name_of, shell_lines
from support.waiting import PATIENCE

import ivshmem
from ivshmem.cli import main

# What does not run here, and why. What of it is ours is parsed.
NOT_RUN = {
    r"ivshmem guest (?!bundle)": "needs a device: tests/vm/test_guest_cli.py",
    r"ivshmem doctor 0000:": "needs a device: tests/vm/test_doctor.py",
    r"ivshmem forward --guest|ssh ": "needs a device: tests/vm/test_forward.py",
    r"ivshmem channel call ": "needs a program that replies: test_cli_channel_watch.py",
    r"ivshmem migrate ": "needs two QEMUs: tests/vm/test_migrate.py",
    r"ivshmem serve .*--hugepages": "needs huge pages in reserve: tests/vm/test_regions.py",
    r"numactl ": "needs a machine with two nodes",
    r"ivshmem top": "needs a terminal: tests/integration/test_cli_top.py",
    r"ivshmem bench( --seconds| *$)": "takes long: tests/integration/test_cli_bench.py",
    r"systemctl |/opt/ivshmem/": "needs systemd and root: tests/vm/test_systemd.py",
    r"(apt-get|pip|pipx|python3 -m venv) ": "installs packages",
    r"echo \w+ > /sys/": "changes the machine",
    r"python3 ivshmem.pyz guest setup": "changes the machine: tests/vm/test_guest_setup.py",
    r"ivshmem connect -S /run/ivshmem-0000": "needs a device: tests/vm/test_guest_setup.py",
    r"podman ": "needs root, and podman: tests/integration/test_container.py",
    r"bpftrace ": "needs root and the kernel's tracepoints: tests/vm/test_bpftrace.py",
    r"make ": "builds what is tested here: test_readme.py knows the targets",
}

WITHOUT_A_SERVER = r"--(config|name|file|print-schema)\b|-device"
SERVES = r"ivshmem serve(?!.* --(check|print-schema))"
# tests/vm/test_first_hour.py types what a tutorial says.
SESSIONS = [page for page in PAGES if shell_lines(page) and page.parent.name != "tutorial"]

IVSHMEM = f"""#!/bin/sh
case " $* " in
" forward "*) set -- "$@" -S "$XDG_RUNTIME_DIR/ivshmem.sock" ;;
*" -S "*|*" --con"*|*" --name "*|*" --file "*|*" -device "*|*" systemd "*|*" --print-"*) ;;
" guest "*) ;;
*) set -- "$@" -S "$XDG_RUNTIME_DIR/ivshmem.sock" ;;
esac
exec {sys.executable} -m ivshmem "$@"
"""
# It takes what `ivshmem qemu` prints, and is not given nothing.
QEMU = """#!/bin/sh
case "$*" in *ivshmem-*) ;; *) exit 1 ;; esac
"""
DEFAULT = """[region.default]
socket = "{folder}/ivshmem.sock"
size = "4M"
vectors = 4
names = true
channels = "1M"
"""


class Session:
    """A directory, a server, and four peers of it."""

    def __init__(self, page: Path, folder: Path) -> None:
        self.folder = folder
        self.peers: list[ivshmem.Client] = []
        self._server: subprocess.Popen[bytes] | None = None
        self._forward: subprocess.Popen[bytes] | None = None
        self._answering = threading.Thread(target=self._answer)
        self._ended, self._end = os.pipe()
        programs = folder / "bin"
        programs.mkdir()
        for name, text in (("ivshmem", IVSHMEM), ("qemu-system-x86_64", QEMU)):
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        for name in ("a", "b", "a b"):  # the same server by other paths
            (folder / f"{name}.sock").symlink_to("ivshmem.sock")
        self._files = self.placed("".join(blocks(page, "toml")[:1])).replace('"1G"', '"1M"')
        (folder / "file.toml").write_text(self._files)
        (folder / "default.toml").write_text(DEFAULT.format(folder=folder))
        self._environment = {
            **os.environ,
            "PATH": f"{programs}:{os.environ['PATH']}",
            "XDG_RUNTIME_DIR": str(folder),
            "HOME": str(folder),
            "NO_COLOR": "1",
        }

    def placed(self, text: str) -> str:
        """A line or a file with a test's paths, users and ports."""
        group, user = grp.getgrgid(os.getegid()).gr_name, getpass.getuser()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            text = re.sub("9400|2222|8080", str(free.getsockname()[1]), text)
        text = re.sub(r"/etc/ivshmem(-forward)?\.toml", f"{self.folder}/file.toml", text)
        text = re.sub(r"/tmp/example\.sock\b", f"{self.folder}/ivshmem.sock", text)
        text = re.sub(r"/run/ivshmem/", f"{self.folder}/", text)
        text = re.sub(r"/run/", f"{self.folder}/", text)
        text = re.sub(r"(gid:|group )kvm|(?<=group = \")kvm", rf"\g<1>{group}", text)
        return re.sub(r"(owner |allow )root|(user )libvirt-qemu", rf"\1\2{user}", text)

    def _start(self, line: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            ["/bin/sh", "-c", f"exec {self.placed(line)}"],
            env=self._environment,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def serve(self, line: str) -> None:
        """Start a server and its peers, in the place of the last one."""
        words = shlex.split(self.placed(line))
        if "--takeover" in words:
            old, self._server = self._server, self._start(line)
            assert old is not None
            _read_all(old)
            assert old.returncode == 0
            return
        self.stop()
        self._server = self._start(line)
        if "--config" in words:
            text = (self.folder / words[words.index("--config") + 1]).read_text()
            path = re.findall(r'socket = "(.*?)"', text)[0]
        elif "-S" in words:
            path = words[words.index("-S") + 1]
        else:
            path = f"{self.folder}/ivshmem.sock"
        for _ in range(4):
            self.peers.append(ivshmem.connect(path, timeout=PATIENCE, wait_for_server=True))
        self._answering = threading.Thread(target=self._answer)
        self._answering.start()

    def _answer(self) -> None:
        """Read all news and interrupts, and ring those who joined later after each."""
        with contextlib.suppress(ivshmem.ClosedError):
            watched: list[Any] = [self._ended, *self.peers]
            while self._ended not in select.select(watched, [], [])[0]:
                for peer in self.peers:
                    for event in peer.events(timeout=0):
                        if isinstance(event, ivshmem.Interrupt):
                            peer.ring_all([each for each in peer.peers if each > 3])

    def run(self, line: str) -> None:
        if self._server is None and not re.search(WITHOUT_A_SERVER, line):
            self.serve("ivshmem serve --config default.toml")
        process = self._start(line.replace("--peer 3", "--peer 3 --seconds 0.2"))
        allowed = {0}
        if line == "ivshmem bench --echo":  # until Ctrl-C
            assert process.stdout is not None
            assert b"waiting for a peer" in process.stdout.readline()
            process.send_signal(signal.SIGINT)
        elif line.startswith("ivshmem doctor"):
            allowed = {0, 1}  # it tells by its status whether it found anything to fix
        said = _read_all(process).decode()
        assert process.returncode in allowed, f"{line}\n{said}"
        assert "usage:" not in said

    def forward(self, line: str) -> None:
        """Start a forward, in the place of the last one."""
        self._end_forward()
        self._forward = self._start(line)
        assert self._forward.stdout is not None
        said = self._forward.stdout.readline()
        assert b"listens at" in said, said

    def _end_forward(self) -> None:
        if self._forward is not None:
            self._forward.terminate()
            said = _read_all(self._forward).decode()
            assert self._forward.returncode == 0, said
            self._forward = None

    def stop(self) -> None:
        self._end_forward()
        if self._server is not None:
            if self._answering.is_alive():
                os.write(self._end, b"x")
                self._answering.join()
                os.read(self._ended, 1)
            for peer in self.peers:
                peer.close()
            self.peers.clear()
            self._server.terminate()
            said = _read_all(self._server).decode()
            assert self._server.returncode == 0, said
            self._server = None

    def close(self) -> None:
        self.stop()
        os.close(self._ended)
        os.close(self._end)


def _read_all(process: subprocess.Popen[bytes]) -> bytes:
    try:
        return process.communicate(timeout=PATIENCE)[0]
    finally:
        process.kill()
        process.wait()


def not_run(line: str) -> bool:
    return any(re.match(pattern, line) for pattern in NOT_RUN)


@contextlib.contextmanager
def session(page: Path, folder: Path) -> Iterator[Session]:
    made = Session(page, folder)
    try:
        yield made
    finally:
        made.close()


@pytest.mark.sampled(16)
@pytest.mark.parametrize("page", SESSIONS, ids=name_of)
def test_each_command_runs(page: Path, directory: Path) -> None:
    directory.chmod(0o700)
    with session(page, directory) as here:
        for line in shell_lines(page):
            line = line.removeprefix(".venv/bin/")
            if not_run(line):
                continue
            if re.match(SERVES, line):
                here.serve(line)
            elif re.match(r"(nice .+)?ivshmem forward", line):
                here.forward(line)
            else:
                here.run(line)


def parts(line: str) -> list[list[str]]:
    """The words of each command of this package in a line, without what surrounds it."""
    found = []
    for part in re.split(r"\$\(|\)|\||&&|numactl \S+", line):
        words = shlex.split(part, comments=True)
        if words and re.fullmatch(r"(\S*/)?ivshmem", words[0]):
            found.append(words[1:])
    return found


@pytest.mark.parametrize("page", SESSIONS, ids=name_of)
def test_what_does_not_run_is_parsed(page: Path) -> None:
    for line in filter(not_run, shell_lines(page)):
        if "ivshmem" not in line:
            continue
        for words in parts(line):
            try:
                with contextlib.redirect_stderr(io.StringIO()) as said:
                    main._parser(words).parse_args(words)
            except SystemExit:
                pytest.fail(f"{line}: {said.getvalue()}")


def test_the_list_of_what_does_not_run_is_true() -> None:
    """Each pattern is needed, and the tests that it names are there."""
    lines = [line for page in SESSIONS for line in shell_lines(page)]
    for pattern, reason in NOT_RUN.items():
        assert any(re.match(pattern, line) for line in lines), pattern
        for name in re.findall(r"tests/\S+\.py", reason):
            assert (HOME / name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_stand_in_blocks_of_shell(page: Path) -> None:
    """What is indented is output, or part of a command line: no test runs it."""
    command = re.compile(r"^ {4}(\S*/)?(ivshmem|make|pip|apt-get|systemctl) ", re.MULTILINE)
    for block in indented(page):
        assert not command.search(block), block
