"""`ivshmem-server`: the command line of QEMU's example server, unchanged.

Its options, defaults and habits: a daemon unless told otherwise, sizes rounded up to a power of
two, an existing name attached to and grown if it is too short. Its faults are left out.
"""

from __future__ import annotations

import argparse
import os
from functools import partial

from .. import __version__
from ..peer import default_paths
from ..service.limits import DEFAULT_SIZE
from . import daemon
from .arguments import DEFAULT_PID_FILE, add_accept_owner, is_name, socket_path, vectors
from .run import Parser, guarded, parsed, ran_short

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..service.config import RegionConfig

DEFAULT_NAME = "ivshmem"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `ivshmem-server` and return the exit status."""
    try:
        options = parsed(_parser(), arguments)
    except Exception as error:
        return ran_short(error)
    return guarded(_run, options)


def _parser() -> Parser:
    parser = Parser(
        prog="ivshmem-server",
        description="An ivshmem server with the command line of QEMU's example server. It runs in"
        " the background; `ivshmem serve` has more features.",
        allow_abbrev=False,
    )
    parser.add_argument("-V", "--version", action="version", version=f"ivshmem {__version__}")
    parser.add_argument("-v", action="store_true", dest="verbose", help="log joins and leaves")
    parser.add_argument("-F", action="store_true", dest="foreground", help="stay in the foreground")
    parser.add_argument(
        "-p",
        metavar="PIDFILE",
        default=DEFAULT_PID_FILE,
        dest="pid_file",
        help="pid file of the daemon (default: %(default)s)",
    )
    parser.add_argument(
        "-S",
        metavar="SOCKET",
        type=socket_path,
        default=default_paths.OF_THE_EXAMPLE,
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
        help="directory for the memory's file, for instance a hugetlbfs mount; or a POSIX name",
    )
    parser.add_argument(
        "-l",
        metavar="SIZE",
        default=DEFAULT_SIZE,
        dest="size",
        help="size of the memory, rounded up to a power of two (default: %(default)s)",
    )
    parser.add_argument(
        "-n",
        metavar="VECTORS",
        type=vectors,
        default=1,
        dest="vectors",
        help="number of interrupt vectors of each peer (default: %(default)s)",
    )
    add_accept_owner(parser)
    return parser


def _run(options: argparse.Namespace) -> int:
    if options.foreground:
        return _serve(options, lambda: None)
    run = partial(guarded, partial(_serve, options))
    return daemon.in_background(run, silent=not options.verbose)


def _serve(options: argparse.Namespace, ready: daemon.TellReady) -> int:
    # Here and in `_region`: --help and wrong usage need nothing of what serves.
    from ..service.config import ServiceConfig
    from .serve_process import ServePlan, serve

    plan = ServePlan(
        ServiceConfig({"ivshmem": _region(options)}),
        # The example server has none: so its path, in /tmp, is not worth an error.
        control_needed=False,
        # The example server writes its pid only as a daemon.
        pid_file=None if options.foreground else options.pid_file,
        quiet=not options.verbose,
    )
    return serve(plan, ready)


def _region(options: argparse.Namespace) -> RegionConfig:
    """Memory by the example server's rules."""
    # Here: see `_serve`.
    from ..memory import pages
    from ..memory.sizes import parse_size, round_up
    from ..service.config import RegionConfig
    from ..system.sockets import check_path

    kind, where = options.place
    page = pages.page_size_of(where) if kind == "directory" else pages.PAGE
    size = max(round_up(parse_size(options.size or DEFAULT_SIZE)), page)
    path = os.path.abspath(check_path(options.socket))
    accept = tuple(options.accept_owner or ())
    return RegionConfig(
        path, size, options.vectors, existing="grow", accept_owner=accept, **{kind: where}
    )
