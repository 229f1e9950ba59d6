"""The guests that stay up for several tests, and the servers that they are connected to.

Knows: which machines there are. Two with an IOMMU share a server that can be killed; one without
has the devices of QEMU's manual.
Does not know: what is tested in them.
"""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from support.waiting import until

import ivshmem
from ivshmem.qemu import cmdline

from .harness import Guest
from .host import TIMEOUT
from .manual import end_server, run_server
from .resident import STAYS, Resident
from .supervised import Supervised


@contextmanager
def fresh_client(path: str | os.PathLike[str]) -> Iterator[ivshmem.Client]:
    """A client of a server, which clears the memory first: earlier tests have written there."""
    with ivshmem.connect(path, timeout=TIMEOUT) as client:
        with memoryview(client.region) as memory:
            memory[:] = bytes(len(memory))
        yield client


@dataclass(frozen=True)
class Pair:
    """Two guests with an IOMMU, peers 1 and 2 of a server with 1 MiB and four vectors."""

    a: Resident
    b: Resident
    server: Supervised


@contextmanager
def pair() -> Iterator[Pair]:
    with ExitStack() as undo:
        folder = undo.enter_context(tempfile.TemporaryDirectory(prefix="ivshmem-pair-"))
        server = Supervised(Path(folder), 4)
        undo.callback(server.close)
        args = cmdline.doorbell(str(server.path), server.vectors)
        guests = []
        # Peer 0, so that the guests take their ids in this order.
        with ivshmem.connect(server.path, timeout=TIMEOUT) as client:
            for name in ("a", "b"):
                guest = Guest(**STAYS, args=args, iommu=True, name=name)
                guests.append(undo.enter_context(guest))
                until(lambda: client.peers == [*range(1, len(guests) + 1)], "a guest's joining")
        a, b = map(Resident, guests)
        yield Pair(a, b, server)


@dataclass(frozen=True)
class Manual:
    """A guest without an IOMMU, with both devices: 1 MiB each, and four vectors."""

    guest: Resident
    path: Path  # the server's socket
    name: str  # the plain device's memory, a POSIX name


@contextmanager
def manual() -> Iterator[Manual]:
    """The command lines of QEMU's own manual, as they stand there.

    Source: QEMU's docs/system/devices/ivshmem.rst. Its placeholders (path, shm-size, vectors ..)
    are filled in, and nothing else is changed.
    """
    with ExitStack() as undo:
        folder = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="ivshmem-manual-")))
        plain, shared = (f"ivshmem-seed-{os.getpid()}-{each}" for each in ("plain", "server"))
        pidfile, path, size, vectors = folder / "pid", folder / "socket", "1M", 4
        run_server(f"ivshmem-server -p {pidfile} -S {path} -m {shared} -l {size} -n {vectors}")
        undo.callback(lambda: assert_gone(path, Path("/dev/shm", shared)))
        undo.callback(end_server, pidfile)
        lines = (
            "-device ivshmem-plain,memdev=hostmem"
            f" -object memory-backend-file,size={size},share,mem-path=/dev/shm/{plain},id=hostmem",
            f"-device ivshmem-doorbell,vectors={vectors},chardev=id"
            f" -chardev socket,path={path},id=id",
        )
        undo.callback(lambda: Path("/dev/shm", plain).unlink(missing_ok=True))
        args = [word for line in lines for word in shlex.split(line)]
        guest = undo.enter_context(Guest(**STAYS, args=args, modules=["drivers"]))
        yield Manual(Resident(guest), path, plain)


def assert_gone(*paths: Path) -> None:
    assert [path for path in paths if path.exists()] == []
