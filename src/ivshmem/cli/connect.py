"""`ivshmem connect`: be a peer, by hand or from a script."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time

from ..peer import connecting
from ..peer.client import connect
from ..system.time_limits import deadline_of, left_until
from ..text import counted
from .arguments import add_socket, seconds, server_of, vectors
from .shell import ClientShell

_TIMEOUT = 10.0  # seconds for a server that is there


def add_to(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "connect",
        description="Connect to a server as a host peer. On a terminal it reads commands"
        " interactively (`help` lists them); otherwise from -c or from stdin, one a"
        " line, and it ends with exit status 1 at the first command that fails.",
        epilog='Example: ivshmem connect -c "ring 0 0" -c "wait any 5" -c "hexdump 0 64"',
    )
    add_socket(parser)
    parser.add_argument(
        "-c",
        "--command",
        action="append",
        metavar="COMMAND",
        help="run this command and end; may be repeated, or contain several commands separated by"
        " `;`",
    )
    parser.add_argument(
        "--json", action="store_true", help="print results as JSON, one object a line"
    )
    parser.add_argument("--readonly", action="store_true", help="map the memory read-only")
    parser.add_argument(
        "--timeout",
        type=seconds,
        metavar="SECONDS",
        help="time limit for the server to answer (default: 10; with --wait: none)",
    )
    parser.add_argument(
        "--wait",
        action="store_true",
        help="wait until a server listens, if none does yet",
    )
    parser.add_argument(
        "-n",
        "--vectors",
        metavar="N",
        type=vectors,
        help="number of vectors, for a server that sends them slowly",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Connect and run commands."""
    timeout = options.timeout
    if timeout is None and not options.wait:
        timeout = _TIMEOUT
    path, timeout = _find(options, timeout) if options.wait else (server_of(options), timeout)
    with (
        connect(
            path,
            timeout=timeout,
            vectors=options.vectors,
            readonly=options.readonly,
            wait_for_server=options.wait,
        ) as client,
        ClientShell(client, json=options.json) as shell,
    ):
        if options.command is not None:
            for line in options.command:
                shell.run_line(line)
        elif sys.stdin.isatty():
            _edit_lines(shell)
            shell.talk()
        else:
            for line in sys.stdin:
                if shell.run_line(line):
                    break
    return 0


def _find(options: argparse.Namespace, timeout: float | None) -> tuple[str, float | None]:
    """Return the path that the options name, or that of the first server that comes.

    And the time that is left for the rest. It is the whole limit if the path was known at once.
    """
    left = timeout
    deadline = deadline_of(timeout)
    for pause in connecting.pauses(deadline):
        try:
            return server_of(options), left
        except FileNotFoundError as error:
            failure = error
        time.sleep(pause)
        if deadline is not None:
            left = left_until(deadline)
    raise TimeoutError(
        failure.errno, f"no server within {counted(timeout or 0, 'second')}: {failure.strerror}"
    )


def _edit_lines(shell: ClientShell) -> None:
    """Line editing, history and completion for input(), where this Python has readline."""
    with contextlib.suppress(ImportError):
        import readline  # here: not every Python is built with it

        readline.set_completer(shell.complete)  # type: ignore[arg-type]  # typeshed's mistake
        readline.parse_and_bind("tab: complete")
