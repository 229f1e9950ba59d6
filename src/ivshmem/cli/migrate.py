"""`ivshmem migrate`: its options. What it does is in migrate_run.py, which needs asyncio.

Two files, so that `--help` and wrong usage need not wait until asyncio is imported.
"""

from __future__ import annotations

import argparse

_SECONDS = 30.0  # that a guest has to let go of a device


def add_to(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "migrate",
        description="Migrate VMs that share memory. Which devices share which is found out; the"
        " master takes the memory along, the others are unplugged before and plugged back at the"
        " destination. What would not work is refused before anything is touched. Interrupted"
        " before the first VM has arrived, all is put back.",
        epilog="The destinations are started before, with -incoming defer: that of the master with"
        " the same device (master=on), those of the others without. Needs the library qemu.qmp.",
    )
    group = parser.add_argument_group("which VMs")
    named = group.add_mutually_exclusive_group(required=True)
    named.add_argument(
        "--vm",
        action="append",
        type=vm,
        metavar="NAME=SOURCE,DESTINATION,URI",
        help="a VM's monitors (QMP: a path, or HOST:PORT) and where its two QEMUs meet"
        " (tcp:HOST:PORT, unix:PATH, or a file for both: file:PATH); repeat it for each",
    )
    named.add_argument("--group", metavar="FILE", help="a TOML file that says the same")
    for place in ("source", "destination"):
        group.add_argument(
            f"--{place}-control",
            action="append",
            default=[],
            metavar="PATH",
            help=f"a control socket of servers at the {place}, if it is not SOCKET.control;"
            " may be repeated",
        )
    what = parser.add_argument_group("what to do").add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="only print the plan, or why not")
    what.add_argument("--resume", action="store_true", help="finish what was interrupted")
    what.add_argument("--put-back", action="store_true", help="undo what was interrupted")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--timeout",
        type=seconds,
        default=_SECONDS,
        metavar="SECONDS",
        help="that a guest has to let go of a device (default: %(default)g)",
    )
    how.add_argument(
        "--postcopy", action="store_true", help="let guests run there after one pass over memory"
    )
    how.add_argument("--multifd", action="store_true", help="send over several connections")
    how.add_argument(
        "--evict",
        action="store_true",
        help="hang up on host clients at the source before: what they write later is lost",
    )
    how.add_argument(
        "--force", action="store_true", help="do also what may crash a QEMU, or its guest"
    )
    how.add_argument(
        "--state", metavar="FILE", help="that says how far it is (default: one in ~/.local/state)"
    )
    how.add_argument("-q", "--quiet", action="store_true", help="show no progress")
    parser.set_defaults(run=run)


def vm(text: str) -> tuple[str, str, str, str]:
    """A VM from the command line: name, source, destination, URI."""
    name, equals, rest = text.partition("=")
    parts = rest.split(",", 2)
    if not name or not equals or len(parts) != 3 or not all(parts):
        raise argparse.ArgumentTypeError(f"{text}: NAME=SOURCE,DESTINATION,URI is wanted")
    source, destination, uri = parts
    return name, source, destination, uri


def seconds(text: str) -> float:
    """A time limit from the command line."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < 1e6:
        raise argparse.ArgumentTypeError(f"{text}: a number of seconds above 0 is wanted")
    return number


def run(options: argparse.Namespace) -> int:
    """Migrate, or whatever else was asked for."""
    from . import migrate_run  # here: asyncio, which `--help` need not wait for

    return migrate_run.run(options)
