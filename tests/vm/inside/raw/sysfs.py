"""The ivshmem device by way of sysfs, no driver bound: id, doorbell and memory, no interrupts.

Knows: where sysfs has PCI devices, the device's registers.
Does not know: interrupts; vfio.py has those.
"""

import mmap
from pathlib import Path
from types import TracebackType

PCI_DEVICES = Path("/sys/bus/pci/devices")
VENDOR, DEVICE = 0x1AF4, 0x1110
ID, DOORBELL = 2, 3  # 32-bit registers of BAR0, by index


def find() -> list[str]:
    """The PCI addresses of all ivshmem devices, in order."""

    def number(address: str, file: str) -> int:
        return int((PCI_DEVICES / address / file).read_text(), 16)

    addresses = sorted(path.name for path in PCI_DEVICES.iterdir())
    return [
        at for at in addresses if (number(at, "vendor"), number(at, "device")) == (VENDOR, DEVICE)
    ]


class SysfsDevice:
    """One device, by default the first. `memory` is the shared region, a mapping of BAR2."""

    def __init__(self, address: str | None = None) -> None:
        self._path = PCI_DEVICES / (address or find()[0])
        (self._path / "enable").write_text("1")
        start = int((self._path / "resource").read_text().split()[0], 16)
        # sysfs maps the page that BAR0 is in; Python maps no more than the 256 bytes that the file
        # claims to have.
        assert start % mmap.PAGESIZE == 0, f"BAR0 at {start:#x} does not begin a page"
        self._registers_map = self._map("resource0")
        self._registers = memoryview(self._registers_map).cast("I")
        self.memory = self._map("resource2")

    def __enter__(self) -> "SysfsDevice":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def id(self) -> int:
        return self._registers[ID]

    def ring(self, peer: int, vector: int = 0) -> None:
        self._registers[DOORBELL] = peer << 16 | vector

    def close(self) -> None:
        self._registers.release()
        self._registers_map.close()
        self.memory.close()

    def _map(self, resource: str) -> mmap.mmap:
        with (self._path / resource).open("r+b", buffering=0) as file:
            return mmap.mmap(file.fileno(), 0)
