"""Calls of a Server and a Service when half-made, closed, copied, forked, or by other threads."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.interruption import no_deadlock
from support.peer import RawPeer
from support.serving import running
from support.waiting import Background, in_child

from ivshmem import ClosedError, Server
from ivshmem.config import RegionConfig, ServiceConfig
from ivshmem.service.service import Service

CALLS: dict[str, Callable[[Server], object]] = {
    "fileno": lambda server: server.fileno(),
    "step": lambda server: server.step(0),
    "serve_forever": lambda server: server.serve_forever(),
    "start": lambda server: server.start(),
    "report": lambda server: server.report(),
    "report-short": lambda server: server.report(interrupts=False),
    "evict": lambda server: server.evict(0),
    "hold_leaves": lambda server: server.hold_leaves(True),
    "hold": lambda server: server.hold(0),
    "release": lambda server: server.release(0),
    "asker_is_gone": lambda server: server.asker_is_gone(None),
}
# What may be called at any time, and says nothing.
QUIET: dict[str, Callable[[Server], object]] = {
    "stop": lambda server: server.stop(),
    "close": lambda server: server.close(),
    "peers": lambda server: server.peers,
    "closed": lambda server: server.closed,
    "error": lambda server: server.error,
    "repr": repr,
}
SERVICE: dict[str, Callable[[Service], object]] = {
    "change": lambda service: service.change(service.config),
    "step": lambda service: service.step(0),
    "run": lambda service: service.run(),
}


def config(directory: Path) -> ServiceConfig:
    return ServiceConfig({"a": RegionConfig(str(directory / "a"), size=4096)})


# -- half-made ------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", CALLS)
def test_half_made(call: str) -> None:
    with pytest.raises(ClosedError):
        CALLS[call](Server.__new__(Server))


@pytest.mark.parametrize("call", QUIET)
def test_half_made_is_quiet(call: str) -> None:
    QUIET[call](Server.__new__(Server))
    gc.collect()


@pytest.mark.parametrize(
    "wrong",
    [
        {"vectors": -1},
        {"vectors": 2049},
        {"vectors": "two"},
        {"memory": "5000"},
        {"memory": -1},
        {"memory": None},
        {"memory": "much"},
        {"names": "yes"},
        {"names": -1},
        {"path": 3.5},
        {"path": ""},
        {"path": "/nowhere/at/all"},
        {"path": "x" * 200},
        {"surprise": 1},
    ],
    ids=lambda wrong: "-".join(f"{key}={str(value)[:20]}" for key, value in wrong.items()),
)
def test_wrong_arguments_leave_nothing(socket_path: str, wrong: dict[str, Any]) -> None:
    """One error, nothing printed by `__del__`, no descriptor and no socket."""
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises((TypeError, ValueError, OSError)):
        Server(**{"path": socket_path, **wrong})
    gc.collect()
    assert set(os.listdir("/proc/self/fd")) == before
    assert not os.path.exists(socket_path)


# -- copied ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, pickle.dumps])
@pytest.mark.parametrize("what", ["server", "service", "served"])
def test_no_copies(directory: Path, what: str, way: Callable[[object], object]) -> None:
    with Server(directory / "s") as server, Service(config(directory)) as service:
        service.open()
        original = {"server": server, "service": service, "served": service.regions["a"]}[what]
        with pytest.raises(TypeError):
            way(original)
        gc.collect()


# -- closed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", CALLS)
def test_closed(socket_path: str, call: str) -> None:
    server = Server(socket_path)
    server.close()
    with pytest.raises(ClosedError):
        CALLS[call](server)
    for quiet in QUIET.values():
        quiet(server)


# -- forked ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [*CALLS, *QUIET])
def test_forked(socket_path: str, call: str) -> None:
    """The parent's server serves on, whatever its child does."""

    def child() -> None:
        if call in CALLS:
            with pytest.raises(RuntimeError, match="forked child"):
                CALLS[call](server)
        else:
            QUIET[call](server)

    with no_deadlock(), Server(socket_path).start() as server:
        in_child(child)
        with RawPeer(socket_path) as peer:
            peer.set_up(1)


@pytest.mark.parametrize("call", [*SERVICE, "close", "abandon", "stop"])
def test_forked_service(directory: Path, call: str) -> None:
    def child() -> None:
        if call in SERVICE:
            with pytest.raises(RuntimeError, match="forked child"):
                SERVICE[call](service)
        else:
            getattr(service, call)()

    with no_deadlock(), Service(config(directory)) as service:
        service.open()
        in_child(child)
        with RawPeer(str(directory / "a")) as peer:
            joining = Background(lambda: peer.set_up(1))
            while joining.running:
                service.step(0.01)
            joining.result()


# -- other threads --------------------------------------------------------------------------------


def close(service: Service) -> None:
    service.close()


@pytest.mark.parametrize("call", ["change", "close"])
def test_a_service_from_another_thread(directory: Path, call: str) -> None:
    with no_deadlock(), running(config(directory)) as runs:
        runs.call(lambda: None)  # it runs
        calls = {**SERVICE, "close": close}
        with pytest.raises(RuntimeError, match="another thread"):
            calls[call](runs.service)
        with RawPeer(str(directory / "a")) as peer:
            peer.set_up(1)


@pytest.mark.parametrize("call", sorted({*CALLS} - {"serve_forever", "start", "step"}))
def test_many_threads_at_once(socket_path: str, call: str) -> None:
    with no_deadlock(), Server(socket_path).start() as server, RawPeer(socket_path) as peer:
        peer.set_up(1)
        begin = threading.Barrier(4)

        def ask() -> None:
            begin.wait()
            try:
                CALLS[call](server)
            except LookupError:  # somebody else evicted it
                assert call == "evict"

        for each in [Background(ask) for _ in range(4)]:
            each.result()
        if call == "evict":
            assert peer.take_until(lambda: peer.id == 0) is peer
        server.report()
