"""Real guests use their devices by the library: by vfio and by sysfs, one and several of them.

What can go wrong there is in test_guest_trouble.py, unplugging in test_guest_unplug.py.
"""

import struct
from pathlib import Path

import pytest

import ivshmem
from ivshmem.qemu import cmdline

from .harness import Guest, MakeGuest
from .host import TIMEOUT, doorbell
from .residents import Manual, Pair


def plain(path: Path, ident: str = "hostmem") -> list[str]:
    return cmdline.plain(str(path), path.stat().st_size, ident=ident)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Memory for a plain device."""
    path = tmp_path / "memory"
    with path.open("wb") as file:
        file.truncate(1 << 20)
    return path


# -- by vfio --------------------------------------------------------------------------------------


class TestVfio:
    @pytest.mark.nightly
    def test_memory_and_every_vector_both_ways(
        self, guest: MakeGuest, server: ivshmem.Server, host: ivshmem.Client
    ) -> None:
        """Whatever way the guest waits: each ring arrives, at its vector and no other."""
        a = guest(
            """
            import asyncio, os, select
            from checks import PATIENCE, command
            from ivshmem import Interrupt, guest

            (found,) = guest.devices()
            assert (found.size, found.variant, found.vectors, found.driver) == (
                1 << 20, "doorbell", 4, ""
            ), found
            assert found.iommu_group is not None
            assert found.path.is_dir(), found

            async def by_asyncio(device, vector):
                ready = asyncio.Event()
                asyncio.get_running_loop().add_reader(device.fileno(), ready.set)
                print("LISTENS", flush=True)
                await asyncio.wait_for(ready.wait(), PATIENCE)
                return list(device.events(timeout=0))

            def by_select(device, vector):
                assert select.select([device], [], [], 0) == ([], [], [])
                print("LISTENS", flush=True)
                assert select.select([device], [], [], PATIENCE)[0] == [device]
                events = list(device.events(timeout=0))
                assert select.select([device], [], [], 0) == ([], [], [])
                return events

            def waiting(wait):
                def listens(device, vector):
                    print("LISTENS", flush=True)
                    return wait(device, vector)
                return listens

            WAYS = {
                "one vector": waiting(lambda d, v: [Interrupt(v, d.wait(v, PATIENCE))]),
                "any vector": waiting(lambda d, v: [d.wait(timeout=PATIENCE)]),
                "events": waiting(lambda d, v: [next(d.events(PATIENCE))]),
                "select": by_select,
                "asyncio": lambda d, v: asyncio.run(by_asyncio(d, v)),
            }
            with guest.open() as device, memoryview(device.region) as memory:
                assert (device.access, device.memory) == ("vfio", "vfio"), device
                assert (device.id, device.vectors, len(memory)) == (1, 4, 1 << 20), device
                assert device.device == found
                assert guest.devices()[0].driver == "vfio-pci"
                assert command(found.address) & 6 == 6, "memory decoding and bus mastering"
                assert bytes(memory[:5]) == b"host!"
                memory[-6:] = b"guest!"
                for name, way in WAYS.items():
                    for vector in range(4):
                        assert way(device, vector) == [Interrupt(vector, 1)], (name, vector)
                        assert device.wait(timeout=0) is None
                        assert not any(device.wait(other, 0) for other in range(4))
                        device.ring(0, vector)
                device.ring(device.id, 3)
                assert device.wait(3, PATIENCE) == 1, "ringing oneself"
                assert device.wait(3, 0.001) is None, "time is over"
            assert guest.devices() == [found]
            """,
            args=doorbell(server),
            iommu=True,
        )
        with memoryview(host.region) as memory:
            memory[:5] = b"host!"
            for number in range(5 * 4):
                a.expect("LISTENS")
                host.ring(1, number % 4)
                assert host.wait(timeout=TIMEOUT) == (number % 4, 1), a.report()
            assert host.wait(timeout=0) is None
            assert bytes(memory[-6:]) == b"guest!"
        assert a.wait() == 0

    @pytest.mark.nightly
    def test_the_device_is_given_back_as_it_was(
        self, guest: MakeGuest, server: ivshmem.Server
    ) -> None:
        """Whoever had it before; time after time; and nothing of it stays open."""
        a = guest(
            """
            import os
            import ivshmem
            from checks import PATIENCE, PCI, command, driver, set_command
            from ivshmem import guest

            (found,) = guest.devices()
            address = found.address
            override = PCI / "devices" / address / "driver_override"

            def use(**way):
                fds = len(os.listdir("/proc/self/fd"))
                with guest.open(**way) as device:
                    assert device.access == "vfio", device
                    assert command(address) & 6 == 6
                    device.ring(device.id, 2)
                    assert device.wait(2, PATIENCE) == 1, way
                    with memoryview(device.region) as memory:
                        memory[1000] = count = (memory[1000] + 1) % 256
                assert len(os.listdir("/proc/self/fd")) == fds
                assert address not in open("/proc/self/maps").read()
                return count

            for number in range(20):
                assert use() == number + 1
                assert driver(address) == "", number
                assert override.read_text() == "(null)\\n"
            # Each way to map the memory shows the same bytes.
            for number, memory in enumerate(("resource2", "resource2_wc", "vfio")):
                assert use(memory=memory) == 21 + number
                assert driver(address) == ""

            # And saves and loads them, by the file or by the mapping.
            for memory in ("resource2", "resource2_wc", "vfio"):
                with guest.open(memory=memory) as device:
                    ivshmem.save(device.region, "/tmp/saved")
                    device.region.write(0, b"spoiled" * 1000)
                    ivshmem.load(device.region, "/tmp/saved")
                    assert device.region.read(0, 7000) == bytes(1000) + bytes([23]) + bytes(5999)

            # The one it needs itself.
            override.write_text("vfio-pci")
            (PCI / "drivers_probe").write_text(address)
            use()
            assert (driver(address), override.read_text()) == ("vfio-pci", "vfio-pci\\n")
            (PCI / "devices" / address / "driver" / "unbind").write_text(address)

            # One that was told to take it.
            override.write_text("pci-stub")
            (PCI / "drivers_probe").write_text(address)
            assert driver(address) == "pci-stub"
            use()
            assert (driver(address), override.read_text()) == ("pci-stub", "pci-stub\\n")
            (PCI / "devices" / address / "driver" / "unbind").write_text(address)
            override.write_text("\\n")

            # One that takes all of this kind.
            (PCI / "drivers" / "uio_pci_generic" / "new_id").write_text("1af4 1110")
            assert driver(address) == "uio_pci_generic"
            use()
            assert (driver(address), override.read_text()) == ("uio_pci_generic", "(null)\\n")
            (PCI / "devices" / address / "driver" / "unbind").write_text(address)

            # Memory decoding was switched off, by a former user's hand.
            set_command(address, 0)
            use()
            """,
            args=doorbell(server),
            iommu=True,
            modules=["drivers"],
        )
        assert a.wait() == 0

    def test_ten_thousand_doorbells_each_way(self, pair: Pair, pair_host: ivshmem.Client) -> None:
        """In bursts: rings may become one, but the last of a burst is never lost."""
        total = 10_000
        host = pair_host
        a = pair.a.run(
            f"""
            import sys
            from checks import PATIENCE
            from ivshmem import guest

            TOTAL, HOST = {total}, int(sys.argv[1])
            with guest.open() as device, memoryview(device.region).cast("I") as words:
                assert (device.access, device.memory) == ("vfio", "vfio"), device
                print("READY", flush=True)
                seen = rings = 0
                while seen < TOTAL:
                    count = device.wait(0, PATIENCE)
                    assert count, f"hangs after {{words[0]}} were sent, {{seen}} seen"
                    rings += count
                    seen = words[0]
                    words[16] = seen
                    device.ring(HOST, 0)
                assert rings <= TOTAL, "more than were sent"

                # The other way round.
                sent = 0
                while sent < TOTAL:
                    for _ in range(min(1 + sent % 37, TOTAL - sent)):
                        sent += 1
                        words[32] = sent
                        device.ring(HOST, 1)
                    while words[48] != sent:
                        assert device.wait(1, PATIENCE), f"{{words[48]}} of {{sent}} were seen"
            """,
            host.id,
        )
        a.expect("READY")
        with memoryview(host.region).cast("I") as words:
            sent = 0
            while sent < total:
                for _ in range(min(1 + sent % 37, total - sent)):
                    sent += 1
                    words[0] = sent
                    host.ring(1, 0)
                while words[16] != sent:
                    assert host.wait(0, TIMEOUT), f"{words[16]} of {sent} seen\n{a.report()}"
            seen = rings = 0
            while seen < total:
                count = host.wait(1, TIMEOUT)
                assert count, f"hangs after {words[32]} were sent, {seen} seen\n{a.report()}"
                rings += count
                seen = words[32]
                words[48] = seen
                host.ring(1, 1)
            assert rings <= total
        assert a.wait() == 0

    @pytest.mark.nightly
    def test_a_register_bar_in_the_middle_of_a_page(
        self, guest: MakeGuest, server: ivshmem.Server, host: ivshmem.Client
    ) -> None:
        """Two functions plugged in together share a page; vfio does not map that for anybody."""
        a = guest(
            SHARED_PAGE.format(access="vfio"),
            args=["-device", "pcie-root-port,id=port0,chassis=1"],
            iommu=True,
        )
        a.expect("READY")
        # Function 0 comes last: it is what makes the guest look.
        plug(a, server, 0, bus="port0", addr="0.1")
        plug(a, server, 1, bus="port0", addr="0.0", multifunction=True)
        check_shared_page(a, host)


# -- by sysfs -------------------------------------------------------------------------------------


class TestSysfs:
    def test_without_an_iommu(self, manual: Manual, manual_host: ivshmem.Client) -> None:
        """Memory and doorbells; no interrupts, of which all that waits says why."""
        host = manual_host
        a = manual.guest.run(
            """
            import os, sys
            from checks import command, driver, refused, set_command
            from ivshmem import NoInterrupts, NoSuchPeer, NoSuchVector, guest

            host = int(sys.argv[1])
            fds = len(os.listdir("/proc/self/fd"))
            (found,) = [each for each in guest.devices() if each.variant == "doorbell"]
            def opened(**way):
                return guest.open(found.address, **way)
            assert (found.variant, found.vectors, found.driver) == ("doorbell", 4, ""), found
            assert found.iommu_group is None

            def check(device, *missing):
                assert (device.id, device.access, device.vectors) == (0, "sysfs", 0), device
                for wait in (
                    lambda: device.wait(0, 0),
                    lambda: device.wait(),
                    lambda: next(device.events()),
                    lambda: device.next_event(0),
                    device.fileno,
                ):
                    with refused(NoInterrupts, "no interrupts here: ", *missing):
                        wait()
                with refused(NoSuchVector, "vector 4: the device has 4 vectors"):
                    device.ring(0, 4)
                with refused(NoSuchPeer, "peer 65536: ids are 0 to 65535"):
                    device.ring(65536)
                device.ring(65535, 3)  # nobody is there

            before = command(found.address)
            with opened() as device, memoryview(device.region) as memory:
                assert device.memory == "resource2"
                check(device, "no IOMMU", "intel-iommu,intremap=on", "intel_iommu=on")
                assert bytes(memory[:5]) == b"host!"
                memory[-6:] = b"guest!"
                for vector in range(4):
                    device.ring(host, vector)
                print("RANG", flush=True)
                input()
                assert bytes(memory[:5]) == b"again"
            assert driver(found.address) == ""

            # Again; twice at once; memory decoding off; each way to map the memory.
            with opened() as device, opened(memory="resource2_wc") as other:
                check(other, "no IOMMU")
                with memoryview(device.region) as one, memoryview(other.region) as two:
                    one[7] = 123
                    assert two[7] == 123
                    assert bytes(two[-6:]) == b"guest!"
            set_command(found.address, 0)
            with opened(access="sysfs") as device:
                check(device, "this guest has no IOMMU", "intremap=on")
                with memoryview(device.region) as memory:
                    assert bytes(memory[-6:]) == b"guest!"

            # Somebody uses it without saying so, and switches decoding off: we switch it on.
            (found.path / "enable").write_text("1")
            set_command(found.address, 0)
            with opened() as device, memoryview(device.region) as memory:
                assert device.id == 0
                assert bytes(memory[-6:]) == b"guest!"

            for access, text in (
                ("vfio", "this kernel has no vfio-pci"),
                ("noiommu", "this kernel has no vfio-pci"),
                ("uio", "no UIO driver for ivshmem has the device"),
            ):
                with refused(OSError, text):
                    opened(access=access)
            with refused(ValueError, "sysfs cannot map the memory by 'vfio': resource2 and"):
                opened(access="sysfs", memory="vfio")
            assert found in guest.devices()
            assert len(os.listdir("/proc/self/fd")) == fds, os.listdir("/proc/self/fd")
            """,
            host.id,
        )
        with memoryview(host.region) as memory:
            memory[:5] = b"host!"
            a.expect("RANG")
            assert [host.wait(vector, TIMEOUT) for vector in range(4)] == [1] * 4
            assert bytes(memory[-6:]) == b"guest!"
            memory[:5] = b"again"
        a.send("")
        assert a.wait() == 0
        assert host.wait(timeout=0) is None

    @pytest.mark.nightly
    def test_beside_vfio_and_where_vfio_cannot_be_used(
        self, guest: MakeGuest, server: ivshmem.Server
    ) -> None:
        """An IOMMU that does not remap interrupts: sysfs, and the reason where it matters."""
        a = guest(
            """
            from checks import PCI, driver, refused
            from ivshmem import NoInterrupts, guest

            (found,) = guest.devices()
            assert found.iommu_group is not None
            with guest.open() as device, memoryview(device.region) as memory:
                assert device.access == "sysfs"
                assert guest.devices() == [found]
                for wait in (lambda: device.wait(0, 0), device.fileno):
                    with refused(NoInterrupts, "does not remap interrupts", "intremap=on"):
                        wait()
                device.ring(0)
            for _ in range(2):
                with refused(OSError, "does not remap interrupts", "/dev/vfio/"):
                    guest.open(access="vfio")
                assert driver(found.address) == ""
            with refused(OSError, "behind an IOMMU: open it by vfio"):
                guest.open(access="noiommu")

            # Where vfio-pci has it before, sysfs is no way out.
            (found.path / "driver_override").write_text("vfio-pci")
            (PCI / "drivers_probe").write_text(found.address)
            with refused(OSError, "does not remap interrupts"):
                guest.open()
            assert driver(found.address) == "vfio-pci"
            """,
            args=[
                *("-machine", "q35,kernel-irqchip=off", "-device", "intel-iommu,intremap=off"),
                *doorbell(server),
            ],
            kernel_args=["intel_iommu=on"],
            modules=["vfio"],
        )
        assert a.wait() == 0

    @pytest.mark.nightly
    def test_a_register_bar_in_the_middle_of_a_page(
        self, guest: MakeGuest, server: ivshmem.Server, host: ivshmem.Client
    ) -> None:
        a = guest(SHARED_PAGE.format(access="sysfs"))
        a.expect("READY")
        for number in range(2):
            plug(a, server, number, bus="pci.0")
        check_shared_page(a, host)


SHARED_PAGE = """
    from checks import PATIENCE, refused, until
    from ivshmem import NoSuchDevice, guest
    from ivshmem.guest import pci

    assert guest.devices() == []
    for address in (None, "0000:00:04.0"):
        with refused(NoSuchDevice, "no ivshmem device in this machine", "`ivshmem qemu`"):
            guest.open(address)
    print("READY", flush=True)
    input()
    until(lambda: len(guest.devices()) == 2, "two devices")
    starts = [pci.bar_start(device, pci.REGISTERS) for device in guest.devices()]
    assert starts[0] // 4096 == starts[1] // 4096, starts
    assert starts[0] % 4096 or starts[1] % 4096, starts
    found = [guest.open(device.address, access="{access}") for device in guest.devices()]
    for device in found:
        # Of each peer, the slot of its id says that it was here.
        with memoryview(device.region) as memory:
            memory[device.id] += 1
        device.ring(0, device.id)
        if device.vectors:
            device.ring(device.id, 2)
            assert device.wait(2, PATIENCE) == 1
    for device in found:
        device.close()
"""


def plug(guest: Guest, server: ivshmem.Server, number: int, **where: object) -> None:
    address = {"type": "unix", "data": {"path": server.path}}
    backend = {"type": "socket", "data": {"addr": address, "server": False}}
    guest.qmp("chardev-add", id=f"chardev{number}", backend=backend)
    guest.qmp(
        "device_add",
        driver="ivshmem-doorbell",
        chardev=f"chardev{number}",
        vectors=server.vectors,
        **where,
    )


def check_shared_page(guest: Guest, host: ivshmem.Client) -> None:
    """Both devices were found, each with its own id, and rang by its own register."""
    guest.send("plugged")
    assert guest.wait() == 0
    assert [host.wait(vector, 0) for vector in range(4)] == [None, 1, 1, None]
    with memoryview(host.region) as memory:
        assert bytes(memory[:4]) == bytes([0, 1, 1, 0])


# -- plain devices, and several -------------------------------------------------------------------


@pytest.mark.nightly
@pytest.mark.parametrize("iommu", [False, True], ids=["pc", "q35"])
def test_plain_device(guest: MakeGuest, file: Path, iommu: bool) -> None:
    """Memory, and of all else a clear word; by way of vfio, too."""
    a = guest(
        """
        import sys
        from checks import driver, refused, set_command
        from ivshmem import NoInterrupts, guest

        (found,) = guest.devices()
        assert (found.size, found.variant, found.vectors) == (1 << 20, "plain", 0), found

        def check(device):
            assert (device.id, device.vectors) == (0, 0)
            for call in (
                lambda: device.ring(0),
                lambda: device.ring(65536),
                lambda: device.wait(0, 0),
                lambda: device.wait(timeout=0),
                lambda: next(device.events(0)),
                device.fileno,
            ):
                with refused(NoInterrupts, "a plain device has no doorbells", "ivshmem-doorbell"):
                    call()
            with memoryview(device.region) as memory:
                assert bytes(memory[:5]) == b"host!"
                memory[5] += 1

        with guest.open() as device:
            assert device.access == "sysfs"
            assert driver(found.address) == ""
            check(device)
        if found.iommu_group is not None:
            with guest.open(access="vfio") as device:
                check(device)
                assert driver(found.address) == "vfio-pci"
            with guest.open(access="vfio", memory="resource2") as device:
                check(device)
            assert driver(found.address) == ""
            # Somebody gave it to vfio-pci for good: then that is the way.
            (found.path / "driver_override").write_text("vfio-pci")
            open("/sys/bus/pci/drivers_probe", "w").write(found.address)
            with guest.open() as device:
                assert device.access == "vfio"
                check(device)
            assert driver(found.address) == "vfio-pci"
            with refused(OSError, "the driver vfio-pci has the device: open it by vfio"):
                guest.open(access="sysfs")
        """,
        args=plain(file),
        iommu=iommu,
    )
    with file.open("r+b") as memory:
        memory.write(b"host!")
        memory.flush()
        assert a.wait() == 0
        assert memory.read(1) == bytes([4 if iommu else 1])


@pytest.mark.nightly
def test_several_devices(
    guest: MakeGuest, server: ivshmem.Server, host: ivshmem.Client, file: Path
) -> None:
    """Which one must be said; all can be open at once, without taking each other's interrupts."""
    a = guest(
        """
        from checks import PATIENCE, refused
        from ivshmem import NoSuchDevice, guest

        found = guest.devices()
        assert [d.variant for d in found] == ["doorbell", "doorbell", "plain"], found
        addresses = [d.address for d in found]
        assert addresses == sorted(addresses)
        with refused(NoSuchDevice, "several ivshmem devices", ", ".join(addresses)):
            guest.open()
        for wrong in ("0000:00:1f.0", "00:1f.0", "x", addresses[0][:-1]):
            with refused(NoSuchDevice, f"no ivshmem device at {wrong}; there is {addresses[0]}"):
                guest.open(wrong)
        short = addresses[1].removeprefix("0000:")
        with guest.open(addresses[0]) as one, guest.open(short) as two, \\
                guest.open(addresses[2]) as three:
            assert (one.device, two.device, three.device) == tuple(found)
            assert (one.access, two.access, three.access) == ("vfio", "vfio", "sysfs")
            assert sorted((one.id, two.id)) == [1, 2]
            assert three.region.size == 1 << 20
            one.ring(two.id, 1)
            assert two.wait(timeout=PATIENCE) == (1, 1)
            two.ring(one.id, 2)
            assert one.wait(timeout=PATIENCE) == (2, 1)
            assert (one.wait(timeout=0), two.wait(timeout=0)) == (None, None)
            one.ring(0, 0)
            two.ring(0, 3)
            with memoryview(one.region) as a, memoryview(two.region) as b:
                a[:3] = b"one"
                assert bytes(b[:3]) == b"one"
            with memoryview(three.region) as memory:
                assert bytes(memory[:3]) == bytes(3)
        assert guest.devices() == found
        """,
        args=[
            *cmdline.doorbell(server.path, 4, ident="first"),
            *cmdline.doorbell(server.path, 4, ident="second"),
            *plain(file),
        ],
        iommu=True,
    )
    assert a.wait() == 0
    assert [host.wait(vector, 0) for vector in range(4)] == [1, None, None, 1]


@pytest.mark.nightly
def test_two_guests_find_each_other_by_the_memory(guest: MakeGuest, server: ivshmem.Server) -> None:
    """No host process is a peer: they exchange a thousand doorbells among themselves."""
    program = """
        import sys
        from checks import PATIENCE, until
        from ivshmem import guest

        me, other = int(sys.argv[1]), 1 - int(sys.argv[1])
        ROUNDS = 500
        with guest.open() as device, memoryview(device.region).cast("I") as words:
            words[me] = 1 + device.id  # whoever finds it can ring: we listen
            until(lambda: words[other], "the other guest")
            peer = words[other] - 1
            assert peer != device.id
            for number in range(1, ROUNDS + 1):
                if me == 0:
                    words[2] = number
                    device.ring(peer, 1)
                assert device.wait(1, PATIENCE) == 1, number
                assert words[2 + other] == number
                if me == 1:
                    words[3] = number
                    device.ring(peer, 1)
            print("DONE", device.id, peer, flush=True)
            input()  # whoever leaves first takes nothing from the other
    """
    guests = [
        guest(program, args=doorbell(server), argv=[str(me)], iommu=True, name=f"guest {me}")
        for me in range(2)
    ]
    done = [g.expect("DONE", TIMEOUT) for g in guests]
    assert sorted(done) == ["DONE 0 1", "DONE 1 0"]
    with memoryview(server.region) as memory:
        assert struct.unpack_from("4I", memory)[2:] == (500, 500)
    for g in guests:
        g.send("")
        assert g.wait() == 0
