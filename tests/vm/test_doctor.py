"""`ivshmem doctor` in real guests: each trouble is made, found, and fixed by what is printed."""

import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ivshmem
from ivshmem.doctor.check import Check
from ivshmem.qemu import cmdline

from .harness import Guest, MakeGuest
from .resident import Run
from .residents import Manual, Pair

VECTORS = 3
DOCTOR = f"{sys.executable} -m ivshmem doctor"
SELF = f"{VECTORS} of {VECTORS} vectors"
REGION_SIZE = 1 << 20

NAMES = [
    "device",
    "permission",
    "memory decoding",
    "lockdown",
    "driver",
    "IOMMU",
    "IOMMU group",
    "vfio",
    "interrupt remapping",
    "free",
    "opening",
    "bus master",
    "self-interrupt",
]

# Does what the test asks for, line by line, and answers each with a line of JSON.
PROGRAM = """
    import contextlib, io, json, os, subprocess, sys
    from unittest import mock
    import ivshmem.guest
    from ivshmem.cli.main import main

    def doctor(*arguments):
        with contextlib.redirect_stdout(io.StringIO()) as output:
            status = main(["doctor", "--json", *arguments])
        return status, json.loads(output.getvalue())

    def powerless(*arguments):
        "The doctor, while bus mastering cannot be switched on."
        from ivshmem.guest.device import VfioDevice
        switch_on = VfioDevice._set_command
        ignore = lambda self, bits: None if bits == 4 else switch_on(self, bits)
        with mock.patch.object(VfioDevice, "_set_command", ignore):
            return doctor(*arguments)

    def path(value):
        os.environ["PATH"] = value

    def addresses():
        return [device.address for device in ivshmem.guest.devices()]

    def access(address):
        with ivshmem.guest.open(address) as device:
            return device.access

    def sh(command):
        done = subprocess.run(command, shell=True, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    def start(*command):
        child = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True)
        children[child.pid] = child
        return child.pid, child.stdout.readline()

    def stop(pid):
        children[pid].terminate()
        return children[pid].wait()

    children = {}
    print("READY", flush=True)
    for line in iter(input, "end"):
        what, *arguments = json.loads(line)
        print(json.dumps(globals()[what](*arguments)), flush=True)
    """


class Patient:
    """A guest that the doctor is called to, and one device of it, by number."""

    def __init__(self, guest: Guest | Run, number: int = 0) -> None:
        self.guest = guest
        if number == 0:
            guest.expect("READY")
        self.address = (self.call("addresses")[number:] or [""])[0]
        self.path = f"/sys/bus/pci/devices/{self.address}"

    def end(self) -> None:
        self.guest.send("end")
        assert self.guest.wait() == 0

    def call(self, what: str, *arguments: object) -> Any:
        self.guest.send(json.dumps([what, *arguments]))
        return json.loads(self.guest.readline(60))

    def sh(self, command: str) -> str:
        status, output = self.call("sh", command)
        assert status == 0, output
        return str(output)

    def doctor(self, *, status: int = 0, what: str = "doctor") -> dict[str, Check]:
        """The checks by name."""
        got, answer = self.call(what, self.address)
        checks = checks_of(answer)
        failed = [check for check in checks.values() if check.state == "failed"]
        assert got == status, failed
        assert answer["side"] == "guest"
        assert answer["well"] == (got == 0) == (not failed)
        return checks

    def failure(self, *, what: str = "doctor") -> Check:
        """What fails, alone, and keeps the device from being opened, or from interrupts."""
        checks = self.doctor(what=what, status=1)
        (failure,) = [check for check in checks.values() if check.state == "failed"]
        last = checks["self-interrupt"]
        if failure != last:
            assert last.state == "skipped"
            assert last.found == f"needs a check that failed: {failure.name}"
        return failure

    def fix(self, name: str) -> str:
        """One thing fails; the printed command, run, makes all well. Returns what was found."""
        failure = self.failure()
        assert failure.name == name, failure
        self.sh(failure.fix)
        checks = self.doctor()
        if checks["device"].found.startswith("doorbell"):
            assert checks["self-interrupt"].found == SELF
        else:
            assert checks["opening"].state == "ok"
        return failure.found

    def bind(self, driver: str) -> None:
        """Give the device to a driver."""
        self.sh(
            f"echo {driver} > {self.path}/driver_override;"
            f" echo {self.address} > /sys/bus/pci/drivers_probe; readlink {self.path}/driver"
        )

    def state(self) -> str:
        """All that opening could change for longer."""
        return self.sh(
            f"cd {self.path}; od -A n -v -t x1 config; cat enable driver_override;"
            " readlink driver; cat /proc/modules; true"
        )


def checks_of(answer: dict[str, Any]) -> dict[str, Check]:
    checks = [Check(**check) for check in answer["checks"]]
    return {check.name: check for check in checks}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ivshmem.Server]:
    with ivshmem.Server(tmp_path / "socket", REGION_SIZE, vectors=VECTORS).start() as server:
        yield server


@pytest.fixture
def doorbell(server: ivshmem.Server) -> list[str]:
    return cmdline.doorbell(server.path, server.vectors)


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[list[str]]:
    path = tmp_path / "memory"
    with ivshmem.Region.create(REGION_SIZE, path=path):
        yield cmdline.plain(str(path), REGION_SIZE)


class TestWell:
    @pytest.mark.nightly
    def test_exit_status_output_and_nothing_changed(
        self, guest: MakeGuest, doorbell: list[str]
    ) -> None:
        a = Patient(guest(PROGRAM, args=doorbell, iommu=True))
        before = a.state()
        checks = a.doctor()
        assert a.state() == before
        assert list(checks) == NAMES
        assert {check.state for check in checks.values()} == {"ok"}
        assert checks["device"].found == f"doorbell, {VECTORS} vectors, 1M"
        assert checks["opening"].found == "opened with vfio, id 0, 1M"
        assert checks["self-interrupt"].found == SELF
        # It looks like a guest by itself, and a device may be named in short.
        for arguments in ([], ["--guest"], [a.address.removeprefix("0000:")]):
            status, answer = a.call("doctor", *arguments)
            assert (status, checks_of(answer)) == (0, checks)
        lines = a.sh(DOCTOR).splitlines()
        assert lines[0] == f"guest {a.address}"
        assert lines[-1].startswith("all is well")
        assert lines[1] == f"  ok    device               doorbell, {VECTORS} vectors, 1M"
        assert [line[8:].split("  ")[0] for line in lines[1:-1]] == NAMES

    def test_nothing_fails(self, pair: Pair, pair_host: ivshmem.Client) -> None:
        a = Patient(pair.b.run(PROGRAM))
        before = a.state()
        checks = a.doctor()
        assert a.state() == before
        assert list(checks) == NAMES
        assert {check.state for check in checks.values()} == {"ok"}
        assert checks["opening"].found == "opened with vfio, id 2, 1M"
        assert checks["self-interrupt"].found == "4 of 4 vectors"
        a.end()

    @pytest.mark.nightly
    def test_each_device_and_a_plain_one_needs_no_iommu(self, manual: Manual) -> None:
        run = manual.guest.run(PROGRAM)
        a, b = Patient(run), Patient(run, 1)
        status, answer = a.call("doctor")
        assert status == 1  # because of the doorbell device
        assert {c["subject"] for c in answer["checks"]} == {a.address, b.address}
        assert {c["subject"] for c in answer["checks"] if c["state"] == "failed"} == {b.address}
        before = a.state()
        checks = a.doctor()
        assert a.state() == before
        assert checks["device"].found == "plain, 1M"
        assert checks["opening"].found == "opened with sysfs, id 0, 1M"
        skipped = [check for check in checks.values() if check.state == "skipped"]
        assert {check.found for check in skipped} == {
            "not needed: a plain device has no interrupts"
        }
        assert [check.name for check in skipped] == [*NAMES[5:10], *NAMES[11:]]
        b.end()


class TestFixed:
    """By commands in the guest."""

    @pytest.mark.nightly
    def test_decoding_and_bus_master(self, guest: MakeGuest, doorbell: list[str]) -> None:
        a = Patient(guest(PROGRAM, args=doorbell, iommu=True))
        clear = f"printf '\\001' | dd of={a.path}/config bs=1 seek=4 conv=notrunc status=none"
        a.sh(clear)
        before = a.state()
        assert a.failure().fix == f"echo 1 > {a.path}/enable"
        assert a.state() == before
        assert "not enabled yet" in a.fix("memory decoding")
        # It is enabled now, so the kernel does nothing more when it is enabled once again.
        a.sh(clear)
        a.sh(f"echo 1 > {a.path}/enable")
        assert "a program has cleared the bit" in a.fix("memory decoding")
        failure = a.failure(what="powerless")
        assert failure.name == "bus master"
        assert failure.fix == f"setpci -s {a.address} COMMAND=4:4"

    @pytest.mark.nightly
    def test_driver(self, guest: MakeGuest, doorbell: list[str], plain: list[str]) -> None:
        vm = guest(PROGRAM, args=[*plain, *doorbell], iommu=True, modules=["drivers"])
        a, b = Patient(vm), Patient(vm, 1)
        for patient in (a, b):
            for driver in ("pci-stub", "uio_pci_generic"):
                patient.bind(driver)
                before = patient.state()
                if patient is a:  # the plain one, which open() does not take from a driver
                    failure = patient.failure()
                    assert (failure.name, failure.found) == ("driver", f"{driver} has the device")
                    assert patient.state() == before
                    patient.fix("driver")
                else:  # as open() does, which takes it, and gives it back
                    check = patient.doctor()["driver"]
                    assert check.state == "warning"
                    assert check.found.startswith(f"{driver} has the device; it is given back")
                    assert patient.state() == before
                    assert patient.call("access", patient.address) == "vfio"
                    assert patient.state() == before
                    patient.sh(f"echo {patient.address} > {patient.path}/driver/unbind")
            # This one is not in the way.
            patient.bind("vfio-pci")
            before = patient.state()
            checks = patient.doctor()
            assert checks["driver"].found == "vfio-pci"
            assert checks["opening"].found == "opened with vfio, id 0, 1M"
            assert patient.state() == before

    @pytest.mark.nightly
    def test_held_by_another_process(self, guest: MakeGuest, doorbell: list[str]) -> None:
        a = Patient(guest(PROGRAM, args=doorbell, iommu=True))
        # `guest serve` holds it, too, but for others.
        pid, said = a.call("start", "-m", "ivshmem", "guest", "serve")
        assert said.startswith(f"sharing {a.address}, ")
        checks = a.doctor()
        assert checks["free"].state == "warning"
        assert checks["free"].found.startswith(f"pid {pid} ")
        assert {checks[name].state for name in NAMES[10:]} == {"skipped"}
        a.call("stop", pid)
        code = (
            "import time, ivshmem.guest as g; d = g.open(); print(d.id, flush=True); time.sleep(99)"
        )
        pid, said = a.call("start", "-c", code)
        assert said == "0\n"
        failure = a.failure()
        assert (failure.name, failure.fix) == ("free", f"kill {pid}")
        assert failure.found.startswith(f"pid {pid} ({sys.executable} -c 'import time, ")
        a.sh(failure.fix)
        a.call("stop", pid)
        assert a.doctor()["self-interrupt"].found == SELF

    @pytest.mark.nightly
    def test_permission_and_modules(self, guest: MakeGuest, doorbell: list[str]) -> None:
        a = Patient(guest(PROGRAM, args=doorbell, iommu=True))
        user = f"setpriv --reuid 1000 --regid 1000 --clear-groups {DOCTOR}"
        status, output = a.call("sh", f"{user} --json")
        check = checks_of(json.loads(output))["permission"]
        assert (status, check.state) == (1, "failed")
        assert check.found == f"user 1000 may not write {a.path}/driver_override"
        # What is to be run as root is the doctor himself.
        *su, command = shlex.split(check.fix)
        assert su == ["su", "-c"]
        assert a.sh(command).splitlines()[-1].startswith("all is well")
        # A user who was given the device.
        a.bind("vfio-pci")
        a.sh("chmod 666 /dev/vfio/[0-9]*")
        lines = a.sh(user).splitlines()
        assert lines[-1].startswith("all is well")
        assert "user 1000, with access to /dev/vfio/" in lines[2]
        # Not even root, for instance in a container.
        a.sh(f"echo {a.address} > {a.path}/driver/unbind; mount -o remount,ro /sys")
        assert "root may not write" in a.fix("permission")
        self.without_modules(a)

    def without_modules(self, a: Patient) -> None:
        """modprobe does not find the modules that this guest was booted with; ours does."""
        install = f"apt-get install linux-image-{a.sh('uname -r').strip()}"
        modprobe = "#!/bin/sh\nexit 0"
        a.sh(f"mkdir /tmp/bin; echo '{modprobe}' >/tmp/bin/modprobe; chmod +x /tmp/bin/modprobe")
        found = []
        for module in ("vfio_iommu_type1", "vfio_pci"):
            a.sh(f"busybox rmmod {module}")  # kmod is not among what the tests need
            failure = a.failure()
            assert (failure.name, failure.fix) == ("vfio", install)
            assert failure.found.startswith("this kernel has no vfio")
            a.call("path", "/tmp/bin:/bin:/usr/bin")
            found.append(a.doctor(status=1))
            a.call("path", "/bin:/usr/bin")
        assert found[0]["vfio"].found == "vfio_iommu_type1 is not loaded"
        assert found[0]["vfio"].fix == "modprobe vfio_iommu_type1"
        assert found[1]["vfio"].found == "not loaded yet; opening the device loads it"
        assert found[1]["opening"].state == "failed"  # this modprobe loads nothing

    @pytest.mark.nightly
    def test_group(self, guest: MakeGuest, doorbell: list[str]) -> None:
        bridge = ["-device", "pcie-pci-bridge,id=bridge"]
        mates = ["-device", "virtio-rng-pci,bus=bridge", "-device", "virtio-rng-pci,bus=bridge"]
        doorbell[-1] += ",bus=bridge"
        a = Patient(guest(PROGRAM, args=[*bridge, *doorbell, *mates], iommu=True))
        found = a.fix("IOMMU group")
        assert found.startswith("a program cannot use the group while virtio-pci has 0000:")
        assert found.count("virtio-pci has") == 2


class TestHost:
    """What needs more power than tests have outside."""

    @pytest.mark.nightly
    def test_hard_limits(self, guest: MakeGuest) -> None:
        a = Patient(guest(PROGRAM))
        a.sh(f"{sys.executable} -m ivshmem serve --daemon --size 1M --vectors 64")
        command = f"{DOCTOR} --host --json --qemu true --lock"
        powerless = "setpriv --bounding-set -ipc_lock --inh-caps -ipc_lock sh -c"
        for limit, name in (("ulimit -n 150", "open files"), ("ulimit -l 64", "locked memory")):
            _, output = a.call("sh", f"{powerless} {shlex.quote(f'{limit}; {command}')}")
            check = checks_of(json.loads(output))[name]
            assert check.state == "failed"
            assert check.fix.startswith("prlimit --")
            fixed = shlex.quote(f"{limit}; {check.fix}; {command}")
            _, output = a.call("sh", f"{powerless} {fixed}")
            assert checks_of(json.loads(output))[name].state == "ok"


class TestFixedByQemu:
    """By options that QEMU gets instead, or the guest's kernel."""

    @pytest.mark.nightly
    def test_no_device(self, guest: MakeGuest, server: ivshmem.Server) -> None:
        a = Patient(guest(PROGRAM))
        status, answer = a.call("doctor", "--guest")
        (check,) = checks_of(answer).values()
        assert (status, check.subject, check.name) == (1, "guest", "device")
        assert check.found.startswith("no ivshmem device in this machine")
        # With nothing to be a host with, it looks like a guest by itself, too.
        a.call("path", "/none")
        status, answer = a.call("doctor")
        assert (status, answer["side"]) == (1, "guest")
        args = shlex.split(check.fix.replace("/run/ivshmem.sock", server.path))
        b = Patient(guest(PROGRAM, args=args, iommu=True))
        assert b.doctor()["self-interrupt"].found == "1 of 1 vector"
        status, answer = b.call("doctor", "0000:00:1e.7")
        (check,) = checks_of(answer).values()
        assert check.found == f"no ivshmem device at 0000:00:1e.7; this machine has {b.address}"
        assert b.sh(check.fix).splitlines()[-1].startswith("all is well")

    @pytest.mark.nightly
    def test_no_iommu_and_one_too_weak(self, guest: MakeGuest, doorbell: list[str]) -> None:
        weak = ["-machine", "q35,kernel-irqchip=off", "-device", "intel-iommu,intremap=off"]
        on = ["intel_iommu=on"]
        vms = [  # they boot at the same time
            guest(PROGRAM, args=doorbell),
            guest(PROGRAM, args=[*doorbell, *weak], modules=["vfio"], kernel_args=on),
        ]
        a, b = map(Patient, vms)
        checks = a.doctor(status=1)
        failed = [check.name for check in checks.values() if check.state == "failed"]
        assert failed == ["IOMMU", "vfio"]  # nor did this guest load the modules
        assert checks["IOMMU group"].found == "needs a check that failed: IOMMU"
        options = shlex.split(checks["IOMMU"].fix)

        failure = b.failure()
        assert failure.name == "interrupt remapping"
        assert failure.found == "off, and vfio needs it"
        assert shlex.split(failure.fix) == options
        b.sh("echo Y > /sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts")
        assert b.doctor()["self-interrupt"].found == SELF

        c = Patient(guest(PROGRAM, args=[*doorbell, *options], modules=["vfio"], kernel_args=on))
        assert c.doctor()["self-interrupt"].found == SELF

    @pytest.mark.nightly
    @pytest.mark.parametrize(
        ("parameter", "name"), [("intel_iommu", "IOMMU"), ("intremap", "interrupt remapping")]
    )
    def test_what_the_kernel_does_not_use(
        self, guest: MakeGuest, doorbell: list[str], parameter: str, name: str
    ) -> None:
        off = [f"{parameter}=off"]
        a = Patient(guest(PROGRAM, args=doorbell, iommu=True, kernel_args=off))
        failure = a.failure()
        assert failure.name == name
        assert failure.found.startswith("the kernel does not use it")
        option, line = shlex.split(failure.fix)
        assert option == "-append"
        now = a.sh("cat /proc/cmdline").split()
        assert line.split() == [
            *(word for word in now if not word.startswith(f"{parameter}=")),
            f"{parameter}=on",
        ]

    @pytest.mark.nightly
    def test_lockdown(self, guest: MakeGuest, doorbell: list[str], plain: list[str]) -> None:
        kernel_args = ["lockdown=integrity"]
        vm = guest(PROGRAM, args=[*plain, *doorbell], iommu=True, kernel_args=kernel_args)
        other = guest(PROGRAM, args=plain, modules=["vfio"], kernel_args=kernel_args)
        a, b, c = Patient(vm), Patient(vm, 1), Patient(other)
        for mode in ("unknown", "integrity"):
            closed = f"{mode}: sysfs cannot map the device"
            # Even a plain device goes by vfio then, and needs what that needs.
            checks = a.doctor()
            assert checks["lockdown"].found == f"{closed}, but vfio can"
            assert checks["opening"].found == "opened with vfio, id 0, 1M"
            assert a.call("access", a.address) == "vfio"
            checks = b.doctor()
            assert checks["lockdown"].found == f"{closed}, but vfio can"
            assert checks["self-interrupt"].found == SELF
            checks = c.doctor(status=1)
            failed = [check for check in checks.values() if check.state == "failed"]
            assert [check.name for check in failed] == ["lockdown", "IOMMU"]
            assert failed[0].found == f"{closed}, and vfio needs an IOMMU"
            assert failed[0].fix == failed[1].fix
            if mode == "unknown":
                for patient in (a, c):
                    patient.sh("mount -t securityfs none /sys/kernel/security")

    @pytest.mark.nightly
    def test_a_server_with_fewer_vectors(
        self, guest: MakeGuest, server: ivshmem.Server, tmp_path: Path
    ) -> None:
        with ivshmem.Server(tmp_path / "other", REGION_SIZE, vectors=0).start() as other:
            few = cmdline.doorbell(server.path, 5)
            none = cmdline.doorbell(other.path, 2, ident="other")
            vm = guest(PROGRAM, args=[*few, *none], iommu=True)
            failure = Patient(vm).failure()
            assert failure.name == "self-interrupt"
            assert failure.found == "3 of 5 vectors: nothing on 3, 4; the server has 3"
            assert failure.fix == f"vectors={VECTORS} in QEMU's option -device ivshmem-doorbell"
            failure = Patient(vm, 1).failure()
            assert failure.found.startswith("0 of 2 vectors: nothing on 0, 1; ")
            assert failure.fix == "ivshmem serve --vectors 2"
