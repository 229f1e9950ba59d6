"""What each step does to a QEMU or a server, and how it is undone.

Knows: QEMU's commands, events and habits. Does not know: the order of steps, where they are noted.

Each step looks first how far it is already, so that one which was interrupted, or whose end
nobody has seen, can be done again: then it does what is left of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .. import control
from ..qemu.qmp import Monitor, QemuGone, QmpError
from .crew import Crew
from .discovery import find, names
from .model import Device, MigrationError, Options, Step, Vm

_BUSY = (
    "setup",
    "active",
    "postcopy-active",
    "postcopy-paused",
    "pre-switchover",
    "device",
    "wait-unplug",
    "cancelling",
)
_LOOK = 0.1  # seconds between two looks at how far QEMU is
_SETTLE = 10.0  # seconds for what QEMU does at once, unless the machine is very busy


class StepFailed(MigrationError):
    """A step that could not be done."""


class Pending(StepFailed):
    """A guest was asked to let go of a device and has not: it still may, and that stands."""


class NotAsked(StepFailed):
    """QEMU would not even ask the guest to let go of a device."""


class Arrived(MigrationError):
    """A migration that was to be undone has completed."""


@dataclass(frozen=True)
class Progress:
    """How far a VM's migration is, as QEMU counts.

    Attributes:
        transferred, remaining, total: bytes of RAM and of the shared memory; of what the guest
            writes meanwhile, some is sent again.
        shared: how many of `total` are the shared memory.
        rate: bytes a second.
        passes: how often the memory was gone through.
    """

    transferred: int
    remaining: int
    total: int
    shared: int
    rate: float
    passes: int


Watch = Callable[[Progress], object]


class Worker:
    """Does and undoes steps.

    Args:
        watch: told of a migration's progress.
    """

    def __init__(self, crew: Crew, options: Options, watch: Watch) -> None:
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
        assert vm is not None
        if step.kind == "migrate":
            await self._migrate(vm, step)
            return
        assert step.device is not None
        if step.kind == "unplug":
            monitor = await self._crew.monitor(vm.name, "source")
            await unplug(monitor, step.device, self._options.unplug_seconds)
        else:
            monitor = await self._crew.monitor(vm.name, "destination")
            await plug(monitor, step.device, step.where)

    async def undo(self, step: Step, vm: Vm | None, seconds: float) -> None:
        """Undo a step, or what was begun of it.

        Args:
            seconds: that a guest still has to let go of a device that it was asked for.

        Raises:
            Arrived: a migration that has completed.
            MigrationError, QmpError, OSError: it could not be undone.
        """
        if step.kind == "hold":
            await _hold_leaves(step, on=False)
        elif step.kind == "unplug":
            assert step.device is not None
            assert vm is not None
            monitor = await self._crew.monitor(vm.name, "source")
            await _gone(monitor, step.device, seconds)
            await plug(monitor, step.device, step.device.where)
        elif step.kind == "migrate":
            assert vm is not None
            await _cancel(await self._crew.monitor(vm.name, "source"), step)

    # -- migrating --------------------------------------------------------------------------------

    async def _migrate(self, vm: Vm, step: Step) -> None:
        source = await self._crew.monitor(vm.name, "source")
        status = await _migration(source)
        left = (await source.execute("query-status"))["status"] == "postmigrate"
        if not left and status.get("status") not in _BUSY:
            await self._start(vm, source)
        await self._follow(source, step)
        await self._receive(vm, source, step)

    async def _start(self, vm: Vm, source: Monitor) -> None:
        destination = await self._crew.monitor(vm.name, "destination")
        state = (await destination.execute("query-status"))["status"]
        if state != "inmigrate":
            raise StepFailed(
                f"{vm.name}: its destination is not waiting (it is in state {state}): start it"
                " with -incoming defer"
            )
        listens = (await _migration(destination)).get("socket-address")
        # Without a return path the source says "completed" though the destination has refused.
        wanted = {
            "return-path": True,
            "postcopy-ram": self._options.postcopy,
            "multifd": self._options.multifd,
        }
        settings = [{"capability": name, "state": on} for name, on in wanted.items()]
        await source.execute("migrate-set-capabilities", capabilities=settings)
        if not listens:  # it does if an interrupted run has told it
            await destination.execute("migrate-set-capabilities", capabilities=settings)
            await destination.execute("migrate-incoming", uri=vm.uri)
        await source.execute("migrate", uri=vm.uri)

    async def _follow(self, source: Monitor, step: Step) -> None:
        """Until the source has sent all."""
        postcopied = False
        while True:
            migration = await _migration(source)
            status, ram = migration.get("status", ""), migration.get("ram", {})
            if ram:
                self._watch(_progress(ram, step.size))
            if status == "completed":
                return
            if status not in _BUSY:
                reason = migration.get("error-desc") or (
                    "the log of the destination's QEMU has the reason"
                )
                raise StepFailed(f"{step.vm}: its migration {status or 'never began'}: {reason}")
            if (
                self._options.postcopy
                and not postcopied
                and status == "active"
                and ram.get("dirty-sync-count", 0) > 1
            ):
                await source.execute("migrate-start-postcopy")
                postcopied = True
            await asyncio.sleep(_LOOK)

    async def _receive(self, vm: Vm, source: Monitor, step: Step) -> None:
        """Until the destination runs, and the source has noticed that it does not."""
        destination = await self._crew.monitor(vm.name, "destination")
        end = time.monotonic() + _SETTLE
        # No event tells of the one, nor of the other.
        while not (
            (await _migration(destination)).get("status") == "completed"
            and (await destination.execute("query-status"))["status"] not in ("inmigrate",)
            and (await source.execute("query-status"))["status"] != "finish-migrate"
        ):
            if time.monotonic() > end:
                raise StepFailed(f"{vm.name}: its destination has all and does not go on: look")
            await asyncio.sleep(_LOOK)


async def _migration(monitor: Monitor) -> dict[str, Any]:
    found: dict[str, Any] = await monitor.execute("query-migrate")
    return found


async def _cancel(source: Monitor, step: Step) -> None:
    """Until the guest runs at the source, as it did."""
    end = time.monotonic() + _SETTLE
    while (status := (await _migration(source)).get("status")) in _BUSY:
        if status.startswith("postcopy"):
            raise Arrived(f"{step.vm}: it runs at the destination already (postcopy)")
        if status != "cancelling":
            await source.execute("migrate_cancel")
        if time.monotonic() > end:
            raise StepFailed(f"{step.vm}: QEMU does not end its migration: look what it does")
        await asyncio.sleep(_LOOK)
    while (state := (await source.execute("query-status"))["status"]) != "running":
        if state == "postmigrate":
            raise Arrived(f"{step.vm}: it has arrived at the destination")
        if not step.running and state in ("paused", "prelaunch"):
            return
        if time.monotonic() > end:
            raise StepFailed(f"{step.vm}: at the source it is in state {state}: look at it")
        await asyncio.sleep(_LOOK)


def _progress(ram: dict[str, Any], shared: int) -> Progress:
    return Progress(
        transferred=ram.get("transferred", 0),
        remaining=ram.get("remaining", 0),
        total=ram.get("total", 0),
        shared=shared,
        rate=ram.get("mbps", 0.0) * 1e6 / 8,
        passes=ram.get("dirty-sync-count", 0),
    )


# -- plugging -------------------------------------------------------------------------------------


async def unplug(monitor: Monitor, device: Device, seconds: float) -> None:
    """Take a device out of its guest, and out of QEMU its connection to the server or its memory.

    Memory that stayed would be migrated, and the destination refuse what it does not know.

    Raises:
        Pending: the guest did not let go of it in that time.
        NotAsked: QEMU refused.
    """
    if (path := await find(monitor, device)) is not None:
        await _ask_to_unplug(monitor, device.id or path)
        await _gone(monitor, device, seconds)
    await _remove_backend(monitor, device)
    await _fence(monitor, device)


async def plug(monitor: Monitor, device: Device, where: str) -> None:
    """Give a guest a device again, with the memory or the server at `where`.

    Raises:
        QmpError: QEMU refused; nothing of it is left then.
    """
    if await find(monitor, device) is not None:
        return
    arguments: dict[str, Any] = {
        "driver": f"ivshmem-{device.kind}",
        "bus": device.bus_name,
        "addr": device.slot,
        **({"id": device.id} if device.id else {}),
    }
    # What an interrupted run has left is of no use: a server greets only once.
    await _remove_backend(monitor, device)
    await _fence(monitor, device)
    if device.kind == "doorbell":
        address = {"type": "unix", "data": {"path": where}}
        backend = {"type": "socket", "data": {"addr": address, "server": False}}
        await monitor.execute("chardev-add", id=device.backend, backend=backend)
        arguments["chardev"] = device.backend
        arguments |= {"vectors": device.vectors, "ioeventfd": device.ioeventfd}
    else:
        await monitor.execute("object-add", _memory(device, where))
        arguments["memdev"] = device.backend
    try:
        await monitor.execute("device_add", arguments)
    except QmpError:
        with contextlib.suppress(QmpError):  # the first error counts
            await _remove_backend(monitor, device)
        raise


def _memory(device: Device, where: str) -> dict[str, Any]:
    """What object-add takes; at another place without what binds it to this machine's nodes."""
    same = where == device.where
    more = {
        name: value
        for name, value in device.properties.items()
        if same or name not in ("policy", "host-nodes", "align")
    }
    if more.get("policy") == "default":
        more.pop("host-nodes", None)
    return {
        "qom-type": "memory-backend-file",
        "id": device.backend,
        "mem-path": where,
        "size": device.size,
        "share": True,
        **more,
    }


async def _ask_to_unplug(monitor: Monitor, ident: str) -> None:
    try:
        await monitor.execute("device_del", id=ident)
    except QemuGone:
        raise
    except QmpError as error:
        if "in the process of unplug" not in str(error) and error.kind != "DeviceNotFound":
            raise NotAsked(str(error)) from None


async def _gone(monitor: Monitor, device: Device, seconds: float) -> None:
    """Until a guest has let go of a device."""
    end = time.monotonic() + seconds
    while (path := await find(monitor, device)) is not None:
        if (left := end - time.monotonic()) <= 0:
            raise Pending(
                f"{monitor.name}: the guest did not let go of {device.name} (is a program in it"
                " using the device?), and QEMU cannot take the request back: it still may, or a"
                " reset of the guest"
            )
        # The event may have come before we did: so the devices are looked at, too.
        await monitor.event("DEVICE_DELETED", min(0.5, left), path=path)


async def _remove_backend(monitor: Monitor, device: Device) -> None:
    """Remove a chardev, or the server would go on counting it as a peer; or a memory backend."""
    doorbell = device.kind == "doorbell"
    folder, command = ("/chardevs", "chardev-remove") if doorbell else ("/objects", "object-del")
    end = time.monotonic() + _SETTLE
    while device.backend in await names(monitor, folder):
        try:
            await monitor.execute(command, id=device.backend)
        except QemuGone:
            raise
        except QmpError as error:
            # The device may be gone from the tree a moment before it lets go of it.
            busy = "busy" in str(error) or "in use" in str(error)
            if not busy or time.monotonic() > end:
                raise
            await asyncio.sleep(_LOOK)


async def _fence(monitor: Monitor, device: Device) -> None:
    """Wait until QEMU has let go of an unplugged device's memory.

    It does that by RCU after DEVICE_DELETED, and tells nobody. Meanwhile it would migrate that
    memory, and QEMU 7.2 dies when a device comes. A device_add that fails waits for it: this one
    lacks its memory.
    """
    with contextlib.suppress(QmpError):
        await monitor.execute(
            "device_add", driver="ivshmem-plain", bus=device.bus_name, addr=device.slot
        )
    await monitor.execute("query-status")  # fails if it has died


async def _hold_leaves(step: Step, *, on: bool) -> None:
    message = {"do": "hold-leaves", "on": on, "region": step.region}
    await asyncio.to_thread(control.request, step.control, message)
