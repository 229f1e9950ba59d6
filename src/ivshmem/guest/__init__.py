"""The ivshmem device inside a virtual machine: finds it, and opens it as an endpoint.

    devices()   lists the devices: address, size, variant, vectors, driver, IOMMU group
    open()      opens the only device, or the one at an address: an endpoint like the host's client
    measure()   measures how fast the memory is by each way of mapping it
    Broker      shares the device between processes of the guest, which connect as on the host

`open` is also called `open_device`. Interrupts come by vfio, which needs an IOMMU in the guest.
`python -m ivshmem doctor` says what is missing and what fixes it.

`Broker` is imported when it is first used, as the names of `ivshmem` are.
"""

from ..system.late_names import late_name
from .choice import open_device
from .device import Access, GuestDevice, Memory
from .measure import Speed, measure
from .pci import Device, devices

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .broker import Broker

open = open_device  # noqa: A001 - `guest.open()` reads as it should


def __getattr__(name: str) -> object:
    """Import what is in a server for the few programs that share the device: a third of it all."""
    return late_name(__name__, name, {"Broker": f"{__name__}.broker"})


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# `open_device`, not `open`: `from ivshmem.guest import *` would replace Python's own.
__all__ = [
    "Access",
    "Broker",
    "Device",
    "GuestDevice",
    "Memory",
    "Speed",
    "devices",
    "measure",
    "open_device",
]
