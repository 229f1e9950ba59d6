"""By which names metrics are asked for: a web page must not read them under a name of its own."""

from __future__ import annotations

import contextlib
import http.client
import socket
from collections.abc import Iterator, Sequence

import pytest
from support.running import Running
from support.waiting import PATIENCE

from ivshmem.cli.main import main
from ivshmem.service.metrics import Metrics, parse_address


@contextlib.contextmanager
def serving(path: str, address: str = "127.0.0.1:0", hosts: Sequence[str] = ()) -> Iterator[int]:
    with Running({"default": path}) as made:
        metrics = made.add(Metrics(address, made.service, hosts=hosts))
        made.start()
        yield parse_address(metrics.address)[1]


def status(port: int, *hosts: str, version: str = "1.1") -> int:
    """The answer to a request with these Host headers."""
    lines = [f"GET /metrics HTTP/{version}", *(f"Host: {host}" for host in hosts), "", ""]
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as sock:
        sock.sendall("\r\n".join(lines).encode())
        answer = http.client.HTTPResponse(sock)
        answer.begin()
        body = answer.read()
    if answer.status == 421:
        assert b"--metrics-host NAME" in body
        assert b"ivshmem_" not in body
    return answer.status


HERE = [
    "127.0.0.1",
    "127.0.0.1:9400",
    "127.0.0.1:",
    "10.0.0.7:9400",
    "[::1]",
    "[::1]:9400",
    "localhost",
    "localhost:9400",
    "LocalHost.",
    "db.localhost",
]
ELSEWHERE = [
    "attacker.example",
    "attacker.example:9400",
    "127.0.0.1.attacker.example",
    "localhost.attacker.example",
    "notlocalhost",
    "127.0.0.1@attacker.example",
    "attacker.example:80:80",
    "[::1].attacker.example",
    "localhost:x",
    "",
    "x y",
    "0x7f.1",
]


@pytest.mark.parametrize("host", HERE)
def test_addresses_and_localhost(socket_path: str, host: str) -> None:
    with serving(socket_path) as port:
        assert status(port, host) == 200


@pytest.mark.parametrize("host", ELSEWHERE)
def test_foreign_names(socket_path: str, host: str) -> None:
    with serving(socket_path) as port:
        assert status(port, host) == 421
        assert status(port, "localhost") == 200


def test_several_or_none(socket_path: str) -> None:
    with serving(socket_path) as port:
        assert status(port, "localhost", "attacker.example") == 421
        assert status(port, "localhost", "localhost") == 421
        assert status(port, version="1.0") == 200


def test_names_that_were_given(socket_path: str) -> None:
    with serving(socket_path, "localhost:0", ["Node7.Example.org", "prom"]) as port:
        for host in ("node7.example.org:9400", "prom", "NODE7.example.org."):
            assert status(port, host) == 200
        assert status(port, "node8.example.org") == 421


def test_own_name_where_all_addresses_are_served(socket_path: str) -> None:
    own = socket.gethostname()
    with serving(socket_path, "0.0.0.0:0") as port:
        assert status(port, f"{own}:9400") == 200
        assert status(port, "attacker.example") == 421


def test_the_option_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):
        main(["serve", "--help"])
    assert "--metrics-host NAME" in capsys.readouterr().out
