"""`ivshmem serve`: its options, and which process does what.

    serve          this: the options
    serve_process  the process that serves, from start to end
    supervise      with --supervise: the small parent, whose children are such processes
    daemon         with --daemon: a process that does either in the background

Knows: options. Does not know: how anything is served. With --supervise this process stays small,
because only its children import serve_process.py.
"""

from __future__ import annotations

import argparse
from functools import partial

from ..lasting import supervisor
from ..service import limits
from . import daemon
from .arguments import add_region, socket_path
from .run import guarded, write_errors_as


def add_to(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "serve",
        description="Run an ivshmem server in the foreground. At start it prints the arguments"
        " for QEMU and the XML for libvirt; then a line for each peer that joins or"
        " leaves.",
        epilog="SIZE is a power of two: bytes, or a number with K, M, G or T, such as 4M. The"
        " memory is anonymous unless --name, --file or --directory says where it comes from.",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="serve the regions of a TOML file, each a table [region.NAME] with the options below"
        " as keys; read it again on SIGHUP",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="only print what the file would serve, or its errors",
    )
    parser.add_argument(
        "--print-schema",
        action="store_true",
        help="only print the JSON Schema of such files, for editors that check TOML",
    )
    add_region(parser)
    process = parser.add_argument_group("the process")
    process.add_argument(
        "--supervise",
        action="store_true",
        help="serve in a child of a small parent: if the child is killed, a new child continues,"
        " and no peer notices",
    )
    process.add_argument(
        "--fd-store",
        action="store_true",
        help="keep all descriptors in the service manager (systemd: FileDescriptorStoreMax=): if"
        " the server is killed or restarted, it continues, and no peer notices",
    )
    process.add_argument(
        "--takeover",
        action="store_true",
        help="take over the peers of the running server, which then ends; settings without"
        " an option stay as they are",
    )
    looks = parser.add_argument_group("status, metrics and log")
    place = looks.add_mutually_exclusive_group()
    place.add_argument(
        "--control",
        metavar="PATH",
        type=socket_path,
        help="control socket, for `ivshmem status`, `top`, `evict` and `reload` (default: the"
        " first region's socket with .control appended)",
    )
    place.add_argument("--no-control", action="store_true", help="make no control socket")
    looks.add_argument(
        "--metrics",
        metavar="[HOST:]PORT",
        help="serve metrics for Prometheus on PORT, at /metrics (HOST is 127.0.0.1 by default)",
    )
    looks.add_argument(
        "--metrics-peers",
        action="store_true",
        help="also export metrics of each peer, which are many series",
    )
    looks.add_argument(
        "--metrics-host",
        action="append",
        default=[],
        metavar="NAME",
        help="host name in the requests of Prometheus, if it is not localhost, the HOST of"
        " --metrics or an IP address; may be repeated",
    )
    looks.add_argument(
        "--log-format",
        choices=limits.LOG_FORMATS,
        help="log lines as text (default), or as JSON objects",
    )
    process.add_argument(
        "-p", "--pid-file", metavar="PATH", help="file to lock and to write the pid to"
    )
    process.add_argument(
        "-F", "--foreground", action="store_true", help="stay in the foreground (default)"
    )
    process.add_argument("--daemon", action="store_true", help="go into the background when ready")
    process.add_argument("-v", "--verbose", action="store_true", help="log more")
    process.add_argument("-q", "--quiet", action="store_true", help="do not log joins and leaves")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Serve as the options say, until a signal."""
    write_errors_as(options.log_format)
    if options.print_schema:
        import json  # here, since no server needs it to print

        from ..service.config_schema import schema  # likewise

        print(json.dumps(schema(), indent=2))
        return 0
    if options.daemon and not options.foreground and not (options.check or supervisor.is_heir()):
        return daemon.in_background(
            partial(guarded, partial(_serve, options)), silent=not options.verbose
        )
    return _serve(options, lambda: None)


def _serve(options: argparse.Namespace, ready: daemon.TellReady) -> int:
    if options.supervise and not options.check:
        from .supervise import supervise  # here: few servers have a supervisor

        return supervise(options, ready)
    from .serve_process import plan_and_serve  # here: a supervisor stays small without it

    return plan_and_serve(options, ready)
