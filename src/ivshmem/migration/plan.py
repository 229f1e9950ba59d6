"""Internal: from what was found to the steps of a migration, or to the reasons why it cannot work.

Knows: what QEMU can migrate, what it does not notice, what crashes it; in which order.
Does not know: I/O: everything is in what is given.

A master's device takes the shared memory along. The others cannot migrate: they are unplugged
first, and plugged back when every memory has arrived. In between lies the point of no return: the
end of the first migration.

The plan refuses what QEMU itself would refuse halfway, and two things that QEMU silently accepts: a
destination with a device that the source does not have, and a memory that another process uses.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from ..errors import MigrationRefused
from ..memory.sizes import format_size
from ..text import counted
from .model import (
    Found,
    FoundPeer,
    FoundServer,
    Group,
    GroupMember,
    Options,
    Plan,
    Qemu,
    Step,
    Vm,
    VmDevice,
    is_under_way,
)

# Of migration. x-ignore-shared fails with a mapped BAR; of a background snapshot both ends run;
# x-colo stops the source from answering. With the others only one end would know.
_IMPOSSIBLE = ("x-ignore-shared", "background-snapshot", "x-colo")

# Where userfaultfd(2) finds what is missing. QEMU notices since 8.1; 7.2 only at the destination,
# when the migration can no longer be undone.
_POSTCOPIABLE = ("tmpfs", "hugetlbfs", "devtmpfs")

# About a QEMU before 9.0 that runs a guest without KVM.
_FORGETFUL = (
    "its QEMU runs it without KVM, and may forget what it writes after a first pass over its memory"
)

_READY = ("running", "paused", "prelaunch")
_URI = re.compile(r"tcp:(\[[0-9A-Fa-f:.%]+\]|[^:\[\]/]*):[0-9]{1,5}|unix:.+|file:/.+")


def check_vms(vms: Sequence[Vm]) -> None:
    """Refuse what is wrong before any QEMU is asked.

    Raises:
        MigrationRefused: with all reasons.
    """
    if reasons := list(_about_vms(vms)):
        raise MigrationRefused(reasons)


def make_plan(vms: Sequence[Vm], found: Found, options: Options | None = None) -> Plan:
    """The plan.

    Raises:
        MigrationRefused: with every reason that there is.
    """
    check_vms(vms)
    planner = _Planner(vms, found, options or Options())
    if reasons := list(dict.fromkeys(planner.reasons())):
        raise MigrationRefused(reasons)
    return planner.make()


class _Planner:
    """One plan in the making. Call `make` only if there are no `reasons`."""

    def __init__(self, vms: Sequence[Vm], found: Found, options: Options) -> None:
        self._vms = tuple(vms)
        self._found = found
        self._options = options
        members: dict[str, list[GroupMember]] = {}
        for vm in vms:
            for device in found.source[vm.name].devices:
                members.setdefault(device.memory, []).append(GroupMember(vm.name, device))
        self._memories = list(members.values())

    # -- why not ----------------------------------------------------------------------------------

    def reasons(self) -> Iterator[str]:
        """Why it would not work, a line each."""
        for vm in self._vms:
            yield from self._about_way(vm)
            yield from self._about_source(vm)
            yield from self._about_destination(vm)
        for members in self._memories:
            yield from self._about_memory(members)

    def _about_way(self, vm: Vm) -> Iterator[str]:
        for on, option in (
            (self._options.postcopy, "--postcopy"),
            (self._options.multifd, "--multifd"),
        ):
            if on and vm.uri.startswith("file:"):
                yield f"{vm.name}: a file has no way back to the source: omit {option}"

    def _about_source(self, vm: Vm) -> Iterator[str]:
        qemu = self._found.source[vm.name]
        if not qemu.devices:
            yield f"{vm.name}: it has no ivshmem device: migrate it as any other VM"
        if qemu.status == "postmigrate":
            yield f"{vm.name}: it has been migrated already: its guest is at a destination"
        elif qemu.status not in _READY:
            yield f"{vm.name}: its source is in state {qemu.status}: let it run first"
        if is_under_way(qemu.migration):
            yield (
                f"{vm.name}: a migration of it is under way (its status is {qemu.migration}): let"
                " it end, or cancel it (migrate_cancel)"
            )
        for blocker in qemu.blockers:
            yield f"{vm.name}: QEMU will not migrate it: {blocker}"
        if self._options.postcopy and not self._options.force and self._forgets(vm):
            yield (
                f"{vm.name}: {_FORGETFUL}, so with --postcopy its guest would break: omit"
                " --postcopy, or take the risk with --force"
            )
        yield from _about_capabilities(vm, "source", qemu)

    def _about_destination(self, vm: Vm) -> Iterator[str]:
        qemu = self._found.destination[vm.name]
        if qemu.status != "inmigrate":
            yield (
                f"{vm.name}: its destination is not waiting (it is in state {qemu.status}): start"
                " it with -incoming defer"
            )
        elif qemu.listens:
            yield (
                f"{vm.name}: its destination waits at {qemu.listens} already, and its capabilities"
                " can no longer be set: start it with -incoming defer"
            )
        elif qemu.migration not in ("", "none"):
            yield (
                f"{vm.name}: its destination is left over from a failed migration (status"
                f" {qemu.migration}): end that QEMU, and start it again with -incoming defer"
            )
        known = {
            (each.bus, each.slot) for each in self._found.source[vm.name].devices if each.master
        }
        for device in qemu.devices:
            if (device.bus, device.slot) not in known:
                yield (
                    f"{vm.name}: its destination has {device.name} at {device.bus_name}"
                    f" {device.slot}, where its source has no master. QEMU would not notice, and"
                    " the guest would see a device that does not answer: start the destination"
                    " without it"
                )
        yield from _about_capabilities(vm, "destination", qemu)

    def _about_memory(self, members: Sequence[GroupMember]) -> Iterator[str]:
        what = ", ".join(f"{each.device.name} of {each.vm}" for each in members)
        masters = [each for each in members if each.device.master]
        if not masters:
            yield (
                f"{what}: none of them is the master, so the memory would not migrate: start one"
                " QEMU with master=on (it cannot be changed later)"
            )
            return
        if len(masters) > 1:
            both = " and ".join(f"{each.device.name} of {each.vm}" for each in masters)
            yield (
                f"{both} are masters of the same memory, and the one that migrates last would"
                " overwrite what the others wrote: start all but one with master=off"
            )
            return
        if len(sizes := {each.device.size for each in members}) > 1:
            shown = " and ".join(format_size(size) for size in sorted(sizes))
            yield f"{what}: they share a memory, but have {shown} of it: give all the same size"
        (master,) = masters
        yield from self._about_master(master)
        for other in members:
            if not other.device.master:
                yield from self._about_other(other, master)

    def _about_master(self, master: GroupMember) -> Iterator[str]:
        """A destination's device must be the same one, as QEMU names memory by slot and backend."""
        mine, there = master.device, self._arrival(master)
        who = f"{mine.name} of {master.vm}"
        if there is None:
            yield (
                f"{who}: the destination has no ivshmem device at {mine.bus_name} {mine.slot}:"
                " start it with the same one, master=on"
            )
            return
        if there.kind != mine.kind:
            yield f"{who}: it is {mine.kind}, at the destination {there.kind}: make them the same"
            return
        if not there.master:
            yield f"{who}: at the destination it is not the master: start that with master=on"
        if there.size != mine.size:
            yield (
                f"{who}: its memory has {format_size(mine.size)}, at the destination"
                f" {format_size(there.size)}: make them the same"
            )
        if there.vectors != mine.vectors:
            yield (
                f"{who}: it has {counted(mine.vectors, 'vector')}, at the destination"
                f" {there.vectors}: make them the same"
            )
        if mine.kind == "plain" and there.backend != mine.backend:
            yield (
                f"{who}: its memory backend is called {mine.backend}, at the destination"
                f" {there.backend}, and QEMU knows memory by that name: make them the same"
            )
        if self._options.postcopy and there.page_size != mine.page_size:
            pages = [
                format_size(each) if each else "unknown"
                for each in (mine.page_size, there.page_size)
            ]
            yield (
                f"{who}: its pages are {pages[0]}, at the destination {pages[1]}: omit --postcopy,"
                " which needs the same page size"
            )
        if self._options.postcopy and there.file_system not in ("", *_POSTCOPIABLE):
            yield (
                f"{who}: its memory at the destination is on {there.file_system}, and with"
                " --postcopy its guest would be lost: put it on tmpfs or hugetlbfs, or omit"
                " --postcopy"
            )
        if there.kind == "doorbell":
            yield from self._about_arrival_server(master, there)

    def _about_arrival_server(self, master: GroupMember, there: VmDevice) -> Iterator[str]:
        server = self._server("destination", there)
        if server is None:
            return
        pid = self._found.destination[master.vm].pid
        strangers = [
            peer for peer in server.peers if peer.id != 0 or (pid is not None and peer.pid != pid)
        ]
        if strangers:
            shown = ", ".join(f"{peer.id} ({peer.process})" for peer in strangers)
            yield (
                f"{master.device.name} of {master.vm}: the server at the destination,"
                f" {there.where}, already has peers besides it: {shown}. It must be the first"
                " peer, and what the others write would be overwritten: end them until it has"
                " arrived"
            )

    def _about_other(self, other: GroupMember, master: GroupMember) -> Iterator[str]:
        device, who = other.device, f"{other.device.name} of {other.vm}"
        source, destination = self._found.source[other.vm], self._found.destination[other.vm]
        if not device.pluggable:
            yield (
                f"{who}: it has to be unplugged, and its bus {device.bus_name} cannot do that: put"
                " it behind a pcie-root-port, or use -machine pc"
            )
        elif device.bus not in destination.buses:
            yield (
                f"{who}: the destination has no bus {device.bus_name} that it could be plugged"
                " into: start that with the same machine and ports"
            )
        if source.status in _READY and source.status != "running":
            yield (
                f"{who}: it has to be unplugged, and its guest is {source.status}: let it run, so"
                " that it can release the device"
            )
        if device.properties.get("discard-data"):
            yield (
                f"{who}: its memory backend has discard-data=on, so unplugging it would wipe the"
                " shared memory: start its QEMU without that"
            )
        if device.backend in destination.taken:
            yield (
                f"{who}: the destination already has an object {device.backend}: start it without,"
                " the migration creates it"
            )
        there = self._arrival(master)
        if there is not None and not self._where(other, there):
            yield (
                f"{who}: the memory that {master.device.name} of {master.vm} has at the"
                f" destination has no {'path' if device.kind == 'plain' else 'server'} by which a"
                f" {device.kind} device could share it"
            )
        if device.kind == "doorbell" and not self._options.force:
            yield from self._about_leaves(other)

    def _about_leaves(self, other: GroupMember) -> Iterator[str]:
        device, who = other.device, f"{other.device.name} of {other.vm}"
        server, pid = self._server("source", device), self._found.source[other.vm].pid
        if server is None:
            yield (
                f"{who}: its server {device.where} has no control socket that answers here, so it"
                " cannot hold leaves back, and a QEMU that received one can crash when a device"
                " is unplugged: serve with `ivshmem serve`, or take the risk with --force"
            )
            return
        if not server.can_hold:
            yield (
                f"{who}: its server {device.where} has a version that cannot hold back messages,"
                " and QEMU 10 and newer can crash if one comes while the device is unplugged:"
                " replace the server (`ivshmem serve --takeover`), or take the risk with --force"
            )
        told = [
            peer for peer in server.peers if peer.leaves_told and (peer.pid == pid or pid is None)
        ]
        if told:
            yield (
                f"{who}: its QEMU was sent a leave message (server {device.where}, peer"
                f" {told[0].id}), and can crash when the device is unplugged: restart the guest"
                " with `serve --hold-leaves`, or take the risk with --force"
            )

    # -- what, and in which order -----------------------------------------------------------------

    def make(self) -> Plan:
        """The plan of what nothing speaks against."""
        groups = [_group(members) for members in self._memories]
        unplugged = [other for group in groups for other in group.others]
        carriers = [group.master.vm for group in groups]
        order = sorted(self._vms, key=lambda vm: vm.name not in carriers)  # a stable sort
        holds = list(self._holds(unplugged))
        steps = [
            *holds,
            *(self._unplug(each) for each in unplugged),
            *(self._evictions(groups) if self._options.evict else ()),
            *(self._migrate(vm, groups) for vm in order),
            *self._frees(groups),
            *(self._plug(other, group) for group in groups for other in group.others),
            *(Step("release", control=each.control, region=each.region) for each in holds),
        ]
        notes = tuple(dict.fromkeys(self._notes(groups)))
        return Plan(self._vms, self._options, tuple(groups), tuple(steps), notes)

    def _holds(self, unplugged: Sequence[GroupMember]) -> Iterator[Step]:
        """The servers that do not hold leaves back yet, and where a device will leave."""
        known = set()
        for each in unplugged:
            server = self._server("source", each.device)
            if server is None or server.holds or (server.control, server.region) in known:
                continue
            known.add((server.control, server.region))
            yield Step("hold", control=server.control, region=server.region)

    def _unplug(self, member: GroupMember) -> Step:
        """While its server, if that can be asked, tells its QEMU nothing."""
        server = self._server("source", member.device)
        if server is None or not server.can_hold:
            return Step("unplug", member.vm, member.device)
        return Step(
            "unplug",
            member.vm,
            member.device,
            control=server.control,
            region=server.region,
            pid=self._found.source[member.vm].pid or 0,
        )

    def _evictions(self, groups: Sequence[Group]) -> Iterator[Step]:
        for group in groups:
            for server, peer in self._strangers(group):
                if not peer.is_qemu:
                    yield Step("evict", control=server.control, region=server.region, peer=peer)

    def _strangers(self, group: Group) -> Iterator[tuple[FoundServer, FoundPeer]]:
        """A server's peers that do not migrate, if that can be known."""
        pids = {self._found.source[vm.name].pid for vm in self._vms}
        server = self._server("source", group.master.device)
        if server is not None and None not in pids:
            yield from ((server, peer) for peer in server.peers if peer.pid not in pids)

    def _migrate(self, vm: Vm, groups: Sequence[Group]) -> Step:
        size = sum(group.master.device.size for group in groups if group.master.vm == vm.name)
        running = self._found.source[vm.name].status == "running"
        local = self._found.destination[vm.name].pid is not None
        return Step("migrate", vm.name, running=running, size=size, local=local)

    def _frees(self, groups: Sequence[Group]) -> Iterator[Step]:
        """The servers at the destination whose memory arrives with places in channels."""
        for group in groups:
            before, there = self._server("source", group.master.device), self._arrival(group.master)
            after = None if there is None else self._server("destination", there)
            if before is not None and before.channels and after is not None:
                yield Step("free", control=after.control, region=after.region)

    def _plug(self, other: GroupMember, group: Group) -> Step:
        there = self._arrival(group.master)
        assert there is not None
        return Step("plug", other.vm, other.device, where=self._where(other, there))

    def _notes(self, groups: Sequence[Group]) -> Iterator[str]:
        for vm in self._vms:
            if self._forgets(vm):
                yield (
                    f"{vm.name}: {_FORGETFUL}: let it write little during the migration, or, if no"
                    " device of it is unplugged, stop it first and resume it at the destination"
                    " (cont)"
                )
        for group in groups:
            there = self._arrival(group.master)
            if self._options.postcopy and there is not None and not there.file_system:
                yield (
                    f"what file system the memory of {group.master.device.name} of"
                    f" {group.master.vm} is on at the destination cannot be seen: if it is not"
                    " tmpfs or hugetlbfs, --postcopy loses the guest"
                )
            for _, peer in self._strangers(group):
                if not self._options.evict or peer.is_qemu:
                    yield (
                        f"peer {peer.id} ({peer.process}, pid {peer.pid}) of"
                        f" {group.master.device.where} stays at the source: what it writes during"
                        " the migration may be lost, and what it writes later is"
                    )
            if group.others and group.master.device.kind == "plain":
                yield (
                    f"whether host processes use {group.master.device.where} cannot be seen: what"
                    " they write during the migration may be lost, and QEMU does not notice"
                )
            alone = there is None or there.kind == "plain" or self._server("destination", there)
            if there is not None and not alone:
                yield (
                    f"the server {there.where} at the destination has no control socket that"
                    " answers here: it cannot be seen whether other peers use it"
                )

    # -- looking up -------------------------------------------------------------------------------

    def _forgets(self, vm: Vm) -> bool:
        qemu = self._found.source[vm.name]
        return qemu.forgetful and qemu.status == "running"

    def _arrival(self, master: GroupMember) -> VmDevice | None:
        """The device at the destination that a master's becomes."""
        mine = master.device
        for device in self._found.destination[master.vm].devices:
            if (device.bus, device.slot) == (mine.bus, mine.slot):
                return device
        return None

    def _server(self, place: str, device: VmDevice) -> FoundServer | None:
        assert place in ("source", "destination")
        servers = self._found.servers["source" if place == "source" else "destination"]
        return servers.get(device.where) if device.kind == "doorbell" else None

    def _where(self, other: GroupMember, there: VmDevice) -> str:
        """The file or socket by which a device shares the memory of that one; "" if none."""
        if other.device.kind == there.kind:
            return there.where
        server = self._server("destination", there)
        return server.memory if server is not None else ""


def _group(members: Sequence[GroupMember]) -> Group:
    (master,) = (each for each in members if each.device.master)
    return Group(master, tuple(each for each in members if not each.device.master))


def _about_vms(vms: Sequence[Vm]) -> Iterator[str]:
    if not vms:
        yield "no VM is given"
    addresses = Counter(address for vm in vms for address in (vm.source, vm.destination))
    for what, counts in (
        ("name", Counter(vm.name for vm in vms)),
        ("monitor", addresses),
        ("URI", Counter(vm.uri for vm in vms)),
    ):
        for value, count in counts.items():
            if count > 1:
                yield f"the {what} {value} is given {count} times: each VM needs its own"
    for vm in vms:
        if not _URI.fullmatch(vm.uri):
            yield (
                f"{vm.name}: not a migration URI: {vm.uri} (give tcp:HOST:PORT, unix:PATH, or"
                " file:/PATH)"
            )


def _about_capabilities(vm: Vm, place: str, qemu: Qemu) -> Iterator[str]:
    for name in _IMPOSSIBLE:
        if name in qemu.capabilities:
            yield (
                f"{vm.name}: its {place} has the capability {name} on, with which shared memory"
                " cannot migrate: turn it off (migrate-set-capabilities)"
            )
