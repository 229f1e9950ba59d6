"""What makes a running service observable: its control socket, its metrics, lines about stalls.

Knows: where these are by default, and which of them a server can do without. Does not know: what
they say.

A control socket that cannot be made is an error: another process may have bound its path in order
to be taken for this server (`status`, `--takeover`). Only a successor, which has peers, serves
without one.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping

from ..errors import IvshmemError
from ..server import log_events
from . import control, control_client
from .path_watch import PathWatch
from .service import Service
from .stall_log import StallLog

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .metrics import Metrics

_log = logging.getLogger("ivshmem.serve")


@contextlib.contextmanager
def observable(
    service: Service,
    *,
    needed: bool = True,
    controlled: bool = True,
    control_needed: bool = True,
    peers: bool = False,
    hosts: Iterable[str] = (),
    handlers: Mapping[str, control.Handler] | None = None,
) -> Iterator[None]:
    """While the block runs, what the service's configuration names listens in its loop.

    Args:
        needed: if False, a part that cannot be started is logged as an error and skipped.
        controlled: have a control socket; by default it is beside the first region's socket.
        control_needed: if False, a control socket that cannot be made is logged as a warning.
        peers: metrics of each peer, too.
        hosts: as of Metrics.
        handlers: as of Control.

    Raises:
        OSError, ValueError, MetricsError: a part that was asked for cannot be started.
    """
    metrics = service.config.metrics
    with contextlib.ExitStack() as stack:
        made: list[control.Control] = []

        def make_control() -> control.Control | None:
            found = _control(service, handlers, needed=control_needed) if controlled else None
            made.extend([found] if found else [])
            return found

        for make in (
            lambda: StallLog(service),
            make_control,
            lambda: PathWatch(service, lambda: made[0] if made else None),
            lambda: None if metrics is None else _metrics(metrics, service, peers, hosts),
        ):
            try:
                part: StallLog | control.Control | PathWatch | Metrics | None = make()
                if part is None:
                    continue
                stack.enter_context(part)
                nests = isinstance(part, control.Control)  # a reload is a part of its step
                service.watch(part.fileno(), part.step, nests=nests)
                stack.callback(service.unwatch, part.fileno())
            except (OSError, ValueError, IvshmemError) as error:
                if needed:
                    raise
                where = (
                    f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
                )
                reason = error.strerror if isinstance(error, OSError) else error
                _log.error("the peers are served anyway: %s%s", where, reason)
        yield


def _metrics(address: str, service: Service, peers: bool, hosts: Iterable[str]) -> Metrics:
    from .metrics import PATH, Metrics  # here: few servers have them

    made = Metrics(address, service, peers=peers, hosts=hosts)
    # Of port 0 nothing else says which one the kernel chose. A successor's can be another.
    told = log_events.fields("metrics", address=made.address)
    _log.info("metrics are at http://%s%s", made.address, PATH, extra=told)
    return made


def _control(
    service: Service, handlers: Mapping[str, control.Handler] | None, *, needed: bool
) -> control.Control | None:
    path = service.config.control
    if path is not None:
        return control.Control(control.listen(path), service, handlers=handlers)
    first = next(iter(service.regions.values()), None)
    if first is None:
        return None
    try:
        listener = control.listen(control_client.default_path(first.listener.path))
    except OSError as error:
        if needed:
            reason = f"no control socket: {error.strerror}; give --control PATH, or --no-control"
            raise OSError(error.errno, reason, error.filename) from None
        where = f"{error.filename}: " if error.filename else ""
        _log.warning("no control socket: %s%s", where, error.strerror)
        return None
    return control.Control(listener, service, handlers=handlers)
