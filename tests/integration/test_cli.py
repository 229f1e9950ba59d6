"""`serve`, `connect`, `qemu` and `ivshmem-server` as a person or a script runs them."""

import fcntl
import json
import os
import pty
import resource
import select
import shlex
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from support import commands

import ivshmem
from ivshmem.peer import inquiry
from ivshmem.qemu import cmdline

pytestmark = pytest.mark.usefixtures("commands")

TIMEOUT = 30.0
IVSHMEM = [sys.executable, "-m", "ivshmem"]
IVSHMEM_SERVER = [str(Path(sysconfig.get_path("scripts"), "ivshmem-server"))]


def run(*arguments: str, status: int = 0, stdin: str = "") -> subprocess.CompletedProcess[str]:
    result = commands.run(*arguments, input=stdin)
    assert result.returncode == status, result.stderr
    return result


def one_error_line(result: subprocess.CompletedProcess[str]) -> str:
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("ivshmem: ")
    assert "Errno" not in result.stderr
    return result.stderr


class Served:
    """A server in a process of its own, which has said that it is ready."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.first = self.process.stdout.readline()

    def news(self) -> str:
        """The next line on stderr."""
        assert self.process.stderr is not None
        return self.process.stderr.readline()

    def end(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=TIMEOUT)
        return self.process.returncode, errors


Serve = Callable[..., Served]


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "socket")


@pytest.fixture
def serve(path: str) -> Iterator[Serve]:
    with ExitStack() as stack:

        def start(*arguments: str, command: tuple[str, ...] = ("serve",)) -> Served:
            served = Served([*IVSHMEM, *command, "-S", path, *arguments])
            stack.enter_context(served.process)
            stack.callback(served.process.kill)
            return served

        yield start


@pytest.fixture
def name() -> Iterator[str]:
    name = f"ivshmem-cli-{os.getpid()}"
    yield name
    Path("/dev/shm", name).unlink(missing_ok=True)


class TestServe:
    def test_a_session(self, serve: Serve, path: str) -> None:
        server = serve("--size", "1M", "--vectors", "3")
        assert server.first.startswith("serving 1M (anonymous, in pages of 4K) with 3 vectors on ")
        assert server.process.stdout is not None
        lines = [server.process.stdout.readline()]
        while not lines[-1].startswith("  host:"):
            lines.append(server.process.stdout.readline())
        ident = cmdline.ident_of(path)
        assert lines[0] == f"  QEMU:    -chardev socket,path={path},id={ident} \\\n"
        assert lines[1].strip() == f"-device ivshmem-doorbell,vectors=3,chardev={ident}"
        assert lines[2].startswith("  libvirt: <shmem name=")
        assert lines[3].strip() == "<model type='ivshmem-doorbell'/>"
        assert f"ivshmem connect -S {path}" in lines[-1]
        with ivshmem.connect(path, timeout=TIMEOUT) as client:
            assert client.vectors == 3
            process = Path("/proc/self/comm").read_text().strip()
            assert server.news() == f"peer 0 joined: {process} (pid {os.getpid()}), 3 vectors\n"
        assert server.news() == f"peer 0 left: {process} (pid {os.getpid()}), 3 vectors\n"
        assert server.end() == (0, "")
        assert not os.path.exists(path)

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_signals_end_it_with_peers_connected(
        self, serve: Serve, path: str, number: signal.Signals
    ) -> None:
        server = serve("--quiet")
        with ivshmem.connect(path, timeout=TIMEOUT) as client:
            assert server.end(number) == (0, "")
            assert client.next_event(TIMEOUT) == ivshmem.Disconnected(
                "the server ended the connection"
            )
            client.ring(client.id)
            assert client.wait(0, TIMEOUT) == 1
        assert not os.path.exists(path)

    def test_the_printed_host_line_works(self, serve: Serve, path: str) -> None:
        server = serve()
        assert server.process.stdout is not None
        line = next(line for line in server.process.stdout if line.startswith("  host:"))
        command = [*line.split("host:")[1].split(), "-c", "peers"]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        assert result.stdout == "no other peers\n"

    def test_names(self, serve: Serve, path: str, name: str) -> None:
        server = serve("--names", "-l", "4K", "--name", name, "--quiet")
        assert server.process.stdout is not None
        line = next(line for line in server.process.stdout if line.startswith("  names:"))
        assert line == "  names:   15 slots in the last 2K, from 0x800 on\n"
        with ivshmem.connect(path, timeout=TIMEOUT) as client:
            assert ivshmem.Directory.open(client).entries() == []
        other = [path + "2", "--name", name, "--names", "3"]
        refused = run("serve", "-S", *other, status=1)
        assert "has a directory already, of 15 slots, not 3" in one_error_line(refused)
        assert server.end() == (0, "")

    def test_a_stale_socket_is_replaced(self, serve: Serve, path: str) -> None:
        server = serve()
        server.process.kill()
        server.process.wait()
        assert os.path.exists(path)
        assert serve().first.startswith("serving")

    def test_a_second_server_harms_nothing(self, serve: Serve, path: str, name: str) -> None:
        first = serve("--name", name, "--size", "1M")
        inode = Path("/dev/shm", name).stat().st_ino
        with ivshmem.connect(path, timeout=TIMEOUT) as client:
            for existing in ("attach", "replace", "refuse"):
                second = run("serve", "-S", path, "--name", name, "--existing", existing, status=1)
                assert "another process listens here" in one_error_line(second)
            assert Path("/dev/shm", name).stat().st_ino == inode
            with ivshmem.connect(path, timeout=TIMEOUT) as other:
                other.ring(client.id)
                assert client.wait(0, TIMEOUT) == 1
        assert first.end()[0] == 0
        assert not Path("/dev/shm", name).exists()

    def test_a_name_made_here_is_removed_and_an_attached_one_is_kept(
        self, serve: Serve, path: str, name: str
    ) -> None:
        server = serve("--name", name, "-l", "64K", "--keep")
        with ivshmem.connect(path, timeout=TIMEOUT) as client:
            memoryview(client.region)[:4] = b"kept"
        server.end()
        server = serve("-M", name)
        assert f"serving 64K (posix {name}," in server.first
        with ivshmem.connect(path, timeout=TIMEOUT) as client:
            assert bytes(memoryview(client.region)[:4]) == b"kept"
        server.end()
        assert Path("/dev/shm", name).exists()

    def test_dash_m_takes_a_directory_or_a_name(
        self, serve: Serve, tmp_path: Path, name: str
    ) -> None:
        server = serve("-m", str(tmp_path))
        assert f"(directory {tmp_path}," in server.first
        assert sorted(os.listdir(tmp_path)) == ["socket", "socket.control"]
        server.end()
        assert f"(posix {name}," in serve("-m", name).first

    def test_a_file_is_kept(self, serve: Serve, tmp_path: Path) -> None:
        file = tmp_path / "memory"
        serve("--file", str(file), "--size", "8K").end()
        assert file.stat().st_size == 8192

    def test_readonly_memory(self, serve: Serve, path: str, name: str) -> None:
        with ivshmem.Region.create("4K", name=name) as region:
            memoryview(region)[:2] = b"ro"
            serve("--name", name, "--readonly")
            with ivshmem.connect(path, timeout=TIMEOUT) as client:
                assert client.region.readonly
                assert bytes(memoryview(client.region)[:2]) == b"ro"

    def test_pid_file_is_locked_and_removed(self, serve: Serve, path: str, tmp_path: Path) -> None:
        file = tmp_path / "pid"
        server = serve("--pid-file", str(file))
        assert file.read_text() == f"{server.process.pid}\n"
        second = run("serve", "-S", path + "2", "-p", str(file), status=1)
        assert f"runs already (pid {server.process.pid})" in one_error_line(second)
        assert file.read_text() == f"{server.process.pid}\n"
        server.process.kill()
        server.process.wait()
        server = serve("--pid-file", str(file))  # a stale one is no hindrance
        assert file.read_text() == f"{server.process.pid}\n"
        server.end()
        assert not file.exists()

    def test_in_the_background(self, path: str, tmp_path: Path) -> None:
        file = tmp_path / "pid"
        result = run("serve", "--daemon", "-S", path, "-p", str(file))
        assert result.stdout.startswith("serving 4M")
        pid = int(file.read_text())
        try:
            with ivshmem.connect(path, timeout=TIMEOUT) as client:
                assert client.id == 0
            again = run("serve", "--daemon", "-S", path, status=1)
            assert "another process listens here" in one_error_line(again)
        finally:
            os.kill(pid, signal.SIGTERM)
            wait_until(lambda: not file.exists())
        assert not os.path.exists(path)

    @pytest.mark.sampled(3)
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    def test_signals_at_any_moment_leave_nothing(
        self, path: str, name: str, tmp_path: Path, number: signal.Signals
    ) -> None:
        """From the moment that there is something to leave behind."""
        file = tmp_path / "pid"
        command = [*IVSHMEM, "serve", "-S", path, "-M", name, "-l", "4K", "-p", str(file)]
        for after in range(8):
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            with process:
                wait_until(file.exists)
                for _ in range(after * 2000):
                    pass
                process.send_signal(number)
                _, errors = process.communicate(timeout=TIMEOUT)
            assert (process.returncode, errors) == (0, b"")
            assert not file.exists()
            assert not os.path.exists(path)
            assert not Path("/dev/shm", name).exists()

    @pytest.mark.nightly
    def test_news_that_nobody_reads_delay_nobody(self, path: str) -> None:
        read, write = os.pipe()
        fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
        with open(read, "rb") as news, open(write, "wb") as end:
            process = subprocess.Popen(
                [*IVSHMEM, "serve", "-S", path], stdout=subprocess.PIPE, stderr=end
            )
            end.close()
            with process:
                assert process.stdout is not None
                process.stdout.readline()
                for _ in range(1000):  # about 100 KB of news, then more than are kept
                    ivshmem.connect(path, timeout=TIMEOUT).close()
                process.terminate()
                process.wait(TIMEOUT)
                assert process.returncode == 0
                assert news.readline().startswith(b"peer 0 joined")

    @pytest.mark.parametrize("closed", [0, 1, 2])
    def test_closed_standard_streams(self, path: str, tmp_path: Path, closed: int) -> None:
        """The pid file does not get their number, or its lock would be lost with them."""
        file = tmp_path / "pid"
        redirect = f"{closed}{'<' if closed == 0 else '>'}&-"
        command = shlex.join([*IVSHMEM_SERVER, "-S", path, "-p", str(file), "-l", "4K"])
        command += f" -M ivshmem-cli-{os.getpid()} {redirect}"
        try:
            first = subprocess.run(["sh", "-c", command], timeout=TIMEOUT, check=False)
            assert first.returncode == 0
            second = subprocess.run(
                ["sh", "-c", command.replace(path, path + "2")], timeout=TIMEOUT, check=False
            )
            assert second.returncode == 1
        finally:
            os.kill(int(file.read_text()), signal.SIGTERM)
            wait_until(lambda: not file.exists())

    def test_stdout_that_nobody_reads(self, path: str) -> None:
        """As in `serve | head -1`: the server continues to serve, and says so."""
        read, write = os.pipe()
        os.close(read)
        with open(write, "w") as closed:
            process = subprocess.Popen(
                [*IVSHMEM, "serve", "-S", path], stdout=closed, stderr=subprocess.PIPE, text=True
            )
        try:
            assert process.stderr is not None
            assert "serving, but stdout cannot be written: broken pipe" in process.stderr.readline()
            ivshmem.connect(path, timeout=TIMEOUT).close()
        finally:
            process.terminate()
        _, errors = process.communicate(timeout=TIMEOUT)
        assert process.returncode == 0
        assert "Traceback" not in errors
        assert not os.path.exists(path)


BAD = {
    "size 0": (["-l", "0"], "0 bytes: it must be a power of two"),
    "no power of two": (["-l", "3M"], "the nearest that works is 4M"),
    "8 exabytes": (["-l", "8E"], "the largest is 4E"),
    "4 exabytes": (["-l", "4E"], "choose a smaller size"),
    "no size": (["-l", "many"], "'many' is not a size"),
    "negative": (["-l", "-4M"], None),
    "no slots": (["--names", "0"], None),
    "more slots than fit": (["--names", "32", "-l", "4K"], "takes 4224 bytes"),
    "more channels than fit": (["--channels", "1M", "-l", "1M"], "has room for 16K to 1008K"),
    "no room for channels": (["--channels", "16K", "-l", "16K"], "no room for channels in"),
    "too little for channels": (["--channels", "8K"], None),
    "no size of channels": (["--channels", "some"], None),
    "70,000 vectors": (["-n", "70000"], None),
    "no number of vectors": (["-n", "x"], None),
    "a socket path too long": (["-S", "/tmp/" + "x" * 200], "at most 107 bytes"),
    "a directory that is missing": (["-m", "/no/such/dir"], "/no/such/dir: no such file"),
    "a mount point that is missing": (["-m", "/no-such-mount"], "/no-such-mount: no such file"),
    "a size of 400 digits": (["-l", "9" * 400], "is not a size"),
    "a path of several lines": (["-S", "/no/such\n\33[2J/s"], r"/no/such\n\x1b[2J: no such file"),
    "a socket's directory that is missing": (["-S", "/no/such/dir/s"], "no such file"),
    "no name": (["-M", "a/b"], "not a POSIX shared memory name"),
    "no huge pages of that size": (["--hugepages", "3M"], "no huge pages of 3M; it offers"),
    "huge pages elsewhere": (
        ["--hugepages", "--file", "/tmp/ivshmem-no-file"],
        "name a hugetlbfs mount",
    ),
    "nothing to attach to": (["--existing", "require"], "give --name or --file"),
    "a name that is missing": (
        ["--existing", "require", "-M", "ivshmem-no-such-name"],
        "ivshmem-no-such-name: no such file or directory: create it first",
    ),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line(case: str, path: str) -> None:
    arguments, message = BAD[case]
    socket_option = [] if "-S" in arguments else ["-S", path]
    before = shared_names(arguments)
    result = run("serve", *socket_option, *arguments, status=2 if message is None else 1)
    if message is None:
        assert len(result.stderr.splitlines()) == 1
        assert result.stderr.startswith("ivshmem serve: argument")
        assert "(see ivshmem serve --help)" in result.stderr
    else:
        assert message in one_error_line(result)
    assert not os.path.exists(path)
    assert shared_names(arguments) == before


def shared_names(arguments: list[str]) -> set[str]:
    """Return what stands in /dev/shm under a name that the arguments have; others use it, too."""
    words = [word.strip("/") for word in arguments if not word.startswith("-")]
    return {name for name in os.listdir("/dev/shm") if any(word in name for word in words if word)}


def test_a_file_of_another_size(path: str, tmp_path: Path) -> None:
    file = tmp_path / "memory"
    file.write_bytes(bytes(4096))
    result = run("serve", "-S", path, "--file", str(file), "--size", "1M", status=1)
    assert f"{file} has 4K, not the 1M asked for" in one_error_line(result)
    assert file.read_bytes() == bytes(4096)


# What is used is imported first: the interpreter may be in a home of root's.
AS_NOBODY = """
import inspect, os, sys  # Python 3.15 imports inspect late, perhaps from a home of root's
import ivshmem.cli.log_queue
import ivshmem.cli.serve_process
from ivshmem.cli.main import SUBCOMMANDS, main
for home, _ in SUBCOMMANDS.values():
    __import__(f"ivshmem.cli.{home}")
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
sys.exit(main(sys.argv[1:]))
"""


def test_no_permission(tmp_path: Path, path: str) -> None:
    """As somebody else: root may do everything."""
    if os.getuid() != 0:
        pytest.skip("only root can become somebody else")
    tmp_path.chmod(0o755)
    for arguments in (
        ["serve", "-S", path],
        ["serve", "-S", f"/tmp/ivshmem-{os.getpid()}", "--file", "/root/memory"],
    ):
        result = subprocess.run(
            [sys.executable, "-c", AS_NOBODY, *arguments],
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
        assert result.returncode == 1, result.stderr
        assert "permission denied: run as a user with the permission" in one_error_line(result)
    assert not os.path.exists(f"/tmp/ivshmem-{os.getpid()}")


def wait_until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.005)


class TestConnect:
    def test_commands(self, serve: Serve, path: str) -> None:
        serve("--quiet", "--vectors", "2")
        with ivshmem.connect(path, timeout=TIMEOUT) as peer:
            script = "dump; int 0 1; int 0 all; peers; read 0; write 8 u16 0x1234\nread 8 u16\n"
            result = run("connect", "-S", path, stdin=script + "# a comment\nint all; quit; peers")
            assert result.stdout.splitlines() == [
                "id 1, 2 vectors",
                "region 4M, 0 bytes in memory, sealed",
                f"server {path}",
                "peer 0, 2 vectors",
                "rang 1 doorbell",
                "rang 2 doorbells",
                "0",
                "0x0 (0)",
                "wrote 2 bytes at 0x8",
                "0x1234 (4660)",
                "rang 2 doorbells",
            ]
            assert (peer.wait(0, 0), peer.wait(1, 0)) == (2, 3)

    def test_what_is_written_is_all_written(self, serve: Serve, path: str) -> None:
        serve("--quiet", "--size", "4K")
        result = run("connect", "-S", path, "-c", "write 0 text a#b; read 0 3  # a comment; fly")
        assert result.stdout.splitlines() == ["wrote 3 bytes at 0x0", "61 23 62"]

    def test_memory(self, serve: Serve, path: str) -> None:
        serve("--quiet", "--size", "4K")
        result = run(
            "connect",
            "-S",
            path,
            "-c",
            'write 0x10 text "a ; b" ; write 0x18 hex deadbeef',
            "-c",
            "hexdump 0x10 32; read 0x18 4; read 0x18 u32; hexdump 0xff0",
        )
        assert result.stdout.splitlines() == [
            "wrote 5 bytes at 0x10",
            "wrote 4 bytes at 0x18",
            "00000010  61 20 3b 20 62 00 00 00  de ad be ef 00 00 00 00  |a ; b...........|",
            "00000020  00 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00  |................|",
            "de ad be ef",
            "0xefbeadde (4022250974)",
            "00000ff0  00 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00  |................|",
        ]

    def test_wait_and_watch_as_json(self, serve: Serve, path: str) -> None:
        serve("--quiet", "--vectors", "2")
        with ivshmem.connect(path, timeout=TIMEOUT):
            commands = [
                "int 1 0; int 1 0; int 1 1; wait 0",
                "wait any 5; watch 0; int 1 1; watch 0",
            ]
            result = run("connect", "-S", path, "--json", "-c", commands[0], "-c", commands[1])
        assert [json.loads(line) for line in result.stdout.splitlines()] == [
            {"rang": 1},
            {"rang": 1},
            {"rang": 1},
            {"event": "interrupt", "vector": 0, "rings": 2},
            {"event": "interrupt", "vector": 1, "rings": 1},
            {"rang": 1},
            {"event": "interrupt", "vector": 1, "rings": 1},
        ]

    @pytest.mark.sampled(6)
    @pytest.mark.parametrize(
        ("command", "message"),
        [
            ("wait 0 0.01", "no interrupt within 0.01 seconds"),
            ("wait 7", "vector 7: this endpoint has 1 vector"),
            ("wait 99999999999999999999 1", "too large"),
            ("int 0 99999999999999999999", "too large"),
            ("int 9 0", "peer 9 is not connected"),
            ("ring 0", "no vector given: ring PEER VECTOR"),
            ("int", "usage: ring PEER VECTOR"),
            ("int x y", "not a peer: 'x'"),
            ("read 4M", "beyond the region"),
            ("read", "usage: read ADDRESS"),
            ("write 0 u8 256", "not a u8 value: '256'"),
            ("write 0 hex xyz", "not a hex value: 'xyz'"),
            ("write 0 u9 1", "not a type: 'u9'"),
            ('write 0 text "open', "No closing quotation"),
            ("watch -1", "not a time: '-1'"),
            ("write 0 u8 300", "not a u8 value: '300' (0 to 255)"),
            ("write 0 hex zz", "two hexadecimal digits for each byte"),
            ("read 0 u65", "not a type or a length: 'u65' (give u8, u16, u32, u64 or"),
            ("exit()", "usage: quit, or exit"),
            ("help fly", "no command 'fly': help lists them"),
            ("fly", "no command 'fly': help lists them"),
        ],
    )
    def test_a_command_that_fails_ends_it(
        self, serve: Serve, path: str, command: str, message: str
    ) -> None:
        serve("--quiet")
        result = run("connect", "-S", path, "-c", command, "-c", "dump", status=1)
        assert message in one_error_line(result)
        assert result.stdout == ""

    def test_readonly(self, serve: Serve, path: str) -> None:
        serve("--quiet")
        result = run("connect", "-S", path, "--readonly", "-c", "write 0 u8 1", status=1)
        assert "mapped read-only" in one_error_line(result)

    def test_names(self, serve: Serve, path: str) -> None:
        serve("--quiet", "--vectors", "2", "--names")
        with (
            ivshmem.connect(path, timeout=TIMEOUT) as peer,
            ivshmem.Directory.open(peer) as directory,
        ):
            directory.publish("me", "test", range(1, 2))
            result = run(
                "connect", "-S", path, "-c", "names; publish you; names; int me 0; int me all"
            )
            assert result.stdout.splitlines() == [
                "me: peer 0, vector 1, test",
                "published you",
                "me: peer 0, vector 1, test",
                "you: peer 1, vectors 0 to 1",
                "rang 1 doorbell",
                "rang 1 doorbell",
            ]
            assert (peer.wait(0, 0), peer.wait(1, 0)) == (1, 1)
            result = run("connect", "-S", path, "--json", "-c", "publish you role; names")
            assert [json.loads(line) for line in result.stdout.splitlines()] == [
                {"published": "you"},
                {
                    "names": [
                        {"name": "me", "role": "test", "peer": 0, "vectors": [1], "alive": None},
                        {
                            "name": "you",
                            "role": "role",
                            "peer": 2,
                            "vectors": [0, 1],
                            "alive": True,
                        },
                    ]
                },
            ]
            assert [entry.name for entry in directory.entries()] == ["me"]
            nobody = run("connect", "-S", path, "-c", "int them 0", status=1)
            assert "no entry 'them' in the directory (there: me)" in one_error_line(nobody)

    @pytest.mark.parametrize("command", ["names", "publish me"])
    def test_no_names(self, serve: Serve, path: str, command: str) -> None:
        serve("--quiet")
        result = run("connect", "-S", path, "-c", command, status=1)
        assert "no directory of names: make one by" in one_error_line(result)

    def test_on_a_terminal(self, serve: Serve, path: str) -> None:
        serve("--quiet", "--vectors", "2")
        terminal, far = pty.openpty()
        with open(far, "r+b", buffering=0) as end:
            process = subprocess.Popen(
                [*IVSHMEM, "connect", "-S", path],
                stdin=end,
                stdout=end,
                stderr=end,
                env={**os.environ, "TERM": "dumb"},
                start_new_session=True,
            )
        with process, open(terminal, "r+b", buffering=0) as screen, ending(process):
            expect(screen, b"ivshmem 0> ")
            screen.write(b"help\n")
            expect(screen, b"hexdump")
            screen.write(b"hex\t 0 16\n")  # completed
            expect(screen, b"00000000  00")
            screen.write(b"fly\n")
            expect(screen, b"no command 'fly'")
            with ivshmem.connect(path, timeout=TIMEOUT) as other:
                screen.write(b"\n")
                expect(screen, b"peer 1 joined")
                screen.write(b"watch\n")
                other.ring(0)  # which nothing but watch shows: from then on it is under way
                expect(screen, b"interrupt on vector 0")
            expect(screen, b"peer 1 left")
            os.kill(process.pid, signal.SIGINT)
            expect(screen, b"ivshmem 0> ")
            screen.write(b"\x04")
            assert process.wait(TIMEOUT) == 0

    def test_nobody_serves(self, path: str, tmp_path: Path) -> None:
        missing = run("connect", "-S", path, status=1)
        assert (
            "start the server (ivshmem serve), or give the path of one that runs"
            in one_error_line(missing)
        )
        (tmp_path / "file").touch()
        file = run("connect", "-S", str(tmp_path / "file"), status=1)
        assert "not a socket: no server listens here, choose another" in one_error_line(file)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
            other.bind(path)
            assert "not an ivshmem server" in one_error_line(run("connect", "-S", path, status=1))

    def test_a_server_of_something_else(self, path: str) -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            silent = run("connect", "-S", path, "--timeout", "0.3", status=1)
            assert "still waiting for the protocol version" in one_error_line(silent)
            listener.accept()[0].close()
            process = subprocess.Popen(
                [*IVSHMEM, "connect", "-S", path], stderr=subprocess.PIPE, text=True
            )
            with listener.accept()[0] as peer:
                peer.send((1).to_bytes(8, "little"))
                _, errors = process.communicate(timeout=TIMEOUT)
            assert process.returncode == 1
            assert "protocol version 1, this client only 0" in errors


@contextmanager
def ending(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    try:
        yield
    finally:
        process.kill()


def expect(screen: object, wanted: bytes) -> None:
    assert hasattr(screen, "fileno")
    seen = b""
    while wanted not in seen:
        assert select.select([screen], [], [], TIMEOUT)[0], f"{wanted!r} is not in {seen!r}"
        seen += os.read(screen.fileno(), 4096)


class TestQemu:
    def test_from_a_server(self, serve: Serve, path: str) -> None:
        serve("--vectors", "5")
        expected = (
            f"-chardev socket,path={path},id={cmdline.ident_of(path)}"
            f" -device ivshmem-doorbell,vectors=5,chardev={cmdline.ident_of(path)}"
        )
        assert run("qemu", "-S", path).stdout == expected + "\n"
        assert run("qemu", "-S", path, "--master").stdout == expected + ",master=on\n"
        assert json.loads(run("qemu", "-S", path, "--json").stdout) == expected.split()
        assert "<msi vectors='5'" in run("qemu", "-S", path, "--libvirt").stdout
        assert "vectors=9" in run("qemu", "-S", "/not/there", "-n", "9").stdout

    def test_asking_joins_nothing(self, serve: Serve, path: str) -> None:
        """A leave that a QEMU guest is told of arms a crash of QEMU at its next device_del."""
        server = serve("--vectors", "3", "--size", "1M")
        with ivshmem.connect(path, timeout=TIMEOUT) as client:
            told = {"protocol": 0, "vectors": 3, "size": 1 << 20, "page_size": 4096, "peers": 1}
            assert inquiry.ask(path, TIMEOUT).items() >= told.items()
            assert "vectors=3" in run("qemu", "-S", path).stdout
            assert client.peer_events() == []
        assert server.news().startswith("peer 0 joined")
        assert server.news().startswith("peer 0 left")
        assert server.end() == (0, "")

    def test_a_server_that_cannot_be_asked(self, path: str) -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            process = subprocess.Popen(
                [*IVSHMEM, "qemu", "-S", path], stderr=subprocess.PIPE, text=True
            )
            with listener.accept()[0] as peer:
                peer.send(bytes(8))
            _, errors = process.communicate(timeout=TIMEOUT)
            assert process.returncode == 1
            assert "does not answer how many vectors it has: give --vectors" in errors

    def test_from_a_file(self, tmp_path: Path, name: str) -> None:
        file = tmp_path / "a,b c"
        with ivshmem.Region.create("64K", path=file):
            arguments = json.loads(run("qemu", "--file", str(file), "--json", "--master").stdout)
        ident = cmdline.ident_of(str(file))
        assert arguments == [
            "-object",
            f"memory-backend-file,size=64K,share=on,mem-path={tmp_path}/a,,b c,id={ident}",
            "-device",
            f"ivshmem-plain,memdev={ident},master=on",
        ]
        wrong = run("qemu", "--file", str(file), "--size", "4M", status=1)
        assert "omit --size" in one_error_line(wrong)
        assert f"mem-path=/dev/shm/{name}," in run("qemu", "--name", name).stdout
        assert "<size unit='KiB'>4096<" in run("qemu", "--name", name, "--libvirt").stdout
        refused = run("qemu", "--file", str(file), "--libvirt", status=1)
        assert "libvirt takes only a POSIX name" in one_error_line(refused)


class TestIvshmemServer:
    """The name and the command line of the example server."""

    @pytest.fixture
    def daemon(self, tmp_path: Path, path: str) -> Iterator[Callable[..., int]]:
        file = tmp_path / "pid"

        def start(*arguments: str) -> int:
            command = [*IVSHMEM_SERVER, "-S", path, "-p", str(file), *arguments]
            subprocess.run(command, check=True, timeout=TIMEOUT, stdout=subprocess.DEVNULL)
            return int(file.read_text())

        yield start
        if file.exists():
            os.kill(int(file.read_text()), signal.SIGTERM)
            wait_until(lambda: not file.exists())
        assert not os.path.exists(path)

    def test_a_daemon_with_a_rounded_size(
        self, daemon: Callable[..., int], path: str, name: str
    ) -> None:
        pid = daemon("-M", name, "-l", "3M", "-n", "4")
        assert os.getsid(pid) != os.getsid(0)
        assert Path("/dev/shm", name).stat().st_size == 4 << 20
        with ivshmem.connect(path, timeout=TIMEOUT) as client:
            assert (client.region.size, client.vectors) == (4 << 20, 4)

    def test_an_existing_name_is_attached_to_and_grown(
        self, daemon: Callable[..., int], path: str, name: str
    ) -> None:
        with ivshmem.Region.create("4K", name=name) as region:
            memoryview(region)[:5] = b"older"
        daemon("-M", name, "-l", "64K")
        with ivshmem.connect(path, timeout=TIMEOUT) as client:
            assert client.region.size == 65536
            assert bytes(memoryview(client.region)[:5]) == b"older"

    def test_a_larger_name_stays_as_large(
        self, daemon: Callable[..., int], path: str, name: str
    ) -> None:
        ivshmem.Region.create("1M", name=name).close()
        daemon("-m", name, "-l", "4K")
        with ivshmem.connect(path, timeout=TIMEOUT) as client:
            assert client.region.size == 1 << 20

    def test_a_second_one_harms_nothing(
        self, daemon: Callable[..., int], path: str, name: str, tmp_path: Path
    ) -> None:
        daemon("-M", name, "-l", "4K")
        second = subprocess.run(
            [*IVSHMEM_SERVER, "-S", path, "-p", str(tmp_path / "2"), "-M", name, "-l", "1M"],
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
        assert second.returncode == 1
        assert "another process listens here" in second.stderr
        assert Path("/dev/shm", name).stat().st_size == 4096

    def test_a_client_that_goes_at_once_does_not_end_it(
        self, daemon: Callable[..., int], path: str, name: str
    ) -> None:
        pid = daemon("-M", name)
        for _ in range(20):
            with socket.socket(socket.AF_UNIX) as passing:
                passing.connect(path)
        with ivshmem.connect(path, timeout=TIMEOUT):
            os.kill(pid, 0)

    def test_help_names_the_old_options(self) -> None:
        result = subprocess.run(
            [*IVSHMEM_SERVER, "-h"], capture_output=True, text=True, check=True, timeout=TIMEOUT
        )
        for option in ("-h", "-v", "-F", "-p", "-S", "-M", "-m", "-l", "-n"):
            assert f"  {option}" in result.stdout


def test_the_fd_limit_is_raised(serve: Serve) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    server = serve()
    assert resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE) == (hard, hard)


@pytest.mark.parametrize("arguments", [["-h"], ["serve", "-h"], ["connect", "-h"], ["qemu", "-h"]])
def test_help(arguments: list[str]) -> None:
    assert run(*arguments).stdout.startswith("usage: ivshmem")


def test_wrong_usage() -> None:
    assert "invalid choice: 'fly'" in run("fly", status=2).stderr
