"""Carrying out a plan: forward, or, if that fails, back.

Knows: the order, what is written down when, where the way back ends.
Does not know: what a step does.

Whatever goes wrong before the first VM has arrived: what was done is undone, the last step first,
and the group runs at the source as before. Later there is only the way forward: the error names
the step, and `resume` goes on with it.
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
from .inspection import Controls, look
from .model import Options, Plan, Step, Vm
from .monitors import Monitors
from .plan import check_vms, make_plan
from .state_file import StateFile, Word, default_path
from .step_worker import StepWorker
from .transfer import Watch

_T = TypeVar("_T")

# Told of each step when it begins: its number, from 1 on, and whether it is undone.
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
    async with Monitors(vms) as crew:
        return make_plan(vms, await look(vms, await crew.all(), controls or {}), options)


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
    begun, cancelled = await _wholly(StateFile.create, path, plan)
    with begun:
        if cancelled is not None:
            begun.remove()
            raise cancelled
        await _Run(begun, tell, watch).forward()


async def resume(
    state: str | os.PathLike[str], *, tell: Tell = _nothing, watch: Watch = _nothing
) -> None:
    """Finish a migration that was interrupted; steps that were done are not done again.

    Raises:
        MigrationFailed, MigrationUnfinished, OSError: as of `migrate`.
        MigrationError: there is nothing to be resumed, or another process is at it.
    """
    with StateFile.load(state) as begun:
        await _Run(begun, tell, watch).forward()


async def put_back(state: str | os.PathLike[str], *, tell: Tell = _nothing) -> None:
    """Undo a migration that was interrupted, if no VM has arrived at its destination.

    Raises:
        MigrationUnfinished: one has, or it could not be undone.
        MigrationError, OSError: there is nothing to be undone, or another process is at it.
    """
    with StateFile.load(state) as begun:
        await _Run(begun, tell, _nothing).back()


class _Run:
    def __init__(self, state: StateFile, tell: Tell, watch: Watch) -> None:
        self._state = state
        self._plan = state.plan
        self._tell = tell
        self._watch = watch

    async def forward(self) -> None:
        """Do what is left; if that fails and there is a way back, go it."""
        try:
            async with Monitors(self._plan.vms) as crew:
                worker = StepWorker(crew, self._plan.options, self._watch)
                while self._state.next < len(self._plan.steps):
                    await self._do(worker)
        except (Exception, asyncio.CancelledError) as error:
            await self._failed(error)
        else:
            self._state.remove()

    async def _do(self, worker: StepWorker) -> None:
        index = self._state.next
        step = self._plan.steps[index]
        await self._note("begin", index)
        self._tell(index + 1, step, False)
        await worker.do(step, self._vm(step))
        await self._note("done", index)

    async def _note(self, word: Word, index: int) -> None:
        """Write it down before anything else is done; if we are cancelled, that comes after."""
        _, cancelled = await _wholly(self._state.note, word, index)
        if cancelled is not None:
            raise cancelled

    async def _failed(self, error: BaseException) -> None:
        """Go back if there is a way, and say how things stand."""
        if self._state.next == len(self._plan.steps):
            self._state.remove()  # all is done: it came too late
            return
        if self._state.arrived:
            raise self._unfinished(error) from error
        try:
            await self.back(error)
        except MigrationUnfinished as worse:
            raise worse from error
        if isinstance(error, asyncio.CancelledError):
            raise error
        raise MigrationFailed(f"{_said(error)}; the group runs at the source as before") from error

    async def back(self, reason: BaseException | None = None) -> None:
        """Undo what was done, the last first; what cannot be undone does not stop the rest."""
        if self._state.arrived:
            raise self._unfinished(reason, why="a VM has arrived, so there is no way back")
        # Who has used up its time gets no more.
        seconds = 0.0 if isinstance(reason, UnplugPending) else self._plan.options.unplug_seconds
        problems: list[tuple[BaseException, int]] = []
        index = self._state.next
        try:
            async with Monitors(self._plan.vms) as crew:
                worker = StepWorker(crew, self._plan.options, _nothing)
                for index in reversed(range(len(self._plan.steps))):
                    if self._state.words[index] == "undone":
                        continue
                    try:
                        await self._undo(worker, index, seconds, reason)
                    except AlreadyMigrated as error:
                        if error.wholly:
                            with contextlib.suppress(OSError):  # who resumes will find out
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

    async def _undo(
        self, worker: StepWorker, index: int, seconds: float, reason: BaseException | None
    ) -> None:
        step = self._plan.steps[index]
        # Of a device that the guest was not asked for there is nothing to be undone.
        if not (isinstance(reason, UnplugRefused) and self._state.words[index] == "begin"):
            self._tell(index + 1, step, True)
            await worker.undo(step, self._vm(step), seconds)
        await self._note("undone", index)

    def _vm(self, step: Step) -> Vm | None:
        return self._plan.vm(step.vm) if step.vm else None

    def _unfinished(
        self,
        error: BaseException | None,
        index: int | None = None,
        why: str = "",
        forward: bool = False,
    ) -> MigrationUnfinished:
        """An error that names the step to go on with, or the one that could not be undone."""
        stands = "it stands at" if index is None else "this could not be undone:"
        if index is None:
            index = min(self._state.next, len(self._plan.steps) - 1)
        step = self._plan.steps[index]
        forward = forward or self._state.arrived
        way = "--resume finishes it" + ("" if forward else ", --put-back undoes it")
        what = "; ".join(filter(None, [_said(error) if error is not None else "", why]))
        return MigrationUnfinished(
            f"{what}; {stands} step {index + 1} of {len(self._plan.steps)}, {step}: {way}"
            f" (state: {self._state.path})",
            str(step),
            step.vm,
            self._state.path,
        )


async def _wholly(
    work: Callable[..., _T], *arguments: object
) -> tuple[_T, asyncio.CancelledError | None]:
    """Do in a thread what waits for a disk, to its end; say whether we were cancelled during it.

    The disk can take seconds, in which the embedding program's other tasks go on.
    """
    task = asyncio.ensure_future(asyncio.to_thread(work, *arguments))
    cancelled = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    return task.result(), cancelled


def _said(error: BaseException) -> str:
    if isinstance(error, asyncio.CancelledError):
        return "interrupted"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())
