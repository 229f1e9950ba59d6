"""How `ivshmem serve` continues where another process was, and lets another process continue.

Knows: which processes can come before: a child of the same parent, a server that hands over, a
server whose descriptors the service manager kept. Does not know: options, what is served.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Callable, Collection, Iterator, Mapping

from ..errors import ConfigError, ControlError, HandoverError
from ..lasting import fd_store, handover, supervisor
from ..lasting.journal import Journal
from ..lasting.supervised import Supervision
from ..peer import connecting
from ..server import log_events
from ..system import sockets
from ..system.named_tuple import NamedTuple
from ..system.requests import Requester
from ..text import counted
from . import control, control_client, snapshots
from .config import RegionConfig, ServiceConfig
from .service import Find, Service

_log = logging.getLogger("ivshmem.serve")


class Inheritance(NamedTuple):
    """What another process left.

    Attributes:
        journal: by which this process can continue.
        find: where the descriptors are that the journal names.
        strays: other descriptors; connections among them were accepted and not noted yet.
        end: what became of that process.
        config: of this process, if it may differ; None: it is the same.
        partly: `config` says only what differs: the rest stays, above all the access rules.
    """

    journal: Journal
    end: str
    find: Find = lambda fd: fd
    strays: Collection[int] = ()
    config: ServiceConfig | None = None
    partly: bool = False

    def go_on(self, service: Service) -> None:
        """Serve the peers that the other process served.

        Raises:
            JournalError: no process can.
            OSError, ValueError: there were no peers, and the new configuration cannot be served.
        """
        closed = service.resume(self.journal, self.find)
        for fd in set(self.strays).difference(service.descriptors, closed):
            service.take_stray(fd)
        peers = sum(len(served.server.peers) for served in service.regions.values())
        told = log_events.fields("takeover", pid=os.getpid(), reason=self.end)
        _log.warning("pid %d continues with %s", os.getpid(), counted(peers, "peer"), extra=told)
        try:
            wanted = self._wanted(service)
            changes = [] if wanted is None else service.change(wanted)
        except (OSError, ValueError) as error:
            if not service.regions:
                raise  # there are no peers that would be cut off
            _log.error("the former settings stay: %s", error)
        else:
            for line in changes:
                _log.warning("%s", line)

    def _wanted(self, service: Service) -> ServiceConfig | None:
        """What is to be served from now on.

        Raises:
            ConfigError: what is said is of another region.
        """
        if self.config is None or not self.partly:
            return self.config
        (given,) = self.config.regions.values()
        blank = RegionConfig(given.socket)
        said = {key: v for key, v in given._asdict().items() if v != getattr(blank, key)}
        found = {name: served.config for name, served in service.regions.items()}
        if said and found.keys() != self.config.regions.keys():
            # To serve one region instead would cut off the peers of all of these.
            raise ConfigError(f"give the --config FILE that has region {', '.join(found)}")
        regions = {name: each._replace(**said) for name, each in found.items()}
        return self.config._replace(regions=regions)


# -- a child of the same parent -------------------------------------------------------------------


def past_of(kept: Supervision, journal: Journal) -> Inheritance:
    """What the last child left.

    Its own files are closed. Connections stay open: a client may be at the other end.
    """
    named = {fd for fds in snapshots.read(journal).descriptors.values() for fd in fds}
    found = []
    for fd in supervisor.strays(kept.known):
        if fd in named or sockets.is_connection(fd):
            found.append(fd)
        else:
            os.close(fd)
    return Inheritance(journal, "the server died", strays=found)


@contextlib.contextmanager
def replacing(kept: Supervision | None, service: Service) -> Iterator[None]:
    """While the block runs: if the parent is killed, this process takes its place."""
    if kept is None:
        yield
        return

    def act() -> None:
        _log.warning(
            "the parent (pid %d) is gone: pid %d takes its place", kept.parent, os.getpid()
        )
        try:
            supervisor.start_anew(service.descriptors, kept.fd, lambda: service.stopping)
        except OSError as error:
            _log.error(
                "%s: %s: no process continues if this one is killed: replace it with --takeover",
                *(error.filename, error.strerror),
            )
            service.unwatch(fd)

    fd = -1
    try:
        fd = os.pidfd_open(kept.parent)
    except ProcessLookupError:
        act()
        yield
        return
    except OSError as error:  # EMFILE
        _log.error(
            "%s: no process takes the place of the parent (pid %d) if it is killed: replace this"
            " server with --takeover",
            *(error.strerror, kept.parent),
        )
        yield
        return
    try:
        service.watch(fd, act)
        if os.getppid() != kept.parent:  # that pid is another's already
            act()
        yield
    finally:
        service.unwatch(fd)
        os.close(fd)


# -- a server that hands over ---------------------------------------------------------------------

# Of two processes that take over at once, one finds the server gone, or is cut off by it.
_LATE = (
    "it has ended, or another process has just taken over (`ivshmem status` tells); omit --takeover"
    " to start a new server"
)

# A journal, and the descriptors that it names.
TakenOver = tuple[Journal, set[int]]


def take_over(config: ServiceConfig) -> TakenOver:
    """All that the server has that runs where this configuration says."""
    path = config.control
    if path is None:
        path = control_client.default_path(next(iter(config.regions.values())).socket)
    try:
        connection = connecting.connect(path, handover.SECONDS)
    except (FileNotFoundError, ConnectionRefusedError) as error:
        reason = f"no server to take over from listens here: {_LATE}"
        raise OSError(error.errno, reason, path) from None
    with connection as sock:
        with contextlib.suppress(ConnectionError):  # a server that refuses says why, and closes
            sock.sendall(b'{"do": "takeover"}\n')
        try:
            return handover.take(sock, snapshots)
        except HandoverError as error:
            if isinstance(error.__context__, ConnectionResetError):
                raise HandoverError(f"{error}: {_LATE}") from None
            raise


def handing_over(service: Service, given: list[socket.socket]) -> control.Handler:
    """What the control socket does when another process asks to take over.

    Args:
        given: gets the socket over which the service was given away; then `service` is stopped.
    """

    def act(caller: Requester, _: Mapping[str, object]) -> None:
        if service.changing:
            raise ControlError("a reload is under way: try again when it is done", "busy")
        sock, _rest = caller.detach()
        if handover.give(service, sock):
            told = log_events.fields("takeover", reason="another process continues")
            _log.warning("another process continues with all peers: this one ends", extra=told)
            given.append(sock)
            service.stop()
        else:
            _log.warning("another process tried to take over, and failed: nothing has changed")
            sock.close()

    return act


# -- one whose service manager kept what it had ---------------------------------------------------


def stored_past(
    journal: Journal, groups: fd_store.Groups, drop: Callable[[str], object], config: ServiceConfig
) -> Inheritance:
    """What the manager gave back.

    Groups that the journal does not name are dropped; a connection among them is a stray.
    """
    named = snapshots.read(journal).descriptors
    places = fd_store.place(named, groups)
    strays = []
    for name, fds in groups.items():
        drop(name)
        for fd in fds:
            if name not in named and sockets.is_connection(fd):
                strays.append(fd)
            else:
                os.close(fd)
    changed = config if config.regions else None
    return Inheritance(journal, "the server died", places.get, strays, changed)
