"""`ivshmem doctor`: what sharing needs, checked one by one, and what fixes it."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial

from ..doctor import check as doctor_check
from ..doctor import guest as doctor_guest
from ..doctor import guest_or_host, request
from ..doctor import host as doctor_host
from ..peer import default_paths
from ..text import counted
from . import terminal
from .arguments import add_accept_owner, add_socket, is_name
from .tables import entry, wrapped

_MARKS = {"ok": "ok", "warning": "warn", "failed": "FAIL", "skipped": "skip"}
_COLOURS = {"ok": 32, "warning": 33, "failed": 31, "skipped": 2}
_NAME_WIDTH = 19  # of the longest name of a check
_INDENT = 2 + 4 + 2 + _NAME_WIDTH + 2  # columns before what was found
_UNLIMITED = 1 << 20  # columns, where standard output is not a terminal


def add_to(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "doctor",
        description="Check one by one what sharing needs. For each failure, print the command"
        " that fixes it, or the QEMU option (it begins with a dash). In a guest, the"
        " last check makes the device interrupt itself; on a host, the last checks"
        " are of limits. Nothing is changed. Exit status 0: no check failed. A"
        " warning is about what other users may need, or about what could not be"
        " checked.",
    )
    parser.add_argument(
        "address",
        metavar="ADDRESS",
        nargs="?",
        help="in a guest: the PCI address of one device (default: all)",
    )
    side = parser.add_mutually_exclusive_group()
    side.add_argument("--guest", action="store_true", help="check as a guest (default: detected)")
    side.add_argument("--host", action="store_true", help="check as a host (default: detected)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    host = parser.add_argument_group("on a host")
    add_socket(host)
    place = host.add_mutually_exclusive_group()
    place.add_argument("-M", "--name", help="the memory's POSIX name")
    place.add_argument("-f", "--file", metavar="PATH", help="the memory's file")
    place.add_argument("-m", "--directory", metavar="DIR", help="directory for the memory's file")
    host.add_argument("-l", "--size", metavar="SIZE", help="size that the memory is to have")
    host.add_argument(
        "--hugepages",
        nargs="?",
        const=True,
        default=False,
        metavar="SIZE",
        help="check for huge pages, of the default size or of SIZE (2M, 1G)",
    )
    add_accept_owner(host)
    host.add_argument(
        "--lock",
        action="store_true",
        help="check for locked memory (-overcommit mem-lock=on, or vfio on the host)",
    )
    host.add_argument(
        "-u", "--user", help="check what this user may do with socket and memory (needs root)"
    )
    host.add_argument(
        "--qemu", metavar="PROGRAM", help=f"the QEMU to use (default: {doctor_host.default_qemu()})"
    )
    parser.set_defaults(run=partial(_run, parser))


def _run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    directory, name = options.directory, options.name
    if is_name(directory):
        directory, name = None, directory
    wanted = request.Request(
        options.socket,
        name,
        options.file,
        directory,
        options.size,
        options.hugepages,
        options.qemu,
        options.user,
        options.lock,
        tuple(options.accept_owner or ()),
    )
    of_host = wanted != request.Request()
    if options.address and (options.host or of_host):
        parser.error("ADDRESS is for a guest; the other options are for a host")
    if options.guest and of_host:
        parser.error("options for a host are not allowed with --guest")
    guest = options.guest or options.address is not None
    if not (guest or options.host or of_host):
        guest = guest_or_host.is_guest(default_paths.expected_socket(), doctor_host.default_qemu())
    checks = (
        doctor_guest.examine_guest(options.address) if guest else doctor_host.examine_host(wanted)
    )
    return (_print_json if options.json else _print)("guest" if guest else "host", checks)


def _print_json(side: str, checks: Iterator[doctor_check.Check]) -> int:
    found = [asdict(check) for check in checks]
    well = all(check["state"] != "failed" for check in found)
    print(json.dumps({"side": side, "well": well, "checks": found}))
    return 0 if well else 1


def _print(side: str, checks: Iterator[doctor_check.Check]) -> int:
    colour = terminal.coloured()
    columns = terminal.columns() or _UNLIMITED
    subject: str | None = None
    states: Counter[str] = Counter()
    for check in checks:
        if check.subject != subject:
            subject = check.subject
            print(f"{side} {subject}" if subject != side else f"{side}", flush=True)
        mark = f"{_MARKS[check.state]:<4}"
        first, *more = entry(
            f"  {mark}  {check.name}", check.found, indent=_INDENT, columns=columns
        )
        if colour:
            first = first.replace(mark, f"\033[{_COLOURS[check.state]}m{mark}\033[0m", 1)
        print(first, *more, sep="\n")
        if check.fix:
            # Never wrapped: it is one line to paste. The indent goes where it would be split.
            long = len(check.fix) > columns - _INDENT - len("fix: ")
            print(f"{'':<{2 if long else _INDENT}}fix: {check.fix}")
        print(end="", flush=True)
        states[check.state] += 1
    for line in wrapped(_verdict(states), columns):
        print(line)
    return 1 if states["failed"] else 0


def _verdict(states: Mapping[str, int]) -> str:
    """The last line: "all is well" stands under nothing but what was looked at and found good."""
    failures, warnings, left = (states[state] for state in ("failed", "warning", "skipped"))
    parts = [f"{failures} failed"] if failures else []
    parts += [counted(warnings, "warning")] if warnings else []
    if not parts:
        parts.append("all is well")
    elif not failures:
        parts.insert(0, "no check failed")
    parts += [f"{left} not checked"] if left else []
    return ", ".join(parts)
