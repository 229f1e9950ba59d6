"""Figures for Prometheus, scraped from a real server."""

from __future__ import annotations

import contextlib
import gzip
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.leaks import open_fds
from support.pages import HOME
from support.peer import RawPeer
from support.running import Running
from support.waiting import PATIENCE, until

import ivshmem
from ivshmem.errors import MetricsError
from ivshmem.service import metrics
from ivshmem.system import requests

Figures = dict[tuple[str, tuple[tuple[str, str], ...]], float]
VECTORS = 2


class Scraped(Running):
    """A service with metrics, in a thread."""

    def __init__(self, path: str, vectors: int = VECTORS, *, peers: bool = False) -> None:
        super().__init__({"default": path}, vectors)
        self.metrics = self.add(metrics.Metrics("127.0.0.1:0", self.service, peers=peers))
        self.path = path
        self.start()

    @property
    def address(self) -> tuple[str, int]:
        return metrics.parse_address(self.metrics.address)

    def http(self, request: bytes) -> tuple[int, str, bytes]:
        """Status, head and body of the answer to this."""
        with socket.create_connection(self.address, PATIENCE) as sock:
            sock.sendall(request)
            answer = b""
            while more := sock.recv(1 << 16):
                answer += more
        head, _, body = answer.partition(b"\r\n\r\n")
        return int(head.split()[1]), head.decode(), body

    def figures(self) -> Figures:
        status, _, body = self.http(b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert status == 200
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(body.decode())
            for sample in family.samples
        }

    def figure(self, name: str, **labels: str) -> float:
        return self.figures()[name, tuple(sorted({"region": "default", **labels}.items()))]


@pytest.fixture
def scraped(socket_path: str) -> Iterator[Scraped]:
    with Scraped(socket_path) as made:
        yield made


def test_the_documented_ones_and_no_others(socket_path: str) -> None:
    with Scraped(socket_path, peers=True) as scraped:
        with ivshmem.connect(socket_path, timeout=PATIENCE):
            found = {name for name, _ in scraped.figures()}
    page = (HOME / "docs/reference/metrics.md").read_text()
    documented = set(re.findall(r"`((?:ivshmem|process)_\w+)`", page))
    assert found == documented


def test_what_they_say(scraped: Scraped) -> None:
    assert scraped.figure("ivshmem_peers") == 0
    with ivshmem.connect(scraped.path, timeout=PATIENCE) as client:
        client.ring(0, 1)
        client.ring(0, 1)
        found = scraped.figures()
        assert client.wait(1, timeout=0) == 2
    here = (("region", "default"),)
    assert found["ivshmem_region_bytes", here] == 4096
    assert found["ivshmem_vectors", here] == VECTORS
    assert found["ivshmem_peers", here] == 1
    assert found["ivshmem_pending_interrupts", here] == 2
    assert found["ivshmem_pending_vectors", here] == 1
    assert found["ivshmem_joins_total", here] == 1
    assert found["ivshmem_messages_total", here] == 3 + VECTORS
    assert not any(name.startswith("ivshmem_peer_") for name, _ in found)
    until(lambda: scraped.figure("ivshmem_leaves_total") == 1)
    scraped.server()._engine.paused = "for a reason"
    assert scraped.figure("ivshmem_newcomers_waiting") == 1


def test_a_stalled_peer(socket_path: str) -> None:
    with Scraped(socket_path, 64, peers=True) as scraped:
        with RawPeer(socket_path), ExitStack() as others:

            def is_stalled() -> bool:
                others.enter_context(RawPeer(socket_path)).set_up(64)
                found = scraped.figures()
                return found["ivshmem_peer_stalled_seconds", labels("0")] > 0

            until(is_stalled)
            found = scraped.figures()
            here = (("region", "default"),)
            assert found["ivshmem_stalled_peers", here] >= 1
            assert found["ivshmem_longest_stall_seconds", here] > 0
            assert found["ivshmem_pending_messages", here] == sum(
                value
                for (name, _), value in found.items()
                if name == "ivshmem_peer_pending_messages"
            )
            assert found["ivshmem_peer_pending_messages", labels("0")] > 0


def labels(peer: str) -> tuple[tuple[str, str], ...]:
    return ("peer", peer), ("region", "default")


def test_open_metrics_if_asked_for(scraped: Scraped) -> None:
    accept = b"accept: application/openmetrics-text; version=1.0.0\r\n"
    status, head, body = scraped.http(b"GET /metrics HTTP/1.1\r\n" + accept + b"\r\n")
    assert status == 200
    assert "application/openmetrics-text" in head
    assert body.endswith(b"# EOF\n")


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /metrics HTTP/1.0\n\n", 200),
        (b"GET /metrics?x=y HTTP/1.1\r\n\r\n", 200),
        (b"HEAD /metrics HTTP/1.1\r\n\r\n", 200),
        (b"POST /metrics HTTP/1.1\r\nContent-Length: 0\r\n\r\n", 405),
        (b"GET / HTTP/1.1\r\n\r\n", 404),
        (b"GET /../../etc/passwd HTTP/1.1\r\n\r\n", 404),
        (b"GET /metrics\r\n\r\n", 400),
        (b"\r\n\r\n", 400),
        (bytes(range(256)) + b"\n\n", 400),
        (b"GET /metrics HTTP/2\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nAccept: \xff\xfe\r\nAccept\r\n:\r\n\r\n", 200),
        (b"x" * 65_537, 431),
    ],
)
def test_requests(scraped: Scraped, request_: bytes, status: int) -> None:
    got, head, body = scraped.http(request_)
    assert got == status
    length = int(head.split("Content-Length: ")[1].split("\r\n")[0])
    assert length > 0
    assert len(body) == (0 if request_.startswith(b"HEAD") else length)


def test_those_who_send_nothing(scraped: Scraped) -> None:
    before = len(open_fds())
    with ExitStack() as idle:
        for _ in range(200):
            sock = idle.enter_context(socket.create_connection(scraped.address, PATIENCE))
            sock.send(b"GET /metrics HTTP/1.1\r\n")
        assert scraped.figure("ivshmem_peers") == 0
        assert len(open_fds()) - before - 200 <= requests.CALLERS


def test_compressed_if_asked_for(scraped: Scraped) -> None:
    ask = b"GET /metrics HTTP/1.1\r\nAccept-Encoding: deflate, gzip\r\n\r\n"
    status, head, body = scraped.http(ask)
    assert status == 200
    assert "Content-Encoding: gzip" in head
    assert b"ivshmem_peers" in gzip.decompress(body)


def test_only_some_figures_if_asked_for(scraped: Scraped) -> None:
    _, _, body = scraped.http(b"GET /metrics?name%5B%5D=ivshmem_info HTTP/1.1\r\n\r\n")
    families = {family.name for family in text_string_to_metric_families(body.decode())}
    assert families == {"ivshmem_info"}


def test_options(scraped: Scraped) -> None:
    """The library answers what it knows of HTTP."""
    status, head, _ = scraped.http(b"OPTIONS /metrics HTTP/1.1\r\n\r\n")
    assert status == 200
    assert "Allow: OPTIONS,GET" in head


def test_500_who_ask_and_do_not_read(scraped: Scraped) -> None:
    before = len(open_fds())
    with ExitStack() as silent:
        for _ in range(500):
            sock = silent.enter_context(socket.socket())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            sock.settimeout(PATIENCE)
            sock.connect(scraped.address)
            with contextlib.suppress(ConnectionError):  # it has hung up already
                sock.send(b"GET /metrics HTTP/1.1\r\n\r\n" * 100)
        with ivshmem.connect(scraped.path, timeout=PATIENCE):
            assert scraped.figure("ivshmem_peers") == 1
        assert len(open_fds()) - before - 500 <= requests.CALLERS + 2


def test_a_host_behind_a_malformed_line(scraped: Scraped) -> None:
    """What e-mail's parser would take for the end of the headers hides nothing."""
    ask = b"GET /metrics HTTP/1.1\r\nno colon\r\nHost: attacker.example\r\n\r\n"
    assert scraped.http(ask)[0] == 421


def test_a_failure_is_the_scraper_s(scraped: Scraped, caplog: pytest.LogCaptureFixture) -> None:
    broken = scraped.service.regions["broken"] = object()  # type: ignore[assignment]
    status, _, body = scraped.http(b"GET /metrics HTTP/1.1\r\n\r\n")
    assert status == 500
    assert b"AttributeError" in body
    assert scraped.service.regions.pop("broken") is broken
    assert scraped.figure("ivshmem_peers") == 0


def test_a_port_that_is_taken(scraped: Scraped) -> None:
    with pytest.raises(OSError, match="choose another address") as error:
        metrics.Metrics(scraped.metrics.address, scraped.service)
    assert error.value.filename == scraped.metrics.address


def test_without_prometheus_client(socket_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with Running({"default": socket_path}) as running:
        with pytest.raises(MetricsError, match=r"pip install prometheus-client"):
            metrics.Metrics("0", running.service)
