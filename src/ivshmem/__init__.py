"""Shared memory and doorbells between virtual machines, and between them and host processes.

Compatible with QEMU's ivshmem-plain and ivshmem-doorbell devices.

    Server       guests connect to it: `with ivshmem.Server("/run/ivshmem.sock").start(): ...`
    connect      makes this process a peer, with an id, a region, doorbells and vectors
    Region       the shared memory itself: `memoryview(region)`, `region.array()` for numpy
    Directory    names in the region, by which peers find one another: `publish`, `lookup`
    save, load   write a region to a file, completely or not at all; check the file and restore it

A peer rings another with `ring(peer, vector)`. It listens with `wait(vector, timeout)`, or by
iterating over `events()`. Where microseconds count: `wait(vector, spin="auto")`, and `wait_word`.
The command line does the same: `python -m ivshmem --help`.

Public are the names in `__all__` of this module and of these, and nothing else:

    ivshmem.aio          the same endpoints for asyncio
    ivshmem.guest        the device inside a virtual machine
    ivshmem.channel      channels between peers, and their header for C
    ivshmem.testing      a server, a hostile peer and a fake device, for tests of your own
    ivshmem.migration    moves virtual machines that share memory to another host
    ivshmem.config       reads the configuration file of a service
    ivshmem.control      asks a running server over its control socket

All other modules are internal, and change without notice, as does each name that begins with `_`.

Time limits are in seconds. `timeout=None`, the default, waits for ever, and 0 does not wait. A call
that waits for something returns None if nothing came in time, and 0 if it says how many came. A
call that must make something or complete an action, such as `connect`, raises TimeoutError instead.

A name's module is imported when the name is first used. A program that gives up its rights to read
files (setuid, chroot) imports what it needs before that: `from ivshmem import Server, connect`.
"""

TYPE_CHECKING = False  # as type checkers read it; typing itself costs 1.7 MiB
if TYPE_CHECKING:
    from ._core import Interrupt
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
    from .memory.blocks import ImageInfo
    from .memory.image import check_image, load, save
    from .memory.region import Region, RegionInfo
    from .memory.sizes import format_size, parse_size
    from .native.bell import Doorbell
    from .native.mapping import Atomic, AtomicU32, AtomicU64
    from .peer.client import Client, connect
    from .peer.directory import Directory, Publication
    from .peer.endpoint import Disconnected, Endpoint, Event, IdChanged, PeerJoined, PeerLeft
    from .peer.names_table import Entry
    from .server.access import Rules, Verdict
    from .server.engine import Gate
    from .server.log_formatters import JsonFormatter
    from .server.report import Peer, PeerReport, ServerCounts
    from .server.server import Server
    from .system.credentials import Credentials
    from .system.listener import Listener

__version__ = "0.1.0"  # pyproject.toml and the command line read it here

# Where each public name is defined. Its module is imported when the name is first used: a server
# needs a third of them, and `ivshmem status` hardly any.
_HOMES = {
    "_core": ("Interrupt",),
    "errors": (
        "ClosedError",
        "DeviceGone",
        "DirectoryFull",
        "ImageError",
        "IvshmemError",
        "NameTaken",
        "NoDirectory",
        "NoFreeId",
        "NoInterrupts",
        "NoSuchDevice",
        "NoSuchName",
        "NoSuchPeer",
        "NoSuchVector",
        "ProtocolError",
        "RegionError",
        "ServerFailed",
        "ServerGone",
    ),
    "memory.blocks": ("ImageInfo",),
    "memory.image": ("check_image", "load", "save"),
    "memory.region": ("Region", "RegionInfo"),
    "memory.sizes": ("format_size", "parse_size"),
    "native.bell": ("Doorbell",),
    "native.mapping": ("Atomic", "AtomicU32", "AtomicU64"),
    "peer.client": ("Client", "connect"),
    "peer.directory": ("Directory", "Publication"),
    "peer.endpoint": ("Disconnected", "Endpoint", "Event", "IdChanged", "PeerJoined", "PeerLeft"),
    "peer.names_table": ("Entry",),
    "server.access": ("Rules", "Verdict"),
    "server.engine": ("Gate",),
    "server.log_formatters": ("JsonFormatter",),
    "server.report": ("Peer", "PeerReport", "ServerCounts"),
    "server.server": ("Server",),
    "system.credentials": ("Credentials",),
    "system.listener": ("Listener",),
}
_HOME_OF = {name: f"{__name__}.{home}" for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    # `ivshmem` has no names but its public ones.
    from .system.late_names import late_name

    value = late_name(__name__, name, _HOME_OF)
    if name == "Server":
        # The command line listens first, and imports the rest then. A program may have given up its
        # rights by then, and can read no more modules.
        from .peer import directory  # noqa: F401
        from .server.engine import import_the_rest

        import_the_rest()
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "Atomic",
    "AtomicU32",
    "AtomicU64",
    "Client",
    "ClosedError",
    "Credentials",
    "DeviceGone",
    "Directory",
    "DirectoryFull",
    "Disconnected",
    "Doorbell",
    "Endpoint",
    "Entry",
    "Event",
    "Gate",
    "IdChanged",
    "ImageError",
    "ImageInfo",
    "Interrupt",
    "IvshmemError",
    "JsonFormatter",
    "Listener",
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
    "ServerCounts",
    "ServerFailed",
    "ServerGone",
    "Verdict",
    "check_image",
    "connect",
    "format_size",
    "load",
    "parse_size",
    "save",
]
