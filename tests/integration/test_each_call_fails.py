"""Each system call of a server fails in turn, as it does when memory or descriptors are short.

Nobody is dropped, nothing is lost, and whoever had to wait does not wait long.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import pytest
from support.faults import Faults
from support.peer import RawPeer
from support.waiting import PATIENCE, until

VECTORS = 2

SERVER = """
import os, signal, sys
from ivshmem import Server
if sys.argv[2] == "unprivileged":
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
with Server(sys.argv[1], "64K", vectors=2) as server:
    signal.signal(signal.SIGTERM, lambda *_: server.stop())
    print("READY", flush=True)
    server.serve_forever()
"""

FAILURES = {
    "accept4": (
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOBUFS,
        errno.ENOMEM,
        errno.ECONNABORTED,
        errno.EINTR,
    ),
    "eventfd": (errno.EMFILE, errno.ENFILE, errno.ENOMEM),
    "sendmmsg": (errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM, errno.EAGAIN, errno.EINTR),
    "epoll_ctl": (errno.ENOMEM, errno.ENOSPC),
    "epoll_wait": (errno.EINTR,),
    "setsockopt": (errno.ENOBUFS, errno.ENOMEM),
    "shutdown": (errno.ENOBUFS,),
    "open": (errno.EMFILE, errno.ENFILE, errno.ENOMEM),
}
# Before the call that fails, so many go well: each place where a join or a leave makes that call.
PLACES = {"sendmmsg": 5, "eventfd": 2}


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faults]:
    made = Faults(tmp_path_factory.mktemp("faults"))
    yield made
    made.close()


@pytest.fixture(scope="module", params=["privileged", "unprivileged"])
def server(request: pytest.FixtureRequest, faults: Faults) -> Iterator[str]:
    if request.param == "unprivileged" and os.geteuid():
        pytest.skip("whoever is not root is unprivileged in the other case")
    with tempfile.TemporaryDirectory(prefix="ivt") as directory:
        os.chmod(directory, 0o777)  # noqa: S103
        path = os.path.join(directory, "socket")
        process = subprocess.Popen(
            [sys.executable, "-c", SERVER, path, request.param],
            env={**os.environ, **faults.environment},
            stdout=subprocess.PIPE,
        )
        with process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"READY\n"
            yield path
            process.terminate()
            assert process.wait(PATIENCE) == 0


CASES = [
    (call, code, after)
    for call, codes in FAILURES.items()
    for code in codes
    for after in range(PLACES.get(call, 1))
]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("call", "code", "after"), CASES, ids=[f"{c}-{errno.errorcode[e]}-{a}" for c, e, a in CASES]
)
def test_it_fails(faults: Faults, server: str, call: str, code: int, after: int) -> None:
    with RawPeer(server) as stays, RawPeer(server) as leaves:
        stays.set_up(VECTORS)
        leaves.set_up(VECTORS)
        faults.arm(call, code, after=after)
        try:
            with RawPeer(server) as newcomer:
                newcomer.set_up(VECTORS)
                assert newcomer.vectors[stays.id] == stays.vectors[stays.id]
                stays.take_until(lambda: stays.counts.get(newcomer.id) == VECTORS)
                leaves.close()
                newcomer.take_until(lambda: leaves.id not in newcomer.counts)
                stays.take_until(lambda: leaves.id not in stays.counts)
                assert stays.vectors[newcomer.id] == newcomer.vectors[newcomer.id]
            stays.take_until(lambda: set(stays.counts) == {stays.id})
            if call != "setsockopt":  # which only unprivileged servers make
                until(lambda: faults.seen(call) == 1, f"{call} fails")
        finally:
            faults.disarm(call)
