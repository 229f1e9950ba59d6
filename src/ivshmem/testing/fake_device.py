"""Internal: an ivshmem device where there is none, so that `guest.open()` works on any machine.

Knows: what a device's registers hold, and what the kernel does with interrupts.
Does not know: how a program opens devices; that code is the real one, over fake_pci and fake_vfio.
"""

from __future__ import annotations

import contextlib
import mmap
import operator
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import SupportsIndex

from ..guest.device import DOORBELL, IVPOSITION
from ..guest.pci import COMMAND, COMMAND_MEMORY, MEMORY, REGISTERS
from ..memory.sizes import check_size, parse_size
from ..protocol.limits import MAX_ID, MAX_VECTORS
from ..system.uncopied import Uncopied
from .fake_pci import FakePci
from .fake_vfio import CONFIG, MSIX, REQUEST, SPACING, FakeVfio
from .patches import Patches

_GROUP = 1
_NOTHING = 0xFFFFFFFF  # no vector of no peer: what the Doorbell register holds before a ring


class FakeDevice(Uncopied):
    """The side of a fake device that a test uses; made by `fake_device`.

    The program under test opens it by `guest.open()`, and finds a real GuestDevice.

    Attributes:
        address: on the PCI bus.
        size: of the memory, bytes.
        vectors: 0 for a plain device.
    """

    address = "0000:00:04.0"

    def __init__(self, *_: object, **__: object) -> None:
        raise TypeError("a FakeDevice is made by testing.fake_device")

    @classmethod
    def _over(
        cls, pci: FakePci, vfio: FakeVfio, size: int, vectors: int, own_id: int
    ) -> FakeDevice:
        self = cls.__new__(cls)
        self._plug_in(pci, vfio, size, vectors)
        self.migrate(own_id)
        return self

    def _plug_in(self, pci: FakePci, vfio: FakeVfio, size: int, vectors: int) -> None:
        self._vfio = vfio
        self.size = size
        self.vectors = vectors
        pci.add_driver("vfio-pci")
        path = pci.add(self.address, size=size, vectors=vectors, group=_GROUP)
        # By sysfs the program maps the same memory as by vfio.
        (path / "resource2").unlink()
        (path / "resource2").symlink_to(f"/proc/{os.getpid()}/fd/{vfio.file}")
        pci.bound = lambda *_: vfio.poke(CONFIG, COMMAND, COMMAND_MEMORY.to_bytes(2, "little"))
        vfio.add_group(_GROUP)
        vfio.vectors = vectors
        vfio.poke(REGISTERS, DOORBELL, _NOTHING.to_bytes(4, "little"))

    @property
    def memory(self) -> mmap.mmap:
        """A new mapping of the shared memory, as another peer has it; the caller closes it."""
        return mmap.mmap(self._vfio.file, self.size, offset=self._vfio.place_of(MEMORY))

    def interrupt(self, vector: int = 0) -> None:
        """Interrupt a vector, as a peer that rings it.

        Raises:
            RuntimeError: no program has opened the device.
        """
        if not 0 <= vector < self.vectors:
            raise ValueError(f"vector {vector}: the device has {self.vectors}")
        self._signal(MSIX, vector)

    def take_ring(self) -> tuple[int, int] | None:
        """The last ring by the program, as (peer, vector); None if it rang nobody since this call.

        The register holds one value: an earlier ring that was not taken is lost.
        """
        value = self._vfio.peek(REGISTERS, DOORBELL)
        self._vfio.poke(REGISTERS, DOORBELL, _NOTHING.to_bytes(4, "little"))
        return None if value == _NOTHING else (value >> 16, value & 0xFFFF)

    def migrate(self, own_id: int) -> None:
        """Give the virtual machine another id, as a migration does; `events` then notices."""
        if not 0 <= own_id <= MAX_ID:
            raise ValueError(f"id {own_id}: ids are 0 to {MAX_ID}")
        self._vfio.poke(REGISTERS, IVPOSITION, own_id.to_bytes(4, "little"))

    def unplug(self) -> None:
        """Ask for the device back: waiting raises DeviceGone until the program closes it.

        Raises:
            RuntimeError: no program has opened the device.
        """
        self._signal(REQUEST, 0)

    def _signal(self, index: int, number: int) -> None:
        if (index, number) not in self._vfio.eventfds:
            raise RuntimeError("no program has opened the device: guest.open() does")
        self._vfio.interrupt(index, number)

    def __repr__(self) -> str:
        return f"<ivshmem.testing.FakeDevice at {self.address}>"


@contextlib.contextmanager
def fake_device(
    size: SupportsIndex | str = "1M",
    vectors: int = 1,
    *,
    id: int = 0,  # noqa: A002
) -> Iterator[FakeDevice]:
    """Pretend while the block runs that this machine is a guest with an ivshmem device.

    `guest.devices()` lists it, and `guest.open()` opens it by vfio. Nothing of the machine is
    changed, and no rights are needed; the real devices are hidden. It is for one process, whose
    other threads see it too: the paths and the system calls of the package are replaced.

    Args:
        size: of the memory: a power of two, at least a page and at most 16 MiB.
        vectors: 0 makes a plain device, without interrupts.
        id: of the virtual machine.

    Raises:
        RegionError: a size that no device can have.
        ValueError: a number of vectors, or an id, that no device can have.
    """
    size = parse_size(size)
    vectors = operator.index(vectors)
    if not 0 <= vectors <= MAX_VECTORS:
        raise ValueError(f"{vectors} vectors: allowed are 0 to {MAX_VECTORS}")
    check_size(size, mmap.PAGESIZE)
    if size > 1 << SPACING:
        raise ValueError(f"a fake device has at most {1 << SPACING} bytes, not {size}")
    root = Path(tempfile.mkdtemp(prefix="ivshmem-"))
    with contextlib.ExitStack() as undo:
        undo.callback(shutil.rmtree, root, ignore_errors=True)
        patches = undo.enter_context(Patches())
        pci = FakePci(root / "pci", patches)
        vfio = FakeVfio(root / "dev", patches, size=size, memory_first=True)
        undo.callback(vfio.close)
        yield FakeDevice._over(pci, vfio, size, vectors, id)
