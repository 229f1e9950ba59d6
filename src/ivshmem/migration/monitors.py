"""Internal: connections to all QEMUs of a migration.

Knows: which monitor is whose. Does not know: what they are told.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..qemu.monitor import Monitor, to_the_end
from .model import PLACES, Place, Vm


class Monitors:
    """Monitors by VM and place, made when they are asked for; an asynchronous context manager."""

    def __init__(self, vms: Sequence[Vm]) -> None:
        self._vms = {vm.name: vm for vm in vms}
        self._monitors: dict[tuple[str, Place], Monitor] = {}

    async def monitor(self, name: str, place: Place) -> Monitor:
        """The monitor of one QEMU.

        Raises:
            QmpError, OSError: as of Monitor.
        """
        if (name, place) not in self._monitors:
            vm = self._vms[name]
            address = vm.source if place == "source" else vm.destination
            monitor = Monitor(address, f"{name} at the {place}")
            self._monitors[name, place] = await monitor.__aenter__()
        return self._monitors[name, place]

    async def all(self) -> dict[tuple[str, Place], Monitor]:
        """Every monitor; raises as `monitor` does."""
        return {
            (name, place): await self.monitor(name, place) for name in self._vms for place in PLACES
        }

    async def __aenter__(self) -> Monitors:
        return self

    async def __aexit__(self, *error: object) -> None:
        await to_the_end(self._close())

    async def _close(self) -> None:
        for monitor in self._monitors.values():
            await monitor.close()
        self._monitors.clear()
