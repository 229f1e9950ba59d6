"""The process of `ivshmem serve` or `ivshmem-server` that serves: what it does from start to end.

    serve_process  this: plan, open, serve until a signal, close, or leave all to a successor
    serve          the options, and which process does what
    supervise      the small parent of such processes (--supervise)
    daemon         how a process goes into the background

Knows: all that surrounds a service: the log, signals, the pid file, what another process served
before. Does not know: how options are written (serve.py, compat.py).
"""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import sys
from collections.abc import Callable, Iterator
from functools import partial

from ..errors import IvshmemError
from ..lasting import supervisor
from ..lasting.journal import Journal
from ..native import descriptors
from ..server import log_events
from ..server.report import Peer
from ..service.config import ServiceConfig
from ..service.managed import Manager, keeping, telling
from ..service.open_region import holders_of_removed
from ..service.service import Service
from ..system import late_logging, systemd
from ..system.listener import Listener
from ..system.named_tuple import NamedTuple
from ..text import counted
from . import daemon, pid_file, signals
from .arguments import check_no_region, region_of
from .log_writer import LogWriter, say_as, tell_peer
from .run import fail, one_line, write_errors_as
from .writing import show

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from ..lasting.supervised import Supervision
    from ..service.succession import Inheritance

_log = late_logging.log_of("ivshmem.serve")

_FDS_OF_THE_SERVICE, _FDS_OF_A_REGION = 24, 8  # roughly, without those of peers
_FDS_TO_START = 18  # to open one region and its control socket, and to import what that needs
_FEW_PEERS = 100

_TRIES = 3  # children that are killed before they serve, until the start has failed


def _check_restarts(options: argparse.Namespace, manager: Manager) -> None:
    """Refuse --fd-store without a service manager, and with what that manager does itself."""
    if not options.fd_store:
        return
    for other in ("supervise", "takeover", "daemon"):
        if getattr(options, other):
            raise ValueError(
                f"--fd-store is not allowed with --{other}: the service manager does that"
            )
    if not manager.notifier.active:
        raise ValueError(
            "--fd-store needs a service manager, and none has started this process (NOTIFY_SOCKET"
            " is not set): use --supervise"
        )


def _configured(found: ServiceConfig, options: argparse.Namespace) -> ServiceConfig:
    """A configuration with what the command line says about all regions."""
    given = {
        "control": None if options.control is None else os.path.abspath(options.control),
        "metrics": options.metrics,
        "log_format": options.log_format,
    }
    return found._replace(**{k: v for k, v in given.items() if v is not None})


def plan_of(options: argparse.Namespace, manager: Manager | None = None) -> ServePlan | None:
    """Return what the options say; None after --check, which has printed it.

    Args:
        manager: of this process; None: as the environment says.

    Raises:
        OSError, ValueError: nothing can be served that way.
    """
    manager = manager or Manager.from_environment()
    _check_restarts(options, manager)
    if options.config is not None:
        check_no_region(options)
        load = partial(_load, options)
        continues = options.fd_store and manager.journal is not None
        plan = plan_of_successor(load) if continues else ServePlan(load(), load)
        if options.check:
            # Here: only --check needs these.
            from .banner import planned
            from .config_checks import obstacles

            print(planned(plan.config))
            if wrong := list(obstacles(plan.config)):
                raise ValueError("; ".join(wrong))
            return None
    elif options.check:
        raise ValueError("--check needs --config FILE")
    else:
        region = region_of(options, manager.only_path())
        plan = ServePlan(_configured(ServiceConfig({"ivshmem": region}), options))
    return _completed(plan, options, manager)


def _completed(plan: ServePlan, options: argparse.Namespace, manager: Manager) -> ServePlan:
    write_errors_as(plan.config.log_format)
    return plan._replace(
        controlled=not options.no_control,
        metrics_peers=options.metrics_peers,
        metrics_hosts=tuple(options.metrics_host),
        pid_file=options.pid_file,
        quiet=options.quiet,
        level=late_logging.DEBUG if options.verbose else late_logging.INFO,
        manager=manager,
        fd_store=options.fd_store,
        takeover=options.takeover,
    )


def _load(options: argparse.Namespace) -> ServiceConfig:
    # Here: only --config needs the parser of TOML.
    from ..service import config_file

    return _configured(config_file.load(os.path.abspath(options.config)), options)


# -- serving --------------------------------------------------------------------------------------


class ServePlan(NamedTuple):
    """What to serve, and how the process behaves."""

    config: ServiceConfig
    load: Callable[[], ServiceConfig] | None = None
    controlled: bool = True
    control_needed: bool = True
    metrics_peers: bool = False
    metrics_hosts: tuple[str, ...] = ()
    pid_file: str | None = None
    quiet: bool = False
    level: int = late_logging.INFO
    manager: Manager | None = None
    fd_store: bool = False
    takeover: bool = False
    notice: str = ""


def plan_of_successor(load: Callable[[], ServiceConfig]) -> ServePlan:
    """Return the plan of a successor. It serves on even if the configuration is wrong by now."""
    try:
        return ServePlan(load(), load)
    except (OSError, ValueError) as error:
        return ServePlan(
            ServiceConfig(),
            load,
            notice=f"the configuration is not applied, all stays as it was: {one_line(error)}",
        )


def plan_and_serve(options: argparse.Namespace, ready: Callable[[], None]) -> int:
    """Serve as the options say, and return the exit status.

    The service manager hears why a first start fails, and by the exit status, that another try is
    of no use. A process that continues where another was ends with 1: it is worth another try,
    because the manager still has the peers.
    """
    address = systemd.address()
    manager = Manager.from_environment()
    began = not manager.notifier.active or manager.journal is not None

    def begun() -> None:
        nonlocal began
        began = True
        ready()

    try:
        with contextlib.ExitStack() as unplanned:
            unplanned.enter_context(manager)
            plan = plan_of(options, manager)
            if plan is None:
                return 0
            unplanned.pop_all()
        return serve(plan, begun)
    except (IvshmemError, OSError, ValueError, OverflowError) as error:
        if began:
            raise
        fail(error)
        with contextlib.suppress(OSError), systemd.Notifier(address) as notifier:
            notifier.status(one_line(error))
        return systemd.EXIT_FIRST_START


def serve(plan: ServePlan, ready: Callable[[], None]) -> int:
    """Open everything, serve it until a signal ends that, and leave nothing behind."""
    daemon.raise_fd_limit()
    # Signals are held back until there is something to stop, and again when the end has begun: so
    # what was made is removed, whenever they come.
    with signals.held(for_good=True), plan.manager or Manager.from_environment() as manager:
        inherited = None
        if plan.takeover:
            # Here: a new server listens before it imports this (test_imports.py).
            from ..service.succession import Inheritance, take_over

            journal, _ = take_over(plan.config)
            inherited = Inheritance(
                journal, "asked for", config=plan.config, partly=plan.load is None
            )
        with (
            pid_file.held_by_server(
                plan.pid_file,
                partial(say_as, plan.config.log_format),
                is_successor=inherited is not None,
            ),
            LogWriter(sys.stderr, plan.level, plan.config.log_format),
        ):
            if plan.notice:
                _log.error("%s", plan.notice)
            journal_kept = None
            if plan.fd_store:
                journal_kept, inherited = manager.keep(plan.config)
            return _serve(plan, manager, ready, journal=journal_kept, inherited=inherited)


def serve_supervised(
    options: argparse.Namespace,
    supervision: Supervision,
    deaths: list[str],
    ready: Callable[[], None],
) -> int:
    """Serve in a child of a supervisor; continue where an earlier child was, if there was one.

    Args:
        deaths: how the earlier children ended.
    """
    # Here: a new server listens before it imports this (test_imports.py).
    from ..service import snapshots
    from ..service.succession import past_of

    if not (deaths and supervision.announced):
        return _serve_first(options, supervision, Journal(supervision.fd), deaths, ready)
    journal = Journal(supervision.fd)
    inherited = past_of(supervision, journal)
    config = snapshots.read(journal).config
    load = None if options.config is None else partial(_load, options)
    plan = ServePlan(config) if load is None else plan_of_successor(load)
    plan = _completed(plan._replace(config=config), options, Manager.of_successor())
    return _serve_child(plan, supervision, journal, inherited, deaths, ready)


def _serve_first(
    options: argparse.Namespace,
    supervision: Supervision,
    journal: Journal,
    deaths: list[str],
    ready: Callable[[], None],
) -> int:
    """Serve where no earlier child has opened all regions."""
    # Here: a new server listens before it imports this (test_imports.py).
    from ..service import snapshots
    from ..service.succession import Inheritance, past_of

    inherited = past_of(supervision, journal) if deaths else None
    plan = plan_of(options)
    assert plan is not None
    if inherited is not None and not snapshots.read(journal).descriptors:
        inherited = None
    if inherited is not None:
        # With the regions that the earlier child had not opened yet.
        inherited = inherited._replace(
            config=plan.config, partly=options.takeover and plan.load is None
        )
    elif options.takeover and not deaths:
        inherited = Inheritance(journal, "asked for", config=plan.config, partly=plan.load is None)
    elif len(deaths) >= _TRIES:
        _remove_stale(plan.config)
        raise IvshmemError(
            f"{deaths[-1]}, as did {len(deaths) - 1} before it, during the start: choose a"
            " smaller --size if memory is short"
        )
    return _serve_child(plan, supervision, journal, inherited, deaths, ready)


def _serve_child(
    plan: ServePlan,
    supervision: Supervision,
    journal: Journal,
    inherited: Inheritance | None,
    deaths: list[str],
    ready: Callable[[], None],
) -> int:
    with (
        plan.manager or Manager.of_successor() as manager,
        LogWriter(sys.stderr, plan.level, plan.config.log_format),
    ):
        if deaths:
            _log.error("%s: a new one continues", deaths[-1])
        if plan.notice:
            _log.error("%s", plan.notice)
        return _serve(
            plan,
            manager,
            ready,
            journal=journal,
            inherited=inherited,
            supervision=supervision,
        )


def _remove_stale(config: ServiceConfig) -> None:
    """Remove the sockets that killed children had bound."""
    from ..service import control_client  # here: only a start that failed needs it

    paths = [region.socket for region in config.regions.values()]
    paths += [config.control or control_client.default_path(path) for path in paths[:1]]
    for path in paths:
        with contextlib.suppress(OSError):
            Listener(path).close()


def _serve(
    plan: ServePlan,
    manager: Manager,
    ready: Callable[[], None],
    *,
    journal: Journal | None,
    inherited: Inheritance | None,
    supervision: Supervision | None = None,
) -> int:
    """Serve what the plan says, or continue with `inherited`, what another process served."""
    if manager.warning:
        _log.warning("%s", manager.warning)
    handed_over: list[socket.socket] = []
    with (
        Service(
            plan.config,
            listeners=manager.for_regions(plan.config),
            on_join=None if plan.quiet else partial(_log_peer, plan, "joined"),
            on_leave=None if plan.quiet else partial(_log_peer, plan, "left"),
            journal=journal,
            load=plan.load,
        ) as service,
        _left_to_next_on_error(plan, service, inherited, supervision),
    ):
        if inherited is None:
            _check_descriptors(plan)
            service.open()
        # Here: clients can connect from now on, and need not wait for these imports. (A successor
        # imports first: its peers' descriptors can leave none to read modules by.)
        from ..service.observability import observable
        from ..service.succession import handing_over, replacing
        from .banner import banner

        _log_fd_limit(plan.config)
        if inherited:
            from ..service import snapshots  # here: a new server needs none

            expected = bool(snapshots.read(inherited.journal).descriptors)
            inherited.go_on(service)
            if inherited.journal is not journal:
                inherited.journal.close()
            if supervision and not service.regions:
                _log.warning("there is nothing to continue with: no region is left")
                return 1 if expected else 0  # 0: another process has taken over
        with observable(
            service,
            needed=inherited is None,
            controlled=plan.controlled,
            control_needed=plan.control_needed,
            peers=plan.metrics_peers,
            hosts=plan.metrics_hosts,
            handlers={"takeover": handing_over(service, handed_over)},
        ):
            if not (supervision and supervision.announced):
                try:
                    show(banner(service, supervision.parent if supervision else os.getpid()))
                except OSError as error:
                    # The server serves also if stdout is a full disk or a terminal that is gone.
                    if inherited is None:
                        _log.warning("serving, but stdout cannot be written: %s", one_line(error))
            if supervision:
                supervision.announce()
                supervision.reserve()
            ready()
            if inherited is None:
                _warn_of_removed_names(service)
            with (
                _reloading(service, plan, manager) as reload,
                replacing(supervision, service),
                keeping(manager, service),
                telling(manager.notifier, service),
                signals.calling(service.stop, reload),
                supervisor.left_to_another(partial(say_as, plan.config.log_format))
                if supervision
                else contextlib.nullcontext(),
            ):
                service.run()
        failed = not service.regions  # the last one has failed, too: the log says how
        if handed_over or plan.fd_store:
            service.abandon()
    for sock in handed_over:
        sock.close()  # this tells the other process that it has taken over
    return 1 if failed else 0


def _check_descriptors(plan: ServePlan) -> None:
    """Raise EMFILE before anybody can connect, if there are too few descriptors to serve at all."""
    regions = len(plan.config.regions)
    needed = _FDS_TO_START + _FDS_OF_A_REGION * (regions - 1)
    descriptors.FdArray.eventfds(needed).close()


@contextlib.contextmanager
def _left_to_next_on_error(
    plan: ServePlan,
    service: Service,
    inherited: Inheritance | None,
    supervision: Supervision | None,
) -> Iterator[None]:
    """If this process cannot continue where another was, leave all to the next one."""
    if inherited is None:
        yield
    elif supervision:
        with supervisor.left_to_another(
            partial(say_as, plan.config.log_format)
        ):  # the parent has all descriptors, too
            yield
    else:
        try:
            yield
        except Exception:
            service.abandon()
            raise


@contextlib.contextmanager
def _reloading(
    service: Service, plan: ServePlan, manager: Manager
) -> Iterator[Callable[[], object] | None]:
    """Yield what SIGHUP does: read the file again, in the loop; None: the same as SIGTERM."""
    if plan.load is None or signals.has_terminal():
        yield None
        return
    wanted = descriptors.FdArray.eventfds(1)

    def act() -> None:
        wanted.drain(0)
        if service.changing:  # another reload is waiting for memory
            service.soon(act)
            return
        manager.notifier.reloading()
        try:
            changes = service.reload()
        except (OSError, ValueError) as error:
            reason = one_line(error)
            told = log_events.fields("unreloaded", reason=reason)
            _log.error("not reloaded, nothing has changed: %s", reason, extra=told)
        else:
            told = log_events.fields("reloaded", changes=changes)
            _log.warning("reloaded: %s", "; ".join(changes) or "nothing has changed", extra=told)
        manager.notifier.ready()

    service.watch(wanted[0], act)
    try:
        yield lambda: wanted.signal(0)
    finally:
        service.unwatch(wanted[0])
        wanted.close()


def _warn_of_removed_names(service: Service) -> None:
    """Warn if a name is new while processes still share other memory that had it before.

    systemd's RemoveIPC= removes names at a logout, for instance, and the processes that share the
    memory do not notice. That memory cannot get its name back: the kernel does not link a file
    whose last name is gone.
    """
    for server in service.regions.values():
        if server.region.source != "posix" or not (path := server.region.path):
            continue
        if pids := holders_of_removed(path):
            _log.warning(
                "%s is new: process %s still shares the memory that had this name before, not"
                " this memory: end that process, or choose another --name",
                path,
                " and ".join(map(str, pids)),
            )


def _log_peer(plan: ServePlan, verb: str, region: str, peer: Peer) -> None:
    several = plan.load is not None or len(plan.config.regions) > 1  # or can become several
    tell_peer(verb, peer, region if several else "")


def _log_fd_limit(config: ServiceConfig) -> None:
    """Log for how many peers the limit of descriptors is enough; as a warning if they are few."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    vectors = max((region.vectors for region in config.regions.values()), default=1)
    free = max(limit - _FDS_OF_THE_SERVICE - _FDS_OF_A_REGION * len(config.regions), 0)
    peers = free // (1 + vectors)
    _log.log(
        late_logging.WARNING if peers < _FEW_PEERS else late_logging.DEBUG,
        "RLIMIT_NOFILE is %d: enough for about %s of %s",
        limit,
        counted(peers, "peer"),
        counted(vectors, "vector"),
        extra=log_events.fields("limit", limit=limit, peers=peers, vectors=vectors),
    )
