"""Internal: what a migration's modules say to each other: VMs, devices, servers, plans, errors.

Knows: words. Does not know: QEMU, files, how anything is found or done.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

Kind = Literal["plain", "doorbell"]
StepKind = Literal["hold", "unplug", "evict", "migrate", "free", "plug", "release"]
Place = Literal["source", "destination"]

PLACES: tuple[Place, ...] = get_args(Place)


# What a migration's status says when nothing is under way, in all of QEMU's versions. Each version
# has had new words for what lies between ("postcopy-device", "failing"): so any other one means
# that QEMU is at work, and is asked again.
_AT_REST = ("", "none", "completed", "failed", "cancelled")


def is_under_way(status: str) -> bool:
    """Whether a migration is running, by its status from query-migrate ("" if it has none)."""
    return status not in _AT_REST


# -- what to migrate ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vm:
    """A virtual machine that is to move.

    Attributes:
        name: what messages call it.
        source: the monitor of the QEMU that runs it: a path, or HOST:PORT.
        destination: that of the one that waits for it (-incoming defer).
        uri: where the two meet: `tcp:HOST:PORT`, `unix:PATH`, or `file:PATH` that both can reach.
    """

    name: str
    source: str
    destination: str
    uri: str


@dataclass(frozen=True)
class Options:
    """How to migrate.

    Attributes:
        force: also do what may crash a QEMU, or its guest.
        postcopy: let the guest run at the destination after one pass over its memory.
        multifd: send over several connections.
        evict: have the servers at the source disconnect host clients before memory migrates.
        unplug_seconds: that a guest has to let go of a device. A PCI Express port alone takes 6.
    """

    force: bool = False
    postcopy: bool = False
    multifd: bool = False
    evict: bool = False
    unplug_seconds: float = 30.0


# -- what is found --------------------------------------------------------------------------------


@dataclass(frozen=True)
class VmDevice:
    """An ivshmem device of a running QEMU.

    Attributes:
        path: its QOM path.
        id: "" if it has none.
        kind, master, vectors, ioeventfd: as QEMU's options say; a plain one has 0 vectors.
        size: of the memory, bytes; 0 if QEMU does not tell.
        page_size: of the memory's pages; 0 if that is not known.
        file_system: that the memory is on; "" if that is not known.
        memory: the same for all devices that share a memory, and for no others.
        backend: the id of its memory backend, or chardev.
        where: the memory's file, or the server's socket; "" if it has no path.
        bus, slot: QOM path of its bus, and the place on it ("07.0").
        pluggable: devices on that bus can be unplugged.
        properties: of a plain device's memory backend, those that its user could have set.
    """

    path: str
    id: str
    kind: Kind
    master: bool
    vectors: int
    ioeventfd: bool
    size: int
    page_size: int
    file_system: str
    memory: str
    backend: str
    where: str
    bus: str
    slot: str
    pluggable: bool
    properties: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.id or self.path.rpartition("/")[2]

    @property
    def bus_name(self) -> str:
        """The id of its bus, as device_add takes it."""
        return self.bus.rpartition("/")[2]


@dataclass(frozen=True)
class Qemu:
    """A QEMU that was looked at.

    Attributes:
        pid: None if it is on another machine.
        status: its run state, as query-status has it.
        migration: the state of its last migration; "" if there was none.
        listens: where it waits for a migration, if it was already told.
        devices: its ivshmem devices.
        buses: QOM paths of those on which it takes devices, of all that were asked for.
        taken: the ids of its chardevs and objects.
        blockers: why it cannot migrate, apart from its ivshmem devices.
        capabilities: of migration, that are on.
        forgetful: it may forget what its running guest writes, once it has sent it.
    """

    pid: int | None
    status: str
    migration: str = ""
    listens: str = ""
    devices: tuple[VmDevice, ...] = ()
    buses: frozenset[str] = frozenset()
    taken: frozenset[str] = frozenset()
    blockers: tuple[str, ...] = ()
    capabilities: frozenset[str] = frozenset()
    forgetful: bool = False


@dataclass(frozen=True)
class FoundPeer:
    """A server's peer.

    Attributes:
        id, pid, process: as the server tells.
        leaves_told: how often it was told that another one left.
        is_qemu: it is a QEMU, or it cannot be known that it is not.
    """

    id: int
    pid: int
    process: str
    leaves_told: int
    is_qemu: bool = False


@dataclass(frozen=True)
class FoundServer:
    """A server that devices are connected to, as its control socket tells.

    Attributes:
        control: path of that socket.
        region: the name of the region there.
        memory: the file of its memory, "" if it has no path.
        page_size, file_system: of that memory, as of Device.
        holds: leaves are held back from QEMUs.
        can_hold: it can hold back all messages to a peer.
        channels: bytes of the memory that are set aside for channels.
    """

    control: str
    region: str
    memory: str
    page_size: int
    file_system: str
    holds: bool
    peers: tuple[FoundPeer, ...]
    can_hold: bool = True
    channels: int = 0


@dataclass(frozen=True)
class Found:
    """All that was found: each VM's two QEMUs, by name, and the servers that answer, by socket."""

    source: Mapping[str, Qemu]
    destination: Mapping[str, Qemu]
    servers: Mapping[Place, Mapping[str, FoundServer]] = field(
        default_factory=lambda: {"source": {}, "destination": {}}
    )


# -- what is to be done ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One step, which can be done again when it was interrupted.

    Attributes:
        vm: whose, of unplug, migrate and plug.
        device: which, of unplug and plug.
        where: the file or socket that a plugged device is given.
        control, region: of the server, of hold, release, evict and free; of unplug, if the server
            holds all messages to the peer until it is unplugged.
        pid: of the QEMU, whose peers these are (unplug); 0 if it is not known.
        peer: which one is disconnected (evict).
        running: the guest runs (migrate).
        size: of the shared memory that goes along, bytes (migrate).
        local: the destination is on this machine (migrate).
    """

    kind: StepKind
    vm: str = ""
    device: VmDevice | None = None
    where: str = ""
    control: str = ""
    region: str = ""
    pid: int = 0
    peer: FoundPeer | None = None
    running: bool = True
    size: int = 0
    local: bool = False

    def __str__(self) -> str:
        name = self.device.name if self.device is not None else ""
        if self.kind == "hold":
            return f"hold leaves back from the QEMUs of {self.control}"
        if self.kind == "release":
            return f"send leaves again to QEMUs that join at {self.control}"
        if self.kind == "free":
            return f"free the places that processes at the source had in channels of {self.control}"
        if self.peer is not None:
            who = f"peer {self.peer.id} ({self.peer.process}, pid {self.peer.pid})"
            return f"disconnect {who} from {self.control}"
        if self.kind == "unplug":
            return f"unplug {name} from {self.vm}"
        if self.kind == "plug":
            return f"plug {name} into {self.vm} at the destination, with {self.where}"
        return f"migrate {self.vm}" + (", with the shared memory" if self.size else "")


@dataclass(frozen=True)
class GroupMember:
    """A device that shares a group's memory."""

    vm: str
    device: VmDevice


@dataclass(frozen=True)
class Group:
    """Devices that share a memory; exactly one is the master."""

    master: GroupMember
    others: tuple[GroupMember, ...]


@dataclass(frozen=True)
class Plan:
    """The steps of a migration, in order; `notes` has remarks that the user should read before."""

    vms: tuple[Vm, ...]
    options: Options
    groups: tuple[Group, ...]
    steps: tuple[Step, ...]
    notes: tuple[str, ...] = ()

    def vm(self, name: str) -> Vm:
        """The VM of that name."""
        return next(vm for vm in self.vms if vm.name == name)

    def _to_json(self) -> dict[str, Any]:
        """Return the plan as a dict for `_from_json`."""
        return asdict(self)

    @classmethod
    def _from_json(cls, data: Mapping[str, Any]) -> Plan:
        """Return the plan that `_to_json` wrote.

        Raises:
            KeyError, TypeError, ValueError: it is not a plan.
        """

        def member(data: Mapping[str, Any]) -> GroupMember:
            return GroupMember(data["vm"], VmDevice(**data["device"]))

        return cls(
            vms=tuple(Vm(**vm) for vm in data["vms"]),
            options=Options(**data["options"]),
            groups=tuple(
                Group(member(group["master"]), tuple(member(each) for each in group["others"]))
                for group in data["groups"]
            ),
            steps=tuple(
                Step(
                    **{
                        **step,
                        "device": step["device"] and VmDevice(**step["device"]),
                        "peer": step["peer"] and FoundPeer(**step["peer"]),
                    }
                )
                for step in data["steps"]
            ),
            notes=tuple(data["notes"]),
        )
