"""What lets a running service be seen: its control socket, its metrics, a word about stalls.

Knows: where these are if nobody says so, and which of them a server can do without. Does not know:
what they say.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping

from .. import control
from ..metrics import Metrics, MetricsError
from ..service import Service
from ..stalls import Stalls

_log = logging.getLogger("ivshmem.serve")


@contextlib.contextmanager
def seen(
    service: Service,
    *,
    controlled: bool = True,
    peers: bool = False,
    handlers: Mapping[str, control.Handler] | None = None,
    required: bool = True,
) -> Iterator[control.Control | None]:
    """While the block runs, what the service's configuration names listens in its loop.

    Args:
        controlled: have a control socket; by default it is beside the first region's socket, where
            it is no more than a warning if it cannot be had.
        peers: metrics of each peer, too.
        handlers: as of Control.
        required: False: what cannot be had is logged, and done without, for there are peers.

    Raises:
        OSError, ValueError, MetricsError: what was asked for cannot be had.
    """
    address = service.config.metrics
    made: control.Control | None = None
    with contextlib.ExitStack() as stack:

        def add(part: control.Control | Metrics | Stalls) -> None:
            stack.enter_context(part)
            service.watch(part.fileno(), part.step)
            stack.callback(service.unwatch, part.fileno())

        with _perhaps("no word about stalls", required):
            add(Stalls(service))
        with _perhaps("no control socket", required):
            if controlled and (made := _control(service, handlers)) is not None:
                add(made)
        with _perhaps("no metrics", required):
            if address is not None:
                add(Metrics(address, service, peers=peers))
        yield made


@contextlib.contextmanager
def _perhaps(without: str, required: bool) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, MetricsError) as error:
        if required:
            raise
        where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
        reason = error.strerror if isinstance(error, OSError) else error
        _log.error("%s: %s%s", without, where, reason)


def _control(
    service: Service, handlers: Mapping[str, control.Handler] | None
) -> control.Control | None:
    path = service.config.control
    if path is not None:
        return control.Control(control.listen(path), service, handlers=handlers)
    first = next(iter(service.regions.values()), None)
    if first is None:
        return None
    try:
        listener = control.listen(control.default_path(first.listener.path))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _log.warning("no control socket: %s%s; give --control PATH", where, error.strerror)
        return None
    return control.Control(listener, service, handlers=handlers)
