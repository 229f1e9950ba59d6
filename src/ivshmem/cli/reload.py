"""`ivshmem reload`: let a server read its configuration again."""

from __future__ import annotations

import argparse

from ..text import plain
from . import control_connection

_SECONDS = 60.0  # memory may have to be taken


def add_to(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "reload",
        description="Make a running server read its configuration again, and print what has"
        " changed. If the file has an error, the error is printed and nothing"
        " changes.",
    )
    control_connection.add_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Ask for it."""
    with control_connection.connect(options, _SECONDS) as client:
        reply = client.ask({"do": "reload"})
    lines = [plain(line) for line in reply["changes"]]
    whose = control_connection.says_who(client)
    print("\n".join(f"{line}{whose}" for line in lines or ["nothing has changed"]))
    return 0
