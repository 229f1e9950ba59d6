"""What each step of a plan does, and how it is undone.

Knows: which module does it. Does not know: the order of steps, where they are noted.
"""

from __future__ import annotations

import asyncio

from ..qemu.answers import Answer
from ..service import control_client
from .held_news import news_held
from .hotplug import gone, plug, unplug
from .model import Options, Step, Vm
from .monitors import Monitors
from .transfer import Mover, Watch


class StepWorker:
    """Does and undoes steps.

    Args:
        watch: told of a migration's progress.
    """

    def __init__(self, crew: Monitors, options: Options, watch: Watch) -> None:
        self._crew = crew
        self._options = options
        self._watch = watch

    async def do(self, step: Step, vm: Vm | None) -> None:
        """Do a step, or what is left of it.

        Raises:
            MigrationError, QmpError, OSError: it could not be done.
        """
        if step.kind in ("hold", "release"):
            await _hold_leaves(step, on=step.kind == "hold")
            return
        if step.kind == "evict":
            await asyncio.to_thread(_evict, step)
            return
        assert vm is not None
        if step.kind == "migrate":
            await self._mover(step, vm).move()
            return
        assert step.device is not None
        if step.kind == "unplug":
            monitor = await self._crew.monitor(vm.name, "source")
            async with news_held(step, self._options.unplug_seconds):
                await unplug(monitor, step.device, self._options.unplug_seconds)
        else:
            monitor = await self._crew.monitor(vm.name, "destination")
            await plug(monitor, step.device, step.where)

    async def undo(self, step: Step, vm: Vm | None, seconds: float) -> None:
        """Undo a step, or what was begun of it.

        Args:
            seconds: that a guest still has to let go of a device that it was asked for.

        Raises:
            AlreadyMigrated: a migration that has completed.
            MigrationError, QmpError, OSError: it could not be undone.
        """
        if step.kind == "hold":
            await _hold_leaves(step, on=False)
        elif step.kind == "unplug":
            assert step.device is not None
            assert vm is not None
            monitor = await self._crew.monitor(vm.name, "source")
            async with news_held(step, self._options.unplug_seconds):
                await gone(monitor, step.device, seconds)
                await plug(monitor, step.device, step.device.where)
        elif step.kind == "migrate":
            assert vm is not None
            await self._mover(step, vm).take_back()

    def _mover(self, step: Step, vm: Vm) -> Mover:
        return Mover(self._crew, vm, step, self._options, self._watch)


async def _hold_leaves(step: Step, *, on: bool) -> None:
    message = {"do": "hold-leaves", "on": on, "region": step.region}
    await asyncio.to_thread(control_client.request, step.control, message)


def _evict(step: Step) -> None:
    """Hang up on a peer, if it is still the same one."""
    assert step.peer is not None
    with control_client.ControlClient(step.control) as client:
        reply = Answer(client.ask({"do": "status", "region": step.region}), step.control)
        peers = [peer for region in reply.parts("regions") for peer in region.parts("peers")]
        wanted = (step.peer.id, step.peer.pid)
        if any((peer.number("id"), peer.number("pid")) == wanted for peer in peers):
            client.ask({"do": "evict", "id": step.peer.id, "region": step.region})
