"""`serve --config FILE` and `qemu --config FILE` as a person or a script runs them."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import resource
import signal
import stat
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from support import commands
from support.peer import RawPeer
from support.waiting import PATIENCE, until

import ivshmem
from ivshmem.qemu import cmdline

pytestmark = pytest.mark.usefixtures("commands")
IVSHMEM = [sys.executable, "-W", "error", "-m", "ivshmem"]


def run(*arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    result = commands.run(*arguments)
    assert result.returncode == status, result.stderr
    return result


def refusal(*arguments: str) -> str:
    """The one line that is said of what cannot be done."""
    result = run(*arguments, status=1)
    assert result.stdout == ""
    assert result.stderr.startswith("ivshmem: ")
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert "Errno" not in result.stderr
    return result.stderr.removeprefix("ivshmem: ").rstrip("\n")


class Serving:
    """`serve --config` in a process of its own, without a terminal, which is ready."""

    def __init__(self, file: Path, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [*IVSHMEM, "serve", "--no-control", "--config", str(file), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self.first = self.process.stdout.readline()

    def news(self) -> str:
        """The next line on standard error."""
        assert self.process.stderr is not None
        return self.process.stderr.readline().rstrip("\n")

    def reload(self) -> str:
        """Ask for it, and return what is said then."""
        self.process.send_signal(signal.SIGHUP)
        return self.news()

    def end(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, errors


@pytest.fixture
def file(directory: Path) -> Path:
    """A configuration of two regions."""
    path = directory / "ivshmem.toml"
    write(path, a="vectors = 2", b='size = "64K"')
    return path


def write(path: Path, **regions: str) -> None:
    """Write a configuration of regions, with sockets of their names beside it."""
    tables = (
        f'[region.{name}]\nsocket = "{path.parent}/{name}"\n{settings}\n'
        for name, settings in regions.items()
    )
    path.write_text("".join(tables))


@pytest.fixture
def serve(file: Path) -> Iterator[Callable[..., Serving]]:
    with ExitStack() as stack:

        def start(*arguments: str) -> Serving:
            serving = Serving(file, *arguments)
            stack.enter_context(serving.process)
            stack.callback(serving.process.kill)
            return serving

        yield start


Serve = Callable[..., Serving]


# -- serving --------------------------------------------------------------------------------------


def test_a_session(serve: Serve, file: Path) -> None:
    serving = serve()
    assert serving.first == f"serving 2 regions, pid {serving.process.pid}\n"
    assert serving.process.stdout is not None
    lines = [serving.process.stdout.readline() for _ in range(4)]
    assert lines[:2] == [
        f"  a  4M   anonymous  2 vectors  {file.parent}/a\n",
        f"  b  64K  anonymous  1 vector   {file.parent}/b\n",
    ]
    with ivshmem.connect(file.parent / "a", timeout=PATIENCE) as a:
        assert (a.id, a.vectors, a.region.size) == (0, 2, 4 << 20)
        assert serving.news().startswith("a: peer 0 joined: ")
        with ivshmem.connect(file.parent / "b", timeout=PATIENCE) as b:
            assert (b.id, b.vectors, b.region.size) == (0, 1, 64 << 10)
            assert serving.news().startswith("b: peer 0 joined: ")
    assert serving.end()[0] == 0
    assert os.listdir(file.parent) == ["ivshmem.toml"]


def test_one_region_is_told_as_without_a_file(serve: Serve, file: Path) -> None:
    write(file, only="")
    serving = serve("--quiet")
    assert serving.first.startswith("serving 4M (anonymous, in pages of 4K) with 1 vector on ")
    assert serving.process.stdout is not None
    assert f"socket,path={file.parent}/only,id=" in serving.process.stdout.readline()
    assert serving.end() == (0, "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_it(serve: Serve, file: Path, number: signal.Signals) -> None:
    serving = serve("--quiet")
    with RawPeer(f"{file.parent}/a") as peer:
        peer.set_up(2)
        assert serving.end(number)[0] == 0
    assert os.listdir(file.parent) == ["ivshmem.toml"]


def test_in_the_background(file: Path) -> None:
    pid_file = file.parent / "pid"
    result = run("serve", "--daemon", "--no-control", "--config", str(file), "-p", str(pid_file))
    assert result.stdout.startswith("serving 2 regions")
    pid = int(pid_file.read_text())
    try:
        write(file, a="vectors = 2")
        os.kill(pid, signal.SIGHUP)
        until(lambda: not (file.parent / "b").exists())
        with RawPeer(f"{file.parent}/a") as peer:
            peer.set_up(2)
    finally:
        os.kill(pid, signal.SIGTERM)
        until(lambda: not pid_file.exists())


def test_a_relative_path(directory: Path, file: Path) -> None:
    result = subprocess.run(
        [*IVSHMEM, "serve", "--config", "ivshmem.toml", "--check"],
        cwd=directory,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.startswith(f"{file}: 2 regions\n")


# -- reloading ------------------------------------------------------------------------------------


def test_reloading(serve: Serve, file: Path) -> None:
    serving = serve("--quiet")
    with RawPeer(f"{file.parent}/a") as stays, RawPeer(f"{file.parent}/b") as goes:
        stays.set_up(2)
        goes.set_up(1)
        assert serving.reload() == "ivshmem: reloaded: nothing has changed"
        write(file, a='vectors = 2\nmode = "0600"', c="")
        assert serving.reload() == (
            "ivshmem: reloaded: region a: mode changed; region b: removed; region c: added"
        )
        assert goes.take() is None
        assert stat.S_IMODE((file.parent / "a").stat().st_mode) == 0o600
        assert sorted(os.listdir(file.parent)) == ["a", "c", "ivshmem.toml"]
        with RawPeer(f"{file.parent}/c") as comes:
            comes.set_up(1)
        assert not stays.readable(0)
        assert serving.end()[0] == 0


WRONG = {
    "value": (
        {"a": "vectors = -2", "c": ""},
        "region.a.vectors = -2: expected a number from 0 to 2048",
    ),
    "change": ({"a": "vectors = 3", "c": ""}, "region.a.vectors = 3: it cannot change from 2"),
    "new region": (
        {"a": "vectors = 2", "c": "", "d": 'file = "/none/such"'},
        "region.d: /none: No such file or directory",
    ),
    "no TOML": ({"a": "vectors"}, "not TOML: "),
}


@pytest.mark.parametrize(("regions", "message"), WRONG.values(), ids=list(WRONG))
def test_a_wrong_file_changes_nothing(
    serve: Serve, file: Path, regions: dict[str, str], message: str
) -> None:
    serving = serve("--quiet")
    with RawPeer(f"{file.parent}/a") as a, RawPeer(f"{file.parent}/b") as b:
        a.set_up(2)
        b.set_up(1)
        write(file, **regions)
        line = serving.reload()
        assert line.startswith(f"ivshmem: not reloaded, nothing has changed: {file}: {message}")
        assert sorted(os.listdir(file.parent)) == ["a", "b", "ivshmem.toml"]
        file.unlink()
        line = serving.reload()
        assert line.startswith(f"ivshmem: not reloaded, nothing has changed: {file}: no such file")
        write(file, a="vectors = 2", b='size = "64K"')
        assert serving.reload() == "ivshmem: reloaded: nothing has changed"
        assert not a.readable(0)
        assert not b.readable(0)
    assert serving.end()[0] == 0


def test_the_end_of_a_terminal_is_no_reload(file: Path) -> None:
    """With a controlling terminal SIGHUP means that it is gone, and ends the server."""
    ours, theirs = pty.openpty()
    with (
        open(ours, "rb", buffering=0) as screen,
        subprocess.Popen(
            [*IVSHMEM, "serve", "--no-control", "--config", str(file)],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        ) as process,
    ):
        os.close(theirs)
        said = b""
        while not said.endswith(b"--libvirt\r\n"):
            said += screen.read(4096)
        process.send_signal(signal.SIGHUP)
        assert process.wait(PATIENCE) == 0
    assert os.listdir(file.parent) == ["ivshmem.toml"]


def test_without_a_file_sighup_ends_it(directory: Path) -> None:
    command = [*IVSHMEM, "serve", "--no-control", "-S", str(directory / "s")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGHUP)
        process.communicate(timeout=PATIENCE)
    assert process.returncode == 0


# -- the file, and what stands beside it ----------------------------------------------------------


def test_errors_at_start(file: Path) -> None:
    write(file, a="vectors = 2", b='size = "3M"\nallow = ["uid:no-such"]\nmod = 1')
    said = refusal("serve", "--config", str(file))
    assert said.startswith(f'{file}: region.b.size = "3M": ')
    assert said.count("; region.b.") == 2
    assert refusal("serve", "--config", str(file), "--check") == said
    write(file, a="", b=f'file = "{file.parent}/none/memory"')
    said = refusal("serve", "--config", str(file))
    assert said == f"{file}: region.b: {file.parent}/none: No such file or directory"
    assert os.listdir(file.parent) == ["ivshmem.toml"]
    assert refusal("serve", "--config", "/no/file") == (
        "/no/file: no such file or directory: create it first, or choose another path"
    )


def test_what_would_be_served(file: Path) -> None:
    file.write_text(
        f"""
        [service]
        control = "{file.parent}/control"
        metrics = 9400
        [region.db]
        socket = "{file.parent}/db"
        size = "64M"
        vectors = 4
        name = "never-made"
        mode = "0660"
        group = "root"
        allow = ["gid:0", "root"]
        peers_per_uid = 3
        [region.log]
        socket = "{file.parent}/log"
        """
    )
    assert run("serve", "--config", str(file), "--check").stdout == (
        f"{file}: 2 regions\n"
        f"  db   64M  posix never-made  4 vectors  {file.parent}/db "
        "  mode 0660, group root, allow gid:0 root, peers per uid 3\n"
        f"  log  4M   anonymous         1 vector   {file.parent}/log"
        "  every user who may open the socket\n"
        f"  control socket: {file.parent}/control\n"
        "  metrics: 9400\n"
    )
    assert not Path("/dev/shm/never-made").exists()
    assert os.listdir(file.parent) == ["ivshmem.toml"]


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["-S", "/run/ivshmem.sock"], "--socket"),  # also if it is the default
        (["-n", "1", "--keep"], "--vectors, --keep"),
        (["--allow", "root", "--readonly-for", "all"], "--allow, --readonly-for"),
        (["-M", "x", "--names", "--mode", "0600"], "--name, --names, --mode"),
    ],
)
def test_options_of_a_region_belong_into_the_file(
    file: Path, options: list[str], names: str
) -> None:
    said = refusal("serve", "--config", str(file), *options)
    assert said == f"{names}: not allowed with --config: set this for each region in the file"


def test_check_needs_a_file() -> None:
    assert refusal("serve", "--check").startswith("--check needs --config FILE")


def test_options_of_the_service_go_before_the_file(serve: Serve, file: Path) -> None:
    file.write_text(f'{file.read_text()}[service]\nlog_format = "text"\n')
    serving = serve("--log-format", "json")
    with RawPeer(f"{file.parent}/a") as peer:
        peer.set_up(2)
        assert json.loads(serving.news())["event"] == "joined"
        assert json.loads(serving.reload())["text"] == "reloaded: nothing has changed"
    assert serving.end()[0] == 0


def test_few_descriptors_are_told(file: Path) -> None:
    """A limit that the server cannot raise."""
    write(file, a="vectors = 8")
    command = [*IVSHMEM, "serve", "--no-control", "--config", str(file)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (122, 122)),
    ) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=PATIENCE)
    assert line == "ivshmem: RLIMIT_NOFILE is 122: enough for about 10 peers of 8 vectors\n"


# -- what QEMU is told ----------------------------------------------------------------------------


def test_arguments_of_one_region(file: Path) -> None:
    a = f"{file.parent}/a"
    assert run("qemu", "--config", str(file), "--region", "a").stdout == (
        f"-chardev socket,path={a},id={cmdline.ident_of(a)} -device"
        f" ivshmem-doorbell,vectors=2,chardev={cmdline.ident_of(a)}\n"
    )
    assert run("qemu", "--config", str(file), "--region", "a", "--libvirt", "--master").stdout == (
        f"<shmem name=\"a\" role='master'><model type='ivshmem-doorbell'/><server path=\"{a}\"/>"
        "<msi vectors='2' ioeventfd='on'/>"
        f"<address type='pci' domain='0' bus='0' slot='{cmdline.slot_of('a'):#04x}' function='0'/>"
        "</shmem>\n"
    )


def test_arguments_of_all_regions(file: Path) -> None:
    arguments = json.loads(run("qemu", "--config", str(file), "--json").stdout)
    paths = [f"{file.parent}/{name}" for name in "ab"]
    assert arguments[1::4] == [f"socket,path={path},id={cmdline.ident_of(path)}" for path in paths]
    assert arguments[3::4] == [
        f"ivshmem-doorbell,vectors=2,chardev={cmdline.ident_of(paths[0])}",
        f"ivshmem-doorbell,vectors=1,chardev={cmdline.ident_of(paths[1])}",
    ]
    lines = run("qemu", "--config", str(file), "--libvirt").stdout.splitlines()
    assert [line.partition(">")[0] for line in lines] == ['<shmem name="a"', '<shmem name="b"']
    slots = [re.search("slot='(0x..)'", line)[1] for line in lines]  # type: ignore[index]
    assert len(set(slots)) == 2, "libvirt places them on one bridge otherwise"
    one = ("qemu", "--config", str(file), "--region", "b", "--libvirt", "--slot", "7")
    assert " slot='0x07' " in run(*one).stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--region", "c"], "no region c: the file has a, b"),
        (
            ["--vectors", "2"],
            "--vectors and --size are not allowed with --config: set them in the file",
        ),
        (["--master"], "--master is for one region of a guest: choose one with --region NAME"),
    ],
)
def test_arguments_that_cannot_be(file: Path, options: list[str], message: str) -> None:
    assert refusal("qemu", "--config", str(file), *options).removeprefix(f"{file}: ") == message


def test_a_region_is_of_a_file() -> None:
    assert refusal("qemu", "--region", "a") == "--region needs --config FILE"


# -- successors -----------------------------------------------------------------------------------


def test_a_successor_does_not_need_the_file(serve: Serve, file: Path) -> None:
    """What nobody asked to be read again cannot end a service: here the parent is killed."""
    pid_file, control = file.parent / "pid", file.parent / "control"
    file.write_text(f'[service]\ncontrol = "{control}"\n{file.read_text()}')
    good = file.read_text()
    command = [*IVSHMEM, "serve", "--supervise", "--config", str(file), "-p", str(pid_file)]
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        with RawPeer(f"{file.parent}/a") as stays:
            stays.set_up(2)
            file.write_text("[region.a]\nsocket = 5")
            os.kill(process.pid, signal.SIGKILL)
            said = [process.stderr.readline()]
            while "continues with" not in said[-1]:
                assert said[-1], said
                said.append(process.stderr.readline())
            assert any("region.a.socket = 5: expected a text" in line for line in said), said
            until(lambda: pid_file.exists() and pid_file.read_text().strip())
            pid = int(pid_file.read_text())
            with RawPeer(f"{file.parent}/b") as comes:
                comes.set_up(1)
            assert not stays.readable(0)
            file.write_text(good)
            until(control.exists)
            assert "nothing has changed" in run("reload", "--control", str(control)).stdout
            assert not stays.readable(0)
        os.kill(pid, signal.SIGTERM)
        until(lambda: not pid_file.exists())
    assert os.listdir(file.parent) == ["ivshmem.toml"]
