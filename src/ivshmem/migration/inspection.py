"""Internal: which ivshmem devices running QEMUs have, and which of these share a memory.

Knows: where QEMU's object tree has what, servers' control sockets, files' identities.
Does not know: what is done with it.

Two devices share a memory if their files are the same (device and inode number), or their servers;
a server whose memory has a path is known by that file, so plain devices that use it are found.
Paths of a QEMU on another machine are compared as text, and its servers are asked only where
somebody names their control sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..errors import IvshmemError, QmpError
from ..memory import pages
from ..memory.region import posix_path
from ..qemu.monitor import Monitor
from ..qemu.programs import is_qemu
from ..service import control_client
from ..system import processes
from ..system.answers import Answer
from .model import PLACES, Found, FoundPeer, FoundServer, Kind, Place, Qemu, Vm, VmDevice

# QEMU's folders of devices: those with an id, and the others.
_FOLDERS = ("/machine/peripheral", "/machine/peripheral-anon")
_KINDS: Mapping[str, Kind] = {"ivshmem-plain": "plain", "ivshmem-doorbell": "doorbell"}

# The text in blocked-reasons by which QEMU names an ivshmem device that is not the master.
_PEER_MODE = ("peer mode", "ivshmem")

# Properties of a memory backend, except its size, its file, and that it is shared.
_PROPERTIES = (
    *("prealloc", "align", "pmem", "dump", "merge", "reserve", "policy", "host-nodes"),
    "discard-data",
)

_SECONDS = 10.0  # for a server's answer

# Control sockets that the user gave, by the place of their servers.
Controls = Mapping[Place, Sequence[str]]


async def inspect_all(
    vms: Sequence[Vm], monitors: Mapping[tuple[str, Place], Monitor], controls: Controls
) -> Found:
    """Look at all QEMUs of a migration, and at their servers; nothing changes by it.

    Raises:
        QmpError: a QEMU does not answer.
    """
    found: dict[Place, dict[str, Qemu]] = {place: {} for place in PLACES}
    servers: dict[Place, dict[str, FoundServer]] = {place: {} for place in PLACES}
    for place in PLACES:
        local = all(monitor.local for (_, where), monitor in monitors.items() if where == place)
        asked = _Servers(controls.get(place, ()), local)
        for vm in vms:
            buses = (
                {device.bus for device in found["source"][vm.name].devices}
                if place == "destination"
                else set()
            )
            monitor = monitors[vm.name, place]
            found[place][vm.name] = await inspect_qemu(vm.name, monitor, asked, buses)
        servers[place] = asked.found
    return Found(found["source"], found["destination"], servers)


async def inspect_qemu(
    name: str, monitor: Monitor, servers: _Servers, buses: Iterable[str]
) -> Qemu:
    """Look at one QEMU."""
    # The peer of a forwarded socket is a local process that is not a QEMU.
    local = monitor.local and bool(is_qemu(monitor.pid or 0, ask_process=True))
    migration = await monitor.execute("query-migrate")
    capabilities = await monitor.execute("query-migrate-capabilities")
    devices = [
        await _device(name, monitor, servers, local, path, kind)
        for path, kind in await devices_of(monitor)
    ]
    blockers = [each.text() for each in migration.parts("blocked-reasons")]
    return Qemu(
        pid=monitor.pid if local else None,
        status=(await monitor.execute("query-status")).text("status"),
        migration=migration.text("status", ""),
        listens=_address(migration.parts("socket-address")),
        devices=tuple(devices),
        buses=frozenset([bus for bus in buses if await _hotplug(monitor, bus)]),
        taken=frozenset([*await names(monitor, "/chardevs"), *await names(monitor, "/objects")]),
        blockers=tuple(r for r in blockers if not all(word in r for word in _PEER_MODE)),
        capabilities=frozenset(c.text("capability") for c in capabilities if c.flag("state")),
        forgetful=await _forgetful(monitor),
    )


async def _forgetful(monitor: Monitor) -> bool:
    """Whether it may forget what its running guest writes while it is migrated.

    Without KVM (TCG), before QEMU 9.0: when it has looked which pages were written, the next writes
    to them are not noticed. Measured with 7.2.22: of guests whose memory was gone over more than
    twice, none lived on; upstream 03bfc2188f061aa8381403f9280555f4e22c35a2 fixes it.
    """
    if (await monitor.execute("query-version")).part("qemu").number("major") >= 9:
        return False
    try:
        return not (await monitor.execute("query-kvm")).flag("enabled")
    except QmpError as error:
        if error.kind != "CommandNotFound":
            raise
        return False


async def devices_of(monitor: Monitor) -> list[tuple[str, Kind]]:
    """The QOM paths of a QEMU's ivshmem devices, and of which kind each is."""
    return [
        (f"{folder}/{entry.text('name')}", _KINDS[kind])
        for folder in _FOLDERS
        for entry in await monitor.execute("qom-list", path=folder)
        if (kind := entry.text("type").removeprefix("child<").removesuffix(">")) in _KINDS
    ]


async def find(monitor: Monitor, device: VmDevice) -> str | None:
    """The QOM path of the device that has that memory backend or chardev; None: none has it."""
    for path, kind in await devices_of(monitor):
        try:
            if kind == device.kind and await _backend(monitor, path, kind) == device.backend:
                return path
        except QmpError as error:
            if error.kind != "DeviceNotFound":  # one that is just going
                raise
    return None


async def names(monitor: Monitor, folder: str) -> list[str]:
    """The ids in a folder of QEMU's object tree."""
    try:
        entries = await monitor.execute("qom-list", path=folder)
    except QmpError as error:
        if error.kind != "DeviceNotFound":
            raise
        return []  # it appears with the first of its kind
    return [each.text("name") for each in entries if each.text("type").startswith("child<")]


async def _device(
    vm: str, monitor: Monitor, servers: _Servers, local: bool, path: str, kind: Kind
) -> VmDevice:
    async def get(what: str, of: str = path) -> Answer:
        return await _property(monitor, of, what)

    backend, bus = await _backend(monitor, path, kind), (await get("parent_bus")).text()
    page_size, file_system, where, properties = 0, "", "", {}
    if kind == "plain":
        size = (await get("size", f"/objects/{backend}")).number()
        if (found := await _if_there(monitor, f"/objects/{backend}", "mem-path")) is not None:
            where = found.text()  # a memfd has none
        shared = (await get("share", f"/objects/{backend}")).flag()
        # In a directory QEMU makes a file, and unlinks it: no other process has it.
        shared = shared and bool(where) and not (local and _is_folder(where))
        memory = _file(where, local) if shared else f"private {vm} {backend}"
        for each in _PROPERTIES:  # not all of QEMU's versions have all
            if (found := await _if_there(monitor, f"/objects/{backend}", each)) is not None:
                properties[each] = found.simple()
        with contextlib.suppress(OSError, ValueError):
            if local and where:
                page_size, file_system = pages.page_size_of(where), pages.file_system(where)
    else:
        size = (await get("size", f"{path}/ivshmem.bar2[0]")).number()
        address = await get("addr", f"/chardevs/{backend}")
        where = address.text("path", "")
        if address.flag("abstract", False):
            where = ""  # it has no file by which another device could find it
        memory = await servers.memory(where, local) if where else f"private {vm} {backend}"
        if (server := servers.found.get(where)) is not None:
            page_size, file_system = server.page_size, server.file_system
    return VmDevice(
        path=path,
        id=path.rpartition("/")[2] if path.startswith(f"{_FOLDERS[0]}/") else "",
        kind=kind,
        master=(await get("master")).text() == "on",
        vectors=(await get("vectors")).number() if kind == "doorbell" else 0,
        ioeventfd=(await get("ioeventfd")).flag() if kind == "doorbell" else True,
        size=size,
        page_size=page_size,
        file_system=file_system,
        memory=memory,
        backend=backend,
        where=where,
        bus=bus,
        slot=_slot((await get("addr")).number()),
        pluggable=await _hotplug(monitor, bus),
        properties=properties,
    )


async def _backend(monitor: Monitor, path: str, kind: Kind) -> str:
    what = "memdev" if kind == "plain" else "chardev"
    return (await _property(monitor, path, what)).text().rpartition("/")[2]


def _slot(address: int) -> str:
    """A place on a bus, as device_add takes it. QEMU 11 no longer tells it (legacy-addr)."""
    return f"{address >> 3:02x}.{address & 7}"


async def _property(monitor: Monitor, path: str, name: str) -> Answer:
    return await monitor.execute("qom-get", path=path, property=name)


async def _if_there(monitor: Monitor, path: str, name: str) -> Answer | None:
    """A property that this object, or this version of QEMU, may not have."""
    try:
        return await _property(monitor, path, name)
    except QmpError as error:
        if not error.kind:  # it did not refuse
            raise
        return None


def _is_folder(path: str) -> bool:
    try:
        return os.path.isdir(path)
    except ValueError:  # a NUL in it
        return False


async def _hotplug(monitor: Monitor, bus: str) -> bool:
    """Whether a bus takes and gives up devices; the device's own property says no in any case."""
    handler = await _if_there(monitor, bus, "hotplug-handler")
    return handler is not None and bool(handler.text("", ""))


class _Servers:
    """The servers at one place: those that were asked and answered, by socket path."""

    def __init__(self, controls: Sequence[str], local: bool) -> None:
        self._controls = controls
        self._local = local
        self._replies: dict[str, Answer | None] = {}
        self.found: dict[str, FoundServer] = {}

    async def memory(self, socket: str, local: bool) -> str:
        """What names a server's memory."""
        if socket not in self.found:
            # One of another version, whose reply lacks something, is one that does not answer.
            with contextlib.suppress(IvshmemError):
                await self._ask(socket, local)
        server = self.found.get(socket)
        memory = _file(server.memory, local) if server is not None and server.memory else ""
        return memory or f"server {_file(socket, local)}"

    async def _ask(self, socket: str, local: bool) -> None:
        candidates = [*self._controls, *([control_client.default_path(socket)] if local else [])]
        for path in candidates:
            reply = await self._reply(path)
            if reply is None:
                continue
            for region in reply.parts("regions"):
                if _same(region.text("socket"), socket, local):
                    self.found[socket] = _server(path, region, _shares_pids(reply))
                    return

    async def _reply(self, path: str) -> Answer | None:
        if path not in self._replies:
            self._replies[path] = None
            with contextlib.suppress(OSError, ValueError, IvshmemError):
                reply = await asyncio.to_thread(
                    control_client.request, path, {"do": "status"}, _SECONDS
                )
                self._replies[path] = Answer(reply, path)
        return self._replies[path]


def _shares_pids(reply: Answer) -> bool:
    """Whether pids mean the same to a server and to us."""
    return reply.part("server").number("pid_namespace", 0) == processes.pid_namespace() != 0


def _server(path: str, region: Answer, shares_pids: bool) -> FoundServer:
    memory = region.text("memory")
    if region.text("source") == "posix":
        memory = posix_path(memory)
    elif region.text("source") != "file":
        memory = ""
    peers = region.parts("peers")
    return FoundServer(
        control=path,
        region=region.text("name"),
        memory=memory,
        page_size=region.number("page_size"),
        file_system=region.text("file_system", ""),
        holds=region.flag("holds_leaves", False),
        peers=tuple(_peer(each, shares_pids) for each in peers),
        channels=region.number("channels", 0),
        can_hold=all("held" in each for each in peers),
    )


def _peer(peer: Answer, shares_pids: bool) -> FoundPeer:
    pid, process = peer.number("pid"), peer.text("process")
    found = is_qemu(pid if shares_pids else 0, process, ask_process=True)
    return FoundPeer(
        peer.number("id"), pid, process, peer.number("leaves_told", 0), is_qemu=found is not False
    )


def _same(one: str, other: str, local: bool) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return one == other or (local and os.path.samefile(one, other))
    return False


def _file(path: str, local: bool) -> str:
    """What names a file however its path is written."""
    if local:
        with contextlib.suppress(OSError, ValueError):
            status = Path(path).stat()
            return f"file {status.st_dev}:{status.st_ino}"
    return f"path {path}"


def _address(addresses: Sequence[Answer]) -> str:
    for each in addresses:
        if each.text("type", "") == "unix":
            return f"unix:{each.text('path', '')}"
        return f"tcp:{each.text('host', '')}:{each.text('port', '')}"
    return ""
