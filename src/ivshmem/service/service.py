"""Several servers in one loop: what a configuration asks for, and changes of it while it runs.

Knows: regions that come and go, what a successor needs to continue with all of them. Does not know:
command lines, signals, control sockets; these have the service's loop watch their descriptors.

Invariants:
1. A change happens as a whole or not at all: everything new is opened before anything else changes,
   and no client can connect to it before the whole change has succeeded. (QEMU busy-loops on a
   connection that ends early.)
2. A region that fails does not affect other regions, and no region waits for another: a thread does
   what takes long, while the loop serves the rest.
3. What belongs to a region is in the journal before a client can connect to the region.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

from ..errors import ConfigError, NoDirectory
from ..lasting.journal import Journal, Section
from ..memory.region import Region
from ..server import records
from ..server.access import Verdict
from ..server.engine import Gate, import_the_rest
from ..server.region_server import RegionServer
from ..server.report import Peer
from ..system import late_logging
from ..system.credentials import Credentials
from ..system.listener import Listener, path_of
from ..system.loop import Loop
from ..system.uncopied import Uncopied
from ..system.work_lock import is_mine
from .config import RULES, RegionConfig, ServiceConfig, conflicts, from_json
from .open_region import Opened, open_region
from .reload_plan import plan

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..server.records import ServiceRecord
    from .snapshots import RegionPast

_log = late_logging.log_of("ivshmem.service")

_OF_THE_FILE = frozenset({"mode", "owner", "group"})

# What descriptor has here the number that it had there; None: it is gone.
Find = Callable[[int], "int | None"]


class Served(Uncopied):
    """A region that is being served.

    Attributes:
        name, config: of the configuration.
        listener, region, server, directory: what was opened for it.
        created: whether its memory was made here, and goes with it.
    """

    def __init__(
        self, name: str, config: RegionConfig, number: int, server: RegionServer, opened: Opened
    ) -> None:
        self.name = name
        self.config = config
        self.number = number
        self.server = server
        # Needed also after the server or the region was closed.
        self.fd = server.fileno()
        self.fds = [opened.listener.socket.fileno(), opened.region.fileno()]
        self._opened = opened
        self.listener = opened.listener
        self.region = opened.region
        self.created = opened.created
        self.directory = opened.directory
        self.ended = False  # it is to be closed when its step ends

    def record(self) -> records.RegionRecord:
        """What a successor needs beside what the server has noted."""
        return records.RegionRecord(
            number=self.number,
            name=self.name,
            config=self.config._asdict(),
            listener=self.fds[0],
            unlinks=self.listener.unlinks,
            memory=self.fds[1],
            source=self.region.source,
            source_name=self.region.name,
            created=self.created,
            file=self.listener.file,
        )

    def close(self) -> None:
        """Disconnect all peers, and remove what was made for the region."""
        try:
            self.server.close()
        finally:
            self._opened.close(keep=self.config.keep)

    def abandon(self) -> None:
        """Close this process's copies of descriptors that a successor has, too."""
        if self.directory is not None:
            self.directory.close()
        self.listener.unlinks = False
        self.server.abandon()
        self.region.close()


class Service(Loop):
    """Serves the regions of a configuration; a context manager.

    Args:
        config: what is served from the start. If `resume` is called next, what it says beside the
            regions; without any, all is as it was.
        listeners: sockets that are there already, by path (systemd's, for instance).
        on_join, on_leave: called with a region's name and a Peer.
        journal: where a successor of this process finds what it needs to continue.
        load: reads the configuration for `reload`.

    One thread uses a service. Only `stop`, `wake` and `soon` may be called anywhere: in other
    threads, signal handlers and callbacks. Callbacks and other acts of a step may call everything
    except `step` and `run`: a region that its own callback removes is closed when the step ends,
    and `close` takes effect when the loop's step ends. A signal handler can interrupt a change, so
    it uses `soon` for everything else. In a forked child `close` and `abandon` close the child's
    copies, and each method that changes something raises RuntimeError.
    """

    def __init__(
        self,
        config: ServiceConfig,
        *,
        listeners: Mapping[str, Listener] | None = None,
        on_join: Callable[[str, Peer], object] | None = None,
        on_leave: Callable[[str, Peer], object] | None = None,
        journal: Journal | None = None,
        load: Callable[[], ServiceConfig] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.regions: dict[str, Served] = {}
        self._listeners = dict(listeners or {})
        self._on_join, self._on_leave = on_join, on_leave
        self._journal = journal
        self._section = Section(journal, records.SERVICE_SECTION)
        self._load = load
        self._next_number = 1
        self._change = threading.RLock()  # held during a change of what is served

    def open(self) -> None:
        """Open everything that the configuration names, or nothing, and let clients connect.

        Raises:
            ConfigError: it contradicts itself, or a region that a file names cannot be opened:
                __cause__ says why.
            OSError, ValueError: the same, where there is no file.
        """
        if found := conflicts(self.config):
            raise self.config.error("; ".join(found))
        self._note(records.SettingsRecord(self._common()))
        with contextlib.ExitStack() as undo:
            self._begin(self._open_all(self.config, self.config.regions, undo), undo)
            undo.pop_all()
        import_the_rest()

    # -- regions ----------------------------------------------------------------------------------

    def _open_all(
        self,
        config: ServiceConfig,
        regions: Mapping[str, RegionConfig],
        undo: contextlib.ExitStack,
    ) -> list[Served]:
        """Open these regions; no client can connect to them yet."""
        found = []
        for name, region in regions.items():
            with _told(config, name):
                opening = partial(open_region, region, self._listeners.get(region.socket))
                # Allocating all memory at once (prealloc) can take minutes.
                opened = self.to_thread(opening) if self.regions else opening()
                undo.callback(opened.close)
                served = self._serve(name, region, self._next_number, opened, _gate(region))
            undo.callback(served.close)
            found.append(served)
            self._next_number += 1
        return found

    def _serve(
        self, name: str, config: RegionConfig, number: int, opened: Opened, gate: Gate | None
    ) -> Served:
        server = RegionServer(
            opened.listener,
            opened.region,
            config.vectors,
            on_join=self._on_join and partial(self._on_join, name),
            on_leave=self._on_leave and partial(self._on_leave, name),
            gate=gate,
            journal=Section(self._journal, number),
            listen=False,
        )
        if config.hold_leaves:
            server.hold_leaves(True)
        return Served(name, config, number, server, opened)

    def _begin(self, opened: Iterable[Served], undo: contextlib.ExitStack) -> None:
        """Let clients connect."""
        for served in opened:
            Section(self._journal, served.number).keep(served.fds)
            self._note(served.record())
            self._adopt(served)
            undo.callback(self._end, served)
        for served in opened:
            self._listeners.pop(served.config.socket, None)
            served.listener.listen()

    def _adopt(self, served: Served) -> None:
        self.regions[served.name] = served
        self.watch(served.fd, partial(self._step, served))

    def _step(self, served: Served) -> None:
        try:
            served.server.step(0)
        except Exception:
            _log.exception("region %s failed, and is served no more", served.name)
            self._end(served)
            if not self.regions:
                _log.error("there is nothing left to serve")
                self.stop()
        if served.ended:
            self._close_region(served)
        if self._journal is not None and self._journal.long:
            self._journal.rewrite(self.snapshot())

    def _end(self, served: Served) -> None:
        """Stop serving a region. A part that fails is logged, and the rest is done."""
        if self.regions.get(served.name) is not served:
            return  # it has ended by itself
        with contextlib.suppress(OSError):  # somebody closed the server
            self.unwatch(served.fd)
        del self.regions[served.name]
        self._note(records.GoneRecord(served.number))
        Section(self._journal, served.number).drop()
        if served.server._in_step:
            served.ended = True
        else:
            self._close_region(served)

    def _close_region(self, served: Served) -> None:
        try:
            served.close()
        except Exception:
            _log.exception("not all of region %s could be closed", served.name)

    def bind_again(self, name: str) -> None:
        """Have a region's path, which leads elsewhere, lead to its server again.

        Raises:
            OSError: as of Listener.bind_again; nothing has changed.
        """
        served = self.regions[name]
        config, section = served.config, Section(self._journal, served.number)
        bind = partial(
            served.listener.bind_again,
            mode=config.mode,
            owner=config.owner,
            group=config.group,
            note=self._note_all,
        )
        served.server.relisten(bind)
        # A service manager that keeps copies of the descriptors has one of the old socket.
        section.drop()
        section.keep(served.fds)

    def _note(self, record: ServiceRecord) -> None:
        self._section.note(*records.encode(record))

    def _note_all(self) -> None:
        if self._journal is not None:
            self._journal.rewrite(self.snapshot())

    # -- changes ----------------------------------------------------------------------------------

    def reload(self) -> list[str]:
        """Read the configuration again and do what it says; a line for each change.

        Raises:
            ConfigError: there is none to read, or it cannot be served; nothing has changed.
            OSError: it cannot be read; nothing has changed.
            RuntimeError: as of `change`.
        """
        if self._load is None:
            raise ConfigError("there is no configuration to read again: serve --config FILE")
        return self.change(self._load())

    def change(self, config: ServiceConfig) -> list[str]:
        """Serve another configuration; a line for each change.

        Regions that are in both configurations stay as they are, with all their peers. Access rules
        and `keep` are changed in place; connected peers stay, even if the new rules would refuse
        them. While a new region is opened, which takes long if all its memory is allocated at the
        start, the loop serves the other regions.

        Raises:
            ConfigError: it cannot be served, or would change a region beyond that; or another
                change is under way. Nothing has changed.
            RuntimeError: another thread runs the service: see `soon`.
        """
        self._check_thread()
        if self.changing:
            raise ConfigError("another change is under way: ask again when it is done")
        with self._change:
            return self._do_change(config)

    @property
    def changing(self) -> bool:
        """Whether a change is under way, of which this is a part, or which this interrupts."""
        return is_mine(self._change)

    def _check_thread(self) -> None:
        self._check_process()
        if self._runner not in (0, threading.get_ident()):
            raise RuntimeError("another thread runs this service: have it do this, by soon()")

    def _do_change(self, config: ServiceConfig) -> list[str]:
        changes = plan(self.config, self._as_served(), config)
        altered = {name: config.regions[name] for name in changes.altered}
        with contextlib.ExitStack() as undo:
            gates = {}
            for name, region in altered.items():
                with _told(config, name):
                    gates[name] = _gate(region)
            opened = self._open_all(config, changes.added, undo)
            for name, region in altered.items():
                if not changes.altered[name].isdisjoint(_OF_THE_FILE):
                    self._permit(config, name, region, undo)
            self._begin(opened, undo)
            undo.pop_all()
        for name, region in altered.items():
            if name not in self.regions:
                continue  # it has failed since
            served = self.regions[name]
            served.config = region
            if not changes.altered[name].isdisjoint(RULES):  # a gate counts joins, so it stays
                served.server.set_gate(gates[name])
            if "hold_leaves" in changes.altered[name]:
                served.server.hold_leaves(region.hold_leaves)
            self._note(records.ConfigRecord(served.number, region._asdict()))
        for name in changes.removed:
            if name in self.regions:
                self._end(self.regions[name])
        self.config = config
        self.wake()
        return changes.lines()

    def _as_served(self) -> dict[str, RegionConfig]:
        return {
            name: served.config._replace(size=served.region.size)
            for name, served in self.regions.items()
        }

    def _permit(
        self,
        config: ServiceConfig,
        name: str,
        region: RegionConfig,
        undo: contextlib.ExitStack,
    ) -> None:
        """Change who can open a region's socket."""
        listener = self.regions[name].listener
        with _told(config, name):
            status = os.lstat(listener.path)
            before = {
                "mode": stat.S_IMODE(status.st_mode),
                "owner": status.st_uid,
                "group": status.st_gid,
            }
            undo.callback(_permit_again, listener, **before)
            listener.permit(
                mode=0o777 & ~_umask() if region.mode is None else region.mode,
                owner=os.geteuid() if region.owner is None else region.owner,
                group=os.getegid() if region.group is None else region.group,
            )

    # -- a successor ------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        """What a journal holds instead of all records up to now."""
        return {
            "next": self._next_number,
            "service": self._common(),
            "regions": [[r.record(), r.server.snapshot()] for r in self.regions.values()],
        }

    def _common(self) -> dict[str, Any]:
        """The settings of the configuration that are not of a region."""
        return {key: value for key, value in self.config._to_json().items() if key != "regions"}

    @property
    def descriptors(self) -> list[int]:
        """The numbers of those that the journal names."""
        found: list[int] = []
        for served in self.regions.values():
            found += served.fds
            found += served.server.descriptors
        return found

    def resume(self, journal: Journal, find: Find = lambda fd: fd) -> set[int]:
        """Continue where another process was whose journal this is.

        Args:
            journal: of that process; it may be this service's own.
            find: where the descriptors are here.

        Returns:
            The descriptors that were closed, of lost regions for instance. Their numbers may
            already belong to other files.

        Raises:
            JournalError: it is damaged, or of another version; nothing was done.
        """
        from . import snapshots  # here: a service that begins would listen later

        import_the_rest()
        history = snapshots.read(journal)
        snapshots.rehearse(history)
        self._next_number = history.next_number
        closed: set[int] = set()
        for each in history.regions.values():
            try:
                served = self._revive(each, find, closed)
            except ValueError as error:  # for good, unlike OSError: it was truncated, for instance
                _log.error("region %s is lost: %s", each.record.name, error)
                continue
            if served is not None:
                self._adopt(served)
        if not self.config.regions:
            self.config = history.config
        self.config = self.config._replace(
            regions={name: served.config for name, served in self.regions.items()}
        )
        if self._journal is not None:
            self._journal.rewrite(self.snapshot())
        return closed

    def _revive(self, past: RegionPast, find: Find, closed: set[int]) -> Served | None:
        """Serve a region again, or log why not; what is closed is added to `closed`.

        Raises:
            ValueError: the region is lost, and closed.
            OSError: it is not lost; the descriptor of its memory stays open for a next process.
        """
        record = past.record
        name, config = record.name, from_json(record.config)
        here, shared = find(record.listener), find(record.memory)
        listener = self._listeners.pop(config.socket, None)
        if listener is None and here is not None:
            listener = Listener.adopt(here, unlink=record.unlinks, file=record.file, begin=True)
        elif listener is not None and here not in (None, listener.socket.fileno()):
            os.close(here)  # a copy of it
            closed.add(here)
        if listener is None or shared is None:
            _log.error("region %s is lost: its socket or its memory was not handed over", name)
            if listener is not None:
                listener.close()
                closed.update(fd for fd in (here,) if fd is not None)
            return None
        region = None
        try:
            region = Region.from_fd(
                shared, source=record.source, name=record.source_name, keep_on_error=True
            )
            directory = None
            if config.has_directory:
                from ..peer.directory import Directory  # here: few regions have names

                with contextlib.suppress(NoDirectory):
                    directory = Directory.open(region)
            opened = Opened(listener, region, record.created, directory)
            gate = _former_gate(name, config)
            served = self._serve(name, config, record.number, opened, gate)
        except ValueError:
            listener.close()
            if region is None:
                os.close(shared)
            else:
                region.close()
            closed.update(fd for fd in (here, shared) if fd is not None)
            raise
        served.server.resume(past.state, past.records, past.unfinished, find)
        return served

    def let_go(self, *, back: bool = False) -> None:
        """Remove all regions from the journal: another process has them; `back`: put them back."""
        if self._journal is not None:
            state = self.snapshot()
            self._journal.rewrite(state if back else {**state, "regions": []})

    def take_stray(self, fd: int) -> None:
        """Let a connection join that was accepted and not noted yet; close any other descriptor."""
        try:
            sock = socket.socket(fileno=fd)
        except OSError:
            os.close(fd)
            return
        with contextlib.suppress(OSError):
            if sock.family == socket.AF_UNIX and sock.type == socket.SOCK_STREAM:
                path = path_of(sock)
                for served in self.regions.values():
                    if served.listener.path == path and sock.getpeername() is not None:
                        served.server.adopt(sock)
                        return
        sock.close()

    # -- the end ----------------------------------------------------------------------------------

    def close(self) -> None:
        """Disconnect all peers, remove sockets and names; may be called twice.

        Called in a step, it takes effect when that ends, or the change that is under way, and `run`
        returns.

        Raises:
            RuntimeError: another thread runs the service: let it `stop` first.
        """
        if os.getpid() != self._pid:
            self.abandon()
            return
        self._check_thread()
        if self.changing:
            self.soon(self.close)
            return
        for served in list(self.regions.values()):
            self._end(served)
        super().close()

    def abandon(self) -> None:
        """Close this process's copies without a sign to any peer: a successor has them, too."""
        for served in self.regions.values():
            self.unwatch(served.fd)
            served.abandon()
        self.regions.clear()
        super().close()

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _gate(config: RegionConfig) -> Gate | None:
    return config.rules().judge if config.restricts else None


def _former_gate(name: str, config: RegionConfig) -> Gate | None:
    """The gate of a region with peers: a rule whose user is gone refuses, and ends nothing."""
    try:
        return _gate(config)
    except ValueError as error:
        _log.error("region %s: all newcomers are refused: %s", name, error)

    repaired: list[Gate] = []

    def judge(who: Credentials, connected: int | None) -> Verdict:
        if not repaired:
            try:
                repaired.append(config.rules().judge)
            except ValueError as error:
                return Verdict(False, reason=str(error))
        return repaired[0](who, connected)

    return judge


def _permit_again(listener: Listener, **before: int) -> None:
    """Give the socket's file what it had. Why the change failed is told, and not why this fails."""
    with contextlib.suppress(OSError):
        listener.permit(**before)


@contextlib.contextmanager
def _told(config: ServiceConfig, name: str) -> Iterator[None]:
    """Add to an error which region of which file it is about, if there is a file."""
    if config.source is None:
        yield
        return
    try:
        yield
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise config.error(f"region.{name}: {where}{error.strerror or error}") from error
    except ValueError as error:
        raise config.error(f"region.{name}: {error}") from error


def _umask() -> int:
    """The process's umask; umask(2) could only be read by changing it."""
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    return 0o077
