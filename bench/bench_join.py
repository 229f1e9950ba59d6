"""What a join costs the server, in CPU time for each message sent, beside a sendmmsg loop in C.

N peers connect one after the other, as guests do; each newcomer is told of everyone there, and
everyone there of it: about V x N x N messages in all. The peers read as fast as they can.
"""

import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from ivshmem import _wire

from .conftest import Compare

VECTORS = 8


def take(sock: socket.socket, count: int) -> None:
    """Read so many messages and close what comes with them."""
    while count:
        chunks, eof = _wire.receive(sock.fileno(), count)
        assert not eof
        for data, fds in chunks:
            assert len(data) == 8
            for fd in fds:
                os.close(fd)
        count -= len(chunks)


def cpu_nanoseconds(pid: int) -> int:
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0])


def join_all(path: Path, peers: int) -> float:
    """The server's CPU nanoseconds for each message while `peers` clients join."""
    command = [sys.executable, "-m", "ivshmem", "serve", "--quiet"]
    command += ["-S", str(path), "-n", str(VECTORS)]
    with ExitStack() as stack:
        server = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE))
        stack.callback(server.terminate)
        assert server.stdout is not None
        server.stdout.readline()
        before = cpu_nanoseconds(server.pid)
        there: list[socket.socket] = []
        messages = 0
        for _ in range(peers):
            newcomer = stack.enter_context(socket.socket(socket.AF_UNIX))
            newcomer.connect(str(path))
            take(newcomer, 3 + VECTORS * (len(there) + 1))
            for other in there:
                take(other, VECTORS)
            messages += 3 + VECTORS * (2 * len(there) + 1)
            there.append(newcomer)
        return (cpu_nanoseconds(server.pid) - before) / messages


@pytest.mark.parametrize("peers", [10, 100, 200])
def bench_join(benchmark: BenchmarkFixture, compare: Compare, tmp_path: Path, peers: int) -> None:
    path = tmp_path / "socket"
    ours, ratio = compare(lambda: join_all(path, peers), ["send", "100000", "64"])
    benchmark.extra_info.update(cpu_ns_per_message=round(ours), ratio_to_c=round(ratio, 2))
    benchmark.pedantic(join_all, (path, peers), rounds=3)  # type: ignore[no-untyped-call]
