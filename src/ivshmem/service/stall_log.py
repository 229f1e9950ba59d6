"""Logs which peers do not read what the server sends, and when they read again.

Knows: how long a peer must not read before that is worth a line. Does not know: who writes the log.

Each burst of joins fills the buffers of some peers for a moment, which is worth no line. Therefore
this looks at all peers every few seconds, and logs only the stalls that have lasted that long.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

from ..native import descriptors
from ..server import log_events
from ..server.report import PeerReport
from ..system.named_tuple import NamedTuple
from ..system.uncopied import Uncopied

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .control import Regions

_log = logging.getLogger("ivshmem.stalls")

SECONDS = 5.0  # between two looks, and the shortest stall that is logged


class _Stall(NamedTuple):
    report: PeerReport
    since: float


class StallLog(Uncopied):
    """Watches the peers of a service. A context manager.

    The owner calls `step()` when `fileno()` is readable.
    """

    def __init__(self, service: Regions, seconds: float = SECONDS) -> None:
        self._service = service
        self._seconds = seconds
        # By region, id and time of joining: another peer can have the same id later.
        self._stalled: dict[tuple[str, int, float], _Stall] = {}
        self._timer = descriptors.Timer()
        self._timer.set(seconds)

    def fileno(self) -> int:
        """Return a descriptor that is readable when it is time for `step`."""
        return self._timer.fileno()

    def step(self) -> None:
        """Look at all peers, and log what is new."""
        self._timer.set(self._seconds)
        now = time.time()
        before, self._stalled = self._stalled, {}
        several = len(self._service.regions) > 1
        for name, served in self._service.regions.items():
            where = f"{name}: " if several else ""
            for report in served.server.report(interrupts=False):
                key = (name, report.peer.id, report.peer.since)
                since, stall = report.stalled_since, before.get(key)
                if since is not None and stall is not None:
                    # Even if it has read a little in between, that is the same stall.
                    self._stalled[key] = stall
                elif since is not None and now - since >= self._seconds:
                    self._stalled[key] = _Stall(report, since)
                    self._log_stalled(where, name, report, since, now)
                elif since is None and stall is not None:
                    self._log_reading(where, name, report, now - stall.since)

    def _log_stalled(
        self, where: str, region: str, report: PeerReport, since: float, now: float
    ) -> None:
        _log.warning(
            "%speer %d does not read: %s (pid %d), since %s (%.0f s), unsent messages: %d",
            where,
            report.peer.id,
            report.peer.process,
            report.peer.pid,
            time.strftime("%H:%M:%S", time.localtime(since)),
            now - since,
            report.pending,
            extra=log_events.fields(
                "stalled", pending=report.pending, since=since, **_fields(report, region)
            ),
        )

    def _log_reading(self, where: str, region: str, report: PeerReport, seconds: float) -> None:
        _log.info(
            "%speer %d reads again: %s (pid %d), after %.0f s",
            where,
            report.peer.id,
            report.peer.process,
            report.peer.pid,
            seconds,
            extra=log_events.fields(
                "reading", seconds=round(seconds, 3), **_fields(report, region)
            ),
        )

    def close(self) -> None:
        """Stop watching. May be called twice."""
        self._timer.close()

    def __enter__(self) -> StallLog:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _fields(report: PeerReport, region: str) -> Mapping[str, object]:
    peer = report.peer
    return {
        "region": region,
        "peer": peer.id,
        "pid": peer.pid,
        "uid": peer.uid,
        "process": peer.process,
    }
