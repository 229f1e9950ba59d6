"""What is planned from what was found, and what is refused; no QEMU is asked."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivshmem.migration import MigrationRefused, Options, Plan, Vm
from ivshmem.migration.model import Found, FoundPeer, FoundServer, Kind, Place, Qemu, VmDevice
from ivshmem.migration.plan import make_plan

BUS = "/machine/i440fx/pci.0"


def device(kind: Kind = "plain", *, master: bool = False, there: bool = False) -> VmDevice:
    where = "/there" if there else "/here"
    return VmDevice(
        path="/machine/peripheral/shm0",
        id="shm0",
        kind=kind,
        master=master,
        vectors=4 if kind == "doorbell" else 0,
        ioeventfd=True,
        size=1 << 20,
        page_size=4096,
        file_system="tmpfs",
        memory=f"path {where}",
        backend="m0",
        where=where,
        bus=BUS,
        slot="07.0",
        pluggable=True,
    )


def server(place: Place = "source", *peers: FoundPeer, **kwargs: Any) -> FoundServer:
    where = "/here" if place == "source" else "/there"
    fields = {"control": f"{where}.control", "region": "default", "memory": "", "holds": False}
    pages = {"page_size": 4096, "file_system": "tmpfs"}
    return FoundServer(**{**fields, **pages, **kwargs}, peers=peers)


class Case:
    """A master and others, of which each test spoils something."""

    def __init__(
        self, kind: Kind = "plain", others: int = 1, options: Options | None = None
    ) -> None:
        self.options = options or Options()
        self.vms = [Vm("a", "/a", "/a2", "unix:/a.uri")]
        self.source = {"a": Qemu(10, "running", devices=(device(kind, master=True),))}
        arrival = device(kind, master=True, there=True)
        self.destination = {"a": Qemu(20, "inmigrate", devices=(arrival,), buses=frozenset([BUS]))}
        for number in range(others):
            name = f"o{number}"
            self.vms.append(Vm(name, f"/{name}", f"/{name}2", f"unix:/{name}.uri"))
            self.source[name] = Qemu(11 + number, "running", devices=(device(kind),))
            self.destination[name] = Qemu(21 + number, "inmigrate", buses=frozenset([BUS]))
        self.servers: dict[Place, dict[str, FoundServer]] = {"source": {}, "destination": {}}
        if kind == "doorbell":
            peers = [FoundPeer(number, 10 + number, "qemu", 0) for number in range(others + 1)]
            self.servers["source"]["/here"] = server("source", *peers)
            self.servers["destination"]["/there"] = server(
                "destination", FoundPeer(0, 20, "qemu", 0)
            )

    def plan(self) -> Plan:
        found = Found(self.source, self.destination, self.servers)
        return make_plan(self.vms, found, self.options)

    def reasons(self) -> list[str]:
        with pytest.raises(MigrationRefused) as refused:
            self.plan()
        return list(refused.value.reasons)

    def change(self, name: str, **fields: Any) -> None:
        """Of the device at the source."""
        self.source[name] = _changed(self.source[name], fields)

    def change_there(self, name: str, **fields: Any) -> None:
        self.destination[name] = _changed(self.destination[name], fields)


def _changed(qemu: Qemu, fields: Mapping[str, Any]) -> Qemu:
    (one,) = qemu.devices
    return replace(qemu, devices=(replace(one, **fields),))


def kinds(plan: Plan) -> list[tuple[str, str]]:
    return [(step.kind, step.vm) for step in plan.steps]


def test_plain() -> None:
    plan = Case(others=2).plan()
    assert kinds(plan) == [
        ("unplug", "o0"),
        ("unplug", "o1"),
        ("migrate", "a"),
        ("migrate", "o0"),
        ("migrate", "o1"),
        ("plug", "o0"),
        ("plug", "o1"),
    ]
    assert [step.where for step in plan.steps if step.kind == "plug"] == ["/there", "/there"]
    assert [step.size for step in plan.steps if step.kind == "migrate"] == [1 << 20, 0, 0]


def test_doorbell() -> None:
    plan = Case("doorbell").plan()
    assert [kind for kind, _ in kinds(plan)] == [
        *("hold", "unplug", "migrate", "migrate", "plug", "release"),
    ]
    assert plan.steps[0].control == "/here.control"
    assert not plan.notes


def test_places_in_channels_are_freed_where_the_memory_arrives() -> None:
    case = Case("doorbell")
    case.servers["source"]["/here"] = replace(case.servers["source"]["/here"], channels=65536)
    plan = case.plan()
    assert [kind for kind, _ in kinds(plan)] == [
        *("hold", "unplug", "migrate", "migrate", "free", "plug", "release"),
    ]
    step = plan.steps[4]
    there = case.servers["destination"]["/there"]
    assert (step.control, step.region) == (there.control, there.region)
    assert "free the places" in str(step)
    assert Plan._from_json(json.loads(json.dumps(plan._to_json()))) == plan
    case.servers["destination"].clear()  # it has no control socket
    assert "free" not in [kind for kind, _ in kinds(case.plan())]


def test_leaves_that_are_held_anyway() -> None:
    case = Case("doorbell")
    case.servers["source"]["/here"] = replace(case.servers["source"]["/here"], holds=True)
    assert [kind for kind, _ in kinds(case.plan())] == ["unplug", "migrate", "migrate", "plug"]


def test_a_master_alone() -> None:
    assert kinds(Case("doorbell", others=0).plan()) == [("migrate", "a")]


def test_masters_first_wherever_they_are_named() -> None:
    case = Case()
    case.vms.reverse()
    assert [vm for kind, vm in kinds(case.plan()) if kind == "migrate"] == ["a", "o0"]


def test_a_vm_is_master_of_one_memory_and_not_of_another() -> None:
    case = Case()
    for name, master in (("a", False), ("o0", True)):
        second = replace(
            device(master=master), memory="other", slot="08.0", backend="m1", where="/x", path="/q"
        )
        qemu = case.source[name]
        case.source[name] = replace(qemu, devices=(*qemu.devices, second))
    there = replace(device(master=True, there=True), slot="08.0", backend="m1", where="/y")
    case.destination["o0"] = replace(case.destination["o0"], devices=(there,))
    plan = case.plan()
    assert kinds(plan) == [
        ("unplug", "o0"),
        ("unplug", "a"),
        ("migrate", "a"),
        ("migrate", "o0"),
        ("plug", "o0"),
        ("plug", "a"),
    ]
    assert [step.where for step in plan.steps if step.kind == "plug"] == ["/there", "/y"]


def test_a_plan_survives_being_written() -> None:
    plan = Case("doorbell", 2).plan()
    assert Plan._from_json(json.loads(json.dumps(plan._to_json()))) == plan


def spoil_masters(case: Case) -> None:
    case.change("o0", master=True)


def spoil_no_master(case: Case) -> None:
    case.change("a", master=False)


def spoil_server_peers(case: Case) -> None:
    peers = (FoundPeer(0, 20, "qemu", 0), FoundPeer(1, 99, "python3", 0))
    case.servers["destination"]["/there"] = server("destination", *peers)


def spoil_told(case: Case) -> None:
    peers = (FoundPeer(0, 10, "qemu", 0), FoundPeer(1, 11, "qemu", 3))
    case.servers["source"]["/here"] = server("source", *peers)


@pytest.mark.parametrize(
    ("kind", "spoil", "reason"),
    [
        ("plain", spoil_masters, "are masters of the same memory"),
        ("plain", spoil_no_master, "none of them is the master"),
        ("doorbell", spoil_server_peers, r"already has peers besides it: 1 \(python3\)"),
        ("doorbell", spoil_told, "was sent a leave message .* peer 1"),
        ("doorbell", lambda c: c.servers["source"].clear(), "it cannot hold leaves back"),
        ("plain", lambda c: c.change("o0", size=2 << 20), "have 1M and 2M of it"),
        ("plain", lambda c: c.change_there("a", size=2 << 20), "1M, at the destination 2M"),
        ("doorbell", lambda c: c.change_there("a", vectors=2), "4 vectors, at the destination 2"),
        ("plain", lambda c: c.change_there("a", master=False), "at the destination it is not the"),
        ("plain", lambda c: c.change_there("a", kind="doorbell"), "at the destination doorbell"),
        ("plain", lambda c: c.change_there("a", slot="08.0"), "no ivshmem device at pci.0 07.0"),
        ("plain", lambda c: c.change_there("a", slot="08.0"), "its destination has shm0 at pci.0"),
        ("plain", lambda c: c.change_there("a", backend="m9"), "called m0, at the destination m9"),
        ("plain", lambda c: c.change_there("a", where=""), "has no path"),
        ("plain", lambda c: c.change_there("a", kind="doorbell", where="/s"), "make them the same"),
        ("plain", lambda c: c.change("o0", pluggable=False), "bus pci.0 cannot do that"),
        (
            "plain",
            lambda c: c.change("o0", properties={"discard-data": True}),
            "discard-data=on",
        ),
    ],
)
def test_refused(kind: Kind, spoil: Any, reason: str) -> None:
    case = Case(kind)
    spoil(case)
    reasons = case.reasons()
    assert [line for line in reasons if re.search(reason, line)], reasons
    assert not [line for line in reasons if "\n" in line or ": " not in line]


@pytest.mark.parametrize(
    ("place", "name", "fields", "reason"),
    [
        ("destination", "o0", {"status": "running"}, "not waiting .*running.*-incoming defer"),
        ("destination", "o0", {"listens": "tcp:::4444"}, "waits at tcp:::4444 already"),
        ("destination", "o0", {"buses": frozenset()}, "no bus pci.0"),
        ("destination", "o0", {"taken": frozenset(["m0"])}, "already has an object m0"),
        ("source", "o0", {"status": "paused"}, "its guest is paused"),
        ("source", "a", {"status": "inmigrate"}, "state inmigrate"),
        ("source", "a", {"status": "postmigrate"}, "has been migrated already"),
        ("source", "a", {"migration": "active"}, "is under way"),
        ("source", "a", {"blockers": ("VirtFS",)}, "VirtFS"),
        ("source", "o0", {"devices": ()}, "no ivshmem device"),
        (
            "source",
            "a",
            {"capabilities": frozenset(["x-colo"])},
            "source has the capability x-colo",
        ),
        ("destination", "a", {"capabilities": frozenset(["x-ignore-shared"])}, "x-ignore-shared"),
    ],
)
def test_a_qemu_is_refused(place: Place, name: str, fields: Mapping[str, Any], reason: str) -> None:
    case = Case()
    qemus = case.source if place == "source" else case.destination
    qemus[name] = replace(qemus[name], **fields)
    assert [line for line in case.reasons() if re.search(reason, line)]


def test_postcopy_needs_the_same_pages() -> None:
    case = Case(options=Options(postcopy=True))
    case.change_there("a", page_size=2 << 20)
    assert ["--postcopy" in line for line in case.reasons()] == [True]
    case.options = Options()
    case.plan()


def test_a_file_has_no_way_back() -> None:
    case = Case(others=0, options=Options(postcopy=True, multifd=True))
    case.vms[0] = replace(case.vms[0], uri="file:/f")
    assert len(case.reasons()) == 2
    case.options = Options()
    case.plan()


@pytest.mark.parametrize("spoil", [spoil_told, lambda c: c.servers["source"].clear()])
def test_force_takes_the_risk(spoil: Any) -> None:
    case = Case("doorbell", options=Options(force=True))
    spoil(case)
    case.plan()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"uri": "exec:cat"}, "not a migration URI"),
        ({"uri": "file:here"}, "not a migration URI"),
        ({"uri": "tcp:somewhere"}, "not a migration URI"),
        ({"uri": "unix:/a.uri"}, "the URI unix:/a.uri is given 2 times"),
        ({"name": "a"}, "the name a is given 2 times"),
        ({"source": "/a"}, "the monitor /a is given 2 times"),
        ({"destination": "/o0"}, "the monitor /o0 is given 2 times"),
    ],
)
def test_vms_are_refused(change: Mapping[str, str], reason: str) -> None:
    case = Case()
    case.vms[1] = replace(case.vms[1], **change)
    assert any(reason in line for line in case.reasons())


def test_no_vm() -> None:
    with pytest.raises(MigrationRefused, match="no VM"):
        make_plan([], Found({}, {}))


def test_all_reasons_are_told() -> None:
    case = Case()
    case.change("o0", pluggable=False)
    case.source["a"] = replace(case.source["a"], status="postmigrate")
    assert len(case.reasons()) == 2
    with pytest.raises(MigrationRefused, match="1 more"):
        case.plan()


def test_postcopy_needs_memory_that_can_be_waited_for() -> None:
    case = Case(options=Options(postcopy=True, force=True))
    case.change_there("a", file_system="ext4")
    (reason,) = case.reasons()
    assert "on ext4, and with --postcopy its guest would be lost" in reason
    case.change_there("a", file_system="")
    (note,) = (note for note in case.plan().notes if "file system" in note)
    assert "cannot be seen" in note
    case.change_there("a", file_system="hugetlbfs")
    assert not any("file system" in note for note in case.plan().notes)


def test_who_forgets_is_noted_and_does_not_go_on_there_early() -> None:
    case = Case()
    case.source["a"] = replace(case.source["a"], forgetful=True)
    assert [note.startswith("a: its QEMU runs it without KVM") for note in case.plan().notes] == [
        *(True, False),
    ]
    case.options = Options(postcopy=True)
    (reason,) = case.reasons()
    assert reason.startswith("a: its QEMU runs it without KVM")
    case.options = Options(postcopy=True, force=True)
    assert case.plan()


def test_a_paused_guest_has_nothing_to_be_forgotten() -> None:
    case = Case(others=0, options=Options(postcopy=True))
    case.source["a"] = replace(case.source["a"], forgetful=True, status="paused")
    assert not case.plan().notes


def test_who_stays_behind_is_noted() -> None:
    case = Case("doorbell")
    here = case.servers["source"]["/here"]
    stranger = replace(here, peers=(*here.peers, FoundPeer(7, 99, "python3", 0)))
    case.servers["source"]["/here"] = stranger
    (note,) = case.plan().notes
    assert "peer 7 (python3, pid 99)" in note


def test_who_stays_behind_is_evicted() -> None:
    """But for QEMUs, which would not come back."""
    case = Case("doorbell", options=Options(evict=True))
    here = case.servers["source"]["/here"]
    strangers = (FoundPeer(7, 99, "python3", 0), FoundPeer(8, 98, "web1", 0, is_qemu=True))
    case.servers["source"]["/here"] = replace(here, peers=(*here.peers, *strangers))
    plan = case.plan()
    assert [kind for kind, _ in kinds(plan)] == [
        *("hold", "unplug", "evict", "migrate", "migrate", "plug", "release"),
    ]
    assert plan.steps[2].peer == strangers[0]
    (note,) = plan.notes
    assert "peer 8" in note
    assert Plan._from_json(json.loads(json.dumps(plan._to_json()))) == plan


def test_a_plain_device_shares_a_servers_memory() -> None:
    """The server says which file that is, on each side."""
    case = Case("doorbell", others=2)
    case.source["o1"] = replace(case.source["o1"], devices=(replace(device(), where="/m"),))
    assert any("has no path by which a plain" in line for line in case.reasons())
    there = server("destination", FoundPeer(0, 20, "qemu", 0), memory="/dev/shm/m")
    case.servers["destination"]["/there"] = there
    where = {step.vm: step.where for step in case.plan().steps if step.kind == "plug"}
    assert where == {"o0": "/there", "o1": "/dev/shm/m"}


@given(st.data())
def test_the_order(data: st.DataObject) -> None:
    """Whatever VMs share whatever memories: unplugged before any migrates, plugged after all."""
    names = [f"v{number}" for number in range(data.draw(st.integers(1, 4)))]
    memories = [f"m{number}" for number in range(data.draw(st.integers(1, 3)))]
    case = Case(others=0)
    case.vms = [Vm(name, f"/{name}", f"/{name}2", f"unix:/{name}.u") for name in names]
    held: dict[str, list[VmDevice]] = {name: [] for name in names}
    there: dict[str, list[VmDevice]] = {name: [] for name in names}
    for number, memory in enumerate(memories):
        sharers = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
        place: dict[str, Any] = {
            "slot": f"{number:02}.0",
            "backend": memory,
            "memory": memory,
            "where": memory,
        }
        for name in sharers:
            one = replace(device(master=name == sharers[0]), **place)
            held[name].append(one)
            if one.master:
                there[name].append(one)
    for name in names:
        if not held[name]:
            extra = replace(device(master=True), slot="09.0", memory=name, backend=name)
            held[name].append(extra)
            there[name].append(extra)
    case.source = {n: Qemu(i, "running", devices=tuple(held[n])) for i, n in enumerate(names)}
    case.destination = {
        n: Qemu(50 + i, "inmigrate", devices=tuple(there[n]), buses=frozenset([BUS]))
        for i, n in enumerate(names)
    }
    plan = case.plan()
    order = [kind for kind, _ in kinds(plan)]
    assert order == sorted(order, key=["unplug", "migrate", "plug"].index)
    assert sorted(vm for kind, vm in kinds(plan) if kind == "migrate") == sorted(names)
    moved = [vm for kind, vm in kinds(plan) if kind == "migrate"]
    carriers = [name for name in names if there[name]]
    assert set(moved[: len(carriers)]) == set(carriers)
    others = sorted((n, d.backend) for n in names for d in held[n] if not d.master)
    for kind in ("unplug", "plug"):
        found = [(s.vm, s.device.backend) for s in plan.steps if s.kind == kind and s.device]
        assert sorted(found) == others
