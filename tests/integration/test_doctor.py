"""`ivshmem doctor` on a host: each trouble is made, found, and fixed by what is printed."""

import fcntl
import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support.emulator import QEMU, needs_qemu
from support.leaks import names_in
from support.mounts import HUGE, mounted, root

import ivshmem
import ivshmem.memory.sizes
import ivshmem.qemu.cmdline
from ivshmem.doctor import guest, guest_or_host, host, memory, request
from ivshmem.doctor import host as doctor_host
from ivshmem.doctor.check import Check
from ivshmem.guest import pci
from ivshmem.peer import inquiry

TIMEOUT = 60.0
IVSHMEM = [sys.executable, "-m", "ivshmem"]
NAMES = [
    *("kernel", "QEMU", "QEMU's ivshmem", "socket", "socket permission", "server"),
    *("memory", "memory permission", "huge pages", "space"),
    *("locked memory", "open files", "confinement"),
]

# What is imported here, only root may be able to read.
AS_NOBODY = """
import os, sys
from ivshmem.cli.main import SUBCOMMANDS, main
for home, _ in SUBCOMMANDS.values():
    __import__(f"ivshmem.cli.{home}")
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
sys.exit(main(["doctor", "--json", *sys.argv[1:]]))
"""

needs_root = pytest.mark.skipif(not root, reason="needs root")


def shell(command: str, *prefix: str) -> subprocess.CompletedProcess[str]:
    words = [*prefix, "sh", "-c", command]
    return subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT, check=False)


def by_name(checks: list[Check]) -> dict[str, Check]:
    assert [check.name for check in checks] == NAMES
    return {check.name: check for check in checks}


def read(result: subprocess.CompletedProcess[str]) -> dict[str, Check]:
    """The checks that a process printed as JSON."""
    assert result.stdout, result.stderr
    answer = json.loads(result.stdout)
    checks = by_name([Check(**check) for check in answer["checks"]])
    failed = [check for check in checks.values() if check.state == "failed"]
    assert answer["side"] == "host"
    assert answer["well"] == (result.returncode == 0) == (not failed)
    return checks


def run_as_nobody(*arguments: str) -> dict[str, Check]:
    words = [sys.executable, "-c", AS_NOBODY, "--host", *arguments]
    return read(subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT, check=False))


def from_root(command: str) -> str:
    """The command inside of `su -c` or `sudo sh -c`."""
    words = shlex.split(command)
    assert words[0] in ("su", "sudo")
    assert words[-2] == "-c"
    return words[-1]


def failures(checks: dict[str, Check]) -> list[str]:
    return [check.name for check in checks.values() if check.state == "failed"]


class Host:
    """The doctor for a host with a QEMU that is a script, and what is to be shared there."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.qemu = directory / "qemu-system-x86_64"
        self.socket = str(directory / "socket")
        self.daemons: list[int] = []
        self.write_qemu("echo 'name \"ivshmem-plain\"'; echo 'name \"ivshmem-doorbell\", bus PCI'")

    def write_qemu(self, script: str) -> None:
        self.qemu.write_text(f"#!/bin/sh\n{script}\n")
        self.qemu.chmod(0o755)

    def examine(self, **wishes: Any) -> dict[str, Check]:
        wished = request.Request(qemu=str(self.qemu), **{"socket": self.socket, **wishes})
        return by_name(list(doctor_host.examine_host(wished)))

    def failure(self, **wishes: Any) -> Check:
        """What fails alone."""
        checks = self.examine(**wishes)
        (name,) = failures(checks)
        return checks[name]

    def run(self, command: str) -> None:
        """Run a command that fixes something; servers that it starts are ended with the test."""
        result = shell(command)
        if started := re.search(r", pid (\d+)$", result.stdout, re.MULTILINE):
            self.daemons.append(int(started[1]))
        assert result.returncode == 0, result.stderr

    def grant(self, command: str) -> bool:
        """Run a command that gives one user rights; False if it has to be installed before."""
        assert "o+" not in command  # never to everybody
        if command.startswith("apt-get install -y acl && ") and not shutil.which("setfacl"):
            return False
        self.run(command)
        return True

    def fix(self, name: str, **wishes: Any) -> Check:
        """What fails, and is gone after the printed command. Other things may fail then."""
        checks = self.examine(**wishes)
        check = checks[name]
        assert failures(checks)[0] == name, checks
        self.run(check.fix)
        after = self.examine(**wishes)[name]
        assert after.state in ("ok", "warning"), after
        return check


@pytest.fixture
def here(directory: Path) -> Iterator[Host]:
    host = Host(directory)
    yield host
    for pid in host.daemons:
        end(pid)


def end(pid: int) -> None:
    """End a daemon, which is not our child, and wait until it is gone."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        assert select.select([pidfd], [], [], TIMEOUT)[0]
    finally:
        os.close(pidfd)


@pytest.fixture
def served(here: Host) -> Iterator[ivshmem.Server]:
    with ivshmem.Server(here.socket, "1M", vectors=2).start() as server:
        yield server


class TestWell:
    def test_a_server(self, here: Host, served: ivshmem.Server) -> None:
        with ivshmem.connect(here.socket) as client:
            checks = here.examine(size="1M")
            assert failures(checks) == []
            assert checks["server"].found.endswith("): 1M, 2 vectors, 1 peer")
            assert checks["server"].found.startswith(f"pid {os.getpid()} (")
            assert checks["memory"].found == "the server has it"
            assert checks["huge pages"] == Check("host", "huge pages", "skipped", "not asked for")
            assert list(client.events(timeout=0)) == []  # nobody became a peer by asking

    def test_plain_memory_needs_no_server(self, here: Host) -> None:
        path = here.directory / "memory"
        for exists in (False, True):
            if exists:
                ivshmem.Region.create("1M", path=path).close()
            checks = here.examine(socket=None, path=str(path))
            assert failures(checks) == []
            for name in ("socket", "socket permission", "server"):
                assert checks[name].state == "skipped"
                assert checks[name].found == "plain memory needs no server"
        assert checks["memory"].found == f"{path}, 1M"

    def test_nothing_is_changed(self, here: Host, served: ivshmem.Server) -> None:
        before = sorted(here.directory.rglob("*")), names_in()
        here.examine(name="ivshmem-doctor-none")
        here.examine(directory=str(here.directory))
        here.examine(path=str(here.directory / "none"))
        assert (sorted(here.directory.rglob("*")), names_in()) == before


class TestProgram:
    def test_kernel(self, here: Host, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("platform.release", lambda: "5.4.0-12-generic")
        check = here.examine()["kernel"]
        assert check.state == "failed"
        assert "apt-get install linux-image-" in check.fix
        monkeypatch.setattr("platform.release", lambda: "5.10.0")
        assert here.examine()["kernel"].state == "ok"

    def test_no_qemu(self, here: Host, served: ivshmem.Server) -> None:
        here.qemu.unlink()
        check = here.failure()
        assert (check.name, check.found) == ("QEMU", f"no program {here.qemu}")
        assert check.fix.endswith("apt-get install qemu-system-x86")
        assert here.examine()["QEMU's ivshmem"].found == "needs a check that failed: QEMU"

    def test_qemu_of_another_kind(self, here: Host, served: ivshmem.Server) -> None:
        here.qemu = here.directory / "qemu-system-aarch64"
        assert here.failure().fix.endswith("apt-get install qemu-system-arm")

    @pytest.mark.nightly  # apt-get takes three seconds
    @pytest.mark.skipif(not shutil.which("apt-get"), reason="no Debian")
    def test_the_package_exists(self, here: Host) -> None:
        here.qemu.unlink()
        command = here.examine()["QEMU"].fix.replace("install", "install --simulate")
        if shell("apt-cache show qemu-system-x86").returncode:
            pytest.skip("no package lists: apt-get update")
        assert shell(command).returncode == 0

    def test_qemu_that_cannot_be_run(self, here: Host, served: ivshmem.Server) -> None:
        here.qemu.write_bytes(b"\x7fELF nonsense")
        check = here.failure()
        assert (check.name, check.found) == (
            "QEMU",
            f"{here.qemu} cannot be run: Exec format error",
        )

    def test_qemu_without_ivshmem(self, here: Host, served: ivshmem.Server) -> None:
        for script, missing in (
            ("echo 'name \"e1000\", bus PCI'", "ivshmem-plain, ivshmem-doorbell"),
            ("echo 'name \"ivshmem-plain\", bus PCI'", "ivshmem-doorbell"),
        ):
            here.write_qemu(script)
            check = here.failure()
            assert check.name == "QEMU's ivshmem"
            assert check.found == f"{here.qemu} is built without {missing}"
            assert check.fix.endswith("apt-get install qemu-system-x86")

    def test_qemu_that_hangs(
        self, here: Host, served: ivshmem.Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(host, "_SECONDS", 0.2)
        here.write_qemu("[ $1 = --version ] || exec sleep 60")
        check = here.failure()
        assert check.name == "QEMU's ivshmem"
        assert check.found == f"{here.qemu} -device help: no answer in 0.2 seconds"

    @needs_qemu
    def test_the_real_one(self, here: Host) -> None:
        here.qemu = Path(shutil.which(QEMU) or "")
        checks = here.examine()
        assert checks["QEMU"].found.startswith(f"{here.qemu}, version ")
        assert checks["QEMU's ivshmem"].state == "ok"


class TestServer:
    def test_none(self, here: Host) -> None:
        check = here.fix("socket", size="64K")
        assert check.found == f"no {here.socket}: no server listens there"
        assert inquiry.ask(here.socket, TIMEOUT)["size"] == 1 << 16

    def test_a_stale_socket(self, here: Host) -> None:
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(here.socket)
        check = here.fix("socket")
        assert check.found == f"{here.socket} is stale: no server listens there"

    def test_no_socket(self, here: Host) -> None:
        Path(here.socket).write_text("precious")
        check = here.examine()["socket"]
        assert check.found == f"{here.socket} is not a socket: no server can listen there"
        here.run(check.fix)
        assert Path(here.socket).read_text() == "precious"
        here.socket += ".2"
        assert failures(here.examine()) == []

    def test_no_directory(self, here: Host) -> None:
        here.socket = str(here.directory / "a b" / "c" / "socket")
        check = here.examine()["socket"]
        assert check.found == f"no directory {here.directory}/a b/c"
        here.run(check.fix)
        here.fix("socket")

    def test_a_path_that_is_too_long(self, here: Host) -> None:
        here.socket = str(here.directory / ("x" * 108))
        check = here.examine()["socket"]
        assert check.state == "failed"
        assert "a socket path has at most 107 bytes" in check.found
        assert check.fix == f"{' '.join(IVSHMEM)} serve --daemon"

    def test_another_size(self, here: Host) -> None:
        here.fix("socket", size="64K")
        check = here.failure(size="128K")
        assert "64K, 1 vector, 0 peers, not the 128K asked for" in check.found
        here.run(check.fix)
        assert inquiry.ask(here.socket, TIMEOUT)["size"] == 1 << 16  # others may use it
        here.socket += ".2"
        assert failures(here.examine(size="128K")) == []

    def test_nobody_accepts(self, here: Host, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("ivshmem.doctor.server._SECONDS", 0.3)
        code = (
            "import socket, sys; s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]);"
            " s.listen(0); c = socket.socket(socket.AF_UNIX); c.connect(sys.argv[1]);"
            " print(flush=True); input()"
        )
        words = [sys.executable, "-c", code, here.socket]
        pipe = subprocess.PIPE
        with subprocess.Popen(words, stdin=pipe, stdout=pipe) as stuck:
            assert stuck.stdout is not None
            stuck.stdout.readline()
            check = here.examine()["server"]
            assert check.found.startswith(f"pid {stuck.pid} (")
            assert check.found.endswith("the server accepts nobody: no answer in 0.3 seconds")
            here.run(check.fix)
            assert stuck.poll() is None
            here.socket += ".2"
            assert failures(here.examine()) == []
            stuck.kill()

    def test_a_server_of_another_make(
        self, here: Host, monkeypatch: pytest.MonkeyPatch, directory: Path
    ) -> None:
        monkeypatch.setattr("ivshmem.doctor.server._SECONDS", 0.3)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(here.socket)
            listener.listen()
            checks = here.examine()  # it runs in a Python, so it might have been ours
            assert failures(checks) == []
            assert checks["server"].state == "warning"
            assert "no answer, so this may not be an ivshmem server" in checks["server"].found
            assert checks["open files"].state == "skipped"
            listener.accept()[0].close()
        os.unlink(here.socket)

    def test_a_server_that_is_no_python_is_not_asked(self, here: Host) -> None:
        """QEMU's example server would tell every guest of a new peer, or even end."""
        program = here.directory / "ivshmem-server"
        shutil.copy(os.path.realpath(sys.executable), program)
        code = (
            "import select, socket, sys; s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]);"
            " s.listen(); print(flush=True); input();"
            " print(select.select([s], [], [], 0)[0] == [], flush=True)"
        )
        base = Path(os.path.realpath(sys.executable)).parent.parent
        with subprocess.Popen(
            [program, "-S", "-c", code, here.socket],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={"PYTHONHOME": str(base)},
        ) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == "\n"
            check = here.examine()["server"]
            assert check.state == "warning"
            assert check.found.startswith(f"pid {other.pid} ({program}")
            assert "another server program, which was not asked" in check.found
            assert other.communicate("\n", timeout=TIMEOUT)[0] == "True\n"


@needs_root
class TestPermission:
    def test_of_a_socket(self, here: Host, served: ivshmem.Server) -> None:
        os.chmod(here.socket, 0o700)
        arguments = ["-S", here.socket, "--qemu", str(here.qemu)]
        checks = run_as_nobody(*arguments)
        assert failures(checks) == ["socket permission"]
        check = checks["socket permission"]
        assert check.found == f"nobody may not: {here.socket} (srwx------ root:root)"
        assert checks["server"].found == "needs a check that failed: socket permission"
        if not here.grant(from_root(check.fix)):
            return
        checks = run_as_nobody(*arguments)
        assert failures(checks) == []
        # Whose server it is, only root and its own user can see.
        assert checks["server"].state == "warning"
        assert "was not asked" in checks["server"].found
        with socket.socket(socket.AF_UNIX) as control:
            control.bind(f"{here.socket}.control")  # as ours have, and others have not
            checks = run_as_nobody(*arguments)
        assert checks["server"].found.startswith("a process that cannot be seen from here: 1M")

    def test_of_a_directory_on_the_way(self, here: Host, served: ivshmem.Server) -> None:
        here.directory.chmod(0o700)
        arguments = ["-S", here.socket, "--qemu", "/bin/true"]
        check = run_as_nobody(*arguments)["socket permission"]
        assert check.found == f"nobody may not: {here.directory} (drwx------ root:root)"
        if not here.grant(from_root(check.fix)):
            return
        here.run(f"chmod o+w {here.socket}")
        assert run_as_nobody(*arguments)["socket permission"].state == "ok"

    def test_for_another_user(self, here: Host, served: ivshmem.Server) -> None:
        here.directory.chmod(0o700)
        os.chmod(here.socket, 0o700)
        check = here.examine(user="nobody")["socket permission"]
        assert check.fix.count("setfacl -m u:nobody:") == 2
        if here.grant(check.fix):
            assert here.examine(user="nobody")["socket permission"].state == "ok"

    def test_for_libvirt(
        self, here: Host, served: ivshmem.Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("ivshmem.doctor.permissions.LIBVIRT_USERS", ("no-such-user", "nobody"))
        os.chmod(here.socket, 0o700)
        checks = here.examine()
        assert failures(checks) == []
        check = checks["socket permission"]
        assert check.state == "warning"
        assert check.found.startswith("root may; nobody, the user of libvirt's QEMUs, may not: ")
        assert "--group kvm --mode 0660" in check.found
        assert "o+" not in check.fix
        if here.grant(check.fix):
            assert here.examine()["socket permission"].state == "ok"

    @pytest.mark.parametrize("who", ["u", "g", "o"])
    def test_the_class_that_counts(self, here: Host, who: str) -> None:
        """Who owns a file, or is of its group, has no use for others' rights."""
        path = here.directory / "memory"
        ivshmem.Region.create("64K", path=path).close()
        uid, gid = {"u": (65534, 0), "g": (0, 65534), "o": (0, 0)}[who]
        os.chown(path, uid, gid)
        path.chmod({"u": 0o077, "g": 0o707, "o": 0o770}[who])
        arguments = ["--file", str(path), "--qemu", str(here.qemu)]
        check = run_as_nobody(*arguments)["memory permission"]
        assert check.state == "failed"
        if here.grant(check.fix if who == "u" else from_root(check.fix)):
            assert failures(run_as_nobody(*arguments)) == []

    def test_of_a_place_for_memory(self, here: Host) -> None:
        here.directory.chmod(0o755)
        for arguments in (["--file", f"{here.directory}/new"], ["-m", str(here.directory)]):
            check = run_as_nobody(*arguments, "--qemu", str(here.qemu))["memory permission"]
            assert check.found == f"nobody may not: {here.directory} (drwxr-xr-x root:root)"
        if here.grant(from_root(check.fix)):
            assert failures(run_as_nobody(*arguments, "--qemu", str(here.qemu))) == []

    def test_nobody_can_look_as_another(self, here: Host) -> None:
        words = [sys.executable, "-c", AS_NOBODY, "-S", "/none/socket", "-u", "root"]
        words += ["--file", f"{here.directory}/x"]
        result = subprocess.run(words, capture_output=True, text=True, check=False)
        assert result.returncode == 1
        assert result.stderr == (
            "ivshmem: only root can check the permissions of root: run this as root, or as root\n"
        )

    def test_no_such_user(self, here: Host, served: ivshmem.Server) -> None:
        words = [*IVSHMEM, "doctor", "--user", "no-such-user", "-S", here.socket]
        result = subprocess.run(words, capture_output=True, text=True, check=False)
        assert (result.returncode, result.stderr) == (1, "ivshmem: no such user: no-such-user\n")


class TestMemory:
    @pytest.mark.parametrize(
        ("size", "wanted", "larger"),
        [(3000, None, "64K"), (5000, "64K", "64K"), (1 << 16, "128K", "128K")],
    )
    def test_too_short(self, here: Host, size: int, wanted: str | None, larger: str) -> None:
        path = here.directory / "me mory"
        path.write_bytes(b"x" * size)
        check = here.fix("memory", socket=None, path=str(path), size=wanted)
        assert path.read_bytes()[:size] == b"x" * size
        grown = path.stat().st_size
        assert grown == ivshmem.memory.sizes.parse_size(larger) or (
            size == 3000 and grown == 4096
        ), check
        assert path.stat().st_blocks * 512 >= path.stat().st_size

    def test_too_large(self, here: Host) -> None:
        """QEMU is given the size that it has: others may use all of it."""
        path = here.directory / "memory"
        ivshmem.Region.create("1M", path=path).close()
        check = here.failure(socket=None, path=str(path), size="64K")
        assert check.name == "memory"
        assert check.found == f"{path} has 1M, not the 64K asked for: give QEMU its size"
        assert shlex.split(check.fix) == ivshmem.qemu.cmdline.plain(str(path), 1 << 20)

    def test_no_file(self, here: Host) -> None:
        path = here.directory / "memory"
        os.mkfifo(path)
        check = here.examine(socket=None, path=str(path))["memory"]
        assert check.found == f"{path}: it is a FIFO, not a regular file: choose another path"
        beside = shlex.split(check.fix)[-1]
        assert here.examine(socket=None, path=beside)["memory"].state == "ok"
        assert stat.S_ISFIFO(path.stat().st_mode)
        path = here.directory / "none" / "memory"
        here.fix("memory", socket=None, path=str(path))

    def test_no_directory_for_it(self, here: Host) -> None:
        here.fix("memory", socket=None, directory=str(here.directory / "a b"))

    def test_a_size_that_no_guest_could_use(self, here: Host) -> None:
        check = here.examine(size="3M")["memory"]
        assert "a region cannot have 3M: it must be a power of two" in check.found
        here.run(check.fix)
        assert failures(here.examine()) == []
        assert inquiry.ask(here.socket, TIMEOUT)["size"] == 1 << 22

    def test_more_than_the_machine_has(self, here: Host) -> None:
        checks = here.examine(size="1P")
        assert failures(checks) == ["socket", "space"]
        assert checks["space"].found == "1P does not fit into this machine's memory"
        here.run(checks["space"].fix)
        assert failures(here.examine()) == []

    @needs_root
    def test_no_space_on_a_tmpfs(self, here: Host) -> None:
        with mounted("tmpfs", "size=1M") as place:
            (place / "folder").mkdir()
            (place / "other").write_bytes(bytes(300_000))
            wishes = {"socket": None, "path": str(place / "folder" / "memory"), "size": "1M"}
            check = here.fix("space", **wishes)
            assert check.found.startswith("1M needed, ")
            ivshmem.Region.create("1M", path=wishes["path"]).close()
            assert failures(here.examine(**wishes)) == []

    @needs_root
    def test_a_sparse_file_that_cannot_be_filled(self, here: Host) -> None:
        with mounted("tmpfs", "size=1M") as place:
            path = place / "memory"
            path.touch()
            os.truncate(path, 4 << 20)
            here.fix("space", socket=None, path=str(path))

    def test_no_space_on_a_disk(self, here: Host, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(memory, "_mount", lambda _: ("/mnt", "ext4"))
        wishes = {"socket": None, "path": str(here.directory / "memory"), "size": "1P"}
        check = here.failure(**wishes)
        assert check.name == "space"
        assert check.found.endswith("free on /mnt; /dev/shm may have space")
        assert "--size 1P --name memory" in check.fix


@needs_root
class TestHugePages:
    def test_short_and_fixed(self, here: Host) -> None:
        knob = HUGE / "hugepages-2048kB" / "nr_hugepages"
        if not knob.exists():
            pytest.skip("no huge pages of 2M")
        with knob.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # as support.mounts does
            before = int(knob.read_text())
            free = int((knob.parent / "free_hugepages").read_text())
            size = 2 << 20
            while size >> 21 <= free:
                size *= 2
            try:
                wishes = {"size": str(size), "hugepages": "2M"}
                check = here.examine(**wishes)["huge pages"]
                assert check.state == "failed"
                assert check.found.startswith(f"{size >> 21} huge pages of 2M are needed, ")
                here.run(check.fix)
                if int(knob.read_text()) < size >> 21:
                    pytest.skip("memory is too fragmented")
                assert here.examine(**wishes)["huge pages"].state == "ok"
                with (
                    ivshmem.Region.create(size, hugepages="2M") as region,
                    ivshmem.Server(here.socket, region).start(),
                ):
                    checks = here.examine(**wishes)
                    assert failures(checks) == []
                    assert checks["huge pages"].found == "allocated when the memory was created"
            finally:
                knob.write_text(str(before))

    def test_a_server_without(self, here: Host, served: ivshmem.Server) -> None:
        check = here.examine(hugepages=True)["server"]
        assert check.found.endswith(": 1M, 2 vectors, 0 peers, not in huge pages")
        assert f" --socket {here.socket}.2 " in check.fix
        assert check.fix.endswith(f"serve --daemon --socket {here.socket}.2 --hugepages")

    def test_of_a_size_that_is_not_offered(self, here: Host) -> None:
        check = here.examine(hugepages="3M")["huge pages"]
        assert check.found.startswith("this machine has no huge pages of 3M; it offers ")
        assert check.fix.endswith(f"serve --daemon --socket {here.socket} --hugepages")

    def test_where_pages_are_small(self, here: Host) -> None:
        path = str(here.directory / "memory")
        check = here.failure(socket=None, path=path, hugepages="2M")
        assert check.found.startswith(f"{path} has pages of 4K, not of 2M;")
        assert check.fix.endswith("--hugepages 2M")
        assert "--file" not in check.fix

    def test_of_a_mount_are_counted_without_asking(self, here: Host) -> None:
        with mounted("hugetlbfs", "pagesize=2M") as place:
            free = int((HUGE / "hugepages-2048kB/free_hugepages").read_text())
            wanted = f"{2 << max(free, 1).bit_length()}M"
            check = here.failure(socket=None, path=str(place / "memory"), size=wanted)
            assert check.name == "huge pages"


class TestLimits:
    """Of processes of their own."""

    def doctor(self, here: Host, *more: str) -> str:
        words = ["doctor", "--json", "-S", here.socket, "--qemu", str(here.qemu), *more]
        return shlex.join([*IVSHMEM, *words])

    def test_open_files(self, here: Host) -> None:
        limit = "ulimit -S -n 150"  # hard ones: tests/vm/test_doctor.py
        with ivshmem.Server(here.socket, 4096, vectors=64).start():
            command = self.doctor(here)
            checks = read(shell(f"{limit}; {command}"))
            assert failures(checks) == ["open files"]
            check = checks["open files"]
            assert check.found == "QEMU opens 164 with 1 peer of 64 vectors, and 150 are allowed"
            assert failures(read(shell(f"{limit}; {check.fix}; {command}"))) == []

    @needs_root
    def test_locked_memory(self, here: Host, served: ivshmem.Server) -> None:
        limit = "ulimit -S -l 64"
        powerless = ["setpriv", "--bounding-set", "-ipc_lock", "--inh-caps", "-ipc_lock"]
        command = self.doctor(here)
        checks = read(shell(f"{limit}; {command}", *powerless))
        assert failures(checks) == []
        assert checks["locked memory"].state == "warning"
        checks = read(shell(f"{limit}; {command} --lock", *powerless))
        assert failures(checks) == ["locked memory"]
        check = checks["locked memory"]
        assert check.found == "64K may be locked, the shared memory has 1M"
        fixed = shell(f"{limit}; {check.fix}; {command} --lock", *powerless)
        assert failures(read(fixed)) == []
        assert failures(read(shell(f"{limit}; {command} --lock"))) == []  # root may lock all


class TestConfinement:
    def test_selinux(self, here: Host, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(host, "_ENFORCE", directory / "enforce")
        for mode, state in (("1", "warning"), ("0", "ok")):
            (directory / "enforce").write_text(mode)
            assert here.examine()["confinement"].state == state

    def test_apparmor(self, here: Host, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        profiles, enabled = directory / "profiles", directory / "enabled"
        monkeypatch.setattr(host, "_ENFORCE", directory / "none")
        monkeypatch.setattr(host, "_APPARMOR", profiles)
        monkeypatch.setattr(host, "_APPARMOR_ENABLED", enabled)
        enabled.write_text("Y\n")
        assert here.examine()["confinement"].state == "skipped"
        profiles.write_text("/usr/sbin/cupsd (enforce)\nlibreoffice (enforce)\n")
        assert here.examine()["confinement"].state == "ok"
        profiles.write_text("libvirt-a1b2 (enforce)\nvirt-aa-helper (enforce)\n")
        check = here.examine()["confinement"]
        assert check.state == "warning"
        assert f"AppArmor keeps libvirt's QEMUs from {here.socket}, unless" in check.found


class TestKernelParameter:
    """By the boot loader that is there; tests/vm/test_doctor.py has the case of none."""

    def program(self, here: Host, name: str, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A program that leaves a file behind when it is run."""
        path, ran = here.directory / name, here.directory / "ran"
        path.write_text(f"#!/bin/sh\necho $* > {ran}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", str(here.directory), prepend=":")
        return ran

    def test_grub_as_debian_has_it(self, here: Host, monkeypatch: pytest.MonkeyPatch) -> None:
        ran = self.program(here, "update-grub", monkeypatch)
        monkeypatch.setattr("ivshmem.doctor.check.os.geteuid", lambda: 0)
        folder = here.directory / "grub.d"
        fix = guest._kernel_fix("intel_iommu=on")
        assert "/etc/default/grub.d" in fix
        here.run(fix.replace("/etc/default/grub.d", str(folder)))
        assert ran.exists()
        show = f'GRUB_CMDLINE_LINUX="quiet"; . {folder}/iommu.cfg; echo "$GRUB_CMDLINE_LINUX"'
        assert shell(show).stdout == "quiet intel_iommu=on\n"

    def test_grubby(self, here: Host, monkeypatch: pytest.MonkeyPatch) -> None:
        ran = self.program(here, "grubby", monkeypatch)
        monkeypatch.setattr("ivshmem.doctor.check.os.geteuid", lambda: 0)
        here.run(guest._kernel_fix("intremap=on"))
        assert ran.read_text() == "--update-kernel=ALL --args=intremap=on\n"


class TestCommandLine:
    def run(self, here: Host, *arguments: str) -> subprocess.CompletedProcess[str]:
        words = [*IVSHMEM, "doctor", "--qemu", str(here.qemu), *arguments]
        return subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT, check=False)

    def test_lines(self, here: Host) -> None:
        result = self.run(here, "-S", here.socket)
        lines = result.stdout.splitlines()
        assert (result.returncode, result.stderr) == (1, "")
        left = result.stdout.count("  skip  ")
        assert lines[0] == "host"
        assert re.fullmatch(rf"1 failed, (1 warning, )?{left} not checked", lines[-1])
        assert f"  FAIL  socket               no {here.socket}: no server listens there" in lines
        fixes = [line for line in lines if "  fix: " in line]
        assert len(fixes) == 1
        assert lines[lines.index(fixes[0]) - 1].startswith("  FAIL  socket ")
        assert "  skip  server               needs a check that failed: socket" in lines
        here.run(fixes[0].partition("fix: ")[2])
        result = self.run(here, "-S", here.socket)
        assert result.returncode == 0
        verdict = result.stdout.splitlines()[-1]
        if "  warn  " in result.stdout:
            assert verdict.startswith("no check failed, 1 warning, ")
        else:
            assert verdict.startswith("all is well, ")
        assert verdict.endswith(f", {result.stdout.count('  skip  ')} not checked")
        assert "FAIL" not in result.stdout

    def test_wrong_usage(self, here: Host) -> None:
        for arguments in (["0000:00:04.0"], ["--guest"], ["--guest", "--host"]):
            result = self.run(here, *arguments)
            assert result.returncode == 2
            assert len(result.stderr.splitlines()) == 1
        assert self.run(here, "--size", "4Q").returncode == 1

    @pytest.mark.parametrize(("plain", "coloured"), [("", True), ("1", False)])
    def test_colour_on_a_terminal(self, here: Host, plain: str, coloured: bool) -> None:
        master, slave = pty.openpty()
        words = [*IVSHMEM, "doctor", "--qemu", str(here.qemu), "-S", here.socket]
        environment = {**os.environ, "NO_COLOR": plain}
        process = subprocess.Popen(words, stdout=slave, env=environment)
        os.close(slave)
        output = b""
        try:
            while data := os.read(master, 4096):
                output += data
        except OSError:  # EIO: its end
            pass
        os.close(master)
        assert process.wait(TIMEOUT) == 1
        assert (b"\033[31mFAIL\033[0m  socket " in output) == coloured

    def test_which_side(self, here: Host, monkeypatch: pytest.MonkeyPatch) -> None:
        vendor = here.directory / "sys_vendor"
        monkeypatch.setattr(guest_or_host, "DMI_VENDOR", vendor)
        monkeypatch.setattr(pci, "devices", list)
        vendor.write_text("QEMU\n")
        assert guest_or_host.is_guest("/none", "/none")
        assert not guest_or_host.is_guest("/none", str(here.qemu))
        assert not guest_or_host.is_guest(str(here.directory), "/none")
        vendor.write_text("Dell Inc.\n")
        assert not guest_or_host.is_guest("/none", "/none")
        vendor.unlink()
        assert not guest_or_host.is_guest("/none", "/none")
        monkeypatch.setattr(pci, "devices", lambda: ["one"])
        assert guest_or_host.is_guest(str(here.directory), str(here.qemu))
