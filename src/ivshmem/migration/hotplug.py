"""Internal: unplugs an ivshmem device from a running QEMU, and plugs one in.

Knows: QEMU's commands, events and habits. Does not know: why it is done.

Both first look at what is done already. So a call that was interrupted, or whose result was lost,
can be repeated: it does what is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

from ..errors import QemuGone, QmpError, UnplugPending, UnplugRefused
from ..qemu.monitor import Monitor
from .inspection import find, names
from .model import VmDevice

_LOOK = 0.1  # seconds between two looks
_SETTLE = 10.0  # seconds for what QEMU does at once, unless the machine is very busy


async def unplug(monitor: Monitor, device: VmDevice, seconds: float) -> None:
    """Take a device out of its guest, and out of QEMU its connection to the server or its memory.

    Memory that stayed would be migrated, and the destination refuse what it does not know.

    Raises:
        UnplugPending: the guest did not let go of it in that time.
        UnplugRefused: QEMU refused.
    """
    if (path := await find(monitor, device)) is not None:
        await _ask_to_unplug(monitor, device.id or path)
        await until_unplugged(monitor, device, seconds)
    await _remove_backend(monitor, device)
    await _fence(monitor, device)


async def plug(monitor: Monitor, device: VmDevice, where: str) -> None:
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


def _memory(device: VmDevice, where: str) -> dict[str, Any]:
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
        asked = "already" in str(error) and "unplug" in str(error)  # by an interrupted run
        if not asked and error.kind != "DeviceNotFound":
            raise UnplugRefused(str(error)) from None


async def until_unplugged(monitor: Monitor, device: VmDevice, seconds: float) -> None:
    """Until a guest has let go of a device."""
    end = time.monotonic() + seconds
    while (path := await find(monitor, device)) is not None:
        if (left := end - time.monotonic()) <= 0:
            raise UnplugPending(
                f"{monitor.name}: the guest did not release {device.name} (does a program in it"
                " use the device?). QEMU cannot cancel the request: the guest may still release"
                " it, also at its next reset"
            )
        # The event may have come before we did: so the devices are looked at, too.
        await monitor.event("DEVICE_DELETED", min(0.5, left), path=path)


async def _remove_backend(monitor: Monitor, device: VmDevice) -> None:
    """Remove a chardev, which the server would still count as a peer; or a memory backend."""
    doorbell = device.kind == "doorbell"
    folder, command = ("/chardevs", "chardev-remove") if doorbell else ("/objects", "object-del")
    end = time.monotonic() + _SETTLE
    while device.backend in await names(monitor, folder):
        try:
            await monitor.execute(command, id=device.backend)
        except QemuGone:
            raise
        except QmpError as error:
            # The device may be gone from the tree a moment before it lets go of it; each version
            # has its own words for that.
            if not error.kind or time.monotonic() > end:
                raise
            await asyncio.sleep(_LOOK)


async def _fence(monitor: Monitor, device: VmDevice) -> None:
    """Wait until QEMU has let go of an unplugged device's memory.

    It does that by RCU after DEVICE_DELETED, without an event. Until then it would migrate that
    memory, and QEMU 7.2 dies when a device comes. A device_add that fails waits for it: this one
    lacks its memory.
    """
    with contextlib.suppress(QmpError):
        await monitor.execute(
            "device_add", driver="ivshmem-plain", bus=device.bus_name, addr=device.slot
        )
    await monitor.execute("query-status")  # fails if it has died
