"""Notices when nobody can connect to a served path any more, and binds the path again if it can.

Knows: when a path may be bound again. Does not know: what is said over a socket.

A socket's file can be removed or replaced while its server runs: by a clean-up of /tmp, by hand, by
another server. The peers that are connected notice nothing, and no newcomer finds the server. A
path is bound again only by the process that bound it before, only if nothing or a stale socket is
there, and only when nobody waits in the queue of the old socket. What cannot be bound again is
logged, once for each reason.

*Rejected:* inotify. A directory that is itself replaced, or a mount over it, sends no event for the
path; a look takes three microseconds.

Invariants:
1. The file of another process is left alone.
2. The listening socket keeps its descriptor's number: a journal and a parent know it by that.
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

SECONDS = 2.0  # between looks


class PathWatch(Uncopied):
    """Watches the paths of a service and of its control socket, if it has one.

    `step()` when `fileno()` is readable; the first look is made at once. A context manager.
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
        self._told: dict[str, str] = {}  # what was logged of each path that is not reachable
        self._timer = descriptors.Timer()
        self.step()

    def fileno(self) -> int:
        """Readable when it is time for a look."""
        return self._timer.fileno()

    def step(self) -> None:
        """Look at all paths."""
        self._timer.set(self._seconds)
        before, self._told = self._told, {}
        for name, served in self._service.regions.items():
            self._look(served.listener, partial(self._service.bind_again, name), name, before)
        if control := self._control():
            self._look(control.listener, control.bind_again, "", before)

    def _look(
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
            # Somebody is in the queue of the old socket, and is served first.
            if path in before:
                self._told[path] = before[path]
            return
        except OSError as error:
            why = error.strerror or str(error)
            if error.errno == errno.EADDRINUSE:
                why = "another process listens there"
            self._told[path] = why
            if before.get(path) != why:
                _log.error(
                    "no client can connect to %s, which %s, and it cannot be bound again: %s",
                    *(path, trouble, why),
                    extra=log_events.fields("unreachable", path=path, reason=why, region=region),
                )
        else:
            _log.warning(
                "%s %s: it was bound again, so that others can connect",
                *(path, trouble),
                extra=log_events.fields("rebound", path=path, region=region),
            )

    def close(self) -> None:
        """Look no more; may be called twice."""
        self._timer.close()

    def __enter__(self) -> PathWatch:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
