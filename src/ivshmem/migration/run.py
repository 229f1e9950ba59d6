"""Internal: carries out a plan: forward, or, if that fails, back.

Knows: the order, which module does a step and undoes it, what is written down when, where the way
back ends. Does not know: what QEMU and servers are told for a step.

If anything fails before the first VM has arrived, the steps that were done are undone, the last one
first, and the group runs at the source as before. Later there is only the way forward: the error
names the step, and `resume` continues with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Sequence
from typing import TypeVar

from ..errors import (
    AlreadyMigrated,
    IvshmemError,
    MigrationFailed,
    MigrationUnfinished,
    UnplugPending,
    UnplugRefused,
)
from .hotplug import plug, unplug, until_unplugged
from .inspection import Controls, inspect_all
from .model import Options, Plan, Step, Vm
from .monitors import Monitors
from .plan import check_vms, make_plan
from .servers import evict, free_places, hold_leaves, messages_held
from .state_file import StateFile, Word, default_path
from .transfer import Mover, Watch

_T = TypeVar("_T")

# Called when a step begins, with its number, from 1 on, and whether it is undone.
Tell = Callable[[int, Step, bool], object]


def _nothing(*_: object) -> None:
    pass


async def prepare(
    vms: Sequence[Vm], options: Options | None = None, controls: Controls | None = None
) -> Plan:
    """Look at the QEMUs and servers, and make a plan; nothing is touched.

    Args:
        controls: control sockets of servers that have them elsewhere than at SOCKET.control, or on
            another machine, for "source" and "destination".

    Raises:
        MigrationRefused: it would not work; all reasons are told.
        QmpError, OSError, ValueError: a QEMU cannot be asked.
    """
    check_vms(vms)
    async with Monitors(vms) as monitors:
        found = await inspect_all(vms, await monitors.all(), controls or {})
        return make_plan(vms, found, options)


async def migrate(
    plan: Plan,
    *,
    state: str | os.PathLike[str] | None = None,
    tell: Tell = _nothing,
    watch: Watch = _nothing,
) -> None:
    """Carry out a plan, which should be new.

    When this task is cancelled, it is as if a step had failed, and CancelledError is raised last.

    Args:
        state: the file that says how far it is; it is removed when nothing is left to be done.
            None: one in the user's directory for state, named after the sources.
        tell: called when a step begins.
        watch: called ten times a second while a VM migrates.

    Raises:
        MigrationFailed: it did not work; the group runs at the source as before.
        MigrationUnfinished: it did not work after a VM had arrived, or could not be undone: see
            `resume`.
        MigrationError: an earlier one has to be resumed or put back first; nothing was touched.
        OSError: the state cannot be written; nothing was touched.
    """
    path = state or default_path(plan.vms)
    begun, cancelled = await _to_its_end(StateFile.create, path, plan)
    with begun:
        if cancelled is not None:
            begun.remove()
            raise cancelled
        await _Migration(begun, tell, watch).forward()


async def resume(
    state: str | os.PathLike[str], *, tell: Tell = _nothing, watch: Watch = _nothing
) -> None:
    """Finish a migration that was interrupted; steps that were done are not done again.

    Raises:
        MigrationFailed, MigrationUnfinished, OSError: as of `migrate`.
        MigrationError: there is nothing to resume, or another process works on it.
    """
    with StateFile.load(state) as begun:
        await _Migration(begun, tell, watch).forward()


async def put_back(state: str | os.PathLike[str], *, tell: Tell = _nothing) -> None:
    """Undo a migration that was interrupted, if no VM has arrived at its destination.

    Raises:
        MigrationUnfinished: one has, or it could not be undone.
        MigrationError, OSError: there is nothing to undo, or another process works on it.
    """
    with StateFile.load(state) as begun:
        await _Migration(begun, tell, _nothing).back()


class _Migration:
    """A migration whose state is in a file."""

    def __init__(self, state: StateFile, tell: Tell, watch: Watch) -> None:
        self._state = state
        self._plan = state.plan
        self._tell = tell
        self._watch = watch

    async def forward(self) -> None:
        """Do what is left; if that fails and there is a way back, go it."""
        try:
            async with Monitors(self._plan.vms) as monitors:
                while self._state.next < len(self._plan.steps):
                    await self._do_next(monitors)
        except (Exception, asyncio.CancelledError) as error:
            await self._failed(error)
        else:
            self._state.remove()

    async def _do_next(self, monitors: Monitors) -> None:
        index = self._state.next
        step = self._plan.steps[index]
        await self._note("begin", index)
        self._tell(index + 1, step, False)
        await self._do(step, monitors)
        await self._note("done", index)

    async def _do(self, step: Step, monitors: Monitors) -> None:
        """Do a step, or what is left of it.

        Raises:
            MigrationError, QmpError, OSError: it could not be done.
        """
        if step.kind in ("hold", "release"):
            await hold_leaves(step, on=step.kind == "hold")
        elif step.kind == "evict":
            await evict(step)
        elif step.kind == "free":
            await free_places(step)
        elif step.kind == "migrate":
            await self._mover(step, monitors, self._watch).move()
        elif step.kind == "unplug":
            assert step.device is not None
            monitor = await monitors.monitor(step.vm, "source")
            async with messages_held(step, self._unplug_seconds):
                await unplug(monitor, step.device, self._unplug_seconds)
        else:
            assert step.device is not None
            await plug(await monitors.monitor(step.vm, "destination"), step.device, step.where)

    async def _undo(self, step: Step, monitors: Monitors, seconds: float) -> None:
        """Undo a step, or what was begun of it.

        Args:
            seconds: that a guest still has to let go of a device that it was asked for.

        Raises:
            AlreadyMigrated: a migration that has completed.
            MigrationError, QmpError, OSError: it could not be undone.
        """
        if step.kind == "hold":
            await hold_leaves(step, on=False)
        elif step.kind == "migrate":
            await self._mover(step, monitors, _nothing).take_back()
        elif step.kind == "unplug":
            assert step.device is not None
            monitor = await monitors.monitor(step.vm, "source")
            async with messages_held(step, self._unplug_seconds):
                await until_unplugged(monitor, step.device, seconds)
                await plug(monitor, step.device, step.device.where)

    def _mover(self, step: Step, monitors: Monitors, watch: Watch) -> Mover:
        return Mover(monitors, self._plan.vm(step.vm), step, self._plan.options, watch)

    @property
    def _unplug_seconds(self) -> float:
        return self._plan.options.unplug_seconds

    async def _note(self, word: Word, index: int) -> None:
        """Write a word before anything else is done; a cancellation is raised after that."""
        _, cancelled = await _to_its_end(self._state.note, word, index)
        if cancelled is not None:
            raise cancelled

    async def _failed(self, error: BaseException) -> None:
        """Go back if there is a way, and raise what says how things stand."""
        if self._state.next == len(self._plan.steps):
            self._state.remove()  # all is done: the error came too late
            return
        if self._state.arrived:
            raise self._unfinished(error) from error
        try:
            await self.back(error)
        except MigrationUnfinished as worse:
            raise worse from error
        if isinstance(error, asyncio.CancelledError):
            raise error
        raise MigrationFailed(
            f"{_reason_of(error)}; the group runs at the source as before"
        ) from error

    async def back(self, reason: BaseException | None = None) -> None:
        """Undo the steps, the last one first; one that cannot be undone does not stop the rest."""
        if self._state.arrived:
            raise self._unfinished(
                reason, why="a VM has arrived, so the migration cannot be undone"
            )
        # A guest that has used up its time gets no more.
        seconds = 0.0 if isinstance(reason, UnplugPending) else self._unplug_seconds
        problems: list[tuple[BaseException, int]] = []
        index = self._state.next
        try:
            async with Monitors(self._plan.vms) as monitors:
                for index in reversed(range(len(self._plan.steps))):
                    if self._state.words[index] == "undone":
                        continue
                    try:
                        await self._undo_at(index, monitors, seconds, reason)
                    except AlreadyMigrated as error:
                        if error.wholly:
                            with contextlib.suppress(OSError):  # `resume` will find out
                                await self._note("done", index)
                        raise self._unfinished(reason, why=str(error), forward=True) from error
                    except (IvshmemError, OSError) as error:
                        problems.append((error, index))
        except asyncio.CancelledError as error:
            problems.insert(0, (error, index))
        if problems:
            first, index = problems[0]
            raise self._unfinished(first, index) from first
        self._state.remove()

    async def _undo_at(
        self, index: int, monitors: Monitors, seconds: float, reason: BaseException | None
    ) -> None:
        step = self._plan.steps[index]
        # If the guest was not asked for its device, there is nothing to undo.
        if not (isinstance(reason, UnplugRefused) and self._state.words[index] == "begin"):
            self._tell(index + 1, step, True)
            await self._undo(step, monitors, seconds)
        await self._note("undone", index)

    def _unfinished(
        self,
        error: BaseException | None,
        index: int | None = None,
        why: str = "",
        forward: bool = False,
    ) -> MigrationUnfinished:
        """An error that names the step to continue with, or the one that could not be undone."""
        stands = "it stands at" if index is None else "this could not be undone:"
        if index is None:
            index = min(self._state.next, len(self._plan.steps) - 1)
        step = self._plan.steps[index]
        forward = forward or self._state.arrived
        way = "--resume finishes it" + ("" if forward else ", --put-back undoes it")
        what = "; ".join(filter(None, [_reason_of(error) if error is not None else "", why]))
        return MigrationUnfinished(
            f"{what}; {stands} step {index + 1} of {len(self._plan.steps)}, {step}: {way}"
            f" (state: {self._state.path})",
            str(step),
            step.vm,
            self._state.path,
        )


async def _to_its_end(
    work: Callable[..., _T], *arguments: object
) -> tuple[_T, asyncio.CancelledError | None]:
    """Do in a thread what waits for a disk, to its end; say whether we were cancelled during it.

    The disk can take seconds; the embedding program's other tasks run during them.
    """
    task = asyncio.ensure_future(asyncio.to_thread(work, *arguments))
    cancelled = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    return task.result(), cancelled


def _reason_of(error: BaseException) -> str:
    if isinstance(error, asyncio.CancelledError):
        return "interrupted"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())
