"""The command line: `python -m ivshmem SUBCOMMAND`, installed as `ivshmem` too.

stdout is for results, stderr for news. Exit status 0: done; 1: it could not be done, and one line
on stderr says why and what to do; 2: wrong usage.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import NoReturn

from ..errors import IvshmemError
from ..plain import plain
from . import (
    bench,
    connect,
    doctor,
    evict,
    guest,
    hold,
    image,
    migrate,
    qemu,
    release,
    reload,
    serve,
    status,
    top,
)

SUBCOMMANDS = (
    serve,
    connect,
    guest,
    qemu,
    doctor,
    status,
    top,
    evict,
    hold,
    release,
    reload,
    image,
    migrate,
    bench,
)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, not after a screen of usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {plain(message)} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    open_standard_streams()
    parser = Parser(
        prog="ivshmem",
        description="Shared memory and doorbells between virtual machines and host processes.",
        epilog="Begin with `ivshmem serve`: it prints what QEMU needs to be told.",
    )
    parser.add_argument("--version", action="version", version=f"ivshmem {version('ivshmem')}")
    subparsers = parser.add_subparsers(metavar="SUBCOMMAND", required=True)
    for module in SUBCOMMANDS:
        module.add_to(subparsers)
    options = parser.parse_args(arguments)
    return guarded(options.run, options)


def open_standard_streams() -> None:
    """Give descriptors 0, 1 and 2 to /dev/null where they are closed, before a file gets them."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115


def guarded(run: object, *arguments: object) -> int:
    """Call `run` and turn what users can cause into one line and an exit status."""
    assert callable(run)
    try:
        status = run(*arguments)
        sys.stdout.flush()
    except BrokenPipeError as error:
        if error.filename is not None:
            return fail(error)
        # Whoever read our output has seen enough; Python would complain once more at its exit.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    except (IvshmemError, OSError, ValueError, OverflowError) as error:
        return fail(error)
    return int(status or 0)


def fail(error: BaseException) -> int:
    """Print the one line that an error is worth, and return exit status 1."""
    print(f"ivshmem: {one_line(error)}", file=sys.stderr)
    return 1


def one_line(error: BaseException) -> str:
    """An error as a person reads it: the path first, no errno, and what to do."""
    return plain(_sentence(error))


def _sentence(error: BaseException) -> str:
    if not isinstance(error, OSError) or error.strerror is None:
        return " ".join(str(error).split())
    hint = (
        _HINTS.get(error.errno or 0, "") if error.strerror == os.strerror(error.errno or 0) else ""
    )
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror[:1].lower()}{error.strerror[1:]}{hint}"


# Python's own errno subclasses say what and where; these add what to do.
_HINTS = {
    1: ": run as a user who may, or choose another path",  # EPERM
    2: ": create it first, or choose another path",  # ENOENT
    13: ": run as a user who may, or choose another path",  # EACCES
    20: ": a part of the path is no directory",  # ENOTDIR
    21: ": name a file in it, or use --directory",  # EISDIR
    24: ": raise the limit with `ulimit -n`",  # EMFILE
    30: ": choose a path on a file system that can be written",  # EROFS
}
