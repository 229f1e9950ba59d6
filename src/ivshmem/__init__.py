"""Shared memory and doorbells between virtual machines, and between them and host processes.

Compatible with QEMU's ivshmem-plain and ivshmem-doorbell devices.

    Server    what guests connect to: `with ivshmem.Server("/run/ivshmem.sock").start(): ...`
    connect   makes this process a peer, with an id, a region, doorbells and vectors
    Region    the shared memory itself: `memoryview(region)`, `numpy.frombuffer(region)`
    Directory names in the region, by which peers find one another: `publish`, `lookup`
    save      writes a region to a file, whole or not at all; `load` checks it and reads it back

A peer rings another with `ring(peer, vector)`, and listens with `wait(vector, timeout)` or by going
over `events()`. Where microseconds count: `wait(vector, spin="auto")`, and `wait_word`. The command
line does the same: `python -m ivshmem --help`.
"""

from ._bell import Doorbell
from ._core import Interrupt
from ._memory import AtomicU32, AtomicU64
from .access import Rules, Verdict
from .client import Client, connect
from .directory import Directory, Entry, Publication
from .endpoint import Endpoint, Event, IdChanged, PeerJoined, PeerLeft, ServerLost
from .engine import Peer, PeerReport
from .errors import (
    ClosedError,
    DeviceGone,
    DirectoryFull,
    ImageError,
    IvshmemError,
    NameTaken,
    NoDirectory,
    NoFreeId,
    NoInterrupts,
    NoSuchDevice,
    NoSuchName,
    NoSuchPeer,
    NoSuchVector,
    ProtocolError,
    RegionError,
    ServerFailed,
    ServerGone,
)
from .image import ImageInfo, load, save
from .region import Region, RegionInfo
from .server import Server
from .sizes import parse_size

__all__ = [
    "AtomicU32",
    "AtomicU64",
    "Client",
    "ClosedError",
    "DeviceGone",
    "Directory",
    "DirectoryFull",
    "Doorbell",
    "Endpoint",
    "Entry",
    "Event",
    "IdChanged",
    "ImageError",
    "ImageInfo",
    "Interrupt",
    "IvshmemError",
    "NameTaken",
    "NoDirectory",
    "NoFreeId",
    "NoInterrupts",
    "NoSuchDevice",
    "NoSuchName",
    "NoSuchPeer",
    "NoSuchVector",
    "Peer",
    "PeerJoined",
    "PeerLeft",
    "PeerReport",
    "ProtocolError",
    "Publication",
    "Region",
    "RegionError",
    "RegionInfo",
    "Rules",
    "Server",
    "ServerFailed",
    "ServerGone",
    "ServerLost",
    "Verdict",
    "connect",
    "load",
    "parse_size",
    "save",
]
