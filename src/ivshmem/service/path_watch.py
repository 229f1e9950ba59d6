"""Notices when a socket's path no longer leads to the server, and binds the path again if it can.

Knows: when a path may be bound again. Does not know: what is said over a socket.

A socket's file can be removed or replaced while its server runs: by a clean-up of /tmp, by hand, by
another server. Connected peers do not notice, but no newcomer finds the server.

A path is bound again only under three conditions: this process bound it before, nothing or a stale
socket is there now, and no newcomer waits in the queue of the old socket. If that fails, the log
says why, once for each reason.

*Rejected:* inotify. If the directory is replaced, or a file system is mounted over it, there is no
event for the path. To look takes three microseconds.

Invariants:
1. The file of another process is neither removed nor replaced.
2. The listening socket keeps the number of its descriptor: a journal and a supervisor know the
   socket by that number.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from functools import partial

from ..native import descriptors
from ..server import log_events
from ..system.listener import Listener
from ..system.uncopied import Uncopied
from .control import Control
from .service import Service

_log = logging.getLogger("ivshmem.reachable")

SECONDS = 2.0  # between two looks


class PathWatch(Uncopied):
    """Watches the paths of a service and of its control socket, if it has one. A context manager.

    The constructor looks at once. Afterwards the owner calls `step()` when `fileno()` is readable.
    """

    def __init__(
        self,
        service: Service,
        control: Callable[[], Control | None] = lambda: None,
        seconds: float = SECONDS,
    ) -> None:
        self._service = service
        self._control = control
        self._seconds = seconds
        self._logged: dict[str, str] = {}  # by path that leads elsewhere: the reason in the log
        self._timer = descriptors.Timer()
        self.step()

    def fileno(self) -> int:
        """Return a descriptor that is readable when it is time for `step`."""
        return self._timer.fileno()

    def step(self) -> None:
        """Look at all paths, and bind again those that can be."""
        self._timer.set(self._seconds)
        before, self._logged = self._logged, {}
        for name, served in self._service.regions.items():
            self._check(served.listener, partial(self._service.bind_again, name), name, before)
        if control := self._control():
            self._check(control.listener, control.bind_again, "", before)

    def _check(
        self,
        listener: Listener,
        bind_again: Callable[[], None],
        region: str,
        before: dict[str, str],
    ) -> None:
        path, trouble = listener.path, listener.astray()
        if not trouble:
            return
        try:
            bind_again()
        except BlockingIOError:
            # A newcomer is in the queue of the old socket. It is served first.
            if path in before:
                self._logged[path] = before[path]
            return
        except (OSError, ValueError) as error:  # ValueError: its group was deleted
            reason = getattr(error, "strerror", None) or str(error)
            if getattr(error, "errno", None) == errno.EADDRINUSE:
                reason = "another process listens there"
            self._logged[path] = reason
            if before.get(path) != reason:
                _log.error(
                    "no client can connect to %s, which %s, and it cannot be bound again: %s",
                    *(path, trouble, reason),
                    extra=log_events.fields("unreachable", path=path, reason=reason, region=region),
                )
        else:
            _log.warning(
                "%s %s: it was bound again, and clients can connect",
                *(path, trouble),
                extra=log_events.fields("rebound", path=path, region=region),
            )

    def close(self) -> None:
        """Stop watching. May be called twice."""
        self._timer.close()

    def __enter__(self) -> PathWatch:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
