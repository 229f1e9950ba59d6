"""Internal: servers for tests, each with a socket of its own.

Knows: temporary sockets. Does not know: pytest; fixtures.py does.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any, SupportsIndex

from ..memory.region import Region
from ..server.server import Server


@contextlib.contextmanager
def server(
    memory: Region | SupportsIndex | str = "64K", vectors: int = 1, **options: Any
) -> Iterator[Server]:
    """Run a server in a thread of its own while the block runs; `server.path` is its socket.

    The socket is in a new directory that only this user can enter. It is removed at the end.

    Args:
        memory: a Region, which stays the caller's; or the size of one that the server makes.
        vectors: of each peer, 0..2048.
        options: more arguments of `ivshmem.Server`, such as names=True or gate=.

    Raises:
        ServerFailed: at the end of the block, if the server's thread ended by an error.
        ValueError, OSError: as of `ivshmem.Server`.
    """
    # Not below $TMPDIR, which can be too long for a socket's path (107 bytes).
    directory = tempfile.mkdtemp(prefix="ivshmem-", dir="/tmp")
    try:
        path = os.path.join(directory, "socket")
        with Server(path, memory, vectors, **options) as running:
            yield running.start()
    finally:
        shutil.rmtree(directory, ignore_errors=True)
