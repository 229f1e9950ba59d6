"""A server's figures for Prometheus, over HTTP.

Knows: the figures' names and meaning, who may ask for them. Does not know: how they come about,
HTTP (wsgi.py does), the formats and encodings: prometheus-client's WSGI application does, a library
that nothing else needs.

docs/reference/metrics.md lists the figures. Those of the process are prometheus-client's own.

The loop that serves the regions serves the figures, too. So no figure is read while it changes, no
thread takes the interpreter's time from that loop, and connections are bounded like those of the
control socket. An answer is compressed if the request asks for that, which takes a ninth of the
time that it takes to write the figures (1.4 MB: 40 ms after 360 ms). There is no TLS and no
password: the default is to listen on 127.0.0.1 only.

A web page can make a browser on this machine connect here, under a name of the page's own that the
page's owner lets lead to 127.0.0.1 (DNS rebinding), and could then read the answer. So a request is
answered only if its Host header is an IP address, "localhost" or a name below it, the HOST that was
given, one of `hosts` (`--metrics-host`) or, if it listens on all addresses, this machine's own
name. An address cannot be rebound; the page needs a name.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from http import HTTPStatus

from .. import __version__
from ..errors import MetricsError
from ..server.report import PeerReport
from ..system.requests import Requester, RequestServer
from ..system.uncopied import Uncopied
from ..text import NAME, plain
from . import wsgi

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeAlias

    from prometheus_client.core import Metric

    from .control import Inspectable, Regions
    from .wsgi import Application, HttpRequest

    _Figure: TypeAlias = Callable[[Inspectable, list[PeerReport], float], float]

_log = logging.getLogger("ivshmem.metrics")

DEFAULT_HOST = "127.0.0.1"
PATH = "/metrics"
_BACKLOG = 1024

# Gauges with the label "region", in the order of the page.
_GAUGES: dict[str, tuple[str, _Figure]] = {
    "ivshmem_region_bytes": ("Size of the shared memory", lambda s, _, __: s.region.size),
    "ivshmem_vectors": ("Vectors of each peer", lambda s, _, __: s.vectors),
    "ivshmem_peers": ("Peers connected now", lambda _, peers, __: len(peers)),
    "ivshmem_setting_up_peers": (
        "Peers that were not sent their whole set-up yet",
        lambda _, peers, __: sum(not p.set_up for p in peers),
    ),
    "ivshmem_stalled_peers": (
        "Peers whose socket is full: they do not read",
        lambda _, peers, __: sum(p.stalled_since is not None for p in peers),
    ),
    "ivshmem_longest_stall_seconds": (
        "Since the peer that is stalled longest last read",
        lambda _, peers, now: max((_stalled(p, now) for p in peers), default=0.0),
    ),
    "ivshmem_pending_messages": (
        "Messages still to be sent, to all peers",
        lambda _, peers, __: sum(p.pending for p in peers),
    ),
    "ivshmem_pending_interrupts": (
        "Rings that peers have not taken, over all vectors",
        lambda _, peers, __: sum(sum(p.interrupts) for p in peers),
    ),
    "ivshmem_pending_vectors": (
        "Vectors with rings that were not taken",
        lambda _, peers, __: sum(sum(map(bool, p.interrupts)) for p in peers),
    ),
    "ivshmem_newcomers_waiting": (
        "Whether newcomers are left in the queue",
        lambda s, _, __: bool(s.paused),
    ),
}

# Counters with the label "region", by the server's own name.
_COUNTERS = {
    "joins": "Peers that joined",
    "leaves": "Peers that left",
    "messages": "Messages of the protocol that were sent",
    "refused": "Connections that the access rules refused",
    "starved": "Times that sending had to wait for memory or descriptors",
}

_PEER_GAUGES: dict[str, tuple[str, Callable[[PeerReport, float], float]]] = {
    "ivshmem_peer_pending_messages": ("Messages still to be sent to it", lambda p, _: p.pending),
    "ivshmem_peer_stalled_seconds": (
        "Since it last read, if its socket is full",
        lambda p, now: _stalled(p, now),
    ),
    "ivshmem_peer_pending_interrupts": (
        "Rings that it has not taken, over all vectors",
        lambda p, _: sum(p.interrupts),
    ),
}


class Figures:
    """A collector for prometheus-client: asks a service, in the thread that collects.

    That has to be the one that makes the service's steps, or one that keeps it from them.
    """

    def __init__(self, service: Regions, *, peers: bool = False) -> None:
        self._service = service
        self._peers = peers

    def collect(self) -> Iterator[Metric]:
        """What prometheus-client calls."""
        # Here, as in `_application`.
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        info = GaugeMetricFamily("ivshmem_info", "What serves", labels=["version"])
        info.add_metric([__version__], 1)
        yield info
        now = time.time()
        found = [
            (name, served.server, served.server.report())
            for name, served in self._service.regions.items()
        ]
        for metric, (text, figure) in _GAUGES.items():
            gauge = GaugeMetricFamily(metric, text, labels=["region"])
            for name, server, peers in found:
                gauge.add_metric([plain(name, NAME)], figure(server, peers, now))
            yield gauge
        for key, text in _COUNTERS.items():
            counter = CounterMetricFamily(f"ivshmem_{key}", text, labels=["region"])
            for name, server, _ in found:
                counter.add_metric([plain(name, NAME)], getattr(server.counts, key))
            yield counter
        for metric, (text, of_peer) in _PEER_GAUGES.items() if self._peers else ():
            gauge = GaugeMetricFamily(metric, text, labels=["region", "peer"])
            for name, _, peers in found:
                for report in peers:
                    gauge.add_metric([plain(name, NAME), str(report.peer.id)], of_peer(report, now))
            yield gauge


class Metrics(Uncopied):
    """Serves the figures on [HOST:]PORT; a context manager.

    The loop that serves the regions calls `step()` when `fileno()` is readable.

    Args:
        peers: also figures of each peer.
        hosts: more names by which this may be asked for, beside those that always are (see above).

    Attributes:
        address: where it listens; port 0 has become the one that the kernel chose.

    Raises:
        MetricsError: prometheus-client is not installed.
        ValueError: an address that is none.
        OSError: EADDRINUSE and the like, with the address in `filename`.
    """

    def __init__(
        self, address: str, service: Regions, *, peers: bool = False, hosts: Iterable[str] = ()
    ) -> None:
        host, port = parse_address(address)
        own = [socket.gethostname()] if _is_any(host) else []
        self._hosts = {_plain_host(name) for name in (host, *own, *hosts)}
        self._application = _application(Figures(service, peers=peers))
        with contextlib.ExitStack() as undo:
            listener = undo.enter_context(_listen(host, port))
            self._answering = RequestServer(
                listener,
                wsgi.cut_head,
                self._answer,
                too_long=wsgi.plain_answer(
                    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "too long\n"
                ),
            )
            undo.callback(self._answering.close)
            self.address = _shown(listener)
            self._undo = undo.pop_all()

    def fileno(self) -> int:
        """Readable when `step()` has something to do."""
        return self._answering.fileno()

    def step(self) -> None:
        """Do what there is to do, without waiting."""
        self._answering.step()

    def close(self) -> None:
        """Disconnect everybody and close the port; may be called twice."""
        self._undo.close()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _answer(self, caller: Requester, head: bytes) -> bytes:
        caller.closing = True
        request = wsgi.parse_head(head)
        if request is None:
            return wsgi.plain_answer(HTTPStatus.BAD_REQUEST, "this is an HTTP server\n")
        if (refusal := self._refusal(request)) is not None:
            return refusal
        try:
            return wsgi.run(self._application, request)
        except Exception as error:
            _log.exception("a scrape failed")
            reason = f"the server has an error, and logged it: {error!r}\n"
            return wsgi.plain_answer(HTTPStatus.INTERNAL_SERVER_ERROR, reason)

    def _refusal(self, request: HttpRequest) -> bytes | None:
        """What is answered to a request that the library is not asked about; None: it is."""
        asked = request.values_of("host")
        if len(asked) > 1 or not self._is_here(*asked):
            return wsgi.plain_answer(
                HTTPStatus.MISDIRECTED_REQUEST,
                "this server does not answer to that Host: ask by an IP address or localhost, or"
                " start it with --metrics-host NAME\n",
            )
        if request.path != PATH:  # the library answers any path
            return wsgi.plain_answer(HTTPStatus.NOT_FOUND, f"the figures are at {PATH}\n")
        return None

    def _is_here(self, asked: str = "localhost") -> bool:
        """Whether a Host header is this server's; HTTP/1.0 need not have one, browsers have."""
        host = asked
        if not host.endswith("]"):
            before, colon, port = host.rpartition(":")
            if colon and (port == "" or (port.isascii() and port.isdigit())):
                host = before
        name = _plain_host(host)
        return (
            name in self._hosts
            or name == "localhost"
            or name.endswith(".localhost")
            or _address(name) is not None
        )


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of [HOST:]PORT; an IPv6 address stands in brackets.

    Raises:
        ValueError: it is none.
    """
    host, _, digits = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"{text}: an IPv6 address stands in brackets, as in [::1]:9400")
    if not (digits.isascii() and digits.isdigit() and int(digits) <= 65535):
        raise ValueError(f"{text} is not an address: give [HOST:]PORT, for example 127.0.0.1:9400")
    return host or DEFAULT_HOST, int(digits)


def _plain_host(name: str) -> str:
    """A host as it is compared: without brackets and the final dot, in small letters."""
    return name.removeprefix("[").removesuffix("]").removesuffix(".").lower()


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def _is_any(host: str) -> bool:
    """Whether all of this machine's addresses are meant, so that others come by its name."""
    address = _address(host)
    return address is not None and address.is_unspecified


def _application(figures: Figures) -> Application:
    try:
        # Here, since few servers have metrics, and the library need not be installed.
        from prometheus_client import CollectorRegistry, ProcessCollector, make_wsgi_app
    except ImportError:
        raise MetricsError(
            "metrics need prometheus-client: pip install prometheus-client (Debian: apt-get"
            " install python3-prometheus-client)"
        ) from None
    registry = CollectorRegistry(auto_describe=True)  # knows the names, for ?name[]=NAME
    registry.register(figures)
    ProcessCollector(registry=registry)
    application: Application = make_wsgi_app(registry)
    return application


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind | socket.SOCK_NONBLOCK, proto)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(_BACKLOG)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        where = f"{host}:{port}"
        raise OSError(error.errno, f"{error.strerror}: choose another address", where) from None
    return listener


def _shown(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _stalled(report: PeerReport, now: float) -> float:
    return 0.0 if report.stalled_since is None else max(now - report.stalled_since, 0.0)
