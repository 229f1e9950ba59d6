"""Internal: how fast a guest's shared memory is by each way of mapping it.

Knows: clocks and copies. Does not know: why a way is slow. On most hosts all ways are equal. On
some hosts the processor applies the guest's memory type, and uncached reads are 10 to 100 times
slower.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from ..errors import IvshmemError
from ..system.named_tuple import NamedTuple
from .choice import best_way, choose, open_device
from .device import Access, Memory

MEMORIES: tuple[Memory, ...] = ("vfio", "uio", "resource2", "resource2_wc")

# The ways that have a mapping of their own; the others work with any way to open the device.
_OWN: dict[Memory, Access] = {"vfio": "vfio", "uio": "uio"}

_ROUNDS = 3  # of all ways in turn; the best counts, because other processes use the processor too
_CHUNK = 1 << 16  # bytes copied at once: small enough for the processor's caches


class Speed(NamedTuple):
    """How fast one way of mapping the memory is.

    Attributes:
        memory: the way, as `open` takes it.
        read, write: bytes a second copied out of it and into it; 0.0 if this way does not work.
        error: why this way does not work here; "" if it does.
    """

    memory: Memory
    read: float = 0.0
    write: float = 0.0
    error: str = ""


def measure(
    address: str | None = None,
    *,
    offset: int = 0,
    length: int | None = None,
    seconds: float = 0.1,
) -> list[Speed]:
    """Copy bytes out of the memory, and the same bytes back, by each way.

    What another peer writes to these bytes during the call is lost. Each way takes about six times
    `seconds`. A process that uses the device keeps it: the ways that would take it have an error.

    Args:
        address: of the device, as `open` takes it.
        offset, length: of the bytes; None: from `offset` to the end, at most 1 MiB.
        seconds: for each copy of each way.

    Returns:
        One Speed for each way.

    Raises:
        NoSuchDevice, OSError: as of `open`.
        ValueError: the memory does not have these bytes.
    """
    device = choose(address)
    if not 0 <= offset < device.size:
        raise ValueError(f"nothing at {offset}: the memory has {device.size} bytes")
    if length is None:
        length = min(device.size - offset, 1 << 20)
    if not 0 < length <= device.size - offset:
        raise ValueError(f"{length} bytes at {offset}: the memory has {device.size} bytes")
    rounds = [
        [_measure(device.address, way, offset, length, seconds) for way in MEMORIES]
        for _ in range(_ROUNDS)
    ]
    return [
        same_way[0]._replace(
            read=max(speed.read for speed in same_way),
            write=max(speed.write for speed in same_way),
        )
        for same_way in zip(*rounds, strict=True)
    ]


def _measure(address: str, memory: Memory, offset: int, length: int, seconds: float) -> Speed:
    try:
        access = _OWN.get(memory)
        if memory == "vfio" and best_way(choose(address)) == "noiommu":
            access = "noiommu"
        device = open_device(address, access=access, memory=memory)
    except (IvshmemError, OSError, ValueError) as error:
        return Speed(memory, error=getattr(error, "strerror", None) or str(error))
    with (
        device,
        memoryview(device.region) as whole,
        whole[offset : offset + length] as view,
        memoryview(bytearray(length)) as copy,
    ):
        chunks = [slice(at, min(at + _CHUNK, length)) for at in range(0, length, _CHUNK)]

        def read(chunk: slice) -> None:
            copy[chunk] = view[chunk]

        def write(chunk: slice) -> None:
            view[chunk] = copy[chunk]

        return Speed(memory, _rate(read, chunks, seconds), _rate(write, chunks, seconds))


def _rate(action: Callable[[slice], None], chunks: list[slice], seconds: float) -> float:
    """Return bytes a second; a first round, which is not measured, touches each page."""
    for chunk in chunks:
        action(chunk)
    done = 0
    start = now = time.perf_counter()
    while now < start + seconds:
        for chunk in chunks:
            action(chunk)
            done += chunk.stop - chunk.start
            if (now := time.perf_counter()) >= start + seconds:
                break
    return done / (now - start)
