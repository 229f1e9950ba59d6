"""`ivshmem serve` under a service manager: socket activation, and status reports to the manager.

Knows: what systemd passes to a service and expects from it. Does not know: from which other process
a server can take over, what is served.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator

from ..errors import JournalError
from ..lasting import fd_store
from ..lasting.journal import Journal
from ..native import descriptors
from ..system import late_logging, systemd
from ..system.listener import Listener
from ..system.uncopied import Uncopied
from ..text import counted
from .config import ServiceConfig
from .service import Service

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .succession import Inheritance

_log = late_logging.log_of("ivshmem.serve")

_PATIENCE = 5.0  # for the manager, seconds
_SECONDS = 5.0  # between two words about the service, if no watchdog wants more


class Manager(Uncopied):
    """The service manager that started this process; in most cases there is none.

    Attributes:
        notifier: tells the manager the state of the service.
        listeners: sockets that the manager passed, by path.
        journal, groups: what the manager had stored.
        keeps: has the manager keep what is in a journal, from `keep` on.
        warning: why the manager cannot be told anything; "": it can, or there is none.
    """

    def __init__(
        self,
        notifier: systemd.Notifier,
        listeners: dict[str, Listener] | None = None,
        journal: int | None = None,
        groups: fd_store.Groups | None = None,
    ) -> None:
        self.notifier = notifier
        self.listeners = listeners or {}
        self.journal = journal
        self.groups = groups or {}
        self.keeps: fd_store.FdStore | None = None
        self.warning = ""

    @classmethod
    def from_environment(cls) -> Manager:
        """The manager that the environment names; call it once, in the process that was started.

        Raises:
            ValueError, OSError: what was passed is no socket that a server can listen on.
        """
        journal, groups, others = fd_store.sort_out(systemd.listen_fds())
        listeners = {each.path: each for each in map(Listener.adopt, others)}
        return cls._notifying(listeners, journal, groups)

    @classmethod
    def of_successor(cls) -> Manager:
        """The same for a process that continues where one was that had received the sockets."""
        return cls._notifying()

    @classmethod
    def _notifying(cls, *what: Any) -> Manager:
        # The options that say what form a log has are read later: the warning waits for that.
        warnings: list[str] = []
        self = cls(systemd.Notifier.from_environment(warn=warnings.append), *what)
        self.warning = "".join(warnings)
        return self

    def only_path(self) -> str | None:
        """The path of the socket that was passed, if that is one and has one."""
        paths = list(self.listeners)
        return paths[0] if len(paths) == 1 and paths[0] else None

    def for_regions(self, config: ServiceConfig) -> dict[str, Listener]:
        """The sockets that were passed, by their paths in the configuration.

        Raises:
            ValueError: one is no region's.
        """
        if not config.regions:
            return {}
        there = {os.path.realpath(path): each for path, each in self.listeners.items()}
        found = {}
        for region in config.regions.values():
            if (listener := there.pop(os.path.realpath(region.socket), None)) is not None:
                found[region.socket] = listener
        for path in there:
            raise ValueError(
                f"the socket {path} was passed by the service manager, but no region uses it:"
                " give a region this path, or remove it from the socket unit"
            )
        return found

    def keep(self, config: ServiceConfig) -> tuple[Journal, Inheritance | None]:
        """Have the manager keep what will be in a journal; return what it has kept before, if any.

        Raises:
            OSError: as of Journal.
        """
        from .succession import stored_past  # here: few servers have a manager that keeps

        fd, self.journal = self.journal, None
        groups, self.groups = self.groups, {}
        journal = None if fd is None else _readable(fd)
        if journal is not None:
            self.keeps = keeps = fd_store.FdStore(self.notifier, journal)
            return journal, stored_past(journal, groups, keeps.drop, config)
        journal = Journal()
        self.keeps = keeps = fd_store.FdStore(self.notifier, journal)
        for name, fds in groups.items():
            keeps.drop(name)
            _close_all(fds)
        keeps.keep_journal(replace=fd is not None)
        keeps.flush(_PATIENCE)
        if fd is not None or groups:
            # Until the manager has closed its copies, the old sockets listen.
            self.notifier.barrier(_PATIENCE)
        return journal, None

    def close(self) -> None:
        """Close everything that belongs to the manager here."""
        if self.keeps is not None:
            self.keeps.close()
        self.notifier.close()
        for listener in self.listeners.values():
            listener.close()
        if self.journal is not None:
            _close_all([self.journal])
        for fds in self.groups.values():
            _close_all(fds)

    def __enter__(self) -> Manager:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@contextlib.contextmanager
def keeping(manager: Manager, service: Service) -> Iterator[None]:
    """While the block runs, send what the manager had no room for, in the service's loop."""
    keeps = manager.keeps
    if keeps is None:
        yield
        return
    service.watch(keeps.fileno(), keeps.step)
    try:
        yield
    finally:
        service.unwatch(keeps.fileno())


@contextlib.contextmanager
def telling(notifier: systemd.Notifier, service: Service) -> Iterator[None]:
    """Report that the service has begun, and every few seconds that it lives, and its status."""
    if not notifier.active:
        yield
        return
    seconds = min(_SECONDS, (notifier.watchdog_seconds or 2 * _SECONDS) / 2)
    told = ""

    def act() -> None:
        nonlocal told
        timer.set(seconds)
        notifier.watchdog()
        status = _status(service)
        if status != told and notifier.status(status):
            told = status

    timer = descriptors.Timer()
    try:
        service.watch(timer.fileno(), act)
        timer.set(seconds)
        notifier.ready(_status(service))
        yield
        notifier.stopping()
    finally:
        service.unwatch(timer.fileno())
        timer.close()


def _status(service: Service) -> str:
    servers = [served.server for served in service.regions.values()]
    peers = sum(len(server.peers) for server in servers)
    text = f"{counted(len(servers), 'region')}, {counted(peers, 'peer')}"
    reasons = {server.paused for server in servers} - {""}
    return f"{text}; newcomers wait: {', '.join(sorted(reasons))}" if reasons else text


def _readable(fd: int) -> Journal | None:
    """The journal that the manager kept, if a successor can continue by it; `fd` is owned."""
    from . import snapshots  # here: only a successor reads a journal

    journal = None
    try:
        journal = Journal(fd)
        snapshots.rehearse(snapshots.read(journal))
        return journal
    except JournalError as error:
        # No process can serve these peers. To fail would leave newcomers without a server, too.
        _log.error("all peers of the last process are cut off: %s", error)
    if journal is not None:
        journal.close()
    return None


def _close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)
