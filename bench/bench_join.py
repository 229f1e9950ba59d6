"""What a join costs the server, in CPU time and memory, beside loops of sendmmsg in C.

N peers connect one after the other, as guests do; each newcomer is told of everyone there, and
everyone there of it: about V x N x N messages in all. The peers read as fast as they can, and
count: each is told of each, with all vectors, once.
"""

import resource
import socket
import subprocess
import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from ivshmem.native import wire

from .conftest import Baseline


class Cost(NamedTuple):
    """What it took: CPU nanoseconds for each message, resident bytes for each peer."""

    cpu: float
    memory: float


class Listener:
    """A peer that counts the vectors it is told of, by id."""

    def __init__(self, sock: socket.socket, path: Path) -> None:
        self.socket = sock
        sock.connect(str(path))
        self.told: Counter[int] = Counter()

    def take(self, count: int) -> None:
        """Read so many messages and close what comes with them."""
        while count:
            chunks, eof = wire.receive(self.socket.fileno(), count)
            assert not eof
            for data, fds in chunks:
                self.told[int.from_bytes(data, "little", signed=True)] += len(fds)
                for fd in fds:
                    fd.close()
            count -= len(chunks)


def cpu_nanoseconds(pid: int) -> int:
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0])


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


def join_all(path: Path, peers: int, vectors: int) -> Cost:
    """What it costs that so many clients join."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard < peers * (vectors + 1) + 100:
        pytest.skip(f"more descriptors are needed than {hard}: ulimit -Hn")
    command = [sys.executable, "-m", "ivshmem", "serve", "--quiet"]
    command += ["-S", str(path), "-n", str(vectors)]
    with ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        server = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE))
        stack.callback(server.terminate)
        assert server.stdout is not None
        server.stdout.readline()
        cpu, memory = cpu_nanoseconds(server.pid), resident(server.pid)
        there: list[Listener] = []
        messages = 0
        for _ in range(peers):
            newcomer = Listener(stack.enter_context(socket.socket(socket.AF_UNIX)), path)
            newcomer.take(3 + vectors * (len(there) + 1))
            for other in there:
                other.take(vectors)
            messages += 3 + vectors * (2 * len(there) + 1)
            there.append(newcomer)
        cpu, memory = cpu_nanoseconds(server.pid) - cpu, resident(server.pid) - memory
        everybody = {-1: 1, **dict.fromkeys(range(peers), vectors)}
        assert all(peer.told == everybody for peer in there)
        return Cost(cpu / messages, memory / peers)


CASES = [(10, 8), (100, 8), (200, 8), (1000, 8), (100, 1), (1000, 1), (4000, 1)]


@pytest.mark.parametrize(("peers", "vectors"), CASES, ids=[f"{p}x{v}" for p, v in CASES])
@pytest.mark.timeout(900)
def bench_join(
    benchmark: BenchmarkFixture, baseline: Baseline, tmp_path: Path, peers: int, vectors: int
) -> None:
    path = tmp_path / "socket"
    rounds = 5 if peers * vectors < 2000 else 1
    cost, to_send, to_tell = [], [], []
    for _ in range(rounds):
        floors = [(baseline("send", 100000, 64), baseline("tell", 100000, peers, vectors))]
        cost.append(join_all(path, peers, vectors))
        floors.append((baseline("send", 100000, 64), baseline("tell", 100000, peers, vectors)))
        to_send.append(cost[-1].cpu / (sum(send for send, _ in floors) / 2))
        to_tell.append(cost[-1].cpu / (sum(tell for _, tell in floors) / 2))
    middle = rounds // 2
    benchmark.extra_info.update(
        cpu_ns_per_message=round(sorted(cost)[middle].cpu),
        ratio_to_sendmmsg=round(sorted(to_send)[middle], 2),
        ratio_to_the_same_calls=round(sorted(to_tell)[middle], 2),
        kib_per_peer=round(min(each.memory for each in cost) / 1024, 1),
    )
    benchmark.pedantic(lambda: None, rounds=1)  # type: ignore[no-untyped-call]
