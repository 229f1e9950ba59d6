"""`ivshmem forward` between a real guest and its host: a session by ssh, and iperf3."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.forwards import Forward

import ivshmem

from .host import TIMEOUT
from .resident import Run
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
def in_guest(pair: Pair, keys: Path) -> Iterator[Run]:
    run = pair.a.run(GUEST, keys)
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
    with in_guest(pair, keys):
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
