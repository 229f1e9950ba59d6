"""`ivshmem doctor`: what sharing needs, checked one by one, and what mends it."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial

from .. import doctor, runtime
from .arguments import OF_THE_SERVER, is_name

_MARKS = {"ok": "ok", "warning": "warn", "failed": "FAIL", "skipped": "skip"}
_COLOURS = {"ok": 32, "warning": 33, "failed": 31, "skipped": 2}
_NAME_WIDTH = 19  # of the longest name of a check


def add_to(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "doctor",
        description="Check one by one what sharing needs. Of each failure it prints the one command"
        " that mends it, or the QEMU option (then beginning with a dash). In a guest that ends with"
        " interrupts that the device sends to itself; on a host, with limits. Nothing is changed."
        " Exit status 0: all is well; what is a warning, others may need.",
    )
    parser.add_argument(
        "address",
        metavar="ADDRESS",
        nargs="?",
        help="in a guest: the PCI address of one device (default: all)",
    )
    side = parser.add_mutually_exclusive_group()
    side.add_argument(
        "--guest", action="store_true", help="check as a guest (default: as it looks)"
    )
    side.add_argument("--host", action="store_true", help="check as a host")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    host = parser.add_argument_group("on a host")
    host.add_argument("-S", "--socket", metavar="PATH", help=f"of the server ({OF_THE_SERVER})")
    place = host.add_mutually_exclusive_group()
    place.add_argument("-M", "--name", help="the memory's POSIX name")
    place.add_argument("-f", "--file", metavar="PATH", help="the memory's file")
    place.add_argument("-m", "--directory", metavar="DIR", help="where the memory's file is to be")
    host.add_argument("-l", "--size", metavar="SIZE", help="that the memory is to have")
    host.add_argument(
        "--hugepages",
        nargs="?",
        const=True,
        default=False,
        metavar="SIZE",
        help="the memory is to be in huge pages, of the default size or of SIZE (2M, 1G)",
    )
    host.add_argument(
        "--lock",
        action="store_true",
        help="the memory is to be locked (-overcommit mem-lock=on, or vfio on the host)",
    )
    host.add_argument("-u", "--user", help="who is to use socket and memory (needs root)")
    host.add_argument(
        "--qemu", metavar="PROGRAM", help=f"the QEMU to use (default: {doctor.default_qemu()})"
    )
    parser.set_defaults(run=partial(_run, parser))


def _run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    directory, name = options.directory, options.name
    if is_name(directory):
        directory, name = None, directory
    wishes = doctor.Wishes(
        options.socket,
        name,
        options.file,
        directory,
        options.size,
        options.hugepages,
        options.qemu,
        options.user,
        options.lock,
    )
    of_host = wishes != doctor.Wishes()
    if options.address and (options.host or of_host):
        parser.error("an ADDRESS is for a guest, and the other options are for a host")
    if options.guest and of_host:
        parser.error("the options for a host do not go with --guest")
    guest = options.guest or options.address is not None
    if not (guest or options.host or of_host):
        guest = doctor.is_guest(runtime.expected_socket(), doctor.default_qemu())
    checks = doctor.examine_guest(options.address) if guest else doctor.examine_host(wishes)
    return (_print_json if options.json else _print)("guest" if guest else "host", checks)


def _print_json(side: str, checks: Iterator[doctor.Check]) -> int:
    found = [asdict(check) for check in checks]
    well = all(check["state"] != "failed" for check in found)
    print(json.dumps({"side": side, "well": well, "checks": found}))
    return 0 if well else 1


def _print(side: str, checks: Iterator[doctor.Check]) -> int:
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    subject, failures = None, 0
    for check in checks:
        if check.subject != subject:
            subject = check.subject
            print(f"{side} {subject}" if subject != side else f"{side}", flush=True)
        mark = f"{_MARKS[check.state]:<4}"
        if colour:
            mark = f"\033[{_COLOURS[check.state]}m{mark}\033[0m"
        print(f"  {mark}  {check.name:<{_NAME_WIDTH}}  {check.found}", flush=True)
        if check.mend:
            print(f"  {'':<4}  {'':<{_NAME_WIDTH}}  mend: {check.mend}", flush=True)
        failures += check.state == "failed"
    print(f"{failures} failed" if failures else "all is well")
    return 1 if failures else 0
