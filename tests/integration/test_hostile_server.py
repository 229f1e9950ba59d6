"""What a hostile server at a squatted path can do to a client: SECURITY.md claims this much."""

from __future__ import annotations

import mmap
import os
import signal
import socket
import subprocess
import sys

from support.isolated import environment
from support.peer import FakeServer, send_raw
from support.waiting import PATIENCE

CLIENT = """
import sys, ivshmem
with ivshmem.connect(sys.argv[1], timeout=30, vectors=1) as client:
    client.region.write(0, b"secret")
    print("connected", flush=True)
    sys.stdin.readline()
    client.region.read(0, 6)
    print("alive", flush=True)
"""


def test_it_reads_what_the_client_writes_and_can_end_the_client(socket_path: str) -> None:
    """Its memory is its own: it reads it, and when it shrinks it, the client dies of SIGBUS."""
    memory = os.memfd_create("not-sealed")
    os.ftruncate(memory, 4096)
    bell = os.eventfd(0)

    def greet(sock: socket.socket) -> None:
        send_raw(sock, 0)
        send_raw(sock, 0)
        send_raw(sock, -1, memory)
        send_raw(sock, 0, bell)
        assert sock.recv(1) == b""

    with (
        FakeServer(socket_path, greet),
        subprocess.Popen(
            [sys.executable, "-c", CLIENT, socket_path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        ) as client,
    ):
        assert client.stdout is not None
        assert client.stdout.readline() == "connected\n"
        with mmap.mmap(memory, 4096) as seen:
            assert seen[:6] == b"secret"
        os.ftruncate(memory, 0)
        client.communicate("\n", timeout=PATIENCE)
        assert client.returncode == -signal.SIGBUS
    os.close(memory)
    os.close(bell)
