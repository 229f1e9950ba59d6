"""Real guests see the device as the small drivers in inside/raw do: so those can be relied upon."""

import mmap
import os
import select
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from .harness import MakeGuest

REGION_SIZE = 1 << 20


@pytest.fixture
def region() -> Iterator[Path]:
    path = Path(f"/dev/shm/ivshmem-vm-test-{os.getpid()}")
    with path.open("xb") as file:
        file.truncate(REGION_SIZE)
    yield path
    path.unlink()


class TestPlainDevice:
    PROGRAM = """
        from raw.sysfs import SysfsDevice
        with SysfsDevice() as device:
            device.memory[:5] = b"guest"
            print("READY", device.id, len(device.memory))
            input()
            print(device.memory[-4:].decode())
        """

    @pytest.mark.nightly
    def test_bytes_both_ways(self, guest: MakeGuest, region: Path) -> None:
        a = guest(
            self.PROGRAM,
            args=[
                "-object",
                f"memory-backend-file,id=mem,mem-path={region},size={REGION_SIZE},share=on",
                *("-device", "ivshmem-plain,memdev=mem"),
            ],
        )
        assert a.expect("READY") == f"READY 0 {REGION_SIZE}"
        with region.open("r+b") as file, mmap.mmap(file.fileno(), REGION_SIZE) as memory:
            assert memory[:5] == b"guest"
            memory[-4:] = b"host"
        a.send("go")
        a.expect("host")
        assert a.wait() == 0

    @pytest.mark.nightly
    @pytest.mark.parametrize("iommu", [False, True], ids=["pc", "q35"])
    def test_memory_by_fd_and_hotplug(self, guest: MakeGuest, iommu: bool) -> None:
        fd = os.memfd_create("region")
        with os.fdopen(fd, "r+b") as file:
            file.truncate(REGION_SIZE)
            # Not -add-fd: this backend opens its path itself, and /dev/fdset is no file (QEMU 7.2).
            path = f"/proc/self/fd/{fd}"
            backend = f"memory-backend-file,id=mem,mem-path={path},size={REGION_SIZE},share=on"
            # Of q35's slots only those behind a port can be plugged while the guest runs.
            port = ["-device", "pcie-root-port,id=rp0,chassis=1"] if iommu else []
            a = guest(
                """
                from raw import sysfs
                print("READY", sysfs.find())
                input()
                while not sysfs.find():
                    pass
                print("PLUGGED", sysfs.SysfsDevice().id)
                input()
                """,
                args=["-object", backend, *port],
                pass_fds=[fd],
                iommu=iommu,
            )
            assert a.expect("READY") == "READY []"
            a.qmp(
                "device_add",
                driver="ivshmem-plain",
                id="shm0",
                memdev="mem",
                bus="rp0" if iommu else "pci.0",
            )
            a.send("plugged")
            a.expect("PLUGGED")
            a.qmp("device_del", id="shm0")
            a.qmp_event("DEVICE_DELETED", device="shm0")


class ThrowawayServer:
    """Peer 0, and the server for one QEMU: its connection exists before it and has all messages."""

    def __init__(self, vectors: int) -> None:
        with ExitStack() as undo:
            self.far, self._socket = socket.socketpair()
            undo.enter_context(closing(self.far))
            undo.enter_context(closing(self._socket))
            flags = os.EFD_CLOEXEC | os.EFD_NONBLOCK
            self.ours = [os.eventfd(0, flags) for _ in range(vectors)]
            self.theirs = [os.eventfd(0, flags) for _ in range(vectors)]
            region = os.memfd_create("region")
            for fd in (region, *self.ours, *self.theirs):
                undo.callback(os.close, fd)
            os.truncate(region, REGION_SIZE)
            self.memory = undo.enter_context(mmap.mmap(region, REGION_SIZE))
            messages = [(0, None), (1, None), (-1, region)]
            messages += [(0, fd) for fd in self.ours] + [(1, fd) for fd in self.theirs]
            for value, passed in messages:
                socket.send_fds(
                    self._socket, [struct.pack("<q", value)], [passed] if passed is not None else []
                )
            self.close = undo.pop_all().close

    def ring(self, vector: int) -> None:
        os.eventfd_write(self.theirs[vector], 1)

    def wait(self, vector: int, timeout: float) -> bool:
        return (
            bool(select.select([self.ours[vector]], [], [], timeout)[0])
            and os.eventfd_read(self.ours[vector]) > 0
        )


class TestDoorbellDevice:
    @pytest.mark.nightly
    def test_interrupts_both_ways(self, guest: MakeGuest) -> None:
        vectors, rounds = 4, 20
        with closing(ThrowawayServer(vectors)) as server:
            fd = server.far.fileno()
            a = guest(
                f"""
                from raw.vfio import VfioDevice
                with VfioDevice() as device:
                    print("READY", device.id, device.vectors, len(device.memory))
                    for number in range({rounds}):
                        assert device.wait(number % {vectors}, timeout=20), number
                        assert not any(device.wait(other, 0) for other in range({vectors}))
                        assert device.memory[0] == number
                        device.memory[1] = number
                        device.ring(0, number % {vectors})
                """,
                args=[
                    *("-chardev", f"socket,id=server,fd={fd}"),
                    *("-device", f"ivshmem-doorbell,chardev=server,vectors={vectors}"),
                ],
                pass_fds=[fd],
                iommu=True,
            )
            assert a.expect("READY") == f"READY 1 {vectors} {REGION_SIZE}"
            for number in range(rounds):
                server.memory[0] = number
                server.ring(number % vectors)
                assert server.wait(number % vectors, 20), a.report()
                assert server.memory[1] == number
            assert a.wait() == 0
