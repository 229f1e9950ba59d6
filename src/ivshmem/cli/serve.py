"""`ivshmem serve`: the server, in the foreground, for a person or for an init system."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import os
import resource
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from .. import _fds, config, configfile, keeper, logs
from ..config import ServiceConfig
from ..engine import Peer
from ..journal import Journal
from ..plain import paragraph
from ..service import Service, former
from . import daemon
from .arguments import add_region, check_no_region, region_of
from .banner import banner, count, planned
from .managed import Manager, telling
from .news import News, json_line, tell_peer
from .seen import seen
from .succession import Kept, Past, Taken, handing_over, replacing, reserved, take_over

_log = logging.getLogger("ivshmem.serve")

_FDS_OF_THE_SERVICE, _FDS_OF_A_REGION = 24, 8  # that are no peer's, about
_FEW_PEERS = 100

_PATIENCE = 5.0  # seconds that a server which was taken over from may take to end


def add_to(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "serve",
        help="run the server that guests and clients connect to",
        description="Run an ivshmem server in the foreground. At start it prints the lines to paste"
        " into QEMU and libvirt; then a line for each peer that joins or leaves.",
        epilog="SIZE is a power of two: bytes, or a number with K, M, G or T, such as 4M. The"
        " memory is anonymous unless --name, --file or --directory says where it comes from.",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="serve the regions that a TOML file names, and read it again on SIGHUP; see README",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="only say what the file would have served, or what is wrong in it",
    )
    add_region(parser)
    process = parser.add_argument_group("the process")
    process.add_argument(
        "--supervise",
        action="store_true",
        help="as a child of a small parent: if the child is killed, another goes on, and no peer"
        " notices",
    )
    process.add_argument(
        "--fd-store",
        action="store_true",
        help="have the service manager keep all descriptors (systemd: FileDescriptorStoreMax=): if"
        " the server is killed or restarted, it goes on, and no peer notices",
    )
    process.add_argument(
        "--takeover",
        action="store_true",
        help="go on where the server that runs here is, with its peers, and let that one end; what"
        " no option says stays",
    )
    looks = parser.add_argument_group("being seen")
    place = looks.add_mutually_exclusive_group()
    place.add_argument(
        "--control",
        metavar="PATH",
        help="the socket for `ivshmem status`, `top`, `evict` and `reload` (default: the first"
        " region's with .control behind it)",
    )
    place.add_argument("--no-control", action="store_true", help="have none")
    looks.add_argument(
        "--metrics",
        metavar="[HOST:]PORT",
        help="serve metrics for Prometheus there, at /metrics (HOST is 127.0.0.1 by default)",
    )
    looks.add_argument(
        "--metrics-peers", action="store_true", help="metrics of each peer, too: many series"
    )
    looks.add_argument(
        "--log-format",
        choices=config.LOG_FORMATS,
        help="lines for people (the default), or a JSON object on each",
    )
    process.add_argument("-p", "--pid-file", metavar="PATH", help="to lock and write the pid to")
    process.add_argument("-F", "--foreground", action="store_true", help="stay (the default)")
    process.add_argument("--daemon", action="store_true", help="go into the background once ready")
    process.add_argument("-v", "--verbose", action="store_true", help="tell more")
    process.add_argument(
        "-q", "--quiet", action="store_true", help="say nothing of joins and leaves"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Serve as the options say, until a signal."""
    inherited = keeper.inherited()
    manager = Manager.from_environment()
    _check_restarts(options, manager)
    if options.config is not None:
        check_no_region(options)
        load = partial(_load, options)
        going_on = inherited is not None or (options.fd_store and manager.journal is not None)
        plan = _planned_again(load) if going_on else Plan(load(), load)
        if options.check:
            print(planned(plan.config))
            return 0
    elif options.check:
        raise ValueError("--check says what is wrong in a file: give --config FILE, too")
    else:
        region = region_of(options, manager.only_path())
        plan = Plan(_seen_as(ServiceConfig({"ivshmem": region}), options))
    plan.controlled = not options.no_control
    plan.metrics_peers = options.metrics_peers
    plan.pid_file = options.pid_file
    plan.quiet = options.quiet
    plan.level = logging.DEBUG if options.verbose else logging.INFO
    plan.manager = manager
    plan.fd_store = options.fd_store
    plan.supervise = options.supervise
    plan.takeover = options.takeover
    plan.inherited = inherited
    if options.daemon and not options.foreground and not plan.inherited:
        from . import guarded  # here, for the package imports this module

        return daemon.in_background(
            partial(guarded, partial(serve, plan)), silent=not options.verbose
        )
    return serve(plan, lambda: None)


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
    return dataclasses.replace(found, **{k: v for k, v in given.items() if v is not None})


def _load(options: argparse.Namespace) -> ServiceConfig:
    return _seen_as(configfile.load(os.path.abspath(options.config)), options)


# -- serving --------------------------------------------------------------------------------------


@dataclass
class Plan:
    """What is to be served, and how the process is to be."""

    config: ServiceConfig
    load: Callable[[], ServiceConfig] | None = None
    controlled: bool = True
    control_needed: bool = True
    metrics_peers: bool = False
    pid_file: str | None = None
    quiet: bool = False
    level: int = logging.INFO
    manager: Manager | None = None
    fd_store: bool = False
    supervise: bool = False
    takeover: bool = False
    inherited: tuple[int, set[int]] | None = None
    notice: str = ""


def _planned_again(load: Callable[[], ServiceConfig]) -> Plan:
    """The same; but nobody has asked for it, so what is served does not end if it is wrong."""
    from . import one_line  # here, for the package imports this module

    try:
        return Plan(load(), load)
    except (OSError, ValueError) as error:
        return Plan(ServiceConfig(), load, notice=f"all stays as it was: {one_line(error)}")


def serve(plan: Plan, ready: Callable[[], None]) -> int:
    """Open everything, serve it until a signal says to end, and leave nothing behind."""
    _raise_fd_limit()
    # Signals wait until there is something to stop, and again from the end on: what was made is
    # removed, whenever they come.
    with daemon.signals_held(), plan.manager or Manager.from_environment() as manager:
        taken = take_over(plan.config) if plan.takeover and not plan.inherited else None
        with _pid_file(plan, going_on=taken is not None or plan.inherited is not None):
            if not plan.supervise:
                if plan.notice:
                    _tell(plan, plan.notice)
                return _serve(plan, manager, ready, taken=taken)
            from . import guarded  # here, for the package imports this module

            fd, theirs = plan.inherited or (None, set())
            journal, theirs = taken or (Journal(fd), theirs)
            if plan.notice:
                plan.config = former(journal)
                _tell(plan, plan.notice)
            kept = Kept(journal, os.getpid(), set(keeper.strays(())) - theirs)
            return keeper.keep(
                lambda again: guarded(
                    _serve, plan, manager, ready, kept, again, None if again else taken
                ),
                daemon.ENDING,
                again=plan.inherited is not None,
                tell=partial(_tell, plan),
            )


@contextlib.contextmanager
def _pid_file(plan: Plan, *, going_on: bool) -> Iterator[None]:
    """Hold the pid file; who goes on with peers that are there does without it, if it must."""
    from . import one_line  # here, for the package imports this module

    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(daemon.pid_file(plan.pid_file, _PATIENCE if going_on else 0.0))
        except OSError as error:
            if not going_on:
                raise
            _tell(plan, f"no pid file: {one_line(error)}")
        yield


def _tell(plan: Plan, text: str) -> None:
    """Say something where there is no News."""
    line = paragraph(f"ivshmem: {text}")
    if plan.config.log_format == "json":
        fields = logs.fields_in({})
        line = json_line(time.time(), logging.ERROR, paragraph(text[-2000:]), fields)
    keeper.say(line)


def _serve(
    plan: Plan,
    manager: Manager,
    ready: Callable[[], None],
    kept: Kept | None = None,
    again: bool = False,
    taken: Taken | None = None,
) -> int:
    """Serve; `again`: go on where another child was; `taken`: where another server was."""
    past = None
    if again and kept:
        past = kept.past()
    elif taken:
        past = Past(taken[0], "asked for", config=plan.config, partly=plan.load is None)
    given: list[socket.socket] = []
    with News(sys.stderr, plan.level, plan.config.log_format) as news:
        journal = kept.journal if kept else None
        if plan.fd_store:
            journal, past = manager.keep(plan.config)
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
            _tell_fd_limit(plan.config)
            if past:
                past.go_on(service)
                if past.journal is not journal:
                    past.journal.close()
                if again and not service.regions:
                    _log.warning("there is nothing to go on with")
                    return 0
            else:
                service.open()
            with seen(
                service,
                needed=past is None,
                controlled=plan.controlled,
                control_needed=plan.control_needed,
                peers=plan.metrics_peers,
                handlers={"takeover": handing_over(service, given)},
            ):
                if not (again and kept):
                    with contextlib.suppress(*([OSError] if past else [])):
                        print(banner(service, kept.parent if kept else os.getpid()), flush=True)
                    ready()
                with (
                    _reloading(service, plan, manager) as reload,
                    replacing(kept, service),
                    reserved(kept),
                    telling(manager.notifier, service),
                    daemon.ended_by_signals(service.stop, reload),
                    keeper.left_to_another(partial(_tell, plan))
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
def _unharmed(plan: Plan, service: Service, past: Past | None, kept: Kept | None) -> Iterator[None]:
    """If this process cannot go on where another was, leave all to the next one."""
    if past is None:
        yield
    elif kept:
        with keeper.left_to_another(partial(_tell, plan)):  # what it has is the parent's, too
            yield
    else:
        try:
            yield
        except Exception:
            service.abandon()
            raise


@contextlib.contextmanager
def _reloading(
    service: Service, plan: Plan, manager: Manager
) -> Iterator[Callable[[], object] | None]:
    """What SIGHUP is to do: read the file again, in the loop; None: what SIGTERM does."""
    if plan.load is None or daemon.has_terminal():
        yield None
        return
    from . import one_line  # here, for the package imports this module

    wanted = _fds.FdArray.eventfds(1)

    def act() -> None:
        wanted.drain(0)
        manager.notifier.reloading()
        try:
            changes = service.reload()
        except (OSError, ValueError) as error:
            reason = one_line(error)
            told = logs.fields("unreloaded", reason=reason)
            _log.error("not reloaded, nothing has changed: %s", reason, extra=told)
        else:
            told = logs.fields("reloaded", changes=changes)
            _log.warning("reloaded: %s", "; ".join(changes) or "nothing has changed", extra=told)
        manager.notifier.ready()

    service.watch(wanted[0], act)
    try:
        yield lambda: wanted.signal(0)
    finally:
        service.unwatch(wanted[0])
        wanted.close()


def _tell_peer(plan: Plan, news: News, verb: str, region: str, peer: Peer) -> None:
    several = plan.load is not None or len(plan.config.regions) > 1  # or can become several
    tell_peer(news, verb, peer, region if several else "")


def _raise_fd_limit() -> None:
    """A server holds a socket and its vectors for each peer; the usual 1,024 is soon too few."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _tell_fd_limit(config: ServiceConfig) -> None:
    """Say for how many peers that is enough; as a warning if they are few."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    vectors = max((region.vectors for region in config.regions.values()), default=1)
    free = max(limit - _FDS_OF_THE_SERVICE - _FDS_OF_A_REGION * len(config.regions), 0)
    peers = free // (1 + vectors)
    _log.log(
        logging.WARNING if peers < _FEW_PEERS else logging.DEBUG,
        "RLIMIT_NOFILE is %d: enough for about %d peers of %s",
        limit,
        peers,
        count(vectors),
        extra=logs.fields("limit", limit=limit, peers=peers, vectors=vectors),
    )
