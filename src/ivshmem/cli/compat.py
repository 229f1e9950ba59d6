"""`ivshmem-server`: the command line of QEMU's example server, unchanged.

Its options, defaults and habits: a daemon unless told otherwise, sizes rounded up to a power of
two, an existing name attached to and grown if it is too short. Its faults are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator, Sequence

from .. import pages
from ..region import Region, posix_path
from ..sizes import parse_size, round_up
from . import Parser, daemon, guarded
from .serve import (
    DEFAULT_PID_FILE,
    DEFAULT_SIZE,
    DEFAULT_SOCKET,
    Memory,
    is_name,
    serve,
    vectors,
)

DEFAULT_NAME = "ivshmem"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `ivshmem-server` and return the exit status."""
    parser = Parser(
        prog="ivshmem-server",
        description="An ivshmem server with the command line of QEMU's example server. It goes into"
        " the background; `ivshmem serve` has more to offer.",
        allow_abbrev=False,
    )
    parser.add_argument("-v", action="store_true", dest="verbose", help="tell of joins and leaves")
    parser.add_argument("-F", action="store_true", dest="foreground", help="stay in the foreground")
    parser.add_argument(
        "-p",
        metavar="PIDFILE",
        default=DEFAULT_PID_FILE,
        dest="pid_file",
        help="of the daemon (default: %(default)s)",
    )
    parser.add_argument(
        "-S",
        metavar="SOCKET",
        default=DEFAULT_SOCKET,
        dest="socket",
        help="the socket to listen on (default: %(default)s)",
    )
    memory = parser.add_mutually_exclusive_group()
    memory.add_argument(
        "-M",
        metavar="SHM_NAME",
        dest="name",
        help=f"POSIX shared memory name (default: {DEFAULT_NAME})",
    )
    memory.add_argument(
        "-m",
        metavar="DIR",
        dest="directory",
        help="a directory for the memory's file, for instance a hugetlbfs mount; or a POSIX name",
    )
    parser.add_argument(
        "-l",
        metavar="SIZE",
        default=DEFAULT_SIZE,
        dest="size",
        help="of the memory, rounded up to a power of two (default: %(default)s)",
    )
    parser.add_argument(
        "-n",
        metavar="VECTORS",
        type=vectors,
        default=1,
        dest="vectors",
        help="interrupts of each peer (default: %(default)s)",
    )
    return guarded(_run, parser.parse_args(arguments))


def _run(options: argparse.Namespace) -> int:
    def work(ready: Callable[[], None]) -> int:
        # The example server writes its pid only as a daemon.
        with daemon.pid_file(None if options.foreground else options.pid_file):
            return serve(
                options.socket,
                _Memory(options.size, options.name, directory=options.directory),
                options.vectors,
                quiet=not options.verbose,
                ready=ready,
            )

    if options.foreground:
        return work(lambda: None)
    return daemon.in_background(lambda ready: guarded(work, ready), silent=not options.verbose)


class _Memory(Memory):
    """Memory by the example server's rules."""

    @contextlib.contextmanager
    def open(self) -> Iterator[Region]:
        directory, name = self.directory, self.name
        if directory is not None and is_name(directory):
            directory, name = None, directory
        page = pages.PAGE if directory is None else pages.page_size_of(directory)
        size = max(round_up(parse_size(self.size or DEFAULT_SIZE)), page)
        if directory is None:
            name = name or DEFAULT_NAME
            size = _at_least(posix_path(name), size)
        with Memory(size, name, directory=directory).open() as region:
            yield region


def _at_least(path: str, size: int) -> int:
    """Grow what exists under a name to `size`, and return the size it then has."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return size
    try:
        if os.fstat(fd).st_size < size:
            os.posix_fallocate(fd, 0, size)
        return os.fstat(fd).st_size
    finally:
        os.close(fd)
