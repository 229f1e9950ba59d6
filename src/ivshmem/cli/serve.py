"""`ivshmem serve`: the server, in the foreground, for a person or for an init system."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import resource
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from .. import pages, qemu, sockets
from ..directory import MAX_SLOTS, SLOT_BYTES, Directory
from ..engine import Peer
from ..errors import RegionError
from ..protocol import MAX_VECTORS
from ..region import Region
from ..server import Server
from ..sizes import format_size
from . import daemon
from .news import News

# The example server's, so that what is written for it finds this one.
DEFAULT_SOCKET = "/tmp/ivshmem_socket"  # noqa: S108
DEFAULT_PID_FILE = "/var/run/ivshmem-server.pid"
DEFAULT_SIZE = "4M"


def add_to(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "serve",
        help="run the server that guests and clients connect to",
        description="Run an ivshmem server in the foreground. At start it prints the lines to paste"
        " into QEMU and libvirt; then a line for each peer that joins or leaves.",
        epilog="SIZE is a power of two: bytes, or a number with K, M, G or T, such as 4M. The"
        " memory is anonymous unless --name, --file or --directory says where it comes from.",
    )
    parser.add_argument(
        "-S",
        "--socket",
        metavar="PATH",
        default=DEFAULT_SOCKET,
        help="the socket to listen on (default: %(default)s)",
    )
    parser.add_argument(
        "-l", "--size", metavar="SIZE", help=f"of the memory (default: {DEFAULT_SIZE})"
    )
    parser.add_argument(
        "-n",
        "--vectors",
        metavar="N",
        type=vectors,
        default=1,
        help=f"interrupts of each peer, 0 to {MAX_VECTORS} (default: %(default)s)",
    )
    memory = parser.add_argument_group("where the memory comes from")
    place = memory.add_mutually_exclusive_group()
    place.add_argument(
        "-M",
        "--name",
        help="a POSIX shared memory name, seen in /dev/shm; removed at the end if made here",
    )
    place.add_argument("-f", "--file", metavar="PATH", help="a file, as QEMU's mem-path; kept")
    place.add_argument(
        "-m",
        "--directory",
        metavar="DIR",
        help="an unlinked file in DIR, for instance a hugetlbfs mount (or a POSIX name, if there is"
        " no such directory and no slash in it)",
    )
    memory.add_argument(
        "--hugepages",
        nargs="?",
        const=True,
        default=False,
        metavar="SIZE",
        help="in huge pages, of the default size or of SIZE (2M, 1G)",
    )
    memory.add_argument("--prealloc", action="store_true", help="take all pages at start")
    memory.add_argument(
        "--existing",
        choices=("attach", "refuse", "replace", "require"),
        default="attach",
        help="what to do with a name or file that exists: use it as it is (the default), refuse it,"
        " make a new one; or require one",
    )
    memory.add_argument(
        "--readonly",
        action="store_true",
        help="attach for reading only: nobody can write (QEMU refuses such memory, clients do not)",
    )
    memory.add_argument("--keep", action="store_true", help="leave a name that was made here")
    memory.add_argument(
        "--names",
        nargs="?",
        const=0,
        metavar="SLOTS",
        type=slots,
        help="make a directory of names at its end, in which peers publish who they are; with room"
        " for SLOTS of them, 63 if there is space",
    )
    process = parser.add_argument_group("the process")
    process.add_argument("-p", "--pid-file", metavar="PATH", help="to lock and write the pid to")
    process.add_argument("-F", "--foreground", action="store_true", help="stay (the default)")
    process.add_argument("--daemon", action="store_true", help="go into the background once ready")
    process.add_argument("-v", "--verbose", action="store_true", help="tell more")
    process.add_argument(
        "-q", "--quiet", action="store_true", help="say nothing of joins and leaves"
    )
    parser.set_defaults(run=run)


def vectors(text: str) -> int:
    """A number of vectors from the command line."""
    try:
        number = int(text, 0)
    except ValueError:
        number = -1
    if not 0 <= number <= MAX_VECTORS:
        raise argparse.ArgumentTypeError(f"{text} vectors: allowed are 0 to {MAX_VECTORS}")
    return number


def slots(text: str) -> int:
    """A number of slots for names from the command line."""
    try:
        number = int(text, 0)
    except ValueError:
        number = -1
    if not 1 <= number <= MAX_SLOTS:
        raise argparse.ArgumentTypeError(f"{text} slots: allowed are 1 to {MAX_SLOTS}")
    return number


def run(options: argparse.Namespace) -> int:
    """Serve as the options say, until a signal."""
    memory = Memory.from_options(options)
    level = logging.DEBUG if options.verbose else logging.INFO
    work = partial(
        serve,
        options.socket,
        memory,
        options.vectors,
        pid_file=options.pid_file,
        quiet=options.quiet,
        level=level,
        names=options.names,
    )
    if options.daemon and not options.foreground:
        from . import guarded  # here, for the package imports this module

        return daemon.in_background(partial(guarded, work), silent=not options.verbose)
    return work(lambda: None)


def serve(
    socket: str,
    memory: Memory,
    vectors: int,
    ready: Callable[[], None],
    *,
    pid_file: str | None,
    quiet: bool,
    level: int = logging.INFO,
    names: int | None = None,
) -> int:
    """Open the memory, serve it until a signal says to end, and leave nothing behind.

    With `names`, it has a directory of so many slots (0: the usual number).
    """
    _raise_fd_limit()
    # Signals wait until there is something to stop, and again from the end on: what was made is
    # removed, whenever they come.
    with (
        daemon.signals_held(),
        daemon.pid_file(pid_file),
        News(sys.stderr, level) as news,
        # The socket first: what a second server would do to the first one's memory comes after it.
        sockets.Listener(socket) as listener,
        memory.open() as region,
        Server(
            listener,
            region,
            vectors,
            on_join=None if quiet else partial(tell_peer, news, "joined"),
            on_leave=None if quiet else partial(tell_peer, news, "left"),
        ) as server,
    ):
        directory = None if names is None else Directory.create(region, names or None)
        print(banner(server, directory), flush=True)
        ready()
        with daemon.ended_by_signals(server.stop):
            server.serve_forever()
    return 0


def banner(server: Server, directory: Directory | None = None) -> str:
    """What a person needs next: the lines to paste."""
    region = server.region
    pages = f" in pages of {format_size(region.page_size)}"
    where = region.source + (f" {region.name}" if region.name else "")
    connect = [sys.executable, "-m", "ivshmem", "connect", "-S", server.path]
    return (
        f"serving {format_size(region.size)} ({where},{pages}) with {count(server.vectors)}"
        f" on {server.path}, pid {os.getpid()}\n"
        f"  QEMU:    {qemu.shell(qemu.doorbell(server.path, server.vectors))}\n"
        f"  libvirt: {qemu.libvirt_doorbell(server.path, server.vectors)}\n"
        f"  host:    {qemu.shell(connect)}"
        + ("" if directory is None else f"\n  names:   {room(directory)}")
    )


def tell_peer(news: News, verb: str, peer: Peer) -> None:
    """Say that a peer "joined" or "left"."""
    who = f"{peer.process} (pid {peer.pid}), {count(peer.vectors)}"
    news.tell(f"peer {peer.id} {verb}: {who}")


def room(directory: Directory) -> str:
    """What a directory of names takes, and has to offer."""
    taken = format_size(directory.slots * SLOT_BYTES + SLOT_BYTES)
    return f"{directory.slots} slots in the last {taken}, from {directory.start:#x} on"


def count(vectors: int) -> str:
    return "1 vector" if vectors == 1 else f"{vectors} vectors"


# -- the memory that the options mean -------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Where a server's memory comes from, and what becomes of it."""

    size: int | str | None
    name: str | None = None
    path: str | None = None
    directory: str | None = None
    hugepages: bool | str = False
    prealloc: bool = False
    existing: str = "attach"
    readonly: bool = False
    keep: bool = False

    @classmethod
    def from_options(cls, options: argparse.Namespace) -> Memory:
        directory, name = directory_or_name(options)
        return cls(
            options.size,
            name,
            options.file,
            directory,
            options.hugepages,
            options.prealloc,
            options.existing,
            options.readonly,
            options.keep,
        )

    @contextlib.contextmanager
    def open(self) -> Iterator[Region]:
        """The region, closed at the end; a POSIX name that was made here is removed, too."""
        region, created = self._make()
        with region:
            try:
                yield region
            finally:
                if created and region.source == "posix" and not self.keep:
                    region.unlink()

    def _make(self) -> tuple[Region, bool]:
        size = DEFAULT_SIZE if self.size is None else self.size
        named = self.name is not None or self.path is not None
        if self.readonly or self.existing == "require":
            if not named:
                raise RegionError("only a name or a file can be attached to: give --name or --file")
            return self._attach(), False
        if named and self.existing == "attach":
            with contextlib.suppress(FileNotFoundError):
                return self._attach(), False
        region = Region.create(
            size,
            name=self.name,
            path=self.path,
            directory=self.directory,
            hugepages=self.hugepages,
            prealloc=self.prealloc,
            replace=self.existing == "replace",
        )
        return region, True

    def _attach(self) -> Region:
        region = Region.attach(
            name=self.name,
            path=self.path,
            size=self.size,
            readonly=self.readonly,
            prealloc=self.prealloc,
        )
        if self.hugepages and region.page_size == pages.PAGE:
            region.close()
            raise RegionError(f"{region.name} is not in huge pages: leave --hugepages away")
        return region


def directory_or_name(options: argparse.Namespace) -> tuple[str | None, str | None]:
    """What -m and -M mean, of which one at most was given."""
    if options.directory is not None and is_name(options.directory):
        return None, options.directory
    return options.directory, options.name


def is_name(text: str) -> bool:
    """Whether -m, which takes a directory, was given a POSIX name, as in QEMU's manual."""
    return not os.path.isdir(text) and "/" not in text


# -- the process ----------------------------------------------------------------------------------


def _raise_fd_limit() -> None:
    """A server holds a socket and its vectors for each peer; the usual 1,024 is soon too few."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
