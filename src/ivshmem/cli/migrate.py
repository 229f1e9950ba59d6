"""`ivshmem migrate`: its options. What it does is in migrate_run.py, which needs asyncio.

Two files, so that `--help` and wrong usage need not wait until asyncio is imported.
"""

from __future__ import annotations

import argparse

_SECONDS = 30.0  # that a guest has to let go of a device


def add_to(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "migrate",
        description="Migrate VMs that share memory. The command finds out which devices share"
        " which memory. The master's migration includes the memory; the other devices"
        " are unplugged before it and plugged in again at the destination. A"
        " migration that cannot work is refused before anything is changed. If it is"
        " interrupted before the first VM has arrived, all changes are undone.",
        epilog="Start the destination QEMUs first, with -incoming defer: the master's with the"
        " same device (master=on), the others without. Needs the library qemu.qmp.",
    )
    group = parser.add_argument_group("which VMs")
    named = group.add_mutually_exclusive_group(required=True)
    named.add_argument(
        "--vm",
        action="append",
        type=vm,
        metavar="NAME=SOURCE,DESTINATION,URI",
        help="QMP monitors of a VM's two QEMUs (a path, or HOST:PORT) and the URI of the"
        " migration (tcp:HOST:PORT, unix:PATH, or file:PATH); repeat this for each VM",
    )
    named.add_argument("--group", metavar="FILE", help="a TOML file with the same settings")
    for place in ("source", "destination"):
        group.add_argument(
            f"--{place}-control",
            action="append",
            default=[],
            metavar="PATH",
            help=f"control socket of a server at the {place}, if it is not SOCKET.control; may be"
            " repeated",
        )
    what = parser.add_argument_group("what to do").add_mutually_exclusive_group()
    what.add_argument(
        "--dry-run", action="store_true", help="only print the plan, or the reasons against it"
    )
    what.add_argument("--resume", action="store_true", help="finish an interrupted migration")
    what.add_argument("--put-back", action="store_true", help="undo an interrupted migration")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--timeout",
        type=seconds,
        default=_SECONDS,
        metavar="SECONDS",
        help="time limit for a guest to release a device (default: %(default)g)",
    )
    how.add_argument(
        "--postcopy",
        action="store_true",
        help="start guests at the destination after one pass over the memory",
    )
    how.add_argument(
        "--multifd", action="store_true", help="send over several connections (QEMU's multifd)"
    )
    how.add_argument(
        "--evict",
        action="store_true",
        help="disconnect host clients at the source first: what they write later is lost",
    )
    how.add_argument(
        "--force", action="store_true", help="also take steps that may crash a QEMU or its guest"
    )
    how.add_argument(
        "--state",
        metavar="FILE",
        help="file for the migration's progress (default: one in ~/.local/state)",
    )
    how.add_argument("-q", "--quiet", action="store_true", help="show no progress")
    parser.set_defaults(run=run)


def vm(text: str) -> tuple[str, str, str, str]:
    """A VM from the command line: name, source, destination, URI."""
    name, equals, rest = text.partition("=")
    parts = rest.split(",", 2)
    if not name or not equals or len(parts) != 3 or not all(parts):
        raise argparse.ArgumentTypeError(f"not a VM: {text} (give NAME=SOURCE,DESTINATION,URI)")
    source, destination, uri = parts
    return name, source, destination, uri


def seconds(text: str) -> float:
    """A time limit from the command line."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < 1e6:
        raise argparse.ArgumentTypeError(
            f"not a time: {text} (give seconds above 0, for example 30)"
        )
    return number


def run(options: argparse.Namespace) -> int:
    """Migrate, print the plan, resume or put back, as the options say."""
    from . import migrate_run  # here: asyncio, which `--help` need not wait for

    return migrate_run.run(options)
