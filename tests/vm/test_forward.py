"""`ivshmem forward` between a real guest and its host: a session by ssh, and iperf3."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.forwards import Forward, is_refused, is_reset, received
from support.waiting import until

import ivshmem
from ivshmem import Server, channel
from ivshmem.qemu import cmdline

from . import image
from .harness import Guest
from .host import TIMEOUT
from .resident import STAYS, Resident, Run
from .residents import Pair

NEEDED = ("sshd", "ssh", "ssh-keygen", "iperf3")

# Arguments: a folder with keys. sshd and iperf3 listen at the guest's own loopback interface, and
# `ivshmem forward` leads to them, until a line comes.
GUEST = r"""
import fcntl, os, shutil, signal, socket, struct, subprocess, sys, threading

folder = sys.argv[1]
with socket.socket() as any:  # what `ip link set lo up` does
    fcntl.ioctl(any, 0x8914, struct.pack("16sH14x", b"lo", 0x41))
os.makedirs("/run/sshd", exist_ok=True)
for name in ("host_key", "key.pub"):
    shutil.copy(f"{folder}/{name}", "/run")
sshd = subprocess.Popen([
    "/usr/sbin/sshd", "-D", "-e", "-f", "/dev/null", "-h", "/run/host_key",
    *("-o", "ListenAddress=127.0.0.1:22", "-o", "StrictModes=no", "-o", "UsePAM=no"),
    *("-o", "AuthorizedKeysFile=/run/key.pub", "-o", "PidFile=none", "-o", "PermitRootLogin=yes"),
    *("-o", "SetEnv=SHLVL=1"),  # bash reads no ~/.bashrc then: what that does may take seconds here
], stderr=subprocess.PIPE)
iperf3 = subprocess.Popen(
    ["iperf3", "-s", "-B", "127.0.0.1", "--forceflush"], stdout=subprocess.PIPE
)
forward = subprocess.Popen([
    sys.executable, "-m", "ivshmem", "forward", "--guest", "--memory", "vfio", "-v",
    *("ssh", "--connect", "tcp:127.0.0.1:22", "--connections", "2", "--buffer", "32K"),
    *("iperf3", "--connect", "tcp:127.0.0.1:5201", "--connections", "3", "--buffer", "32K"),
], stderr=subprocess.PIPE)
for file, words in (
    (forward.stderr, b"ssh: connects to"),
    (forward.stderr, b"iperf3: connects to"),
    (iperf3.stdout, b"Server listening"),
    (sshd.stderr, b"Server listening"),
):
    while words not in (line := file.readline()):
        assert line, words
for file in (forward.stderr, iperf3.stdout, sshd.stderr):
    threading.Thread(target=shutil.copyfileobj, args=(file, sys.stderr.buffer)).start()
print("STARTED", flush=True)
sys.stdin.readline()
for process in (forward, iperf3, sshd):
    process.send_signal(signal.SIGTERM)
print("ENDED", forward.wait(), flush=True)
for process in (iperf3, sshd):
    process.wait()
"""


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """A folder with a key of the host and one of a user."""
    path = f"{os.environ['PATH']}:/usr/sbin"
    if missing := [name for name in NEEDED if not shutil.which(name, path=path)]:
        pytest.skip(f"apt-get install openssh-server openssh-client iperf3 (no {missing[0]})")
    for name in ("host_key", "key"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name], check=True
        )
    return tmp_path


@contextmanager
def in_guest(guest: Resident, keys: Path) -> Iterator[Run]:
    run = guest.run(GUEST, keys)
    run.expect("STARTED")
    yield run
    run.send("end")
    assert run.expect("ENDED") == "ENDED 0"
    assert run.wait() == 0


def ssh(keys: Path, path: Path, *words: str) -> list[str]:
    proxy = f"{sys.executable} -m ivshmem forward -S {path} ssh --stdio"
    known = "StrictHostKeyChecking=no", f"UserKnownHostsFile={keys}/known", "BatchMode=yes"
    options = [f"-o{option}" for option in (*known, f"ProxyCommand={proxy}")]
    return ["ssh", "-F", "none", "-q", "-i", f"{keys}/key", *options, "root@guest", *words]


def measured(port: int) -> dict[str, Any]:
    """What iperf3 says in JSON, of both directions at once.

    In one run: its server refuses the next one for a moment, and the reset can overtake the reason.
    """
    command = ["iperf3", "-c", "127.0.0.1", "-p", str(port), "-t", "2", "-J", "--bidir"]
    done = subprocess.run(command, capture_output=True, check=False, timeout=TIMEOUT)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_ssh_and_iperf3(pair: Pair, pair_host: ivshmem.Client, keys: Path) -> None:
    """A session by ssh through standard input and output, and a measurement by a port."""
    ivshmem.Directory.create(pair_host.region, channels="768K").close()
    with in_guest(pair.a, keys):
        data = os.urandom(100_000)
        command = ssh(keys, pair.server.path, "sha256sum; exit 7")
        done = subprocess.run(
            command, input=data, capture_output=True, check=False, timeout=TIMEOUT
        )
        assert done.returncode == 7, done.stderr
        assert done.stdout.split()[0].decode() == hashlib.sha256(data).hexdigest()
        near = Forward(keys, "near", str(pair.server.path), "iperf3", "--listen", "tcp:127.0.0.1:0")
        try:
            found = measured(near.port())
            assert "error" not in found, found
            for direction in ("sum_received", "sum_received_bidir_reverse"):
                assert found["end"][direction]["bytes"] > 100_000, found["end"]
        finally:
            assert near.end() == 0


@pytest.mark.nightly
def test_ssh_as_a_socks_proxy(pair: Pair, pair_host: ivshmem.Client, keys: Path) -> None:
    """With -D, ssh leads to any port that the guest reaches: here to its sshd once more."""
    ivshmem.Directory.create(pair_host.region, channels="768K").close()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with in_guest(pair.a, keys):
        command = ssh(keys, pair.server.path)
        command[-1:] = ["-N", "-D", f"127.0.0.1:{port}", command[-1]]
        with subprocess.Popen(command) as proxy:
            try:
                end = until(lambda: connected(port), "a proxy that listens")
                with end, end.makefile("rwb") as file:
                    file.write(b"\5\1\0")  # version 5; one way to log in: none
                    file.flush()
                    assert file.read(2) == b"\5\0"
                    file.write(b"\5\1\0\1" + bytes([127, 0, 0, 1]) + (22).to_bytes(2, "big"))
                    file.flush()
                    assert file.read(10)[:2] == b"\5\0"
                    assert file.readline().startswith(b"SSH-2.0-OpenSSH")
            finally:
                proxy.terminate()


def connected(port: int) -> socket.socket | None:
    try:
        return socket.create_connection(("127.0.0.1", port), TIMEOUT)
    except ConnectionRefusedError:
        return None


@pytest.fixture
def roomy(vm_image: image.Image, socket_path: str) -> Iterator[Resident]:
    """For large programs: in 256 MiB and on one processor podman leaves no time to others."""
    args = cmdline.doorbell(socket_path, 4)
    with Server(socket_path, "1M", vectors=4, channels="768K").start():
        with Guest(**STAYS, args=args, iommu=True, memory="1G", cpus=2) as guest:
            yield Resident(guest)


@pytest.fixture
def ssh_name(socket_path: str, keys: Path) -> dict[str, str]:
    """An environment in which `ssh guest` is a session by `--stdio`, as a line of ~/.ssh/config."""
    program = keys / "bin" / "ssh"
    program.parent.mkdir()
    options = ssh(keys, Path(socket_path))[1:-1]
    program.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} {shlex.join(options)} "$@"\n')
    program.chmod(0o755)
    return {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}", "HOME": str(keys)}


@pytest.mark.nightly
def test_what_builds_on_ssh(roomy: Resident, keys: Path, ssh_name: dict[str, str]) -> None:
    """rsync, git, and Docker's command at a server of its API, all with a guest."""
    if missing := [name for name in ("rsync", "git", "docker", "podman") if not shutil.which(name)]:
        pytest.skip(f"apt-get install rsync git docker.io podman (no {missing[0]})")

    def run(*words: str | Path) -> str:
        done = subprocess.run(
            words, env=ssh_name, capture_output=True, text=True, check=False, timeout=TIMEOUT
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    sent = keys / "sent"
    sent.mkdir()
    for number in range(20):
        (sent / f"{number}").write_bytes(os.urandom(number * 1000))
    with in_guest(roomy, keys):
        run("ssh", "root@guest", "mkdir -p /run/far && git init -q --bare /run/far/repository")
        run("rsync", "-a", f"{sent}/", "root@guest:/run/far/sent/")
        (sent / "3").write_bytes(b"changed")
        (sent / "4").unlink()
        run("rsync", "-a", "--delete", f"{sent}/", "root@guest:/run/far/sent/")
        run("rsync", "-a", "root@guest:/run/far/sent/", f"{keys}/back/")
        assert contents(keys / "back") == contents(sent)

        commit = ("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "all of it")
        run("git", "-C", sent, "init", "-q")
        run("git", "-C", sent, "add", ".")
        run("git", "-C", sent, *commit)
        run("git", "-C", sent, "push", "-q", "root@guest:/run/far/repository", "HEAD:main")
        run("git", "clone", "-q", "-b", "main", "root@guest:/run/far/repository", keys / "clone")
        assert contents(keys / "clone") == contents(sent)

        run(
            *("ssh", "root@guest", "podman --root /run/far/images --runroot /run/far/running"),
            "--storage-driver vfs system service --time 0 unix:///run/docker.sock"
            " </dev/null >/dev/null 2>&1 & until [ -S /run/docker.sock ]; do sleep 0.1; done",
        )
        form = "{{range .Server.Components}}{{.Name}} {{end}}"
        said = run("docker", "-H", "ssh://root@guest", "version", "--format", form)
        assert "Podman Engine" in said
        assert run("docker", "-H", "ssh://root@guest", "images", "-q") == ""
        run("ssh", "root@guest", "pkill -f 'podman .*system servic[e]'")


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder, but for those of git."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


# Each end of a forward between two guests. The first argument says which; with a second one it is a
# client of a broker. Sockets are of Unix: a guest has no network.
GUEST_END = r"""
import hashlib, os, signal, socket, subprocess, sys, threading

command = [sys.executable, "-m", "ivshmem"]
place = ["--guest", "--memory", "vfio"]
broker = None
if len(sys.argv) > 2:
    place = ["-S", "/run/forward-broker"]
    broker = subprocess.Popen([*command, "guest", "serve", *place], stdout=subprocess.PIPE)
    broker.stdout.readline()

def started(*words):
    process = subprocess.Popen(
        [*command, "forward", *place, "both", *words], stderr=subprocess.PIPE
    )
    while b"both: " not in (line := process.stderr.readline()):
        assert line
    return process

if sys.argv[1] == "connect":
    target = socket.socket(socket.AF_UNIX)
    target.bind("\0target")
    target.listen()
    forward = started("--connect", "unix:@target", "--connections", "2", "--buffer", "32K")
    print("STARTED", flush=True)
    with target.accept()[0] as end:
        while data := end.recv(1 << 16):
            end.sendall(data)
    target.accept()[0].close()  # without reading what came: a reset
else:
    forward = started("--listen", "unix:@listens")
    data = os.urandom(100_000)
    with socket.socket(socket.AF_UNIX) as end:
        end.connect("\0listens")
        def send():
            end.sendall(data)
            end.shutdown(socket.SHUT_WR)
        threading.Thread(target=send).start()
        came = bytearray()
        while part := end.recv(1 << 16):
            came += part
    print("ECHO", came == data, flush=True)
    with socket.socket(socket.AF_UNIX) as end:
        end.connect("\0listens")
        end.settimeout(60)
        try:
            while True:
                end.sendall(bytes(1 << 16))
        except (BrokenPipeError, ConnectionResetError):
            print("REFUSED", flush=True)
sys.stdin.readline()
forward.send_signal(signal.SIGTERM)
print("ENDED", forward.wait(), flush=True)
if broker is not None:
    broker.send_signal(signal.SIGTERM)
    broker.wait()
"""


@pytest.mark.nightly
@pytest.mark.parametrize("broker", [(), ("broker",)])
def test_guest_to_guest(pair: Pair, pair_host: ivshmem.Client, broker: tuple[str, ...]) -> None:
    """Bytes both ways at once, a half-close, and a target that goes without reading."""
    ivshmem.Directory.create(pair_host.region, channels="512K").close()
    connects = pair.a.run(GUEST_END, "connect", *broker)
    connects.expect("STARTED")
    listens = pair.b.run(GUEST_END, "listen")
    assert listens.expect("ECHO") == "ECHO True"
    listens.expect("REFUSED")
    for run in (listens, connects):
        run.send("end")
        assert run.expect("ENDED") == "ENDED 0"
        assert run.wait() == 0


# The guest's side of a forward to a socket that sends back what comes. Arguments: the forward's.
ECHO = r"""
import signal, socket, subprocess, sys, threading

target = socket.socket(socket.AF_UNIX)
target.bind("\0echo")
target.listen(100)

def echo(end):
    with end:
        try:
            while data := end.recv(1 << 18):
                end.sendall(data)
        except OSError as error:
            print("BROKEN", type(error).__name__, flush=True)
        print("CLOSED", flush=True)

def accept():
    while True:
        threading.Thread(target=echo, args=(target.accept()[0],), daemon=True).start()

def started():
    process = subprocess.Popen(
        [sys.executable, "-m", "ivshmem", "forward", "--guest", "--memory", "vfio", "-v", "echo",
         "--connect", "unix:@echo", *sys.argv[1:]],
        stderr=subprocess.PIPE,
    )
    while b"echo: connects to" not in (line := process.stderr.readline()):
        assert line
    threading.Thread(target=process.stderr.read, daemon=True).start()
    print("STARTED", flush=True)
    return process

threading.Thread(target=accept, daemon=True).start()
forward = started()
for line in sys.stdin:
    forward.send_signal(signal.SIGKILL if line.strip() == "kill" else signal.SIGTERM)
    print("ENDED", forward.wait(), flush=True)
    if line.strip() == "end":
        break
    forward = started()
"""
ROOM = ("--connections", "24", "--buffer", "64K")  # whoever comes first creates the channel


@contextmanager
def echoing(socket_path: str) -> Iterator[Resident]:
    """A guest with a processor for the program that echoes."""
    with Guest(**STAYS, args=cmdline.doorbell(socket_path, 4), iommu=True, cpus=2) as guest:
        yield Resident(guest)


@pytest.fixture
def near(socket_path: str, tmp_path: Path) -> Iterator[Forward]:
    """The host's side, which listens, beside its server."""
    with Server(socket_path, "16M", vectors=4, channels="8M").start():
        words = ("-v", "echo", "--listen", "tcp:127.0.0.1:0")
        side = Forward(tmp_path, "near", socket_path, *words, *ROOM)
        yield side
        assert side.end() == 0


def dial(near: Forward) -> socket.socket:
    return socket.create_connection(("127.0.0.1", near.port()), timeout=TIMEOUT)


def is_echoed(near: Forward, size: int, seed: int) -> bool:
    """Whether so many bytes come back as they were sent, while more are sent."""
    block = hashlib.shake_256(seed.to_bytes(4, "big")).digest(1_000_000)
    sent, came = hashlib.sha256(), hashlib.sha256()
    with dial(near) as end:

        def send() -> None:
            for _ in range(size // len(block)):
                end.sendall(block)
                sent.update(block)
            end.shutdown(socket.SHUT_WR)

        sending = threading.Thread(target=send)
        sending.start()
        while data := end.recv(1 << 18):
            came.update(data)
        sending.join()
    return came.digest() == sent.digest()


@pytest.mark.nightly
def test_24_large_connections_with_checksums(near: Forward, socket_path: str) -> None:
    """100 MB each, to the guest and back at once."""
    with echoing(socket_path) as guest:
        run = guest.run(ECHO, *ROOM)
        run.expect("STARTED")
        with ThreadPoolExecutor(24) as pool:
            echoed = list(pool.map(lambda seed: is_echoed(near, 100_000_000, seed), range(24)))
        assert echoed == [True] * 24
        run.send("end")
        assert run.expect("ENDED") == "ENDED 0"
        assert run.wait() == 0


@pytest.mark.nightly
def test_each_side_is_killed(near: Forward, socket_path: str) -> None:
    """In the middle: the process in the guest, the one on the host, the virtual machine."""
    block = os.urandom(1 << 20)

    def in_the_middle() -> socket.socket:
        end = dial(near)
        end.settimeout(TIMEOUT)
        end.sendall(block)
        assert received(end, 1 << 19) == block[: 1 << 19]
        return end

    with echoing(socket_path) as guest:
        run = guest.run(ECHO, *ROOM)
        run.expect("STARTED")
        with in_the_middle() as end:
            run.send("kill")
            assert run.expect("ENDED") == "ENDED -9"
            assert is_reset(end)
        run.expect("STARTED")
        with in_the_middle():
            near.kill()
            assert run.expect("BROKEN").split()[1] in ("BrokenPipeError", "ConnectionResetError")
        near.again()
        assert is_echoed(near, 3_000_000, 1)
        with in_the_middle() as end:
            os.kill(guest.pid, signal.SIGKILL)
            assert is_reset(end)
            near.says("the other side has been silent for")
    assert is_refused(near.port())
    with echoing(socket_path) as guest:
        run = guest.run(ECHO, *ROOM)
        run.expect("STARTED")
        assert is_echoed(near, 3_000_000, 2)
        run.send("end")
        assert run.expect("ENDED") == "ENDED 0"
        assert run.wait() == 0


COMMANDS = r"""
import subprocess, sys

def run(*words, stdin=None):
    command = [sys.executable, "-m", "ivshmem", "channel", words[0], "--guest", *words[1:]]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print("RAN", words[0], flush=True)
    return done.stdout

assert "log" in run("ls")
print("GOT", run("cat", "log", "--history", "1", "-n", "1", "-t", "60"), flush=True)
run("put", "log", "from the guest")
print("RATE", run("hz", "log", "-n", "2", "-i", "0.5").splitlines()[-1], flush=True)
assert ", message mean " in run("bw", "log", "-n", "2", "-i", "0.5")
assert run("tail", "log", "-n", "2", "--lines") == "x\nx\n"
assert "log" in run("top", "-n", "1", "-i", "0.5")
run("record", "/tmp/a.mcap", "log", "-t", "2")
assert run("call", "ask", "hello", "-t", "60") == "HELLO"
assert "ask" in run("info")
run("rm", "log", "--force")
run("replay", "/tmp/a.mcap", "--speed", "inf")
assert "log" in run("ls")
"""


@pytest.mark.nightly
def test_channel_commands_in_a_guest(pair: Pair, pair_host: ivshmem.Client) -> None:
    """Each of them, with the host at the other end."""
    ivshmem.Directory.create(pair_host.region, channels="512K").close()
    with channel.open(pair_host) as channels:
        log = channels.create_messages("log", limit=100)
        with log.reader() as reader, log.writer() as writer:
            writer.put(b"from the host")
            run = pair.a.run(COMMANDS)
            server = channels.create_calls("ask", limit=100).server()
            threading.Thread(target=_serve, args=(server,)).start()
            assert run.expect("GOT") == "GOT from the host"
            messages = iter(lambda: reader.get(timeout=TIMEOUT), b"from the guest")
            assert list(messages) == [b"from the host"]
            ended = threading.Event()

            def write() -> None:
                with contextlib.suppress(ivshmem.ClosedError):  # the guest removes it
                    while not ended.wait(0.05):
                        reader.get(0)
                        writer.put(b"x", timeout=TIMEOUT)

            thread = threading.Thread(target=write)
            thread.start()
            try:
                assert "/s, interval min " in run.expect("RATE")
                for command in (
                    "bw",
                    "tail",
                    "top",
                    "record",
                    "call",
                    "info",
                    "rm",
                    "replay",
                    "ls",
                ):
                    run.expect(f"RAN {command}")
            finally:
                ended.set()
                thread.join()
                server.close()
            assert run.wait() == 0


def _serve(server: channel.CallServer) -> None:
    with contextlib.suppress(ivshmem.ClosedError):
        server.serve(bytes.upper)
