"""`ivshmem migrate`: what it does and shows. Its options are in migrate.py."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable, Coroutine
from typing import TypeVar

from .. import migration
from ..memory.sizes import format_size
from ..migration import GroupMember, MigrationRefused, Options, Plan, Step, Vm, group_file
from ..migration.inspection import Controls
from ..text import counted, plain
from . import signals
from .progress import ProgressBar
from .tables import duration

_T = TypeVar("_T")


def run(options: argparse.Namespace) -> int:
    """Migrate, print the plan, resume or put back, as the options say."""
    vms, controls = _named(options)
    state = options.state or migration.default_path(vms)
    with ProgressBar(sys.stderr, quiet=options.quiet) as progress:
        display = ProgressLines(progress, sys.stderr.isatty())
        if options.put_back:
            _interruptible(migration.put_back(state, tell=display.step))
            return 0
        if options.resume:
            going = migration.resume(state, tell=display.step, watch=display.migrating)
            _interruptible(going, lambda: _say_as_before(progress))
            return 0
        how = Options(
            force=options.force,
            postcopy=options.postcopy,
            multifd=options.multifd,
            evict=options.evict,
            unplug_seconds=options.timeout,
        )
        try:
            plan = _interruptible(migration.prepare(vms, how, controls))
        except MigrationRefused as refused:
            for reason in refused.reasons:
                print(plain(f"ivshmem: {reason}"), file=sys.stderr)
            return 1
        if options.dry_run:
            print(*map(plain, describe(plan)), sep="\n")
            return 0
        for note in plan.notes:
            print(plain(f"ivshmem: note: {note}"), file=sys.stderr)
        display.steps = len(plan.steps)
        going = migration.migrate(plan, state=state, tell=display.step, watch=display.migrating)
        _interruptible(going, lambda: _say_as_before(progress))
    return 0


def _named(options: argparse.Namespace) -> tuple[list[Vm], Controls]:
    if options.group is not None:
        vms, controls = group_file.load(options.group)
    else:
        vms, controls = [Vm(*each) for each in options.vm], {}
    return vms, {
        "source": [*options.source_control, *controls.get("source", ())],
        "destination": [*options.destination_control, *controls.get("destination", ())],
    }


def _say_as_before(progress: ProgressBar) -> None:
    progress.wipe()
    print("ivshmem: interrupted; the group runs at the source as before", file=sys.stderr)


def _interruptible(
    work: Coroutine[object, object, _T], cancelled: Callable[[], object] = lambda: None
) -> _T:
    """Run it to its end; a signal cancels it, and one more what it does then.

    Args:
        cancelled: called when it was, and all is put back.
    """

    async def main() -> _T:
        task = asyncio.current_task()
        assert task is not None
        loop = asyncio.get_running_loop()
        for number in signals.ENDING:
            loop.add_signal_handler(number, task.cancel)
        return await work

    try:
        return asyncio.run(main())
    except asyncio.CancelledError:
        cancelled()
        raise KeyboardInterrupt from None


# -- what is shown --------------------------------------------------------------------------------


def describe(plan: Plan) -> list[str]:
    """A plan, as a person reads it."""
    lines = []
    for group in plan.groups:
        device = group.master.device
        where = f" ({device.where})" if device.where else ""
        lines.append(f"memory of {format_size(device.size)}{where}:")
        lines += [_member(group.master, "master, migrates with the memory")]
        lines += [
            _member(other, "is unplugged, and plugged in again at the destination")
            for other in group.others
        ]
    lines += ["steps:"]
    lines += [f"  {number}. {step}" for number, step in enumerate(plan.steps, 1)]
    lines += [f"note: {note}" for note in plan.notes]
    return lines


def _member(member: GroupMember, role: str) -> str:
    device = member.device
    kind = (
        f"doorbell, {counted(device.vectors, 'vector')}" if device.kind == "doorbell" else "plain"
    )
    return f"  {member.vm}: {device.name} ({kind}) at {device.bus_name} {device.slot}: {role}"


class ProgressLines:
    """Progress of a migration."""

    def __init__(self, progress: ProgressBar, terminal: bool) -> None:
        self._progress = progress
        self._terminal = terminal
        self._what = ""
        self._done = 0.0
        self.steps = 0

    def step(self, number: int, step: Step, undone: bool) -> None:
        """A step begins."""
        of = f" of {self.steps}" if self.steps else ""
        self._what = plain(f"{'undo ' if undone else ''}step {number}{of}: {step}")
        self._done = (number - 1) / self.steps if self.steps else 0.0
        self._progress.show(self._done, self._what)

    def migrating(self, now: migration.TransferProgress) -> None:
        """A VM's memory is under way; only a terminal can show that over and over."""
        if not self._terminal or not now.total:
            return
        left = f", {duration(now.remaining / now.rate)} left" if now.rate else ""
        shared = f", {_about(now.shared)} of it shared" if now.shared else ""
        self._progress.show(
            1 - now.remaining / now.total,
            f"{self._what}: {_about(now.total - now.remaining)} of {_about(now.total)}{shared};"
            f" {_about(now.rate)}/s{left} (pass {now.passes})",
        )


def _about(count: float) -> str:
    return f"{count / (1 << 20):.1f} MiB"
