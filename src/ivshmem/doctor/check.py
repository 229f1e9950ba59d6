"""What a check finds, and how checks follow each other.

Knows: results, which check rests on which, how commands are written that fix something.
Does not know: what is checked.

Invariants:
1. `fix` is one line that a shell runs as it stands, or, where it begins with a dash, what QEMU's
   command line needs.
2. What rests on a failed check is skipped, and says on which.
3. No word of another process or of another user's file leaves here as it was: see text.py.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from ..text import command, plain, quoted

Outcome: TypeAlias = Literal["ok", "warning", "failed", "skipped"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        subject: a device's PCI address; "host" or "guest".
        name: what was checked.
        state: "failed" if sharing needs it and it is not so; "warning" if others may need it.
        found: what is there; of what was skipped, why.
        fix: the one command, or QEMU option, that fixes what failed. It may be empty of a warning,
            and of an unforeseen failure.
    """

    subject: str
    name: str
    state: Outcome
    found: str
    fix: str = ""


class Finding(NamedTuple):
    """A check's result before it has a name."""

    state: Outcome
    found: str
    fix: str = ""


class CheckStep(NamedTuple):
    """A check to be made, unless one of those that it rests on has failed."""

    name: str
    check: Callable[[], Finding]
    rests_on: tuple[str, ...] = ()


def ok(found: str) -> Finding:
    return Finding("ok", found)


def warning(found: str, fix: str = "") -> Finding:
    return Finding("warning", found, fix)


def failed(found: str, fix: str = "") -> Finding:
    return Finding("failed", found, fix)


def skipped(why: str) -> Finding:
    return Finding("skipped", why)


def run(subject: str, steps: Iterable[CheckStep]) -> Iterator[Check]:
    """Make the checks one after the other, each when it is asked for."""
    causes: dict[str, str] = {}  # of what did not come off: the check that failed
    for step in steps:
        cause = next((causes[name] for name in step.rests_on if name in causes), None)
        finding = step.check() if cause is None else skipped(f"needs a check that failed: {cause}")
        if finding.state == "failed" or cause is not None:
            causes[step.name] = cause or step.name
        yield Check(subject, step.name, finding.state, plain(finding.found), plain(finding.fix))


# -- commands -------------------------------------------------------------------------------------


def our_command(*arguments: str) -> str:
    """A command line of this package."""
    return command([sys.executable, "-m", "ivshmem", *arguments])


def as_root(line: str) -> str:
    """Return a line for a shell so that root runs it, also if another user types it."""
    if os.geteuid() == 0:
        return line
    return f"{'sudo sh' if shutil.which('sudo') else 'su'} -c {quoted(line)}"
