"""What lets a running service be seen: its control socket, its metrics, a word about stalls.

Knows: where these are if nobody says so, and which of them a server can do without. Does not know:
what they say.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping

from .. import control
from ..metrics import Metrics
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
) -> Iterator[control.Control | None]:
    """While the block runs, what the service's configuration names listens in its loop.

    Args:
        controlled: have a control socket; by default it is beside the first region's socket, where
            it is no more than a warning if it cannot be had.
        peers: metrics of each peer, too.
        handlers: as of Control.

    Raises:
        OSError, ValueError, MetricsError: what was asked for cannot be had.
    """
    config = service.config
    with contextlib.ExitStack() as stack:
        made = _control(service, handlers) if controlled else None
        parts: list[control.Control | Metrics | Stalls] = [Stalls(service)]
        if made is not None:
            parts.append(made)
        for part in parts:
            stack.enter_context(part)
        if config.metrics is not None:
            parts.append(stack.enter_context(Metrics(config.metrics, service, peers=peers)))
        for part in parts:
            service.watch(part.fileno(), part.step)
            stack.callback(service.unwatch, part.fileno())
        yield made


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
