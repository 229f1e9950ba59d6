"""`ivshmem-server`: the command line of QEMU's example server, unchanged.

Its options, defaults and habits: a daemon unless told otherwise, sizes rounded up to a power of
two, an existing name attached to and grown if it is too short. Its faults are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator, Sequence
from functools import partial

from .. import pages
from ..region import Region, posix_path
from ..sizes import parse_size, round_up
from . import Parser, daemon, guarded, open_standard_streams
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
    # Of -M and -m the last one counts.
    parser.add_argument(
        "-M",
        metavar="SHM_NAME",
        dest="place",
        type=lambda text: ("name", text),
        default=("name", DEFAULT_NAME),
        help=f"POSIX shared memory name (default: {DEFAULT_NAME})",
    )
    parser.add_argument(
        "-m",
        metavar="DIR",
        dest="place",
        type=lambda text: ("name" if is_name(text) else "directory", text),
        default=argparse.SUPPRESS,
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
    open_standard_streams()
    return guarded(_run, parser.parse_args(arguments))


def _run(options: argparse.Namespace) -> int:
    work = partial(
        serve,
        options.socket,
        _Memory(options.size, **{options.place[0]: options.place[1]}),
        options.vectors,
        # The example server writes its pid only as a daemon.
        pid_file=None if options.foreground else options.pid_file,
        quiet=not options.verbose,
    )
    if options.foreground:
        return work(lambda: None)
    return daemon.in_background(partial(guarded, work), silent=not options.verbose)


class _Memory(Memory):
    """Memory by the example server's rules."""

    @contextlib.contextmanager
    def open(self) -> Iterator[Region]:
        page = pages.PAGE if self.directory is None else pages.page_size_of(self.directory)
        size = max(round_up(parse_size(self.size or DEFAULT_SIZE)), page)
        if self.name is not None:
            size = _at_least(posix_path(self.name), size)
        with Memory(size, self.name, directory=self.directory).open() as region:
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
