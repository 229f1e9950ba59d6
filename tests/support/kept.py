"""A server that a keeper's child serves, as a program: PATH VECTORS. Prints each child's pid."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys

from ivshmem import Region
from ivshmem.lasting.journal import Journal, Section
from ivshmem.lasting.supervisor import strays, supervise
from ivshmem.server.records import member_record
from ivshmem.server.region_server import RegionServer
from ivshmem.system.listener import Listener


def main(path: str, vectors: int) -> int:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    journal = Journal()
    region = Region.create("1M")
    listener = Listener(path)
    with os.scandir("/proc/self/fd") as entries:
        baseline = {int(entry.name) for entry in entries}

    def run(deaths: list[str]) -> int:
        again = bool(deaths)
        found = strays(baseline)
        listener.unlinks = False
        with RegionServer(listener, region, vectors, journal=Section(journal, 1)) as server:
            if again:
                state, records = journal.read()
                unfinished = journal.outbox.unfinished()
                told = [member_record(*record) for _, *record in records]
                server.resume(state, told, unfinished and unfinished[1:])
                adopt(server, found, path)
            journal.rewrite(server.snapshot())
            signal.signal(signal.SIGTERM, lambda *_: server.stop())
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
            print(os.getpid(), flush=True)
            while not server._stopping:
                server.step()
                if journal.long:
                    journal.rewrite(server.snapshot())
        os.unlink(path)
        return 0

    return supervise(run, {signal.SIGTERM})


def adopt(server: RegionServer, found: list[int], path: str) -> None:
    held = server.descriptors
    for fd in set(found) - held:
        with contextlib.suppress(OSError):
            sock = socket.socket(fileno=os.dup(fd))
            if sock.family == socket.AF_UNIX and sock.getsockname() == path:
                server.adopt(sock)
            else:
                sock.close()
        os.close(fd)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
