"""What a running server says of itself: its process, its regions, their peers.

Knows: the fields of a status, which docs/reference/control-protocol.md lists. Does not know: who
asks, and how.
"""

from __future__ import annotations

import contextlib
import os
import resource
import time
from collections.abc import Iterable, Mapping

from .. import __version__
from ..errors import ClosedError, NoDirectory
from ..peer.limits import MAGIC, SLOT_BYTES
from ..system.processes import fd_limit, open_fds, pid_namespace, resident_bytes
from .control_client import PROTOCOL

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol

    from ..memory.region import Region
    from ..peer.directory import Directory
    from ..server.report import PeerReport, ServerCounts
    from ..system.listener import Listener

    class Reporting(Protocol):
        """What a status asks of a Server."""

        region: Region
        path: str
        vectors: int

        @property
        def paused(self) -> str: ...
        @property
        def counts(self) -> ServerCounts: ...
        @property
        def holds_leaves(self) -> bool: ...
        def report(self, *, interrupts: bool = ...) -> list[PeerReport]: ...

    class ReportedRegion(Protocol):
        """A region that is being served."""

        @property
        def server(self) -> Reporting: ...
        @property
        def listener(self) -> Listener: ...


class Status:
    """Says what there is, in what JSON can hold."""

    def __init__(self) -> None:
        self._since = time.time()
        self._directories: dict[int, tuple[Region, Directory | None]] = {}

    def of_process(self) -> dict[str, Any]:
        used = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "pid": os.getpid(),
            "uid": os.geteuid(),
            "version": __version__,
            "protocol": PROTOCOL,
            "since": self._since,
            "time": time.time(),
            "cpu": used.ru_utime + used.ru_stime,
            "resident": resident_bytes(),
            "fds": {"open": open_fds(), "limit": fd_limit()},
            "pid_namespace": pid_namespace(),
        }

    def of_region(self, name: str, served: ReportedRegion, *, peers: bool) -> dict[str, Any]:
        server = served.server
        region = server.region
        shown: dict[str, Any] = {
            "name": name,
            "socket": server.path,
            "unreachable": served.listener.astray(),
            "vectors": server.vectors,
            "size": region.size,
            "page_size": region.page_size,
            "file_system": _file_system(region),
            "source": region.source,
            "memory": region.name or "",
            "memory_leads_to": region.name_leads_to() or "",
            "paused": server.paused,
            "channels": self._channels(region),
            "holds_leaves": server.holds_leaves,
            "counts": server.counts._asdict(),
        }
        if peers:
            names = self._names(region)
            shown["peers"] = [_peer(report, names) for report in server.report(interrupts=True)]
        return shown

    def _names(self, region: Region) -> dict[int, list[str]]:
        """What peers say in the directory of names that they are called, if there is one."""
        directory = self._directory(region)
        found: dict[int, list[str]] = {}
        if directory is not None:
            with contextlib.suppress(ClosedError):
                for entry in directory.entries():
                    found.setdefault(entry.id, []).append(entry.name)
        return found

    def _channels(self, region: Region) -> int:
        """How many bytes are set aside for channels. A peer can do that at any time."""
        with contextlib.suppress(NoDirectory, ClosedError):
            if self._directory(region) is not None:
                from ..peer.names_table import trailer_of  # here, as in `_directory`

                trailer = trailer_of(region)
                if trailer is not None and trailer.area is not None:
                    return len(trailer.area)
        return 0

    def _directory(self, region: Region) -> Directory | None:
        # Kept, so that it sees by whom an entry is kept alive. One may be made at any time.
        known = self._directories.get(id(region))
        if known is not None and known[1] is not None:
            return known[1]
        directory: Directory | None = None
        with contextlib.suppress(NoDirectory, ClosedError):
            if region.read(region.size - SLOT_BYTES, len(MAGIC)) == MAGIC:
                # Not before: the import takes a while, and nobody is served then.
                from ..peer.directory import Directory

                directory = Directory.open(region)
        self._directories[id(region)] = (region, directory)
        return directory

    def forget_all_but(self, regions: Iterable[Region]) -> None:
        """Let go the directories of regions that are served no more."""
        known = {id(region) for region in regions}
        self._directories = {k: v for k, v in self._directories.items() if k in known}


def _peer(report: PeerReport, names: Mapping[int, list[str]]) -> dict[str, Any]:
    peer = report.peer
    return {
        "id": peer.id,
        "pid": peer.pid,
        "uid": peer.uid,
        "gid": peer.gid,
        "process": peer.process,
        "names": names.get(peer.id, []),
        "vectors": peer.vectors,
        "since": peer.since,
        "readonly": report.readonly,
        "set_up": report.set_up,
        "pending": report.pending,
        "stalled_since": report.stalled_since,
        "leaves_told": report.leaves_told,
        "leaves_held": report.leaves_held,
        "held": report.held,
        "held_until": report.held_until,
        "interrupts": list(report.interrupts),
    }


def _file_system(region: Region) -> str:
    from ..memory import pages  # here: only a status needs it

    with contextlib.suppress(OSError):  # no descriptor is left, say
        return pages.file_system(region.fileno())
    return ""
