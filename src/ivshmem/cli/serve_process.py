"""What a process of `ivshmem serve` or `ivshmem-server` does that serves.

Knows: all that is needed around a service: news, signals, a pid file, what went on before. Does not
know: how options are written.
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
from ..system import late_logging
from ..system.named_tuple import NamedTuple
from ..system.sockets import Listener
from ..text import counted
from . import daemon
from .arguments import check_no_region, region_of
from .log_writer import LogWriter, say_as, show, tell_peer
from .run import one_line

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from ..lasting.supervised import Supervision
    from ..service.succession import Inheritance

_log = late_logging.log_of("ivshmem.serve")

_FDS_OF_THE_SERVICE, _FDS_OF_A_REGION = 24, 8  # that are no peer's, about
_FEW_PEERS = 100

_TRIES = 3  # children that may be killed before they serve, until that is taken for a failure


def _check_restarts(options: argparse.Namespace, manager: Manager) -> None:
    """Refuse what cannot be, or is one too many."""
    if not options.fd_store:
        return
    for other in ("supervise", "takeover", "daemon"):
        if getattr(options, other):
            raise ValueError(f"--fd-store and --{other}: the service manager does that")
    if not manager.notifier.active:
        raise ValueError(
            "--fd-store is for a service manager, and there is none (NOTIFY_SOCKET is not set):"
            " use --supervise"
        )


def _seen_as(found: ServiceConfig, options: argparse.Namespace) -> ServiceConfig:
    """A configuration with what the command line says of all regions."""
    given = {
        "control": None if options.control is None else os.path.abspath(options.control),
        "metrics": options.metrics,
        "log_format": options.log_format,
    }
    return found._replace(**{k: v for k, v in given.items() if v is not None})


def planned_by(options: argparse.Namespace) -> ServePlan | None:
    """What the options say; None: they asked only what that is, and it has been printed.

    Raises:
        OSError, ValueError: nothing can be served that way.
    """
    manager = Manager.from_environment()
    _check_restarts(options, manager)
    if options.config is not None:
        check_no_region(options)
        load = partial(_load, options)
        going_on = options.fd_store and manager.journal is not None
        plan = planned_again(load) if going_on else ServePlan(load(), load)
        if options.check:
            # Here: only --check needs these.
            from .banner import planned
            from .config_checks import obstacles

            print(planned(plan.config))
            if wrong := list(obstacles(plan.config)):
                raise ValueError("; ".join(wrong))
            return None
    elif options.check:
        raise ValueError("--check says what is wrong in a file: give --config FILE, too")
    else:
        region = region_of(options, manager.only_path())
        plan = ServePlan(_seen_as(ServiceConfig({"ivshmem": region}), options))
    return _completed(plan, options, manager)


def _completed(plan: ServePlan, options: argparse.Namespace, manager: Manager) -> ServePlan:
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
    # Here, since no other process needs the parser of TOML.
    from ..service import config_file

    return _seen_as(config_file.load(os.path.abspath(options.config)), options)


# -- serving --------------------------------------------------------------------------------------


class ServePlan(NamedTuple):
    """What is to be served, and how the process is to be."""

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


def planned_again(load: Callable[[], ServiceConfig]) -> ServePlan:
    """The same; but nobody has asked for it, so what is served does not end if it is wrong."""
    try:
        return ServePlan(load(), load)
    except (OSError, ValueError) as error:
        return ServePlan(ServiceConfig(), load, notice=f"all stays as it was: {one_line(error)}")


def serve(plan: ServePlan, ready: Callable[[], None]) -> int:
    """Open everything, serve it until a signal says to end, and leave nothing behind."""
    daemon.raise_fd_limit()
    # Signals wait until there is something to stop, and again from the end on: what was made is
    # removed, whenever they come.
    with daemon.signals_held(for_good=True), plan.manager or Manager.from_environment() as manager:
        past = None
        if plan.takeover:
            # Here: a server that begins anew listens before it imports this (test_imports.py).
            from ..service.succession import Inheritance, take_over

            journal, _ = take_over(plan.config)
            past = Inheritance(journal, "asked for", config=plan.config, partly=plan.load is None)
        with (
            daemon.pid_file_of(
                plan.pid_file, partial(say_as, plan.config.log_format), going_on=past is not None
            ),
            LogWriter(sys.stderr, plan.level, plan.config.log_format) as news,
        ):
            if plan.notice:
                _log.error("%s", plan.notice)
            journal_kept = None
            if plan.fd_store:
                journal_kept, past = manager.keep(plan.config)
            return _serve(plan, manager, news, ready, journal=journal_kept, past=past)


def serve_kept(
    options: argparse.Namespace, kept: Supervision, deaths: list[str], ready: Callable[[], None]
) -> int:
    """Do that in a child of a supervisor; go on where an earlier child was, if one was.

    Args:
        deaths: what became of the earlier ones.
    """
    # Here: a server that begins anew listens before it imports this (test_imports.py).
    from ..service import snapshots
    from ..service.succession import past_of

    if not (deaths and kept.announced):
        return _serve_kept_first(options, kept, Journal(kept.fd), deaths, ready)
    journal = Journal(kept.fd)
    past = past_of(kept, journal)
    config = snapshots.read(journal).config
    load = None if options.config is None else partial(_load, options)
    plan = ServePlan(config) if load is None else planned_again(load)
    plan = _completed(plan._replace(config=config), options, Manager.of_successor())
    return _serve_child(plan, kept, journal, past, deaths, ready)


def _serve_kept_first(
    options: argparse.Namespace,
    kept: Supervision,
    journal: Journal,
    deaths: list[str],
    ready: Callable[[], None],
) -> int:
    """The same, where no child has opened all that is to be served."""
    # Here: a server that begins anew listens before it imports this (test_imports.py).
    from ..service import snapshots
    from ..service.succession import Inheritance, past_of

    past = past_of(kept, journal) if deaths else None
    plan = planned_by(options)
    assert plan is not None
    if past is not None and not snapshots.read(journal).descriptors:
        past = None
    if past is not None:
        # The regions that were not open yet.
        past = past._replace(config=plan.config, partly=options.takeover and plan.load is None)
    elif options.takeover and not deaths:
        past = Inheritance(journal, "asked for", config=plan.config, partly=plan.load is None)
    elif len(deaths) >= _TRIES:
        _remove_stale(plan.config)
        raise IvshmemError(
            f"{deaths[-1]}, and so did {len(deaths) - 1} before it, while they started: choose a"
            " smaller --size if memory is short"
        )
    return _serve_child(plan, kept, journal, past, deaths, ready)


def _serve_child(
    plan: ServePlan,
    kept: Supervision,
    journal: Journal,
    past: Inheritance | None,
    deaths: list[str],
    ready: Callable[[], None],
) -> int:
    with (
        plan.manager or Manager.of_successor() as manager,
        LogWriter(sys.stderr, plan.level, plan.config.log_format) as news,
    ):
        if deaths:
            _log.error("%s: another goes on", deaths[-1])
        if plan.notice:
            _log.error("%s", plan.notice)
        return _serve(plan, manager, news, ready, journal=journal, past=past, kept=kept)


def _remove_stale(config: ServiceConfig) -> None:
    """Leave no socket where children were killed that had bound some."""
    from ..service import control_client  # here: only a start that failed needs it

    paths = [region.socket for region in config.regions.values()]
    paths += [config.control or control_client.default_path(path) for path in paths[:1]]
    for path in paths:
        with contextlib.suppress(OSError):
            Listener(path).close()


def _serve(
    plan: ServePlan,
    manager: Manager,
    news: LogWriter,
    ready: Callable[[], None],
    *,
    journal: Journal | None,
    past: Inheritance | None,
    kept: Supervision | None = None,
) -> int:
    """Serve; `past`: what another process was serving."""
    if manager.warning:
        _log.warning("%s", manager.warning)
    given: list[socket.socket] = []
    with (
        Service(
            plan.config,
            listeners=manager.for_regions(plan.config),
            on_join=None if plan.quiet else partial(_tell_peer, plan, news, "joined"),
            on_leave=None if plan.quiet else partial(_tell_peer, plan, news, "left"),
            journal=journal,
            load=plan.load,
        ) as service,
        _unharmed(plan, service, past, kept),
    ):
        if past is None:
            service.open()
        # Somebody can connect from now on, and need not wait for the rest to be imported. (Where
        # there is a past, its peers' descriptors can leave none to read modules by: import first.)
        from ..service.observability import observable
        from ..service.succession import handing_over, replacing
        from .banner import banner

        _tell_fd_limit(plan.config)
        if past:
            from ..service import snapshots  # here: a server that begins anew needs none

            expected = bool(snapshots.read(past.journal).descriptors)
            past.go_on(service)
            if past.journal is not journal:
                past.journal.close()
            if kept and not service.regions:
                _log.warning("there is nothing to go on with")
                return 1 if expected else 0  # else another process goes on, which asked for it
        with observable(
            service,
            needed=past is None,
            controlled=plan.controlled,
            control_needed=plan.control_needed,
            peers=plan.metrics_peers,
            hosts=plan.metrics_hosts,
            handlers={"takeover": handing_over(service, given)},
        ):
            if not (kept and kept.announced):
                try:
                    show(banner(service, kept.parent if kept else os.getpid()))
                except OSError as error:
                    # The server serves also if stdout is a full disk or a terminal that is gone.
                    if past is None:
                        _log.warning(
                            "serving, but nothing can be shown: stdout: %s", one_line(error)
                        )
            if kept:
                kept.announce()
                kept.reserve()
            ready()
            if past is None:
                _tell_of_removed(service)
            with (
                _reloading(service, plan, manager) as reload,
                replacing(kept, service),
                keeping(manager, service),
                telling(manager.notifier, service),
                daemon.ended_by_signals(service.stop, reload),
                supervisor.left_to_another(partial(say_as, plan.config.log_format))
                if kept
                else contextlib.nullcontext(),
            ):
                service.run()
        failed = not service.regions  # the last one, too: the log has said how
        if given or plan.fd_store:
            service.abandon()
    for sock in given:
        sock.close()  # by which the other knows that all is its own
    return 1 if failed else 0


@contextlib.contextmanager
def _unharmed(
    plan: ServePlan, service: Service, past: Inheritance | None, kept: Supervision | None
) -> Iterator[None]:
    """If this process cannot go on where another was, leave all to the next one."""
    if past is None:
        yield
    elif kept:
        with supervisor.left_to_another(
            partial(say_as, plan.config.log_format)
        ):  # what it has is the parent's, too
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
    """What SIGHUP is to do: read the file again, in the loop; None: what SIGTERM does."""
    if plan.load is None or daemon.has_terminal():
        yield None
        return
    wanted = descriptors.FdArray.eventfds(1)

    def act() -> None:
        wanted.drain(0)
        if service.changing:  # this comes while another reload waits for memory
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


def _tell_of_removed(service: Service) -> None:
    """Warn of names that were made now while other memory that had them is still shared.

    systemd's RemoveIPC= removes names at a logout, for instance, and the processes that share the
    memory do not notice. It cannot get its name back: the kernel links no file that has lost all.
    """
    for server in service.regions.values():
        if server.region.source != "posix" or not (path := server.region.path):
            continue
        if pids := holders_of_removed(path):
            _log.warning(
                "%s was made anew: process %s still shares the memory that had this name before,"
                " and sees nothing of this one: end it, or choose another --name",
                path,
                " and ".join(map(str, pids)),
            )


def _tell_peer(plan: ServePlan, news: LogWriter, verb: str, region: str, peer: Peer) -> None:
    several = plan.load is not None or len(plan.config.regions) > 1  # or can become several
    tell_peer(news, verb, peer, region if several else "")


def _tell_fd_limit(config: ServiceConfig) -> None:
    """Say for how many peers that is enough; as a warning if they are few."""
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
