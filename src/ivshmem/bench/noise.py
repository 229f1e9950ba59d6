"""Whether others disturbed a measurement, and who.

Knows: the accounts of processors, processes and threads in /proc. Does not know: what is measured.

A thread of ours that could run and did not had to wait for another process: the kernel accounts for
that in nanoseconds (schedstat), and this is what decides; waits of one end for the other are not a
disturbance. The processor time that others took is told by process, what the hypervisor took as
steal. /proc/stat itself is a sample of a few ticks, good enough only to notice a large rest.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ..text import NAME, plain

# A measurement is spoilt if others took more than this share of a core that it ran on.
LIMIT = 0.05

_TICK = 10**9 // os.sysconf("SC_CLK_TCK")  # nanoseconds
_SAMPLED = 3  # ticks by which a core's account can be wrong over a tenth of a second
_NAMED = 3  # culprits that are named, at most

UNKNOWN = "a process that has ended, or is outside this container,"


class Core(NamedTuple):
    """What a core did so far, in nanoseconds."""

    busy: int
    stolen: int


class Account(NamedTuple):
    """What a thread got so far, in nanoseconds."""

    ran: int
    waited: int


class Process(NamedTuple):
    """What a process used so far, all its threads, and the core it was last on."""

    name: str
    core: int
    ran: int  # nanoseconds, in whole ticks


class Snapshot(NamedTuple):
    """One look at /proc.

    Attributes:
        ends: the threads of each process that is measured.
        known: nanoseconds used by processes whose load is part of what is measured.
        main: nanoseconds used by the first thread of each other process.
    """

    cores: dict[int, Core]
    ends: tuple[dict[int, Account], ...]
    known: int
    others: dict[int, Process]
    main: dict[int, int]


class Culprit(NamedTuple):
    """A process, and the share (0 to 1) of a core that it took."""

    who: str
    share: float
    core: int | None

    def __str__(self) -> str:
        where = "a core" if self.core is None else f"core {self.core}"
        return f"{self.who} took {self.share:.0%} of {where}"


class Noise(NamedTuple):
    """What others did to a measurement.

    Attributes:
        share: of one core, the most that others took or that an end waited for them.
        culprits: who, the worst first.
    """

    share: float
    culprits: tuple[Culprit, ...]

    @property
    def spoilt(self) -> bool:
        """Whether the measurement had better not be used."""
        return self.share > LIMIT

    def __str__(self) -> str:
        return ", ".join(map(str, self.culprits)) or "nobody"


# -- what the kernel says --------------------------------------------------------------------------


def parse_cores(text: str) -> dict[int, Core]:
    """/proc/stat."""
    found = {}
    for line in text.splitlines():
        name, *fields = line.split()
        if name.startswith("cpu") and name != "cpu":
            user, nice, system, _idle, _iowait, irq, softirq, stolen = map(int, fields[:8])
            busy = user + nice + system + irq + softirq
            found[int(name[3:])] = Core(busy * _TICK, stolen * _TICK)
    return found


def parse_process(text: str) -> Process:
    """/proc/PID/stat; a name may have spaces and brackets."""
    start, _, rest = text.rpartition(")")
    fields = rest.split()
    used = int(fields[11]) + int(fields[12])
    return Process(start.partition("(")[2], int(fields[36]), used * _TICK)


def parse_account(text: str) -> Account:
    """/proc/PID/schedstat, or a thread's."""
    ran, waited, _ = text.split()
    return Account(int(ran), int(waited))


def _texts(paths: Iterable[Path]) -> Iterator[tuple[int, str]]:
    """The number of the directory and the content of each file that is still there."""
    for path in paths:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            yield int(path.parent.name), path.read_text(errors="surrogateescape")


def snapshot(ends: Sequence[int], known: Sequence[int] = (), *, ended: bool = False) -> Snapshot:
    """Look at /proc now.

    Args:
        ends: the processes that are measured.
        known: others whose load is part of what is measured.
        ended: the measurement is over. What concerns it is looked at next to it: looking at all
            other processes takes milliseconds.
    """
    near = _near(ends, known) if ended else None
    strangers = {int(name) for name in os.listdir("/proc") if name.isdigit()}
    strangers -= {*ends, *known, os.getpid()}
    others = {pid: parse_process(text) for pid, text in _texts(_files(strangers, "stat"))}
    main = {pid: parse_account(text).ran for pid, text in _texts(_files(strangers, "schedstat"))}
    return Snapshot(*(near or _near(ends, known)), others, main)


def _near(
    ends: Sequence[int], known: Sequence[int]
) -> tuple[dict[int, Core], tuple[dict[int, Account], ...], int]:
    """What cores, ends and known processes did so far."""
    accounts = tuple(
        {
            thread: parse_account(text)
            for thread, text in _texts(Path("/proc").glob(f"{end}/task/*/schedstat"))
        }
        for end in ends
    )
    ran = sum(parse_account(text).ran for _, text in _texts(_files(known, "schedstat")))
    return parse_cores(Path("/proc/stat").read_text()), accounts, ran


def _files(pids: Iterable[int], name: str) -> Iterator[Path]:
    return (Path("/proc") / str(pid) / name for pid in pids)


# -- what follows from two looks -------------------------------------------------------------------


def noise_between(before: Snapshot, after: Snapshot, cores: Sequence[set[int]], wall: int) -> Noise:
    """What others did between two looks.

    Args:
        cores: those that each end may use.
        wall: nanoseconds that the measurement took.
    """
    used = set().union(*cores)
    known = after.known - before.known
    ran = _ran(before, after)
    waited = _waited(before, after, cores, known) / wall
    culprits = sorted(_culprits(before, after, used, wall), key=lambda each: -each.share)
    named = sum(culprit.share for culprit in culprits)
    stolen = {
        core: (after.cores[core].stolen - before.cores[core].stolen) / wall
        for core in used & before.cores.keys() & after.cores.keys()
    }
    culprits += [Culprit("steal", share, core) for core, share in stolen.items() if share]
    busy = sum(
        after.cores[core].busy - before.cores[core].busy - _SAMPLED * _TICK
        for core in used & before.cores.keys() & after.cores.keys()
    )
    rest = max(waited, (busy - ran - known) / wall) - named
    if rest > LIMIT:
        culprits.append(Culprit(UNKNOWN, min(rest, 1.0), None))
    worst = sorted(culprits, key=lambda each: -each.share)[:_NAMED]
    return Noise(max([waited, *(culprit.share for culprit in worst)]), tuple(worst))


def _ran(before: Snapshot, after: Snapshot) -> int:
    """What the ends used."""
    return sum(
        account.ran - then.get(thread, Account(0, 0)).ran
        for then, now in zip(before.ends, after.ends, strict=True)
        for thread, account in now.items()
    )


def _waited(before: Snapshot, after: Snapshot, cores: Sequence[set[int]], known: int) -> int:
    """The longest that a thread of ours could have run and did not, because of others."""
    spans = []  # of each thread: the cores, nanoseconds run, nanoseconds waited
    for where, then, now in zip(cores, before.ends, after.ends, strict=True):
        for thread, account in now.items():
            earlier = then.get(thread, Account(0, 0))
            spans.append((where, account.ran - earlier.ran, account.waited - earlier.waited))
    longest = 0
    for index, (where, _, waited) in enumerate(spans):
        rivals = [ran for i, (there, ran, _) in enumerate(spans) if i != index and there & where]
        longest = max(longest, waited - sum(rivals) - known)
    return longest


def _culprits(before: Snapshot, after: Snapshot, used: set[int], wall: int) -> Iterator[Culprit]:
    for pid, process in after.others.items():
        then = before.others.get(pid)
        if process.core not in used and (then is None or then.core not in used):
            continue
        # Whole ticks count only from the second on: the first can be a rounding. The first
        # thread's account is exact.
        ticks = process.ran - (then.ran if then else 0) - _TICK
        exact = after.main.get(pid, 0) - before.main.get(pid, 0) if pid in after.main else 0
        share = max(ticks, exact, 0) / wall
        if share > LIMIT / 5:
            yield Culprit(f"{plain(process.name, NAME)} (pid {pid})", min(share, 1.0), process.core)
